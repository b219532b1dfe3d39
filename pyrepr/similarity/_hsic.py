"""The algebra of HSIC and CKA: from the statistics of ``gram_stats`` (pyrepr.ops) to every estimator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrepr.ops._leaf import readable
from pyrepr.ops.gram import gram_stats
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.similarity._checks import check_count
from pyrepr.similarity.kernels import Kernel

# Squared norms of centred float32 rows between which products of two inner products, and their derivatives, are safe.
NORMS = (1e-10, 1e12)


class DegenerateInputWarning(UserWarning):
    """A layer whose samples are all alike: its similarity to anything is undefined, and NaN is returned.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     value = pyrepr.cka(torch.ones(8, 3), torch.randn(8, 3))
        >>> caught[0].category is pyrepr.DegenerateInputWarning, value.isnan().item()
        (True, True)
    """


def _valid_count(xs: Sequence[Tensor], mask: Tensor | None, estimator: str) -> Tensor | int:
    """n, or the number of rows the mask leaves, checked where checking needs no tracing."""
    if mask is None:
        check_count(xs[0].shape[0], estimator)
        return xs[0].shape[0]
    count = mask.sum()
    if readable(count):
        check_count(int(count), estimator, "mask")
    return count.double()


def _statistics(
    xs: Sequence[Tensor], mask: Tensor | None, spec: Kernel, split: int, scales: Tensor | None
) -> tuple[Tensor, ...]:
    """`gram_stats` for layers of any magnitude.

    The linear kernel's float32 entries are multiplied with each other, so that tiny layers (gradients, say) underflow
    and huge ones overflow. Where the largest squared norm is out of :data:`NORMS`, layers are divided by a power of two
    first, and the statistics multiplied by it, in float64, afterwards. Seen on the CPU in eager mode only: it needs a
    look at the numbers.
    """
    scales = spec.scales(xs, mask) if scales is None else scales
    found = gram_stats(xs, mask, scales, spec.name, spec.degree, spec.coef0, split)
    d = found[2].detach()
    wide = compute_dtype(xs[0].dtype) == torch.float64
    if wide or spec.name != "linear" or not d.is_cpu or not readable(d):
        return found
    norms = d.amax(1).tolist()
    if all(NORMS[0] <= norm <= NORMS[1] or norm == 0 or not math.isfinite(norm) for norm in norms):
        return found
    units = [2.0 ** round(math.log2(norm) / 2) if 0 < norm < math.inf else 1.0 for norm in norms]
    xs = [x.to(torch.float32) * (1 / unit) for x, unit in zip(xs, units, strict=True)]
    s, r, d, shift = gram_stats(xs, mask, scales, spec.name, spec.degree, spec.coef0, split)
    squares = torch.tensor(units, dtype=torch.float64, device=d.device).square()
    return s * torch.outer(squares, squares), r * squares[:, None], d * squares[:, None], shift


def hsic_table(
    xs: Sequence[Tensor],
    spec: Kernel,
    estimator: str,
    mask: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """HSIC of every layer with every layer, [M, M] float64, and the smallest self-HSIC that is not rounding, [M].

    `scales`, [M] float64, are σ or γ of every layer; by default what the kernel chooses for these samples.
    S, R and D are sums over i ≠ j and the diagonal (see `ops.gram`). With r = R + D, the full row sums:
    biased  [S + D·D − (2/n) r·r + Σr Σr / n²] / (n−1)²  (Gretton et al. 2005)
    unbiased  [S + ΣR ΣR / ((n−1)(n−2)) − 2/(n−2) R·R] / (n(n−3))  (Song et al. 2012, eq. 5)
    """
    n = _valid_count(xs, mask, estimator)
    s, r, d, shift = _statistics(xs, mask, spec, split, scales)
    if estimator == "biased":
        r = r + d
        total = r.sum(1)
        table = (s + d @ d.T - (2 / n) * (r @ r.T) + torch.outer(total, total) / n**2) / (n - 1) ** 2
    else:
        total = r.sum(1)
        table = s + torch.outer(total, total) / ((n - 1) * (n - 2)) - (2 / (n - 2)) * (r @ r.T)
        table = table / (n * (n - 3))
    # Kernels that are not shift-invariant leave rounding errors of their mean value behind.
    eps = torch.finfo(compute_dtype(xs[0].dtype)).eps
    return table, (8 * eps * shift).square()


def out_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    return compute_dtype(xs[0].dtype)


def normalise(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """CKA from HSIC: cross [Lx, Ly], left [Lx], right [Ly]. Two roots: their product cannot overflow."""
    return cross / (left.sqrt()[:, None] * right.sqrt()[None, :])


def warn_if_degenerate(own: Tensor, floor: Tensor, names: Sequence[str]) -> Tensor:
    """Self-HSIC that is no more than rounding becomes NaN, with a warning that names the layer."""
    degenerate = own <= floor
    if own.device.type == "cpu" and readable(degenerate) and degenerate.any():
        which = ", ".join(name for name, bad in zip(names, degenerate.tolist(), strict=True) if bad)
        warnings.warn(
            f"{which}: all samples have the same features, or what sets them apart is no more than rounding errors, so "
            "CKA is undefined; returning NaN",
            DegenerateInputWarning,
            stacklevel=4,
        )
    return torch.where(degenerate, torch.nan, own)
