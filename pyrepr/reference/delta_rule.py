"""The delta rule, token by token: the truth that every kernel of the family is compared with.

    S ← e^{g_t}·S;   S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ;   o_t = scale · Sᵀ q_t

Plain rule (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"): g = 0.
Gated rule (Yang et al. 2025, "Gated Delta Networks"): one g per token and value head. KDA (Kimi Team 2025, "Kimi
Linear"): e^{g_t} is a vector over K. Without β nothing is erased, S ← S + k_t v_tᵀ (Yang et al. 2024, "Gated Linear
Attention Transformers with Hardware-Efficient Training"). :func:`delta_rule` is plain PyTorch that autograd can follow.
The leaf ops below it, backend ``reference``, give the same numbers in chunks (``_delta_rule_chunks.py``), which takes
few large operations where the recurrence takes many small ones: on devices without a kernel they are what a model runs
on.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from pyrepr.reference._delta_rule_chunks import Chunks
from pyrepr.reference._dtypes import compute_dtype

L2NORM_EPS = 1e-6


class Gate(enum.IntEnum):
    """What the state decays by: nothing, a number per value head, or one per key channel; as in csrc/common.h."""

    NONE = 0
    PER_HEAD = 1
    PER_KEY = 2


def l2norm(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis, of numbers of any size."""
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(())
    unit = torch.where(largest > 1e15, 2.0**64, 1.0).to(x.dtype)
    x = x / unit
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS / unit.square())


def sequence_bounds(cu_seqlens: Tensor, total: int) -> list[int]:
    """cu_seqlens as integers, checked: starts at 0, never decreases, ends at T."""
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    for i in range(1, len(bounds)):
        if bounds[i] < bounds[i - 1]:
            raise ValueError(f"cu_seqlens must not decrease, got {bounds[i - 1]} and then {bounds[i]} at position {i}")
    if bounds[-1] != total:
        raise ValueError(f"cu_seqlens must end at T = {total}, got {bounds[-1]}")
    return bounds


def decay(
    g: Tensor,  # [B, T, HV] or [B, T, HV, K], before its activation
    A_log: Tensor | None,  # HV elements
    dt_bias: Tensor | None,  # HV or HV · K elements, those of one token of g
    lower_bound: float | None,
    dtype: torch.dtype,
) -> Tensor:  # [B, T, HV] or [B, T, HV, K]
    """The gates of the layers: −e^A · softplus(g + dt), as in Mamba-2 (Dao and Gu 2024); with a bound b of Kimi Linear
    b · sigmoid(e^A · (g + dt)), which stays above it."""
    raw = g.to(dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype).reshape(raw.shape[2:])
    rate = None if A_log is None else A_log.to(dtype).exp().reshape(-1, *(1,) * (raw.dim() - 3))
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(raw if rate is None else rate * raw)
    assert rate is not None
    return -rate * torch.nn.functional.softplus(raw, threshold=40)  # PyTorch's own, 20, is seen in float64


def step_sizes(beta: Tensor, twice: bool, dtype: torch.dtype) -> Tensor:
    """β = sigmoid(beta), `twice` that where states may flip (Grazzi et al. 2025, "Unlocking State-Tracking in Linear
    RNNs Through Negative Eigenvalues")."""
    beta = torch.sigmoid(beta.to(dtype))
    return 2 * beta if twice else beta


def _heads(x: Tensor, groups: int, normalize: bool, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> [B, T, HV, K] in `dtype`: value head i takes query and key head i // (HV // H)."""
    x = x.to(dtype)
    return (l2norm(x) if normalize else x).repeat_interleave(groups, 2)


def _decays(g: Tensor | None, t: int) -> Tensor | float:
    """e^{g_t}, [B, HV, K or 1, 1], or 1 for the plain rule."""
    if g is None:
        return 1.0
    return (g[:, t, :, None] if g.dim() == 3 else g[:, t])[..., None].exp()


def _recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    p: Tensor | None = None,
    undecayed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence over one run of tokens; q is scaled, heads are repeated, everything has one dtype.

    q, k: [B, T, HV, K], v: [B, T, HV, V], g: [B, T, HV] or [B, T, HV, K], beta: [B, T, HV] or None,
    state: [B, HV, K, V], p: [B, T, HV, K], what the erase reads along, k without it, of the state before its decay with
    `undecayed`.
    """
    outputs = []
    for t in range(q.shape[1]):
        before, state = state, state * _decays(g, t)
        error = v[:, t]
        if beta is not None:
            read, along = before if undecayed else state, k if p is None else p
            error = beta[:, t, :, None] * (error - torch.einsum("bhkv,bhk->bhv", read, along[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV] (gated), [B, T, HV, K] (KDA) or None (plain)
    beta: Tensor | None,  # [B, T, HV]; None: nothing is erased
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor]:  # [B, T, HV, V], [N, HV, K, V]
    """o in v's dtype and the final state in :func:`compute_dtype`; differentiable by autograd."""
    dtype = compute_dtype(v.dtype)
    groups = v.shape[2] // k.shape[2]
    q, k = (_heads(x, groups, use_qk_l2norm, dtype) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    values = v.to(dtype)
    beta, g = (None if x is None else x.to(dtype) for x in (beta, g))
    state = initial_state
    if state is None:
        sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = values.new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3])
    state = state.to(dtype)
    if cu_seqlens is None:
        o, state = _recur(q, k, values, g, beta, state)
        return o.to(v.dtype), state.clone()
    bounds = sequence_bounds(cu_seqlens, v.shape[1])
    outputs, states = [], []
    for i in range(len(bounds) - 1):
        s = slice(bounds[i], bounds[i + 1])
        o, last = _recur(*_at(s, q, k, values, g, beta), state[i : i + 1])
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1).to(v.dtype), torch.cat(states)


# The leaf ops of pyrepr/ops/delta_rule.py, same arguments, same results.

SEGMENT = 4096  # tokens that the chunk form takes at a time: some ten tensors as large as q are alive in between
FEW = 8  # tokens up to which the recurrence takes fewer operations than the chunk form


def _segments(v: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """Runs of at most SEGMENT tokens in their order, each with the states [N, ...] that it carries on."""
    everything = slice(None)
    bounds, rows = [0, v.shape[1]], [everything]
    if cu_seqlens is not None:
        bounds = sequence_bounds(cu_seqlens, v.shape[1])
        rows = [slice(i, i + 1) for i in range(len(bounds) - 1)]
    return [
        (slice(start, min(start + SEGMENT, bounds[i + 1])), row)
        for i, row in enumerate(rows)
        for start in range(bounds[i], bounds[i + 1], SEGMENT)
    ]


def _at(tokens: slice, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x[:, tokens] for x in tensors)


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    normalize: bool,
    p: Tensor | None = None,
) -> tuple[Any, ...]:
    """q (scaled), k, v, g, beta and p as the recurrence takes them."""
    dtype = compute_dtype(v.dtype)
    q, k, p = (None if x is None else _heads(x, v.shape[2] // x.shape[2], normalize, dtype) for x in (q, k, p))
    return q * scale, k, *(None if x is None else x.to(dtype) for x in (v, g, beta)), p


def delta_rule_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`delta_rule` in chunks, as differentiable as that: what second derivatives go through."""
    tensors = prepared(q, k, v, g, beta, scale, use_qk_l2norm)
    return _by_segments(tensors, initial_state, cu_seqlens, v.dtype)


def delta_rule_apart_chunks(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV] or [B, T, HV, K]
    beta: Tensor,  # [B, T, HV]
    p: Tensor,  # [B, T, H or HV, K]
    initial_state: Tensor | None,  # [N, HV, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    scale: float,
    use_qk_l2norm: bool,
    undecayed: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`delta_rule_chunks` whose erase reads along p: S ← e^g S + β k (v − S̄ᵀ p)ᵀ with S̄ = e^g S, or with
    `undecayed`, which takes no gate per key, S̄ = S."""
    tensors = prepared(q, k, v, g, beta, scale, use_qk_l2norm, p)
    return _by_segments(tensors, initial_state, cu_seqlens, v.dtype, undecayed)


def _by_segments(
    tensors: tuple[Any, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    undecayed: bool = False,
    by_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """o in `dtype` and the final state, of what :func:`prepared` gives."""
    k, v = tensors[1:3]
    sequences = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        state = tensors[2].new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3])
    else:
        state = initial_state.to(tensors[2].dtype)
    states = [state] if cu_seqlens is None else list(state.split(1))
    outputs = []
    for tokens, row in _segments(v, cu_seqlens):
        *own, p, i = *_at(tokens, *tensors), row.start or 0
        if by_token or own[0].shape[1] <= FEW:
            o, states[i] = _recur(*own, states[i], p, undecayed)
        else:
            o, states[i] = Chunks(*own, p, undecayed).forward(states[i])
        outputs.append(o)
    o = torch.cat(outputs, 1) if outputs else torch.zeros_like(tensors[2])
    return o.to(dtype), torch.cat(states) if states else state


def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, final state, and the states the backward starts from: infinite, as this one starts from the beginning, and
    another, called outside the block that asked for this forward, can see that none were kept."""
    o, state = delta_rule_chunks(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm)
    if o.is_cpu and not bool(o.isfinite().all()):
        # Products of chunks carry what is not finite to the tokens before it. (Looking at it on a GPU would wait.)
        o, state = delta_rule(q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens)
    return o.contiguous(), state, state.new_full((slots, *state.shape[1:]), torch.inf)


def delta_rule_update_(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
) -> Tensor:
    """o; `state` becomes the final state. `initial_state` may be `state`; None is zero."""
    o, last, _ = delta_rule_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, 0)
    return (o, state.copy_(last))[0]


def heads_backward(x: Tensor, grad: Tensor, normalize: bool) -> Tensor:
    """The gradient of :func:`_heads`. x: [B, T, H, K], grad: [B, T, HV, K] -> [B, T, H, K] in x's dtype."""
    grad = grad.unflatten(2, (x.shape[2], -1)).sum(3)
    if normalize:
        wide = x.to(grad.dtype)
        inverse = torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2NORM_EPS)
        unit = wide * inverse
        grad = inverse * (grad - unit * (unit * grad).sum(-1, keepdim=True))
    return grad.to(x.dtype)


def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_o: Tensor,
    grad_state: Tensor,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in q, k, v, g and beta (empty without them), and the initial state, each in its input's dtype."""
    tensors = prepared(q, k, v, g, beta, scale, use_qk_l2norm)
    (dq, dk, dv, dg, dbeta, _), ds = _backward_by_segments(tensors, initial_state, cu_seqlens, grad_o, grad_state)
    return (
        heads_backward(q, dq * scale, use_qk_l2norm),
        heads_backward(k, dk, use_qk_l2norm),
        dv.to(v.dtype),
        *(
            v.new_empty(0, dtype=compute_dtype(v.dtype)) if x is None else dx.to(x.dtype)
            for dx, x in ((dg, g), (dbeta, beta))
        ),
        ds,
    )


def _backward_by_segments(
    tensors: tuple[Any, ...],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_o: Tensor,
    grad_state: Tensor,
    undecayed: bool = False,
) -> tuple[list[Any], Tensor]:
    """The gradients in what :func:`prepared` gives, ``None`` for what is not there, and in the initial state."""
    v = tensors[2]
    state = (
        torch.zeros_like(grad_state, dtype=v.dtype) if initial_state is None else initial_state.to(v.dtype, copy=True)
    )
    ds = grad_state.to(v.dtype, copy=True)
    grads: list[Any] = [None if x is None else torch.empty_like(x) for x in tensors]
    segments, starts = _segments(v, cu_seqlens), []
    for tokens, row in segments:
        starts.append(state[row].clone())
        state[row] = Chunks(*_at(tokens, *tensors), undecayed).states(starts[-1])[2]
    for (tokens, row), start in zip(reversed(segments), reversed(starts), strict=True):
        chunks = Chunks(*_at(tokens, *tensors), undecayed)
        *found, first = chunks.backward(start, grad_o[:, tokens].to(v.dtype), ds[row])
        for grad, part in zip(_at(tokens, *grads), found, strict=True):
            if grad is not None:
                grad.copy_(part)
        ds[row] = first
    return grads, ds


def delta_rule_apart_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    p: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    undecayed: bool,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`delta_rule_forward`, of :func:`delta_rule_apart_chunks`."""
    tensors = prepared(q, k, v, g, beta, scale, use_qk_l2norm, p)
    o, state = _by_segments(tensors, initial_state, cu_seqlens, v.dtype, undecayed)
    if o.is_cpu and not bool(o.isfinite().all()):
        o, state = _by_segments(tensors, initial_state, cu_seqlens, v.dtype, undecayed, by_token=True)
    return o.contiguous(), state, state.new_full((slots, *state.shape[1:]), torch.inf)


def delta_rule_apart_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    p: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_o: Tensor,
    grad_state: Tensor,
    scale: float,
    use_qk_l2norm: bool,
    undecayed: bool,
) -> tuple[Tensor, ...]:
    """Gradients in q, k, v, g, beta and p, each in its input's dtype, and in the initial state."""
    tensors = prepared(q, k, v, g, beta, scale, use_qk_l2norm, p)
    found, ds = _backward_by_segments(tensors, initial_state, cu_seqlens, grad_o, grad_state, undecayed)
    dq, dk, dv, dg, dbeta, dp = found
    dq, dk, dp = (heads_backward(x, dx, use_qk_l2norm) for x, dx in ((q, dq * scale), (k, dk), (p, dp)))
    return dq, dk, dv.to(v.dtype), dg.to(g.dtype), dbeta.to(beta.dtype), dp, ds
