"""Causal depthwise convolution, tap by tap: the truth that the kernels of family `causal_conv1d` are compared with.

    y_t = bias + Σ_{j<W} w_j x_{t−W+1+j};   out_t = y_t, or with SiLU y_t · sigmoid(y_t)

Before the start of a sequence x is its initial state, or zero. Layout here: tokens before channels, x [B, T, D]. The
function is plain PyTorch that autograd can follow; the leaf ops below it have the derivative written out by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import sequence_bounds


def bounds_of(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> list[int]:
    """Where sequences start and end, [N + 1], counting tokens through the whole batch.

    By default every row is one; with seq_idx [B, T] one starts where the number changes; cu_seqlens [N + 1] says it.
    """
    batch, total = x.shape[:2]
    if cu_seqlens is not None:
        return sequence_bounds(cu_seqlens, total)
    if seq_idx is None:
        return [row * total for row in range(batch + 1)]
    starts = torch.ones(batch, total, dtype=torch.bool, device="cpu")
    starts[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]).cpu()
    return [*starts.flatten().nonzero().flatten().tolist(), batch * total]


def _positions(bounds: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of every token: its sequence, and how many tokens of that come before it."""
    edges = torch.tensor(bounds, device=device)
    sequences = torch.arange(len(bounds) - 1, device=device)
    number = torch.repeat_interleave(sequences, edges.diff(), output_size=bounds[-1])
    return number, torch.arange(bounds[-1], device=device) - edges[number]


def _seen(
    x: Tensor, taps: int, initial: Tensor | None, bounds: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor, tuple]]:
    """For every tap: its number j, what every token sees through it [B·T, D], where that is a token of its sequence
    [B·T, 1], and where it stands otherwise: (sequence, place in the state)."""
    rows = x.flatten(0, 1)
    number, position = _positions(bounds, x.device)
    for j in range(taps):
        back = taps - 1 - j
        inside = (position >= back)[:, None]
        moved = torch.cat([rows.new_zeros(min(back, len(rows)), rows.shape[1]), rows[: max(0, len(rows) - back)]])
        place = (number, (position + j).clamp_max(max(0, taps - 2)))
        before = torch.zeros_like(moved)
        if initial is not None and back:
            before = initial.mT.flatten(0, 1).index_select(0, place[0] * initial.shape[2] + place[1])
        yield j, torch.where(inside, moved, before), inside, place


def causal_conv1d(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D, W]
    bias: Tensor | None = None,  # [D]
    initial_states: Tensor | None = None,  # [N, D, W - 1]
    seq_idx: Tensor | None = None,  # [B, T]
    cu_seqlens: Tensor | None = None,  # [N + 1]
    silu: bool = False,
) -> Tensor:  # [B, T, D]
    """out in x's dtype; differentiable by autograd."""
    dtype = compute_dtype(x.dtype)
    initial = None if initial_states is None else initial_states.to(dtype)
    y = x.new_zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    for j, seen, _, _ in _seen(x.to(dtype), weight.shape[1], initial, bounds_of(x, seq_idx, cu_seqlens)):
        y = y + weight[:, j].to(dtype) * seen
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype).reshape(x.shape)


# The leaf ops of pyrepr/ops/causal_conv1d.py, same arguments, same results.


def causal_conv1d_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    grad: Tensor,  # [B, T, D]
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in x, weight, bias and initial_states (the last two empty without them), each in its input's dtype."""
    dtype = compute_dtype(x.dtype)
    taps = weight.shape[1]
    initial = None if initial_states is None else initial_states.to(dtype)
    bounds = bounds_of(x, seq_idx, cu_seqlens)
    dy = grad.to(dtype).flatten(0, 1)
    if silu:
        y = causal_conv1d(x.to(dtype), weight, bias, initial, seq_idx, cu_seqlens).view(dy.shape)
        s = torch.sigmoid(y)
        dy = dy * s * (1 + y * (1 - s))
    dx, dweight = torch.zeros_like(dy), torch.zeros_like(weight, dtype=dtype)
    dinitial = dy.new_zeros(0 if initial is None else initial.shape)
    for j, seen, inside, place in _seen(x.to(dtype), taps, initial, bounds):
        dweight[:, j] = (dy * seen).sum(0)
        part = dy * weight[:, j].to(dtype)
        back = taps - 1 - j
        if back < len(dx):
            dx[: len(dx) - back] += (part * inside)[back:]
        if initial is not None and back:
            dinitial.mT.index_put_(place, part * ~inside, accumulate=True)
    dbias = dy.new_zeros(0) if bias is None else dy.sum(0).to(bias.dtype)
    if initial_states is not None:
        dinitial = dinitial.to(initial_states.dtype)
    return dx.to(x.dtype).view(x.shape), dweight.to(weight.dtype), dbias, dinitial


def causal_conv1d_update_(
    conv_state: Tensor,  # [B, D, S]
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D, W]
    bias: Tensor | None,  # [D]
    silu: bool,
) -> Tensor:  # [B, T, D]
    """out; `conv_state` holds the last S tokens before and after."""
    kept = weight.shape[1] - 1
    out = causal_conv1d(x, weight, bias, conv_state[..., conv_state.shape[2] - kept :], silu=silu)
    after = torch.cat([conv_state, x.mT], -1)[..., x.shape[1] :]
    return (out, conv_state.copy_(after))[0]
