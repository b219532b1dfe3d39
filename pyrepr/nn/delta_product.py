"""Gated DeltaProduct as a layer, in place of flash-linear-attention's and with its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyrepr.functional.delta_product import chunk_gated_delta_product
from pyrepr.nn._sizes import check_sizes
from pyrepr.nn.delta_rule import _DeltaLayer, _time_steps, _whole
from pyrepr.nn.norm import FusedRMSNormGated
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import decay


class GatedDeltaProduct(_DeltaLayer):
    """The gated delta rule with several steps a token as a layer: Siems et al. 2025, arXiv 2502.10297; the layer of
    flash-linear-attention 0.6.

    Keys, values and step sizes of all steps are projections of the token; its decay is that of
    :class:`GatedDeltaNet`, applied once.

    Args:
        hidden_size: width of input and output. Default 2048.
        expand_v: width of a value head over head_dim. Default 2.
        head_dim: width of a query and key head. Default 256. num_heads: of them, default 6.
        num_v_heads: value heads, a multiple of num_heads. Default as many.
        mode: see :class:`DeltaNet`.
        use_output_gate: default yes. use_forget_gate: decays; default yes.
        allow_neg_eigval: step sizes up to 2; default yes.
        num_householder: steps a token; default 2.
        use_short_conv, conv_size, conv_bias, layer_idx, norm_eps: see :class:`DeltaNet`.
        Other keyword arguments are accepted and ignored, as there.

    Call, result and errors are those of :class:`DeltaNet`.

    Example:
        >>> o, *_ = pyrepr.nn.GatedDeltaProduct(hidden_size=32, head_dim=8, num_heads=2)(torch.randn(2, 10, 32))
        >>> o.shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        use_forget_gate: bool = True,
        allow_neg_eigval: bool = True,
        num_householder: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, num_v_heads=num_v_heads)
        check_sizes(conv_size=conv_size, num_householder=num_householder)
        value_width = _whole("head_dim · expand_v", head_dim, expand_v)
        self._set_sizes(hidden_size, num_heads, num_v_heads or num_heads, head_dim, value_width, mode)
        self.use_output_gate, self.use_forget_gate, self.use_short_conv = (
            use_output_gate,
            use_forget_gate,
            use_short_conv,
        )
        self.allow_neg_eigval, self.num_householder, self.layer_idx = allow_neg_eigval, num_householder, layer_idx
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim * num_householder, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim * num_householder, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads * num_householder, bias=False)
        if use_forget_gate:
            self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.num_v_heads).uniform_(0, 16).log())
            self.dt_bias = nn.Parameter(_time_steps(self.num_v_heads))
        if use_short_conv:
            self._make_convolutions(conv_size, conv_bias)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _split(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = self.num_householder
        return (
            q.unflatten(-1, (self.num_heads, self.head_k_dim)),
            k.unflatten(-1, (steps, self.num_heads, self.head_k_dim)).flatten(1, 2),
            v.unflatten(-1, (steps, self.num_v_heads, self.head_v_dim)).flatten(1, 2),
        )

    def _attend(self, x, q, k, v, options):
        beta = self.b_proj(x).unflatten(-1, (self.num_householder, -1)).flatten(1, 2)
        g = None
        if self.use_forget_gate:
            g = decay(self.a_proj(x), self.A_log, self.dt_bias, None, compute_dtype(x.dtype))
        options |= self._sigmoid() | {"use_qk_l2norm_in_kernel": True}
        return chunk_gated_delta_product(q, k, v, g, beta, self.num_householder, **options)

    def _gate(self, x: Tensor) -> Tensor | None:
        return super()._gate(x) if self.use_output_gate else None
