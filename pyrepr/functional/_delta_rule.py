"""What the functions of the delta rule share: their checks, and the ways to the op."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr._checks import (
    check_cu_seqlens,
    check_device,
    check_shape,
    check_tensor,
    check_written,
    name_of,
    shape_of,
)
from pyrepr.ops.delta_rule import delta_rule, step, update_op_
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import Gate


def check_inputs(q, k, v, g, beta, cu_seqlens, gate: Gate, g_name: str = "g") -> tuple[int, int, int, int]:
    """The shape of the state. One sentence per failure: the argument, what is expected, what came."""
    given = [("q", q), ("k", k), ("v", v)]
    given += [] if beta is None else [("beta", beta)]
    given += [] if gate == Gate.NONE else [(g_name, g)]
    for name, x in given:
        check_tensor(name, x)
        check_device(name, x, "q", q)
    shape = q.shape
    if len(shape) != 4:
        raise ValueError(f"q must have shape [B, T, H, K], got {shape_of(q)}")
    batch, total, heads, width = shape
    if width == 0:
        raise ValueError("q must have K of at least 1, got 0")
    check_shape("k", k, "[B, T, H, K]", shape)
    values = v.shape
    if len(values) != 4 or values[:2] != shape[:2]:
        raise ValueError(f"v must have shape [B, T, HV, V] with B = {batch} and T = {total} of q, got {shape_of(v)}")
    value_heads, value_width = values[2:]
    if value_width == 0:
        raise ValueError("v must have V of at least 1, got 0")
    if heads == 0 or value_heads % heads:
        raise ValueError(
            f"the value heads HV of v must be a multiple of the heads H = {heads} of q and k, got {value_heads}"
        )
    if beta is not None and beta.dim() == 4:
        check_shape("beta", beta, "[B, T, HV] or [B, T, HV, V]", tuple(values))
    elif beta is not None:
        check_shape("beta", beta, "[B, T, HV]", (batch, total, value_heads))
    if gate == Gate.PER_HEAD:
        check_shape(g_name, g, "[B, T, HV]", (batch, total, value_heads))
    elif gate == Gate.PER_KEY:
        check_shape(g_name, g, "[B, T, HV, K]", (batch, total, value_heads, width))
    sequences = batch if cu_seqlens is None else check_cu_seqlens(cu_seqlens, "q", q)
    return sequences, value_heads, width, value_width


def check_state(name: str, state: object, v: Tensor, shape: tuple[int, ...], symbols: str = "[N, HV, K, V]") -> None:
    state = check_tensor(name, state)
    check_device(name, state, "v", v)
    check_shape(name, state, symbols, shape)
    wanted = compute_dtype(v.dtype)
    if state.dtype != wanted:
        raise TypeError(f"{name} must be {name_of(wanted)} for v of {name_of(v.dtype)}, got {name_of(state.dtype)}")


def of_one_dtype(name: str, x: Tensor, v: Tensor) -> Tensor:
    """x in the dtype of v: brought there under autocast, else it must have it already."""
    if x.dtype == v.dtype:
        return x
    if torch.is_autocast_enabled(v.device.type):
        return x.to(v.dtype)
    raise TypeError(f"{name} must have the dtype of v, {name_of(v.dtype)}, got {name_of(x.dtype)}")


def run(
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm, cu_seqlens, gate, out_state=None
) -> tuple[Tensor, Tensor | None]:
    """o and the final state, or ``None`` in its place."""
    l2norm = bool(use_qk_l2norm)
    given = (q, k, v, g, beta, scale, initial_state, out_state, l2norm, gate)
    if out_state is not None:
        if cu_seqlens is not None:
            return _update(*given, cu_seqlens)
        # In one line: nothing may go wrong between the state's move and the return.
        return done if (done := step(*given)) is not None else _update(*given)
    done = None if cu_seqlens is not None else step(*given)
    if done is None:
        q, k, v, scale, shape = prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens, gate)
        done = delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, shape)
    return done if output_final_state else (done[0], None)


def prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens, gate):
    """q, k and v of one dtype, the scale as a number and the shape of the state, all of it checked."""
    shape = check_inputs(q, k, v, g, beta, cu_seqlens, gate)
    if initial_state is not None:
        check_state("initial_state", initial_state, v, shape)
    q, k = of_one_dtype("q", q, v), of_one_dtype("k", k, v)
    if scale is not None and not hasattr(scale, "__float__"):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    return q, k, v, shape[2] ** -0.5 if scale is None else float(scale), shape


def _update(q, k, v, g, beta, scale, initial_state, out_state, l2norm, gate, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    q, k, v, scale, shape = prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens, gate)
    check_state("out_state", out_state, v, shape)
    check_written("out_state", out_state)
    check_undifferentiated("out_state", q, k, v, g, beta, initial_state, out_state)
    return update_op_(out_state, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm), out_state


def check_undifferentiated(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(f"{name} is written in place and cannot be differentiated; use it under torch.no_grad()")
