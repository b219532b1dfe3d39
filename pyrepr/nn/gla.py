"""Gated linear attention as a layer, in place of flash-linear-attention's and with its checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pyrepr._checks import shown
from pyrepr.functional.gla import chunk_gla, fused_recurrent_gla
from pyrepr.nn._sizes import check_sizes
from pyrepr.nn.delta_rule import _DeltaLayer, _whole
from pyrepr.nn.norm import FusedRMSNormGated
from pyrepr.reference._dtypes import compute_dtype

_FUNCTIONS = {
    "relu": functional.relu,
    "sigmoid": functional.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
}


class GLA(_DeltaLayer):
    """Gated linear attention with a gate per key channel: Yang et al. 2024, arXiv 2312.06635; the layer
    ``GatedLinearAttention`` of flash-linear-attention 0.6.

    Decays are g = log sigmoid(gk_proj(x)) / gate_logit_normalizer, computed in float32 (float64 for float64 inputs).

    Args:
        mode: ``"chunk"`` (default), ``"fused_recurrent"`` or ``"fused_chunk"``; accepted for compatibility, all compute
            the same.
        hidden_size: width of input and output. Default 1024.
        expand_k, expand_v: width of all keys and of all values over hidden_size. Default 0.5 and 1.
        num_heads: default 4.
        num_kv_heads: heads of keys, values and gates, of which num_heads is a multiple; each serves as many heads of
            queries one after the other. Default num_heads.
        feature_map: of queries and keys: ``"relu"``, ``"sigmoid"``, ``"silu"``, ``"swish"``; default none.
        use_short_conv: convolutions of q, k and v before the rule; default no. conv_size: their width, default 4.
            conv_bias: default no.
        use_output_gate: default yes. gate_fn: its function, one of those of feature_map; default ``"swish"``.
        elementwise_affine: the output's normalisation has a weight; default yes. norm_eps: of it, default 1e-5.
        gate_logit_normalizer: default 16. gate_low_rank_dim: width inside gk_proj, default 16.
        clamp_min: the least g; default none.
        fuse_norm: as there, says under which name the norm's weight is kept; default yes.
        layer_idx: number of the layer in a cache; only needed with one.

    Call, result and errors are those of :class:`DeltaNet`.

    Example:
        >>> o, *_ = pyrepr.nn.GLA(hidden_size=32, num_heads=2)(torch.randn(2, 10, 32))
        >>> o.shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool | None = True,
        norm_eps: float = 1e-5,
        gate_logit_normalizer: int = 16,
        gate_low_rank_dim: int = 16,
        clamp_min: float | None = None,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, conv_size=conv_size)
        check_sizes(gate_low_rank_dim=gate_low_rank_dim)
        for name, function in (("feature_map", feature_map), ("gate_fn", gate_fn)):
            if function not in _FUNCTIONS and not (function is None and name == "feature_map"):
                raise ValueError(f"{name} must be one of {', '.join(_FUNCTIONS)}, got {shown(function)}")
        if num_heads % (num_kv_heads or num_heads):
            raise ValueError(f"num_heads must be a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}")
        widths = []
        for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
            whole = _whole(f"hidden_size · {name}", hidden_size, expand)
            if whole % num_heads:
                raise ValueError(f"hidden_size · {name} must be a multiple of num_heads = {num_heads}, got {whole}")
            widths.append(whole // num_heads)
        kind = "chunk" if mode == "fused_chunk" else mode
        self._set_sizes(hidden_size, num_heads, num_heads, widths[0], widths[1], kind)
        self.num_kv_heads = num_kv_heads or num_heads
        self.num_kv_groups = num_heads // self.num_kv_heads
        self.feature_map, self.gate_fn, self.clamp_min, self.layer_idx = feature_map, gate_fn, clamp_min, layer_idx
        self.use_short_conv, self.use_output_gate = use_short_conv, use_output_gate
        self.gate_logit_normalizer = gate_logit_normalizer
        key_dim, value_dim = self.key_dim // self.num_kv_groups, self.value_dim // self.num_kv_groups
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        if use_short_conv:
            self._make_convolutions(conv_size, conv_bias)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False), nn.Linear(gate_low_rank_dim, key_dim)
        )
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.fuse_norm_and_gate = bool(gate_fn == "swish" and fuse_norm and use_output_gate)
        norm = FusedRMSNormGated(self.head_v_dim, bool(elementwise_affine), norm_eps)
        if self.fuse_norm_and_gate:
            self.g_norm_swish_gate = norm
        else:
            self.g_norm = norm

    def _without_convolution(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def _split(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = q.unflatten(-1, (self.num_heads, self.head_k_dim))
        return q, self._shared(k, self.head_k_dim), self._shared(v, self.head_v_dim)

    def _shared(self, y: Tensor, width: int) -> Tensor:
        """Heads of keys and values, [B, T, D] -> [B, T, num_heads, width]."""
        return y.unflatten(-1, (self.num_kv_heads, width)).repeat_interleave(self.num_kv_groups, 2)

    def _activate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.feature_map is None:
            return q, k
        return _FUNCTIONS[self.feature_map](q), _FUNCTIONS[self.feature_map](k)

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
        g = functional.logsigmoid(self.gk_proj(x).to(compute_dtype(x.dtype))) / self.gate_logit_normalizer
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        g = self._shared(g, self.head_k_dim)
        if options.keys() & {"out_state", "output_states"}:
            return fused_recurrent_gla(q, k, v, gk=g, **options)
        return chunk_gla(q, k, v, g, **options)

    def _norm(self, o: Tensor, x: Tensor) -> Tensor:
        gate = self._gate(x) if self.use_output_gate else None
        if self.fuse_norm_and_gate:
            return self.g_norm_swish_gate(o, gate)
        return self.g_norm(o) if gate is None else self.g_norm(o) * _FUNCTIONS[self.gate_fn](gate)
