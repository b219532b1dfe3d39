"""Where packed sequences, their segments and chunks stand, worked out on the device: reading it would synchronise."""

import triton
import triton.language as tl


@triton.jit
def _before(cu_seqlens, count, L, C: tl.constexpr, BLOCK: tl.constexpr):
    """(chunks, segments, shortest length) of the first `count` sequences."""
    chunks = tl.zeros([BLOCK], tl.int64)
    segments = tl.zeros([BLOCK], tl.int64)
    shortest = tl.zeros([BLOCK], tl.int64)
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ends = tl.load(cu_seqlens + j + 1, mask=j < count, other=0)
        length = ends - tl.load(cu_seqlens + j, mask=j < count, other=0)
        chunks += tl.cdiv(length, C)
        segments += tl.cdiv(tl.cdiv(length, C), L)
        shortest = tl.minimum(shortest, length)
    return tl.sum(chunks, 0), tl.sum(segments, 0), tl.min(shortest, 0)


@triton.jit(do_not_specialize=["T", "N", "L", "chunk_slots", "segment_slots"])
def index_kernel(
    cu_seqlens,  # [N + 1] int64
    sequences,  # out: [N, 4] int64: first token, tokens, first chunk's slot, first segment
    segments,  # out: [segment_slots, 2] int64: sequence, number of the segment in it; −1 where none is left
    chunks,  # out: [chunk_slots, 2] int64: first token, tokens; 0 tokens where none is left
    valid,  # out: [1] bool: cu_seqlens starts at 0, never decreases and ends at T
    T,
    N,
    L,
    chunk_slots,
    segment_slots,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence, and one for what is left over."""
    i = tl.program_id(0)
    chunk, segment, shortest = _before(cu_seqlens, i, L, C, BLOCK)
    j = tl.arange(0, BLOCK)
    if i == N:
        good = (shortest >= 0) & (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + N) == T)
        tl.store(valid, good)
        for start in range(chunk, chunk_slots, BLOCK):
            slot = start + j
            tl.store(chunks + slot * 2, 0, mask=slot < chunk_slots)
            tl.store(chunks + slot * 2 + 1, 0, mask=slot < chunk_slots)
        for start in range(segment, segment_slots, BLOCK):
            slot = start + j
            tl.store(segments + slot * 2, -1, mask=slot < segment_slots)
            tl.store(segments + slot * 2 + 1, 0, mask=slot < segment_slots)
    else:
        first = tl.load(cu_seqlens + i)
        length = tl.load(cu_seqlens + i + 1) - first
        row = sequences + i.to(tl.int64) * 4
        tl.store(row, first)
        tl.store(row + 1, length)
        tl.store(row + 2, chunk)
        tl.store(row + 3, segment)
        count = tl.cdiv(length, C)
        for start in range(0, count, BLOCK):
            number = start + j
            slot = chunk + number
            mask = (number < count) & (slot < chunk_slots)
            tl.store(chunks + slot * 2, first + number * C, mask=mask)
            tl.store(chunks + slot * 2 + 1, tl.minimum(length - number * C, C), mask=mask)
        for start in range(0, tl.cdiv(count, L), BLOCK):
            number = start + j
            slot = segment + number
            mask = (number < tl.cdiv(count, L)) & (slot < segment_slots)
            tl.store(segments + slot * 2, i, mask=mask)
            tl.store(segments + slot * 2 + 1, number, mask=mask)
