"""Layers of linear attention with the delta rule, in place of flash-linear-attention's and with their checkpoints.

Same constructor arguments, same parameters (names and shapes, so ``load_state_dict(strict=True)`` works both ways),
same call and result. What a layer computes between its projections is in :mod:`pyrepr.functional.delta_rule` and
:mod:`pyrepr.functional.causal_conv1d`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrepr._checks import check_is_tensor, check_tensor, name_of, shown
from pyrepr._modules import is_bare
from pyrepr.functional import delta_rule as rules
from pyrepr.functional.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from pyrepr.nn._sizes import check_sizes
from pyrepr.nn.delta_cache import DeltaCache
from pyrepr.nn.norm import FusedRMSNormGated
from pyrepr.ops.delta_rule import decode, may_decode

_MODES = ("chunk", "fused_recurrent")


class ShortConvolution(nn.Conv1d):
    """:func:`pyrepr.causal_conv1d_fn` with its filter. weight: [D, 1, W], bias: [D] or ``None``.

    Args:
        hidden_size: D. kernel_size: W. bias: default no. activation: ``"silu"`` (default), ``"swish"`` or ``None``.

    Example:
        >>> y, state = pyrepr.nn.ShortConvolution(16, 4, activation="silu")(torch.randn(2, 10, 16))
        >>> y.shape
        torch.Size([2, 10, 16])
    """

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool = False, activation: str | None = "silu") -> None:
        check_sizes(hidden_size=hidden_size, kernel_size=kernel_size)
        super().__init__(hidden_size, hidden_size, kernel_size, padding=kernel_size - 1, groups=hidden_size, bias=bias)
        self.activation = activation
        self.backend = "pyrepr"  # flash-linear-attention's layers ask whether their convolutions have the same

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, T, D]
        cache: Tensor | None = None,  # [N, D, W - 1]
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,  # [N + 1]
    ) -> tuple[Tensor, Tensor | None]:  # [B, T, D], [N, D, W - 1]
        weight = self.weight.squeeze(1)
        if cache is not None and output_final_state and cu_seqlens is None and not torch.is_grad_enabled():
            return causal_conv1d_update(x.mT, cache, weight, self.bias, self.activation).mT, cache
        result = causal_conv1d_fn(
            x.mT,
            weight,
            self.bias,
            initial_states=cache,
            return_final_states=output_final_state,
            activation=self.activation,
            cu_seqlens=cu_seqlens,
        )
        out, state = result if output_final_state else (result, None)
        return out.mT, state

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_channels}, kernel_size={self.kernel_size[0]}, bias={bias}, activation={self.activation!r}"


def _whole(name: str, size: int, expand: object) -> int:
    """size · expand, which has to be an integer; `name` says both."""
    if isinstance(expand, bool) or not isinstance(expand, (int, float)):
        raise TypeError(f"{name.split()[-1]} must be a number, got {shown(expand)}")
    value = size * expand
    if not math.isclose(value, round(value), rel_tol=1e-5):
        raise ValueError(f"{name} must be an integer, got {value}")
    return round(value)


def _time_steps(count: int) -> Tensor:
    """Biases whose softplus is spread from 0.001 to 0.1, evenly in the logarithm, as in Mamba."""
    steps = torch.exp(torch.rand(count) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp_min(1e-4)
    return steps + torch.log(-torch.expm1(-steps))


class _DeltaLayer(nn.Module):
    """What the layers share: padding, cache, convolutions, and the way through them."""

    num_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    use_short_conv: bool
    layer_idx: int | None
    allow_neg_eigval: bool
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    o_norm: FusedRMSNormGated
    g_proj: nn.Module

    def _set_sizes(self, hidden_size: int, heads: int, v_heads: int, width: int, v_width: int, mode: str) -> None:
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {shown(mode)}")
        if heads < 1 or v_heads < heads or v_heads % heads:
            raise ValueError(f"num_v_heads must be a multiple of num_heads = {heads}, got {v_heads}")
        if width < 1 or v_width < 1:
            raise ValueError(f"the width of a head must be positive, got {width} for keys and {v_width} for values")
        self.hidden_size, self.mode = hidden_size, mode
        self.num_heads, self.num_v_heads = heads, v_heads
        self.head_k_dim, self.head_v_dim = width, v_width
        self.key_dim, self.value_dim = heads * width, v_heads * v_width

    def _make_projections(self) -> None:
        self.q_proj = nn.Linear(self.hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, self.value_dim, bias=False)

    def _make_convolutions(self, size: int, bias: bool, qk_activation: str | None = "silu") -> None:
        self.q_conv1d = ShortConvolution(self.key_dim, size, bias, qk_activation)
        self.k_conv1d = ShortConvolution(self.k_proj.out_features, size, bias, qk_activation)
        self.v_conv1d = ShortConvolution(self.v_proj.out_features, size, bias)

    # What a layer adds.

    def _activate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k: [B, T, H, K] after convolution or projection."""
        return q, k

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Any, ...]:
        """The rule with its gates and step sizes made of x: [B, T, hidden]."""
        raise NotImplementedError

    def _sigmoid(self) -> dict[str, Any]:
        """How the rule makes step sizes of what a projection gives."""
        return {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": self.allow_neg_eigval}

    def _gate(self, x: Tensor) -> Tensor | None:
        """The output gate, [B, T, HV, V]."""
        return self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _decoded(
        self, x: Tensor, projected: tuple[Tensor, ...], last: dict[str, Any], new: list[Tensor]
    ) -> Tensor | None:
        """One token's [B, 1, HV·V] in one native call, for layers that have one, the states after it in `new`."""
        return None

    def _norm(self, o: Tensor, x: Tensor) -> Tensor:
        """What the rule gives, normalised and gated."""
        return self.o_norm(o, self._gate(x))

    # The way through.

    def _q_k_v(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        before: tuple[Tensor, ...] | None,
        keep: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...] | None]:
        """q, k: [B, T, H, K], v: [B, T, HV, V], and the convolutions' states if they are kept."""
        states = None
        if self.use_short_conv:
            convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
            results = [
                convolution(y, state, keep, cu_seqlens)
                for convolution, y, state in zip(convolutions, projected, before or (None,) * 3, strict=True)
            ]
            q, k, v = (y for y, _ in results)
            states = tuple(state for _, state in results) if keep else None
        else:
            q, k, v = self._without_convolution(*projected)
        return *self._split(q, k, v), states

    def _split(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] as heads."""
        q, k = (y.unflatten(-1, (self.num_heads, self.head_k_dim)) for y in (q, k))
        return q, k, v.unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _without_convolution(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return functional.silu(q), functional.silu(k), functional.silu(v)

    def _conv_states(
        self, projected: tuple[Tensor, ...], before: tuple[Tensor, ...] | None, count: int
    ) -> list[tuple[Tensor, ...] | None]:
        """The convolutions' states after each of the last `count` tokens."""
        if not self.use_short_conv:
            return [None] * count
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        windows = []
        for convolution, y, state in zip(convolutions, projected, before or (None,) * 3, strict=True):
            kept = convolution.kernel_size[0] - 1
            if state is None:
                state = y.new_zeros(y.shape[0], y.shape[2], kept)
            tokens = torch.cat([state.to(y.dtype), y.mT], -1)
            ends = range(tokens.shape[2] - count + 1, tokens.shape[2] + 1)
            windows.append([tokens[..., end - kept : end] for end in ends])
        return list(zip(*windows, strict=True))

    @staticmethod
    def _function(options: dict[str, Any], name: str) -> Any:
        """The rule of this name that takes the options."""
        kind = "fused_recurrent" if options.keys() & {"out_state", "output_states"} else "chunk"
        return getattr(rules, f"{kind}_{name}")

    def _cached(self, cache: DeltaCache | None) -> dict[str, Any] | None:
        if cache is None:
            return None
        if not isinstance(cache, DeltaCache):
            raise TypeError(f"past_key_values must be a pyrepr.nn.DeltaCache, got {type(cache).__name__}")
        if self.layer_idx is None:
            raise ValueError(f"{type(self).__name__} needs a layer_idx to use past_key_values, got None")
        return cache.get(self.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, hidden]
        attention_mask: Tensor | None = None,  # [B, T or more]
        past_key_values: DeltaCache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        cu_seqlens: Tensor | None = None,  # [N + 1]
        **kwargs: Any,
    ) -> tuple[Tensor, None, DeltaCache | None]:  # [B, T, hidden]
        """See :class:`DeltaNet`."""
        check_tensor("hidden_states", hidden_states)
        if type(self.q_proj) is nn.Linear:  # what took its place, tables for one, may take other dtypes
            dtype, device = self.q_proj.weight.dtype, hidden_states.device.type
            if dtype != hidden_states.dtype and not torch.is_autocast_enabled(device):
                came = name_of(hidden_states.dtype)
                raise TypeError(f"hidden_states must have the dtype of the layer, {name_of(dtype)}, got {came}")
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            came = list(hidden_states.shape)
            raise ValueError(f"hidden_states must have shape [B, T, {self.hidden_size}], got {came}")
        if use_cache and past_key_values is None:
            past_key_values = DeltaCache()
        last = self._cached(past_key_values)
        batch, total = hidden_states.shape[:2]
        x, places = hidden_states, None
        if attention_mask is not None and cu_seqlens is None:
            x, places, cu_seqlens = _without_padding(hidden_states, attention_mask)
        keep = bool(use_cache)
        before, state = (last["conv_state"], last["recurrent_state"]) if last else (None, None)
        options = {"initial_state": state, "output_final_state": keep, "cu_seqlens": cu_seqlens}
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        conv_before = before
        rollback = past_key_values.rollback if past_key_values is not None and keep else 0
        if rollback:
            if cu_seqlens is None and total:
                options["output_states"] = min(total, rollback + 1)
            if before is not None:
                before = tuple(x.clone() for x in before)
        elif past_key_values is not None and last is not None and keep and not torch.is_grad_enabled():
            new = past_key_values.spare(self.layer_idx)
            if total == 1 and places is None and cu_seqlens is None:
                o = self._decoded(x, projected, last, new)
                if o is not None:
                    done = (self.o_proj(o), None, past_key_values)
                    kept = tuple(new[1:])
                    # In one line: nothing may go wrong between the cache's move and the return.
                    return (done, past_key_values.update(self.layer_idx, new[0], kept, total))[0]
            options["out_state"], *spare = new
            if before is not None and cu_seqlens is None:  # the convolutions write where they read
                before = tuple(new.copy_(old) for new, old in zip(spare, before, strict=True))
        q, k, v, conv_states = self._q_k_v(projected, before, keep, cu_seqlens)
        q, k = self._activate(q, k)
        o, state, *after = self._attend(x, q, k, v, options)
        earlier = None
        if after:
            every = after[0].unbind(1)
            earlier = list(zip(every, self._conv_states(projected, conv_before, len(every)), strict=True))[:-1]
        o = self.o_proj(self._norm(o, x).flatten(-2))
        if places is not None:
            o = o.new_zeros(batch * total, o.shape[2]).index_copy(0, places, o[0]).unflatten(0, (batch, total))
        done = (o, None, past_key_values)
        if past_key_values is None or state is None or self.layer_idx is None:
            return done
        # In one line: nothing may go wrong between the cache's move and the return.
        return (done, past_key_values.update(self.layer_idx, state, conv_states, total, earlier))[0]


def _without_padding(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tokens that count, packed [1, sum of lengths, hidden], where they were [sum], and their borders [B + 1]."""
    check_is_tensor("attention_mask", mask)
    batch, total = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < total:
        raise ValueError(
            f"attention_mask must have shape [B, S] = [{batch}, S] with S of at least T = {total}, "
            f"got {list(mask.shape)}"
        )
    counts = mask[:, mask.shape[1] - total :] != 0
    if counts.all():
        return x, None, None
    places = counts.flatten().nonzero().flatten()
    borders = functional.pad(counts.sum(1).cumsum(0), (1, 0))
    return x.flatten(0, 1)[None, places], places, borders


class DeltaNet(_DeltaLayer):
    """The plain delta rule as a layer: Yang et al. 2024, arXiv 2406.06484; the layer of flash-linear-attention 0.6.

    Args:
        mode: ``"chunk"`` (default) or ``"fused_recurrent"``; accepted for compatibility, both compute the same.
        d_model: if given, stands for hidden_size.
        hidden_size: width of input and output. Default 1024.
        expand_k, expand_v: width of all keys and of all values over hidden_size. Default 1.
        num_heads: default 4.
        use_beta: learned step sizes; default yes, else they are 1.
        use_gate: an output gate; default no.
        use_short_conv: convolutions of q, k and v before the rule; default yes, and the quality depends on them.
        conv_size: their width W, default 4. conv_bias: default no.
        allow_neg_eigval: step sizes up to 2; default no.
        layer_idx: number of the layer in a cache; only needed with one.
        qk_activation: ``"silu"`` (default), ``"relu"``, ``"elu"`` (plus one) or ``"identity"``.
        qk_norm: ``"l2"`` (default) or ``"sum"`` (by the sum of absolute values).
        norm_eps: of the output's normalisation, default 1e-5.
        Other keyword arguments are accepted and ignored, as there.

    Call: ``layer(hidden_states, attention_mask=None, past_key_values=None, use_cache=False, cu_seqlens=None)``

        hidden_states: [B, T, hidden_size].
        attention_mask: [B, S], 0 for padding, on either side; its last T columns are these tokens. Padding
            does not reach the state, and its output is 0.
        past_key_values: a :class:`DeltaCache`, read, and with ``use_cache`` also written; default none, or with
            ``use_cache`` a new one.
        cu_seqlens: [N + 1], with B = 1: packed sequences. It takes precedence over attention_mask.
        output_attentions is accepted; there are no attention weights.

    Returns (output [B, T, hidden_size], None, past_key_values).

    Raises:
        ValueError, TypeError: if sizes do not fit, or an argument is none of those named.

    Example:
        >>> o, *_ = pyrepr.nn.DeltaNet(hidden_size=32, num_heads=2)(torch.randn(2, 10, 32))
        >>> o.shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        mode: str = "chunk",
        d_model: int | None = None,
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_heads: int = 4,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        allow_neg_eigval: bool = False,
        layer_idx: int | None = None,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        hidden_size = hidden_size if d_model is None else d_model
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, conv_size=conv_size)
        if qk_activation not in ("silu", "relu", "elu", "identity"):
            raise ValueError(f"qk_activation must be silu, relu, elu or identity, got {shown(qk_activation)}")
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f"qk_norm must be l2 or sum, got {shown(qk_norm)}")
        widths = []
        for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
            whole = _whole(f"hidden_size · {name}", hidden_size, expand)
            if whole % num_heads:
                raise ValueError(f"hidden_size · {name} must be a multiple of num_heads = {num_heads}, got {whole}")
            widths.append(whole // num_heads)
        self._set_sizes(hidden_size, num_heads, num_heads, widths[0], widths[1], mode)
        self.qk_activation, self.qk_norm, self.layer_idx = qk_activation, qk_norm, layer_idx
        self.use_beta, self.use_gate, self.use_short_conv = use_beta, use_gate, use_short_conv
        self.allow_neg_eigval = allow_neg_eigval
        self._make_projections()
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        if use_short_conv:
            self._make_convolutions(conv_size, conv_bias, "silu" if qk_activation == "silu" else None)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _without_convolution(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qk_activation == "silu":
            q, k = functional.silu(q), functional.silu(k)
        return q, k, functional.silu(v)

    def _activate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.qk_activation == "relu":
            q, k = q.relu(), k.relu()
        elif self.qk_activation == "elu":
            q, k = functional.elu(q) + 1, functional.elu(k) + 1
        if self.qk_norm == "sum":
            q, k = (functional.normalize(y, p=1, dim=-1, eps=1e-6) for y in (q, k))
        return q, k

    def _attend(self, x, q, k, v, options):
        rule = self._function(options, "delta_rule")
        options["use_qk_l2norm_in_kernel"] = self.qk_norm == "l2"
        if not self.use_beta:
            beta = x.new_full((*x.shape[:2], self.num_heads), 2 if self.allow_neg_eigval else 1)
            return rule(q, k, v, beta=beta, **options)
        return rule(q, k, v, beta=self.b_proj(x), **self._sigmoid(), **options)

    def _gate(self, x: Tensor) -> Tensor | None:
        return super()._gate(x) if self.use_gate else None


class GatedDeltaNet(_DeltaLayer):
    """The gated delta rule as a layer: Yang et al. 2025, arXiv 2412.06464; the layer of flash-linear-attention 0.6.

    The decay of a head's state is g = −exp(A_log) · softplus(a_proj(x) + dt_bias), computed in float32
    (float64 for float64 inputs).

    Args:
        hidden_size: width of input and output. Default 2048.
        expand_v: width of a value head over head_dim. Default 2.
        head_dim: width of a query and key head. Default 256. num_heads: of them, default 6.
        num_v_heads: value heads, a multiple of num_heads. Default as many.
        mode: see :class:`DeltaNet`.
        use_gate: an output gate; default yes.
        output_gate_activation: of that, ``"swish"`` (default), ``"silu"`` (the same) or ``"sigmoid"``.
        use_short_conv, allow_neg_eigval, conv_size, conv_bias, layer_idx, norm_eps: see :class:`DeltaNet`.

    Call, result and errors are those of :class:`DeltaNet`.

    Example:
        >>> o, *_ = pyrepr.nn.GatedDeltaNet(hidden_size=32, head_dim=8, num_heads=2)(torch.randn(2, 10, 32))
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
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, num_v_heads=num_v_heads)
        check_sizes(conv_size=conv_size)
        if output_gate_activation not in ("swish", "silu", "sigmoid"):
            raise ValueError(
                f"output_gate_activation must be swish, silu or sigmoid, got {shown(output_gate_activation)}"
            )
        value_width = _whole("head_dim · expand_v", head_dim, expand_v)
        self._set_sizes(hidden_size, num_heads, num_v_heads or num_heads, head_dim, value_width, mode)
        self.use_gate, self.use_short_conv, self.layer_idx = use_gate, use_short_conv, layer_idx
        self.allow_neg_eigval = allow_neg_eigval
        self._make_projections()
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads).uniform_(0, 16).log())
        self.dt_bias = nn.Parameter(_time_steps(self.num_v_heads))
        if use_short_conv:
            self._make_convolutions(conv_size, conv_bias)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_norm = FusedRMSNormGated(self.head_v_dim, eps=norm_eps, activation=output_gate_activation)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _attend(self, x, q, k, v, options):
        rule = self._function(options, "gated_delta_rule")
        options |= {"use_gate_in_kernel": True, "A_log": self.A_log, "dt_bias": self.dt_bias}
        options |= self._sigmoid() | {"use_qk_l2norm_in_kernel": True}
        return rule(q, k, v, g=self.a_proj(x), beta=self.b_proj(x), **options)

    def _gate(self, x: Tensor) -> Tensor | None:
        return super()._gate(x) if self.use_gate else None

    def _decoded(
        self, x: Tensor, projected: tuple[Tensor, ...], last: dict[str, Any], new: list[Tensor]
    ) -> Tensor | None:
        if not self.use_short_conv or not may_decode(x):
            return None
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        own = all(type(c) is ShortConvolution for c in convolutions) and type(self.o_norm) is FusedRMSNormGated
        silu = own and all(c.activation in ("silu", "swish") for c in convolutions)
        if not silu or not all(map(is_bare, (*convolutions, self.o_norm))):
            return None
        biased = convolutions[0].bias is not None
        return decode(
            projected,
            last["conv_state"],
            tuple(c.weight for c in convolutions),
            tuple(c.bias for c in convolutions) if biased else None,
            tuple(new[1:]),
            self.a_proj(x),
            self.b_proj(x),
            self.A_log,
            self.dt_bias,
            last["recurrent_state"],
            self.o_norm.weight,
            self._gate(x),
            self.o_norm.activation != "sigmoid",
            self.o_norm.eps,
            self.allow_neg_eigval,
            new[0],
            None,
        )


class KimiDeltaAttention(_DeltaLayer):
    """Kimi Delta Attention as a layer: Kimi Team 2025, arXiv 2510.26692; the layer of flash-linear-attention 0.6.

    Every key channel has its own decay, g = −exp(A_log) · softplus(f_proj(x) + dt_bias), or with a lower_bound
    lower_bound · sigmoid(exp(A_log) · (f_proj(x) + dt_bias)), computed in float32 (float64 for float64 inputs).

    Args:
        hidden_size: width of input and output. Default 2048.
        expand_v: width of a value head over head_dim. Default 1.
        head_dim: width of a query and key head, default 128. num_heads: of them, default 16.
        num_v_heads: value heads, a multiple of num_heads. Default as many.
        mode: see :class:`DeltaNet`.
        safe_gate: A_log starts at 0; needs a lower_bound. Default no.
        lower_bound: negative, the least g; default none.
        use_short_conv, allow_neg_eigval, conv_size, conv_bias, layer_idx, norm_eps: see :class:`DeltaNet`.

    Call, result and errors are those of :class:`DeltaNet`.

    Example:
        >>> o, *_ = pyrepr.nn.KimiDeltaAttention(hidden_size=32, head_dim=8, num_heads=2)(torch.randn(2, 10, 32))
        >>> o.shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads, num_v_heads=num_v_heads)
        check_sizes(conv_size=conv_size)
        if lower_bound is not None and lower_bound >= 0:
            raise ValueError(f"lower_bound must be negative, got {lower_bound}")
        if safe_gate and lower_bound is None:
            raise ValueError("safe_gate needs a lower_bound, got None")
        value_width = _whole("head_dim · expand_v", head_dim, expand_v)
        self._set_sizes(hidden_size, num_heads, num_v_heads or num_heads, head_dim, value_width, mode)
        self.use_short_conv, self.layer_idx = use_short_conv, layer_idx
        self.allow_neg_eigval, self.safe_gate, self.lower_bound = allow_neg_eigval, safe_gate, lower_bound
        self._make_projections()
        if use_short_conv:
            self._make_convolutions(conv_size, conv_bias)
        gate_dim = self.num_v_heads * head_dim
        self.f_proj = nn.Sequential(
            nn.Linear(hidden_size, value_width, bias=False), nn.Linear(value_width, gate_dim, bias=False)
        )
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        rates = torch.ones(self.num_v_heads) if safe_gate else torch.empty(self.num_v_heads).uniform_(1, 16)
        self.A_log = nn.Parameter(rates.log())
        self.dt_bias = nn.Parameter(_time_steps(gate_dim))
        self.g_proj = nn.Sequential(
            nn.Linear(hidden_size, value_width, bias=False), nn.Linear(value_width, self.value_dim)
        )
        self.o_norm = FusedRMSNormGated(value_width, eps=norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _attend(self, x, q, k, v, options):
        rule = self._function(options, "kda")
        options |= {"use_gate_in_kernel": True, "A_log": self.A_log, "dt_bias": self.dt_bias}
        options |= self._sigmoid() | {"use_qk_l2norm_in_kernel": True, "lower_bound": self.lower_bound}
        g = self.f_proj(x).unflatten(-1, (self.num_v_heads, self.head_k_dim))
        return rule(q, k, v, g=g, beta=self.b_proj(x), **options)
