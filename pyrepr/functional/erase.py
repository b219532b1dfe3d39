"""Delta rules that read what they erase along a vector of its own: Comba and Gated DeltaNet-2.

    Comba:               S ← e^{g_t}·S + β_t k_t (v_t − Sᵀ p_t)ᵀ                o_t = scale · Sᵀ q_t
    Gated DeltaNet-2:    S ← e^{g_t}·S;   S ← S + k_t (w_t v_t − Sᵀ (b_t k_t))ᵀ

Names, order and meaning of arguments are those of flash-linear-attention 0.6. On a CPU they run on the kernels of
:func:`pyrepr.chunk_gated_delta_rule` and :func:`pyrepr.chunk_kda`, forward and backward. There is no kernel for a GPU:
there they are computed in chunks in plain PyTorch, which takes memory for 15 to 40 tensors as large as q, and 40 to 65
with a gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrepr._checks import check_device, check_shape, check_tensor
from pyrepr.functional._delta_rule import check_state, of_one_dtype, prepared
from pyrepr.functional._delta_rule_extras import Extras, activated, check_alone, check_options, or_ones
from pyrepr.ops.delta_rule import delta_rule_apart
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import Gate, l2norm

__all__ = ["chunk_comba", "chunk_gdn2", "fused_recurrent_comba", "fused_recurrent_gdn2"]


def chunk_comba(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    p: Tensor | None,  # [B, T, H, K]
    g: Tensor,  # [B, T, HV]
    beta: Tensor | None = None,  # [B, T, HV]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """Comba (Hu et al. 2025, "Improving Bilinear RNNs with Closed-loop Control").

    As in the kernels of flash-linear-attention the erase reads the state before its decay.

    Args:
        p: [B, T, H, K], along which the state is read for the erase; ``None``: k.
        beta: [B, T, HV]; default 1.
        use_qk_l2norm_in_kernel: p is divided by its length as well as q and k; default no.

    Everything else, and what is returned and raised, is as in :func:`pyrepr.chunk_gated_delta_rule`.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, _ = pyrepr.functional.chunk_comba(q, k / 4, v, k / 8, g, beta)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    beta = or_ones(beta, v, False)
    given = (q, k, v, g, beta, scale, initial_state, cu_seqlens, Gate.PER_HEAD)
    q, k, v, scale, shape = prepared(*given)
    check_options(Extras(cu_seqlens_cpu=cu_seqlens_cpu), cu_seqlens)
    p = k if p is None else check_tensor("p", p)
    check_device("p", p, "q", q)
    check_shape("p", p, "[B, T, H, K]", tuple(q.shape))
    p, normalize = of_one_dtype("p", p, v), bool(use_qk_l2norm_in_kernel)
    o, state = delta_rule_apart(
        q, k, v, g, beta, p, initial_state, cu_seqlens, scale, normalize, undecayed=True, state_shape=shape
    )
    return o, state if output_final_state else None


def fused_recurrent_comba(
    q: Tensor,
    k: Tensor,
    p: Tensor | None,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_comba`, with p before v.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> o, _ = pyrepr.functional.fused_recurrent_comba(q, k, k / 2, v, g=-torch.rand(1, 1, 2))
        >>> o.shape
        torch.Size([1, 1, 2, 16])
    """
    final, normalize = output_final_state, use_qk_l2norm_in_kernel
    return chunk_comba(q, k, v, p, g, beta, scale, initial_state, final, normalize, cu_seqlens)


def chunk_gdn2(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV, K]
    b: Tensor,  # [B, T, HV, K]
    w: Tensor,  # [B, T, HV, V]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: None = None,
    *,
    A_log: Tensor | None = None,  # [HV]
    dt_bias: Tensor | None = None,  # [HV · K]
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """Gated DeltaNet-2, a rule with gates of its own for what is erased and what is written. With b and w both one
    number a head it is Kimi Delta Attention.

    Args:
        g: [B, T, HV, K], natural logarithm of the decay of every row of the state before each token.
        b: [B, T, HV, K], how much of what is read along each key channel is erased; 0 to 1 is meant.
        w: [B, T, HV, V], how much of each value channel is written; 0 to 1 is meant.
        use_gate_in_kernel, safe_gate, lower_bound, A_log, dt_bias, disable_recompute, return_intermediate_states,
            cp_context: as in :func:`pyrepr.chunk_kda`.

    Everything else, and what is returned and raised, is as in :func:`pyrepr.chunk_kda`. q, k and v are widened to
    float32 on the way.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, b, w = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2, 16)
        >>> o, _ = pyrepr.functional.chunk_gdn2(q, k, v, g, b, w, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    check_alone(cp_context, return_intermediate_states)
    ones = or_ones(None, v, False)
    turned = initial_state.mT if state_v_first and isinstance(initial_state, Tensor) else initial_state
    q, k, v, scale, shape = prepared(q, k, v, g, ones, scale, None, cu_seqlens, Gate.PER_KEY)
    if initial_state is not None:
        axes = "[N, HV, V, K]" if state_v_first else "[N, HV, K, V]"
        check_state(
            "initial_state", initial_state, v, (*shape[:2], shape[3], shape[2]) if state_v_first else shape, axes
        )
    for name, x, symbols, wanted in (("b", b, "[B, T, HV, K]", g.shape), ("w", w, "[B, T, HV, V]", v.shape)):
        check_device(name, check_tensor(name, x), "q", q)
        check_shape(name, x, symbols, tuple(wanted))
    more = Extras(bool(use_gate_in_kernel), A_log, dt_bias, lower_bound, safe_gate, cu_seqlens_cpu=cu_seqlens_cpu)
    check_options(more, cu_seqlens)
    g, ones = activated(more, v, g, ones, Gate.PER_KEY)
    dtype = compute_dtype(v.dtype)
    wide: list[Any] = [x.to(dtype) for x in (q, k)]
    if use_qk_l2norm_in_kernel:
        wide = [l2norm(x) for x in wide]
    p = b.to(dtype) * wide[1].repeat_interleave(shape[1] // k.shape[2], 2)
    values, options = w.to(dtype) * v.to(dtype), {"undecayed": False, "state_shape": shape}
    o, state = delta_rule_apart(*wide, values, g, ones, p, turned, cu_seqlens, scale, False, **options)
    last = state.mT if state_v_first else state
    return o.to(v.dtype), last if output_final_state else None


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`chunk_gdn2`, with its arguments in another order.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> g, b, w = -torch.rand(1, 1, 2, 16), torch.rand(1, 1, 2, 16), torch.rand(1, 1, 2, 16)
        >>> o, _ = pyrepr.functional.fused_recurrent_gdn2(q, k, v, g, b, w)
        >>> o.shape
        torch.Size([1, 1, 2, 16])
    """
    options: dict[str, Any] = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
    options |= {"use_gate_in_kernel": use_gate_in_kernel, "state_v_first": state_v_first, "cu_seqlens": cu_seqlens}
    final, normalize = output_final_state, use_qk_l2norm_in_kernel
    return chunk_gdn2(q, k, v, g, b, w, scale, initial_state, final, normalize, **options)
