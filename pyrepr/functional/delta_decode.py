"""What a layer of the gated delta rule computes for one token between its projections, in one native call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import check_device, check_shape, check_tensor, check_written, shape_of, shown
from pyrepr.functional._delta_rule import check_undifferentiated
from pyrepr.functional.causal_conv1d import causal_conv1d_update
from pyrepr.functional.delta_rule import fused_recurrent_gated_delta_rule
from pyrepr.functional.norm import ACTIVATIONS, rms_norm_gated
from pyrepr.ops.delta_rule import decode

Parts = Tensor | tuple[Tensor, Tensor, Tensor]


def gated_delta_decode(
    x: Parts,  # [B, D], D = 2 H K + HV V; or [B, H K], [B, H K], [B, HV V]
    g: Tensor,  # [B, HV]
    beta: Tensor,  # [B, HV]
    conv_state: Parts,  # [P, D, S]
    initial_state: Tensor,  # [P, HV, K, V]
    weight: Parts,  # [D, W]
    A_log: Tensor,  # [HV]
    dt_bias: Tensor,  # [HV]
    norm_weight: Tensor | None = None,  # [V]
    gate: Tensor | None = None,  # [B, HV V]
    bias: Parts | None = None,  # [D]
    activation: str = "swish",
    eps: float = 1e-5,
    *,
    allow_neg_eigval: bool = False,
    out_conv_state: Parts | None = None,  # [P, D, S]
    out_state: Tensor | None = None,  # [P, HV, K, V]
    state_indices: Tensor | None = None,  # [B]
) -> Tensor:  # [B, HV V]
    """A token of a layer of the gated delta rule (Yang et al. 2025), from its projections to the one of the output.

        q, k, v = SiLU(convolution of x), q and k normalised;   decay −exp(A_log) · softplus(g + dt_bias);
        step size sigmoid(beta);   one token of the rule;   RMSNorm, times the activation of a gate

    That is :func:`pyrepr.causal_conv1d_update`, :func:`pyrepr.fused_recurrent_gated_delta_rule` with its options
    ``use_gate_in_kernel``, ``use_beta_sigmoid_in_kernel`` and ``use_qk_l2norm_in_kernel``, and
    :func:`pyrepr.functional.rms_norm_gated`, and has their bits. On a CPU it is one native call for x of float32 or
    bfloat16, filters of the same dtype or float32, everything dense, and no dispatch mode, compiler or forced backend
    watching; other calls are those three one after the other, on copies of the states.

    Args:
        x: [B, D], or [B, 1, D], whose last axis holds q, k and v, D = 2·H·K + HV·V: what a layer with one convolution
            projects. Or a tuple of q, k and v with three; then conv_state, weight, bias and out_conv_state are tuples
            too.
        g, beta: [B, HV] or [B, 1, HV], before their activations.
        conv_state: [P, D, S], S ≥ W − 1, in x's dtype, moved on in place.
        initial_state: [P, HV, K, V] in float32 (float64 for float64 inputs), moved on in place.
        weight: [D, W] or [D, 1, W]. bias: [D]; default none.
        A_log, dt_bias: [HV].
        norm_weight: [V]; default none. eps: of the norm, default 1e-5.
        gate: [B, HV·V] or [B, HV, V], or with an axis of 1 after B; default none.
        activation: of the gate: ``"swish"`` (default), ``"silu"``, the same, or ``"sigmoid"``.
        allow_neg_eigval: step sizes are twice the sigmoid; default no.
        out_conv_state, out_state: if given, the states after the token are written there, and those before stay.
        state_indices: [B] int32 or int64. If given, the states are pools, and row i of x has row state_indices[i] of
            each, a different one for each i; one with −1 is skipped: its output is 0 and nothing is written. Default:
            P = B, row i.

    Returns:
        [B, HV·V], or [B, 1, HV·V] for such an x, in its dtype. Not differentiable.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range; then no state has moved.
        RuntimeError: if an input requires a gradient and gradients are enabled.

    Example:
        >>> x, g, beta = torch.randn(1, 2 * 16 + 2 * 16), torch.randn(1, 2), torch.randn(1, 2)
        >>> conv_state, state = torch.zeros(1, 64, 3), torch.zeros(1, 2, 16, 16)
        >>> o = pyrepr.functional.gated_delta_decode(
        ...     x, g, beta, conv_state, state, torch.randn(64, 4), torch.zeros(2), torch.zeros(2), torch.ones(16)
        ... )
        >>> o.shape
        torch.Size([1, 32])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}")
    if type(eps) not in (float, int) or not eps >= 0:
        raise ValueError(f"eps must be a number of at least 0, got {shown(eps)}")
    parts = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias, "out_conv_state": out_conv_state}
    tuples = {name: _tuple(name, part, x) for name, part in parts.items()}
    sigmoid = activation == "sigmoid"
    rest = (norm_weight, gate, not sigmoid, float(eps), bool(allow_neg_eigval), out_state, state_indices)
    # In one line: nothing may go wrong between the states' move and the return.
    return o if (o := decode(*tuples.values(), g, beta, A_log, dt_bias, initial_state, *rest)) is not None else _apart(
        *tuples.values(), g, beta, A_log, dt_bias, initial_state, norm_weight, gate, activation, eps, allow_neg_eigval,
        out_state, state_indices,
    )  # fmt: skip


def _tuple(name: str, part: Any, x: Any) -> tuple | None:
    """An argument as a tuple of as many as x is."""
    if part is None and name in ("bias", "out_conv_state"):
        return None
    several = isinstance(x, (tuple, list))
    if several != isinstance(part, (tuple, list)) or (several and (len(x), len(part)) != (3, 3)):
        raise ValueError(
            f"{name} must be {'a tuple of three, for q, k and v' if several else 'one tensor, as x is'}, "
            f"got {f'{len(part)} of them' if isinstance(part, (tuple, list)) else 'one'}"
        )
    return tuple(part) if several else (part,)


def _check(x, states, weights, new_states, g, beta, state, norm_weight, gate, out_state, state_indices) -> tuple:
    """Rows, H K and the shape of a state's row; everything that the calls one after the other do not say themselves."""
    for name, tensors in (("x", x), ("conv_state", states), ("weight", weights)):
        for tensor in tensors:
            check_device(name, check_tensor(name, tensor), "x", x[0])
    check_tensor("initial_state", state)
    rows, dims = x[0].shape[0] if x[0].dim() else 0, x[0].dim()
    if dims not in (2, 3) or any(y.shape[:-1] != x[0].shape[:-1] for y in x) or (dims == 3 and x[0].shape[1] != 1):
        raise ValueError(f"x must have shape [B, D] or [B, 1, D], got {', '.join(map(shape_of, x))}")
    if state.dim() != 4:
        raise ValueError(f"initial_state must have shape [P, HV, K, V], got {shape_of(state)}")
    heads, width, value_width = state.shape[1:]
    keys, odd = divmod(sum(y.shape[-1] for y in x) - heads * value_width, 2)
    if odd or keys <= 0 or keys % max(1, width) or heads % (keys // max(1, width)):
        raise ValueError(
            f"x must have D = 2 H K + HV V channels with HV = {heads}, K = {width} and V = {value_width} of "
            f"initial_state, and HV a multiple of H, got {', '.join(map(shape_of, x))}"
        )
    wanted = (keys, keys, heads * value_width) if len(x) == 3 else (2 * keys + heads * value_width,)
    for y, channels in zip(x, wanted, strict=True):
        check_shape("x", y, "[B, D] or [B, 1, D]", (*x[0].shape[:-1], channels))
    for name, y in (("g", g), ("beta", beta)):
        check_device(name, check_tensor(name, y), "x", x[0])
        if y.shape not in ((rows, heads), (rows, 1, heads)):
            raise ValueError(
                f"{name} must have shape [B, HV] or [B, 1, HV], B = {rows}, HV = {heads}, got {shape_of(y)}"
            )
    if norm_weight is not None:
        check_device("norm_weight", check_tensor("norm_weight", norm_weight), "x", x[0])
        check_shape("norm_weight", norm_weight, "[V]", (value_width,))
    if gate is not None:
        check_device("gate", check_tensor("gate", gate), "x", x[0])
        if tuple(gate.shape) not in [
            (rows, *one, *last) for one in ((), (1,)) for last in ((heads, value_width), (heads * value_width,))
        ]:
            raise ValueError(
                f"gate must have shape [B, HV V] or [B, HV, V], B = {rows}, HV = {heads}, V = {value_width}, "
                f"got {shape_of(gate)}"
            )
    for target, own in zip(new_states or (), states, strict=bool(new_states)):
        check_device("out_conv_state", check_tensor("out_conv_state", target, (own.dtype,)), "x", x[0])
        check_shape("out_conv_state", target, "[P, D, S] of conv_state", tuple(own.shape))
        check_written("out_conv_state", target)
    for y in states:
        check_written("conv_state", y)
        if state_indices is not None and y.dim() and y.shape[0] != state.shape[0]:
            raise ValueError(f"conv_state must have the P = {state.shape[0]} rows of initial_state, got {shape_of(y)}")
    for name, y in (("initial_state", state), ("out_state", out_state)):
        if y is not None:
            check_device(name, check_tensor(name, y), "x", x[0])
            check_shape(name, y, "[P, HV, K, V]", tuple(state.shape))
            check_written(name, y)
    return rows, keys, heads, width, value_width


def _apart(
    x, states, weights, biases, new_states, g, beta, A_log, dt_bias, state, norm_weight, gate, activation, eps,
    allow_neg_eigval, out_state, state_indices,
) -> Tensor:  # fmt: skip
    """The same by the functions there are for each part, on copies of the states, which are written last."""
    check_tensor("A_log", A_log), check_tensor("dt_bias", dt_bias)
    for bias in biases or ():
        check_tensor("bias", bias)
    given = (x, states, weights, new_states, g, beta, state, norm_weight, gate, out_state, state_indices)
    rows, keys, heads, width, value_width = _check(*given)
    inputs = (*x, g, beta, *states, state, *weights, *(biases or ()), A_log, dt_bias, norm_weight, gate, out_state)
    check_undifferentiated("initial_state", *inputs, *(new_states or ()))
    targets, target = new_states or states, state if out_state is None else out_state
    moved = [_moved(own, to, state_indices) for own, to in zip(states, targets, strict=True)]
    y = torch.cat(
        [
            causal_conv1d_update(
                part.reshape(rows, part.shape[-1]),
                own,
                weight.squeeze(1) if weight.dim() == 3 else weight,
                bias,
                "silu",
                conv_state_indices=state_indices,
            )
            for part, own, weight, bias in zip(x, moved, weights, biases or (None,) * len(x), strict=True)
        ],
        -1,
    )
    q, k, v = y[:, None].split([keys, keys, heads * value_width], -1)
    after = target.clone()
    o, _ = fused_recurrent_gated_delta_rule(
        q.unflatten(-1, (-1, width)),
        k.unflatten(-1, (-1, width)),
        v.unflatten(-1, (heads, value_width)),
        g=g.reshape(rows, 1, heads),
        beta=beta.reshape(rows, 1, heads),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=allow_neg_eigval,
        out_state=after,
        state_indices=state_indices,
    )
    gate = None if gate is None else gate.reshape(o.shape)
    o = rms_norm_gated(o, gate, norm_weight, None, activation, eps=eps).reshape(*x[0].shape[:-1], -1)
    if state_indices is not None:
        o = o.masked_fill((state_indices < 0).view(-1, *(1,) * (o.dim() - 1)), 0)
    # In one line: nothing may go wrong between the states' move and the return.
    return (o, target.copy_(after), *(to.copy_(own) for to, own in zip(targets, moved, strict=True)))[0]


def _moved(own: Tensor, to: Tensor, state_indices: Tensor | None) -> Tensor:
    """The convolution's state for an update: `to` with the rows to be read from `own`."""
    if to is own or state_indices is None:
        return own.clone()
    rows = state_indices[state_indices >= 0].long()
    return to.index_copy(0, rows, own.index_select(0, rows))
