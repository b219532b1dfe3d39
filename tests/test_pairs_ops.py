"""The leaf ops of family `pairs` against float64 with the whole matrix, at the edges, with the same bits everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyrepr
from pyrepr.ops.pairs import (
    fuses_rows,
    keeps_logits,
    logsumexp_backward_op,
    logsumexp_op,
    row_loss_op,
    softmax_weights,
    topk_op,
)
from pyrepr.reference import pairs as reference

METRICS = reference.METRICS
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def topk(x: Tensor, y: Tensor, k: int, metric: str = "ip", exclude_self: bool = False, lse: bool = False, state=None):
    offset, *state = (0, None, None, None) if state is None else state
    return topk_op(x, y, k, metric, exclude_self, lse, offset, *state)


def true_topk(x: Tensor, y: Tensor, k: int, metric: str, exclude_self: bool = False, lse: bool = False):
    return reference.pairs_topk(x, y, k, metric, exclude_self, lse, 0, None, None, None)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def databases() -> dict[str, tuple[Tensor, Tensor]]:
    """What could break a bound: each (queries, database)."""
    x, y = torch.randn(60, 48), torch.randn(1500, 48)
    outlier_rows, outlier_features = y.clone(), y.clone()
    outlier_rows[::7] *= 1000
    outlier_features[:, 0] *= 1000
    near = torch.randn(1, 48) + 1e-4 * y
    return {
        "isotropic": (x, y),
        "cone": (x + 20, y + 20),
        "outlier rows": (x, outlier_rows),
        "outlier features": (x, outlier_features),
        "duplicates": (x, torch.randn(40, 48)[torch.randint(0, 40, (1500,))]),
        "near duplicates": (x, near),
        "all the same": (torch.ones(20, 48), torch.ones(900, 48)),
        "database of the queries": (y[:60].clone(), y),
        "huge": (x * 1e18, y * 1e18),
        "beyond float32": (x * 1e25, y * 1e25),
        "tiny": (x * 1e-20, y * 1e-20),
        "denormal queries": (x * 1e-39, y),
        "denormal database": (x, y * 1e-42),
        "many scales": (x * torch.logspace(-12, 12, 60)[:, None], y * torch.logspace(-12, 12, 1500)[:, None]),
        "unit": (unit(x), unit(y)),
        "zeros": (torch.zeros(5, 48), y),
        "one feature": (x[:, :1].contiguous(), y[:, :1].contiguous()),
        "many features": (torch.randn(20, 4099), torch.randn(700, 4099)),
    }


@pytest.mark.levels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", databases())
def test_top_k_is_that_of_float64_whatever_the_data(kind, metric):
    x, y = databases()[kind]
    values, indices, _ = topk(x, y, 10, metric)
    expected, at, _ = true_topk(x, y, 10, metric)
    assert torch.equal(indices, at)
    assert torch.equal(values, expected)  # the float64 score, rounded once


@pytest.mark.levels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(333, 1000, 100, 10), (1, 33, 5, 33), (170, 31, 770, 1), (20, 2000, 8, 700)]
)
def test_top_k_of_all_sizes_and_dtypes(n, m, d, k, dtype, metric):
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    values, indices, _ = topk(x, y, k, metric)
    expected, at, _ = true_topk(x, y, k, metric)
    assert torch.equal(indices, at)
    assert torch.equal(values, expected)


@pytest.mark.levels
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_no_number_or_infinite(metric):
    x, y = torch.randn(60, 32), torch.randn(500, 32)
    y[3], y[10, 2], y[11, 5], y[12] = math.nan, math.inf, -math.inf, 0
    x[5], x[6, 1], x[7] = math.nan, math.inf, 0
    values, indices, _ = topk(x, y, 10, metric)
    expected, at, _ = true_topk(x, y, 10, metric)
    assert torch.equal(indices, at)
    assert torch.equal(values, expected)
    assert (indices[5] == -1).all()
    assert not (indices == 3).any()


def test_fewer_than_k():
    x, y = torch.randn(4, 8), torch.randn(3, 8)
    y[1] = math.nan
    for metric in METRICS:
        values, indices, _ = topk(x, y, 5, metric)
        assert (indices[:, 2:] == -1).all()
        assert (values[:, 2:] == (math.inf if metric == "sqeuclidean" else -math.inf)).all()
        assert set(indices[0, :2].tolist()) == {0, 2}
    values, indices, _ = topk(x, y[:0], 2)
    assert (indices == -1).all()
    assert topk(x[:0], y, 2)[0].shape == (0, 2)
    assert topk(x, y, 0)[0].shape == (4, 0)


def test_equal_scores_stand_in_the_order_of_their_indices():
    x, y = torch.randn(1, 16), torch.randn(100, 16)
    for j in (5, 50, 70, 90):
        y[j] = 3 * x[0]
    assert topk(x, y, 3)[1].tolist() == [[5, 50, 70]]
    assert topk(x, y, 3, "sqeuclidean")[1].tolist() == true_topk(x, y, 3, "sqeuclidean")[1].tolist()


def test_a_point_has_distance_zero_to_itself_however_far_from_the_origin():
    x = torch.randn(300, 24) + 100
    values, indices, _ = topk(x, x, 2, "sqeuclidean")
    assert torch.equal(indices[:, 0], torch.arange(300))
    assert (values[:, 0] == 0).all()


@pytest.mark.levels
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("lse", [False, True])
def test_a_database_in_blocks_gives_the_same_bits(metric, lse):
    x = torch.randn(200, 40)
    whole = topk(x, x, 7, metric, True, lse)
    assert torch.equal(whole[1], true_topk(x, x, 7, metric, True)[1])
    state = (0, None, None, None)
    for block in x.split([1, 64, 3, 100, 32]):
        found = topk(x, block, 7, metric, True, lse, state)
        state = (state[0] + len(block), *found[:2], found[2] if lse else None)
    assert torch.equal(state[1], whole[0])
    assert torch.equal(state[2], whole[1])
    backwards = topk(
        x,
        x[:90],
        7,
        metric,
        True,
        False,
        (0, *topk(x, x[90:], 7, metric, True, False, (90, None, None, None))[:2], None),
    )
    assert torch.equal(backwards[1], whole[1])
    if lse:
        torch.testing.assert_close(state[3], whole[2], rtol=1e-6, atol=2e-6)


@pytest.mark.levels
@pytest.mark.parametrize("metric", METRICS)
def test_log_sum_exp_of_scores(metric):
    x, y = torch.randn(190, 40), torch.randn(777, 40) + 0.3
    for exclude_self in (False, True):
        found = topk(x, y, 5, metric, exclude_self, True)
        expected = true_topk(x.double(), y.double(), 5, metric, exclude_self, True)
        torch.testing.assert_close(
            found[2].double(), expected[2], rtol=1e-6, atol=2e-5 if metric == "sqeuclidean" else 2e-6
        )
    y[3, 3] = math.nan
    assert topk(x, y, 5, metric, False, True)[2].isnan().all()


def test_databases_larger_than_a_chunk():
    """More rows than are packed at a time, so that chunks hand on what they found."""
    x, y = torch.randn(30, 600), torch.randn(20000, 600)
    values, indices, _ = topk(x, y, 10)
    expected = (x.double() @ y.double().T).topk(10)
    assert torch.equal(indices, expected.indices)
    assert torch.equal(values, expected.values.float())


@pytest.mark.parametrize("op", ["topk", "logsumexp", "row loss"])
def test_the_number_of_threads_changes_no_bit(op):
    x, y = torch.randn(500, 70), torch.randn(900, 70)
    labels = torch.randperm(900)[:500]

    def run():
        if op == "topk":
            return topk(x, y, 10)
        if op == "row loss":
            return row_loss_op(x, y, torch.tensor(9.0), labels, True, [20, 70], [0.3, 0.1])
        found = losses(x, y, 2.0, labels, True, [20, 70])
        return (*found, *gradients(x, y, 2.0, labels, True, [20, 70], found, *halves(found)))

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def losses(x, y, scale, labels, normalize, prefixes, rows=True, columns=True, keep=False):
    scale = torch.tensor(scale, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return logsumexp_op(x, y, scale, labels, normalize, prefixes, rows, columns, keep)


def halves(found):
    """Gradients of what the forward returned: a mean of the gaps, or, without labels, anything."""
    r, c, row_gaps, column_gaps, _ = found
    if row_gaps.numel() or column_gaps.numel():
        return [torch.zeros_like(r), torch.zeros_like(c), *(torch.full_like(g, 1 / 7) for g in (row_gaps, column_gaps))]
    wave = [torch.linspace(0.1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in (r, c)]  # of one sign: dscale is a sum
    return [*wave, row_gaps, column_gaps]


def gradients(x, y, scale, labels, normalize, prefixes, found, *grads):
    r, c, row_gaps, column_gaps, kept = found
    weights = softmax_weights(labels, r, c, row_gaps, column_gaps, *grads)
    scale = torch.tensor(scale, dtype=r.dtype)
    return logsumexp_backward_op(x, y, scale, labels, normalize, prefixes, r, c, kept, *weights)


CASES = {
    "dot": dict(scale=0.3, labels=True, normalize=False, prefixes=[64]),
    "sharp": dict(scale=5.0, labels=True, normalize=False, prefixes=[64]),
    "cosine": dict(scale=20.0, labels=True, normalize=True, prefixes=[64]),
    "sharp cosine": dict(scale=100.0, labels=True, normalize=True, prefixes=[64]),
    "no labels": dict(scale=0.3, labels=False, normalize=False, prefixes=[64]),
    "rows": dict(scale=0.3, labels=False, normalize=False, prefixes=[64], columns=False),
    "columns": dict(scale=3.0, labels=True, normalize=False, prefixes=[64], rows=False),
    "prefixes": dict(scale=20.0, labels=True, normalize=True, prefixes=[7, 16, 33, 64]),
    "prefixes of a dot": dict(scale=0.2, labels=True, normalize=False, prefixes=[7, 16, 33]),
    "kept": dict(scale=1.0, labels=True, normalize=True, prefixes=[16, 64], keep=True),
    "negative scale": dict(scale=-1.0, labels=True, normalize=False, prefixes=[64]),
}
# Worst errors seen, relative to the largest element: float32 3.3e-6, bf16 6.3e-3 (its results, and dS), fp16 4.2e-4.
TOLERANCE = {torch.float32: 6e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


def close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30) if got.numel() else 0
    assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.levels
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("case", CASES)
def test_log_sum_exp_and_its_gradient(case, dtype):
    options = dict(CASES[case])
    x, y = torch.randn(300, 64).to(dtype), torch.randn(500, 64).to(dtype)
    labels = torch.randperm(500)[:300] if options.pop("labels") else None
    scale, normalize, prefixes = options.pop("scale"), options.pop("normalize"), options.pop("prefixes")
    found = losses(x, y, scale, labels, normalize, prefixes, **options)
    expected = losses(x.double(), y.double(), scale, labels, normalize, prefixes, **options)
    for name, got, want in zip(("r", "c", "row_gaps", "column_gaps", "kept"), found, expected, strict=True):
        assert got.dtype == torch.float32
        close(name, got, want, 1e-6)
    arguments = (x, y, scale, labels, normalize, prefixes)
    got = gradients(*arguments, found, *halves(found))
    want = gradients(x.double(), y.double(), *arguments[2:], expected, *halves(expected))
    for name, a, b, tolerance in zip(("dx", "dy", "dscale"), got, want, (TOLERANCE[dtype],) * 2 + (6e-6,), strict=True):
        close(name, a, b, tolerance)
    assert got[0].dtype == dtype


@pytest.mark.levels
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 5), (1, 9, 5), (33, 70, 1), (30, 3000, 16), (3000, 30, 16), (700, 400, 1000)]
)
def test_log_sum_exp_of_all_sizes(n, m, d):
    x, y = torch.randn(n, d), torch.randn(m, d)
    scale = d**-0.5
    found = losses(x, y, scale, None, False, [d])
    expected = losses(x.double(), y.double(), scale, None, False, [d])
    for got, want in zip(found, expected, strict=True):
        close("sum", got, want, 1e-6)
    got = gradients(x, y, scale, None, False, [d], found, *halves(found))
    want = gradients(x.double(), y.double(), scale, None, False, [d], expected, *halves(expected))
    for a, b in zip(got, want, strict=True):
        close("gradient", a, b, 6e-6)


ROW_LOSSES = {
    "dot": dict(scale=0.3, normalize=False, prefixes=[64]),
    "cosine": dict(scale=20.0, normalize=True, prefixes=[64]),
    "converged": dict(scale=300.0, normalize=True, prefixes=[64], near=True),
    "sharp": dict(scale=50.0, normalize=False, prefixes=[64]),
    "prefixes": dict(scale=20.0, normalize=True, prefixes=[7, 16, 33, 64]),
    "prefixes of a dot": dict(scale=0.2, normalize=False, prefixes=[7, 16, 33]),
}


def row_loss(x, y, scale, labels, normalize, prefixes):
    """The op's loss and gradients, and the truth by autograd of the formula."""
    weights = [0.7 / (1 + i) / len(x) for i in range(len(prefixes))]
    found = row_loss_op(x, y, torch.tensor(scale), labels, normalize, prefixes, weights)
    leaves = [t.double().requires_grad_() for t in (x, y, torch.tensor(scale))]
    loss = reference.row_loss(*leaves, labels, normalize, prefixes, weights)
    return found, (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ROW_LOSSES)
def test_a_loss_over_rows_and_its_gradient_at_once(case, dtype):
    options = dict(ROW_LOSSES[case])
    x, y = torch.randn(700, 64).to(dtype), torch.randn(900, 64).to(dtype)
    x[5] = y[3] = 0
    if options.pop("near", False):
        y[:700] = x + 0.01 * y[:700]
    labels = torch.arange(700)
    labels[::9] = 4  # rows share a positive
    found, expected = row_loss(x, y, options["scale"], labels, options["normalize"], options["prefixes"])
    # Worst seen 8e-7; 7e-5 where logits are in the thousands, which are floats.
    tolerance = 2e-4 if case == "sharp" else 2e-6
    for name, got, want in zip(("loss", "dx", "dy", "dscale"), found, expected, strict=True):
        assert got.dtype == torch.float32
        close(name, got, want, tolerance)


@pytest.mark.levels
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 5), (1, 9, 5), (33, 70, 1), (30, 3000, 16), (3000, 30, 16), (700, 400, 300)]
)
def test_a_loss_over_rows_of_all_sizes(n, m, d):
    found, expected = row_loss(torch.randn(n, d), torch.randn(m, d), d**-0.5, torch.randint(0, m, (n,)), False, [d])
    for got, want in zip(found, expected, strict=True):
        close("loss over rows", got, want, 2e-6)


@pytest.mark.parametrize("directions", [("rows",), ("rows", "columns")])
def test_positives_are_added_last(directions):
    """They are most of a gradient; so the many other terms keep their digits, which they lose in plain PyTorch."""

    def plain(x, y):
        s, at = 20 * x @ y.T, torch.arange(len(x))
        both = [torch.nn.functional.cross_entropy(logits, at) for logits in (s, s.T)]
        return sum(both[: len(directions)]) / len(directions)

    rows = [unit(torch.randn(1024, 128)) for _ in "xy"]
    leaves, true = ([t.to(dtype).requires_grad_() for t in rows] for dtype in (torch.float32, torch.float64))
    ours = torch.autograd.grad(pyrepr.functional.info_nce(*leaves, 20.0, directions=directions), leaves)
    theirs, truth = (torch.autograd.grad(plain(*t), t) for t in (leaves, true))
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert (a - exact).abs().max() <= 0.85 * (b - exact).abs().max()


def test_a_loss_over_rows_alone_computes_its_logits_once(monkeypatch):
    called = []
    for op in ("row_loss_op", "logsumexp_op"):
        original = getattr(pyrepr.functional.pairs.ops, op)
        monkeypatch.setattr(pyrepr.functional.pairs.ops, op, lambda *a, op=op, f=original: called.append(op) or f(*a))
    x, y = torch.randn(40, 8, requires_grad=True), torch.randn(40, 8)
    pyrepr.functional.info_nce(x, y, directions="rows").backward()
    pyrepr.functional.info_nce(x.detach(), y, directions="rows")  # nobody differentiates it
    pyrepr.functional.info_nce(x, y)
    assert called == ["row_loss_op", "logsumexp_op", "logsumexp_op"]
    assert not fuses_rows(x.bfloat16(), y, 1) and not fuses_rows(x, y.expand(2000, -1, -1).flatten(0, 1), 1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gaps_are_what_autograd_says(backend):
    """softmax_weights and the backward against autograd of the formula, in float64 and with repeated labels."""
    x, y = (torch.randn(size, 6, dtype=torch.float64, requires_grad=True) for size in (12, 9))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (12,))
    out = reference.pairs_logsumexp(x, y, scale, labels, True, [2, 6], True, True, False)[:4]
    grads = [torch.randn_like(t) for t in out]
    expected = torch.autograd.grad(out, (x, y, scale), grads)
    s = reference.logits(x, y, scale, True, [2, 6])
    positive = s.gather(2, labels.expand(2, -1)[:, :, None])[:, :, 0]
    torch.testing.assert_close(out[2], out[0] - positive)
    torch.testing.assert_close(out[3], out[1][:, labels] - positive)
    with torch.no_grad(), pyrepr.use_backend(backend):
        got = gradients(x, y, 1.7, labels, True, [2, 6], (*(t.detach() for t in out), x.new_empty(0)), *grads)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.levels
def test_a_loss_that_has_converged_keeps_its_digits():
    x = torch.randn(400, 96)
    y = x + 0.01 * torch.randn(400, 96)
    labels = torch.arange(400)
    found = losses(x, y, 100.0, labels, True, [96])
    expected = losses(x.double(), y.double(), 100.0, labels, True, [96])
    for got, want in zip(found[2:4], expected[2:4], strict=True):
        assert (got >= 0).all()
        assert 0 < want.median() < 1e-15
        normal = want > 1e-37
        torch.testing.assert_close(
            got.double()[normal], want[normal], rtol=1e-3, atol=0
        )  # e^s, s of up to 200 in float
    got = gradients(x, y, 100.0, labels, True, [96], found, *halves(found))
    want = gradients(x.double(), y.double(), 100.0, labels, True, [96], expected, *halves(expected))
    close("dx", got[0], want[0], 1e-3)


@pytest.mark.levels
def test_a_loss_is_never_negative():
    for scale in (1.0, 20.0, 100.0, 1000.0):
        x = torch.randn(200, 32)
        found = losses(x, x, scale, torch.arange(200), True, [32])
        assert min(found[2].min(), found[3].min()) >= 0


@pytest.mark.levels
def test_a_row_of_zeros_has_cosine_zero_and_no_gradient():
    x, y = torch.randn(50, 8), torch.randn(50, 8)
    x[3, :4], y[7] = 0, 0
    labels = torch.arange(50)
    found = losses(x, y, 5.0, labels, True, [4, 8])
    torch.testing.assert_close(found[0].double(), losses(x.double(), y.double(), 5.0, labels, True, [4, 8])[0])
    dx, dy, _ = gradients(x, y, 5.0, labels, True, [4, 8], found, *halves(found))
    assert dx.isfinite().all()
    assert (dy[7] == 0).all()
    # What is normalised has a gradient orthogonal to it.
    x = torch.randn(50, 8)
    found = losses(x, y, 5.0, labels, True, [8])
    dx, _, _ = gradients(x, y, 5.0, labels, True, [8], found, *halves(found))
    assert ((dx * x).sum(1).abs() < 1e-6 * dx.norm(dim=1) * x.norm(dim=1)).all()


def test_kept_logits_give_the_gradient_of_recomputed_ones():
    x, y, labels = torch.randn(90, 64), torch.randn(70, 64), torch.randint(0, 70, (90,))
    arguments = (x, y, 2.0, labels, False, [64])
    results = [gradients(*arguments, f, *halves(f)) for f in (losses(*arguments), losses(*arguments, keep=True))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert keeps_logits(90, 70, 64)
    assert not keeps_logits(1000, 1000, 64)


@pytest.mark.levels
def test_what_is_no_number_stays_so():
    x, y = torch.randn(40, 8), torch.randn(60, 8)
    x[5, 2] = math.nan
    r, c, row_gaps, column_gaps, _ = losses(x, y, 1.0, torch.arange(40), False, [8])
    assert r.isnan().nonzero()[:, 1].tolist() == [5]
    assert c.isnan().all()
    assert row_gaps.isnan().nonzero()[:, 1].tolist() == [5]
    assert column_gaps.isnan().all()


def test_strided_views_and_empty_inputs():
    x, y = torch.randn(64, 90).T, torch.randn(70, 128)[:, ::2]
    for got, want in zip(
        losses(x, y, 1.0, None, False, [64]), losses(x.double(), y.double(), 1.0, None, False, [64]), strict=True
    ):
        close("sum", got, want, 1e-6)
    assert torch.equal(topk(x, y, 4)[1], true_topk(x, y, 4, "ip")[1])
    r, c, *_ = losses(x, y[:0], 1.0, None, False, [64])
    assert (r == -math.inf).all()
    assert c.shape == (1, 0)
    assert losses(x[:0], y, 1.0, None, False, [64])[0].shape == (1, 0)


def test_labels_out_of_range_are_no_address():
    x = torch.randn(4, 8)
    for label in (-1, 4):
        with pyrepr.use_backend("cpu"), pytest.raises(IndexError, match=r"labels must be from 0 to m - 1 = 3, got"):
            losses(x, x, 1.0, torch.tensor([0, 1, label, 2]), False, [8])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("labels", [None, torch.arange(6)])
def test_opcheck(labels, keep):
    x, y, scale = torch.randn(6, 8), torch.randn(9, 8), torch.tensor(2.0)
    arguments = (x, y, scale, labels, True, [4, 8])
    torch.library.opcheck(logsumexp_op.overload, (*arguments, True, True, keep))
    torch.library.opcheck(logsumexp_op.overload, (*arguments, False, True, keep))
    r, c, row_gaps, column_gaps, kept = logsumexp_op(*arguments, True, True, keep)
    grads = halves((r, c, row_gaps, column_gaps, kept))
    weights = softmax_weights(labels, r, c, row_gaps, column_gaps, *grads)
    torch.library.opcheck(logsumexp_backward_op.overload, (*arguments, r, c, kept, *weights))
    torch.library.opcheck(topk_op.overload, (x, y, 3, "ip", False, False, 0, None, None, None))
    if labels is not None:
        torch.library.opcheck(row_loss_op.overload, (*arguments[:3], labels, True, [4, 8], [0.5, 1.0]))
    found = topk_op(x, y, 3, "sqeuclidean", True, True, 0, None, None, None)
    torch.library.opcheck(topk_op.overload, (x, y, 3, "sqeuclidean", True, True, 9, *found))
