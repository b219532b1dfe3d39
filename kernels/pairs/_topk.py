"""Kernels of `pairs_topk`: candidates by products on the tensor cores, their scores in float64, and rows all in float64
where the candidates do not prove to hold the best."""

import triton
import triton.language as tl
from pyrepr.kernels.pairs._shared import add_products, as_key, column_of, empty_keys, enter, score_of


@triton.jit(do_not_specialize=["width", "n", "m", "part", "exclude", "offset"])
def screen_kernel(
    x,  # [n, …] packed
    y,  # [m, …] packed
    factors,  # [m] float32
    shifts,  # [m] float32
    keys,  # out: [n, splits, KEPT] int64: the best factor · ⟨x_i, y_j⟩ + shift
    x_stride,
    y_stride,
    width,
    n,
    m,
    part,  # columns in a split, a multiple of BN
    exclude,  # whether to leave out the column i − offset of row i
    offset,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i = tl.program_id(0) * BM
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, m)
    rows = i + tl.arange(0, BM)
    best = empty_keys(BM, KEPT)
    for j in range(first, last, BN):
        columns = j + tl.arange(0, BN)
        dots = tl.zeros([BM, BN], tl.float32)
        dots = add_products(dots, x, y, i, j, x_stride, y_stride, n, last, 0, width, BM, BN, BK, PRECISION)
        factor = tl.load(factors + columns, mask=columns < last, other=0.0)
        shift = tl.load(shifts + columns, mask=columns < last, other=0.0)
        s = dots * factor[None, :] + shift[None, :]
        out = (columns >= last)[None, :] | (s != s)
        out |= (exclude != 0) & (rows[:, None] == columns[None, :] + offset)
        best = enter(best, tl.where(out, float("-inf"), s), j, BM, BN)
    place = (rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * KEPT + tl.arange(0, KEPT)[None, :]
    tl.store(keys + place, best, mask=(rows < n)[:, None])


@triton.jit
def _exact(x, y, there, columns, d, metric, BN: tl.constexpr, BK: tl.constexpr):
    """The scores of row x with rows `columns` of y that are `there`, [BN] float64; metric as in reference.METRICS."""
    dots, squares, distances = tl.zeros([BN], tl.float64), tl.zeros([BN], tl.float64), tl.zeros([BN], tl.float64)
    norm = tl.zeros([1], tl.float64)
    for k in range(0, d, BK):
        features = k + tl.arange(0, BK)
        a = tl.load(x + features, mask=features < d, other=0.0).to(tl.float64)
        at = y + columns.to(tl.int64)[:, None] * d + features[None, :]
        b = tl.load(at, mask=there[:, None] & (features < d)[None, :], other=0.0).to(tl.float64)
        dots += tl.sum(a[None, :] * b, 1)
        squares += tl.sum(b * b, 1)
        norm += tl.sum(a * a, 0)
        distances += tl.sum((a[None, :] - b) * (a[None, :] - b), 1)
    both = tl.sqrt(squares) * tl.sqrt(norm)
    cosines = tl.where(both == 0, both, dots / tl.where(both == 0, 1.0, both))
    return tl.where(metric == 0, dots, tl.where(metric == 1, cosines, -distances))


@triton.jit(do_not_specialize=["chunks", "d", "metric"])
def rescore_kernel(
    x,  # [n, d] contiguous
    y,  # [m, d] contiguous
    keys,  # [n, chunks, CHUNK] int64: of the candidates; out: with their scores, one rounding from those in float64
    least,  # out: [n, chunks] float32: the least of the scores they came with, −∞ where there was room
    chunks,
    d,
    metric,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
):
    """A program a row and chunk of candidates."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = keys + (row * chunks + chunk) * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(place)
    found = score_of(key)
    tl.store(least + row * chunks + chunk, tl.min(found, 0))
    there, column = found > float("-inf"), column_of(key)
    score = _exact(x + row * d, y, there, column, d, metric, CHUNK, BK).to(tl.float32)
    score = tl.where(there & (score == score), score, float("-inf"))
    tl.store(place, as_key(score, column))


@triton.jit(do_not_specialize=["m", "d", "metric", "exclude", "offset", "splits"])
def exact_kernel(
    x,  # [n, d] contiguous
    y,  # [m, d] contiguous
    sure,  # [n] bool: rows that have all they need
    keys,  # out: [n, splits, KEPT] int64; of the other rows the best of all columns, in the first of their splits
    m,
    d,
    metric,
    exclude,
    offset,
    splits,
    KEPT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(sure + row) == 0:
        best = empty_keys(1, KEPT)
        for j in range(0, m, BN):
            columns = j + tl.arange(0, BN)
            there = columns < m
            score = _exact(x + row * d, y, there, columns, d, metric, BN, BK).to(tl.float32)
            out = (columns >= m) | (score != score) | ((exclude != 0) & (row == columns + offset))
            best = enter(best, tl.where(out, float("-inf"), score)[None, :], j, 1, BN)
        place = keys + row * splits * KEPT + tl.arange(0, KEPT)[None, :]
        tl.store(place, best)
        for split in range(1, splits):
            tl.store(place + split * KEPT, empty_keys(1, KEPT))
