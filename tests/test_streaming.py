"""StreamingCKA: however samples are cut, shared out, stored or merged, the value of all at once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyrepr

HERE = Path(__file__).parent
_process = importlib.util.spec_from_file_location("streaming_process", HERE / "streaming_process.py")
streaming_process = importlib.util.module_from_spec(_process)
_process.loader.exec_module(streaming_process)
layers = streaming_process.layers

ESTIMATORS = ("unbiased", "biased")


def feed(stream, xs, ys, cuts):
    start = 0
    for size in cuts:
        part = slice(start, start + size)
        stream.update([x[part] for x in xs], None if ys is None else [y[part] for y in ys])
        start += size
    assert start == xs[0].shape[0]
    return stream


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("cuts", [(200,), (1, 2, 197), (100, 100), (64, 64, 64, 8)])
def test_exact_is_all_at_once(estimator, cuts):
    xs, ys = layers()
    stream = feed(pyrepr.StreamingCKA(estimator=estimator), xs, ys, cuts)
    assert stream.samples == 200
    torch.testing.assert_close(stream.compute(), pyrepr.cka_matrix(xs, ys, estimator=estimator), rtol=1e-9, atol=1e-11)
    own = feed(pyrepr.StreamingCKA(estimator=estimator), xs, None, cuts)
    torch.testing.assert_close(own.compute(), pyrepr.cka_matrix(xs, estimator=estimator), rtol=1e-9, atol=1e-11)


def test_exact_in_float32_with_a_drifting_mean():
    """The shift is the first batch's mean; the features wander away from it by a hundred standard deviations."""
    n = 4000
    drift = torch.linspace(0, 100, n)[:, None]
    x = torch.randn(n, 20) + drift
    y = torch.randn(n, 20) + drift * torch.randn(20)
    stream = feed(pyrepr.StreamingCKA(), [x], [y], [500] * 8)
    expected = pyrepr.cka(x.double(), y.double())
    assert abs(float(stream.compute()) - float(expected)) < 1e-6


def test_minibatch_is_a_ratio_of_sums():
    xs, ys = layers(120)
    stream = feed(pyrepr.StreamingCKA(mode="minibatch"), xs, ys, (50, 50, 20))
    parts = [slice(0, 50), slice(50, 100), slice(100, 120)]

    def total(a, b):
        return sum(len(a[p]) * (len(a[p]) - 3) * pyrepr.hsic(a[p], b[p]) for p in parts)

    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            expected = total(x, y) / (total(x, x) * total(y, y)).sqrt()
            assert abs(float(stream.compute()[i, j]) - float(expected)) < 1e-12


def test_minibatch_takes_any_kernel():
    xs, ys = layers(60)
    stream = pyrepr.StreamingCKA(mode="minibatch", kernel="rbf").update(xs, ys)
    torch.testing.assert_close(stream.compute(), pyrepr.cka_matrix(xs, ys, kernel="rbf"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_short_last_batch_disturbs_nothing(estimator):
    """Over 60 streams: the error of four batches of 128 and one of 4 is that of the first four."""
    x = torch.randn(200_000, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 9, dtype=torch.float64) + 2 * torch.randn(200_000, 9, dtype=torch.float64)
    truth, errors = float(pyrepr.cka(x, y)), {4: [], 5: []}
    for start in range(0, 60 * 516, 516):
        stream = pyrepr.StreamingCKA(mode="minibatch", estimator=estimator)
        for i, size in enumerate((128, 128, 128, 128, 4)):
            part = slice(start + 128 * i, start + 128 * i + size)
            stream.update([x[part]], [y[part]])
            if i == 3:
                errors[4].append(float(stream.compute()) - truth)
        errors[5].append(float(stream.compute()) - truth)
    four, five = (torch.tensor(errors[count]).square().mean().sqrt() for count in (4, 5))
    assert five < 1.05 * four


def test_one_sigma_a_stream():
    """The first batch's median, in every later batch, in what is saved, and only there."""
    xs, ys = layers(90)
    parts = [slice(0, 40), slice(40, 90)]
    stream = pyrepr.StreamingCKA(mode="minibatch", kernel="rbf", bandwidth=0.5)
    assert stream.scales is None
    for part in parts:
        stream.update([xs[0][part]], [ys[0][part] * (1 + part.start)])

    medians = [0.5 * median_distance(x[parts[0]]) for x in (xs[0], ys[0])]
    torch.testing.assert_close(stream.scales, torch.tensor(medians, dtype=torch.float64))
    sums = torch.zeros(3, dtype=torch.float64)
    for part in parts:
        grams = [pyrepr.Kernel("rbf", sigma=float(s)) for s in stream.scales]
        pair = [xs[0][part], ys[0][part] * (1 + part.start)]
        k, l = (pyrepr.gram(x, kernel=g).fill_diagonal_(0) for x, g in zip(pair, grams, strict=True))
        sums += torch.stack([song(k, l), song(k, k), song(l, l)])
    torch.testing.assert_close(stream.compute()[0, 0], sums[0] / (sums[1] * sums[2]).sqrt())
    restored = pyrepr.StreamingCKA()
    restored.load_state_dict(stream.state_dict())
    assert torch.equal(restored.scales, stream.scales) and restored.kernel == stream.kernel
    with pytest.raises(ValueError, match=r"other must have one σ a layer, got .* calibrate"):
        stream.merge(pyrepr.StreamingCKA(mode="minibatch", kernel="rbf", bandwidth=0.5).update([xs[0]], [ys[0]]))


def median_distance(x):
    d = torch.pdist(x).sort().values
    return float((d[(len(d) - 1) // 2] + d[len(d) // 2]) / 2)


def song(k, l):
    """n(n − 3) times unbiased HSIC, of matrices with a zero diagonal (Song et al. 2012, eq. 5)."""
    n = len(k)
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))


def test_calibrated_streams_merge_to_the_whole():
    xs, ys = layers(120)
    options = {"mode": "minibatch", "kernel": "laplacian"}
    first = [x[:30] for x in xs], [y[:30] for y in ys]
    parts = [pyrepr.StreamingCKA(**options).calibrate(*first) for _ in range(3)]
    assert parts[0].samples == 0
    with pytest.raises(ValueError, match="compute needs at least one update"):
        parts[0].compute()
    for stream, start in zip(parts, (0, 40, 80), strict=True):
        stream.update([x[start : start + 40] for x in xs], [y[start : start + 40] for y in ys])
    whole = pyrepr.StreamingCKA(**options).calibrate(*first)
    feed(whole, xs, ys, (40, 40, 40))
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.samples == whole.samples == 120
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="calibrate must come before the first update, but 120 samples were added"):
        merged.calibrate(*first)
    with pytest.raises(ValueError, match="calibrate needs mode 'minibatch'"):
        pyrepr.StreamingCKA().calibrate(*first)
    with pytest.raises(ValueError, match="what calibrate is given must have at least 2 samples"):
        pyrepr.StreamingCKA(**options).calibrate([xs[0][:1]])


SPOILT = {
    "no estimator": ({"estimator": "both"}, "estimator must be"),
    "no mode": ({"mode": "other"}, "mode must be"),
    "other widths": ({"widths": [1]}, "state_dict"),
    "no widths": ({"widths": 5}, "state_dict must name the widths"),
    "flags for widths": ({"widths": [True, 3]}, "state_dict must name the widths"),
    "a split beyond": ({"split": 9}, "state_dict must name the widths"),
    "no split": ({"split": None}, "state_dict must name the widths"),
    "half a state": ({"state": {"n": 3}}, "state_dict must hold n and"),
    "no state": ({"state": None}, "state_dict must hold n and"),
    "an empty state": ({"state": {}}, "state_dict must hold n and"),
    "no kernel": ({"kernel": {"name": "x"}}, "kernel must be one of"),
    "kernel of nothing": ({"kernel": 5}, "state_dict: kernel must hold"),
    "a number": (5, "state_dict must come from"),
}


@pytest.mark.parametrize("mode", ["exact", "minibatch"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_state_is_refused_and_changes_nothing(mode, spoilt):
    xs, ys = layers(40)
    stream = pyrepr.StreamingCKA(mode=mode).update(xs, ys)
    change, words = SPOILT[spoilt]
    state = {**stream.state_dict(), **change} if isinstance(change, dict) else change
    before = stream.compute()
    with pytest.raises(ValueError, match=words) as caught:
        stream.load_state_dict(state)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(stream.compute(), before) and stream.mode == mode and stream.samples == 40


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_a_state_of_another_precision_is_refused(kind):
    stream = pyrepr.StreamingCKA(mode="minibatch").update(*layers(40))
    state = stream.state_dict()
    state["state"]["hsic"] = state["state"]["hsic"].to(kind)
    with pytest.raises(ValueError, match="state_dict must hold n and, in float64"):
        stream.load_state_dict(state)


@pytest.mark.parametrize("mode", ["exact", "minibatch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_on_any_number_of_threads(mode, dtype):
    """Narrow and wide layers, few and many rows: torch's products of such shapes differ with the threads."""
    threads = torch.get_num_threads()
    try:
        for widths, cuts in (((17, 1, 1, 3, 17), (5, 34)), ((300, 40, 7), (700, 400, 600)), ((3, 1500), (60, 1200))):
            xs = [torch.randn(sum(cuts), d, generator=torch.Generator().manual_seed(d)).to(dtype) for d in widths]
            found = []
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                for ys in (None, xs[:2]):
                    stream = feed(pyrepr.StreamingCKA(mode=mode, estimator="biased"), xs, ys, cuts)
                    found.append((stream.compute(), stream.state_dict()["state"]))
            for i, (value, state) in enumerate(found):
                first, kept = found[i % 2]
                assert torch.equal(value, first)
                assert same_state(state, kept)
    finally:
        torch.set_num_threads(threads)


def same_state(a, b):
    if isinstance(a, dict):
        return all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return all(map(same_state, a, b))
    return torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("mode", ["exact", "minibatch"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_merge(mode, estimator):
    xs, ys = layers()
    options = {"mode": mode, "estimator": estimator}
    whole = feed(pyrepr.StreamingCKA(**options), xs, ys, (70, 80, 50))
    first = feed(pyrepr.StreamingCKA(**options), [x[:150] for x in xs], [y[:150] for y in ys], (70, 80))
    second = feed(pyrepr.StreamingCKA(**options), [x[150:] for x in xs], [y[150:] for y in ys], (50,))
    before = second.compute()
    merged = pyrepr.StreamingCKA(**options).merge(first).merge(second)
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-10, atol=1e-12)
    assert torch.equal(second.compute(), before)
    first.update([x[150:] for x in xs], [y[150:] for y in ys])  # the merged one is a copy
    assert merged.samples == 200


def test_state_dict_goes_through_a_file(tmp_path):
    xs, ys = layers()
    stream = pyrepr.StreamingCKA().update([x[:90] for x in xs], [y[:90] for y in ys])
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    restored = pyrepr.StreamingCKA(estimator="biased")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for s in (stream, restored):
        s.update([x[90:] for x in xs], [y[90:] for y in ys])
    assert torch.equal(stream.compute(), restored.compute())
    with pytest.raises(ValueError, match=r"without .*'widths'"):
        restored.load_state_dict({"mode": "exact"})


@pytest.mark.parametrize("mode", ["exact", "minibatch"])
def test_processes_add_up(tmp_path, mode):
    command = [sys.executable, str(HERE / "streaming_process.py")]
    processes = [subprocess.Popen([*command, str(rank), "3", str(tmp_path), mode]) for rank in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    torch.manual_seed(0)
    xs, ys = layers(90)
    expected = pyrepr.StreamingCKA(mode=mode)
    expected.update([x[:40] for x in xs], [y[:40] for y in ys]).update([x[40:] for x in xs], [y[40:] for y in ys])
    for rank in range(3):
        value = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(value, expected.compute(), rtol=1e-9, atol=1e-11)


def test_memory_does_not_grow_with_samples():
    xs, ys = layers()
    stream = pyrepr.StreamingCKA()

    def held():
        state = stream.state_dict()["state"]
        return sum(t.numel() for v in state.values() for t in (v if isinstance(v, list) else [v]) if torch.is_tensor(t))

    stream.update(xs, ys)
    before = held()
    for _ in range(5):
        stream.update(xs, ys)
    assert held() == before


def test_constant_and_nan_features():
    with pytest.warns(pyrepr.DegenerateInputWarning, match=r"ys\[0\]"):
        values = pyrepr.StreamingCKA().update([torch.randn(9, 2)], [torch.ones(9, 3)]).compute()
    assert values.isnan().all()
    x = torch.randn(9, 2)
    x[3] = torch.nan
    assert pyrepr.StreamingCKA().update([x], [torch.randn(9, 2)]).compute().isnan().all()


def test_bad_input():
    x = torch.randn(10, 3)
    stream = pyrepr.StreamingCKA()
    with pytest.raises(ValueError, match="compute needs at least one update"):
        stream.compute()
    stream.update([x[:3]])
    with pytest.raises(ValueError, match="the stream must have at least 4 samples"):
        stream.compute()
    with pytest.raises(ValueError, match=r"layers of the first update, widths \[3\], got \[3, 3\]"):
        stream.update([x, x])
    assert stream.samples == 3
    with pytest.raises(ValueError, match="other must have mode 'exact', got 'minibatch'"):
        stream.merge(pyrepr.StreamingCKA(mode="minibatch"))
    with pytest.raises(ValueError, match="other must have layers of widths"):
        stream.merge(pyrepr.StreamingCKA().update([x, x]))
    with pytest.raises(ValueError, match="mode must be 'exact' or 'minibatch', got 'fast'"):
        pyrepr.StreamingCKA(mode="fast")
    with pytest.raises(ValueError, match="kernel must be 'linear' in mode 'exact', got 'rbf'"):
        pyrepr.StreamingCKA(kernel="rbf")
    with pytest.raises(ValueError, match="a batch in mode 'minibatch' must have at least 4 samples"):
        pyrepr.StreamingCKA(mode="minibatch").update([x[:3]])


def test_exact_moments_larger_than_the_machine():
    stream = pyrepr.StreamingCKA()
    with pytest.raises(MemoryError, match=r"exact moments .* would take 512.0 GiB"):
        stream.update([torch.zeros(1, 1).expand(4, 1 << 18)])
    assert stream.samples == 0
