"""The delta rule, token by token: the truth that every kernel of the family is compared with.

    S ← e^{g_t}·S;   S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ;   o_t = scale · Sᵀ q_t

Plain rule (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"): g = 0.
Gated rule (Yang et al. 2025, "Gated Delta Networks"): one g per token and value head. KDA (Kimi Team 2025, "Kimi
Linear"): e^{g_t} is a vector over K. :func:`delta_rule` is plain PyTorch that autograd can follow; the leaf ops below
it also have a derivative written out by hand, from the same recurrence run backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

L2NORM_EPS = 1e-6


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the recurrence is computed in, and the dtype of the state: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def l2norm(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS)


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


def _heads(x: Tensor, groups: int, normalize: bool, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> [B, T, HV, K] in `dtype`: value head i takes query and key head i // (HV // H)."""
    x = x.to(dtype)
    return (l2norm(x) if normalize else x).repeat_interleave(groups, 2)


def _decays(g: Tensor | None, t: int) -> Tensor | float:
    """e^{g_t}, [B, HV, K or 1, 1], or 1 for the plain rule."""
    if g is None:
        return 1.0
    return (g[:, t, :, None] if g.dim() == 3 else g[:, t])[..., None].exp()


def _recur(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over one run of tokens; q is scaled, heads are repeated, everything has one dtype.

    q, k: [B, T, HV, K], v: [B, T, HV, V], g: [B, T, HV] or [B, T, HV, K], beta: [B, T, HV], state: [B, HV, K, V].
    """
    outputs = []
    for t in range(q.shape[1]):
        state = state * _decays(g, t)
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state


def delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV] (gated), [B, T, HV, K] (KDA) or None (plain)
    beta: Tensor,  # [B, T, HV]
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
    values, beta, g = v.to(dtype), beta.to(dtype), None if g is None else g.to(dtype)
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
        gate = None if g is None else g[:, s]
        o, last = _recur(q[:, s], k[:, s], values[:, s], gate, beta[:, s], state[i : i + 1])
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1).to(v.dtype), torch.cat(states)


# The leaf ops of pyrepr/ops/delta_rule.py, same arguments, same results.


def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, final state, and the states the backward starts from (empty here: this backward starts from the beginning)."""
    o, state = delta_rule(q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens)
    return o, state, state.new_zeros(slots, *state.shape[1:])


def delta_rule_update_(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
) -> Tensor:
    """o; `state` becomes the final state. `initial_state` may be `state`; None is zero."""
    o, last = delta_rule(q, k, v, g, beta, scale, initial_state, use_qk_l2norm, cu_seqlens)
    state.copy_(last)
    return o


def _recur_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    grad_o: Tensor,
    grad_state: Tensor,
) -> tuple[Any, ...]:
    """Gradients of :func:`_recur` in q, k, v, g (or None), beta and state. With S̄ = e^{g} S_{t−1} and u = v − S̄ᵀk:

    dS += q doᵀ; du = β dSᵀk; dq = S do; dβ = kᵀ dS u; dk = β dS u − S̄ du; dv = du; dS̄ = dS − k duᵀ;
    dg = Σ dS̄ ∘ S̄; dS_{t−1} = e^{g} dS̄.
    """
    states = [state]
    for t in range(q.shape[1]):
        one = slice(t, t + 1)
        decay_of = None if g is None else g[:, one]
        states.append(_recur(q[:, one], k[:, one], v[:, one], decay_of, beta[:, one], states[-1])[1])
    dq, dk, dv, dbeta = (torch.empty_like(x) for x in (q, k, v, beta))
    dg = None if g is None else torch.empty_like(g)
    ds = grad_state
    for t in reversed(range(q.shape[1])):
        decay = _decays(g, t)
        decayed = states[t] * decay
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", decayed, k[:, t])
        dq[:, t] = torch.einsum("bhkv,bhv->bhk", states[t + 1], grad_o[:, t])
        ds = ds + torch.einsum("bhk,bhv->bhkv", q[:, t], grad_o[:, t])
        step = torch.einsum("bhkv,bhv->bhk", ds, error)
        dbeta[:, t] = (step * k[:, t]).sum(-1)
        derror = beta[:, t, :, None] * torch.einsum("bhkv,bhk->bhv", ds, k[:, t])
        dk[:, t] = beta[:, t, :, None] * step - torch.einsum("bhkv,bhv->bhk", decayed, derror)
        dv[:, t] = derror
        ds = ds - torch.einsum("bhk,bhv->bhkv", k[:, t], derror)
        if g is not None and dg is not None:
            per_key = (ds * decayed).sum(-1)
            dg[:, t] = per_key.sum(-1) if g.dim() == 3 else per_key
        ds = ds * decay
    return dq, dk, dv, dg, dbeta, ds


def _heads_backward(x: Tensor, grad: Tensor, normalize: bool) -> Tensor:
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
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    grad_o: Tensor,
    grad_state: Tensor,
    scale: float,
    use_qk_l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in q, k, v, g (empty without one), beta, and the initial state, each in its input's dtype."""
    dtype = compute_dtype(v.dtype)
    groups = v.shape[2] // k.shape[2]
    wide_q, wide_k = (_heads(x, groups, use_qk_l2norm, dtype) for x in (q, k))
    wide: list[Any] = [wide_q * scale, wide_k, v.to(dtype), None if g is None else g.to(dtype), beta.to(dtype)]
    state = torch.zeros_like(grad_state, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    grad_o, grad_state = grad_o.to(dtype), grad_state.to(dtype)
    everything: tuple[Any, ...]
    if cu_seqlens is None:
        everything = (*wide, state, grad_o, grad_state)
        dq, dk, dv, dg, dbeta, ds = _recur_backward(*everything)
    else:
        bounds = sequence_bounds(cu_seqlens, v.shape[1])
        parts = []
        for i in range(len(bounds) - 1):
            s = slice(bounds[i], bounds[i + 1])
            own = [None if x is None else x[:, s] for x in wide]
            everything = (*own, state[i : i + 1], grad_o[:, s], grad_state[i : i + 1])
            parts.append(_recur_backward(*everything))
        dq, dk, dv, dg, dbeta, ds = (
            None if column[0] is None else torch.cat(column, 0 if j == 5 else 1)
            for j, column in enumerate(zip(*parts, strict=True))
        )
    return (
        _heads_backward(q, dq * scale, use_qk_l2norm),
        _heads_backward(k, dk, use_qk_l2norm),
        dv.to(v.dtype),
        v.new_empty(0, dtype=dtype) if g is None else dg.to(g.dtype),
        dbeta.to(beta.dtype),
        ds,
    )
