"""Kernels of `pairs_logsumexp`: a row sweep, which columns go through with the operands exchanged."""

import triton
import triton.language as tl
from pyrepr.kernels.pairs._shared import LN2, LOG2E, add_products


@triton.jit(do_not_specialize=["n", "m", "part", "count", "positives", "by_column", "keep"])
def logsumexp_kernel(
    x,  # [n, …] packed
    y,  # [m, …] packed
    stops,  # [count] int32: where each prefix ends in a packed row
    row_factors,  # [count, n] float32
    column_factors,  # [count, m] float32
    row_tags,  # [n] int64
    column_tags,  # [m] int64
    others,  # out: [splits, count, n] float32, log Σ e^s over the columns with another tag
    positive,  # out: [count, positives] float32, the logit of a pair with one tag: of its row, or its column
    kept,  # out if `keep`: [count, n, m] float32, the logits
    x_stride,
    y_stride,
    n,
    m,
    part,  # columns in a split, a multiple of BN
    count,
    positives,
    by_column,
    keep,
    COUNT: tl.constexpr,  # room for so many prefixes
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i = tl.program_id(0) * BM
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, m)
    rows, number = i + tl.arange(0, BM), tl.arange(0, COUNT)
    own = tl.load(row_tags + rows, mask=rows < n, other=-1)
    top = tl.full([BM, COUNT], float("-inf"), tl.float32)
    total = tl.zeros([BM, COUNT], tl.float32)
    for j in range(first, last, BN):
        columns = j + tl.arange(0, BN)
        tags = tl.load(column_tags + columns, mask=columns < last, other=-2)
        hit = own[:, None] == tags[None, :]
        dots = tl.zeros([BM, BN], tl.float32)
        start = 0
        for p in range(count):
            stop = tl.multiple_of(tl.load(stops + p), 64)
            dots = add_products(dots, x, y, i, j, x_stride, y_stride, n, last, start, stop, BM, BN, BK, PRECISION)
            start = stop
            left = tl.load(row_factors + tl.cast(p, tl.int64) * n + rows, mask=rows < n, other=0.0)
            right = tl.load(column_factors + tl.cast(p, tl.int64) * m + columns, mask=columns < last, other=0.0)
            s = dots * left[:, None] * right[None, :]
            if keep:
                at = (tl.cast(p, tl.int64) * n + rows)[:, None] * m + columns[None, :]
                tl.store(kept + at, s, mask=(rows < n)[:, None] & (columns < last)[None, :])
            if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
                at = tl.where(
                    by_column != 0, columns[None, :] + rows[:, None] * 0, rows[:, None] + columns[None, :] * 0
                )
                tl.store(positive + tl.cast(p, tl.int64) * positives + at, s, mask=hit)
            s = tl.where(hit | (columns >= last)[None, :], float("-inf"), s * LOG2E)
            mine = number[None, :] == p
            before = tl.sum(tl.where(mine, top, 0.0), 1)
            now = tl.maximum(before, tl.max(s, 1))
            base = tl.where(now == float("-inf"), 0.0, now)
            added = tl.sum(tl.exp2(s - base[:, None]), 1)
            total = tl.where(mine, total * tl.exp2(before - base)[:, None] + added[:, None], total)
            top = tl.where(mine, now[:, None], top)
    base = tl.where(top == float("-inf"), 0.0, top)
    target = others + ((tl.program_id(1).to(tl.int64) * count + number)[None, :] * n + rows[:, None])
    tl.store(target, (base + tl.log2(total)) * LN2, mask=(rows < n)[:, None] & (number < count)[None, :])


@triton.jit(do_not_specialize=["n", "m", "apart"])
def tags_kernel(
    row_tags,  # [n] int64
    column_tags,  # [m] int64
    values,  # [count, m] float32
    out,  # [count, n] float32: log Σ e^value over the columns with a row's tag, −∞ if there is none
    n,
    m,
    apart,  # whether a row's own column is left out
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A program a prefix and block of rows."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.program_id(1).to(tl.int64)
    own = tl.load(row_tags + rows, mask=rows < n, other=-1)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j in range(0, m, BN):
        columns = j + tl.arange(0, BN)
        tags = tl.load(column_tags + columns, mask=columns < m, other=-2)
        hit = (own[:, None] == tags[None, :]) & ((apart == 0) | (rows[:, None] != columns[None, :]))
        if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
            value = tl.load(values + p * m + columns, mask=columns < m, other=0.0)
            s = tl.where(hit, value[None, :] * LOG2E, float("-inf"))
            now = tl.maximum(top, tl.max(s, 1))
            base = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            top = now
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out + p * n + rows, (base + tl.log2(total)) * LN2, mask=rows < n)
