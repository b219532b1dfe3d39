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
        return sum(pyrepr.hsic(a[p], b[p]) for p in parts)

    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            expected = total(x, y) / (total(x, x) * total(y, y)).sqrt()
            assert abs(float(stream.compute()[i, j]) - float(expected)) < 1e-12


def test_minibatch_takes_any_kernel():
    xs, ys = layers(60)
    stream = pyrepr.StreamingCKA(mode="minibatch", kernel="rbf").update(xs, ys)
    torch.testing.assert_close(stream.compute(), pyrepr.cka_matrix(xs, ys, kernel="rbf"), rtol=1e-12, atol=1e-12)


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
