"""Nearest neighbours, log-sum-exps and InfoNCE against whole matrices in float64, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

import pyrepr
from pyrepr.functional import info_nce, pairwise_logsumexp, pairwise_topk

DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
METRICS = ["ip", "cosine", "sqeuclidean"]


def rows(n, d, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(n, d)).to(dtype)


def cross_entropy(x, y, scale, labels=None, directions=("rows", "columns"), smoothing=0.0, normalize=False):
    """The loss by its definition, with torch's cross entropy on the whole matrix."""
    if normalize:
        x, y = (functional.normalize(t, dim=1, eps=1e-30) for t in (x, y))
    s = scale * (x @ y.T)
    labels = torch.arange(len(x)) if labels is None else labels
    found = []
    if "rows" in directions:
        found.append(functional.cross_entropy(s, labels, label_smoothing=smoothing))
    if "columns" in directions:
        found.append(functional.cross_entropy(s.T[labels], torch.arange(len(x)), label_smoothing=smoothing))
    return torch.stack(found).mean()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


# Top-k


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (7, 50, 3, 50), (60, 333, 70, 10), (40, 200, 384, 17)])
def test_topk_is_that_of_the_whole_matrix(backend, metric, dtype, n, m, d, k):
    x, y = rows(n, d, dtype), rows(m, d, dtype)
    values, indices = pairwise_topk(x, y, k, metric=metric)
    a, b = x.double(), y.double()
    if metric == "sqeuclidean":
        truth = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        truth = (functional.normalize(a) @ functional.normalize(b).T) if metric == "cosine" else a @ b.T
    best = truth.topk(k, 1, largest=metric != "sqeuclidean")
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(values, best.values) < DTYPES[dtype]
    assert relative(truth.gather(1, indices), best.values) < 1e-7  # ties of rounded scores may stand in another order
    assert (indices == best.indices).double().mean() > 0.99


def test_ties_go_by_index_and_duplicates_are_at_distance_zero():
    y = rows(100, 16)
    y[[50, 70, 90]] = y[5].clone()
    values, indices = pairwise_topk(y[5:6], y, 4, metric="sqeuclidean")
    assert indices.tolist() == [[5, 50, 70, 90]] and values.tolist() == [[0.0] * 4]
    assert pairwise_topk(y, k=3, metric="sqeuclidean", exclude_self=True)[1][50].tolist()[:3] == [5, 70, 90]


def test_topk_of_itself_leaves_out_the_pair_by_its_index():
    x = torch.zeros(4, 3)
    values, indices = pairwise_topk(x, k=3, exclude_self=True)
    assert indices.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]] and not values.any()


def test_nan_rows_come_last():
    y = rows(6, 4)
    y[2] = math.nan
    values, indices = pairwise_topk(rows(3, 4), y, 6)
    assert (indices[:, -1] == -1).all() and (values[:, -1] == -math.inf).all()
    assert sorted(indices[0, :-1].tolist()) == [0, 1, 3, 4, 5]
    values, indices = pairwise_topk(rows(3, 4), y, 6, metric="sqeuclidean")
    assert (indices[:, -1] == -1).all() and (values[:, -1] == math.inf).all()


@pytest.mark.parametrize("metric", METRICS)
def test_streaming_gives_the_same_bits(metric, tmp_path):
    x, y = rows(20, 24), rows(300, 24)
    y[200] = y[3]
    whole = pairwise_topk(x, y, 9, metric=metric, return_logsumexp=True)
    np.save(tmp_path / "y.npy", y.numpy())
    stored = np.load(tmp_path / "y.npy", mmap_mode="r")
    for source in (stored, iter(y.split(77)), [y[:1].numpy(), y[1:]], (b for b in y.split(300))):
        found = pairwise_topk(x, source, 9, metric=metric, return_logsumexp=True)
        assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
        assert torch.allclose(found[2], whole[2], rtol=1e-6)


def test_a_memory_map_is_read_block_by_block(monkeypatch, tmp_path):
    from pyrepr.functional import pairs

    monkeypatch.setattr(pairs, "BLOCK_BYTES", 24 * 4 * 50)
    x, y = rows(20, 24), rows(330, 24)
    blocks, total = pairs._blocks(y.numpy())
    assert total == 7 and [len(b) for b in blocks] == [50] * 6 + [30]
    assert torch.equal(pairwise_topk(x, y.numpy(), 5)[1], pairwise_topk(x, y, 5)[1])


@pytest.mark.parametrize("metric", METRICS)
def test_values_have_gradients_and_indices_none(metric):
    x, y = rows(6, 5).double().requires_grad_(), rows(9, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pairwise_topk(a, b, 3, metric=metric)[0], (x, y))
    values, indices = pairwise_topk(x, y, 3, metric=metric)
    assert values.requires_grad and not indices.requires_grad


def test_empty_queries_give_empty_results():
    values, indices = pairwise_topk(rows(0, 5), rows(9, 5), 3)
    assert values.shape == indices.shape == (0, 3)


# Log-sum-exp


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["dot", "cosine"])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (5, 70, 3), (130, 90, 70)])
def test_logsumexp_is_that_of_the_whole_matrix(backend, kernel, dtype, n, m, d):
    x, y = rows(n, d, dtype), rows(m, d, dtype)
    a, b = (functional.normalize(t.double()) if kernel == "cosine" else t.double() for t in (x, y))
    truth = (1.7 * a @ b.T).logsumexp(1)
    assert (pairwise_logsumexp(x, y, scale=1.7, kernel=kernel).double() - truth).abs().max() < DTYPES[dtype] * 10


@pytest.mark.levels
@pytest.mark.parametrize("metric", ["ip", "cosine", "sqeuclidean"])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-25, 1e-22, 1e-19, 1e-10, 1e10, 1e17])
def test_topk_of_rows_of_any_size(metric, size):
    x, y = rows(24, 32, scale=size), rows(40, 32, scale=size)
    with pyrepr.use_backend("reference"):
        expected = pairwise_topk(x, y, 10, metric=metric)
    with pyrepr.use_backend("cpu"):
        found = pairwise_topk(x, y, 10, metric=metric)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.levels
@pytest.mark.parametrize("metric", ["ip", "cosine", "sqeuclidean"])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
def test_one_far_row_leaves_the_log_sum_exp_of_the_near_ones(backend, metric, size):
    x, y = rows(7, 16), rows(9, 16)
    y[0] = -size * x.abs().sum(0)  # far, and at most as near as 0
    x = x.abs()
    a, b = x.double(), y.double()
    if metric == "cosine":
        a, b = (functional.normalize(t) for t in (a, b))
    scores = -(a[:, None] - b[None]).square().sum(2) if metric == "sqeuclidean" else a @ b.T
    _, _, found = pairwise_topk(x, y, 2, metric=metric, return_logsumexp=True)
    truth = scores.logsumexp(1)
    assert ((found.double() - truth).abs() <= 1e-3 * truth.abs().clamp(min=1)).all()


@pytest.mark.levels
@pytest.mark.parametrize("first", [0, 5, 8])
def test_scores_of_minus_infinity_add_nothing(backend, first):
    x, y = rows(4, 6).abs(), rows(9, 6)
    truth = (x.double() @ y.double().T)[:, [j for j in range(9) if j != first]].logsumexp(1)
    y[first, 2] = -math.inf
    _, _, found = pairwise_topk(x, y, 2, return_logsumexp=True)
    assert torch.allclose(found.double(), truth, rtol=1e-3)
    assert torch.allclose(pairwise_logsumexp(x, y).double(), truth, rtol=1e-5)


@pytest.mark.levels
def test_smoothing_of_one_class_is_no_loss(backend):
    x, y = rows(4, 3), rows(1, 3) - 1e5
    labels = torch.zeros(4, dtype=torch.int64)
    assert info_nce(x, y, 100.0, directions="rows", label_smoothing=0.1, labels=labels) == 0


def test_logsumexp_over_no_rows_is_minus_infinity():
    assert pairwise_logsumexp(rows(2, 3), rows(0, 3)).tolist() == [-math.inf] * 2


# InfoNCE


CASES = {
    "plain": {},
    "rows": {"directions": ("rows",)},
    "columns": {"directions": "columns"},
    "smoothed": {"label_smoothing": 0.1},
    "cosine": {"normalize": True},
    "cosine, smoothed rows": {"normalize": True, "label_smoothing": 0.3, "directions": ("rows",)},
}


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 4), (5, 9, 70), (130, 130, 40), (70, 150, 33)])
def test_info_nce_is_torchs_cross_entropy_with_gradients(backend, case, dtype, n, m, d):
    options = CASES[case]
    x, y = rows(n, d, dtype, 0.4), rows(m, d, dtype, 0.4)
    labels = torch.randperm(m)[:n] if m > n else None
    scale = torch.tensor(3.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    truths = [t.detach().double().clone().requires_grad_() for t in leaves]
    loss = info_nce(*leaves[:2], leaves[2], labels=labels, **options)
    named = dict(options)
    named["smoothing"] = named.pop("label_smoothing", 0.0)
    if isinstance(named.get("directions"), str):
        named["directions"] = (named["directions"],)
    truth = cross_entropy(*truths, labels, **named)
    assert abs(loss.item() - truth.item()) <= DTYPES[dtype] * 10 * max(1.0, abs(truth.item()))
    largest = max(g.norm() for g in gradients(cross_entropy(*truths, labels, **named), *truths)[:2])
    for ours, true in zip(gradients(loss, *leaves), gradients(truth, *truths), strict=True):
        rounding = {torch.bfloat16: 6e-3, torch.float16: 8e-4}.get(ours.dtype, 0)
        assert (ours.double() - true).norm() <= (10 * DTYPES[dtype] + rounding) * max(true.norm(), largest)


@pytest.mark.parametrize("normalize", [False, True])
def test_prefixes_are_the_sum_of_losses_of_truncated_features(backend, normalize):
    x, y = rows(40, 64, scale=0.3), rows(60, 64, scale=0.3)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    widths, weights = [8, 24, 64], [1.0, 0.5, 2.0]
    loss = info_nce(*leaves, 5.0, normalize=normalize, prefixes=widths, weights=weights)
    truths = [t.double().requires_grad_() for t in (x, y)]
    truth = sum(
        w * cross_entropy(truths[0][:, :p], truths[1][:, :p], 5.0, normalize=normalize)
        for p, w in zip(widths, weights, strict=True)
    )
    assert relative(loss, truth) < 2e-6
    for ours, true in zip(gradients(loss, *leaves), gradients(truth, *truths), strict=True):
        assert relative(ours, true) < 2e-5
    assert torch.equal(info_nce(x, y, 5.0, prefixes=[64]), info_nce(x, y, 5.0))


def test_a_converged_loss_keeps_its_digits_and_is_never_negative():
    x = torch.eye(64)
    for scale in (20.0, 60.0, 100.0):
        loss = info_nce(x, x, scale).item()
        truth = math.log1p(63 * math.exp(-scale))
        assert loss == pytest.approx(truth, rel=1e-5) and loss >= 0


def test_exchanging_the_sides_exchanges_the_directions():
    x, y = rows(30, 8), rows(30, 8)
    assert relative(info_nce(x, y, directions="rows"), info_nce(y, x, directions="columns")) < 1e-6


def test_a_zero_row_has_a_zero_gradient_under_normalisation():
    x, y = rows(6, 5), rows(6, 5)
    x[2] = 0
    x.requires_grad_()
    (grad,) = gradients(info_nce(x, y, 10.0, normalize=True), x)
    assert grad.isfinite().all() and not grad[2].any()
    assert (grad * x.detach()).sum(1).abs().max() < 1e-6  # orthogonal to x


def test_bits_are_the_same_for_any_number_of_threads():
    x, y = rows(300, 65), rows(700, 65)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (x, y)]
            loss = info_nce(*leaves, 0.5, directions="rows")
            both = info_nce(*leaves, 0.5, normalize=True, prefixes=[16, 65])
            results.append(
                [loss, both, *gradients(loss + both, *leaves), *pairwise_topk(x, y, 7, return_logsumexp=True)]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for row in results[1:] for a, b in zip(results[0], row, strict=True))


def test_float16_logits_do_not_overflow():
    x = rows(8, 512, torch.float16)
    assert info_nce(x, x, 100.0).isfinite()


def test_memory_stays_linear():
    from pyrepr.benchmarks.harness import peak_memory

    x, y = (rows(6000, 32).requires_grad_() for _ in range(2))
    info_nce(x[:10], y[:10], 20.0, normalize=True).backward()
    _, mib = peak_memory(lambda: info_nce(x, y, 20.0, normalize=True).backward())
    assert mib is None or mib < 40  # the matrix alone takes 137


def test_autocast_takes_mixed_dtypes():
    x, y = rows(8, 16), rows(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert info_nce(x.bfloat16(), y).dtype == torch.float32


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: pairwise_topk(x, y, 10), ValueError, r"k must be at most 9, the rows of y, got 10"),
        (
            lambda x, y: pairwise_topk(x, k=6, exclude_self=True),
            ValueError,
            r"at most 5, the rows of y but a row's own",
        ),
        (lambda x, y: pairwise_topk(x, y, 0), ValueError, "k must be a positive int, got 0"),
        (lambda x, y: pairwise_topk(x, y, 2, metric="l2"), ValueError, "metric must be one of ip, cosine, sqeuclidean"),
        (lambda x, y: pairwise_topk(x, y[:0], 2), ValueError, "at least k = 2 rows, got none"),
        (lambda x, y: pairwise_topk(x, [y[:1]], 2), ValueError, "k must be at most 1"),
        (lambda x, y: pairwise_topk(x, [y[:, :2]], 2), ValueError, "width of x, 4, got 2"),
        (lambda x, y: pairwise_topk(x, "y.npy", 2), TypeError, "an iterable of blocks of rows, got str"),
        (lambda x, y: pairwise_topk(x, y.numpy().astype(int), 2), TypeError, "float"),
        (lambda x, y: pairwise_topk(x.requires_grad_(), [y], 2), ValueError, "must not require a gradient"),
        (lambda x, y: pairwise_topk(x.long(), y.long(), 2), TypeError, "x must be float32"),
        (lambda x, y: pairwise_logsumexp(x, y[:, :3]), ValueError, "y must have the width of x, 4, got 3"),
        (lambda x, y: pairwise_logsumexp(x, y.double()), TypeError, "y must have the dtype of x"),
        (lambda x, y: pairwise_logsumexp(x, y, kernel="rbf"), ValueError, "kernel must be 'dot' or 'cosine'"),
        (lambda x, y: pairwise_logsumexp(x, y.to("meta")), ValueError, "device"),
        (lambda x, y: info_nce(x, y, 0.0), ValueError, "scale must be positive and finite, got 0"),
        (lambda x, y: info_nce(x, y, math.nan), ValueError, "scale must be positive and finite, got nan"),
        (lambda x, y: info_nce(x, y, torch.tensor(-1.0)), ValueError, "scale must be positive and finite, got -1"),
        (lambda x, y: info_nce(x, y, torch.ones(2)), ValueError, "scale must be one floating-point number"),
        (lambda x, y: info_nce(x, y, "20"), TypeError, "scale must be a number"),
        (lambda x, y: info_nce(x, y[:3]), ValueError, "at least the n rows of x, 6, when labels are not given, got 3"),
        (lambda x, y: info_nce(x[:0], y), ValueError, "at least one row in a loss, got n = 0"),
        (lambda x, y: info_nce(x, y, labels=torch.full((6,), 9)), ValueError, "labels must be from 0 to m - 1 = 8"),
        (lambda x, y: info_nce(x, y, labels=torch.full((6,), -1)), ValueError, "labels must be from 0 to m - 1 = 8"),
        (lambda x, y: info_nce(x, y, labels=torch.zeros(5, dtype=int)), ValueError, r"labels must have shape \[n\]"),
        (lambda x, y: info_nce(x, y, labels=torch.zeros(6)), TypeError, "labels must be int32 or int64"),
        (
            lambda x, y: info_nce(x, y, directions="diagonal"),
            ValueError,
            "directions must be 'rows', 'columns' or both",
        ),
        (lambda x, y: info_nce(x, y, directions=()), ValueError, "directions must be"),
        (lambda x, y: info_nce(x, y, label_smoothing=1.0), ValueError, r"label_smoothing must be in \[0, 1\)"),
        (lambda x, y: info_nce(x, y, prefixes=[4, 2]), ValueError, "prefixes must increase"),
        (lambda x, y: info_nce(x, y, prefixes=[2, 5]), ValueError, "at most d = 4"),
        (lambda x, y: info_nce(x, y, prefixes=[]), TypeError, "at least one"),
        (lambda x, y: info_nce(x, y, prefixes=[2, 4], weights=[1.0]), ValueError, "one per prefix"),
        (lambda x, y: info_nce(x, y, weights=[1.0]), ValueError, "prefixes is None"),
        (lambda x, y: pyrepr.nn.MatryoshkaLoss([4, 4]), ValueError, "dims must be different widths"),
        (lambda x, y: pyrepr.nn.MatryoshkaLoss([4, 2], [1]), ValueError, "weights must be one per dim"),
        (lambda x, y: pyrepr.nn.ClipLoss(rank=1), ValueError, "rank must be from 0 to world_size - 1 = 0"),
        (lambda x, y: pyrepr.nn.ClipLoss(use_horovod=True), ValueError, "use_horovod must be False"),
        (lambda x, y: pyrepr.nn.ClipLoss()(x, y, 1.0), ValueError, "a row per row of image_features, 6, got 9"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call(rows(6, 4), rows(9, 4))
