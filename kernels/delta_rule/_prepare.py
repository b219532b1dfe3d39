"""Everything of a chunk that does not depend on the state, for all chunks at once.

    A = tril(diag(β) (K Kᵀ ∘ Γ), −1)      X = (I + A)⁻¹      P = scale · tril(Q Kᵀ ∘ Γ)

The blocks of X of 16 tokens on the diagonal come by forward substitution, a column a thread. From then on two
neighbours are joined, in products of about float32's accuracy, until one is left:

    X = [[X₁, 0], [−X₂ A₂₁ X₁, X₂]]

Squaring A, or plain tf32, loses the result when keys repeat. What one thread solves another multiplies, so the quarters
of A on the diagonal become those of X in memory, where X diag(β) will be: float32 halves take the room of all of it in
16 bits.

Exponents are sums of the g between two tokens, never differences of two sums, so that neither a decay of −50 nor −inf
spoils a small one. Below the diagonal blocks Γ is a product of two factors ≤ 1, from after the earlier token to the
start of the later one's block, and from there on. With a gate per key (KDA) these go into the operands, and the
diagonal blocks take Γ key by key (see ``_kda``).

Work per chunk and head: 2 C² K multiply-adds for A and P; bytes at best, 16-bit: 4 C K in, 4 C² out.
"""

import triton
import triton.language as tl
from pyrepr.kernels.delta_rule._shared import chunk_place, load_tile, product, store_tile

# Rows of `factors`, per chunk and value head: e^{G_i}, e^{G_C − G_i}, 1 / |k|, 1 / |q|, and products of them that the
# scans take: e^{G_i} / |k|, e^{G_C − G_i} / |k|, scale · e^{G_i} / |q|.
FACTORS = tl.constexpr(7)


@triton.jit
def _totals(g, step, rows, C: tl.constexpr):
    """The sums of g up to each of a chunk's tokens and after each."""
    r = tl.arange(0, C)
    own = tl.load(g + r * step, mask=r < rows, other=0.0)
    later = tl.load(g + (r + 1) * step, mask=r + 1 < rows, other=0.0)
    return tl.cumsum(own, 0), tl.cumsum(later, 0, reverse=True)


@triton.jit
def _decays(g, step, rows, right, C: tl.constexpr):
    """Γ diag(right) on and below the diagonal; what stands above is to be dropped."""
    NB: tl.constexpr = C // 16
    start = tl.arange(0, NB)[:, None] * 16
    t = tl.arange(0, 16)
    r = tl.arange(0, C)
    own = tl.load(g + (start + t[None, :]) * step, mask=start + t[None, :] < rows, other=0.0)
    later = tl.load(g + (r + 1) * step, mask=r + 1 < rows, other=0.0)
    within = tl.exp(tl.cumsum(tl.where(t[:, None] > t[None, :], own[:, :, None], 0.0), 1))
    within *= tl.reshape(right, [NB, 16])[:, None, :]
    before = tl.exp(tl.cumsum(tl.where(r[None, :] + 1 < start, later[None, :], 0.0), 1, reverse=True)) * right[None, :]
    grown = tl.exp(tl.cumsum(own, 1))
    within = tl.reshape(tl.broadcast_to(within[:, :, None, :], [NB, 16, NB, 16]), [C, C])
    below = tl.reshape(grown[:, :, None] * before[:, None, :], [C, C])
    return tl.where(r[:, None] // 16 == r[None, :] // 16, within, below)


@triton.jit
def _put_factors(out, upto, after, norm_k, norm_q, scale, C: tl.constexpr):
    out += tl.arange(0, C)
    decay = tl.exp(upto)
    tail = tl.exp(after)
    tl.store(out, decay)
    tl.store(out + C, tail)
    tl.store(out + 2 * C, norm_k)
    tl.store(out + 3 * C, norm_q)
    tl.store(out + 4 * C, decay * norm_k)
    tl.store(out + 5 * C, tail * norm_k)
    tl.store(out + 6 * C, scale * decay * norm_q)


@triton.jit
def _quarters(x, S: tl.constexpr):
    """Of x [2 S, 2 S]: upper left, lower left, lower right."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, [2, S, 2, S]), [1, 3, 2, 0]))
    x1, _ = tl.split(upper)
    under, x2 = tl.split(lower)
    return x1, under, x2


@triton.jit
def _put_quarters(x, x1, under, x2, C: tl.constexpr):
    """All of a lower triangular matrix [C, C], the zeros too."""
    S: tl.constexpr = C // 2
    store_tile(x, C, S, S, 0, S, 0, S, x1)
    store_tile(x + S, C, S, S, 0, S, 0, S, tl.zeros([S, S], tl.float32))
    store_tile(x + S * C, C, S, S, 0, S, 0, S, under)
    store_tile(x + S * C + S, C, S, S, 0, S, 0, S, x2)


@triton.jit
def put_inverse(x, x_beta, x1, under, x2, beta, step, rows, C: tl.constexpr, WITH_X: tl.constexpr):
    """X if it is wanted, and X diag(β)."""
    r = tl.arange(0, C // 2)
    rate1 = tl.load(beta + r * step, mask=r < rows, other=0.0)
    rate2 = tl.load(beta + (C // 2 + r) * step, mask=C // 2 + r < rows, other=0.0)
    _put_quarters(x_beta, x1 * rate1[None, :], under * rate1[None, :], x2 * rate2[None, :], C)
    if WITH_X:
        _put_quarters(x, x1, under, x2, C)


@triton.jit
def _high(x):
    """x rounded to what tf32 holds."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _chain(a, b):
    """a b in float32: ``tf32x3``, with the product of what is low in both and without its care for infinities."""
    a_high = _high(a)
    b_high = _high(b)
    y = tl.dot(a - a_high, b - b_high, input_precision="tf32")
    y = tl.dot(a - a_high, b_high, y, input_precision="tf32")
    y = tl.dot(a_high, b - b_high, y, input_precision="tf32")
    return tl.dot(a_high, b_high, y, input_precision="tf32")


@triton.jit
def _joined(x1, a, x2):
    """The block of X under x1 and left of x2, from that of A."""
    return -_chain(x2, _chain(a, x1))


@triton.jit
def _substitute(a, step, half, C: tl.constexpr):
    """X in place of A for the diagonal blocks of 16: x_i = e_i − Σ_{j < i} a_ij x_j, for every column."""
    n = tl.arange(0, C)
    column = n % 16
    block = a + n // (C // 2) * half + n % (C // 2) // 16 * (16 * step + 16)
    x = (tl.where(column == 0, 1.0, 0.0),)
    for i in tl.static_range(1, 16):
        row = tl.where(column == i, 1.0, 0.0)
        for j in tl.static_range(0, i):
            row -= tl.load(block + (i * step + j)) * x[j]
        x += (row,)
    tl.debug_barrier()
    for i in tl.static_range(0, 16):
        tl.store(block + i * step + column, x[i])
    tl.debug_barrier()


@triton.jit
def invert(a, step, half, under, C: tl.constexpr):
    """Quarters of (I + A)⁻¹: upper left, lower left, lower right.

    a: the upper left quarter of A, float32, `step` from row to row; `half` behind it begins the lower right one. Both
    are overwritten, and may be again when this returns. under [C / 2, C / 2]: the lower left quarter.
    """
    S: tl.constexpr = C // 2
    tl.debug_barrier()
    _substitute(a, step, half, C)
    if S == 32:
        r = tl.arange(0, 16)
        at = a + tl.arange(0, 2)[:, None, None] * half + r[None, :, None] * step + r[None, None, :]
        lower = at + 16 * step
        x = _joined(tl.load(at), tl.load(lower), tl.load(lower + 16))
        tl.debug_barrier()
        tl.store(lower, x)
        tl.debug_barrier()
    r = tl.arange(0, S)
    at = a + r[:, None] * step + r[None, :]
    under = _joined(tl.load(at), under, tl.load(at + half))
    # Read again rather than kept: registers.
    x1 = tl.load(at)
    x2 = tl.load(at + half)
    tl.debug_barrier()
    return x1, under, x2


@triton.jit(do_not_specialize=["packed", "T", "NT", "H", "HV", "normalize"])
def prepare_kernel(
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    g,  # [B, T, HV] float32
    beta,  # [B, T, HV] float32
    x_beta,  # out: [chunks, HV, C, C] X diag(β)
    x,  # out under WITH_X: [chunks, HV, C, C] X
    p,  # out: [chunks, HV, C, C] P
    factors,  # out: [chunks, HV, FACTORS, C] float32
    chunks,  # [chunks, 2] of packed sequences: first token, tokens
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
    GATED: tl.constexpr,
    WITH_X: tl.constexpr,
):
    """X, P and the factors of one chunk of one value head."""
    slot = tl.program_id(0).to(tl.int64) // HV
    hv = tl.program_id(0) % HV
    batch, first, rows = chunk_place(slot, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    h = hv // (HV // H)
    q += batch * qb + first * qt + h * qh
    k += batch * kb + first * kt + h * kh
    row = (batch * T + first) * HV + hv
    at = slot * HV + hv
    x_beta += at * C * C
    i = tl.arange(0, C)
    scores = tl.zeros([C, C], tl.float32)
    norm_k = tl.zeros([C], tl.float32)
    norm_q = tl.zeros([C], tl.float32)
    for c in range(0, K, BLOCK):
        keys = load_tile(k, kt, rows, K, 0, C, c, BLOCK)
        queries = load_tile(q, qt, rows, K, 0, C, c, BLOCK)
        scores += product(queries, tl.trans(keys))
        keys = keys.to(tl.float32)
        queries = queries.to(tl.float32)
        norm_k += tl.sum(keys * keys, 1)
        norm_q += tl.sum(queries * queries, 1)
    norm_k = tl.where(normalize != 0, tl.rsqrt(norm_k + 1e-6), 1.0)
    norm_q = tl.where(normalize != 0, tl.rsqrt(norm_q + 1e-6), 1.0)
    weights = norm_k[None, :]
    upto = tl.zeros([C], tl.float32)
    after = upto
    if GATED:
        weights = _decays(g + row, HV, rows, norm_k, C)
        upto, after = _totals(g + row, HV, rows, C)
    _put_factors(factors + at * FACTORS * C, upto, after, norm_k, norm_q, scale, C)
    scores = scores * weights * (scale * norm_q)[:, None]
    store_tile(p + at * C * C, C, C, C, 0, C, 0, C, tl.where(i[:, None] >= i[None, :], scores, 0.0))
    # A after P, and its scores by themselves: registers have room for one.
    scores = tl.zeros([C, C], tl.float32)
    for c in range(0, K, BLOCK):
        keys = load_tile(k, kt, rows, K, 0, C, c, BLOCK)
        scores += product(keys, tl.trans(keys))
    rate = tl.load(beta + row + i * HV, mask=i < rows, other=0.0)
    scores = scores * weights * (rate * norm_k)[:, None]
    S: tl.constexpr = C // 2
    a1, under, a2 = _quarters(tl.where(i[:, None] > i[None, :], scores, 0.0), S)
    a = x_beta.to(tl.pointer_type(tl.float32))
    store_tile(a, S, S, S, 0, S, 0, S, a1)
    store_tile(a + S * S, S, S, S, 0, S, 0, S, a2)
    x1, under, x2 = invert(a, S, S * S, under, C)
    put_inverse(x + at * C * C, x_beta, x1, under, x2, beta + row, HV, rows, C, WITH_X)
