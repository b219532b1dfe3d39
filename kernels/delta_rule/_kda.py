"""What a gate per key (KDA) needs in place of ``_prepare`` and ``_gradient``: Γ_ij is a vector over the keys.

    A_ij = β_i Σ_d k_id k_jd e^{G_id − G_jd}       P_ij = scale · Σ_d q_id k_jd e^{G_id − G_jd}

Between two blocks of 16 tokens the exponent is cut in two at the later block's start: both factors are ≤ 1 for decays,
go into the operands, and the sum is a product of matrices. Inside a block the sum is taken key by key, with
e^{G_i − G_j} grown from j + 1 to j by a multiplication. The scans take q e^G, k e^G and k e^{G_C − G} ready-made.

Backward, D and M as in ``_gradient`` but without Γ:

    dQ_id = scale · e^{G_id} (dO Sᵀ)_id + Σ_j D_ij k_jd e^{G_id − G_jd}
    Z_id = Σ_j M_ij k_jd e^{G_id − G_jd} − e^{G_id} (dR Sᵀ)_id
    Y_jd = e^{G_Cd − G_jd} (V' dS'ᵀ)_jd        R_jd = Σ_i (D_ij q_id + M_ij β_i k_id) e^{G_id − G_jd}
    dK = β Z + Y + R        dG = dQ ∘ Q + β Z ∘ K − (Y + R) ∘ K,  dG_last += e^{G_C} ∘ rowsum(S ∘ dS') + Σ_j Y_j ∘ K_j
"""

import triton
import triton.language as tl
from pyrepr.kernels.delta_rule._prepare import FACTORS, invert, put_inverse
from pyrepr.kernels.delta_rule._shared import chunk_place, load_tile, product, program_place, store_tile


@triton.jit
def norms(x, stride, rows, K, r0: tl.constexpr, BLOCK: tl.constexpr):
    """1 / √(Σ x² + 1e-6) of 16 rows."""
    total = tl.zeros([16], tl.float32)
    for c in range(0, K, BLOCK):
        tile = load_tile(x, stride, rows, K, r0, 16, c, BLOCK).to(tl.float32)
        total += tl.sum(tile * tile, 1)
    return tl.rsqrt(total + 1e-6)


@triton.jit
def _upto(g, step, rows, K, r0, c, BLOCK: tl.constexpr):
    """Of 16 tokens from r0: the sum of g from r0 up to each."""
    return tl.cumsum(load_tile(g + r0 * step, step, rows - r0, K, 0, 16, c, BLOCK), 0)


@triton.jit
def _after(g, step, rows, K, r0, c, BLOCK: tl.constexpr):
    """Of 16 tokens from r0: the sum of g after each, to the last of the 16."""
    later = load_tile(g + (r0 + 1) * step, step, tl.minimum(rows - r0 - 1, 15), K, 0, 16, c, BLOCK)
    return tl.cumsum(later, 0, reverse=True)


@triton.jit
def _total(g, step, rows, K, r0, r1, c, C: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of g over tokens [r0, r1)."""
    return tl.sum(load_tile(g + r0 * step, step, tl.minimum(rows, r1) - r0, K, 0, C, c, BLOCK), 0)


@triton.jit
def _row(x, row, rows, step, K, c, BLOCK: tl.constexpr):
    """One token's columns from c on, float32; zero past `rows`."""
    columns = c + tl.arange(0, BLOCK)
    return tl.load(x + row * step + columns, mask=columns < K * (row < rows).to(tl.int32), other=0.0).to(tl.float32)


@triton.jit
def _pairs_before(q, qt, k, kt, g, step, rows, r0, j0, K, C: tl.constexpr, BLOCK: tl.constexpr):
    """[16, 16] of A and of P, but for β, scale and norms: tokens from r0 on with those from j0 on, an earlier block."""
    of_a = tl.zeros([16, 16], tl.float32)
    of_p = tl.zeros([16, 16], tl.float32)
    for c in range(0, K, BLOCK):
        grown = tl.exp(_upto(g, step, rows, K, r0, c, BLOCK))
        between = _total(g, step, rows, K, j0 + 16, r0, c, C, BLOCK)
        keys = load_tile(k + r0 * kt, kt, rows - r0, K, 0, 16, c, BLOCK)
        queries = load_tile(q + r0 * qt, qt, rows - r0, K, 0, 16, c, BLOCK).to(tl.float32) * grown
        earlier = load_tile(k + j0 * kt, kt, rows - j0, K, 0, 16, c, BLOCK).to(tl.float32)
        earlier *= tl.exp(_after(g, step, rows, K, j0, c, BLOCK) + between[None, :])
        turned = tl.trans(earlier.to(keys.dtype))
        of_a += product((keys.to(tl.float32) * grown).to(keys.dtype), turned)
        of_p += product(queries.to(keys.dtype), turned)
    return of_a, of_p


@triton.jit
def _pairs_within(q, qt, k, kt, g, step, rows, r0, K, BLOCK: tl.constexpr):
    """The same for a block with itself, lower triangles."""
    i = tl.arange(0, 16)
    of_a = tl.zeros([16, 16], tl.float32)
    of_p = tl.zeros([16, 16], tl.float32)
    for c in range(0, K, BLOCK):
        keys = load_tile(k + r0 * kt, kt, rows - r0, K, 0, 16, c, BLOCK).to(tl.float32)
        queries = load_tile(q + r0 * qt, qt, rows - r0, K, 0, 16, c, BLOCK).to(tl.float32)
        decay = tl.full([16, BLOCK], 1.0, tl.float32)
        for n in range(0, 16):
            j = 15 - n
            gate = _row(g, r0 + j + 1, rows, step, K, c, BLOCK)
            decay = tl.where(i[:, None] > j, decay * tl.exp(gate)[None, :], 1.0)
            weights = decay * _row(k, r0 + j, rows, kt, K, c, BLOCK)[None, :]
            here = i[None, :] == j
            of_a = tl.where(here, of_a + tl.sum(keys * weights, 1)[:, None], of_a)
            of_p = tl.where(here, of_p + tl.sum(queries * weights, 1)[:, None], of_p)
    return tl.where(i[:, None] > i[None, :], of_a, 0.0), tl.where(i[:, None] >= i[None, :], of_p, 0.0)


@triton.jit
def _put_decayed(
    q,
    qt,
    k,
    kt,
    g,
    step,
    rows,
    r0,
    K,
    norm_q,
    norm_k,
    scale,
    q_decayed,
    k_decayed,
    k_tail,
    last,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of 16 tokens from r0: scale · q e^G, k e^G, k e^{G_C − G}; and e^{G_C} if they are the first."""
    for c in range(0, K, BLOCK):
        upto = _upto(g, step, rows, K, r0, c, BLOCK) + _total(g, step, rows, K, 0, r0, c, C, BLOCK)[None, :]
        rest = _total(g, step, rows, K, r0 + 16, C, c, C, BLOCK)
        after = _after(g, step, rows, K, r0, c, BLOCK) + rest[None, :]
        keys = load_tile(k + r0 * kt, kt, rows - r0, K, 0, 16, c, BLOCK).to(tl.float32) * norm_k[:, None]
        queries = load_tile(q + r0 * qt, qt, rows - r0, K, 0, 16, c, BLOCK).to(tl.float32) * norm_q[:, None]
        store_tile(q_decayed, K, 16, K, 0, 16, c, BLOCK, queries * tl.exp(upto) * scale)
        store_tile(k_decayed, K, 16, K, 0, 16, c, BLOCK, keys * tl.exp(upto))
        store_tile(k_tail, K, 16, K, 0, 16, c, BLOCK, keys * tl.exp(after))
        if r0 == 0:
            columns = c + tl.arange(0, BLOCK)
            total = _total(g, step, rows, K, 0, C, c, C, BLOCK)
            tl.store(last + columns, tl.exp(total), mask=columns < K)


@triton.jit(do_not_specialize=["packed", "T", "NT", "H", "HV", "normalize"])
def kda_prepare_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    g,  # [B, T, HV, K] float32
    beta,  # [B, T, HV] float32
    a,  # out: [chunks, HV, C, C] float32
    p,  # out: [chunks, HV, C, C]
    factors,  # out: [chunks, HV, FACTORS, C] float32; only 1 / |k| and 1 / |q|
    q_decayed,  # out: [chunks, HV, C, K], scale · q e^G
    k_decayed,  # out: [chunks, HV, C, K], k e^G
    k_tail,  # out: [chunks, HV, C, K], k e^{G_C − G}
    last,  # out: [chunks, HV, K] float32, e^{G_C}
    chunks,  # [chunks, 2] of packed sequences
    packed,
    T,
    NT,
    H,
    HV,
    K,
    qb,
    qt,
    qh,
    kb,
    kt,
    kh,
    scale,
    normalize,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """16 rows of A and P, and of the decayed operands, of one chunk of one value head."""
    NB: tl.constexpr = C // 16
    block, hv, slot = program_place(NB, HV)
    batch, first, rows = chunk_place(slot, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    h = hv // (HV // H)
    q += batch * qb + first * qt + h * qh
    k += batch * kb + first * kt + h * kh
    token = (batch * T + first) * HV + hv
    g += token * K
    step = HV * K
    at = slot * HV + hv
    r0 = block * 16
    i = tl.arange(0, 16)
    norm_k = tl.full([16], 1.0, tl.float32)
    norm_q = norm_k
    if normalize:
        norm_k = norms(k + r0 * kt, kt, rows - r0, K, 0, BLOCK)
        norm_q = norms(q + r0 * qt, qt, rows - r0, K, 0, BLOCK)
    tl.store(factors + (at * FACTORS + 2) * C + r0 + i, norm_k)
    tl.store(factors + (at * FACTORS + 3) * C + r0 + i, norm_q)
    rate = tl.load(beta + token + (r0 + i) * HV, mask=r0 + i < rows, other=0.0)
    out = (at * C + r0) * K
    _put_decayed(
        q,
        qt,
        k,
        kt,
        g,
        step,
        rows,
        r0,
        K,
        norm_q,
        norm_k,
        scale,
        q_decayed + out,
        k_decayed + out,
        k_tail + out,
        last + at * K,
        C,
        BLOCK,
    )
    a += at * C * C + r0 * C
    p += at * C * C + r0 * C
    for other in range(0, NB):
        j0 = other * 16
        of_a = tl.zeros([16, 16], tl.float32)
        of_p = tl.zeros([16, 16], tl.float32)
        right = tl.full([16], 1.0, tl.float32)
        if (normalize != 0) & (other <= block):
            right = norms(k + j0 * kt, kt, rows - j0, K, 0, BLOCK)
        if other < block:
            of_a, of_p = _pairs_before(q, qt, k, kt, g, step, rows, r0, j0, K, C, BLOCK)
        if other == block:
            of_a, of_p = _pairs_within(q, qt, k, kt, g, step, rows, r0, K, BLOCK)
        of_a *= (rate * norm_k)[:, None] * right[None, :]
        of_p *= (scale * norm_q)[:, None] * right[None, :]
        store_tile(a + j0, C, 16, 16, 0, 16, 0, 16, of_a)
        store_tile(p + j0, C, 16, 16, 0, 16, 0, 16, of_p)


@triton.jit(do_not_specialize=["packed", "T", "NT", "HV"])
def invert_kernel(
    a,  # [chunks, HV, C, C] float32, strictly lower triangular; overwritten
    beta,  # [B, T, HV] float32
    x_beta,  # out: [chunks, HV, C, C], X diag(β), X = (I + A)⁻¹
    x,  # out under WITH_X: [chunks, HV, C, C]
    chunks,
    packed,
    T,
    NT,
    HV,
    C: tl.constexpr,
    WITH_X: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    batch, first, rows = chunk_place(at // HV, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    beta += (batch * T + first) * HV + at % HV
    S: tl.constexpr = C // 2
    a += at * C * C
    x1, under, x2 = invert(a, C, S * C + S, load_tile(a + S * C, C, S, S, 0, S, 0, S), C)
    put_inverse(x + at * C * C, x_beta + at * C * C, x1, under, x2, beta, HV, rows, C, WITH_X)


@triton.jit(do_not_specialize=["packed", "T", "NT", "HV"])
def kda_pairs_kernel(
    grad_o,  # [B, T, HV, V]
    values,  # [B, T, HV, V]
    residuals,  # [B, T, HV, V]
    d,  # out: [chunks, HV, C, C], D
    m,  # out: [chunks, HV, C, C], M
    chunks,
    packed,
    T,
    NT,
    HV,
    V,
    scale,
    C: tl.constexpr,
    BV: tl.constexpr,
):
    """D and M of one chunk of one value head."""
    at = tl.program_id(0).to(tl.int64)
    batch, first, rows = chunk_place(at // HV, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    where = ((batch * T + first) * HV + at % HV) * V
    of_d = tl.zeros([C, C], tl.float32)
    of_m = tl.zeros([C, C], tl.float32)
    for v0 in range(0, V, BV):
        new = tl.trans(load_tile(values + where + v0, HV * V, rows, V - v0, 0, C, 0, BV))
        of_d += product(load_tile(grad_o + where + v0, HV * V, rows, V - v0, 0, C, 0, BV), new)
        of_m += product(load_tile(residuals + where + v0, HV * V, rows, V - v0, 0, C, 0, BV), new)
    t = tl.arange(0, C)
    store_tile(d + at * C * C, C, C, C, 0, C, 0, C, tl.where(t[:, None] >= t[None, :], of_d * scale, 0.0))
    store_tile(m + at * C * C, C, C, C, 0, C, 0, C, tl.where(t[:, None] > t[None, :], -of_m, 0.0))


@triton.jit
def _through_state(x, s, step, rows, K, V, k0, BV: tl.constexpr, BK: tl.constexpr):
    """16 rows of x [*, V] times Sᵀ [V, K], columns k0 on."""
    total = tl.zeros([16, BK], tl.float32)
    for v0 in range(0, V, BV):
        left = load_tile(x + v0, step, rows, V - v0, 0, 16, 0, BV)
        total += product(left, load_tile(s + v0 * K + k0, K, V - v0, K - k0, 0, BV, 0, BK))
    return total


@triton.jit
def _from_earlier(k, kt, g, step, norm_k, d, m, rows, block, K, k0, C: tl.constexpr, BK: tl.constexpr):
    """D and M of a block with the keys of all earlier ones, decayed to its start; the sum of g over those blocks."""
    i = tl.arange(0, 16)
    r0 = block * 16
    dq = tl.zeros([16, BK], tl.float32)
    z = tl.zeros([16, BK], tl.float32)
    between = tl.zeros([BK], tl.float32)
    for n in range(0, block):  # the nearest first, so that the sum of g between grows by one block at a time
        j0 = r0 - 16 - n * 16
        loaded = load_tile(k + j0 * kt, kt, rows - j0, K, 0, 16, k0, BK)
        earlier = loaded.to(tl.float32) * tl.load(norm_k + j0 + i)[:, None]
        earlier *= tl.exp(_after(g, step, rows, K, j0, k0, BK) + between[None, :])
        right = earlier.to(loaded.dtype)
        dq += product(load_tile(d + r0 * C + j0, C, 16, 16, 0, 16, 0, 16), right)
        z += product(load_tile(m + r0 * C + j0, C, 16, 16, 0, 16, 0, 16), right)
        between += _total(g, step, rows, K, j0, j0 + 16, k0, 16, BK)
    return dq, z, between


@triton.jit
def _from_later(
    q, qt, k, kt, g, step, norm_q, norm_k, beta, HV, d, m, rows, block, K, k0, C: tl.constexpr, BK: tl.constexpr
):
    """Dᵀ and Mᵀ of a block with the queries and keys of all later ones, decayed from its end; the sum of g over those
    blocks."""
    i = tl.arange(0, 16)
    r0 = block * 16
    y = tl.zeros([16, BK], tl.float32)
    between = tl.zeros([BK], tl.float32)
    for n in range(block + 1, C // 16):
        l0 = n * 16
        grown = tl.exp(_upto(g, step, rows, K, l0, k0, BK) + between[None, :])
        loaded = load_tile(q + l0 * qt, qt, rows - l0, K, 0, 16, k0, BK)
        later = loaded.to(tl.float32) * grown * tl.load(norm_q + l0 + i)[:, None]
        y += product(tl.trans(load_tile(d + l0 * C + r0, C, 16, 16, 0, 16, 0, 16)), later.to(loaded.dtype))
        later = load_tile(k + l0 * kt, kt, rows - l0, K, 0, 16, k0, BK).to(tl.float32) * grown
        rate = tl.load(beta + (l0 + i) * HV, mask=l0 + i < rows, other=0.0)
        later *= (rate * tl.load(norm_k + l0 + i))[:, None]
        y += product(tl.trans(load_tile(m + l0 * C + r0, C, 16, 16, 0, 16, 0, 16)), later.to(loaded.dtype))
        between += _total(g, step, rows, K, l0, l0 + 16, k0, 16, BK)
    return y, between


@triton.jit
def _add_own(
    dq, z, y, queries, keys, rate, k, kt, g, step, norm_k, d, m, rows, r0, K, k0, C: tl.constexpr, BK: tl.constexpr
):
    """What a block does to itself, a column of D and M at a time, the last first; and the diagonal of D, left out."""
    i = tl.arange(0, 16)
    decay = tl.full([16, BK], 1.0, tl.float32)
    own = tl.zeros([16], tl.float32)
    for n in range(0, 16):
        j = 15 - n
        gate = _row(g, r0 + j + 1, rows, step, K, k0, BK)
        decay = tl.where(i[:, None] > j, decay * tl.exp(gate)[None, :], 1.0)
        key = _row(k, r0 + j, rows, kt, K, k0, BK) * tl.load(norm_k + r0 + j)
        of_d = tl.load(d + (r0 + i) * C + r0 + j).to(tl.float32)
        own = tl.where(i == j, of_d, own)
        of_d = tl.where(i == j, 0.0, of_d)
        of_m = tl.load(m + (r0 + i) * C + r0 + j).to(tl.float32)
        weights = decay * key[None, :]
        dq += of_d[:, None] * weights
        z += of_m[:, None] * weights
        given = tl.sum(decay * (of_d[:, None] * queries + (of_m * rate)[:, None] * keys), 0)
        y += tl.where(i[:, None] == j, given[None, :], 0.0)
    return dq, z, y, own


@triton.jit
def _with_values(residuals, v, step, vt, rows, V, BV: tl.constexpr):
    """rowsum(dR ∘ V) of 16 rows."""
    total = tl.zeros([16], tl.float32)
    for v0 in range(0, V, BV):
        value = load_tile(v + v0, vt, rows, V - v0, 0, 16, 0, BV).to(tl.float32)
        total += tl.sum(load_tile(residuals + v0, step, rows, V - v0, 0, 16, 0, BV) * value, 1)
    return total


@triton.jit(do_not_specialize=["packed", "B", "T", "NT", "H", "HV"])
def kda_gradient_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, HV, V]
    g,  # [B, T, HV, K] float32
    beta,  # [B, T, HV] float32
    factors,  # [chunks, HV, FACTORS, C] float32
    d,  # [chunks, HV, C, C]
    m,  # [chunks, HV, C, C]
    grad_o,  # [B, T, HV, V]
    states,  # [chunks, HV, V, K]
    grad_states,  # [chunks, HV, V, K]
    values,  # [B, T, HV, V]
    residuals,  # [B, T, HV, V]
    grad_q,  # out: [B, T, HV, K], of the normalised q
    grad_k,  # out: [B, T, HV, K], of the normalised k
    grad_beta,  # out: [⌈K / BK⌉, B, T, HV] float32
    grad_g,  # out: [B, T, HV, K] float32: dG without what only the last token gets
    chunks,
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
):
    """16 rows and BK key columns of one chunk of one value head."""
    NB: tl.constexpr = C // 16
    blocks = tl.cdiv(K, BK)
    part, hv, slot = program_place(blocks * NB, HV)
    k0 = part % blocks * BK
    block = part // blocks
    batch, first, rows = chunk_place(slot, chunks, packed, T, NT, C)
    r0 = block * 16
    if r0 >= rows:
        return
    h = hv // (HV // H)
    q += batch * qb + first * qt + h * qh
    k += batch * kb + first * kt + h * kh
    token = (batch * T + first) * HV + hv
    g += token * K
    beta += token
    step = HV * K
    at = slot * HV + hv
    norm_k = factors + (at * FACTORS + 2) * C
    norm_q = factors + (at * FACTORS + 3) * C
    d += at * C * C
    m += at * C * C
    i = tl.arange(0, 16)
    live = r0 + i < rows
    rate = tl.load(beta + (r0 + i) * HV, mask=live, other=0.0)
    keys = load_tile(k + r0 * kt, kt, rows - r0, K, 0, 16, k0, BK).to(tl.float32) * tl.load(norm_k + r0 + i)[:, None]
    queries = load_tile(q + r0 * qt, qt, rows - r0, K, 0, 16, k0, BK).to(tl.float32) * tl.load(norm_q + r0 + i)[:, None]

    dq, z, between = _from_earlier(k, kt, g, step, norm_k, d, m, rows, block, K, k0, C, BK)
    upto = _upto(g, step, rows, K, r0, k0, BK)
    grown = tl.exp(upto)
    before = tl.exp(upto + between[None, :])
    where = (token + r0 * HV) * V
    s = states + at * V * K
    dq = dq * grown + scale * before * _through_state(grad_o + where, s, HV * V, rows - r0, K, V, k0, BV, BK)
    z = z * grown - before * _through_state(residuals + where, s, HV * V, rows - r0, K, V, k0, BV, BK)

    y, between = _from_later(q, qt, k, kt, g, step, norm_q, norm_k, beta, HV, d, m, rows, block, K, k0, C, BK)
    after = _after(g, step, rows, K, r0, k0, BK)
    ds = grad_states + at * V * K
    y *= tl.exp(after)
    y += tl.exp(after + between[None, :]) * _through_state(values + where, ds, HV * V, rows - r0, K, V, k0, BV, BK)

    dq, z, y, own = _add_own(dq, z, y, queries, keys, rate, k, kt, g, step, norm_k, d, m, rows, r0, K, k0, C, BK)

    d_rate = tl.sum(z * keys, 1)
    if k0 == 0:
        own_v = v + batch * vb + (first + r0) * vt + hv * vh
        d_rate += _with_values(residuals + where, own_v, HV * V, vt, rows - r0, V, BV)
    partial = (part % blocks).to(tl.int64) * B * T * HV
    tl.store(grad_beta + partial + token + (r0 + i) * HV, d_rate, mask=live)
    z *= rate[:, None]
    out = (token + r0 * HV) * K
    # No decay stands in the diagonal of D and in what the state after the chunk gives to the last token: see _gradient.
    decayed = tl.where((r0 + i < rows - 1)[:, None], y, 0.0)
    store_tile(grad_g + out, step, rows - r0, K, 0, 16, k0, BK, dq * queries + (z - decayed) * keys)
    store_tile(grad_q + out, step, rows - r0, K, 0, 16, k0, BK, dq + own[:, None] * keys)
    store_tile(grad_k + out, step, rows - r0, K, 0, 16, k0, BK, z + y + own[:, None] * queries)


@triton.jit(do_not_specialize=["packed", "T", "NT", "HV"])
def kda_gate_kernel(
    k_tail,  # [chunks, HV, C, K], k e^{G_C − G}
    last,  # [chunks, HV, K] float32, e^{G_C}
    states,  # [chunks, HV, V, K]
    grad_states,  # [chunks, HV, V, K]
    values,  # [B, T, HV, V]
    grad_g,  # [B, T, HV, K] float32: dG as kda_gradient_kernel leaves it, replaced by dg
    chunks,
    packed,
    T,
    NT,
    HV,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dg from dG for BK keys of one chunk of one value head."""
    block, hv, slot = program_place(tl.cdiv(K, BK), HV)
    k0 = block * BK
    batch, first, rows = chunk_place(slot, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    at = slot * HV + hv
    token = (batch * T + first) * HV + hv
    inner = tl.zeros([BK], tl.float32)
    y = tl.zeros([C, BK], tl.float32)
    for v0 in range(0, V, BV):
        place = (at * V + v0) * K + k0
        ds = load_tile(grad_states + place, K, V - v0, K - k0, 0, BV, 0, BK)
        s = load_tile(states + place, K, V - v0, K - k0, 0, BV, 0, BK)
        inner += tl.sum(s.to(tl.float32) * ds.to(tl.float32), 0)
        y += product(load_tile(values + token * V + v0, HV * V, rows, V - v0, 0, C, 0, BV), ds)
    tail = load_tile(k_tail + at * C * K, K, rows, K, 0, C, k0, BK).to(tl.float32)
    columns = k0 + tl.arange(0, BK)
    tail = tl.where((tl.arange(0, C) < rows - 1)[:, None], tail, 0.0)
    end = inner * tl.load(last + at * K + columns, mask=columns < K, other=0.0) + tl.sum(y * tail, 0)
    out = grad_g + token * K
    dg = tl.cumsum(load_tile(out, HV * K, rows, K, 0, C, k0, BK), 0, reverse=True) + end[None, :]
    store_tile(out, HV * K, rows, K, 0, C, k0, BK, dg)
