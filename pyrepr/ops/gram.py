"""Family `gram`: the leaf ops, their implementations, and the differentiable function on top, :func:`gram_stats`.

Every measure of the family is a function of four statistics, in float64 (maths in ``csrc/cpu/gram.h``):

    S [M, M]   Σ_{i≠j} k_a(i, j) k_b(i, j)        R [M, n]   Σ_{j≠i} k_l(i, j)
    D [M, n]   k_l(i, i)                          shift [M]  the constant that was subtracted from every k_l(i, j)
                                                  norms [M, n]  |x_i|² of the (centred) rows

so one derivative, that of (S, R, D), makes all of them differentiable, for any number of layers at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrepr.backend import GPU_ORDER, Unsupported, forced_backend, native
from pyrepr.ops._differentiable import Derivative, transformed
from pyrepr.ops._gram_gradient import (
    Products,
    blocks_of,
    layer_pairs,
    matrix_backward,
    route_costs,
    stats_backward,
)
from pyrepr.ops._leaf import derives, leaf_op, readable
from pyrepr.ops._native import DTYPE_CODES, matrix, module
from pyrepr.reference import gram as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import KERNELS, SHIFT_INVARIANT

# What may be lost, relative to a result: 84 units of rounding.
LOSS = {torch.float32: 1e-5, torch.float64: 2e-14}
# Squared norms between which products of two inner products, and their derivatives, are safe.
LINEAR_NORMS = {torch.float32: (1e-10, 1e12), torch.float64: (1e-70, 1e70)}


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


def _fewer_by_features(xs, split) -> bool:
    gram, features = route_costs(xs[0].shape[0], [x.shape[1] for x in xs], split)
    return features < gram


def _dots_size(xs, by_features, split) -> tuple[int, ...]:
    """The shape of a layer's inner products of rows, or of the products of features of all pairs, flat."""
    if not by_features:
        return len(xs), xs[0].shape[0], xs[0].shape[0]
    return (sum(xs[a].shape[1] * xs[b].shape[1] for a, b in layer_pairs(len(xs), split)),)


def _dots_are_small(xs, by_features, split) -> bool:
    """Whether products, which save the backward a recomputation, are no larger than the inputs."""
    return math.prod(_dots_size(xs, by_features, split)) <= sum(x.numel() for x in xs)


def _stats_fake(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    m, n = len(xs), xs[0].shape[0]
    dots = xs[0].new_empty(_dots_size(xs, by_features, split) if keep_dots else 0, dtype=compute_dtype(xs[0].dtype))
    sizes = ((m, m), (m, n), (m, n), (m,), (m, n))
    return *(xs[0].new_empty(size, dtype=torch.float64) for size in sizes), dots


def _stats_cpu(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    m, total, index = len(xs), xs[0].shape[0], _index(mask)
    n = total if index is None else index.numel()
    new = functools.partial(xs[0].new_empty, dtype=torch.float64)
    s, r, d, shift, norms = new((m, m)), new((m, n)), new((m, n)), new(m), new((m, n))
    dots = xs[0].new_empty(_dots_size(xs, by_features, split) if keep_dots else 0, dtype=compute_dtype(xs[0].dtype))
    kept = dots.data_ptr() if keep_dots else 0
    problem = native_problem(xs, index, kernel, constants.tolist(), degree, centre)
    pointers = tuple(a.data_ptr() for a in (s, r, d, shift, norms))
    if by_features:
        problem.stats_by_features(split, *pointers, 0, 0, kept)
    else:
        problem.stats(*pointers, kept, 0, 0)
    if index is not None:
        r, d, norms = (a.new_zeros(m, total).index_copy_(1, index, a) for a in (r, d, norms))
    return s, r, d, shift, norms, dots


def _stats_triton(xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots):
    from pyrepr.kernels import gram as kernels

    dots = xs[0].new_empty(0, dtype=torch.float32)
    if keep_dots and by_features:
        dots = reference.products_of_features(xs, mask, split)
    elif keep_dots:
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
)


def _hsic_fake(xs, estimator, split, normalised, by_features, keep, keep_dots):
    m, n, new = len(xs), xs[0].shape[0], xs[0].new_empty
    dtype, f64 = compute_dtype(xs[0].dtype), torch.float64
    return (
        new((m, m), dtype=dtype),
        new(m, dtype=torch.int32),
        new((m, m) if keep else 0, dtype=f64),
        new((m, n) if keep else 0, dtype=f64),
        new(_dots_size(xs, by_features, split) if keep_dots else 0, dtype=dtype),
    )


def _hsic_cpu(xs, estimator, split, normalised, by_features, keep, keep_dots):
    found = _hsic_fake(xs, estimator, split, normalised, by_features, keep, keep_dots)
    dtype, pointers = found[0].dtype, [x.data_ptr() for x in found[:2]]
    pointers += [x.data_ptr() if x.numel() else 0 for x in found[2:]]
    limits = (torch.finfo(dtype).eps, LOSS[dtype], *LINEAR_NORMS[dtype])
    native_problem(xs).hsic(by_features, split, estimator == "biased", normalised, limits, *pointers)
    return found


def _hsic_triton(xs, estimator, split, normalised, by_features, keep, keep_dots):
    from pyrepr.kernels import gram as kernels

    if not normalised or keep or keep_dots:
        raise Unsupported("the kernel goes from layers to CKA, and keeps nothing on the way")
    found = _hsic_fake(xs, estimator, split, normalised, by_features, keep, keep_dots)
    return (*kernels.cka(xs, estimator, split), *found[2:])


def _hsic_backward(args, kept, grads, wanted):
    xs, estimator, split, normalised, by_features, _, keep_dots = args
    s, norms, dots = kept
    grad_s, grad_norms = slopes_op(s, norms, grads[0].double().contiguous(), estimator, split, normalised)
    ones = norms.new_ones(3, len(xs))
    again = (xs, None, ones, "linear", 1, True, by_features, split, keep_dots)
    grads = (grad_s, torch.zeros_like(grad_norms), grad_norms)
    return stats_backward(_products(), again, (s.new_zeros(len(xs)), norms, dots), grads, (None, None, *wanted))[2:]


at_once_op = leaf_op(
    "gram_hsic_at_once(Tensor[] xs, str estimator, int split, bool normalised, bool by_features, bool keep, "
    "bool keep_dots) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_hsic_fake,
    derivative=Derivative(
        reference=lambda args, kept: reference.gram_hsic(*args)[:1],
        backward=_hsic_backward,
        kept=(2, 3, 4),
    ),
    reference=reference.gram_hsic,
    cpu=_hsic_cpu,
    triton=_hsic_triton,
)


def _slopes_fake(s, norms, grad, estimator, split, normalised):
    return torch.empty_like(s), torch.empty_like(norms)


def _slopes_cpu(s, norms, grad, estimator, split, normalised):
    found = _slopes_fake(s, norms, grad, estimator, split, normalised)
    pointers = (x.data_ptr() for x in (s, norms, grad, *found))
    module().gram_hsic_slopes(*norms.shape, split, estimator == "biased", normalised, *pointers)
    return found


slopes_op = leaf_op(
    "gram_hsic_slopes(Tensor s, Tensor norms, Tensor grad, str estimator, int split, bool normalised) -> "
    "(Tensor, Tensor)",
    fake=_slopes_fake,
    reference=reference.gram_hsic_slopes,
    cpu=_slopes_cpu,
)

MOST_AT_ONCE = 64  # layers of which a GPU makes the whole table in a handful of launches
ALIKE, LOST = 1, 2  # states of a layer: its own HSIC is no more than rounding; digits of it are lost (on a CPU)


def hsic_at_once(
    xs: Sequence[Tensor], estimator: str, split: int, normalised: bool
) -> tuple[Tensor, Tensor | None] | None:
    """HSIC or CKA under the linear kernel, [M, M], and which layers are all alike, [M] (``None``: none is), by the one
    op that goes from layers to values. On a CPU it is differentiable. ``None`` where the way over :func:`gram_stats` is
    to be taken: in graphs and under transforms, in native code for layers that are not ordinary, on a GPU for
    derivatives."""
    if torch.compiler.is_compiling() or not all(map(readable, xs)) or transformed():
        return None
    forced, derived = forced_backend(), derives(*xs)
    features = _fewer_by_features(xs, split)
    if xs[0].is_cpu and forced != "triton":
        n = xs[0].shape[0]
        shifted = any(x.shape[1] // 16 > n * n for x in xs)  # csrc/cpu/gram.cpp: a constant is taken from such kernels
        if forced == "reference" or native()[0] is None or shifted:
            return None
        keep_dots = derived and _dots_are_small(xs, features, split)
        values, states, *_ = at_once_op(list(xs), estimator, split, normalised, features, derived, keep_dots)
        return None if any(states.tolist()) else (values, None)
    on_gpu = xs[0].is_cuda and forced is None and "triton" in GPU_ORDER.get("gram_hsic_at_once", ())
    if derived or not normalised or len(xs) > MOST_AT_ONCE or not (forced == "triton" or on_gpu):
        return None
    return at_once_op(list(xs), estimator, split, True, features, False, False)[:2]


def _row_stats_fake(xs, by_features, split):
    m, n = len(xs), xs[0].shape[0]
    sizes = ((m, m), (m, n), (m, n), (m,), (m, n), (m * (m + 1) // 2, n), (m, m, n))
    size = _dots_size(xs, by_features, split) if by_features else 0
    cross = xs[0].new_empty(size, dtype=compute_dtype(xs[0].dtype))
    return *(xs[0].new_empty(size, dtype=torch.float64) for size in sizes), cross


def _row_stats_cpu(xs, by_features, split):
    found = _row_stats_fake(xs, by_features, split)
    *stats, p, moved, cross = (a.data_ptr() for a in found)
    problem = native_problem(xs)
    if by_features:
        problem.stats_by_features(split, *stats, p, moved, cross)
    else:
        problem.stats(*stats, 0, p, moved)
    return found


row_stats_op = leaf_op(
    "gram_row_stats(Tensor[] xs, bool by_features, int split) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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


class Shares(NamedTuple):
    """What single samples contribute to the statistics of linear kernels k."""

    p: Tensor  # [M (M + 1)/2, n], Σ_{j≠i} k_a(i, j) k_b(i, j) for a ≤ b, one after the other
    moved: Tensor  # [M, M, n], Σ_j k_b(i, j) |x_aj|² of b and a, j = i as well
    cross: dict[tuple[int, int], Tensor]  # by way of features: X_aᵀX_b; of X_aᵀX_a the upper half, half its diagonal


def gram_row_stats(xs: Sequence[Tensor], by_features: bool = False, split: int = 0) -> tuple[Statistics, Shares]:
    """The statistics of a linear kernel, the same bits as of :func:`gram_stats`, and the shares of single samples in
    them: of no pairs but those of `split` by way of features. Not differentiable."""
    *stats, p, moved, cross = row_stats_op(list(xs), by_features, split)
    return Statistics(*stats), Shares(p, moved, blocks_of(cross, xs, split) if by_features else {})


def constants_of(scale: Tensor, kernel: str, coef0: float = 0.0) -> Tensor:
    """What `stats_op` takes for kernels as they are: scale, offset and base of every layer, [3, M].

    Of a polynomial kernel coef0^degree is subtracted at once: the measures do not notice, their digits do.
    """
    if kernel == "polynomial":
        return torch.stack([scale, torch.full_like(scale, coef0), torch.ones_like(scale)])
    return torch.nn.functional.pad(scale[None], (0, 0, 0, 2))


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
    if by_features is None:
        by_features = kernel == "linear" and _fewer_by_features(xs, split)
    keep_dots = (by_features or mask is None) and derives(*xs) and _dots_are_small(xs, by_features, split)
    return Statistics(*stats_op(list(xs), mask, constants, kernel, degree, centre, by_features, split, keep_dots)[:5])
