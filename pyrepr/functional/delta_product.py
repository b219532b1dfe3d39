"""DeltaProduct: several steps of the delta rule for every token, plain or gated.

    S ← e^{g_t}·S;   n times:  S ← S + β_ti k_ti (v_ti − Sᵀ k_ti)ᵀ;   o_t = scale · Sᵀ q_t

Names, order and meaning of arguments are those of flash-linear-attention 0.6.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from pyrepr._checks import INTEGERS, check_device, check_shape, check_tensor, shape_of, shown
from pyrepr.functional._delta_rule_extras import call, check_alone, extras
from pyrepr.reference.delta_rule import Gate

__all__ = ["chunk_gated_delta_product"]


def chunk_gated_delta_product(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T · n, H, K]
    v: Tensor,  # [B, T · n, HV, V]
    g: Tensor | None,  # [B, T, HV]
    beta: Tensor,  # [B, T · n, HV]
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    cp_context: None = None,
    *,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    out_state: Tensor | None = None,  # [N, HV, K, V]
    output_states: str | int | None = None,
) -> Any:  # [B, T, HV, V], [N, HV, K, V]
    """The delta rule with n steps a token: the state's transition is a product of n generalised Householder matrices
    (Siems et al. 2025, "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products").

    It runs as a delta rule over T · n tokens, of which only every n-th is read and has a decay: it takes n times as
    long.

    Args:
        q: [B, T, H, K], read after the n steps of its token.
        k: [B, T · n, H, K], v: [B, T · n, HV, V], beta: [B, T · n, HV] (or [B, T · n, HV, V]): what the steps take, the
            n of a token one after the other.
        g: [B, T, HV], natural logarithm of the decay before a token's first step, or ``None`` for none.
        num_householder: n, at least 1.
        cu_seqlens: [N + 1], as in :func:`pyrepr.chunk_delta_rule`, counting tokens: it ends at T.
        cp_context: must be ``None``: sequences are not split over processes.
        out_state, output_states: as in :func:`pyrepr.fused_recurrent_delta_rule`; states are those after all n steps of
            a token, of which n times as many are computed.

    Everything else, and what is returned and raised, is as in :func:`pyrepr.chunk_gated_delta_rule`.

    Example:
        >>> q, (k, v) = torch.randn(1, 50, 2, 16), (torch.randn(1, 100, 2, 16) for _ in range(2))
        >>> g, beta = -torch.rand(1, 50, 2), 2 * torch.rand(1, 100, 2)
        >>> o, _ = pyrepr.functional.chunk_gated_delta_product(q, k, v, g, beta, 2, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([1, 50, 2, 16])
    """
    check_alone(cp_context)
    if isinstance(num_householder, bool) or not isinstance(num_householder, int) or num_householder < 1:
        raise ValueError(f"num_householder must be a positive integer, got {shown(num_householder)}")
    n, gate = num_householder, Gate.NONE if g is None else Gate.PER_HEAD
    _check_steps(q, k, v, g, beta, n)
    if n > 1:
        q = functional.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
        g = None if g is None else functional.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
        cu_seqlens = None if cu_seqlens is None else check_tensor("cu_seqlens", cu_seqlens, INTEGERS) * n
        if cu_seqlens_cpu is not None:
            cu_seqlens_cpu = check_tensor("cu_seqlens_cpu", cu_seqlens_cpu, INTEGERS) * n
    if isinstance(output_states, int) and not isinstance(output_states, bool):
        output_states *= n
    more = extras(
        beta,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        cu_seqlens_cpu=cu_seqlens_cpu,
        output_states=output_states,
    )
    normalize, final = use_qk_l2norm_in_kernel, output_final_state
    found = call(more, q, k, v, g, beta, scale, initial_state, final, normalize, cu_seqlens, gate, out_state)
    o, state, *every = found
    return found if n == 1 else (o[:, n - 1 :: n], state, *(x[:, n - 1 :: n] for x in every))


def _check_steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, n: int) -> None:
    """That there are n steps a token; the rule itself checks the rest."""
    for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), *(() if g is None else (("g", g),))):
        check_device(name, check_tensor(name, x), "q", q)
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, T, H, K], got {shape_of(q)}")
    batch, total, heads, width = q.shape
    check_shape("k", k, f"[B, T · {n}, H, K]", (batch, total * n, heads, width))
    if v.dim() != 4 or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must have shape [B, T · {n}, HV, V] with B = {batch} and T = {total} of q, got {shape_of(v)}"
        )
    if g is not None:
        check_shape("g", g, "[B, T, HV]", (batch, total, v.shape[2]))
    if beta.dim() != 4:
        check_shape("beta", beta, f"[B, T · {n}, HV]", tuple(v.shape[:3]))
