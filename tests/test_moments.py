"""Moments: however samples are cut, merged or taken away, those of all in float64; updates are transactions."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

import pyrepr
from pyrepr.similarity import CCA
from pyrepr.stats import LayerMoments, Moments
from pyrepr.stats import _blocks as blocks_module


def cut_short(make, function):
    """For line 1, 2, … of ours: function(make()), raising there. Yields what was made, until one gets through."""
    rooms = tuple(str(Path(pyrepr.__file__).parent / room) for room in ("stats", "similarity"))
    for line in itertools.count():
        left, made = line, make()

        def trace(frame, event, arg):
            nonlocal left
            if not frame.f_code.co_filename.startswith(rooms):
                return None
            if event == "line":
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            function(made)
        except KeyboardInterrupt:
            sys.settrace(before)
            yield made
        else:
            return
        finally:
            sys.settrace(before)


def equal(a, b):
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def same_state(one, two):
    for key, value in one.items():
        other = two[key]
        if isinstance(value, dict):
            same_state(value, other)
        elif isinstance(value, (list, tuple)) and value and torch.is_tensor(value[0]):
            assert all(equal(a, b) for a, b in zip(value, other, strict=True)), key
        elif torch.is_tensor(value):
            assert equal(value, other), key
        else:
            assert value == other, key


def is_state(stream, state):
    try:
        same_state(stream.state_dict(), state)
    except AssertionError:
        return False
    return True


STREAMS = {
    "layers": (LayerMoments, lambda s, x, y: s.update([x, y])),
    "cka": (pyrepr.StreamingCKA, lambda s, x, y: s.update([x], [y])),
    "cka of batches": (lambda: pyrepr.StreamingCKA(mode="minibatch"), lambda s, x, y: s.update([x], [y])),
    "rbf of batches": (lambda: pyrepr.StreamingCKA(mode="minibatch", kernel="rbf"), lambda s, x, y: s.update([x], [y])),
    "cka, merged": (pyrepr.StreamingCKA, lambda s, x, y: s.merge(pyrepr.StreamingCKA().update([x], [y]))),
    "two representations": (Moments, lambda s, x, y: s.update(x, y)),
    "classes": (lambda: Moments(classes=4), lambda s, x, y: s.update(x, y[:, 0].sign().long() + 1 + (len(y) > 12))),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_an_update_cut_short_at_any_line_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr(blocks_module, "WAITING_ROWS", 20)  # so that the last update adds waiting batches in, too
    make, update = STREAMS[kind]
    batches = [(torch.randn(n, 3), torch.randn(n, 5)) for n in (12, 12, 13)]

    def two():
        stream = make()
        for batch in batches[:2]:
            update(stream, *batch)
        return stream

    before, after = two().state_dict(), update(two(), *batches[2]).state_dict()
    done = [
        is_state(stream, after) or is_state(stream, before) - 1
        for stream in cut_short(two, lambda s: update(s, *batches[2]))
    ]
    assert len(done) > 25 and -1 not in done
    assert sum(done) <= 4 and not any(done[: -sum(done)])  # only on the way back to the caller


@pytest.mark.parametrize("action", ["first update", "calibrate", "load"])
def test_a_stream_of_batches_cut_short_at_any_line_is_as_before_or_after(action):
    x = torch.randn(9, 3)
    saved = pyrepr.StreamingCKA(estimator="biased", mode="minibatch").update([x]).state_dict()
    act = {
        "first update": lambda s: s.update([x]),
        "calibrate": lambda s: s.calibrate([x]),
        "load": lambda s: s.load_state_dict(saved),
    }[action]

    def make():
        return pyrepr.StreamingCKA(mode="minibatch", kernel="rbf")

    before, after = make().state_dict(), make()
    act(after)
    kept = [(is_state(s, after.state_dict()), is_state(s, before)) for s in cut_short(make, act)]
    assert len(kept) > 10 and all(old != new for new, old in kept)
    assert sum(new for new, _ in kept) <= 3


def test_blocks_in_several_groups_are_those_in_one(monkeypatch):
    xs = [torch.randn(50, d) for d in (3, 20, 7)]
    one = LayerMoments().update(xs).update(xs)
    monkeypatch.setattr(blocks_module, "GROUP_BYTES", 200)
    monkeypatch.setattr(blocks_module, "WAITING_ROWS", 1)
    many = LayerMoments().update(xs).update(xs)
    same_state(one.state_dict(), many.state_dict())


def data(dtype=torch.float64, n=300, d=9, q=4, mean=0.0):
    x = torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    y = x[:, :q] * 0.7 + torch.randn(n, q, dtype=torch.float64) + 3
    return (x + mean).to(dtype), y.to(dtype)


def labelled(n=240, d=6, classes=5, spread=1.0):
    y = torch.arange(n) % classes
    x = torch.randn(classes, d, dtype=torch.float64)[y] + spread * torch.randn(n, d, dtype=torch.float64)
    return x, y


def in_parts(x, y=None, cuts=(100, 1, 250), classes=None):
    moments, start = Moments(classes), 0
    for size in (*cuts, len(x)):
        part = slice(start, start + size)
        moments.update(x[part], None if y is None else y[part])
        start += size
    assert moments.samples == len(x)
    return moments


def test_mean_covariance_correlation():
    x, y = data()
    m = in_parts(x, y)
    torch.testing.assert_close(m.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    whole = torch.corrcoef(torch.cat([x, y], 1).T)
    torch.testing.assert_close(m.correlation, whole[:9, 9:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(in_parts(x).correlation, whole[:9, :9], rtol=1e-12, atol=1e-12)


def test_float32_at_a_mean_a_million_times_the_deviation():
    x, y = data(torch.float32, mean=0.0)
    x = x + 1e6
    m = in_parts(x, y)
    torch.testing.assert_close(m.covariance, torch.cov(x.double().T), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(m.mean, x.double().mean(0), rtol=1e-12, atol=0)


def test_merge_and_difference():
    x, y = data()
    whole, first, rest = in_parts(x, y), in_parts(x[:130], y[:130]), in_parts(x[130:], y[130:])
    for got, expected in (
        (Moments().merge(first).merge(rest), whole),
        (whole - first, rest),
        (whole - rest, first),
    ):
        assert got.samples == expected.samples
        for name in ("mean", "covariance", "correlation"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.cka(), expected.cka(), rtol=1e-10, atol=1e-12)
    assert (first.samples, rest.samples) == (130, 170)


def test_classes_merge_and_difference():
    x, y = labelled()
    y[:100] = y[:100].clamp_max(2)  # the first part has three classes, and each part begins with others
    whole = in_parts(x, y, classes=5)
    first, rest = in_parts(x[:100], y[:100], classes=5), in_parts(x[100:], y[100:], classes=5)
    for got, expected in ((Moments(5).merge(first).merge(rest), whole), (whole - first, rest)):
        assert torch.equal(got.counts, expected.counts)
        for name in ("mean", "covariance", "within", "between", "class_means"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close((whole - rest).covariance, first.covariance, rtol=1e-10, atol=1e-11)
    with pytest.raises(ValueError, match="has more of a class"):
        first - in_parts(x[100:180], y[100:180], classes=5)


def test_within_and_between_classes():
    x, y = labelled()
    m = in_parts(x, y, classes=5)
    means = torch.stack([x[y == c].mean(0) for c in range(5)])
    deviation, between = x - means[y], means - means.mean(0)
    torch.testing.assert_close(m.class_means, means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.within, deviation.T @ deviation / len(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.between, between.T @ between / 5, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m.mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_within_does_not_cancel_where_classes_collapse():
    """within / between = 1e-10, in squares: total minus between would leave six digits; here nine remain."""
    x, y = labelled(spread=1e-5)
    m = in_parts(x, y, classes=5)
    means = torch.stack([x[y == c].mean(0) for c in range(5)])
    exact = (x - means[y]).T @ (x - means[y]) / len(x)
    assert 3e-11 < exact.trace() / m.between.trace() < 3e-10
    torch.testing.assert_close(m.within, exact, rtol=1e-9, atol=1e-9 * float(exact.trace()))


def test_ridge_is_scikit_learns():
    from sklearn.linear_model import Ridge, RidgeClassifier

    x, y = data()
    alphas = (0.1, 1.0, 30.0)
    found = in_parts(x, y).ridge(alphas)
    many = in_parts(x, y).ridge(torch.linspace(0.1, 30, 40))  # by eigenvectors
    for i, alpha in enumerate(alphas):
        theirs = Ridge(alpha=alpha).fit(x.numpy(), y.numpy())
        torch.testing.assert_close(found.coef[i], torch.tensor(theirs.coef_), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.intercept[i], torch.tensor(theirs.intercept_), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(many.coef[0], found.coef[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(many.coef[-1], found.coef[-1], rtol=1e-9, atol=1e-10)
    x, y = labelled()
    theirs = RidgeClassifier(alpha=2.0).fit(x.numpy(), y.numpy())
    coef, intercept = in_parts(x, y, classes=5).ridge(2.0)
    torch.testing.assert_close(2 * coef, torch.tensor(theirs.coef_), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(2 * intercept - 1, torch.tensor(theirs.intercept_), rtol=1e-9, atol=1e-9)


def test_r2_in_and_out_of_sample():
    from sklearn.metrics import r2_score

    x, y = data()
    fitted, other = in_parts(x[:200], y[:200]), in_parts(x[200:], y[200:], cuts=(30,))
    model = fitted.ridge(3.0)
    for multioutput in ("raw_values", "uniform_average", "variance_weighted"):
        for part, moments in ((slice(0, 200), fitted), (slice(200, None), other)):
            predicted = x[part] @ model.coef.T + model.intercept
            score = r2_score(y[part].numpy(), predicted.numpy(), multioutput=multioutput)
            expected = torch.as_tensor(score, dtype=torch.float64)
            torch.testing.assert_close(moments.r2_of(model, multioutput), expected, rtol=1e-10, atol=1e-10)
    assert float(fitted.r2()) >= float(fitted.r2(50.0))


def test_least_squares_of_a_singular_covariance_is_that_of_least_norm():
    x, y = data()
    x = torch.cat([x, x[:, :3]], 1)
    coef, _ = in_parts(x, y).ridge(0.0)
    expected = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution.T
    torch.testing.assert_close(coef, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(in_parts(x, y).ridge(1e-9).coef, expected, rtol=1e-5, atol=1e-5)


def test_pca_is_scikit_learns():
    from sklearn.decomposition import PCA

    x, _ = data()
    found, theirs = in_parts(x).pca(4), PCA(4).fit(x.numpy())
    torch.testing.assert_close(found.explained_variance, torch.tensor(theirs.explained_variance_), rtol=1e-9, atol=0)
    ratio = torch.tensor(theirs.explained_variance_ratio_)
    torch.testing.assert_close(found.explained_variance_ratio, ratio, rtol=1e-9, atol=0)
    cosines = (found.components * torch.tensor(theirs.components_)).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-9, atol=0)


def test_alignment_has_outside_oracles():
    from scipy.linalg import subspace_angles
    from scipy.spatial import procrustes

    x, y = data()
    m = in_parts(x, y)
    cosines = subspace_angles((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy())
    expected = torch.tensor(cosines).cos().sort(descending=True).values
    torch.testing.assert_close(m.cca(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(m.svcca(1.0), expected.mean(), rtol=1e-9, atol=1e-9)
    padded = torch.cat([y, torch.zeros(300, 5, dtype=y.dtype)], 1)
    disparity = procrustes(x.numpy(), padded.numpy())[2]
    torch.testing.assert_close(1 - m.procrustes() ** 2, torch.tensor(disparity), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(m.procrustes("angular"), 1 - 2 / torch.pi * m.procrustes().arccos())
    for estimator in ("unbiased", "biased"):
        torch.testing.assert_close(m.cka(estimator), pyrepr.cka(x, y, estimator=estimator), rtol=1e-10, atol=1e-12)
    mixed = in_parts(x, y @ torch.randn(4, 4, dtype=y.dtype))
    torch.testing.assert_close(mixed.cca(), m.cca(), rtol=1e-9, atol=1e-9)


def test_pwcca_weighs_by_the_first_argument():
    x, y = data()
    qx, qy = (torch.linalg.qr(a - a.mean(0)).Q for a in (x, y))
    left, correlations, _ = torch.linalg.svd(qx.T @ qy, full_matrices=False)
    weights = ((qx @ left).T @ (x - x.mean(0))).abs().sum(1)
    expected = (weights * correlations).sum() / weights.sum()
    torch.testing.assert_close(in_parts(x, y).pwcca(), expected, rtol=1e-9, atol=1e-9)
    assert abs(float(in_parts(y, x).pwcca() - expected)) > 1e-3


@pytest.mark.parametrize("classes", [None, 5])
def test_states_go_through_a_file_and_bad_ones_are_refused(tmp_path, classes):
    x, y = labelled()
    moments = in_parts(x, y if classes else y.double(), classes=classes)
    torch.save(moments.state_dict(), tmp_path / "m.pt")
    restored = Moments()
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    restored.load_state_dict(state)
    assert restored.classes == classes and torch.equal(restored.covariance, moments.covariance)
    broken = {**state, "sums": {**state["sums"], "counts": torch.ones(3)}} if classes else {**state, "widths": [3, 1]}
    for bad in ({}, 3, {"classes": 1}, broken):
        with pytest.raises(ValueError, match=r"state_dict|classes must be"):
            restored.load_state_dict(bad)
    assert torch.equal(restored.covariance, moments.covariance)
    assert restored.samples == 240


def test_classes_without_samples_are_named():
    x, y = labelled()
    m = in_parts(x, y, classes=7)
    with pytest.warns(UserWarning, match="classes without samples: 5, 6"):
        means = m.class_means
    assert means[5:].isnan().all() and means[:5].isfinite().all()
    torch.testing.assert_close(m.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_bad_input():
    x, y = labelled()
    m = Moments(5).update(x, y)
    for call, message in (
        (lambda: Moments(1), "classes must be an integer of at least 2, got 1"),
        (lambda: Moments().mean, "at least 1 samples for this, got 0"),
        (lambda: m.update(x, y + 3), r"y must hold labels in \[0, 5\), got 3 to 7"),
        (lambda: m.update(x, y[:7]), r"y must have shape \[n\] = \[240\]"),
        (lambda: m.update(x[:, :2], y), "the 6 features of the first update"),
        (lambda: m.update(x * torch.nan, y), "x must be finite, got NaN or infinity in row 0"),
        (lambda: m.ridge(-1.0), "alphas must be finite numbers of at least 0"),
        (lambda: m.cka(), "estimator must be 'biased' with classes"),
        (lambda: m.merge(Moments()), "other must have classes=5, got None"),
        (lambda: m - Moments(5).update(x.repeat(2, 1), y.repeat(2)), "some of the 240 samples, got 480"),
        (lambda: m.pca(9), "k must be an integer from 1 to the number of features, 6"),
        (lambda: Moments().update(x).ridge(), "needs a y in every update"),
        (lambda: Moments().update(x).within, "class statistics need"),
        (lambda: Moments().update(x[:6], x[:6]).cca(), "more samples than features, got 6 samples"),
        (lambda: m.procrustes("round"), "kind must be 'shape' or 'angular'"),
        (lambda: m.svcca(0), "variance must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="y must be int32"):
        m.update(x, y.double())
    assert m.samples == 240 and torch.equal(m.covariance, Moments(5).update(x, y).covariance)


def test_classes_have_the_same_bits_for_any_number_of_threads():
    x, y = torch.randn(65, 17).half(), torch.arange(65) % 5
    found = {}
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        m = Moments(classes=5).update(x[:28], y[:28]).merge(Moments(classes=5).update(x[28:], y[28:]))
        found[threads] = [m.within, m.between, m.mean, m.covariance]
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for each in found.values() for a, b in zip(each, found[1], strict=True))


def rows_solution(x, y, alpha):
    """Ridge regression from the rows themselves, by singular values of [X; √λ]: coef and R²."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    d = x.shape[1]
    tall = torch.cat([x, alpha**0.5 * torch.eye(d, dtype=x.dtype)]), torch.cat([y, y.new_zeros(d, y.shape[1])])
    coef = torch.linalg.lstsq(*tall, driver="gelsd", rcond=1e-14).solution
    return coef.T, 1 - (y - x @ coef).square().sum(0) / y.square().sum(0)


def uneven(what, size, n=40):
    """Float32 rows, targets of theirs, and something `size` times as large as the rest."""
    x, noise = torch.randn(n, 6), torch.randn(n, 2)
    y = x @ torch.randn(6, 2) + noise
    x[{"element": (3, 2), "feature": (slice(None), 2), "row": 3}[what]] *= size
    return x, y


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("what", ["element", "feature"])
@pytest.mark.parametrize("size", [1e4, 1e8])
def test_a_feature_or_an_element_that_dwarfs_all_others_costs_no_digits(backend_name, what, size):
    x, y = uneven(what, size)
    with pyrepr.use_backend(backend_name):
        moments = in_parts(x, y)
        for alpha in (0.0, 1e-6, 1.0, 100.0):
            coef, r2 = rows_solution(x, y, alpha)
            found = moments.ridge(alpha).coef
            torch.testing.assert_close(moments.r2(alpha, "raw_values"), r2, rtol=0, atol=1e-9)
            torch.testing.assert_close(found, coef, rtol=0, atol=1e-6 * float(coef.abs().max()))
        many = torch.cat([torch.tensor([1e-6, 1.0]), torch.linspace(2, 30, 18)])
        torch.testing.assert_close(moments.ridge(many).coef[1], moments.ridge(1.0).coef, rtol=1e-9, atol=1e-12)


def test_more_features_than_rows_and_a_small_lambda_keep_their_digits():
    x, y = 100 * torch.randn(8, 8), torch.randn(8, 3)
    y[3, 1] = -1e5
    coef, _ = rows_solution(x, y, 1.0)
    found = in_parts(x, y, cuts=(5,)).ridge(1.0).coef
    assert bool(((found - coef).abs().amax(1) <= 1e-9 * coef.abs().amax(1)).all())


@pytest.mark.parametrize("n", [40, 3000])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8, 1e10])
def test_rows_that_drown_all_others_are_refused(n, size):
    x, y = uneven("row", size, n)
    x[n // 2] *= 0.7 * size
    moments = in_parts(x, y, cuts=(n // 3,))
    for alpha in (0.0, 1e-6, 1.0, 100.0):
        if size >= 1e8:
            with pytest.raises(ValueError, match=r"x has rows, or directions, .* take alphas of at least"):
                moments.ridge(alpha)
        else:
            _, r2 = rows_solution(x, y, alpha)
            torch.testing.assert_close(moments.r2(alpha, "raw_values"), r2, rtol=0, atol=1e-3)
    enough = 1e4 * size**2 * 2.0**-52 * 6
    torch.testing.assert_close(moments.r2(enough, "raw_values"), rows_solution(x, y, enough)[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [7, 30, 150])
def test_rounded_copies_of_features_are_not_refused(n):
    x = torch.randn(n, 6)
    x = torch.cat([x, x @ torch.randn(6, 2)], 1)  # in float32: singular but for rounding
    y = torch.randn(n, 2)
    coef, _ = rows_solution(x[:, :6], y, 0.0)
    moments = in_parts(x, y, cuts=(n // 2,))
    fitted = x.double() @ moments.ridge(0.0).coef.T
    expected = x[:, :6].double() @ coef.T
    torch.testing.assert_close(fitted - fitted.mean(0), expected - expected.mean(0), rtol=0, atol=1e-4)
    assert bool(moments.ridge([1e-9, 1e-3]).coef.isfinite().all())


@pytest.mark.parametrize("size", [1.0, 1e4, 1e6])
def test_canonical_correlations_do_not_depend_on_units(size):
    x, y = data()
    plain, larger = in_parts(x, y), x.clone()
    larger[:, 1] *= size
    moments = in_parts(larger, y)
    torch.testing.assert_close(moments.cca(), plain.cca(), rtol=1e-8, atol=1e-8)
    q = torch.linalg.qr(larger - larger.mean(0)).Q
    left, correlations, _ = torch.linalg.svd(q.T @ torch.linalg.qr(y - y.mean(0)).Q, full_matrices=False)
    weights = ((q @ left).T @ (larger - larger.mean(0))).abs().sum(1)
    pwcca = (weights * correlations).sum() / weights.sum()
    torch.testing.assert_close(moments.pwcca(), pwcca, rtol=1e-8, atol=1e-8)
    layers = LayerMoments().update([larger], [y])
    for measure, truth in ((CCA(), plain.cca().mean()), (CCA(kind="pwcca"), pwcca)):
        torch.testing.assert_close(measure(larger, y), truth, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(measure.of_moments(layers)[0, 0], truth, rtol=1e-8, atol=1e-8)
