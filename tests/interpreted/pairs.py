"""Triton kernels of family `pairs` against the reference in float64, interpreted on the CPU on small shapes.

Tolerances are the worst errors seen here times about 4; top-k is compared exactly.
"""

from __future__ import annotations

import pytest
import torch
from pyrepr.kernels.pairs import _hosts

import pyrepr
from pyrepr.ops import pairs as ops
from pyrepr.reference import pairs as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of bfloat16 the coefficients are rounded to 8 bits, and gradients to the inputs' dtype.
GRADIENT = {F32: 4e-6, BF16: 1.5e-2, F16: 2e-3}


def inputs(n, m, d, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, d, generator=generator) for rows in (n, m))
    y[: min(n, m)] += x[: min(n, m)]
    return x.to(dtype), y.to(dtype), torch.tensor(0.3)


def relative(found, expected):
    found, expected = found.double(), expected.double()
    return (
        0.0 if not expected.numel() else float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    )


def forward(x, y, scale, labels, normalize, prefixes, rows=True, columns=True, keep=False):
    """The op's results after they were compared with the truth."""
    arguments = labels, normalize, prefixes, rows, columns, keep
    found = ops.logsumexp_op(x, y, scale, *arguments)
    truth = reference.pairs_logsumexp(x.double(), y.double(), scale.double(), *arguments)
    for a, b in zip(found, truth, strict=True):
        assert a.shape == b.shape and a.dtype == F32
        # Gaps have all their digits however small they are.
        assert a.numel() == 0 or ((a.double() - b).abs() / (b.abs() + 1e-30)).amax() < 2e-5 or relative(a, b) < 2e-6
    return found


def backward(x, y, scale, labels, normalize, prefixes, found):
    r, c, row_gaps, column_gaps, kept = found
    generator = torch.Generator().manual_seed(5)
    grads = [torch.rand(t.shape, generator=generator) for t in (r, c, row_gaps, column_gaps)]
    weights = ops.softmax_weights(labels, r, c, row_gaps, column_gaps, *grads)
    results = ops.logsumexp_backward_op(x, y, scale, labels, normalize, prefixes, r, c, kept, *weights)
    x64, y64, scale64 = (t.double().requires_grad_() for t in (x, y, scale))
    asked = bool(r.numel()), bool(c.numel())
    truth = reference.pairs_logsumexp(x64, y64, scale64, labels, normalize, prefixes, *asked, False)
    outputs = [t for t in truth[:4] if t.numel()]
    outer = [g.double() for g, t in zip(grads, truth[:4], strict=True) if t.numel()]
    expected = torch.autograd.grad(outputs, (x64, y64, scale64), outer)
    for a, b, like in zip(results, expected, (x, y, scale), strict=True):
        assert a.shape == like.shape and a.dtype == like.dtype
        assert relative(a, b) < GRADIENT[x.dtype], (normalize, prefixes, relative(a, b))
    return results


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("normalize", [False, True])
def test_both_directions(dtype, normalize):
    x, y, scale = inputs(70, 150, 64, dtype)
    labels = torch.arange(70)
    found = forward(x, y, scale, labels, normalize, [64])
    backward(x, y, scale, labels, normalize, [64], found)


@pytest.mark.parametrize("case", ["no labels", "repeated", "kept", "rows", "columns", "views"])
def test_what_is_asked_for(case):
    x, y, scale = inputs(40, 33, 50)
    labels = torch.randint(0, 4, (40,)) if case == "repeated" else torch.arange(40) % 33
    if case == "views":
        x, labels = torch.randn(81, 101)[1:, 1::2][::2], torch.arange(41)[1:] % 33
    labels = None if case == "no labels" else labels
    found = forward(x, y, scale, labels, True, [50], case != "columns", case != "rows", case == "kept")
    backward(x, y, scale, labels, True, [50], found)


@pytest.mark.parametrize(
    ("prefixes", "normalize"), [([5, 64, 100], True), ([64, 128], False), ([*range(3, 30, 3)], True)]
)
def test_prefixes(prefixes, normalize):
    x, y, scale = inputs(30, 41, 130)
    x[3] = 0  # a row without a direction
    labels = torch.arange(30)
    found = forward(x, y, scale, labels, normalize, prefixes)
    dx = backward(x, y, scale, labels, normalize, prefixes, found)[0]
    assert dx[:, prefixes[-1] :].abs().max() == 0


def test_slabs_and_splits(monkeypatch):
    x, y, scale = inputs(40, 300, 64)
    labels = torch.arange(40)
    one = forward(x, y, scale, labels, True, [64])
    whole = backward(x, y, scale, labels, True, [64], one)
    monkeypatch.setattr(_hosts, "SLAB_BYTES", 128 * 40 * 4)
    cut = backward(x, y, scale, labels, True, [64], one)
    assert torch.equal(cut[1], whole[1]) and torch.equal(cut[2], whole[2])
    assert relative(cut[0], whole[0]) < 1e-6  # a gradient of x is a sum over the slabs
    again = backward(x, y, scale, labels, True, [64], forward(x, y, scale, labels, True, [64]))
    assert all(torch.equal(a, b) for a, b in zip(cut, again, strict=True))
    monkeypatch.setattr(_hosts, "PROGRAMS", {90: 1})
    forward(x, y, scale, labels, True, [64])


def test_a_loss_that_has_converged_keeps_its_digits():
    x = torch.eye(24, 64)
    found = forward(x, x, torch.tensor(60.0), torch.arange(24), True, [64])
    assert 0 < found[2].max() < 1e-22


def test_nothing_to_do():
    x, y, scale = inputs(5, 7, 16)
    r, c, *_ = ops.logsumexp_op(x[:0], y, scale, None, False, [16], True, True, False)
    assert r.shape == (1, 0) and (c == -torch.inf).all()
    r, *_ = ops.logsumexp_op(x, y[:0], scale, None, False, [16], True, False, False)
    assert (r == -torch.inf).all()
    values, indices, _ = ops.topk_op(x, y[:0], 3, "ip", False, False, 0, None, None, None)
    assert (values == -torch.inf).all() and (indices == -1).all()


def same(x, y, k, metric, exclude=False, lse=False, offset=0, before=(None, None, None)):
    """The op's results after they were compared with the reference's, exactly."""
    found = ops.topk_op(x, y, k, metric, exclude, lse, offset, *before)
    truth = reference.pairs_topk(x, y, k, metric, exclude, lse, offset, *before)
    assert torch.equal(found[1], truth[1])
    assert torch.equal(found[0], truth[0])
    assert relative(found[2], truth[2]) < 2e-6
    return found


@pytest.mark.parametrize("metric", reference.METRICS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_topk(metric, dtype):
    x, y, _ = inputs(20, 210, 70, dtype)
    same(x, y, 10, metric, exclude=dtype == F32, lse=metric != "sqeuclidean")


@pytest.mark.parametrize("k", [1, 12, 40, 130])
def test_topk_of_any_k(k):
    x, y, _ = inputs(9, 150, 33)
    same(x, y, k, "ip")


def test_topk_with_ties_is_by_index():
    y = torch.randn(4, 16).repeat(40, 1)  # forty of each
    same(torch.randn(6, 16), y, 9, "ip")
    same(torch.randn(6, 16), y, 9, "cosine")
    same(y[:6] + 100, y + 100, 9, "sqeuclidean")
    same(torch.zeros(3, 16), y, 9, "ip")


@pytest.mark.parametrize("metric", reference.METRICS)
def test_topk_with_what_is_not_finite_or_far_apart(metric):
    x, y, _ = inputs(12, 80, 40)
    y[7], y[9, 3], x[2, 1] = torch.nan, torch.inf, torch.nan
    same(x, y, 5, metric)
    x, y, _ = inputs(12, 80, 40)
    y[1::7] *= 1e15
    y[2::7] *= 1e-25
    y[3] = 0
    same(x * 1e-12, y, 6, metric)
    same(x, torch.full((40, 40), torch.nan), 6, metric)


def test_scores_closer_than_the_bound():
    x = torch.randn(8, 64)
    y = x[:1] + 1e-6 * torch.randn(200, 64)
    for metric in reference.METRICS:
        same(x, y, 8, metric)


@pytest.mark.parametrize("metric", reference.METRICS)
def test_topk_of_a_database_in_blocks(metric):
    x, y, _ = inputs(10, 130, 24)
    whole = same(x, y, 8, metric, exclude=True)
    before = (None, None, None)
    for first in (0, 50, 53):
        last = {0: 50, 50: 53, 53: 130}[first]
        before = same(x, y[first:last], 8, metric, True, False, first, (*before[:2], None))
    assert torch.equal(before[0], whole[0]) and torch.equal(before[1], whole[1])


def test_refusals():
    x, y, _ = inputs(4, 5, 8)
    with pytest.raises(pyrepr.backend.Unsupported, match=r"refuses torch\.float64 tensors"):
        _hosts.topk(x.double(), y.double(), 2, "ip", False, False, 0, None, None, None)
    with pytest.raises(pyrepr.backend.Unsupported, match="takes k up to 204, got 205"):
        _hosts.topk(x, y, 205, "ip", False, False, 0, None, None, None)
