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
from pyrepr.kernels.delta_rule._prepare import FACTORS
from pyrepr.kernels.delta_rule._shared import (
    load_square,
    load_state,
    load_tile,
    product,
    program_place,
    store_state,
    store_tile,
)

OUT, STATES, MAPS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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


@triton.jit
def load_start(starts, at, states, there, split, sequence, HV, hv, K, V, v0, BV: tl.constexpr, BK: tl.constexpr):
    """What a unit of work begins with: number `at` of `starts` (segments), or a caller's state, zero unless `there`."""
    if split:
        s = load_tile(starts + (at * V + v0) * K, K, V - v0, K, 0, BV, 0, BK)
    else:
        s = load_state(states + (sequence * HV + hv) * K * V, K, V, v0, BV, BK, there)
    return s


@triton.jit
def load_rows(x, step, token, at, rows, K, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr):
    """A chunk's rows of q or k; with a gate per key, those that ``_kda`` left in their place."""
    if GATE == 2:
        tile = load_tile(x + at * C * K, K, C, K, 0, C, 0, BK)
    else:
        tile = load_tile(x + token * step, step, rows, K, 0, C, 0, BK)
    return tile


@triton.jit
def decayed(s, factors, last, at, K, C: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr):
    """A state times the decay of a whole chunk."""
    if GATE == 1:
        s *= tl.load(factors + at * FACTORS * C + C - 1)
    if GATE == 2:
        keys = tl.arange(0, BK)
        s *= tl.load(last + at * K + keys, mask=keys < K, other=0.0)[None, :]
    return s


@triton.jit
def load_values(x, step, rows, width, v0, C: tl.constexpr, BV: tl.constexpr):
    """[BV, C]: value columns of a chunk, transposed as the state is."""
    return tl.trans(load_tile(x, step, rows, width, 0, C, v0, BV))


@triton.jit
def store_values(x, step, rows, V, v0, C: tl.constexpr, BV: tl.constexpr, tile):
    store_tile(x, step, rows, V, 0, C, v0, BV, tl.trans(tile))


@triton.jit(do_not_specialize=["has_initial", "split", "only_m", "keep", "packed", "T", "NT", "L", "H", "HV"])
def scan_kernel(
    q,  # [B, T, H, K]; with a gate per key [chunks, HV, C, K], times scale · e^G
    k,  # [B, T, H, K]; with a gate per key [chunks, HV, C, K], times e^G
    k_tail,  # with a gate per key [chunks, HV, C, K]: k times e^{G_C − G}
    last,  # with a gate per key [chunks, HV, K] float32: e^{G_C}
    v,  # [B, T, HV, V]
    x_beta,  # [chunks, HV, C, C], X diag(β)
    p,  # [chunks, HV, C, C]
    factors,  # [chunks, HV, FACTORS, C] float32
    initial,  # [N, HV, K, V] float32
    starts,  # [segments, HV, V, K] float32: states before segments; read (split), written (MAPS: N; keep)
    mapped,  # out under MAPS: [segments, HV, K, K] float32: Mᵀ
    o,  # out under OUT: [B, T, HV, V]
    final,  # out unless split: [N, HV, K, V] float32
    states,  # out under STATES: [chunks, HV, V, K], states before chunks
    values,  # out under STATES: [B, T, HV, V], V'
    sequences,  # [N, 4] of packed sequences: first token, tokens, first slot, first segment
    segments,  # [segments, 2] of packed sequences: sequence, number in it
    has_initial,  # 1 or 0, and so on
    split,  # a unit of work is a segment, not a sequence
    only_m,  # MAPS without N
    keep,  # store the states before segments
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
    GATE: tl.constexpr,  # 0: no decay, no normalisation; 1: factors per token; 2: a gate per key
    MODE: tl.constexpr,  # OUT, STATES or MAPS
):
    """BV value columns of one head through the chunks of a sequence or segment."""
    value_blocks = tl.cdiv(V, BV) * (1 - only_m)
    blocks = value_blocks
    if MODE == MAPS:
        blocks += tl.cdiv(K, BV)
    block, hv, unit = program_place(blocks, HV)
    sequence, batch, first, length, slot = unit_place(unit, split, sequences, segments, packed, T, NT, L, C)
    if sequence < 0:
        return
    v0 = block * BV
    width = V
    own = unit * HV + hv
    if MODE == MAPS:
        of_map = block >= value_blocks
        v0 = tl.where(of_map, block - value_blocks, block) * BV
        width = tl.where(of_map, 0, V)
        unity = (v0 + tl.arange(0, BV))[:, None] == tl.arange(0, BK)[None, :]
        s = tl.where(of_map & unity, 1.0, 0.0)
    else:
        s = load_start(starts, own, initial, has_initial, split, sequence, HV, hv, K, V, v0, BV, BK)
    v += batch * vb + hv * vh
    o += (batch * T * HV + hv) * V
    values += (batch * T * HV + hv) * V
    if GATE < 2:
        q += batch * qb + hv // (HV // H) * qh
        k += batch * kb + hv // (HV // H) * kh
    t = tl.arange(0, C)
    count = tl.cdiv(length, C).to(tl.int32)
    period = tl.maximum(count, 1)
    if keep:
        period = L
    for start in tl.range(0, count, period, disable_licm=True):
        # Outside the loop over chunks, which would lose registers to the branch.
        if keep:
            kept = first_segment(sequence, sequences, packed, NT, L) + start // L
            store_tile(starts + ((kept * HV + hv) * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, s)
        for n in tl.range(start, tl.minimum(start + period, count), disable_licm=True):
            at = (slot + n) * HV + hv
            rows = tl.minimum(length - n * C, C).to(tl.int32)
            token = first + n * C
            if MODE == STATES:
                store_tile(states + (at * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, s)
            keys_in = load_rows(k, kt, token, at, rows, K, C, BK, GATE)
            keys_out = keys_in
            if GATE == 2:
                keys_out = load_rows(k_tail, 0, token, at, rows, K, C, BK, GATE)
            factor = factors + at * FACTORS * C + t
            # R is never made: X diag(β) takes the two parts of it by themselves, V straight from where it was loaded.
            erased = product((-s).to(keys_in.dtype), tl.trans(keys_in))
            if GATE == 1:
                erased *= tl.load(factor + 4 * C)[None, :]
            solve = tl.trans(load_square(x_beta + at * C * C, C))
            new = product(load_values(v + token * vt, vt, rows, width, v0, C, BV), solve)
            new += product(erased.to(keys_in.dtype), solve)
            if MODE == STATES:
                store_values(values + token * HV * V, HV * V, rows, V, v0, C, BV, new)
            if MODE == OUT:
                # Rounded anew: the operand of the first product would stay in registers, or spill, until here.
                out = product(s.to(keys_in.dtype), tl.trans(load_rows(q, qt, token, at, rows, K, C, BK, GATE)))
                if GATE < 2:
                    out *= tl.load(factor + 6 * C)[None, :] if GATE == 1 else scale
                out += product(new.to(keys_in.dtype), tl.trans(load_square(p + at * C * C, C)))
                store_values(o + token * HV * V, HV * V, rows, V, v0, C, BV, out)
            if GATE == 1:
                new *= tl.load(factor + 5 * C)[None, :]
            s = decayed(s, factors, last, at, K, C, BK, GATE)
            s += product(new.to(keys_in.dtype), keys_out)
    if MODE == MAPS:
        if of_map:
            store_tile(mapped + (own * K + v0) * K, K, K - v0, K, 0, BV, 0, BK, s)
        else:
            store_tile(starts + (own * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, s)
    elif split == 0:
        store_state(final + (sequence * HV + hv) * K * V, K, V, v0, BV, BK, s)


@triton.jit(do_not_specialize=["has_initial", "packed", "T", "NT", "L", "HV"])
def merge_kernel(
    offsets,  # [segments, HV, V, K] float32: N of every segment
    mapped,  # [segments, HV, K, K] float32: Mᵀ
    starts,  # out: [segments, HV, V, K] float32: the state before every segment
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
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """S = M S + N, segment by segment, for BV value columns of one head; REVERSE: S = Mᵀ S + N from the last one.

    The state passes from a segment to the next through `starts`: the program reads back what it wrote, with a barrier
    between. That takes the products in pieces of BK keys, which registers have room for.
    """
    block, hv, sequence = program_place(tl.cdiv(V, BV), HV)
    v0 = block * BV
    unit = first_segment(sequence, sequences, packed, NT, L)
    length = unit * 0 + T
    if packed:
        length = tl.load(sequences + sequence * 4 + 1)
    count = tl.cdiv(tl.cdiv(length, C), L).to(tl.int32)
    state = (sequence * HV + hv) * K * V
    first = tl.where(count > 0, 0, -1)  # a sequence without segments goes straight to `final`
    for k0 in range(0, K, BK):
        s = load_state(initial + state + k0 * V, K - k0, V, v0, BV, BK, has_initial)
        if first == 0:
            number = unit + (count - 1 if REVERSE else 0)
            store_tile(starts + ((number * HV + hv) * V + v0) * K + k0, K, V - v0, K - k0, 0, BV, 0, BK, s)
        else:
            store_state(final + state + k0 * V, K - k0, V, v0, BV, BK, s)
    for n in range(0, count):
        tl.debug_barrier()
        number = unit + (count - 1 - n if REVERSE else n)
        at = number * HV + hv
        following = (number - 1 if REVERSE else number + 1) * HV + hv
        m = mapped + at * K * K
        for k1 in range(0, K, BK):
            s = load_tile(offsets + (at * V + v0) * K + k1, K, V - v0, K - k1, 0, BV, 0, BK)
            for k0 in range(0, K, BK):
                left = load_tile(starts + (at * V + v0) * K + k0, K, V - v0, K - k0, 0, BV, 0, BK)
                if REVERSE:
                    right = tl.trans(load_tile(m + (k1 * K + k0), K, K - k1, K - k0, 0, BK, 0, BK))
                else:
                    right = load_tile(m + (k0 * K + k1), K, K - k0, K - k1, 0, BK, 0, BK)
                s += product(left, right)
            if n + 1 < count:
                store_tile(starts + (following * V + v0) * K + k1, K, V - v0, K - k1, 0, BV, 0, BK, s)
            else:
                store_state(final + state + k1 * V, K - k1, V, v0, BV, BK, s)


@triton.jit(do_not_specialize=["split", "packed", "T", "NT", "L", "H", "HV"])
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
    starts,  # [segments, HV, V, K] float32: gradients after segments; read (split), written (OFFSETS: N')
    grad_states,  # out unless OFFSETS: [chunks, HV, V, K], gradients after chunks
    residuals,  # out unless OFFSETS: [B, T, HV, V], dR
    grad_v,  # out unless OFFSETS: [B, T, HV, V]
    grad_initial,  # out unless split: [N, HV, K, V] float32
    sequences,
    segments,
    split,
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
    GATE: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """The gradient of the state, from the last chunk to the first, for BV value columns of one head."""
    block, hv, unit = program_place(tl.cdiv(V, BV), HV)
    v0 = block * BV
    sequence, batch, first, length, slot = unit_place(unit, split, sequences, segments, packed, T, NT, L, C)
    if sequence < 0:
        return
    own = unit * HV + hv
    if OFFSETS:
        ds = tl.zeros([BV, BK], tl.float32)
    else:
        ds = load_start(starts, own, grad_final, 1, split, sequence, HV, hv, K, V, v0, BV, BK)
    row = batch * T * HV + hv
    beta += row
    grad_o += row * V
    residuals += row * V
    grad_v += row * V
    if GATE < 2:
        q += batch * qb + hv // (HV // H) * qh
        k += batch * kb + hv // (HV // H) * kh
    t = tl.arange(0, C)
    count = tl.cdiv(length, C).to(tl.int32)
    for i in tl.range(0, count, disable_licm=True):
        n = count - 1 - i
        at = (slot + n) * HV + hv
        rows = tl.minimum(length - n * C, C).to(tl.int32)
        token = first + n * C
        if not OFFSETS:
            store_tile(grad_states + (at * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, ds)
        queries = load_rows(q, qt, token, at, rows, K, C, BK, GATE)
        keys_in = load_rows(k, kt, token, at, rows, K, C, BK, GATE)
        keys_out = keys_in
        if GATE == 2:
            keys_out = load_rows(k_tail, 0, token, at, rows, K, C, BK, GATE)
        rate = tl.load(beta + (token + t) * HV, mask=t < rows, other=0.0)
        factor = factors + at * FACTORS * C + t
        grad = load_values(grad_o + token * HV * V, HV * V, rows, V, v0, C, BV)
        dr = product(ds.to(keys_in.dtype), tl.trans(keys_out))
        if GATE == 1:
            dr *= tl.load(factor + 5 * C)[None, :]
        dr += product(grad, load_square(p + at * C * C, C))
        read = grad.to(tl.float32)
        if GATE == 0:
            read *= scale
        if GATE == 1:
            read *= tl.load(factor + 6 * C)[None, :]
        ds = decayed(ds, factors, last, at, K, C, BK, GATE)
        ds += product(read.to(keys_in.dtype), queries)
        dr = product(dr.to(keys_in.dtype), load_square(x + at * C * C, C))
        erased = dr * rate[None, :]
        if not OFFSETS:
            store_values(residuals + token * HV * V, HV * V, rows, V, v0, C, BV, dr)
            store_values(grad_v + token * HV * V, HV * V, rows, V, v0, C, BV, erased)
        if GATE == 1:
            erased *= tl.load(factor + 4 * C)[None, :]
        ds += product((-erased).to(keys_in.dtype), keys_in)
    if OFFSETS:
        store_tile(starts + (own * V + v0) * K, K, V - v0, K, 0, BV, 0, BK, ds)
    elif split == 0:
        store_state(grad_initial + (sequence * HV + hv) * K * V, K, V, v0, BV, BK, ds)
