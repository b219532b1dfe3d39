"""Linear attention with the delta rule: plain, gated, and with a gate per key channel (KDA).

    S ← e^{g_t}·S;   S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ;   o_t = scale · Sᵀ q_t

Names, order and meaning of arguments are those of flash-linear-attention 0.6, so that models and layers written for it
run unchanged; what is not there, and what some of its functions lack, is keyword-only. The ``chunk_`` and the
``fused_recurrent_`` functions compute the same thing: the kernels take the form that suits the length.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrepr.functional._delta_rule_extras import call, check_alone, extras, or_ones
from pyrepr.reference.delta_rule import Gate

__all__ = [
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
]


def chunk_delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    beta: Tensor,  # [B, T, HV] or [B, T, HV, V]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    *,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """The plain delta rule.

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length".

    Args:
        q, k: [B, T, H, K]; float32, bfloat16 or float16 on the kernels, float64 in the reference; any strides.
        v: [B, T, HV, V] of the same dtype. HV is a multiple of H; value head i uses query and key head i // (HV // H).
        beta: [B, T, HV], the step size; 0 to 2 is meant (above 1 the state can flip sign along a key), any is computed.
            Or [B, T, HV, V], one per value channel: every channel then is a head of its own, which takes V times the
            work of the keys.
        scale: factor on q. Default K^−½, as in softmax attention.
        initial_state: [N, HV, K, V] in float32 (float64 for float64 inputs), N the sequences. Default zero.
        output_final_state: return the state after the last token as well; default no.
        use_qk_l2norm_in_kernel: q and k are divided by √(Σ x² + 1e-6) first; default no.
        cu_seqlens: [N + 1] int32 or int64; with B = 1, sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1], which
            may be none. Default: every row of the batch is a sequence.
        cu_seqlens_cpu: the same numbers on the CPU, which saves waiting for a GPU; default none.
        use_beta_sigmoid_in_kernel: the step size is sigmoid(beta), in float32; default no. With allow_neg_eigval twice
            that (Grazzi et al. 2025); default no.
        state_v_first: states are [N, HV, V, K], the final one a view of [N, HV, K, V]; default no.
        chunk_size: 16, 32 or 64; default ``None``. Checked, and then the kernels' own: results do not depend on it.

    Returns:
        o: [B, T, HV, V] in v's dtype, and the final state in float32 (float64 for float64 inputs), or ``None``.
        Differentiable in q, k, v, beta and initial_state, any number of times, forward and reverse, and under
        ``torch.func``, whose ``vmap`` becomes part of the batch (with cu_seqlens it loops). First derivatives in
        reverse run on the kernels; forward mode and higher orders go through the chunk form in plain PyTorch, which
        takes some ten times as long as its first derivative, and memory for 300 to 500 tensors as large as q. 16-bit
        inputs are computed in float32. For a derivative the forward keeps √n states of n chunks of 32 tokens, and on a
        CPU a float32 number for each of v, which the backward else computes again.

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
    more = extras(
        beta,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
    )
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    return call(more, q, k, v, None, beta, scale, initial_state, final, normalize, cu_seqlens, Gate.NONE)


def chunk_gated_delta_rule(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV]
    beta: Tensor,  # [B, T, HV] or [B, T, HV, V]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    chunk_indices: Tensor | None = None,
    cp_context: None = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,  # [HV]
    dt_bias: Tensor | None = None,  # [HV]
    gk: Tensor | None = None,  # [B, T, HV, K]
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """The gated delta rule (Yang et al. 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule").

    Args:
        g: [B, T, HV], natural logarithm of the decay of the state before each token. Meant to be ≤ 0; growth (g > 0) is
            computed too, and overflows where e^g does. Any floating dtype.
        use_gate_in_kernel: g is what comes before: the decay is −exp(A_log) · softplus(g + dt_bias), in float32
            (float64 for float64 inputs); default no. A_log: [HV], needed then. dt_bias: [HV], default zero.
        gk: [B, T, HV, K], in the place of g, which is ``None`` then: a decay per key channel, as in :func:`chunk_kda`.
        chunk_indices: accepted, and not needed. cp_context: must be ``None``: sequences are not split over processes.

    Everything else, and what is returned and raised, is as in :func:`chunk_delta_rule`; also differentiable in g, gk,
    A_log and dt_bias.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, _ = pyrepr.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    check_alone(cp_context)
    more = extras(
        beta,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        gk=gk,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
    )
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    return call(more, q, k, v, g, beta, scale, initial_state, final, normalize, cu_seqlens, Gate.PER_HEAD)


def chunk_kda(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV, K]
    beta: Tensor,  # [B, T, HV] or [B, T, HV, V]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    cp_context: None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,  # [HV]
    dt_bias: Tensor | None = None,  # [HV · K]
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """Kimi Delta Attention (Kimi Team 2025, "Kimi Linear"): every key channel has its own decay.

    Args:
        g: [B, T, HV, K], natural logarithm of the decay of every row of the state before each token.
        use_gate_in_kernel: as in :func:`chunk_gated_delta_rule`, with dt_bias [HV · K] (or [HV, K]); default no.
        lower_bound: negative; the gate is lower_bound · sigmoid(exp(A_log) · (g + dt_bias)) instead, and A_log may be
            ``None``, for 0. Default none.
        safe_gate: says that decays are bounded: with use_gate_in_kernel lower_bound must be from −5 to below 0. The
            kernels need no such promise; default no.
        disable_recompute, use_graph, max_num_seqs: accepted; they change how another implementation computes the same.
        return_intermediate_states: must be False: ``output_states`` of :func:`fused_recurrent_kda` returns states.
        cp_context: as in :func:`chunk_gated_delta_rule`.

    Everything else, and what is returned and raised, is as in :func:`chunk_delta_rule`; also differentiable in g, A_log
    and dt_bias.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2)
        >>> o, _ = pyrepr.chunk_kda(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    check_alone(cp_context, return_intermediate_states)
    more = extras(
        beta,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        safe_gate=safe_gate,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
    )
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    return call(more, q, k, v, g, beta, scale, initial_state, final, normalize, cu_seqlens, Gate.PER_KEY)


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
    out_state: Tensor | None = None,  # [N, HV, K, V]
    state_indices: Tensor | None = None,  # [N]
    output_states: str | int | None = None,
) -> Any:  # [B, T, HV, V], [N, HV, K, V], and with output_states these
    """:func:`chunk_delta_rule` for decoding, and for states as serving needs them.

    Args:
        beta: default 1.
        out_state: [N, HV, K, V], dtype of the state. If given, the final state is written there and returned; it may be
            ``initial_state`` itself, which is then updated in place. Not differentiable.
        state_indices: [N] int32 or int64. If given, initial_state is a pool [P, HV, K, V]: sequence i starts from row
            state_indices[i], a different one for each i, and its final state is written there (or, if out_state is
            given, into that row of it, of the same shape); the pool is returned. With −1 a sequence is skipped: its
            outputs are 0 and nothing is written. Rows are written last, all at once. Not differentiable.
        output_states: a number n of tokens, or ``"every token"``. If given, a third result are the states after each of
            the last n tokens, [N, n, HV, K, V], the newest last, where a sequence has fewer its initial state; or those
            after every token, [B, T, HV, K, V]. To go back by r tokens is to take ``states[:, -1 - r]``. These tokens
            are computed one by one, with bits that depend on no later token. All states together may take 2 GiB.
            Default none.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> o, state = pyrepr.fused_recurrent_delta_rule(
        ...     q, k, v, beta=torch.rand(1, 1, 2), initial_state=state, output_final_state=True
        ... )
    """
    beta = or_ones(beta, v, use_beta_sigmoid_in_kernel)
    more = extras(
        beta,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
        state_indices=state_indices,
        output_states=output_states,
    )
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    return call(more, q, k, v, None, beta, scale, initial_state, final, normalize, cu_seqlens, Gate.NONE, out_state)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
    out_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    output_states: str | int | None = None,
) -> Any:
    """:func:`chunk_gated_delta_rule` for decoding; what is new here is as in :func:`fused_recurrent_delta_rule`.

    Args:
        g: default no decay. gk: as there; not together with g.
        gv: [B, T, HV, V], a decay per value channel, on top of g or gk; computed as a beta per value channel is.
            Default none.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> o, state = pyrepr.fused_recurrent_gated_delta_rule(
        ...     q, k, v, g=-torch.rand(1, 1, 2), beta=torch.rand(1, 1, 2), initial_state=state, output_final_state=True
        ... )
    """
    beta = or_ones(beta, v, use_beta_sigmoid_in_kernel)
    more = extras(
        beta,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        gk=gk,
        gv=gv,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
        state_indices=state_indices,
        output_states=output_states,
    )
    gate = Gate.NONE if g is None else Gate.PER_HEAD
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    return call(more, q, k, v, g, beta, scale, initial_state, final, normalize, cu_seqlens, gate, out_state)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    safe_gate: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int | None = None,
    out_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    output_states: str | int | None = None,
) -> Any:
    """:func:`chunk_kda` for decoding; what is new here is as in :func:`fused_recurrent_delta_rule`.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> o, _ = pyrepr.fused_recurrent_kda(q, k, v, g=-torch.rand(1, 1, 2, 16), beta=torch.rand(1, 1, 2))
        >>> o.shape
        torch.Size([1, 1, 2, 16])
    """
    beta = or_ones(beta, v, use_beta_sigmoid_in_kernel)
    more = extras(
        beta,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        safe_gate=safe_gate,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=chunk_size,
        state_indices=state_indices,
        output_states=output_states,
    )
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    return call(more, q, k, v, g, beta, scale, initial_state, final, normalize, cu_seqlens, Gate.PER_KEY, out_state)
