"""Linear attention with the delta rule: plain, gated, and with a gate per key channel (KDA).

    S ← e^{g_t}·S;   S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ;   o_t = scale · Sᵀ q_t

Names, arguments and layouts are those of flash-linear-attention, so that models written for it run unchanged. The
``chunk_`` and the ``fused_recurrent_`` functions compute the same thing: the kernels take the form that suits the
length.
"""

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

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
]


def _check(q, k, v, g, beta, initial_state, cu_seqlens, gate: Gate) -> tuple[int, int, int, int]:
    """The shape of the state. One sentence per failure: the argument, what is expected, what came."""
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), ("g", g if gate != Gate.NONE else beta)):
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
    check_shape("beta", beta, "[B, T, HV]", (batch, total, value_heads))
    if gate == Gate.PER_HEAD:
        check_shape("g", g, "[B, T, HV]", (batch, total, value_heads))
    elif gate == Gate.PER_KEY:
        check_shape("g", g, "[B, T, HV, K]", (batch, total, value_heads, width))
    sequences = batch if cu_seqlens is None else check_cu_seqlens(cu_seqlens, "q", q)
    state = (sequences, value_heads, width, value_width)
    if initial_state is not None:
        _check_state("initial_state", initial_state, v, state)
    return state


def _check_state(name: str, state: object, v: Tensor, shape: tuple[int, ...]) -> None:
    state = check_tensor(name, state)
    check_device(name, state, "v", v)
    check_shape(name, state, "[N, HV, K, V]", shape)
    wanted = compute_dtype(v.dtype)
    if state.dtype != wanted:
        raise TypeError(f"{name} must be {name_of(wanted)} for v of {name_of(v.dtype)}, got {name_of(state.dtype)}")


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one dtype: v's under autocast, else they must agree already."""
    if q.dtype == v.dtype == k.dtype:
        return q, k, v
    if torch.is_autocast_enabled(v.device.type):
        return q.to(v.dtype), k.to(v.dtype), v
    name, x = ("q", q) if q.dtype != v.dtype else ("k", k)
    raise TypeError(f"{name} must have the dtype of v, {name_of(v.dtype)}, got {name_of(x.dtype)}")


def _run(
    q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm, cu_seqlens, gate, out_state=None
) -> tuple[Tensor, Tensor | None]:
    l2norm = bool(use_qk_l2norm)
    given = (q, k, v, g, beta, scale, initial_state, out_state, l2norm, gate)
    if out_state is not None:
        if cu_seqlens is not None:
            return _update(*given, cu_seqlens)
        # In one line: nothing may go wrong between the state's move and the return.
        return done if (done := step(*given)) is not None else _update(*given)
    done = None if cu_seqlens is not None else step(*given)
    if done is None:
        q, k, v, scale, shape = _prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens, gate)
        done = delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm, shape)
    return done if output_final_state else (done[0], None)


def _prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens, gate):
    """q, k and v of one dtype, the scale as a number and the shape of the state, all of it checked."""
    shape = _check(q, k, v, g, beta, initial_state, cu_seqlens, gate)
    q, k, v = _one_dtype(q, k, v)
    if scale is not None and not hasattr(scale, "__float__"):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    return q, k, v, shape[2] ** -0.5 if scale is None else float(scale), shape


def _update(q, k, v, g, beta, scale, initial_state, out_state, l2norm, gate, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    q, k, v, scale, shape = _prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens, gate)
    _check_state("out_state", out_state, v, shape)
    check_written("out_state", out_state)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state, out_state)
    ):
        raise RuntimeError("out_state is written in place and cannot be differentiated; use it under torch.no_grad()")
    return update_op_(out_state, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm), out_state


def chunk_delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    beta: Tensor,  # [B, T, HV]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """The plain delta rule.

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".

    Args:
        q, k: [B, T, H, K]; float32, bfloat16 or float16 on the kernels, float64 in the reference; any strides.
        v: [B, T, HV, V] of the same dtype. HV is a multiple of H; value head i uses query and key head i // (HV // H).
        beta: [B, T, HV], the step size; 0 to 2 is meant (above 1 the state can flip sign along a key), any is computed.
        scale: factor on q. Default K^−½, as in softmax attention.
        initial_state: [N, HV, K, V] in float32 (float64 for float64 inputs), N the sequences. Default zero.
        output_final_state: return the state after the last token as well; default no.
        use_qk_l2norm_in_kernel: q and k are divided by √(Σ x² + 1e-6) first; default no.
        cu_seqlens: [N + 1] int32 or int64; with B = 1, sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1], which
            may be none. Default: every row of the batch is a sequence.

    Returns:
        o: [B, T, HV, V] in v's dtype, and the final state in float32 (float64 for float64 inputs), or ``None``.
        Differentiable in q, k, v, beta and initial_state, any number of times, forward and reverse, and under
        ``torch.func``, whose ``vmap`` becomes part of the batch (with cu_seqlens it loops). First derivatives in
        reverse run on the kernels; forward mode and higher orders go through the chunk form in plain PyTorch, which
        takes some ten times as long as its first derivative, and memory for 300 to 500 tensors as large as q. 16-bit
        inputs are accumulated in float32. On processors with 16-bit dot products (AVX-512 VNNI and BF16) bf16 inputs
        use them where there is no gate per key, with errors well below what rounding o to bf16 costs.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range. NaN is not an error: it
            stays in its sequence and head. On the CPU outputs before a number that is not finite, or an overflow, are
            as without it; GPU kernels multiply triangles of a chunk with their zeros, so there it may reach the tokens
            before it in its chunk of 64.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> beta = torch.rand(1, 100, 2)
        >>> o, state = pyrepr.chunk_delta_rule(
        ...     q, k, v, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True
        ... )
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    return _run(
        q, k, v, None, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, Gate.NONE
    )


def chunk_gated_delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV]
    beta: Tensor,  # [B, T, HV]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """The gated delta rule (Yang et al. 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule").

    Args:
        g: [B, T, HV], natural logarithm of the decay of the state before each token. Meant to be ≤ 0; growth (g > 0) is
            computed too, and overflows where e^g does. Any floating dtype.

    Everything else, and what is returned and raised, is as in :func:`chunk_delta_rule`; also differentiable in g.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, _ = pyrepr.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    return _run(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, Gate.PER_HEAD
    )


def chunk_kda(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV, K]
    beta: Tensor,  # [B, T, HV]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """Kimi Delta Attention (Kimi Team 2025, "Kimi Linear"): every key channel has its own decay.

    Args:
        g: [B, T, HV, K], natural logarithm of the decay of every row of the state before each token.

    Everything else, and what is returned and raised, is as in :func:`chunk_delta_rule`; also differentiable in g.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2)
        >>> o, _ = pyrepr.chunk_kda(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    return _run(
        q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, Gate.PER_KEY
    )


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    out_state: Tensor | None = None,  # [N, HV, K, V]
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_delta_rule` for decoding.

    Args:
        out_state: [N, HV, K, V], dtype of the state. If given, the final state is written there and returned; it may be
            ``initial_state`` itself, which is then updated in place. Not differentiable.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> o, state = pyrepr.fused_recurrent_delta_rule(
        ...     q, k, v, beta=torch.rand(1, 1, 2), initial_state=state, output_final_state=True
        ... )
    """
    return _run(
        q,
        k,
        v,
        None,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        Gate.NONE,
        out_state,
    )


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gated_delta_rule` for decoding; ``out_state`` as in :func:`fused_recurrent_delta_rule`.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> o, state = pyrepr.fused_recurrent_gated_delta_rule(
        ...     q, k, v, g=-torch.rand(1, 1, 2), beta=torch.rand(1, 1, 2), initial_state=state, output_final_state=True
        ... )
    """
    return _run(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        Gate.PER_HEAD,
        out_state,
    )


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_kda` for decoding; ``out_state`` as in :func:`fused_recurrent_delta_rule`.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> o, _ = pyrepr.fused_recurrent_kda(q, k, v, g=-torch.rand(1, 1, 2, 16), beta=torch.rand(1, 1, 2))
        >>> o.shape
        torch.Size([1, 1, 2, 16])
    """
    return _run(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        Gate.PER_KEY,
        out_state,
    )
