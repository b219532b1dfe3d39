"""The state through the chunks of a sequence, or of a segment of one, forward and backward.

Forward, S the state before a chunk, with X and P of ``_prepare``:

    R = diag(β) (V − diag(e^G) K S)      V' = X R      O = scale · diag(e^G) Q S + P V'
    S' = e^{G_C} S + (diag(e^{G_C − G}) K)ᵀ V'

Backward, dS' the gradient after a chunk:

    dV' = Pᵀ dO + diag(e^{G_C − G}) K dS'      dR = Xᵀ dV'      dV = diag(β) dR
    dS = e^{G_C} dS' + scale · (diag(e^G) Q)ᵀ dO − (diag(β e^G) K)ᵀ dR

A program holds the state of some value columns, transposed, [BV, K] in float32: every product then takes its left side
from registers, where the one before left it, and its right side from the rows of the chunk as they lie in memory.

Chunks follow one another, so a program is a long chain. Where there are too few sequences, heads and value blocks to
fill the GPU, a sequence is cut into segments. A segment is an affine map S' = M S + N: the same kernel yields N (from a
zero state) and M (from the unit matrix, without values), ``merge_kernel`` runs the segments' maps one after the other
for the states before each, and the segments run at once from there. Backward, the map is dS = Mᵀ dS' + N'.

Work per chunk and head: 3 C K V + 2 C² V multiply-adds; bytes at best, 16-bit: 4 C K + 4 C V + 4 C² (K, Q, V, O, X, P).
"""

import triton
import triton.language as tl

from pyrepr.kernels.delta_rule._tiles import load_square, load_state, load_tile, product, store_state, store_tile


@triton.jit
def unit_place(unit, split, sequences, segments, packed, T, NT, L, C: tl.constexpr):
    """Of a segment (`split`) or a sequence: (sequence or −1, row of the batch, first token, tokens, first slot)."""
    number = unit * 0
    sequence = unit
    if split:
        if packed:
            sequence = tl.load(segments + unit * 2)
            number = tl.load(segments + unit * 2 + 1)
        else:
            sequence = unit // tl.cdiv(NT, L)
            number = unit % tl.cdiv(NT, L)
    batch = sequence
    first = unit * 0
    length = first + T
    slot = sequence * NT
    if packed:
        row = sequences + tl.maximum(sequence, 0) * 4
        batch = unit * 0
        first = tl.load(row)
        length = tl.load(row + 1)
        slot = tl.load(row + 2)
    if split:
        first += number * L * C
        length = tl.minimum(length - number * L * C, L * C)
        slot += number * L
    return sequence, batch, first, length, slot


@triton.jit
def first_segment(sequence, sequences, packed, NT, L):
    segment = sequence * tl.cdiv(NT, L)
    if packed:
        segment = tl.load(sequences + sequence * 4 + 3)
    return segment


@triton.jit(do_not_specialize=["has_initial", "split", "maps", "keep", "has_states", "packed", "T", "NT", "L", "H", "HV"])
def scan_kernel(
    q,  # [B, T, H, K]; with a gate per key [chunks, HV, C, K], times scale · e^G
    k,  # [B, T, H, K]; with a gate per key [chunks, HV, C, K], times e^G
    k_tail,  # with a gate per key [chunks, HV, C, K]: k times e^{G_C − G}
    last,  # with a gate per key [chunks, HV, K] float32: e^{G_C}
    v,  # [B, T, HV, V]
    beta,  # [B, T, HV] float32
    x,  # [chunks, HV, C, C]
    p,  # [chunks, HV, C, C]
    factors,  # [chunks, HV, 4, C] float32
    initial,  # [N, HV, K, V] float32
    starts,  # [segments, HV, V, K] float32: states before segments; read (split), written (maps: N; keep)
    mapped,  # out (maps): [segments, HV, K, K] float32: Mᵀ
    o,  # out under OUT: [B, T, HV, V]
    final,  # out (final): [N, HV, K, V] float32
    states,  # out (states): [chunks, HV, V, K], states before chunks
    values,  # out (states): [B, T, HV, V], V'
    sequences,  # [N, 4] of packed sequences: first token, tokens, first slot, first segment
    segments,  # [segments, 2] of packed sequences: sequence, number in it
    has_initial,  # 1 or 0, and so on
    split,  # a unit of work is a segment, not a sequence
    maps,  # 1: what is wanted is N and M; 2: M alone
    keep,
    has_states,
    packed,
    T,
    NT,
    L,
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
    PER_KEY: tl.constexpr,
    OUT: tl.constexpr,
):
    """BV value columns of one head through the chunks of a sequence or segment."""
    value_blocks = tl.where(maps == 2, 0, tl.cdiv(V, BV))
    blocks = value_blocks + tl.where(maps == 0, 0, tl.cdiv(K, BV))
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % blocks).to(tl.int32)
    hv = pid // blocks % HV
    unit = pid // blocks // HV
    h = hv // (HV // H)
    sequence, batch, first, length, slot = unit_place(unit, split, sequences, segments, packed, T, NT, L, C)
    if sequence < 0:
        return
    of_map = block >= value_blocks
    v0 = tl.where(of_map, block - value_blocks, block) * BV
    width = tl.where(of_map, 0, V)
    keys = tl.arange(0, BK)
    if (split != 0) & (maps == 0):
        s = load_tile(starts + ((unit * HV + hv) * V + v0) * K, K, V - v0, K, 0, BV, 0, BK)
    else:
        s = load_state(initial + (sequence * HV + hv) * K * V, K, width, v0, BV, BK, has_initial)
        s = tl.where(of_map & ((v0 + tl.arange(0, BV))[:, None] == keys[None, :]), 1.0, s)
    row = (batch * T + first) * HV + hv
    beta += row
    v += batch * vb + first * vt + hv * vh
    o += row * V
    values += row * V
    if not PER_KEY:
        q += batch * qb + first * qt + h * qh
        k += batch * kb + first * kt + h * kh
    t = tl.arange(0, C)
    for n in range(0, tl.cdiv(length, C).to(tl.int32)):
        at = (slot + n) * HV + hv
        rows = tl.minimum(length - n * C, C).to(tl.int32)
        token = n.to(tl.int64) * C
        if keep:
            if n % L == 0:
                kept = first_segment(sequence, sequences, packed, NT, L) + n // L
                store_tile(starts + ((kept * HV + hv) * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, s)
        if has_states:
            store_tile(states + (at * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, s)
        if PER_KEY:
            keys_in = load_tile(k + at * C * K, K, C, K, 0, C, 0, BK)
            keys_out = load_tile(k_tail + at * C * K, K, C, K, 0, C, 0, BK)
            decay = tl.load(last + at * K + keys, mask=keys < K, other=0.0)[None, :]
        else:
            keys_in = load_tile(k + token * kt, kt, rows, K, 0, C, 0, BK)
            keys_out = keys_in
            decay = tl.load(factors + at * 4 * C + C - 1)
        rate = tl.load(beta + (token + t) * HV, mask=t < rows, other=0.0)
        before, after, norm_k, norm_q = load_factors(factors + at * 4 * C, C, PER_KEY)
        operand = s.to(keys_in.dtype)
        known = product(operand, tl.trans(keys_in)) * (before * norm_k)[None, :]
        given = tl.trans(load_tile(v + token * vt, vt, rows, width, 0, C, v0, BV).to(tl.float32))
        right = (rate[None, :] * (given - known)).to(keys_in.dtype)
        new = product(right, tl.trans(load_square(x + at * C * C, C)))
        if has_states:
            store_tile(values + token * HV * V, HV * V, rows, V, 0, C, v0, BV, tl.trans(new))
        if OUT:
            if PER_KEY:
                out = product(operand, tl.trans(load_tile(q + at * C * K, K, C, K, 0, C, 0, BK)))
            else:
                out = product(operand, tl.trans(load_tile(q + token * qt, qt, rows, K, 0, C, 0, BK)))
                out *= (scale * before * norm_q)[None, :]
            out += product(new.to(keys_in.dtype), tl.trans(load_square(p + at * C * C, C)))
            store_tile(o + token * HV * V, HV * V, rows, V, 0, C, v0, BV, tl.trans(out))
        new *= (after * norm_k)[None, :]
        s = s * decay + product(new.to(keys_in.dtype), keys_out)
    if maps:
        if of_map:
            store_tile(mapped + ((unit * HV + hv) * K + v0) * K, K, K - v0, K, 0, BV, 0, BK, s)
        else:
            store_tile(starts + ((unit * HV + hv) * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, s)
    elif split == 0:
        store_state(final + (sequence * HV + hv) * K * V, K, V, v0, BV, BK, s)


@triton.jit
def load_factors(factors, C: tl.constexpr, PER_KEY: tl.constexpr):
    """e^{G_i}, e^{G_C − G_i}, 1 / |k|, 1 / |q|; ones where they are in the rows already."""
    t = tl.arange(0, C)
    one = tl.full([C], 1.0, tl.float32)
    if PER_KEY:
        return one, one, one, one
    else:
        return (
            tl.load(factors + t),
            tl.load(factors + C + t),
            tl.load(factors + 2 * C + t),
            tl.load(factors + 3 * C + t),
        )


@triton.jit(do_not_specialize=["has_initial", "packed", "T", "NT", "L", "HV"])
def merge_kernel(
    starts,  # [segments, HV, V, K] float32: N of every segment, replaced by the state it starts from
    mapped,  # [segments, HV, K, K] float32: Mᵀ
    initial,  # [N, HV, K, V] float32
    final,  # out: [N, HV, K, V] float32
    sequences,
    has_initial,
    packed,
    T,
    NT,
    L,
    HV,
    K,
    V,
    C: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """S = M S + N, segment by segment, for BV value columns of one head; REVERSE: S = Mᵀ S + N from the last one.

    K is walked in PARTS parts of BK, 1 or 2, so that a part of M fits beside the state.
    """
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % blocks).to(tl.int32) * BV
    hv = pid // blocks % HV
    sequence = pid // blocks // HV
    unit = first_segment(sequence, sequences, packed, NT, L)
    length = unit * 0 + T
    if packed:
        length = tl.load(sequences + sequence * 4 + 1)
    count = tl.cdiv(tl.cdiv(length, C), L).to(tl.int32)
    state = (sequence * HV + hv) * K * V
    low = load_state(initial + state, K, V, v0, BV, BK, has_initial)
    high = low
    if PARTS == 2:
        high = load_state(initial + state + BK * V, K - BK, V, v0, BV, BK, has_initial)
    for n in range(0, count):
        number = n
        if REVERSE:
            number = count - 1 - n
        at = (unit + number) * HV + hv
        m = mapped + at * K * K
        own = starts + (at * V + v0) * K
        next_low = load_tile(own, K, V - v0, K, 0, BV, 0, BK) + _times(low, m, K, 0, 0, BK, REVERSE)
        if PARTS == 2:
            next_low += _times(high, m, K, BK, 0, BK, REVERSE)
            next_high = load_tile(own, K, V - v0, K, 0, BV, BK, BK) + _times(low, m, K, 0, BK, BK, REVERSE)
            next_high += _times(high, m, K, BK, BK, BK, REVERSE)
            store_tile(own, K, V - v0, K, 0, BV, BK, BK, high)
            high = next_high
        store_tile(own, K, V - v0, tl.minimum(K, BK), 0, BV, 0, BK, low)
        low = next_low
    store_state(final + state, tl.minimum(K, BK), V, v0, BV, BK, low)
    if PARTS == 2:
        store_state(final + state + BK * V, K - BK, V, v0, BV, BK, high)


@triton.jit
def _times(s, m, K, k0: tl.constexpr, k1: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr):
    """Sᵀ (from row k0 of S) times Mᵀ, or under REVERSE times M, to columns from k1. m: Mᵀ [K, K]."""
    if REVERSE:
        return product(s, tl.trans(load_tile(m + (k1 * K + k0), K, K - k1, K - k0, 0, BK, 0, BK)))
    else:
        return product(s, load_tile(m + (k0 * K + k1), K, K - k0, K - k1, 0, BK, 0, BK))


@triton.jit(do_not_specialize=["split", "maps", "packed", "T", "NT", "L", "H", "HV"])
def reverse_kernel(
    q,  # q to factors: as scan_kernel takes them
    k,
    k_tail,
    last,
    beta,
    x,
    p,
    factors,
    grad_o,  # [B, T, HV, V]
    grad_final,  # [N, HV, K, V] float32
    starts,  # [segments, HV, V, K] float32: gradients after segments; read (split), written (maps: N')
    grad_states,  # out unless maps: [chunks, HV, V, K], gradients after chunks
    residuals,  # out unless maps: [B, T, HV, V], dR
    grad_v,  # out unless maps: [B, T, HV, V]
    grad_initial,  # out unless split: [N, HV, K, V] float32
    sequences,
    segments,
    split,
    maps,
    packed,
    T,
    NT,
    L,
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
    scale,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PER_KEY: tl.constexpr,
):
    """The gradient of the state, from the last chunk to the first, for BV value columns of one head."""
    blocks = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % blocks).to(tl.int32) * BV
    hv = pid // blocks % HV
    unit = pid // blocks // HV
    h = hv // (HV // H)
    sequence, batch, first, length, slot = unit_place(unit, split, sequences, segments, packed, T, NT, L, C)
    if sequence < 0:
        return
    keys = tl.arange(0, BK)
    if split:
        ds = load_tile(starts + ((unit * HV + hv) * V + v0) * K, K, (V - v0) * (1 - maps), K, 0, BV, 0, BK)
    else:
        ds = load_state(grad_final + (sequence * HV + hv) * K * V, K, V, v0, BV, BK, 1)
    row = (batch * T + first) * HV + hv
    beta += row
    grad_o += row * V
    residuals += row * V
    grad_v += row * V
    if not PER_KEY:
        q += batch * qb + first * qt + h * qh
        k += batch * kb + first * kt + h * kh
    t = tl.arange(0, C)
    count = tl.cdiv(length, C).to(tl.int32)
    for i in range(0, count):
        n = count - 1 - i
        at = (slot + n) * HV + hv
        rows = tl.minimum(length - n * C, C).to(tl.int32)
        token = n.to(tl.int64) * C
        if maps == 0:
            store_tile(grad_states + (at * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, ds)
        if PER_KEY:
            queries = load_tile(q + at * C * K, K, C, K, 0, C, 0, BK)
            keys_in = load_tile(k + at * C * K, K, C, K, 0, C, 0, BK)
            keys_out = load_tile(k_tail + at * C * K, K, C, K, 0, C, 0, BK)
            decay = tl.load(last + at * K + keys, mask=keys < K, other=0.0)[None, :]
        else:
            queries = load_tile(q + token * qt, qt, rows, K, 0, C, 0, BK)
            keys_in = load_tile(k + token * kt, kt, rows, K, 0, C, 0, BK)
            keys_out = keys_in
            decay = tl.load(factors + at * 4 * C + C - 1)
        rate = tl.load(beta + (token + t) * HV, mask=t < rows, other=0.0)
        before, after, norm_k, norm_q = load_factors(factors + at * 4 * C, C, PER_KEY)
        grad = tl.trans(load_tile(grad_o + token * HV * V, HV * V, rows, V, 0, C, v0, BV))
        dr = product(ds.to(keys_in.dtype), tl.trans(keys_out)) * (after * norm_k)[None, :]
        dr += product(grad, load_square(p + at * C * C, C))
        dr = product(dr.to(keys_in.dtype), load_square(x + at * C * C, C))
        erased = dr * rate[None, :]
        if maps == 0:
            store_tile(residuals + token * HV * V, HV * V, rows, V, 0, C, v0, BV, tl.trans(dr))
            store_tile(grad_v + token * HV * V, HV * V, rows, V, 0, C, v0, BV, tl.trans(erased))
        read = grad.to(tl.float32)
        if not PER_KEY:
            read *= (scale * before * norm_q)[None, :]
        erased *= (before * norm_k)[None, :]
        ds = ds * decay + product(read.to(keys_in.dtype), queries)
        ds -= product(erased.to(keys_in.dtype), keys_in)
    if maps:
        store_tile(starts + ((unit * HV + hv) * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, ds)
    elif split == 0:
        store_state(grad_initial + (sequence * HV + hv) * K * V, K, V, v0, BV, BK, ds)
