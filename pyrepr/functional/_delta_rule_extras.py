"""The less common arguments of the delta rule: gates and step sizes before their activation, states that stand in a
pool, in another layout or are asked for token by token, and gates and step sizes per value channel.

All of it is differentiable PyTorch around :func:`pyrepr.functional._delta_rule.run`, here and nowhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_device, check_shape, check_tensor, check_written, shape_of, shown
from pyrepr.functional import _delta_rule_states as states
from pyrepr.functional._delta_rule import check_inputs, check_state, check_undifferentiated, run
from pyrepr.ops._leaf import at_hand
from pyrepr.ops.delta_rule import states_after, step
from pyrepr.reference import delta_rule as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import Gate, sequence_bounds

CHUNK_SIZES = (16, 32, 64)  # those of flash-linear-attention
SAFE_BOUND = -5.0  # the same for safe_gate


class Extras(NamedTuple):
    """What flash-linear-attention's layers pass beside the tensors, and what serving needs."""

    use_gate_in_kernel: bool = False
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    lower_bound: float | None = None
    safe_gate: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    allow_neg_eigval: bool = False
    state_v_first: bool = False
    gk: Tensor | None = None
    gv: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    chunk_size: int | None = None
    state_indices: Tensor | None = None
    output_states: str | int | None = None

    def activations(self) -> tuple | None:
        """What a native call takes, where there is nothing else but ``output_states``."""
        gates = map(bool, (self.use_gate_in_kernel, self.use_beta_sigmoid_in_kernel, self.allow_neg_eigval))
        alone = all(x is None or x is False for x in self[7:-1])
        return (self.A_log, self.dt_bias, self.lower_bound, *gates) if alone else None


_NONE = Extras()


def extras(beta: Any, **given: Any) -> Extras | None:
    """What was given, or ``None`` where that is nothing: most calls."""
    if beta is None:
        check_tensor("beta", beta)  # to `call` it would mean that nothing is erased
    more = Extras(**given)
    return None if more == _NONE and getattr(beta, "ndim", 0) < 4 else more


def without_erase(**given: Any) -> Extras | None:
    """The same for a rule without an erase, whose beta is ``None``."""
    more = Extras(**given)
    return None if more == _NONE else more


def check_alone(cp_context: object, return_intermediate_states: bool = False) -> None:
    """Refuses what is not here."""
    if cp_context is not None:
        raise ValueError(f"cp_context must be None, sequences are not split over processes, got {shown(cp_context)}")
    if return_intermediate_states:
        raise ValueError("return_intermediate_states must be False, output_states returns states, got True")


def or_ones(beta: Any, v: Any, use_beta_sigmoid: bool) -> Any:
    """β, which is 1 where it is not given."""
    if beta is None and use_beta_sigmoid:
        raise ValueError("beta must be given with use_beta_sigmoid_in_kernel=True, got None")
    if beta is not None:
        return beta
    v = check_tensor("v", v)
    return v.new_ones(v.shape[:3], dtype=compute_dtype(v.dtype))


def call(
    more: Extras | None,
    q,
    k,
    v,
    g,
    beta,
    scale,
    initial_state,
    output_final_state,
    l2norm,
    cu_seqlens,
    gate,
    out_state=None,
) -> Any:
    """o and the final state, and with ``output_states`` these. Without beta nothing is erased."""
    if more is None:
        return run(q, k, v, g, beta, scale, initial_state, output_final_state, l2norm, cu_seqlens, gate, out_state)
    activations = more.activations() if cu_seqlens is None else None
    if activations is not None:
        check_options(more, cu_seqlens)
    if activations is not None and more.output_states is None:
        given = (q, k, v, g, beta, scale, initial_state, out_state, bool(l2norm), gate, activations)
        asked = output_final_state or out_state is not None
        # In one line: nothing may go wrong between the state's move and the return.
        if (done := step(*given)) is not None: return done if asked else (done[0], None)  # noqa: E701 # fmt: skip
    if activations is not None and more.output_states is not None and out_state is None:
        count = states.native_count(more.output_states)
        if count and (
            done := states_after(q, k, v, g, beta, scale, initial_state, count, bool(l2norm), gate, activations)
        ):
            o, every = done
            return o, every[-1].clone() if output_final_state else None, every.transpose(0, 1)
    g, gate, g_name = _decay_of(more, g, gate)
    shape = check_inputs(q, k, v, g, beta, cu_seqlens, gate, g_name)
    check_options(more, cu_seqlens)
    g, beta = activated(more, v, g, beta, gate)
    by_value = more.gv is not None or (beta is not None and beta.dim() == 4)
    if more.gv is not None:
        check_device("gv", check_tensor("gv", more.gv), "v", v)
        check_shape("gv", more.gv, "[B, T, HV, V]", tuple(v.shape))
    given = (q, k, v, g, beta, scale, initial_state, output_final_state, l2norm, cu_seqlens, gate)
    here = not more.state_v_first and more.state_indices is None and more.output_states is None
    if not here or by_value:
        return _with_states(more, shape, *given, out_state)
    return run(*given, out_state)


# Gates and step sizes


def _decay_of(more: Extras, g: Any, gate: Gate) -> tuple[Any, Gate, str]:
    """The decay that is given, what kind it is of, and its name."""
    if more.gk is None:
        return g, gate, "g"
    if g is not None:
        raise ValueError("g and gk both say how the state decays; give one of them")
    if more.use_gate_in_kernel:
        raise ValueError("gk is the decay itself, so use_gate_in_kernel must be False with it; it takes g")
    return more.gk, Gate.PER_KEY, "gk"


def check_options(more: Extras, cu_seqlens: Tensor | None) -> None:
    bound = more.lower_bound
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound < 0):
        raise ValueError(f"lower_bound must be a negative number or None, got {shown(bound)}")
    if not more.use_gate_in_kernel:
        given = [name for name in ("A_log", "dt_bias") if getattr(more, name) is not None]
        given += ["lower_bound"] if bound is not None and not more.safe_gate else []
        if given:
            raise ValueError(f"{given[0]} is part of the gate, so it needs use_gate_in_kernel=True, got False")
    elif more.A_log is None and bound is None:
        raise ValueError("A_log must be given with use_gate_in_kernel=True, got None")
    elif more.safe_gate and (bound is None or bound < SAFE_BOUND):
        raise ValueError(f"safe_gate needs a lower_bound from {SAFE_BOUND:g} to below 0, got {shown(bound)}")
    if more.allow_neg_eigval and not more.use_beta_sigmoid_in_kernel:
        raise ValueError("allow_neg_eigval doubles the sigmoid, so it needs use_beta_sigmoid_in_kernel=True, got False")
    if more.chunk_size is not None and more.chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size must be one of {', '.join(map(str, CHUNK_SIZES))}, got {shown(more.chunk_size)}")
    if more.cu_seqlens_cpu is not None:
        _check_copy(more.cu_seqlens_cpu, cu_seqlens)


def _check_copy(copy: Any, cu_seqlens: Tensor | None) -> None:
    copy = check_tensor("cu_seqlens_cpu", copy, INTEGERS)
    if cu_seqlens is None:
        raise ValueError("cu_seqlens_cpu is a copy of cu_seqlens, which must be given with it, got None")
    if not copy.is_cpu:
        raise ValueError(f"cu_seqlens_cpu must be on the CPU, got {copy.device}")
    check_shape("cu_seqlens_cpu", copy, "[N + 1] of cu_seqlens", tuple(cu_seqlens.shape))
    if at_hand(cu_seqlens) and at_hand(copy) and not (copy == cu_seqlens).all():
        raise ValueError("cu_seqlens_cpu must hold the numbers of cu_seqlens, got others")


def activated(more: Extras, v: Tensor, g: Any, beta: Tensor, gate: Gate) -> tuple[Any, Tensor]:
    """g and β as the rule takes them, in float32 (float64 for float64 inputs)."""
    dtype = compute_dtype(v.dtype)
    if more.use_gate_in_kernel:
        if gate == Gate.NONE:
            raise ValueError("g, the gate before its activation, must be given with use_gate_in_kernel=True, got None")
        heads, token = g.shape[2], g.shape[2:].numel()
        for name, x, count in (("A_log", more.A_log, heads), ("dt_bias", more.dt_bias, token)):
            if x is not None:
                check_device(name, check_tensor(name, x), "v", v)
                if x.numel() != count:
                    symbols = "[HV]" if name == "A_log" or gate == Gate.PER_HEAD else "[HV · K]"
                    raise ValueError(f"{name} must have shape {symbols} = [{count}], got {shape_of(x)}")
        g = reference.decay(g, more.A_log, more.dt_bias, more.lower_bound, dtype)
    if more.use_beta_sigmoid_in_kernel:
        beta = reference.step_sizes(beta, more.allow_neg_eigval, dtype)
    return g, beta


def _by_value_channel(v: Tensor, g: Tensor | None, beta: Tensor | None, gv: Tensor | None) -> tuple[Any, ...]:
    """v, g and β with every value channel as a head of its own: columns of the state have nothing else in common."""
    wide = tuple(v.shape)
    if g is not None:
        g = g[..., None] if g.dim() == 3 else g[:, :, :, None]  # [B, T, HV, 1] or [B, T, HV, 1, K]
    if gv is not None:
        if g is None:
            g = gv
        else:
            dtype = torch.promote_types(g.dtype, gv.dtype)
            g = g.to(dtype) + (gv[..., None] if g.dim() == 5 else gv).to(dtype)
    if g is not None:
        g = g.expand(*wide, *g.shape[4:]).flatten(2, 3)
    if beta is not None:
        beta = (beta if beta.dim() == 4 else beta[..., None]).expand(wide).flatten(2, 3)
    return v.flatten(2, 3)[..., None], g, beta


# States


def _with_states(
    more: Extras, shape, q, k, v, g, beta, scale, initial, output_final, l2norm, cu_seqlens, gate, out_state
) -> Any:
    """A call whose states stand in a pool, have another layout, or are asked for token by token."""
    pooled, values = more.state_indices is not None, v
    by_value = more.gv is not None or (beta is not None and beta.dim() == 4)
    layout = states.Layout(more.state_v_first, by_value, shape[3])
    wanted = (states.pool_size(initial) if pooled else shape[0], shape[1], *shape[2:][:: -1 if layout.v_first else 1])
    symbols = f"[{'P' if pooled else 'N'}, HV, {'V, K' if layout.v_first else 'K, V'}]"
    for name, state in (("initial_state", initial), ("out_state", out_state)):
        if state is not None:
            check_state(name, state, v, wanted, symbols)
    name, target = ("initial_state", initial) if pooled and out_state is None else ("out_state", out_state)
    if target is not None:
        check_written(name, target)
        check_undifferentiated(name, q, k, v, g, beta, more.gv, initial, out_state)
    count = states.count_of(more.output_states, v, shape)
    slots = states.Slots(more.state_indices, shape[0], initial) if pooled else None
    if slots is not None and slots.empty:
        o, every = states.nothing(v, shape, count, layout)
        return (o, target) if every is None else (o, target, every)
    first = initial if slots is None else initial.index_select(0, slots.index)
    if by_value:
        v, g, beta = _by_value_channel(v, g, beta, more.gv)
        gate = Gate.NONE if g is None else Gate.PER_KEY if g.dim() == 4 else Gate.PER_HEAD
    if count is None:
        o, last = run(q, k, v, g, beta, scale, layout.load(first), True, l2norm, cu_seqlens, gate)
        every = None
    else:
        rest = (scale, l2norm, gate)
        edges = _edges(v, cu_seqlens if more.cu_seqlens_cpu is None else more.cu_seqlens_cpu)
        o, last, every = states.token_by_token((q, k, v, g, beta), layout.load(first), edges, count, rest)
        every = layout.store(every)
    o, last = o.reshape(values.shape), layout.store(last)
    if slots is not None:
        o, every = slots.without_skipped(o, every, cu_seqlens)
        last = slots.kept(last, first)
    asked = () if every is None else (every,)
    if target is None:
        return (o, last if output_final else None, *asked)
    # In one line: nothing may go wrong between the state's move and the return.
    return (o, target.copy_(last) if slots is None else target.index_copy_(0, slots.index, last), *asked)


def _edges(v: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Where sequences start and end, counting tokens through the batch."""
    batch, total = v.shape[:2]
    return [i * total for i in range(batch + 1)] if cu_seqlens is None else sequence_bounds(cu_seqlens, total)
