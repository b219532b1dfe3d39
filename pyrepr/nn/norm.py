"""The normalisation of the delta-rule layers, in place of flash-linear-attention's and with its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._checks import shown
from pyrepr.functional.norm import ACTIVATIONS, rms_norm_gated
from pyrepr.nn._sizes import check_sizes


class FusedRMSNormGated(nn.Module):
    """:func:`pyrepr.functional.rms_norm_gated` with its weight [D]: the module of flash-linear-attention 0.6.

    Args:
        hidden_size: D. elementwise_affine: has a weight; default yes. eps: default 1e-5.
        activation: of the gate: ``"swish"`` (default), ``"silu"``, the same, or ``"sigmoid"``.
        device, dtype: of the weight.

    Call: ``norm(x, g, residual=None, prenorm=False, residual_in_fp32=False)``, as in the function.

    Example:
        >>> norm = pyrepr.nn.FusedRMSNormGated(16, activation="sigmoid")
        >>> norm(torch.randn(2, 5, 16), torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}")
        self.hidden_size, self.elementwise_affine, self.eps, self.activation = (
            hidden_size,
            elementwise_affine,
            eps,
            activation,
        )
        weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,  # [..., D]
        g: Tensor | None = None,  # [..., D]
        residual: Tensor | None = None,  # [..., D]
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:  # [..., D], and with prenorm [..., D]
        return rms_norm_gated(
            x, g, self.weight, self.bias, self.activation, residual, prenorm, residual_in_fp32, self.eps
        )

    def extra_repr(self) -> str:
        affine = "" if self.elementwise_affine else ", elementwise_affine=False"
        return f"{self.hidden_size}{affine}, eps={self.eps}, activation={self.activation!r}"
