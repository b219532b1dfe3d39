"""Gradients of a chunk's q, k, g and beta, for all chunks at once, from what the scans left behind.

S before the chunk, dS' after it, V' and dR from ``_scan``; q and k normalised where asked for, dO times scale:

    D = tril(dO V'ᵀ) ∘ Γ                          M = −tril(dR V'ᵀ, −1) ∘ Γ
    dQ = diag(e^G) dO Sᵀ + D K                    Z = M K − diag(e^G) dR Sᵀ
    Y = diag(e^{G_C − G}) V' dS'ᵀ                 dK = diag(β) Z + Y + Dᵀ Q + Mᵀ diag(β) K
    dβ = rowsum(dR ∘ V + Z ∘ K)
    dG = rowsum(dQ ∘ Q + β Z ∘ K − (dK − β Z) ∘ K),  dG_last += e^{G_C} ⟨S, dS'⟩ + Σ Y ∘ K,  dg = reverse cumsum of dG

No decay stands in the diagonal of D and in the last row of Y. They would enter dG with both signs, and leave their
rounding there, which a fast decay makes the largest part: dG is made without them.

A program takes some columns of the keys, walks the value columns, and adds up the value heads that share a query and
key head. Sums over the key columns leave as one partial sum per block of them.

Work per chunk and value head: 3 C K V + 2 C² V ⌈K / BK⌉ + 4 C² K multiply-adds; bytes at best, 16-bit: 4 K V + 8 C V +
8 C K.
"""

import triton
import triton.language as tl
from pyrepr.kernels.delta_rule._prepare import FACTORS
from pyrepr.kernels.delta_rule._shared import chunk_place, load_tile, log_decays, product, program_place, store_tile


@triton.jit
def _through_values(
    grad_o,  # this and the others at the chunk's first token, or its state
    values,
    residuals,
    v,
    states,
    grad_states,
    step,  # from a token to the next, but for v
    vt,
    rows,
    K,
    k0,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
):
    """Over the value columns: dO V'ᵀ, dR V'ᵀ, dO Sᵀ, dR Sᵀ, V' dS'ᵀ, the column sums of S ∘ dS', rowsum(dR ∘ V)."""
    d = tl.zeros([C, C], tl.float32)
    m = tl.zeros([C, C], tl.float32)
    own_q = tl.zeros([C, BK], tl.float32)
    z = tl.zeros([C, BK], tl.float32)
    y = tl.zeros([C, BK], tl.float32)
    inner = tl.zeros([BK], tl.float32)
    d_rate = tl.zeros([C], tl.float32)
    for v0 in tl.range(0, V, BV, disable_licm=True):
        do = load_tile(grad_o + v0, step, rows, V - v0, 0, C, 0, BV)
        new = load_tile(values + v0, step, rows, V - v0, 0, C, 0, BV)
        dr = load_tile(residuals + v0, step, rows, V - v0, 0, C, 0, BV)
        s = load_tile(states + v0 * K + k0, K, V - v0, K - k0, 0, BV, 0, BK)
        ds = load_tile(grad_states + v0 * K + k0, K, V - v0, K - k0, 0, BV, 0, BK)
        d += product(do, tl.trans(new))
        m += product(dr, tl.trans(new))
        own_q += product(do, s)
        z += product(dr, s)
        y += product(new, ds)
        if GATED:
            inner += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 0)
        if k0 == 0:
            value = load_tile(v + v0, vt, rows, V - v0, 0, C, 0, BV).to(tl.float32)
            d_rate += tl.sum(dr.to(tl.float32) * value, 1)
    return d, m, own_q, z, y, inner, d_rate


@triton.jit
def _decayed(d, m, own_q, z, y, g, factor, rows, HV, C: tl.constexpr):
    """D, M, and the first parts of dQ, Z and Y with their decays."""
    gamma = tl.exp(log_decays(g, HV, rows, C))
    decay = tl.load(factor)
    return d * gamma, m * gamma, own_q * decay[:, None], z * decay[:, None], y * tl.load(factor + C)[:, None]


@triton.jit(do_not_specialize=["packed", "B", "T", "NT", "H", "HV"])
def gradient_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    g,  # [B, T, HV]
    beta,  # [B, T, HV]
    factors,  # [chunks, HV, FACTORS, C]
    grad_o,  # [B, T, HV, V]
    states,  # [chunks, HV, V, K]
    grad_states,  # [chunks, HV, V, K]
    values,  # [B, T, HV, V]
    residuals,  # [B, T, HV, V]
    grad_q,  # out: [B, T, H, K], of the normalised q
    grad_k,  # out: [B, T, H, K], of the normalised k
    grad_beta,  # out: [⌈K / BK⌉, B, T, HV]
    grad_g,  # out: [⌈K / BK⌉, B, T, HV]
    chunks,  # [chunks, 2] of packed sequences
    packed,
    B,
    T,
    NT,
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
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
):
    """BK key columns of one chunk of one query and key head."""
    group = HV // H
    blocks = tl.cdiv(K, BK)
    block, h, slot = program_place(blocks, H)
    batch, first, rows = chunk_place(slot, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    k0 = block * BK
    t = tl.arange(0, C)
    live = t < rows
    tokens = batch * T + first
    v += batch * vb + first * vt
    partial = block.to(tl.int64) * B * T * HV
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    for j in tl.range(0, group, disable_licm=True):
        hv = h * group + j
        token = tokens * HV + hv
        at = slot * HV + hv
        where = token * V
        state = at * V * K
        d, m, own_q, z, y, inner, d_rate = _through_values(
            grad_o + where,
            values + where,
            residuals + where,
            v + hv * vh,
            states + state,
            grad_states + state,
            HV * V,
            vt,
            rows,
            K,
            k0,
            V,
            C,
            BK,
            BV,
            GATED,
        )
        q_rows = load_tile(q + batch * qb + first * qt + h * qh + k0, qt, rows, K - k0, 0, C, 0, BK)
        k_rows = load_tile(k + batch * kb + first * kt + h * kh + k0, kt, rows, K - k0, 0, C, 0, BK)
        rate = tl.load(beta + token + t * HV, mask=live, other=0.0)
        factor = factors + at * FACTORS * C + t
        d = tl.where(t[:, None] >= t[None, :], d * scale, 0.0)
        m = tl.where(t[:, None] > t[None, :], -m, 0.0)
        own_q *= scale
        z = -z
        norm_k = tl.load(factor + 2 * C)
        norm_q = tl.load(factor + 3 * C)
        if GATED:
            own = tl.sum(tl.where(t[:, None] == t[None, :], d, 0.0), 1)
            dq += (own * norm_k)[:, None] * k_rows.to(tl.float32)
            dk += (own * norm_q)[:, None] * q_rows.to(tl.float32)
            d = tl.where(t[:, None] > t[None, :], d, 0.0)
            d, m, own_q, z, y = _decayed(d, m, own_q, z, y, g + token, factor, rows, HV, C)
        unit_k = k_rows.to(tl.float32) * norm_k[:, None]
        own_q += product((d * norm_k[None, :]).to(k_rows.dtype), k_rows)
        z += product((m * norm_k[None, :]).to(k_rows.dtype), k_rows)
        d_rate += tl.sum(z * unit_k, 1)
        tl.store(grad_beta + partial + token + t * HV, d_rate, mask=live)
        z *= rate[:, None]
        if GATED:
            earlier = tl.where(t < rows - 1, tl.sum(y * unit_k, 1), 0.0)
            end = tl.sum(inner, 0) * tl.load(factors + at * FACTORS * C + C - 1) + tl.sum(earlier, 0)
        y += product(tl.trans(d * norm_q[:, None]).to(k_rows.dtype), q_rows)
        y += product(tl.trans(m * (rate * norm_k)[:, None]).to(k_rows.dtype), k_rows)
        if GATED:
            sums = tl.sum(own_q * q_rows.to(tl.float32), 1) * norm_q + tl.sum(z * unit_k, 1)
            sums -= tl.where(t < rows - 1, tl.sum(y * unit_k, 1), 0.0)  # the last token's is Y alone
            dg = tl.cumsum(sums, 0, reverse=True) + end
            tl.store(grad_g + partial + token + t * HV, dg, mask=live)
        dq += own_q
        dk += z + y
    out = (tokens * H + h) * K + k0
    store_tile(grad_q + out, H * K, rows, K - k0, 0, C, 0, BK, dq)
    store_tile(grad_k + out, H * K, rows, K - k0, 0, C, 0, BK, dk)


@triton.jit(do_not_specialize=["T", "H", "count"])
def norm_gradient_kernel(
    x,  # [B, T, H, K]
    grad,  # [B, T, H, K] contiguous: gradient of x / |x|, replaced by that of x
    T,
    H,
    K,
    count,
    xb,
    xt,
    xh,
    R: tl.constexpr,
    BK: tl.constexpr,
):
    """R rows through x ↦ x / √(Σ x² + 1e-6)."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, BK)
    mask = (r < count)[:, None] & (c < K)[None, :]
    at = r // H // T * xb + r // H % T * xt + r % H * xh
    own = tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    out = grad + r[:, None] * K + c[None, :]
    gradient = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(own * own, 1) + 1e-6)[:, None]
    unit = own * norm
    gradient = norm * (gradient - unit * tl.sum(unit * gradient, 1)[:, None])
    tl.store(out, gradient.to(grad.dtype.element_ty), mask=mask)
