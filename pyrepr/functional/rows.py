"""Functions of two rows: cosines of pairs, what is left of a row beside another, reflections. Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr._checks import check_tensor, shape_of, shown
from pyrepr.ops._leaf import require_finite
from pyrepr.reference._dtypes import compute_dtype

REDUCTIONS = ("mean", "sum", "none")


def _pair(name_x: str, x: object, name_y: str, y: object) -> tuple[Tensor, Tensor]:
    x, y = check_tensor(name_x, x), check_tensor(name_y, y)
    if x.dim() < 1 or y.dim() < 1 or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"{name_y} must have the width of {name_x}, got {shape_of(x)} and {shape_of(y)}")
    dtype = compute_dtype(torch.promote_types(x.dtype, y.dtype))
    return x.to(dtype), y.to(dtype)


def _rows_of_both(name: str, x: object, name_y: str, y: object) -> tuple[Tensor, Tensor]:
    x, y = _pair(name, x, name_y, y)
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        raise ValueError(f"{name_y} must broadcast against {name}, got {shape_of(x)} and {shape_of(y)}") from None
    return x, y


def paired_cosine(x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Cosine of every row of x with the same row of y; 1 − the mean is how much a block changes its input.

    Args:
        x, y: [..., d], shapes that broadcast.
        reduction: ``"mean"`` (default) or ``"sum"`` over all rows, or ``"none"``.

    Returns:
        A scalar, or [...]; float64 for float64 inputs, else float32. A zero row has cosine 0, one that is not finite
        NaN. Differentiable.

    Example:
        >>> x = torch.randn(5, 4)
        >>> round(pyrepr.functional.paired_cosine(x, x).item(), 4)
        1.0
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {shown(reduction)}")
    x, y = _rows_of_both("x", x, "y", y)
    cosine = (_unit(x) * _unit(y)).sum(-1)
    return cosine if reduction == "none" else cosine.mean() if reduction == "mean" else cosine.sum()


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay, with gradient 0."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    scaled = x / torch.where(largest == 0, 1, largest)  # so that squares neither overflow nor vanish
    squares = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(squares == 0, 0, torch.where(squares == 0, 1, squares).rsqrt())


def orthogonal_residual(x: Tensor, ref: Tensor) -> Tensor:
    """x − ⟨x, g⟩/⟨g, g⟩ g: what x holds that g, a row of ref, does not (Yang et al. 2021, DOLG).

    Args:
        x: [..., d], say local features [B, T, d].
        ref: [..., d], broadcast against x, say global ones [B, 1, d].

    Returns:
        The broadcast shape, orthogonal to ref; x itself where ref is zero. float64 for float64 inputs, else float32.

    Example:
        >>> x, ref = torch.randn(5, 4), torch.randn(5, 4)
        >>> r = pyrepr.functional.orthogonal_residual(x, ref)
        >>> (r * ref).sum(1).abs().max().item() < 1e-5
        True
    """
    x, ref = _rows_of_both("x", x, "ref", ref)
    unit = _unit(ref)
    return x - (x * unit).sum(-1, keepdim=True) * unit


def householder(x: Tensor, v: Tensor) -> Tensor:
    """Reflections of the rows of x, one after the other: x H_1 H_2 ⋯ H_r, H_i = I − 2 v_i v_iᵀ / |v_i|².

    The product of r reflections is I − Vᵀ T V with T⁻¹ = ½ I + the strict upper triangle of V Vᵀ for unit rows V
    (compact WY form), so it costs two products of [n, d] with [d, r]; every orthogonal map is r ≤ d reflections.

    Args:
        x: [..., d].
        v: [d] or [r, d], of any length; a zero row reflects nothing.

    Returns:
        [..., d], float64 for float64 inputs, else float32; lengths and inner products are kept. Differentiable.

    Raises:
        ValueError, TypeError: for other shapes or dtypes, and v that is not finite, which would reach every row.

    Example:
        >>> x, v = torch.randn(5, 4), torch.randn(4)
        >>> y = pyrepr.functional.householder(x, v)
        >>> torch.allclose(y.norm(dim=1), x.norm(dim=1), atol=1e-5)
        True
    """
    x, v = _pair("x", x, "v", v)
    if v.dim() > 2:
        raise ValueError(f"v must have shape [d] or [r, d], got {shape_of(v)}")
    require_finite("v", v)
    rows = _unit(v.reshape(-1, v.shape[-1]))
    inverse = (rows @ rows.T).triu(1) + 0.5 * torch.eye(len(rows), dtype=x.dtype, device=x.device)
    return x - (x @ rows.T) @ torch.linalg.solve_triangular(inverse, rows, upper=True)
