"""Gram matrices, HSIC and CKA of one pair or of all pairs of layers.

Everything but :func:`gram` is computed tile by tile (``csrc/cpu/gram.h``): no n × n matrix is ever held.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrepr._checks import layer_list
from pyrepr.ops._entries import by_entries
from pyrepr.ops._gram_gradient import route_costs
from pyrepr.ops._leaf import at_hand, derives, readable
from pyrepr.ops.gram import matrix_op
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import SHIFT_INVARIANT
from pyrepr.similarity._checks import check_estimator, check_groups_alone, check_layer, check_layers, check_mask
from pyrepr.similarity._hsic import (
    DegenerateInputWarning,
    hsic_table,
    normalise,
    out_dtype,
    scaled_hsic,
    values_at_once,
    warn_if_degenerate,
)
from pyrepr.similarity._ranges import careful_matrix
from pyrepr.similarity._stderr import Found, check_groups, cka_stderr, row_stats
from pyrepr.similarity._whole import whole_op
from pyrepr.similarity.kernels import Kernel, as_kernel

log = logging.getLogger("pyrepr")


def gram(
    x: Tensor,  # [n, d]
    y: Tensor | None = None,  # [m, d]
    *,
    kernel: str | Kernel = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    center: bool = False,
) -> Tensor:  # [n, m]
    """The kernel matrix k(x_i, y_j), stored.

    Args:
        x: [n, d], float32, float64, bfloat16 or float16; any strides.
        y: [m, d] of the same dtype and device; ``None`` means x, and costs half.
        kernel: ``"linear"``, ``"rbf"``, ``"laplacian"``, ``"polynomial"``, ``"cosine"`` or a :class:`pyrepr.Kernel`.
        bandwidth: σ of rbf and laplacian in units of the median distance between rows of x; by default 1.
        sigma: σ itself; overrides ``bandwidth``. Both belong inside a Kernel(...), and are refused beside it.
        center: subtract row and column means and add the grand mean (H K H for y = None).

    Returns:
        [n, m], float64 for float64 inputs, else float32 (products of 16-bit inputs accumulate in float32).
        Differentiable in x and y any number of times, as :func:`cka` is; σ = bandwidth × median counts as a constant.
        On the CPU an entry is 0 or infinite only where its true value does not fit, whatever the magnitude of the rows;
        of a linear kernel, where one of the products does not.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range.

    Example:
        >>> x = torch.randn(10, 4)
        >>> torch.allclose(pyrepr.gram(x), x @ x.T, atol=1e-5)
        True
    """
    spec = as_kernel(kernel, bandwidth, sigma)
    check_layer("x", x)
    if y is not None:
        check_layer("y", y)
        if y.shape[1] != x.shape[1]:
            raise ValueError(f"y must have the width of x, {x.shape[1]}, got {y.shape[1]}")
        if y.dtype != x.dtype:
            raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
        if y.device != x.device:
            raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    if spec.name in ("rbf", "laplacian") and spec.sigma is None and x.shape[0] < 2:
        raise ValueError(f"x must have at least 2 rows for a median distance, got {x.shape[0]}; or give sigma")
    if spec.name == "linear" and center:  # H X (H Y)ᵀ = H X Yᵀ H, without the cancellation of centring the products
        dtype = compute_dtype(x.dtype)
        left, right = (None if a is None else a.to(dtype) - a.to(dtype).mean(0) for a in (x, y))
        return matrix_op(left, right, spec.scales([x]), "linear", 1, 0.0, False)

    def matrix(x: Tensor, y: Tensor | None = None) -> tuple[Tensor]:
        both = [x] if y is None else [x, y]
        if x.is_cpu and not (readable(x) and (y is None or readable(y))):
            return (kernel_op(both, None, None, *spec.fields()),)
        return _matrix(both, spec)

    (k,) = by_entries(matrix, x, *([] if y is None else [y]))
    if center:
        rows, columns = k.mean(1, keepdim=True, dtype=torch.float64), k.mean(0, keepdim=True, dtype=torch.float64)
        k = (k - rows - columns + rows.mean()).to(k.dtype)
    return k


def _matrix(xs: Sequence[Tensor], spec: Kernel) -> tuple[Tensor]:
    """The kernel matrix of one layer, or of two."""
    x, y = xs[0], xs[1] if len(xs) > 1 else None
    centre = spec.name in ("rbf", "laplacian")
    scale = spec.scales([x])
    if centre:
        scale = torch.where(scale > 0, scale, torch.nan)  # a median of 0 leaves the kernel undefined everywhere
    k = careful_matrix(x, y, spec, scale)
    if k is None:
        k = matrix_op(x, y, scale, spec.name, spec.degree, spec.coef0, centre)
    k = k.to(compute_dtype(x.dtype))
    if centre and y is None:
        k.diagonal().add_((scale[0] * 0).to(k.dtype))  # which kernels set to 1 without a look at σ
    return (k,)


kernel_op = whole_op(
    "gram_kernel",
    "",
    "Tensor",
    lambda xs, *constants: xs[0].new_empty(len(xs[0]), len(xs[-1]), dtype=compute_dtype(xs[0].dtype)),
    lambda xs, mask, scales, *constants: _matrix(xs, Kernel(*constants)),
)


def hsic(
    x: Tensor,  # [n, p]
    y: Tensor,  # [n, q]
    *,
    kernel: str | Kernel = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: str = "unbiased",
) -> Tensor:
    """Hilbert–Schmidt independence criterion of two representations of the same n samples.

    Args:
        x, y: [n, p] and [n, q], one floating dtype and device, any strides and widths.
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`; beside a Kernel(...) the last two are refused.
        estimator: ``"unbiased"`` (Song et al. 2012, eq. 5; n ≥ 4; may be negative) or ``"biased"``
            (tr(KHLH)/(n−1)², Gretton et al. 2005).

    Returns:
        Scalar, float64 for float64 inputs, else float32. Differentiable as :func:`cka` is; σ = bandwidth ×
        median counts as a constant. NaN or infinite inputs give NaN. Layers of any magnitude are right as for
        :func:`cka`; the result is 0 or infinite only where the true value does not fit.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> x = torch.randn(100, 8)
        >>> (pyrepr.hsic(x, x) > 0).item()
        True
    """
    spec = as_kernel(kernel, bandwidth, sigma)
    check_estimator(estimator)
    xs = check_layers(["x", "y"], [x, y])
    if (whole := values_at_once(xs, spec, estimator, 1, None)) is not None:
        return whole[0, 1]
    table, _ = hsic_table(xs, spec, estimator, split=1)
    return table[0, 1].to(out_dtype(xs))


def cka(
    x: Tensor,  # [n, p]
    y: Tensor,  # [n, q]
    *,
    kernel: str | Kernel = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: str = "unbiased",
    mask: Tensor | None = None,  # [n] bool
    return_stderr: bool = False,
    groups: Tensor | None = None,  # [n] integers
) -> Tensor | tuple[Tensor, Tensor]:
    """Centred kernel alignment HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)) (Kornblith et al. 2019).

    Args:
        x, y: [n, p] and [n, q], one floating dtype and device, any strides and widths; row i of both is one sample.
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`; beside a Kernel(...) the last two are refused.
        estimator: of HSIC. ``"unbiased"`` is the default because the biased value of independent Gaussians is about
            d / (d + n − 1): 0.99 for n = 100, d = 10⁴. It needs n ≥ 4, and may leave [0, 1]; it is not clamped.
        mask: [n] bool, the rows that count (tokens that are not padding); ``None`` counts all.
        return_stderr, groups: as of :func:`cka_matrix`.

    Returns:
        Scalar, float64 for float64 inputs, else float32; with `return_stderr` (value, standard error). The value is
        differentiable in x and y, any number of times, forward and reverse, and under ``torch.func``, whose ``vmap``
        loops. First derivatives in reverse take blocks of rows, in memory independent of n; forward mode and higher
        orders go through plain PyTorch in float64 with some twenty n × n matrices for each layer, or with a linear
        kernel and n above the widths, some copies of the layers. σ = bandwidth × median counts as a constant in all of
        them. In reverse, only what requires a gradient is computed, so a frozen guide costs its forward. No epsilon: a
        layer whose samples are all alike gives NaN and a :class:`pyrepr.DegenerateInputWarning`.

        On the CPU values and gradients are right for layers of any magnitude, every kernel and degree, and with rows
        that dwarf all others: where float32 would not be enough, it is noticed, and everything is done once more in
        float64 on rescaled layers, in two to three times the time; rows that meet, which laplacian's root notices, too.
        What float64 cannot tell from rounding is NaN with the same warning; its error is 2⁻⁵³ times the largest entry
        of a kernel over what centring leaves of it. So it is under ``vmap``, at each entry, and in graphs of
        ``torch.compile`` and ``torch.export`` for values and first derivatives in reverse; not for other derivatives in
        a graph, nor on a GPU. Values and gradients have the same bits for any number of threads.
        Of bfloat16 layers of 128 rows or more, whose mean is not far larger than their spread, processors with products
        of bfloat16 pairs multiply those, for a linear kernel: the error is then up to 3e-6, not 1e-7.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> x = torch.randn(100, 8)
        >>> round(pyrepr.cka(x, 5 * x + 1).item(), 4)  # neither scale nor shift matters
        1.0
    """
    spec = as_kernel(kernel, bandwidth, sigma)
    check_estimator(estimator)
    check_groups_alone(groups, return_stderr)
    xs = check_layers(["x", "y"], [x, y])
    if mask is not None:
        check_mask(mask, xs[0].shape[0], xs[0].device)
    elif not return_stderr and (whole := values_at_once(xs, spec, estimator, 1, ["x", "y"])) is not None:
        return whole[0, 1]
    once = _shared_pass(xs, spec, 1) if return_stderr and mask is None else (None, None)
    table, floor, _ = scaled_hsic(xs, spec, estimator, mask, split=1, found=once[0])
    own = warn_if_degenerate(table.diagonal(), floor, ["x", "y"])
    value = normalise(table[:1, 1:], own[:1], own[1:])[0, 0].to(out_dtype(xs))
    if not return_stderr:
        return value
    if mask is not None:
        xs = [x[mask] for x in xs]
        groups = groups[mask] if isinstance(groups, Tensor) and groups.shape == mask.shape else groups
    return value, _stderr(xs, spec, estimator, groups, 1, once)[0, 0].to(value)


def choose_route(n: int, widths: Sequence[int], widths_y: Sequence[int] | None = None) -> str:
    """The route :func:`cka_matrix` takes for a linear kernel: ``"gram"`` (n × n tiles) or ``"features"`` (d × d tiles).

    Both are exact. The rule is the smaller number of multiply-adds, n²(D + M²/2)/2 against n·(½Σd_l² + Σ d_a d_b over
    the pairs asked for), with M layers of D features in all; roughly: features when n > D.
    Where a GPU kernel goes from layers to values by itself, it counts its tiles and launches instead.

    Example:
        >>> pyrepr.similarity.choose_route(100, [768, 768]), pyrepr.similarity.choose_route(50_000, [64, 64])
        ('gram', 'features')
    """
    costs = route_costs(n, [*widths, *(widths_y or ())], len(widths) if widths_y else 0)
    return "features" if costs[1] < costs[0] else "gram"


def cka_matrix(
    xs: Sequence[Tensor] | Tensor,  # Lx times [n, d_l], or [Lx, n, d]
    ys: Sequence[Tensor] | Tensor | None = None,  # Ly times [n, d_l], or [Ly, n, d]
    *,
    kernel: str | Kernel = "linear",
    bandwidth: float | None = None,
    sigma: float | None = None,
    estimator: str = "unbiased",
    return_stderr: bool = False,
    groups: Tensor | None = None,  # [n] integers
) -> Tensor | tuple[Tensor, Tensor]:  # [Lx, Ly]
    """CKA of all layers of one network with all layers of another (or with each other), in one pass.

    Every layer's Gram tiles are made once, whatever the number of pairs, and only their symmetric half. With a linear
    kernel the cheaper of two exact routes is taken (:func:`choose_route`; the choice is logged to logger ``pyrepr``).

    Args:
        xs: Lx layers as a list of [n, d_l] (widths may differ) or one tensor [Lx, n, d].
        ys: the same for the other network; ``None`` compares xs with itself.
        kernel, bandwidth, sigma, estimator: as in :func:`cka`; σ = bandwidth × median is chosen for each layer.
        return_stderr: also give the standard error of every value: the exact jackknife over samples, σ held, from the
            values without each of them (``_stderr.py`` has the formulas). Default: no. With the unbiased estimator 0
            means independence, so value / standard error says how far from it a pair is. The values are added up in
            another order then: their last bits may differ.
        groups: [n] integers: what is left out at a time where rows are not independent, such as the tokens of one
            text. ``None`` (default): single rows. Not differentiable. Only with `return_stderr`.

    Returns:
        [Lx, Ly], float64 for float64 inputs, else float32; with `return_stderr` (values, standard errors), both of that
        shape. The values are differentiable in every layer, as :func:`cka`. Memory beside the inputs: a few tiles a
        thread, independent of n.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> layers = [torch.randn(100, d) for d in (8, 16, 32)]
        >>> pyrepr.cka_matrix(layers).shape
        torch.Size([3, 3])
    """
    spec = as_kernel(kernel, bandwidth, sigma)
    check_estimator(estimator)
    check_groups_alone(groups, return_stderr)
    names, layers = layer_list("xs", xs)
    split = 0
    if ys is not None:
        split = len(layers)
        more_names, more = layer_list("ys", ys)
        names, layers = names + more_names, layers + more
    layers = check_layers(names, layers)
    if spec.name == "linear" and not torch.compiler.is_compiling() and log.isEnabledFor(logging.DEBUG):
        n, widths = layers[0].shape[0], [x.shape[1] for x in layers]
        route = choose_route(n, widths[: split or None], widths[split:] if split else None)
        log.debug("cka_matrix: %d layers, n = %d, D = %d: %s route", len(layers), n, sum(widths), route)
    if not return_stderr and (whole := values_at_once(layers, spec, estimator, split, names)) is not None:
        return whole[:split, split:] if split else whole
    once = _shared_pass(layers, spec, split) if return_stderr else (None, None)
    table, floor, _ = scaled_hsic(layers, spec, estimator, split=split, found=once[0])
    own = warn_if_degenerate(table.diagonal(), floor, names)
    values = normalise(table[:split, split:], own[:split], own[split:]) if split else normalise(table, own, own)
    values = values.to(out_dtype(layers))
    return (values, _stderr(layers, spec, estimator, groups, split, once).to(values)) if return_stderr else values


def _by_features(layers: list[Tensor], spec: Kernel, split: int) -> bool:
    n, widths = layers[0].shape[0], [x.shape[1] for x in layers]
    route = choose_route(n, widths[: split or None], widths[split:] if split else None)
    return spec.name == "linear" and route == "features"


def _shared_pass(layers: list[Tensor], spec: Kernel, split: int) -> Found:
    """Where one pass gives both: the statistics of the values, and each sample's share in them for the jackknife."""
    plain = spec.name == "linear" and layers[0].shape[0] > 0 and at_hand(layers[0]) and not derives(*layers)
    return row_stats(layers, _by_features(layers, spec, split), split) if plain else (None, None)


def _stderr(layers: list[Tensor], spec: Kernel, estimator: str, groups: object, split: int, found: Found) -> Tensor:
    groups, features = check_groups(groups, layers[0].shape[0], estimator), _by_features(layers, spec, split)
    return cka_stderr([x.detach() for x in layers], spec, estimator, groups, split, features, found)


__all__ = ["SHIFT_INVARIANT", "DegenerateInputWarning", "choose_route", "cka", "cka_matrix", "gram", "hsic"]
