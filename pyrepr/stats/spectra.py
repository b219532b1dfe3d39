"""How many directions a representation uses, and how much of it is one direction."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr._checks import check_layer, check_tensor, shape_of, shown
from pyrepr.ops._leaf import require_finite
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.stats.moments import Moments

KINDS = ("entropy", "participation")


def effective_rank(x: Tensor | Moments, kind: str = "entropy", *, center: bool = True) -> Tensor:
    """The effective number of directions of the rows of x.

    Args:
        x: [..., n, d], or :class:`Moments` of a stream (centred).
        kind: ``"entropy"``: exp of the entropy of the singular values divided by their sum (Roy & Vetterli 2007), as
            RankMe does; ``"participation"``: (Σλ)² / Σλ² of their squares, the participation ratio.
        center: subtract the mean row first; false for matrices that are no samples (attention maps).

    Returns:
        [...], between 1 and the rank; float64 for float64 inputs and moments, else float32; differentiable in x where
        singular values are distinct. NaN for a matrix of zeros, an empty one, or one that is not
        finite.

    Raises:
        ValueError, TypeError: for another kind or shape.

    Example:
        >>> round(pyrepr.stats.effective_rank(torch.eye(5), center=False).item(), 4)
        5.0
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'entropy' or 'participation', got {shown(kind)}")
    if isinstance(x, Moments):
        if not center:
            raise ValueError("center must be True for moments, which are around the mean")
        values = torch.linalg.eigvalsh(x.covariance).clamp_min(0).sqrt()
    else:
        x = check_tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"x must have shape [..., n, d], got {shape_of(x)}")
        x = x.to(compute_dtype(x.dtype))
        for _ in range(2 if center else 0):  # again for the mean's own rounding, which the entropy would notice
            x = x - x.mean(-2, keepdim=True)
        finite = x.isfinite().all(-1).all(-1)
        values = torch.linalg.svdvals(torch.where(finite[..., None, None], x, 0))
        values = torch.where(finite[..., None], values, torch.nan)
    if not values.shape[-1]:
        return values.sum(-1) + torch.nan
    values = values / values.detach().amax(-1, keepdim=True)  # squares of squares stay in range
    if kind == "participation":
        squares = values.square()
        return squares.sum(-1).square() / squares.square().sum(-1)
    p = values / values.sum(-1, keepdim=True)
    return (-torch.where(p == 0, 0, p * torch.where(p == 0, 1, p).log()).sum(-1)).exp()


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine of all pairs of different rows, (|Σ x̂|² − n) / (n(n − 1)): how much they point one way (anisotropy).

    Args:
        x: [n, d]; zero rows have cosine 0 with anything.

    Returns:
        A scalar; NaN for fewer than two rows; differentiable.

    Raises:
        ValueError, TypeError: for another shape or dtype, and x that is not finite: one row would decide.

    Example:
        >>> round(pyrepr.stats.mean_cosine(torch.ones(4, 3)).item(), 4)
        1.0
    """
    x = check_layer("x", x)
    require_finite("x", x)
    x = x.to(compute_dtype(x.dtype))
    if x.shape[1]:
        largest = x.detach().abs().amax(1, keepdim=True)
        x = x / torch.where(largest == 0, 1, largest)  # squares stay in range
    norm = x.norm(dim=1, keepdim=True)
    unit = x / torch.where(norm == 0, 1, norm)
    n, total = x.shape[0], unit.sum(0)
    return (total @ total - unit.square().sum()) / (n * (n - 1)) if n > 1 else x.new_tensor(torch.nan)
