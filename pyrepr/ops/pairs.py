"""Family `pairs`: leaf ops over all pairs of rows that never hold the n × m matrix of scores.

`pairs_logsumexp` and its backward stand under the contrastive losses; maths in ``csrc/cpu/pairs.h`` and
``pyrepr/reference/pairs.py``. With r and c the log-sum-exps of rows and columns and weights G [P, n], H [P, m],
W [P, n], the backward is that of Σ dS_ij s_ij with

    dS_ij = G_i e^{s_ij − r_i} + H_j e^{s_ij − c_j},    but W_i at the positive (i, labels[i]),

and :func:`softmax_weights` makes G, H and W of the gradients of what the forward returns.
"""

from __future__ import annotations

import importlib
import math

import torch
from torch import Tensor

from pyrepr.ops._differentiable import Derivative
from pyrepr.ops._leaf import leaf_op, on_one_thread
from pyrepr.ops._native import DTYPE_CODES, matrix, module
from pyrepr.reference import pairs as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.pairs import METRICS


def keeps_logits(n: int, m: int, d: int, prefixes: int = 1) -> bool:
    """Whether the forward should keep the logits for the backward: where they take no more memory than x and y. (Kept
    beyond that, at 2048 to 4096 rows, they cost as much time to write and read as to compute.)"""
    return prefixes * n * m <= (n + m) * d


def _triton(function: str):
    """A Triton implementation by name, imported when it is first called."""

    def run(*args):
        return getattr(importlib.import_module("pyrepr.kernels.pairs"), function)(*args)

    return run


def _logsumexp_fake(x, y, scale, labels, normalize, prefixes, rows, columns, keep):
    p, n, m = len(prefixes), x.shape[0], y.shape[0]
    dtype = compute_dtype(x.dtype)
    shapes = (
        (p, n if rows else 0),
        (p, m if columns else 0),
        (p, n if rows and labels is not None else 0),
        (p, n if columns and labels is not None else 0),
        (p, n, m) if keep else (0,),
    )
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _problem(x, y, scale, labels, normalize, prefixes):
    """What both native functions are called on, and the tensors that must live while they run."""
    x, y = _rows(x), _rows(y)
    labels = None if labels is None else labels.contiguous()
    problem = module().Pairs(
        matrix(x),
        matrix(y),
        DTYPE_CODES[x.dtype],
        _address(labels),
        list(prefixes),
        float(scale),
        normalize,
        torch.get_num_threads(),
    )
    return problem, (x, y, labels)


def _address(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def _logsumexp_cpu(x, y, scale, labels, normalize, prefixes, rows, columns, keep):
    if x.dtype == torch.float64 or x.numel() == 0 or y.numel() == 0:
        return on_one_thread(reference.pairs_logsumexp)(x, y, scale, labels, normalize, prefixes, rows, columns, keep)
    out = _logsumexp_fake(x, y, scale, labels, normalize, prefixes, rows, columns, keep)
    problem, _alive = _problem(x, y, scale, labels, normalize, prefixes)
    problem.logsumexp(*(_address(t) for t in out))
    return out


def _backward(args, kept, grads, wanted):
    x, y, scale, labels, normalize, prefixes, *_ = args
    r, c, row_gaps, column_gaps, logits = kept
    weights = softmax_weights(labels, r, c, row_gaps, column_gaps, *grads)
    dx, dy, dscale = logsumexp_backward_op(x, y, scale, labels, normalize, prefixes, r, c, logits, *weights)
    return dx, dy, dscale, None


logsumexp_op = leaf_op(
    "pairs_logsumexp(Tensor x, Tensor y, Tensor scale, Tensor? labels, bool normalize, int[] prefixes, bool rows, "
    "bool columns, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_logsumexp_fake,
    derivative=Derivative(
        reference=lambda args, kept: reference.pairs_logsumexp(*args[:-1], False)[:4],
        backward=_backward,
        outputs=(0, 1, 2, 3),
        kept=(0, 1, 2, 3, 4),
    ),
    reference=reference.pairs_logsumexp,
    triton=_triton("logsumexp"),
    cpu=_logsumexp_cpu,
)


def _logsumexp_backward_fake(x, y, scale, labels, normalize, prefixes, r, c, kept, row_weights, column_weights, w):
    return x.new_empty(x.shape), y.new_empty(y.shape), x.new_empty((), dtype=compute_dtype(x.dtype))


def _logsumexp_backward_cpu(x, y, scale, labels, normalize, prefixes, r, c, kept, row_weights, column_weights, w):
    if x.dtype == torch.float64 or x.numel() == 0 or y.numel() == 0:
        return on_one_thread(reference.pairs_logsumexp_backward)(
            x, y, scale, labels, normalize, prefixes, r, c, kept, row_weights, column_weights, w
        )
    dx, dy, dscale = out = (x.new_empty(x.shape), y.new_empty(y.shape), x.new_empty((), dtype=torch.float32))
    problem, _alive = _problem(x, y, scale, labels, normalize, prefixes)
    given = [None if t is None else t.contiguous() for t in (r, c, kept, row_weights, column_weights, w)]
    problem.backward(*(_address(t) for t in (*given, dx, dy)), dscale.data_ptr())
    return out


logsumexp_backward_op = leaf_op(
    "pairs_logsumexp_backward(Tensor x, Tensor y, Tensor scale, Tensor? labels, bool normalize, int[] prefixes, "
    "Tensor r, Tensor c, Tensor kept, Tensor row_weights, Tensor column_weights, Tensor? positive_weights) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_logsumexp_backward_fake,
    reference=reference.pairs_logsumexp_backward,
    triton=_triton("logsumexp_backward"),
    cpu=_logsumexp_backward_cpu,
)


def fuses_rows(x: Tensor, y: Tensor, prefixes: int) -> bool:
    """Whether a loss over rows alone should make its gradient along with itself: 6 n m d operations instead of 8. On a
    CPU, where a stripe of rows fits into 32 MiB; not in bfloat16, whose products have kernels of their own."""
    return x.device.type == "cpu" and x.dtype != torch.bfloat16 and prefixes * y.shape[0] <= 50_000


def _row_loss_fake(x, y, scale, labels, normalize, prefixes, weights):
    dtype = compute_dtype(x.dtype)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in ((), x.shape, y.shape, ()))


def _row_loss_cpu(x, y, scale, labels, normalize, prefixes, weights):
    if x.dtype == torch.float64 or x.numel() == 0 or y.numel() == 0:
        return on_one_thread(reference.pairs_row_loss)(x, y, scale, labels, normalize, prefixes, weights)
    out = _row_loss_fake(x, y, scale, labels, normalize, prefixes, weights)
    problem, _alive = _problem(x, y, scale, labels, normalize, prefixes)
    problem.row_loss(weights, *(t.data_ptr() for t in out))
    return out


def _row_loss_backward(args, kept, grads, wanted):
    x, y, *_ = args
    dx, dy, dscale = (grads[0] * t if want else None for t, want in zip(kept, wanted, strict=False))
    return None if dx is None else dx.to(x.dtype), None if dy is None else dy.to(y.dtype), dscale, None


row_loss_op = leaf_op(
    "pairs_row_loss(Tensor x, Tensor y, Tensor scale, Tensor labels, bool normalize, int[] prefixes, float[] weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_row_loss_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.row_loss(*args),),
        backward=_row_loss_backward,
        kept=(1, 2, 3),
    ),
    reference=reference.pairs_row_loss,
    cpu=_row_loss_cpu,
)


def softmax_weights(
    labels: Tensor | None,  # [n]
    r: Tensor,  # [P, n] or [P, 0]
    c: Tensor,  # [P, m] or [P, 0]
    row_gaps: Tensor,  # [P, n] or [P, 0]
    column_gaps: Tensor,  # [P, n] or [P, 0]
    grad_r: Tensor,
    grad_c: Tensor,
    grad_row_gaps: Tensor,
    grad_column_gaps: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """G, H and W of `pairs_logsumexp_backward` from the outputs of `pairs_logsumexp` and their gradients.

    The share of a positive is e^−gap and that of all others 1 − e^−gap: no digits are lost where a loss has converged.
    """
    if labels is None:
        return grad_r, grad_c, None
    positive, row_weights, column_weights = grad_r.new_zeros(()), grad_r, grad_c
    if r.numel():
        row_weights = grad_r + grad_row_gaps
        positive = positive + grad_r * (-row_gaps).exp() + grad_row_gaps * (-row_gaps).expm1()
    if c.numel():
        # Not index_add_, whose order of additions is open on a GPU.
        at = (torch.arange(len(c), device=c.device)[:, None], labels)
        column_weights = torch.zeros_like(c).index_put_(at, grad_column_gaps, accumulate=True) + grad_c
        others = column_weights[:, labels] - grad_column_gaps  # of r and of rows that share the positive
        positive = positive + others * (-column_gaps).exp() + grad_column_gaps * (-column_gaps).expm1()
    return row_weights, column_weights, positive


def _topk_fake(x, y, k, metric, exclude_self, return_logsumexp, offset, values, indices, logsumexp):
    dtype = compute_dtype(x.dtype)
    return (
        x.new_empty((x.shape[0], k), dtype=dtype),
        x.new_empty((x.shape[0], k), dtype=torch.int64),
        x.new_empty(x.shape[0] if return_logsumexp else 0, dtype=dtype),
    )


def _topk_cpu(x, y, k, metric, exclude_self, return_logsumexp, offset, values, indices, logsumexp):
    if x.dtype == torch.float64 or k == 0 or x.shape[0] == 0:
        return on_one_thread(reference.pairs_topk)(
            x, y, k, metric, exclude_self, return_logsumexp, offset, values, indices, logsumexp
        )
    shape = (x.shape[0], k)
    best = x.new_full(shape, -math.inf, dtype=torch.float32) if values is None else values.float().contiguous().clone()
    at = (
        x.new_full(shape, -1, dtype=torch.int64)
        if indices is None
        else indices.clone(memory_format=torch.contiguous_format)
    )
    lse = x.new_full((x.shape[0] if return_logsumexp else 0,), -math.inf, dtype=torch.float32)
    if return_logsumexp and logsumexp is not None:
        lse.copy_(logsumexp)
    nearest = metric == "sqeuclidean"  # the native score is minus the distance
    if nearest and values is not None:
        best.neg_()
    x, y = _rows(x), _rows(y)
    module().pairs_topk(
        matrix(x),
        matrix(y),
        DTYPE_CODES[x.dtype],
        k,
        METRICS.index(metric),
        exclude_self,
        offset,
        _address(best),
        _address(at),
        _address(lse),
        torch.get_num_threads(),
    )
    return best.neg_() if nearest else best, at, lse


topk_op = leaf_op(
    "pairs_topk(Tensor x, Tensor y, int k, str metric, bool exclude_self, bool return_logsumexp, SymInt offset, "
    "Tensor? values, Tensor? indices, Tensor? logsumexp) -> (Tensor, Tensor, Tensor)",
    fake=_topk_fake,
    reference=reference.pairs_topk,
    triton=_triton("topk"),
    cpu=_topk_cpu,
)
