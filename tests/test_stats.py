"""Probes, neural collapse, spectra: definitions in float64 and scikit-learn's values."""

from __future__ import annotations

import weakref
from unittest import mock

import numpy as np
import pytest
import torch

from pyrepr.stats import (
    Moments,
    concept_depth,
    effective_rank,
    linear_probe,
    mean_cosine,
    neural_collapse,
    v_information,
)
from pyrepr.stats._covariances import solve_ridge, solve_ridge_quickly
from pyrepr.stats._folds import FoldSums
from pyrepr.stats.probes import _Dealer


def digits(n=600):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:n], dtype=torch.float64), torch.tensor(y[:n])
    return {"pixels": x, "mixed": torch.tanh(x @ torch.randn(64, 20, dtype=x.dtype) / 20), "few": x[:, 20:25]}, y


def folds_of(n, folds=5, seed=0):
    dealt = _Dealer(folds, seed)(n)
    return [((dealt != f).nonzero()[:, 0].numpy(), (dealt == f).nonzero()[:, 0].numpy()) for f in range(folds)]


def test_cross_validated_accuracy_is_scikit_learns():
    from sklearn.linear_model import RidgeClassifier

    layers, y = digits()
    probe = linear_probe(layers, y, alphas=(1.0, 300.0))
    assert probe.layers == ("pixels", "mixed", "few") and probe.samples == 600 and probe.metric == "accuracy"
    for i, x in enumerate(layers.values()):
        for j, alpha in enumerate((1.0, 300.0)):
            right = 0
            for train, test in folds_of(600):
                model = RidgeClassifier(alpha=alpha).fit(x[train].numpy(), y[train].numpy())
                right += int((model.predict(x[test].numpy()) == y[test].numpy()).sum())
            assert abs(float(probe.scores[i, j]) - right / 600) < 1e-12
            p = right / 600
            assert abs(float(probe.stderr[i, j]) - (p * (1 - p) / 600) ** 0.5) < 1e-12
    whole = RidgeClassifier(alpha=float(probe.best_alpha[0])).fit(layers["pixels"].numpy(), y.numpy())
    torch.testing.assert_close(2 * probe.models["pixels"].coef, torch.tensor(whole.coef_), rtol=1e-7, atol=1e-9)
    assert abs(probe.chance - float(y.bincount().max()) / 600) < 1e-12


def test_a_loader_gives_what_tensors_give():
    layers, y = digits()
    whole = linear_probe(layers, y)
    loader = [({k: x[i : i + 97] for k, x in layers.items()}, y[i : i + 97]) for i in range(0, 600, 97)]
    streamed = linear_probe(loader, classes=10)
    assert torch.equal(streamed.scores, whole.scores) and streamed.layers == whole.layers
    small = [({k: x[i : i + 3] for k, x in layers.items()}, y[i : i + 3]) for i in range(0, 600, 3)]  # not all folds
    assert torch.equal(linear_probe(small, classes=10).scores, whole.scores)
    with pytest.raises(ValueError, match="an iterable that starts anew every time"):
        linear_probe(iter(loader), classes=10)
    with pytest.raises(ValueError, match="classes must be given"):
        linear_probe(loader)


def test_validation_data():
    from sklearn.linear_model import RidgeClassifier

    layers, y = digits()
    train, test = {k: x[:400] for k, x in layers.items()}, {k: x[400:] for k, x in layers.items()}
    probe = linear_probe(train, y[:400], alphas=10.0, val=(test, y[400:]))
    assert probe.samples == 200
    for i, name in enumerate(layers):
        model = RidgeClassifier(alpha=10.0).fit(train[name].numpy(), y[:400].numpy())
        assert abs(float(probe.scores[i, 0]) - model.score(test[name].numpy(), y[400:].numpy())) < 1e-12


@pytest.mark.parametrize("held_out", [False, True])
def test_regression_is_scikit_learns(held_out):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    layers, y = digits()
    target = torch.stack([y.double(), layers["pixels"].mean(1)], 1)
    if held_out:
        train, test = {k: x[:400] for k, x in layers.items()}, {k: x[400:] for k, x in layers.items()}
        probe = linear_probe(train, target[:400], alphas=(1.0, 50.0), val=(test, target[400:]), task="regression")
    else:
        probe = linear_probe(layers, target, alphas=(1.0, 50.0), task="regression")
    for i, x in enumerate(layers.values()):
        for j, alpha in enumerate((1.0, 50.0)):
            splits = [(np.arange(400), np.arange(400, 600))] if held_out else folds_of(600)
            predicted, truth = [], []
            for train, test in splits:
                model = Ridge(alpha=alpha).fit(x[train].numpy(), target[train].numpy())
                predicted.append(model.predict(x[test].numpy()))
                truth.append(target[test].numpy())
            score = r2_score(np.concatenate(truth), np.concatenate(predicted), multioutput="variance_weighted")
            assert abs(float(probe.scores[i, j]) - score) < 1e-9
    assert bool((probe.stderr > 0).all()) and bool((probe.stderr < 0.2).all())


def test_soft_labels_and_float32():
    layers, y = digits()
    hard = linear_probe(layers, y)
    soft = linear_probe(layers, torch.nn.functional.one_hot(y, 10).double())
    torch.testing.assert_close(soft.scores, hard.scores)
    low = linear_probe({k: x.float() for k, x in layers.items()}, y)
    torch.testing.assert_close(low.scores, hard.scores, rtol=0, atol=0.01)


def test_picture_and_table(tmp_path):
    layers, y = digits(200)
    probe = linear_probe(layers, y)
    probe.plot(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 5000
    assert "pixels" in str(probe) and "accuracy" in str(probe)
    with pytest.raises(ValueError, match="path must end in"):
        probe.plot(tmp_path / "depth.gif")


def test_a_probe_names_classes_that_nobody_can_learn():
    x, y = torch.randn(60, 4), torch.arange(60) % 2 * 2
    with pytest.warns(UserWarning, match="without samples: 1, 3; they are never the answer"):
        linear_probe({"x": x}, y, classes=4)
    with pytest.warns(UserWarning, match="without samples: 1;"):
        linear_probe({"x": x}, y, val=({"x": x}, y))


def digits_and_noise(n=400):
    layers, y = digits(n)
    x = layers["pixels"]
    return (x - x.mean(0)) + 3 * torch.randn(x.shape, dtype=x.dtype), y


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_large_means_and_far_classes_cost_no_digits(task):
    x, y = digits_and_noise()
    target = y if task == "classification" else torch.stack([x[:, 20] + 1e5, y + 1e5], 1).float().double()
    expected = linear_probe({"a": x}, target, task=task)
    far = (x + 3e5 * torch.randn(64, dtype=x.dtype)).float()
    exact = linear_probe({"a": far.double()}, target, task=task)  # of features as float32 holds them
    target = target if task == "classification" else target.float()
    found = linear_probe({"a": far}, target, task=task)
    torch.testing.assert_close(found.scores, exact.scores, rtol=0, atol=1e-3 if task == "regression" else 1e-12)
    torch.testing.assert_close(found.models["a"].coef, exact.models["a"].coef, rtol=1e-2, atol=1e-5)
    assert float((expected.best - found.best).abs()) < 0.02


def test_a_class_that_comes_late_and_lies_far_away_keeps_its_digits():
    """Around the first batch's mean alone the spread within the second class would be rounding."""
    x, y = torch.randn(300, 6), torch.arange(300) // 150
    x[150:] += 1e4
    x[:, 0] += torch.where(y == 0, 0.0, 2.0)
    batches = [({"a": a}, b) for a, b in zip(x.split(50), y.split(50), strict=True)]
    found = linear_probe(batches, classes=2, alphas=1e-3).models["a"]
    expected = linear_probe({"a": x.double()}, y, alphas=1e-3).models["a"]
    torch.testing.assert_close(found.coef, expected.coef, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    "spread", [torch.ones(60), torch.logspace(0, -4, 60), torch.tensor([1000.0] + [1.0] * 59), torch.full((60,), 1e-12)]
)
@pytest.mark.parametrize("alphas", [(1.0, 1e4), (1e-30, 1e-20), (0.0,), tuple(range(1, 20))])
def test_factors_in_float32_are_corrected(spread, alphas):
    turn = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    x = (torch.randn(900, 60, dtype=torch.float64) * spread) @ turn
    sxx, sxy, alphas = x.T @ x, x.T @ torch.randn(900, 3, dtype=torch.float64), torch.tensor(alphas).double()
    found, expected = solve_ridge_quickly(sxx, sxy, alphas), solve_ridge(sxx, sxy, alphas)
    assert bool(((found - expected).norm(dim=(1, 2)) <= 1e-7 * expected.norm(dim=(1, 2))).all())


def test_layers_in_memory_are_taken_one_at_a_time():
    layers, y = digits(300)
    seen = []

    class Counted(FoldSums):
        def __init__(self, *args):
            seen.append(weakref.ref(self))
            super().__init__(*args)
            assert sum(one() is not None for one in seen) == 1

    with mock.patch("pyrepr.stats.probes.FoldSums", Counted):
        alone = linear_probe(layers, y)
    streamed = linear_probe([(layers, y)], classes=10)
    assert len(seen) == len(layers) and torch.equal(alone.scores, streamed.scores)


def test_bad_input_of_probes():
    layers, y = digits(60)
    layer_with_a_hole = torch.randn(60, 2)
    x, soft = layer_with_a_hole.clone(), torch.nn.functional.one_hot(y, 10).float()
    layer_with_a_hole[41, 1] = torch.nan
    for call, message in (
        (lambda: linear_probe(layers, y, folds=1), "folds must be an integer of at least 2, got 1"),
        (lambda: linear_probe(layers, y, folds=40), "folds must be at most half of the 60 samples, got 40"),
        (lambda: linear_probe(layers, y[:7]), "y must have a row for each of the 60 samples"),
        (lambda: linear_probe(layers, y, task="ranking"), "task must be"),
        (lambda: linear_probe(layers, y, classes=5), r"y must hold labels in \[0, 5\), got 0 to 9"),
        (lambda: linear_probe({}, y), "layers must hold at least one layer"),
        (lambda: linear_probe(layers), "y must be the labels or targets"),
        (lambda: linear_probe({"a": layer_with_a_hole}, y), "layer a must be finite, got NaN or infinity in row 41"),
        (lambda: linear_probe(layers, y, alphas=-1), "alphas must be finite numbers of at least 0"),
        (lambda: linear_probe(layers, torch.zeros(60).long()), "y must hold at least two classes, got class 0 alone"),
        (lambda: linear_probe(layers, y * 0 + 2, classes=4), "y must hold at least two classes, got class 2 alone"),
        (lambda: linear_probe({"a": x[:0]}, y[:0]), "y must hold at least one label, got none"),
        (lambda: linear_probe(layers, y - 1), r"y must hold labels in \[0, 9\), got -1 to 8"),
        (lambda: linear_probe(layers, -soft), "y must be soft labels of at least 0, got -1"),
        (lambda: linear_probe(layers, soft * torch.nan), "y must be finite, got NaN or infinity in row 0"),
        (lambda: linear_probe({"a": x, "b": x[:50]}, y), "b must have the n of a, 60 samples, got 50"),
        (lambda: linear_probe({"a": x[:, :0]}, y), r"layer a must have at least one feature, got \[60, 0\]"),
        (lambda: linear_probe({"a": x * 1e30}, y), "layer a must have squares that float32 can hold"),
        (lambda: linear_probe({"a": x}, torch.ones(60), task="regression"), "y must vary, got the same targets"),
        (lambda: linear_probe({"a": x}, y, val=({"a": x[:, :1]}, y)), r"layer a must have 2 features, got \[60, 1\]"),
        (lambda: linear_probe({"a": x}, y, val=({"a": x}, y + 3)), r"y must hold labels in \[0, 10\), got 3 to 12"),
        (lambda: linear_probe({"a": x}, y, val=({"a": x[:0]}, y[:0])), "val must hold at least one sample, got none"),
        (lambda: linear_probe({"a": x}, y, val=({"a": layer_with_a_hole}, y)), "layer a must be finite, .* in row 41"),
        (
            lambda: linear_probe({"a": x}, x, val=({"a": x}, x[:, :1]), task="regression"),
            "layer a must have 2 features and 2 targets in val, got 2 and 1",
        ),
        (
            lambda: linear_probe({"a": x}, x, val=({"a": x[:1]}, x[:1]), task="regression"),
            "val must hold at least 2 samples",
        ),
        (
            lambda: linear_probe([({"a": x}, y), ({"a": x[:, :1]}, y)], classes=10),
            r"layer a must have 2 features, got \[60, 1\]",
        ),
        (lambda: linear_probe([({"a": x}, y), ({"a": x}, soft)], classes=10), "y must be of one kind and width"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_v_information_of_gaussians_is_their_mutual_information():
    rho = 0.8
    x = torch.randn(200_000, 1, dtype=torch.float64)
    y = rho * x + (1 - rho**2) ** 0.5 * torch.randn(200_000, 1, dtype=torch.float64)
    assert abs(float(v_information(x, y)) - -0.5 * np.log(1 - rho**2)) < 0.01
    assert float(v_information(x, torch.randn(200_000).double())) < 1e-4
    assert float(v_information(x, 3 * x)) > 10


def test_concept_depth():
    assert concept_depth([0.5, 0.5, 0.9, 1.0, 0.99], chance=0.5) == (3, 0.75, 2)
    assert concept_depth(torch.tensor([0.7, 0.7])) == (0, 0.0, 0)
    with pytest.raises(ValueError, match="share must be in"):
        concept_depth([0.1], share=0)
    with pytest.raises(ValueError, match="scores must be finite"):
        concept_depth([])
    for chance in (float("nan"), 0.7):
        with pytest.raises(ValueError, match=r"chance must be below the best score, 0\.7, got"):
            concept_depth([0.5, 0.7], chance=chance)


def collapsed(spread, classes=4, n=400, d=10):
    simplex = torch.eye(classes, d, dtype=torch.float64) - 0.0
    y = torch.arange(n) % classes
    return simplex[y] * 3 + spread * torch.randn(n, d, dtype=torch.float64) + 7, y


def test_neural_collapse_is_its_definition():
    x, y = collapsed(0.5)
    weight, bias = torch.randn(4, 10, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    m = means - means.mean(0)
    within = (x - means[y]).T @ (x - means[y]) / len(x)
    nc1 = torch.trace(within @ torch.linalg.pinv(m.T @ m / 4)) / 4
    simplex = (torch.eye(4, dtype=x.dtype) - 0.25) / 3**0.5
    nc2 = (m @ m.T / (m @ m.T).norm() - simplex).norm()
    nc3 = (weight / weight.norm() - m / m.norm()).norm()
    nc4 = ((x @ weight.T + bias).argmax(1) != torch.cdist(x, means).argmin(1)).double().mean()
    found = neural_collapse(x, y, weight, bias)
    for got, expected in zip(found, (nc1, nc2, nc3, nc4), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    soft = neural_collapse(x, torch.nn.functional.one_hot(y, 4).double(), weight, bias)
    for got, expected in zip(soft, found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    stream = neural_collapse(Moments(4).update(x[:99], y[:99]).update(x[99:], y[99:]), weight=weight)
    torch.testing.assert_close(torch.stack(stream[:3]), torch.stack(found[:3]), rtol=1e-9, atol=1e-12)
    assert stream.nc4.isnan()


def test_collapse_to_ten_digits():
    """nc1 falls as the square of the spread, down to where total minus between would be noise."""
    for spread in (1e-2, 1e-4, 1e-6):
        x, y = collapsed(spread)
        means = torch.stack([x[y == c].mean(0) for c in range(4)])
        m = means - means.mean(0)
        within = (x - means[y]).T @ (x - means[y]) / len(x)
        expected = torch.trace(within @ torch.linalg.pinv(m.T @ m / 4)) / 4
        found = neural_collapse(x, y, m)
        torch.testing.assert_close(found.nc1, expected, rtol=1e-6, atol=0)
        assert float(found.nc2) < 3 * spread and float(found.nc3) < 1e-12 and float(found.nc4) == 0


def test_bad_input_of_collapse():
    x, y = collapsed(0.5)
    for call, message in (
        (lambda: neural_collapse(x, y, x[:4] * torch.nan), "weight must be finite, got NaN or infinity in row 0"),
        (lambda: neural_collapse(x, y, x[:4], torch.full((4,), torch.inf)), "bias must be finite"),
        (lambda: neural_collapse(x, y, bias=torch.zeros(4)), "bias must come with the weight"),
        (lambda: neural_collapse(x, y[:5]), r"labels must have shape \[n\] = \[400\]"),
        (lambda: neural_collapse(x, torch.zeros(400).long()), "labels must be of at least two classes, got 1"),
        (
            lambda: neural_collapse(x, y, torch.randn(4, 3)),
            r"weight must have shape \[C, d\] = \[4, 10\], got \[4, 3\]",
        ),
        (lambda: neural_collapse(x, y, torch.randn(4, 10), torch.randn(3)), r"bias must have shape \[C\] = \[4\]"),
        (lambda: neural_collapse(x, torch.rand(400, 4) + 1), "labels must be ≥ 0 and add up to 1"),
        (lambda: neural_collapse(Moments().update(x)), "features must be Moments"),
        (lambda: neural_collapse(x, y, torch.randn(3, 10)), r"labels must hold labels in \[0, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.warns(UserWarning, match="classes without samples: 4"):
        found = neural_collapse(x, y, torch.randn(5, 10))
    assert found.nc1.isfinite() and found.nc2.isnan() and found.nc3.isnan()


def test_effective_rank():
    q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64)).Q
    flat = q[:, :7] - 0.0
    for kind in ("entropy", "participation"):
        torch.testing.assert_close(effective_rank(flat, kind, center=False), torch.tensor(7.0).double())
    x = torch.randn(300, 9, dtype=torch.float64) * torch.arange(1, 10)
    values = torch.linalg.svdvals(x - x.mean(0))
    p = values / values.sum()
    torch.testing.assert_close(effective_rank(x), (-(p * p.log()).sum()).exp())
    squares = values**2
    torch.testing.assert_close(effective_rank(x, "participation"), squares.sum() ** 2 / (squares**2).sum())
    for kind in ("entropy", "participation"):
        torch.testing.assert_close(effective_rank(Moments().update(x), kind), effective_rank(x, kind))
    many = torch.stack([x, 2 * x, x.flip(0)])
    torch.testing.assert_close(effective_rank(many), effective_rank(x).expand(3))
    assert torch.autograd.gradcheck(effective_rank, (torch.randn(6, 4).double().requires_grad_(),))
    with pytest.raises(ValueError, match="kind must be"):
        effective_rank(x, "rank")


def test_mean_cosine():
    x = torch.randn(40, 5, dtype=torch.float64) + 1
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    expected = (cosines.sum() - 40) / (40 * 39)
    torch.testing.assert_close(mean_cosine(x), expected)
    x[3] = 0
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    torch.testing.assert_close(mean_cosine(x), (cosines.sum() - 39) / (40 * 39))
    assert mean_cosine(x[:1]).isnan()


def test_entropy_of_few_rows_far_from_zero():
    """Three centred rows have rank 2: what rounding the mean row of 1000 leaves of a third is none of theirs."""
    x = (torch.randn(3, 40, dtype=torch.float64) * 2**20).round() / 2**20  # which 1000 costs nothing
    found, expected = (effective_rank(each, "entropy", center=True) for each in (x + 1000, x))
    assert abs(found.item() - expected.item()) < 1e-13
