"""The scan of Mamba-2: gated linear attention whose keys, values and decays come from a step size.

    S ← e^{Δ_t A}·S + Δ_t x_t B_tᵀ;   y_t = S C_t + D x_t                  S [P, N], a head's

(Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", section 7). Names, order and meaning of arguments are those of mamba_ssm 2. C, B and Δ x are the queries, keys
and values of :func:`pyrepr.functional.chunk_simple_gla`, and Δ A is its gate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyrepr._checks import (
    INTEGERS,
    check_cu_seqlens,
    check_device,
    check_shape,
    check_tensor,
    check_written,
    name_of,
    shape_of,
    shown,
)
from pyrepr.functional._delta_rule import check_undifferentiated
from pyrepr.functional.gla import chunk_simple_gla, fused_recurrent_simple_gla
from pyrepr.reference._dtypes import compute_dtype

__all__ = ["mamba_chunk_scan_combined", "selective_state_update"]


def mamba_chunk_scan_combined(
    x: Tensor,  # [B, T, H, P]
    dt: Tensor,  # [B, T, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, T, G, N]
    C: Tensor,  # [B, T, G, N]
    chunk_size: int | None = None,
    D: Tensor | None = None,  # [H] or [H, P]
    z: Tensor | None = None,  # [B, T, H, P]
    dt_bias: Tensor | None = None,  # [H]
    initial_states: Tensor | None = None,  # [B or sequences, H, P, N]
    seq_idx: Tensor | None = None,  # [1, T]
    cu_seqlens: Tensor | None = None,  # [sequences + 1]
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Any:  # [B, T, H, P], and with return_final_states [B or sequences, H, P, N]
    """Mamba-2's scan over whole sequences.

    Args:
        x: [B, T, H, P], the inputs; float32, bfloat16, float16 or float64.
        dt: [B, T, H], the step sizes Δ, of any floating dtype: dt + dt_bias, then softplus with dt_softplus, then
            clamped to dt_limit. In float32 (float64 for float64 inputs).
        A: [H], negative.
        B, C: [B, T, G, N]; heads share them in G groups, of which H is a multiple. Cast to x's dtype.
        chunk_size: accepted; the kernels have their own. Default ``None``.
        D: [H] or [H, P], what is added of x; default nothing.
        z: [B, T, H, P], y is multiplied by silu(z); default not.
        dt_bias: [H]; default zero.
        initial_states: [B, H, P, N]; default zero. With cu_seqlens or seq_idx one for each sequence.
        seq_idx: [1, T], a number for the sequence of every token, in runs. cu_seqlens: [sequences + 1], where packed
            sequences start and end. One of them at most, with B = 1; default every row is a sequence.
        return_final_states: default no.

    Returns:
        y: [B, T, H, P] in x's dtype, and with return_final_states the states after the last tokens in float32 (float64
        for float64 inputs). Differentiable in every floating argument, as
        :func:`pyrepr.functional.chunk_simple_gla` is.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range.

    Example:
        >>> x, dt, A = torch.randn(1, 100, 4, 16), torch.rand(1, 100, 4), -torch.rand(4)
        >>> B, C = (torch.randn(1, 100, 2, 8) for _ in range(2))
        >>> y, state = pyrepr.functional.mamba_chunk_scan_combined(x, dt, A, B, C, 64, return_final_states=True)
        >>> y.shape, state.shape
        (torch.Size([1, 100, 4, 16]), torch.Size([1, 4, 16, 8]))
    """
    _check_scan(x, dt, A, B, C, D, z, dt_bias)
    dtype = compute_dtype(x.dtype)
    steps = _steps(dt, dt_bias, dt_softplus, dtype).clamp(*_limits(dt_limit))
    if seq_idx is not None:
        if cu_seqlens is not None:
            raise ValueError("seq_idx and cu_seqlens both say where sequences end; give one of them")
        cu_seqlens = _bounds(seq_idx, x)
    sequences = x.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, "x", x)
    if initial_states is not None:
        check_device("initial_states", check_tensor("initial_states", initial_states), "x", x)
        wanted = (sequences, *x.shape[2:], B.shape[3])
        check_shape("initial_states", initial_states, "[sequences, H, P, N]", wanted)
        initial_states = initial_states.to(dtype)
    values = x.to(dtype) * steps[..., None]
    o, state = chunk_simple_gla(
        C.to(dtype),
        B.to(dtype),
        values,
        A.to(dtype) * steps,
        scale=1.0,
        initial_state=initial_states,
        output_final_state=bool(return_final_states),
        state_v_first=True,
        cu_seqlens=cu_seqlens,
    )
    o = _skipped(o, x, D, z)
    return (o, state) if return_final_states else o


def selective_state_update(
    state: Tensor,  # [B, H, P, N]
    x: Tensor,  # [B, H, P]
    dt: Tensor,  # [B, H, P]
    A: Tensor,  # [H, P, N]
    B: Tensor,  # [B, G, N]
    C: Tensor,  # [B, G, N]
    D: Tensor | None = None,  # [H, P]
    z: Tensor | None = None,  # [B, H, P]
    dt_bias: Tensor | None = None,  # [H, P]
    dt_softplus: bool = False,
) -> Tensor:  # [B, H, P]
    """One token of a selective state space, which overwrites the state: decoding for Mamba-2, and Mamba.

    Where dt, dt_bias and A are one number a head, which their strides say (they are expanded, as Mamba-2's are), this
    is the kernel of :func:`mamba_chunk_scan_combined`; otherwise plain PyTorch, some passes over the state.

    Args:
        state: [B, H, P, N], float32 on the kernel; becomes the state after the token. Fastest where P is the
            dense axis, as in what :func:`mamba_chunk_scan_combined` returns: the kernel then writes it in place.
        x, dt: [B, H, P]. A: [H, P, N]. B, C: [B, G, N], H a multiple of G. D: [H, P], default nothing.
        z: [B, H, P], the result is multiplied by silu(z); default not. dt_bias: [H, P], default zero.
        dt_softplus: default no.

    Without heads, in Mamba: state [B, P, N], x, dt and z [B, P], A [P, N], B and C [B, N], D and dt_bias [P].

    Returns:
        [B, H, P] (or [B, P]) in x's dtype. Not differentiable, since the state is written in place.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype or device; the state then is as it was.

    Example:
        >>> state, x, A = torch.zeros(1, 4, 16, 8), torch.randn(1, 4, 16), -torch.rand(4)
        >>> dt, A = torch.rand(1, 4)[..., None].expand(1, 4, 16), A[:, None, None].expand(4, 16, 8)
        >>> B, C = (torch.randn(1, 2, 8) for _ in range(2))
        >>> pyrepr.functional.selective_state_update(state, x, dt, A, B, C).shape
        torch.Size([1, 4, 16])
    """
    if check_tensor("state", state).dim() == 3:
        heads: list[Any] = [None if y is None else y.unsqueeze(1) for y in (state, x, dt, B, C, z)]
        shared: list[Any] = [None if y is None else y.unsqueeze(0) for y in (A, D, dt_bias)]
        whole, x, dt, B, C, z = heads
        return selective_state_update(whole, x, dt, shared[0], B, C, shared[1], z, shared[2], dt_softplus).squeeze(1)
    _check_update(state, x, dt, A, B, C, D, z, dt_bias)
    dtype = compute_dtype(x.dtype)
    tied = (dt, *(() if dt_bias is None else (dt_bias,)))
    if A.stride()[1:] == (0, 0) and all(y.stride(-1) == 0 for y in tied):
        steps = _steps(dt[..., 0], None if dt_bias is None else dt_bias[..., 0], dt_softplus, dtype)
        o = _tied(state, x.to(dtype), steps, A[:, 0, 0].to(dtype), B.to(dtype), C.to(dtype))
    else:
        steps = _steps(dt, dt_bias, dt_softplus, dtype)
        B, C = (y.to(dtype).repeat_interleave(state.shape[1] // y.shape[1], 1)[:, :, None] for y in (B, C))
        new = state.to(dtype) * (steps[..., None] * A.to(dtype)).exp() + (steps * x.to(dtype))[..., None] * B
        o = (new * C).sum(-1)
        state.copy_(new)
    return _skipped(o, x, D, z)


def _tied(state: Tensor, x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A token where a head's step size and decay are one number each."""
    inputs = (C[:, None], B[:, None], (steps[..., None] * x)[:, None], (A * steps)[:, None])
    if state.dtype == x.dtype:
        turned = state.mT
        o, _ = fused_recurrent_simple_gla(*inputs, scale=1.0, initial_state=turned, out_state=turned)
    else:
        o, new = fused_recurrent_simple_gla(
            *inputs, scale=1.0, initial_state=state.mT.to(x.dtype), output_final_state=True
        )
        state.mT.copy_(new)
    return o[:, 0]


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    return functional.softplus(dt, threshold=40) if softplus else dt


def _skipped(o: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """What goes by the state, and the output's gate. o: [..., H, P] in the dtype that is computed in."""
    if D is not None:
        D = D.to(o.dtype)
        o = o + x.to(o.dtype) * (D[:, None] if D.dim() == 1 else D)
    if z is not None:
        o = o * functional.silu(z.to(o.dtype))
    return o.to(x.dtype)


def _limits(limits: Any) -> tuple[float, float]:
    numbers: Any = limits if isinstance(limits, (tuple, list)) and len(limits) == 2 else (None,)
    if not all(isinstance(x, (int, float)) for x in numbers) or not numbers[0] <= numbers[1]:
        raise ValueError(f"dt_limit must be two numbers, the smaller one first, got {shown(limits)}")
    return float(numbers[0]), float(numbers[1])


def _bounds(seq_idx: Any, x: Tensor) -> Tensor:
    """Where runs of one number start and end."""
    seq_idx = check_tensor("seq_idx", seq_idx, INTEGERS)
    check_device("seq_idx", seq_idx, "x", x)
    if x.shape[0] != 1:
        raise ValueError(f"x must have B = 1 with seq_idx, got {shape_of(x)}")
    check_shape("seq_idx", seq_idx, "[1, T]", (1, x.shape[1]))
    starts = seq_idx[0].diff(prepend=seq_idx[0, :1] - 1).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([x.shape[1]])])


def _check_tensors(**tensors: Tensor | None) -> None:
    for name, y in tensors.items():
        if y is not None or name not in ("D", "z", "dt_bias"):
            check_device(name, check_tensor(name, y), "x", check_tensor("x", tensors["x"]))


def _check_groups(B: Tensor, C: Tensor, symbols: str, leading: tuple[int, ...], heads: int) -> None:
    axes = len(leading) + 2
    if B.dim() != axes or B.shape[: axes - 2] != leading or 0 in B.shape[-2:] or heads % B.shape[-2]:
        raise ValueError(
            f"B must have shape {symbols} with H = {heads} of x a multiple of G, and N at least 1, got {shape_of(B)}"
        )
    check_shape("C", C, symbols, tuple(B.shape))


def _check_scan(x, dt, A, B, C, D, z, dt_bias) -> None:
    _check_tensors(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if x.dim() != 4 or x.shape[3] == 0:
        raise ValueError(f"x must have shape [B, T, H, P] with P of at least 1, got {shape_of(x)}")
    batch, total, heads, width = x.shape
    check_shape("dt", dt, "[B, T, H]", (batch, total, heads))
    check_shape("A", A, "[H]", (heads,))
    _check_groups(B, C, "[B, T, G, N]", (batch, total), heads)
    if D is not None:
        check_shape("D", D, "[H] or [H, P]", (heads, width)[: 1 if D.dim() == 1 else 2])
    if z is not None:
        check_shape("z", z, "[B, T, H, P]", tuple(x.shape))
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, "[H]", (heads,))


def _check_update(state, x, dt, A, B, C, D, z, dt_bias) -> None:
    _check_tensors(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"x must have shape [B, H, P] with P of at least 1, got {shape_of(x)}")
    batch, heads, width = x.shape
    _check_groups(B, C, "[B, G, N]", (batch,), heads)
    columns = B.shape[-1]
    check_shape("state", state, "[B, H, P, N]", (batch, heads, width, columns))
    check_shape("dt", dt, "[B, H, P]", tuple(x.shape))
    check_shape("A", A, "[H, P, N]", (heads, width, columns))
    for name, y, symbols, shape in (
        ("D", D, "[H, P]", (heads, width)),
        ("dt_bias", dt_bias, "[H, P]", (heads, width)),
        ("z", z, "[B, H, P]", tuple(x.shape)),
    ):
        if y is not None:
            check_shape(name, y, symbols, shape)
    wide = compute_dtype(x.dtype)
    if state.dtype != wide and state.dtype != x.dtype:
        raise TypeError(f"state must be {name_of(wide)} or have the dtype of x, got {name_of(state.dtype)}")
    check_written("state", state)
    check_undifferentiated("state", state, x, dt, A, B, C, D, z, dt_bias)
