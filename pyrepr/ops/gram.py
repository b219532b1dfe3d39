"""Family `gram`: the leaf ops, their implementations, and the differentiable function on top, :func:`gram_stats`.

Every measure of the family is a function of four statistics, in float64 (maths in ``csrc/cpu/gram.h``):

    S [M, M]   Σ_{i≠j} k_a(i, j) k_b(i, j)        R [M, n]   Σ_{j≠i} k_l(i, j)
    D [M, n]   k_l(i, i)                          shift [M]  the constant that was subtracted from every k_l(i, j)
                                                  norms [M, n]  |x_i|² of the (centred) rows

so one derivative, that of (S, R, D), makes all of them differentiable, for any number of layers at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrepr.backend import Unsupported
from pyrepr.ops._differentiable import Derivative
from pyrepr.ops._gram_gradient import Products, matrix_backward, route_costs, stats_backward
from pyrepr.ops._leaf import derives, leaf_op
from pyrepr.ops._native import DTYPE_CODES, matrix, module
from pyrepr.reference import gram as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import KERNELS, SHIFT_INVARIANT


def native_problem(
    xs: Sequence[Tensor],
    index: Tensor | None = None,
    kernel: str = "linear",
    constants: list[list[float]] | None = None,
    degree: int = 1,
    centre: bool = True,
):
    """The layers xs ([n, d_l] each, rows `index` of them) as what native code takes; constants as of `gram_stats`."""
    n = xs[0].shape[0] if index is None else index.numel()
    return module().Gram(
        [matrix(x) for x in xs],
        DTYPE_CODES[xs[0].dtype],
        0 if index is None else index.data_ptr(),
        n,
        KERNELS.index(kernel),
        [[1.0] * len(xs), [0.0] * len(xs), [0.0] * len(xs)] if constants is None else constants,
        degree,
        centre,
        torch.get_num_threads(),
    )


def _index(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.nonzero()[:, 0].contiguous()


def _stats_fake(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    m, n = len(xs), xs[0].shape[0]
    dots = xs[0].new_empty((m, n, n) if keep_dots else 0, dtype=compute_dtype(xs[0].dtype))
    sizes = ((m, m), (m, n), (m, n), (m,), (m, n))
    return *(xs[0].new_empty(size, dtype=torch.float64) for size in sizes), dots


def _stats_cpu(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    m, total, index = len(xs), xs[0].shape[0], _index(mask)
    n = total if index is None else index.numel()
    new = functools.partial(xs[0].new_empty, dtype=torch.float64)
    s, r, d, shift, norms = new((m, m)), new((m, n)), new((m, n)), new(m), new((m, n))
    dots = xs[0].new_empty((m, n, n) if keep_dots else 0, dtype=compute_dtype(xs[0].dtype))
    problem = native_problem(xs, index, kernel, constants.tolist(), degree, centre)
    pointers = tuple(a.data_ptr() for a in (s, r, d, shift, norms))
    if by_features:
        problem.stats_by_features(split, *pointers)
    else:
        problem.stats(*pointers, dots.data_ptr() if keep_dots else 0, 0)
    if index is not None:
        r, d, norms = (a.new_zeros(m, total).index_copy_(1, index, a) for a in (r, d, norms))
    return s, r, d, shift, norms, dots


def _centred_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """x minus its mean row, [n, d] float32; rows outside the mask do not count and become zeros. Does not wait."""
    count: Tensor | int = x.shape[0]
    if mask is not None:
        x, count = torch.where(mask[:, None], x, 0), mask.sum()
    mean = x.sum(0, dtype=torch.float64) / count
    high = mean.float()
    x = (x - high).sub_((mean - high).float())
    return (x if mask is None else torch.where(mask[:, None], x, 0)).contiguous()


def _stats_cuda(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    """Two layers, linear kernel, float32: the kernel in csrc/cuda/gram.cu."""
    if kernel != "linear" or len(xs) != 2 or xs[0].dtype != torch.float32 or keep_dots:
        raise Unsupported("backend 'cuda' computes the linear kernel of two float32 layers only, without gradient")
    with torch.cuda.device(xs[0].device):
        x, y = (_centred_rows(a, mask) for a in xs)
        n = x.shape[0]
        blocks = -(-n // 128)  # edge of the kernel's tiles
        partial = torch.empty(blocks * (blocks + 1) // 2, 3, dtype=torch.float64, device=x.device)
        stream = torch.cuda.current_stream().cuda_stream
        module().cuda_pair_stats(
            x.data_ptr(), y.data_ptr(), n, x.shape[1], y.shape[1], partial.data_ptr(), partial.shape[0], stream
        )
        kk, kl, ll = (2 * partial.sum(0)).unbind()
        d = torch.stack([a.double().square().sum(1) for a in (x, y)])
    s = torch.stack([torch.stack([kk, kl]), torch.stack([kl, ll])])
    return s, -d, d, s.new_zeros(2), d.clone(), x.new_empty(0)


def _stats_triton(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    from pyrepr.kernels import gram as kernels

    dots = xs[0].new_empty(0, dtype=torch.float32)
    if keep_dots:
        inside, one = kernel in SHIFT_INVARIANT, torch.ones_like(constants[0, :1])
        dots = torch.stack([kernels.matrix(x, None, one, "linear", 1, 0.0, inside) for x in xs])
        if kernel == "linear":
            return (*_stats_of_dots(dots), dots)
    return (*kernels.stats(xs, mask, constants, kernel, degree, by_features, split), dots)


def _stats_of_dots(dots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The linear kernel's statistics where its matrices are kept anyway. dots: [M, n, n]."""
    k = dots.double()
    d = k.diagonal(dim1=1, dim2=2).clone()
    k.diagonal(dim1=1, dim2=2).zero_()
    flat = k.flatten(1)
    return flat @ flat.T, -d, d, d.new_zeros(len(d)), d.clone()


def _dots(x: Tensor, y: Tensor | None, centre: bool) -> Tensor:
    return matrix_op(x, y, torch.ones(1, dtype=torch.float64, device=x.device), "linear", 1, 0.0, centre)


def _products() -> Products:
    return Products(_dots, apply_op)


stats_op = leaf_op(
    "gram_stats(Tensor[] xs, Tensor? mask, Tensor constants, str kernel, int degree, bool centre, bool by_features, "
    "int split, bool keep_dots) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_stats_fake,
    derivative=Derivative(
        reference=lambda args, kept: reference.statistics(*args[:-1], shift=kept[0]),
        backward=lambda *given: stats_backward(_products(), *given),
        outputs=(0, 1, 2),
        kept=(3, 4, 5),
        fixed=("constants",),
    ),
    reference=reference.gram_stats,
    cpu=_stats_cpu,
    triton=_stats_triton,
    cuda=_stats_cuda,
)


def _row_stats_fake(xs):
    m, n = len(xs), xs[0].shape[0]
    sizes = ((m, m), (m, n), (m, n), (m,), (m, n), (m * (m + 1) // 2, n))
    return tuple(xs[0].new_empty(size, dtype=torch.float64) for size in sizes)


def _row_stats_cpu(xs):
    found = _row_stats_fake(xs)
    *stats, p = (a.data_ptr() for a in found)
    native_problem(xs).stats(*stats, 0, p)
    return found


row_stats_op = leaf_op(
    "gram_row_stats(Tensor[] xs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_row_stats_fake,
    reference=reference.gram_row_stats,
    cpu=_row_stats_cpu,
)


def _matrix_fake(x, y, scale, kernel, degree, coef0, centre):
    return x.new_empty(x.shape[0], (x if y is None else y).shape[0], dtype=compute_dtype(x.dtype))


def _matrix_cpu(x, y, scale, kernel, degree, coef0, centre):
    out = _matrix_fake(x, y, scale, kernel, degree, coef0, centre)
    xs = [x] if y is None else [x, y]
    constants = [scale.tolist() * len(xs), [coef0] * len(xs), [0.0] * len(xs)]
    if kernel != "polynomial":
        constants[1] = constants[2]
    native_problem(xs, None, kernel, constants, degree).matrix(centre, out.data_ptr())
    return out


def _matrix_triton(x, y, scale, kernel, degree, coef0, centre):
    from pyrepr.kernels import gram as kernels

    return kernels.matrix(x, y, scale, kernel, degree, coef0, centre)


matrix_op = leaf_op(
    "gram_matrix(Tensor x, Tensor? y, Tensor scale, str kernel, int degree, float coef0, bool centre) -> Tensor",
    fake=_matrix_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.gram_matrix(*args),),
        backward=lambda *given: matrix_backward(_products(), *given),
        fixed=("scale",),
    ),
    reference=reference.gram_matrix,
    cpu=_matrix_cpu,
    triton=_matrix_triton,
)


def _median_fake(xs, mask, centre):
    m, n = len(xs), xs[0].shape[0]
    return tuple(xs[0].new_empty(size, dtype=torch.float64) for size in ((m,), (m, n)))


def _median_cpu(xs, mask, centre):
    index = _index(mask)
    m, total = len(xs), xs[0].shape[0]
    medians = xs[0].new_empty(m, dtype=torch.float64)
    norms = medians.new_empty(m, total if index is None else index.numel())
    native_problem(xs, index, centre=centre).median(medians.data_ptr(), norms.data_ptr())
    return medians, norms if index is None else norms.new_zeros(m, total).index_copy_(1, index, norms)


def _median_triton(xs, mask, centre):
    from pyrepr.kernels import gram as kernels

    return kernels.median(xs, mask)


median_op = leaf_op(
    "gram_median(Tensor[] xs, Tensor? mask, bool centre) -> (Tensor, Tensor)",
    fake=_median_fake,
    reference=reference.gram_median,
    cpu=_median_cpu,
    triton=_median_triton,
)


def _apply_fake(weights, x, centre):
    return weights.new_empty(weights.shape[0], x.shape[1])


def _apply_cpu(weights, x, centre):
    out = _apply_fake(weights, x, centre)
    weights = weights.contiguous()
    native_problem([x]).apply(centre, weights.data_ptr(), weights.shape[0], out.data_ptr())
    return out


def _apply_triton(weights, x, centre):
    from pyrepr.kernels import gram as kernels

    return kernels.apply(weights, x, centre)


apply_op = leaf_op(
    "gram_apply(Tensor weights, Tensor x, bool centre) -> Tensor",
    fake=_apply_fake,
    reference=reference.gram_apply,
    cpu=_apply_cpu,
    triton=_apply_triton,
)


class Statistics(NamedTuple):
    """What the measures are made of, see ``gram.py``."""

    s: Tensor  # [M, M]
    r: Tensor  # [M, n]
    d: Tensor  # [M, n]
    shift: Tensor  # [M]
    norms: Tensor  # [M, n]


def gram_row_stats(xs: Sequence[Tensor]) -> tuple[Statistics, Tensor]:
    """The statistics of a linear kernel by the Gram route, the same bits as of :func:`gram_stats`, and the shares of
    single samples in S: P [M (M + 1)/2, n] float64, Σ_{j≠i} k_a(i, j) k_b(i, j) for a ≤ b. Not differentiable."""
    *stats, p = row_stats_op(list(xs))
    return Statistics(*stats), p


def constants_of(scale: Tensor, kernel: str, coef0: float = 0.0) -> Tensor:
    """What `stats_op` takes for kernels as they are: scale, offset and base of every layer, [3, M].

    Of a polynomial kernel coef0^degree is subtracted at once: the measures do not notice, their digits do.
    """
    polynomial = kernel == "polynomial"
    offset, base = (torch.full_like(scale, value) for value in (coef0 if polynomial else 0.0, float(polynomial)))
    return torch.stack([scale, offset, base])


def gram_stats(
    xs: Sequence[Tensor],
    mask: Tensor | None,
    constants: Tensor,
    kernel: str,
    degree: int = 1,
    split: int = 0,
    *,
    centre: bool = True,
    by_features: bool | None = None,
) -> Statistics:
    """S, R, D, shift and norms (see ``gram.py``), differentiable in every layer by S, R and D.

    Args:
        xs: M layers, [n, d_l] each, of one floating dtype and device.
        mask: [n] bool, the rows that count; R, D and norms are 0 elsewhere. ``None`` counts all.
        constants: [3, M] float64. First σ of rbf and laplacian, γ of polynomial. Then coef0 of polynomial; rbf and
            laplacian are multiplied by e to this. Then 1 where the kernel's value at 0 is to be subtracted, else 0.
            :func:`constants_of` gives those of the plain kernels; others need ``centre=False``.
        kernel: one of :data:`KERNELS`; ``degree`` belongs to ``"polynomial"``.
        split: if positive, only S of (a < split, b ≥ split) and (a, a) is wanted; others may be NaN.
        centre: whether mean rows are subtracted where the kernel is shift-invariant; the linear kernel needs it.
        by_features: the route of the linear kernel; by default the one with fewer multiply-adds.
    """
    n = xs[0].shape[0]
    widths = [x.shape[1] for x in xs]
    if by_features is None:
        gram, features = route_costs(n, widths, split)
        by_features = kernel == "linear" and features < gram
    # The inner products save the backward a recomputation; kept where they are no larger than the inputs.
    keep_dots = not by_features and mask is None and n * len(xs) <= sum(widths) and derives(*xs)
    return Statistics(*stats_op(list(xs), mask, constants, kernel, degree, centre, by_features, split, keep_dots)[:5])
