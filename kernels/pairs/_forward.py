"""Kernels of `pairs_logsumexp`: a row sweep, which columns go through with the operands exchanged."""

import triton
import triton.language as tl
from pyrepr.kernels.pairs._shared import LN2, LOG2E, add_products


@triton.jit
def _set_apart(s, p, i, j, own, tags, positive, positives, by_column, BM: tl.constexpr, BN: tl.constexpr):
    """s with −∞ at the pairs with one tag, whose logits are written down."""
    hit = own[:, None] == tags[None, :]
    at = positive + tl.cast(p, tl.int64) * positives
    if by_column:
        tl.store(at + j + tl.arange(0, BN), tl.sum(tl.where(hit, s, 0.0), 0), mask=tl.max(hit.to(tl.int32), 0) > 0)
    else:
        tl.store(at + i + tl.arange(0, BM), tl.sum(tl.where(hit, s, 0.0), 1), mask=tl.max(hit.to(tl.int32), 1) > 0)
    return tl.where(hit, float("-inf"), s)


@triton.jit
def _add_prefix(
    dots,
    top,
    total,
    p,
    i,
    j,
    own,
    tags,
    some,
    row_factors,
    column_factors,
    positive,
    kept,
    n,
    m,
    last,
    positives,
    by_column,
    COUNT: tl.constexpr,
    KEEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The running maximum and sum of prefix p after this tile."""
    rows, columns, number = i + tl.arange(0, BM), j + tl.arange(0, BN), tl.arange(0, COUNT)
    left = tl.load(row_factors + tl.cast(p, tl.int64) * n + rows, mask=rows < n, other=0.0)
    right = tl.load(column_factors + tl.cast(p, tl.int64) * m + columns, mask=columns < last, other=0.0)
    s = dots * left[:, None] * right[None, :]
    if KEEP:
        at = kept + (tl.cast(p, tl.int64) * n + i) * m + j
        inside = (rows < n)[:, None] & (columns < last)[None, :]
        tl.store(at + (rows - i)[:, None] * m + (columns - j)[None, :], s, mask=inside)
    if some:
        s = _set_apart(s, p, i, j, own, tags, positive, positives, by_column, BM, BN)
    s = tl.where((columns < last)[None, :], s * LOG2E, float("-inf"))
    mine = number[None, :] == p
    before = tl.sum(tl.where(mine, top, 0.0), 1)
    now = tl.maximum(before, tl.max(s, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    added = tl.sum(tl.exp2(s - base[:, None]), 1)
    total = tl.where(mine, total * tl.exp2(before - base)[:, None] + added[:, None], total)
    return tl.where(mine, now[:, None], top), total


@triton.jit(do_not_specialize=["n", "m", "part", "count", "positives", "by_column"])
def logsumexp_kernel(
    x,  # [n, …] packed
    y,  # [m, …] packed
    stops,  # [count] int32: where each prefix ends in a packed row
    row_factors,  # [count, n] float32
    column_factors,  # [count, m] float32
    row_tags,  # [n] int64; 0, 1, … if by_column
    column_tags,  # [m] int64; 0, 1, … if not
    others,  # out: [splits, count, n] float32, log Σ e^s over the columns with another tag
    positive,  # out: [count, positives] float32, the logit of a pair with one tag: of its row, or its column
    kept,  # out if KEEP: [count, n, m] float32, the logits
    x_stride,
    y_stride,
    n,
    m,
    part,  # columns in a split, a multiple of BN
    count,
    positives,
    by_column,
    COUNT: tl.constexpr,  # room for so many prefixes
    KEEP: tl.constexpr,
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
        if by_column:
            some = tl.max(((tags >= i) & (tags < i + BM)).to(tl.int32), 0) > 0
        else:
            some = tl.max(((own >= j) & (own < j + BN)).to(tl.int32), 0) > 0
        dots = tl.zeros([BM, BN], tl.float32)
        if COUNT == 1:
            stop = tl.multiple_of(tl.load(stops), 64)
            dots = add_products(dots, x, y, i, j, x_stride, y_stride, n, last, 0, stop, BM, BN, BK, PRECISION)
            top, total = _add_prefix(
                *(dots, top, total, 0, i, j, own, tags, some, row_factors, column_factors, positive, kept),
                *(n, m, last, positives, by_column, COUNT, KEEP, BM, BN),
            )
        else:
            start = 0
            for p in range(count):
                stop = tl.multiple_of(tl.load(stops + p), 64)
                dots = add_products(dots, x, y, i, j, x_stride, y_stride, n, last, start, stop, BM, BN, BK, PRECISION)
                start = stop
                top, total = _add_prefix(
                    *(dots, top, total, p, i, j, own, tags, some, row_factors, column_factors, positive, kept),
                    *(n, m, last, positives, by_column, COUNT, KEEP, BM, BN),
                )
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
