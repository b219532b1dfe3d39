"""Causal depthwise convolution with SiLU: what stands before the delta rule in every model that has one.

Names, arguments and layouts are those of the package causal-conv1d, so that models written for it run unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import (
    DTYPES,
    INTEGERS,
    check_cu_seqlens,
    check_device,
    check_shape,
    check_tensor,
    check_written,
    shape_of,
    shown,
)
from pyrepr.ops._leaf import at_hand, require
from pyrepr.ops.causal_conv1d import causal_conv1d, step, update_op_

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

_ACTIVATIONS = (None, "silu", "swish")


def _check_like(name: str, x: object, first: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """A tensor on the device of `first`, which the caller named x."""
    x = check_tensor(name, x, dtypes)
    check_device(name, x, "x", first)
    return x


def _check_filter(x: object, weight: object, bias: object, activation: object) -> bool:
    """Whether SiLU follows."""
    x = check_tensor("x", x)
    weight = _check_like("weight", weight, x)
    channels = x.shape[1] if x.dim() > 1 else -1
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(
            f"weight must have shape [D, W] with D = {channels} of x and W of at least 1, got {shape_of(weight)}"
        )
    if bias is not None:
        check_shape("bias", _check_like("bias", bias, x), "[D]", (channels,))
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {shown(activation)}")
    return activation is not None


def _check_packing(x: Tensor, seq_idx: object, cu_seqlens: object, has_states: bool) -> int:
    """The number of sequences. What the numbers say is checked where they are read, by the op."""
    if seq_idx is not None:
        check_shape("seq_idx", _check_like("seq_idx", seq_idx, x, INTEGERS), "[B, T]", (x.shape[0], x.shape[2]))
        if cu_seqlens is not None:
            raise ValueError("seq_idx and cu_seqlens both say where sequences start; give one of them")
        if has_states:
            raise ValueError("seq_idx must be None where there are initial or final states; cu_seqlens goes with them")
    return x.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, "x", x)


def _padding(seq_idx: Tensor | None) -> Tensor | None:
    """[B, 1, T] where seq_idx is negative: tokens of no sequence. ``None`` where there are none to be seen."""
    if seq_idx is None or (at_hand(seq_idx) and not bool((seq_idx < 0).any())):
        return None
    return (seq_idx < 0)[:, None]


def _final_states(x: Tensor, kept: int, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `kept` tokens of every sequence, [N, D, kept], with the initial state before them. x: [B, D, T]."""
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], x.shape[1], kept) if initial is None else initial.to(x.dtype)
        if torch.compiler.is_exporting():  # T may be any, also less than what is kept
            return torch.cat([before, x], -1)[..., x.shape[2] :]
        missing = max(0, kept - x.shape[2])
        return torch.cat([before[..., kept - missing :], x[..., x.shape[2] - kept + missing :]], -1)
    ends, lengths = cu_seqlens[1:, None].long(), cu_seqlens.diff()[:, None].long()
    back = torch.arange(kept, 0, -1, device=x.device)  # [kept] how far before the end
    row = x[0] if x.shape[2] else x.new_zeros(x.shape[1], 1)
    tokens = row[:, (ends - back).clamp_min(0)].transpose(0, 1)  # [N, D, kept]
    inside = (back <= lengths)[:, None]
    if initial is None or kept == 0:
        return torch.where(inside, tokens, 0)  # what is not inside may be no number
    place = (lengths + kept - back).clamp_max(kept - 1)[:, None].expand_as(tokens)  # [N, D, kept]
    return torch.where(inside, tokens, initial.to(x.dtype).gather(2, place))


def causal_conv1d_fn(
    x: Tensor,  # [B, D, T]
    weight: Tensor,  # [D, W]
    bias: Tensor | None = None,  # [D]
    seq_idx: Tensor | None = None,  # [B, T]
    initial_states: Tensor | None = None,  # [N, D, W - 1]
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,  # [N, D, W - 1]
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> Any:  # [B, D, T], and with return_final_states [N, D, W - 1]
    """Every channel convolved with its own filter of W taps, looking back: Σ_j w_j x_{t−W+1+j} + bias, then SiLU.

    Args:
        x: [B, D, T]; float32, bfloat16 or float16 on the kernels, float64 in the reference. Any strides are read in
            place: contiguous ones, and [B, T, D] seen through ``transpose(1, 2)``, which is a little faster.
        weight: [D, W], any floating dtype, any W from 1; the last tap meets the token itself. bias: [D]; default none.
        seq_idx: [B, T] int32 or int64; a new sequence starts where the number changes. Default: every row is one. A
            negative number marks padding: it yields 0, and neither is read nor gets a gradient.
        initial_states: [N, D, W − 1], the tokens before each sequence. Default zero.
        return_final_states: return the last W − 1 tokens of each sequence as well, what the next call takes as
            initial_states. final_states_out: if given, they are written there.
        activation: None (default), ``"silu"`` or ``"swish"``, which are the same.
        cu_seqlens: [N + 1] int32 or int64; with B = 1, sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1], which
            may be none. Not in causal-conv1d; unlike seq_idx it goes with states. Default: N = B.

    Returns:
        out: [B, D, T] in x's dtype, in memory [B, T, D], so that cutting its channels into heads costs no copy; with
        ``return_final_states`` also the states. Differentiable in x, weight, bias and initial_states, any number of
        times, forward and reverse, and under ``torch.func``, whose ``vmap`` becomes part of the channels. First
        derivatives in reverse run on the kernels; forward mode and higher orders go through plain PyTorch, tap by tap.
        16-bit inputs are accumulated in float32.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range.

    Example:
        >>> x, weight = torch.randn(2, 16, 50), torch.randn(16, 4)
        >>> pyrepr.causal_conv1d_fn(x, weight, activation="silu").shape
        torch.Size([2, 16, 50])
    """
    silu = _check_filter(x, weight, bias, activation)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, D, T], got {shape_of(x)}")
    states = {"initial_states": initial_states, "final_states_out": final_states_out}
    wanted = return_final_states or final_states_out is not None
    sequences = _check_packing(x, seq_idx, cu_seqlens, wanted or initial_states is not None)
    kept = weight.shape[1] - 1
    for name, state in states.items():
        if state is not None:
            check_shape(name, _check_like(name, state, x), "[N, D, W - 1]", (sequences, x.shape[1], kept))
    if final_states_out is not None:
        check_written("final_states_out", final_states_out)
    padding = _padding(seq_idx)
    if padding is not None:
        x = x.masked_fill(padding, 0)  # what stands there may be no number
    out = causal_conv1d(x.mT, weight, bias, initial_states, seq_idx, cu_seqlens, silu).mT
    if padding is not None:
        out = out.masked_fill(padding, 0)
    if not wanted:
        return out
    final = _final_states(x, kept, initial_states, cu_seqlens)
    if final_states_out is None:
        return out, final
    return (out, final_states_out.copy_(final)) if return_final_states else (out, final_states_out.copy_(final))[0]


def causal_conv1d_update(
    x: Tensor,  # [B, D] or [B, D, T]
    conv_state: Tensor,  # [B, D, S]
    weight: Tensor,  # [D, W]
    bias: Tensor | None = None,  # [D]
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,  # [B]
    conv_state_indices: Tensor | None = None,  # [B]
) -> Tensor:  # the shape of x
    """:func:`causal_conv1d_fn` for decoding: the tokens before x stand in ``conv_state``, which moves on in place.

    Args:
        x: [B, D, T], or [B, D] for one token. weight, bias, activation: as in :func:`causal_conv1d_fn`.
        conv_state: [B, D, S] in x's dtype, S ≥ W − 1, the last S tokens with the newest at the end.
        cache_seqlens: [B] int32 or int64, not negative. If given, the state is a ring: x is written from place
            cache_seqlens mod S on, and the tokens before stand before it. Default: it is shifted.
        conv_state_indices: [B] int32 or int64. If given, conv_state has any number of rows, and row i of x uses row
            conv_state_indices[i], a different one for each i; with −1 it is skipped and yields 0. Default: row i.

    Returns:
        out in the shape and dtype of x. Not differentiable.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range.
        RuntimeError: if an input requires a gradient and gradients are enabled.

    Example:
        >>> state, weight = torch.zeros(2, 16, 4), torch.randn(16, 4)
        >>> pyrepr.causal_conv1d_update(torch.randn(2, 16), state, weight).shape
        torch.Size([2, 16])
    """
    given = (x, conv_state, weight, bias)
    if cache_seqlens is None and conv_state_indices is None and activation in _ACTIVATIONS:
        # In one line: nothing may go wrong between the state's move and the return.
        return out if (out := step(*given, bool(activation))) is not None else _update(*given, activation)
    return _update(*given, activation, cache_seqlens, conv_state_indices)


def _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices) -> bool:
    """Whether SiLU follows."""
    silu = _check_filter(x, weight, bias, activation)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape [B, D] or [B, D, T], got {shape_of(x)}")
    _check_like("conv_state", conv_state, x, (x.dtype,))
    for name, places in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if places is not None:
            check_shape(name, _check_like(name, places, x, INTEGERS), "[B]", (x.shape[0],))
    rows = x.shape[0] if conv_state_indices is None else conv_state.shape[0]
    if conv_state.dim() != 3 or conv_state.shape[:2] != (rows, x.shape[1]) or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state must have shape [B, D, S] = [{rows}, {x.shape[1]}, S] with S of at least W - 1 = "
            f"{weight.shape[1] - 1}, got {shape_of(conv_state)}"
        )
    check_written("conv_state", conv_state)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, conv_state, weight, bias)):
        raise RuntimeError("conv_state is written in place and cannot be differentiated; use it under torch.no_grad()")
    if cache_seqlens is not None:
        require((cache_seqlens >= 0).all(), "cache_seqlens must not be negative")
    if conv_state_indices is not None:
        inside = ((conv_state_indices >= -1) & (conv_state_indices < rows)).all()
        require(inside, f"conv_state_indices must be from -1 to {rows - 1}, the rows of conv_state")
        ordered = conv_state_indices.sort().values
        twice = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
        require(~twice.any(), "conv_state_indices must name a row of conv_state once at most")
    return silu


def _update(x, conv_state, weight, bias, activation, cache_seqlens=None, conv_state_indices=None) -> Tensor:
    silu = _check_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    tokens = (x[..., None] if x.dim() == 2 else x).mT
    if cache_seqlens is None and conv_state_indices is None:
        return update_op_(conv_state, tokens, weight, bias, silu).mT.reshape(x.shape)
    if x.shape[0] == 0 or conv_state.shape[0] == 0:
        return torch.zeros_like(x)
    index = torch.arange(x.shape[0], device=x.device) if conv_state_indices is None else conv_state_indices.long()
    # A row that is skipped stands in for the first that is not: it reads what that one reads and writes the same.
    used = index >= 0
    first = used.int().argmax()
    source = torch.where(used, torch.arange(len(index), device=x.device), first)
    index = index[source].clamp_min(0)
    before, order = conv_state[index], None
    state = before.clone()
    if cache_seqlens is not None:
        length = conv_state.shape[2]
        ring = cache_seqlens.long()[source, None, None] + torch.arange(
            length, device=x.device
        )  # [B, 1, S] oldest first
        order = (ring % max(1, length)).expand_as(state)
        state = state.gather(2, order)
    out = update_op_(state, tokens[source], weight, bias, silu).mT.reshape(x.shape)
    if order is not None:
        # Shifted by T, the tokens stand T places earlier than in the ring.
        places = (order + tokens.shape[1]) % max(1, conv_state.shape[2])
        state = torch.empty_like(state).scatter_(2, places, state)
    state = torch.where(used.any(), state, before)
    out = out.masked_fill(~used.view(-1, *[1] * (x.dim() - 1)), 0)
    return (out, conv_state.index_copy_(0, index, state))[0]
