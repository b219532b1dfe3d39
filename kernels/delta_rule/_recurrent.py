"""The recurrence itself, token by token, for decoding:

    S ← e^{g_t} S;  δ = β_t (v_t − Sᵀ k_t);  o_t = scale · (Sᵀ q_t + ⟨k_t, q_t⟩ δ);  S ← S + k_t δᵀ

so that one pass over S serves both products. Bytes at best: the state once each way, 8 K V per head and sequence.
"""

import triton
import triton.language as tl
from pyrepr.kernels.delta_rule._shared import program_place


@triton.jit(do_not_specialize=["has_initial", "packed", "T", "H", "HV", "gate", "normalize"])
def recurrent_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    g,  # [B, T, HV] (gate 1) or [B, T, HV, K] (gate 2) float32
    beta,  # [B, T, HV] float32
    initial,  # [N, HV, K, V] float32
    final,  # out, may be `initial`: [N, HV, K, V] float32
    o,  # out: [B, T, HV, V]
    cu_seqlens,  # [N + 1]
    has_initial,
    packed,
    T,
    H,
    HV,
    K,
    V,
    qb,
    qt,
    qh,
    kb,
    kt,
    kh,
    vb,
    vt,
    vh,
    scale,
    gate,
    normalize,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """BV value columns of one head of one sequence."""
    block, hv, sequence = program_place(tl.cdiv(V, BV), HV)
    h = hv // (HV // H)
    batch = sequence
    first = sequence * 0
    length = first + T
    if packed:
        batch = first
        first = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - first
    keys = tl.arange(0, BK)
    columns = block * BV + tl.arange(0, BV)
    in_k = keys < K
    in_v = columns < V
    mask = in_k[:, None] & in_v[None, :]
    at = (sequence * HV + hv) * K * V + keys[:, None] * V + columns[None, :]
    s = tl.load(initial + at, mask=(keys < K * has_initial)[:, None] & in_v[None, :], other=0.0)
    q += batch * qb + h * qh
    k += batch * kb + h * kh
    v += batch * vb + hv * vh
    for t in range(0, length.to(tl.int32)):
        at_t = first + t
        token = (batch * T + at_t) * HV + hv
        key = tl.load(k + at_t * kt + keys, mask=in_k, other=0.0).to(tl.float32)
        query = tl.load(q + at_t * qt + keys, mask=in_k, other=0.0).to(tl.float32)
        value = tl.load(v + at_t * vt + columns, mask=in_v, other=0.0).to(tl.float32)
        rate = tl.load(beta + token)
        if normalize:
            key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
            query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
        if gate == 1:
            s *= tl.exp(tl.load(g + token))
        if gate == 2:
            s *= tl.exp(tl.load(g + token * K + keys, mask=in_k, other=0.0))[:, None]
        read = tl.sum(s * query[:, None], 0)
        delta = rate * (value - tl.sum(s * key[:, None], 0))
        out = scale * (read + tl.sum(key * query, 0) * delta)
        tl.store(o + token * V + columns, out.to(o.dtype.element_ty), mask=in_v)
        s += key[:, None] * delta[None, :]
    tl.store(final + at, s, mask=mask)
