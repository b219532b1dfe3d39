"""Which sequence a token belongs to, and its place in it, worked out on the device: reading it would synchronise."""

import triton
import triton.language as tl
from pyrepr.kernels.causal_conv1d._shared import POINTERS, SIZES


@triton.jit
def _sequence_of(sequences, row, inside, N, steps):
    """The last n whose bound is not behind `row`, by bisection in `steps`; one that exists, whatever the bounds say."""
    low, high = tl.zeros_like(row), tl.zeros_like(row) + N
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(sequences + middle, mask=inside, other=0) <= row
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
    return tl.minimum(low, tl.maximum(N - 1, 0))


@triton.jit
def _check(sequences, valid, T, N, BLOCK: tl.constexpr):
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        low = tl.load(sequences + i, mask=i < N, other=0)
        wrong += tl.where(tl.load(sequences + i + 1, mask=i < N, other=0) < low, 1, 0)
    good = (tl.sum(wrong, 0) == 0) & (tl.load(sequences) == 0) & (tl.load(sequences + N) == T)
    tl.store(valid, good)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def index_kernel(
    sequences,  # KIND 1: seq_idx [B, T]; 2: cu_seqlens [N + 1]; 0: not read
    position,  # out: [B, T] int32: how many tokens of its sequence come before a token, W − 1 standing for more
    number,  # out: [B, T] int32: its sequence
    valid,  # out of KIND 2: [1] bool, whether cu_seqlens starts at 0, never decreases and ends at T
    rows,  # B T
    T,
    N,
    W,
    steps,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    n, t = row // tl.maximum(T, 1), row % tl.maximum(T, 1)
    place = tl.minimum(t, W - 1)
    if KIND == 1:
        same = inside
        place = tl.zeros_like(t)
        for back in range(1, W):
            same = same & (back <= t)
            here = tl.load(sequences + (row - back + 1), mask=same, other=0)
            same = same & (here == tl.load(sequences + (row - back), mask=same, other=0))
            place += same.to(tl.int64)
    if KIND == 2:
        n = _sequence_of(sequences, row, inside, N, steps)
        place = tl.minimum(place, tl.maximum(row - tl.load(sequences + n, mask=inside, other=0), 0))
        if tl.program_id(0) == 0:
            _check(sequences, valid, T, N, BLOCK)
    tl.store(position + row, place.to(tl.int32), mask=inside)
    tl.store(number + row, n.to(tl.int32), mask=inside)
