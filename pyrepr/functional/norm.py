"""The normalisation that stands behind the delta rule: RMSNorm, then a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyrepr._checks import check_device, check_shape, check_tensor, shape_of, shown
from pyrepr.ops._native import direct
from pyrepr.reference._dtypes import compute_dtype

ACTIVATIONS = ("swish", "silu", "sigmoid")


def rms_norm_gated(
    x: Tensor,  # [..., D]
    g: Tensor | None,  # [..., D]
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    activation: str = "swish",
    residual: Tensor | None = None,  # [..., D]
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:  # [..., D], and with prenorm [..., D]
    """x / √(mean x² + eps) · weight + bias over the last axis, times the activation of a gate.

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; names and order of arguments are those of
    flash-linear-attention.

    Args:
        x: [..., D], any floating dtype and strides. All is computed in float32 (float64 for float64 inputs) and rounded
            once.
        g: the gate, of x's shape; ``None``: none.
        weight, bias: [D]; default none.
        activation: of the gate: ``"swish"`` (default), ``"silu"``, the same, or ``"sigmoid"``.
        residual: of x's shape, added to x first; default none.
        prenorm: return that sum as well, in residual's dtype, without one in x's; default no. residual_in_fp32: without
            one, in float32; default no.
        eps: default 1e-6.

    Returns:
        In x's dtype and shape; with ``prenorm`` also the sum. Differentiable any number of times in every mode.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range.

    Example:
        >>> x, g = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4, 16)
        >>> pyrepr.functional.rms_norm_gated(x, g, torch.ones(16)).shape
        torch.Size([2, 5, 4, 16])
    """
    if type(eps) not in (float, int) or not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {shown(eps)}")
    if bias is None and residual is None and not prenorm and activation in ACTIVATIONS:
        native = direct()
        done = native and native.rms_norm_gated(
            x, g, weight, float(eps), activation != "sigmoid", torch.is_grad_enabled(), torch.get_num_threads()
        )
        if done is not None:
            return done
    check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., D] with D of at least 1, got {shape_of(x)}")
    for name, other, symbols, shape in (
        ("g", g, "[..., D] of x", x.shape),
        ("residual", residual, "[..., D] of x", x.shape),
        ("weight", weight, "[D]", x.shape[-1:]),
        ("bias", bias, "[D]", x.shape[-1:]),
    ):
        if other is not None:
            check_device(name, check_tensor(name, other), "x", x)
            check_shape(name, other, symbols, tuple(shape))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}")
    dtype = compute_dtype(x.dtype)
    kept = torch.float32 if residual_in_fp32 else x.dtype
    wide = x.to(dtype)
    if residual is not None:
        wide, kept = wide + residual.to(dtype), residual.dtype
    y = functional.rms_norm(wide, x.shape[-1:], None if weight is None else weight.to(dtype), eps)
    if bias is not None:
        y = y + bias.to(dtype)
    if g is not None:
        gate = g.to(dtype)
        open_ = torch.sigmoid(gate)  # SiLU of PyTorch has no derivative of its backward in forward mode
        y = y * (open_ if activation == "sigmoid" else gate * open_)
    return (y.to(x.dtype), wide.to(kept)) if prenorm else y.to(x.dtype)
