"""Everything of a chunk that does not depend on the state, for all chunks at once.

    A = tril(diag(β) (K Kᵀ ∘ Γ), −1)      X = (I + A)⁻¹      P = scale · tril(Q Kᵀ ∘ Γ)

A chunk of C tokens is C / 16 blocks of rows. The diagonal blocks of X come by forward substitution, the others by

    X_IJ = −X_II Σ_{J ≤ L < I} A_IL X_LJ

in ``tf32x3`` (about float32): squaring A, or plain tf32, loses the result when keys repeat. Exponents are sums of the g
between two tokens, never differences of two sums, so that neither a decay of −50 nor −inf spoils a small one. With a
gate per key (KDA) the blocks below the diagonal take Γ as a product of two factors ≤ 1, from the tokens before block I
and in it; the diagonal blocks take it key by key.

Work per chunk and head: C² K multiply-adds for A and P; bytes at best, 16-bit: 4 C K in, 4 C² out.
"""

import triton
import triton.language as tl
from pyrepr.kernels.delta_rule._shared import chunk_place, load_tile, log_decays, product, store_tile, substitute

# Rows of `factors`, per chunk and value head: e^{G_i}, e^{G_C − G_i}, 1 / |k|, 1 / |q|, and products of them that the
# scans take: e^{G_i} / |k|, e^{G_C − G_i} / |k|, scale · e^{G_i} / |q|.
FACTORS = tl.constexpr(7)


@triton.jit
def norms(x, stride, rows, K, r0: tl.constexpr, BLOCK: tl.constexpr):
    """1 / √(Σ x² + 1e-6) of 16 rows."""
    total = tl.zeros([16], tl.float32)
    for c in range(0, K, BLOCK):
        tile = load_tile(x, stride, rows, K, r0, 16, c, BLOCK).to(tl.float32)
        total += tl.sum(tile * tile, 1)
    return tl.rsqrt(total + 1e-6)


@triton.jit
def _decays(g, step, rows, I: tl.constexpr, GATED: tl.constexpr):
    """Of the 16 tokens of block I: the sum of g up to each, after each, and of all."""
    upto = tl.zeros([16], tl.float32)
    after = upto
    total = 0.0
    if GATED:
        r = I * 16 + tl.arange(0, 16)
        own = tl.load(g + r * step, mask=r < rows, other=0.0)
        later = tl.load(g + (r + 1) * step, mask=(r + 1 < rows) & (r + 1 < I * 16 + 16), other=0.0)
        upto = tl.cumsum(own, 0)
        after = tl.cumsum(later, 0, reverse=True)
        total = tl.sum(own, 0)
    return upto, after, total


@triton.jit
def _all_decays(g, step, rows, NB: tl.constexpr, GATED: tl.constexpr):
    """`_decays` of all blocks; those past NB are zero."""
    u0, s0, t0 = _decays(g, step, rows, 0, GATED)
    u1, s1, t1 = _decays(g, step, rows, 1, GATED)
    u2, s2, t2 = u0, s0, 0.0
    u3, s3, t3 = u0, s0, 0.0
    if NB == 4:
        u2, s2, t2 = _decays(g, step, rows, 2, GATED)
        u3, s3, t3 = _decays(g, step, rows, 3, GATED)
    return (u0, u1, u2, u3), (s0, s1, s2, s3), (t0, t1, t2, t3)


@triton.jit
def _factors(
    q,
    qt,
    k,
    kt,
    rows,
    K,
    scale,
    normalize,
    upto,  # [16] sum of g from the chunk's start up to each token
    after,  # [16] sum of g after each token, to the chunk's end
    out,
    I: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the factors of block I; returns what multiplies rows of P, and columns of P and A."""
    r = I * 16 + tl.arange(0, 16)
    own_k = tl.full([16], 1.0, tl.float32)
    own_q = own_k
    if normalize:
        own_k = norms(k, kt, rows, K, I * 16, BLOCK)
        own_q = norms(q, qt, rows, K, I * 16, BLOCK)
    decay = tl.exp(upto)
    tail = tl.exp(after)
    tl.store(out + r, decay)
    tl.store(out + C + r, tail)
    tl.store(out + 2 * C + r, own_k)
    tl.store(out + 3 * C + r, own_q)
    tl.store(out + 4 * C + r, decay * own_k)
    tl.store(out + 5 * C + r, tail * own_k)
    tl.store(out + 6 * C + r, scale * decay * own_q)
    return scale * own_q, own_k


@triton.jit
def _rates(beta, step, rows, I: tl.constexpr):
    """β of block I."""
    r = I * 16 + tl.arange(0, 16)
    return tl.load(beta + r * step, mask=r < rows, other=0.0)


@triton.jit
def _below(block, left, right, upto, after, GATED: tl.constexpr):
    """A block below the diagonal with its factors and e^{upto_i + after_j}."""
    block = block * left[:, None] * right[None, :]
    if GATED:
        block = block * tl.exp(upto[:, None] + after[None, :])
    return block


@triton.jit
def _diagonal(block, left, right, g, step, rows, I: tl.constexpr, GATED: tl.constexpr):
    """A diagonal block with its factors and decays, everything above the diagonal zero."""
    i = tl.arange(0, 16)
    block = block * left[:, None] * right[None, :]
    if GATED:
        block = block * tl.exp(log_decays(g + I * 16 * step, step, rows - I * 16, 16))
    return tl.where(i[:, None] >= i[None, :], block, 0.0)


@triton.jit
def _on_diagonal(x, xs, y, ys, rows, K, NB: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks (I, I) of X Yᵀ; those past NB are zero."""
    b0 = tl.zeros([16, 16], tl.float32)
    b1, b2, b3 = b0, b0, b0
    for c in range(0, K, BLOCK):
        b0 += product(load_tile(x, xs, rows, K, 0, 16, c, BLOCK), tl.trans(load_tile(y, ys, rows, K, 0, 16, c, BLOCK)))
        b1 += product(
            load_tile(x, xs, rows, K, 16, 16, c, BLOCK), tl.trans(load_tile(y, ys, rows, K, 16, 16, c, BLOCK))
        )
        if NB == 4:
            b2 += product(
                load_tile(x, xs, rows, K, 32, 16, c, BLOCK), tl.trans(load_tile(y, ys, rows, K, 32, 16, c, BLOCK))
            )
            b3 += product(
                load_tile(x, xs, rows, K, 48, 16, c, BLOCK), tl.trans(load_tile(y, ys, rows, K, 48, 16, c, BLOCK))
            )
    return b0, b1, b2, b3


@triton.jit
def _under_diagonal(x, xs, y, ys, rows, K, NB: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks (I, J), J < I, of X Yᵀ, row by row; those past NB are zero."""
    b10 = tl.zeros([16, 16], tl.float32)
    b20, b21, b30, b31, b32 = b10, b10, b10, b10, b10
    for c in range(0, K, BLOCK):
        y0 = tl.trans(load_tile(y, ys, rows, K, 0, 16, c, BLOCK))
        b10 += product(load_tile(x, xs, rows, K, 16, 16, c, BLOCK), y0)
        if NB == 4:
            y1 = tl.trans(load_tile(y, ys, rows, K, 16, 16, c, BLOCK))
            x2 = load_tile(x, xs, rows, K, 32, 16, c, BLOCK)
            b20 += product(x2, y0)
            b21 += product(x2, y1)
            x3 = load_tile(x, xs, rows, K, 48, 16, c, BLOCK)
            b30 += product(x3, y0)
            b31 += product(x3, y1)
            b32 += product(x3, tl.trans(load_tile(y, ys, rows, K, 32, 16, c, BLOCK)))
    return b10, b20, b21, b30, b31, b32


@triton.jit
def _weigh_diagonal(blocks, left, right, g, step, rows, NB: tl.constexpr, GATED: tl.constexpr):
    """Diagonal blocks with the factors of their rows and columns and the decays between them."""
    b0, b1, b2, b3 = blocks
    b0 = _diagonal(b0, left[0], right[0], g, step, rows, 0, GATED)
    b1 = _diagonal(b1, left[1], right[1], g, step, rows, 1, GATED)
    if NB == 4:
        b2 = _diagonal(b2, left[2], right[2], g, step, rows, 2, GATED)
        b3 = _diagonal(b3, left[3], right[3], g, step, rows, 3, GATED)
    return b0, b1, b2, b3


@triton.jit
def _weigh_under(blocks, left, right, upto, after, t1, t2, NB: tl.constexpr, GATED: tl.constexpr):
    """The same for those below. upto, after: sums of g inside a block; t1, t2: the sum of g in blocks 1 and 2."""
    b10, b20, b21, b30, b31, b32 = blocks
    b10 = _below(b10, left[1], right[0], upto[1], after[0], GATED)
    if NB == 4:
        b20 = _below(b20, left[2], right[0], upto[2], after[0] + t1, GATED)
        b21 = _below(b21, left[2], right[1], upto[2], after[1], GATED)
        b30 = _below(b30, left[3], right[0], upto[3], after[0] + (t1 + t2), GATED)
        b31 = _below(b31, left[3], right[1], upto[3], after[1] + t2, GATED)
        b32 = _below(b32, left[3], right[2], upto[3], after[2], GATED)
    return b10, b20, b21, b30, b31, b32


@triton.jit
def _put(x, C: tl.constexpr, I: tl.constexpr, J: tl.constexpr, block):
    """Block (I, J) of a matrix [C, C]."""
    store_tile(x + J * 16, C, C, 16, I * 16, 16, 0, 16, block)


@triton.jit
def put_lower(x, diagonal, under, NB: tl.constexpr):
    """All blocks of a lower triangular matrix [C, C], the zeros too."""
    C: tl.constexpr = NB * 16
    b00, b11, b22, b33 = diagonal
    b10, b20, b21, b30, b31, b32 = under
    zero = tl.zeros([16, 16], tl.float32)
    _put(x, C, 0, 0, b00)
    _put(x, C, 0, 1, zero)
    _put(x, C, 1, 0, b10)
    _put(x, C, 1, 1, b11)
    if NB == 4:
        _put(x, C, 0, 2, zero)
        _put(x, C, 0, 3, zero)
        _put(x, C, 1, 2, zero)
        _put(x, C, 1, 3, zero)
        _put(x, C, 2, 0, b20)
        _put(x, C, 2, 1, b21)
        _put(x, C, 2, 2, b22)
        _put(x, C, 2, 3, zero)
        _put(x, C, 3, 0, b30)
        _put(x, C, 3, 1, b31)
        _put(x, C, 3, 2, b32)
        _put(x, C, 3, 3, b33)


@triton.jit
def put_inverse(x, x_beta, diagonal, under, beta, step, rows, NB: tl.constexpr, WITH_X: tl.constexpr):
    """X if it is wanted, and X diag(β)."""
    x0, x1, x2, x3 = diagonal
    x10, x20, x21, x30, x31, x32 = under
    r = tl.arange(0, 16)
    b0 = tl.load(beta + r * step, mask=r < rows, other=0.0)[None, :]
    b1 = tl.load(beta + (16 + r) * step, mask=16 + r < rows, other=0.0)[None, :]
    b2, b3 = b1, b1
    if NB == 4:
        b2 = tl.load(beta + (32 + r) * step, mask=32 + r < rows, other=0.0)[None, :]
        b3 = tl.load(beta + (48 + r) * step, mask=48 + r < rows, other=0.0)[None, :]
    put_lower(
        x_beta, (x0 * b0, x1 * b1, x2 * b2, x3 * b3), (x10 * b0, x20 * b0, x21 * b1, x30 * b0, x31 * b1, x32 * b2), NB
    )
    if WITH_X:
        put_lower(x, diagonal, under, NB)


@triton.jit
def _chain(left, right):
    """A product of two blocks on the way to the inverse."""
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def invert_diagonal(blocks, NB: tl.constexpr):
    """(I + tril(A_II, −1))⁻¹ for the diagonal blocks of A, by substitution in all of them at once."""
    a0, a1, a2, a3 = blocks
    r = tl.arange(0, 16)
    above = r[:, None] < r[None, :]
    a0, a1 = tl.where(above, tl.trans(a0), 0.0), tl.where(above, tl.trans(a1), 0.0)
    a2, a3 = tl.where(above, tl.trans(a2), 0.0), tl.where(above, tl.trans(a3), 0.0)
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    x0, x1, x2, x3 = eye, eye, eye, eye
    for i in range(1, 16):
        x0 = substitute(x0, a0, i)
        x1 = substitute(x1, a1, i)
        if NB == 4:
            x2 = substitute(x2, a2, i)
            x3 = substitute(x3, a3, i)
    return x0, x1, x2, x3


@triton.jit
def invert_under(diagonal, under, NB: tl.constexpr):
    """The other blocks of (I + A)⁻¹ from its diagonal blocks and the blocks of A below the diagonal."""
    x0, x1, x2, x3 = diagonal
    a10, a20, a21, a30, a31, a32 = under
    x10 = -_chain(x1, _chain(a10, x0))
    x20, x21, x30, x31, x32 = x10, x10, x10, x10, x10
    if NB == 4:
        x21 = -_chain(x2, _chain(a21, x1))
        x32 = -_chain(x3, _chain(a32, x2))
        x20 = -_chain(x2, _chain(a20, x0) + _chain(a21, x10))
        x31 = -_chain(x3, _chain(a31, x1) + _chain(a32, x21))
        x30 = -_chain(x3, _chain(a30, x0) + _chain(a31, x10) + _chain(a32, x20))
    return x10, x20, x21, x30, x31, x32


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
    NB: tl.constexpr = C // 16
    slot = tl.program_id(0).to(tl.int64) // HV
    hv = tl.program_id(0) % HV
    batch, first, rows = chunk_place(slot, chunks, packed, T, NT, C)
    if rows <= 0:
        return
    h = hv // (HV // H)
    q += batch * qb + first * qt + h * qh
    k += batch * kb + first * kt + h * kh
    row = (batch * T + first) * HV + hv
    beta += row
    g += row
    at = slot * HV + hv
    x += at * C * C
    p += at * C * C
    out = factors + at * FACTORS * C
    upto, after, totals = _all_decays(g, HV, rows, NB, GATED)
    u0, u1, u2, u3 = upto
    s0, s1, s2, s3 = after
    t0, t1, t2, t3 = totals
    p0, n0 = _factors(q, qt, k, kt, rows, K, scale, normalize, u0, s0 + (t1 + t2 + t3), out, 0, C, BLOCK)
    p1, n1 = _factors(q, qt, k, kt, rows, K, scale, normalize, u1 + t0, s1 + (t2 + t3), out, 1, C, BLOCK)
    p2, n2, p3, n3 = p1, n1, p1, n1
    if NB == 4:
        p2, n2 = _factors(q, qt, k, kt, rows, K, scale, normalize, u2 + (t0 + t1), s2 + t3, out, 2, C, BLOCK)
        p3, n3 = _factors(q, qt, k, kt, rows, K, scale, normalize, u3 + (t0 + t1 + t2), s3, out, 3, C, BLOCK)
    right = (n0, n1, n2, n3)
    # What is made last is what is needed last: registers decide the order.
    left = (p0, p1, p2, p3)
    diagonal = _weigh_diagonal(_on_diagonal(q, qt, k, kt, rows, K, NB, BLOCK), left, right, g, HV, rows, NB, GATED)
    under = _under_diagonal(q, qt, k, kt, rows, K, NB, BLOCK)
    put_lower(p, diagonal, _weigh_under(under, left, right, upto, after, t1, t2, NB, GATED), NB)
    # Taken again rather than kept: registers.
    upto, after, totals = _all_decays(g, HV, rows, NB, GATED)
    t0, t1, t2, t3 = totals
    a0, a1 = _rates(beta, HV, rows, 0) * n0, _rates(beta, HV, rows, 1) * n1
    a2, a3 = a1, a1
    if NB == 4:
        a2, a3 = _rates(beta, HV, rows, 2) * n2, _rates(beta, HV, rows, 3) * n3
    left = (a0, a1, a2, a3)
    diagonal = _weigh_diagonal(_on_diagonal(k, kt, k, kt, rows, K, NB, BLOCK), left, right, g, HV, rows, NB, GATED)
    diagonal = invert_diagonal(diagonal, NB)
    under = _under_diagonal(k, kt, k, kt, rows, K, NB, BLOCK)
    under = invert_under(diagonal, _weigh_under(under, left, right, upto, after, t1, t2, NB, GATED), NB)
    put_inverse(x, x_beta + at * C * C, diagonal, under, beta, HV, rows, NB, WITH_X)
