"""Kernels of `pairs_logsumexp_backward`: the coefficients of a block of columns, and their products with x and y."""

import triton
import triton.language as tl
from pyrepr.kernels._launch import dot_input
from pyrepr.kernels.pairs._shared import LOG2E, add_products


@triton.jit
def _coefficients(
    s,  # [BM, BN] the logits of prefix p
    p,  # int64
    i,
    j,
    labels,
    row_sums,
    row_weights,
    column_sums,
    column_weights,
    positive_weights,
    n,
    m,
    last,
    has_rows,
    has_columns,
    has_positive,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dS of `ops.pairs`, 0 outside."""
    rows, columns = i + tl.arange(0, BM), j + tl.arange(0, BN)
    ds = tl.zeros([BM, BN], tl.float32)
    if has_rows:
        r = tl.load(row_sums + p * n + rows, mask=rows < n, other=0.0)
        g = tl.load(row_weights + p * n + rows, mask=rows < n, other=0.0)
        ds += g[:, None] * tl.exp2((s - r[:, None]) * LOG2E)
    if has_columns:
        c = tl.load(column_sums + p * m + columns, mask=columns < last, other=0.0)
        h = tl.load(column_weights + p * m + columns, mask=columns < last, other=0.0)
        ds += h[None, :] * tl.exp2((s - c[None, :]) * LOG2E)
    if has_positive:
        own = tl.load(labels + rows, mask=rows < n, other=-1)
        if tl.max(((own >= j) & (own < j + BN)).to(tl.int32), 0) > 0:
            w = tl.load(positive_weights + p * n + rows, mask=rows < n, other=0.0)
            ds = tl.where(own[:, None] == columns[None, :], w[:, None], ds)
    return tl.where((rows < n)[:, None] & (columns < last)[None, :], ds, 0.0)


@triton.jit
def _put_prefix(
    s,  # [BM, BN]
    ds,
    p,
    i,
    j,
    row_factors,
    column_factors,
    slab,
    row_terms,
    column_terms,
    n,
    m,
    first,
    last,
    width,
    count,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Writes what prefix p gives; returns its coefficients."""
    rows, columns = i + tl.arange(0, BM), j + tl.arange(0, BN)
    terms = ds * s
    block = tl.cast(j // BN, tl.int64)
    tl.store(row_terms + (block * count + p) * n + rows, tl.sum(terms, 1), mask=rows < n)
    block = tl.cast(i // BM, tl.int64)
    tl.store(column_terms + (block * count + p) * m + columns, tl.sum(terms, 0), mask=columns < last)
    left = tl.load(row_factors + p * n + rows, mask=rows < n, other=0.0)
    right = tl.load(column_factors + p * m + columns, mask=columns < last, other=0.0)
    weights = ds * left[:, None] * right[None, :]
    corner = slab + (p * n + i) * width + (j - first)
    at = corner + (rows - i)[:, None] * width + (columns - j)[None, :]
    stored = (rows < n)[:, None] & (columns - first < width)[None, :]
    tl.store(at, weights.to(slab.dtype.element_ty), mask=stored)
    return weights


@triton.jit
def _logits(
    dots,
    p,
    i,
    j,
    row_factors,
    column_factors,
    kept,
    n,
    m,
    last,
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    rows, columns = i + tl.arange(0, BM), j + tl.arange(0, BN)
    if KEPT:
        at = kept + (p * n + i) * m + j
        inside = (rows < n)[:, None] & (columns < last)[None, :]
        return tl.load(at + (rows - i)[:, None] * m + (columns - j)[None, :], mask=inside, other=0.0)
    else:
        left = tl.load(row_factors + p * n + rows, mask=rows < n, other=0.0)
        right = tl.load(column_factors + p * m + columns, mask=columns < last, other=0.0)
        return dots * left[:, None] * right[None, :]


@triton.jit(do_not_specialize=["n", "m", "first", "last", "width", "count", "has_rows", "has_columns", "has_positive"])
def weights_kernel(
    x,  # [n, …] packed
    y,  # [m, …] packed
    stops,  # [count] int32
    row_factors,  # [count, n] float32
    column_factors,  # [count, m] float32
    labels,  # [n] int64; −1: none
    row_sums,  # [count, n] float32: r, read if has_rows
    row_weights,  # [count, n] float32
    column_sums,  # [count, m] float32: c, read if has_columns
    column_weights,  # [count, m] float32
    positive_weights,  # [count, n] float32, read if has_positive
    kept,  # [count, n, m] float32, read if KEPT
    slab,  # out: [count, n, width]: Σ over the prefixes from the p-th on of dS times both factors
    row_terms,  # out: [blocks of columns, count, n] float32: Σ_j dS s of a block
    column_terms,  # out: [blocks of rows, count, m] float32
    x_stride,
    y_stride,
    n,
    m,
    first,  # the slab's first column, a multiple of BN
    last,  # and the column after its last
    width,
    count,
    has_rows,
    has_columns,
    has_positive,
    COUNT: tl.constexpr,  # 1, or more prefixes than one
    KEPT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    i, j = tl.program_id(0) * BM, first + tl.program_id(1) * BN
    dots = tl.zeros([BM, BN], tl.float32)
    start = 0
    weights = dots
    for q in range(1 if COUNT == 1 else count):
        p = tl.cast(q, tl.int64)
        if not KEPT:
            stop = tl.multiple_of(tl.load(stops + p), 64)
            dots = add_products(dots, x, y, i, j, x_stride, y_stride, n, last, start, stop, BM, BN, BK, PRECISION)
            start = stop
        s = _logits(dots, p, i, j, row_factors, column_factors, kept, n, m, last, KEPT, BM, BN)
        ds = _coefficients(
            *(s, p, i, j, labels, row_sums, row_weights, column_sums, column_weights, positive_weights),
            *(n, m, last, has_rows, has_columns, has_positive, BM, BN),
        )
        weights = _put_prefix(
            *(s, ds, p, i, j, row_factors, column_factors, slab, row_terms, column_terms),
            *(n, m, first, last, width, count, BM, BN),
        )
    if COUNT > 1:  # a feature counts in every prefix from its own on
        rows, columns = tl.arange(0, BM), tl.arange(0, BN)
        inside = (i + rows < n)[:, None] & (j + columns < last)[None, :]
        for back in range(1, count):
            corner = slab + (tl.cast(count - 1 - back, tl.int64) * n + i) * width + (j - first)
            at = corner + rows[:, None] * width + columns[None, :]
            weights += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, weights.to(slab.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "inner", "features", "add"])
def product_kernel(
    weights,  # [n, inner], or [inner, n] if TURNED
    z,  # [inner, features] packed
    out,  # [n, features] float32
    weights_stride,
    z_stride,
    out_stride,
    n,
    inner,
    features,
    add,  # whether to what is there
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """weights z, the sum over `inner` in its order."""
    i, f = tl.program_id(0) * BM, tl.program_id(1) * BN
    rows, columns, steps = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, inner, BK):
        there = k + steps < inner
        if TURNED:
            at = weights + tl.cast(k, tl.int64) * weights_stride + i
            mask = there[:, None] & (i + rows < n)[None, :]
            a = tl.trans(tl.load(at + steps[:, None] * weights_stride + rows[None, :], mask=mask, other=0.0))
        else:
            at = weights + tl.cast(i, tl.int64) * weights_stride + k
            mask = there[None, :] & (i + rows < n)[:, None]
            a = tl.load(at + rows[:, None] * weights_stride + steps[None, :], mask=mask, other=0.0)
        at = z + tl.cast(k, tl.int64) * z_stride + f
        mask = there[:, None] & (f + columns < features)[None, :]
        b = tl.load(at + steps[:, None] * z_stride + columns[None, :], mask=mask, other=0.0).to(a.dtype)
        total = tl.dot(dot_input(a), dot_input(b), total, input_precision=PRECISION)
    target = out + tl.cast(i, tl.int64) * out_stride + f + rows[:, None] * out_stride + columns[None, :]
    mask = (i + rows < n)[:, None] & (f + columns < features)[None, :]
    there = mask & (f + columns < tl.where(add != 0, features, 0))[None, :]
    tl.store(target, total + tl.load(target, mask=there, other=0.0), mask=mask)
