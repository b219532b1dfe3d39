"""Forward kernels of family `lookup`; what they compute and move is told in ``_hosts``."""

from __future__ import annotations

import triton
import triton.language as tl
from pyrepr.kernels._launch import dot_input
from pyrepr.kernels.lookup._shared import (
    all_finite,
    checked,
    chunk_sums,
    chunk_sums_together,
    divided,
    kernel,
    one_hot,
    weight_of,
)


@kernel()
def hash_kernel(
    x,  # [T, K width], rows `stride` apart
    centre,  # [K width] float32, of the first `affine` columns
    scale,  # likewise
    codes,  # [T, K] int32, or [K, T] if by_chunk
    weights,  # float32, likewise
    stride,
    tokens,
    chunks,
    width,
    each,
    affine,
    slope,
    weighting,
    by_chunk,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tokens.to(tl.int64) * chunks
    inside = j < count
    row, column = divided(j, tl.where(by_chunk != 0, tokens, chunks), count)
    t = tl.where(by_chunk != 0, column, row)
    k = tl.where(by_chunk != 0, row, column)
    column = k * width
    start = x + t * stride + column
    code, size, inverse = chunk_sums(start, column, centre, scale, inside, width, each, affine, slope)
    tl.store(codes + j, code, mask=inside)
    tl.store(weights + j, weight_of(size, inverse, width, weighting), mask=inside)


@kernel("tables", "out", "h")
def rows_kernel(
    x,  # [T, K width], rows `stride` apart, or None: codes and weights are given
    centre,  # [K width] float32, of the first `affine` columns, or None
    scale,  # likewise
    codes,  # [T, K] int32 or None
    weights,  # [T, K] float32 or None
    tables,  # [K, n, h]
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [splits, T, h] float32
    stride,
    tokens,
    chunks,
    width,
    each,
    affine,
    n,
    h,
    slope,
    weighting,
    part,  # chunks in a split
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, chunks)
    sums = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < last
        if x is not None:
            column = k * width
            start = x + t * stride + column
            code, size, inverse = chunk_sums_together(start, column, centre, scale, inside, width, each, affine, slope)
            weight = weight_of(size, inverse, width, weighting)
        else:
            code = tl.load(codes + t * chunks + k, mask=inside, other=0)
            weight = tl.load(weights + t * chunks + k, mask=inside, other=0.0)
            code, weight = checked(code, weight, n)
        row = tl.minimum(k, last - 1).to(tl.int64) * n + code
        if scales is not None:
            weight *= tl.load(scales + row)
        source = tables + row[:, None] * h + columns[None, :]
        tile = tl.load(source, mask=(columns < h)[None, :], other=0.0).to(tl.float32)
        sums += tl.where(inside[:, None], weight[:, None] * tile, 0.0)
    target = out + (tl.program_id(2).to(tl.int64) * tokens + t) * h + columns
    tl.store(target, tl.sum(sums, 0), mask=columns < h)


@kernel("partial", "bias", "out", "h")
def finish_kernel(
    partial,  # [parts, rows, h] float32
    bias,  # [h], read if has_bias
    out,  # [rows, h]
    rows,
    h,
    parts,
    has_bias,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,  # parts read at a time
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = rows.to(tl.int64) * h
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s < parts)[:, None] & (j < count)[None, :]
        total += tl.sum(tl.load(partial + s.to(tl.int64)[:, None] * count + j[None, :], mask=mask, other=0.0), 0)
    total += tl.load(bias + j % h, mask=j < count * has_bias, other=0.0).to(tl.float32)
    tl.store(out + j, total.to(out.dtype.element_ty), mask=j < count)


@triton.jit
def _read_rows(tables, scales, k, code, weight, columns, n, h, FULL: tl.constexpr):
    """The rows of table k that these codes name, as they are stored, and what to multiply them with."""
    code, weight = checked(code, weight, n)
    row = tl.cast(k, tl.int64) * n + code
    if scales is not None:
        weight *= tl.load(scales + row)
    source = tables + row[:, None] * h + columns[None, :]
    tile = tl.load(source) if FULL else tl.load(source, mask=(columns < h)[None, :], other=0.0)
    return tile, weight


@triton.jit
def _gather(codes, weights, tables, scales, t, columns, stride_k, tokens, n, h, first, last, FULL: tl.constexpr):
    """Σ_k w T_k[code] of tables first ≤ k < last, for the tokens t and these columns -> [BLOCK_T, BLOCK_H]; of tokens
    that are not there the last one's. FULL: all columns are there.

    The rows of a table are added up while those of the next are on their way: read and used in one turn of the loop,
    ptxas would put each read right before its use, one in flight at a time.
    """
    sums = tl.zeros([t.shape[0], columns.shape[0]], tl.float32)
    at = tl.minimum(t, tokens - 1).to(tl.int64) + tl.cast(first, tl.int64) * stride_k
    tile, factor = _read_rows(tables, scales, first, tl.load(codes + at), tl.load(weights + at), columns, n, h, FULL)
    at += tl.where(first + 1 < last, stride_k, 0)
    code, weight = tl.load(codes + at), tl.load(weights + at)
    for k in range(first, last):
        following = tl.minimum(k + 1, last - 1)
        next_tile, next_factor = _read_rows(tables, scales, following, code, weight, columns, n, h, FULL)
        at += tl.where(k + 2 < last, stride_k, 0)
        code, weight = tl.load(codes + at), tl.load(weights + at)
        sums += factor[:, None] * tile.to(tl.float32)
        tile, factor = next_tile, next_factor
    return sums


@kernel("tables", "out", "h")
def stream_kernel(
    codes,  # [T, K] int32, of strides 1 and stride_k
    weights,  # [T, K] float32, of the same
    tables,  # [K, n, h]
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [splits, T, h] float32
    stride_k,
    tokens,
    chunks,
    n,
    h,
    part,  # tables in a split
    FULL: tl.constexpr,  # BLOCK_H divides h
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, chunks)
    sums = _gather(codes, weights, tables, scales, t, columns, stride_k, tokens, n, h, first, last, FULL)
    target = out + (tl.program_id(2).to(tl.int64) * tokens + t)[:, None] * h + columns[None, :]
    tl.store(target, sums, mask=(t < tokens)[:, None] & (columns < h)[None, :])


@kernel("tables", "out", "h")
def one_hot_kernel(
    codes,  # [T, K] int32, of strides 1 and stride_k
    weights,  # [T, K] float32, of the same
    tables,  # [K, n, h], n ≤ ROWS
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [splits, T, h] float32
    stride_k,
    tokens,
    chunks,
    n,
    h,
    part,  # tables in a split, a multiple of BLOCK_K
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, chunks)
    kind = tl.bfloat16 if scales is not None else tables.dtype.element_ty
    lane = tl.arange(0, BLOCK_K * ROWS)
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_K):
        own = start + tl.arange(0, BLOCK_K)
        a = one_hot(codes, weights, t, own, 1, stride_k, tokens, chunks, n, ROWS)
        k, c = start + lane // ROWS, lane % ROWS
        row = k.to(tl.int64) * n + c
        real = (k < chunks) & (c < n)
        if scales is not None:
            a *= tl.load(scales + row, mask=real, other=0.0)[None, :]
        mask = real[:, None] & (columns < h)[None, :]
        b = dot_input(tl.load(tables + row[:, None] * h + columns[None, :], mask=mask, other=0.0).to(kind))
        sums = tl.dot(dot_input(a.to(kind)), b, sums)
    if not all_finite(sums):
        sums = _gather(codes, weights, tables, scales, t, columns, stride_k, tokens, n, h, first, last, False)
    target = out + (tl.program_id(2).to(tl.int64) * tokens + t)[:, None] * h + columns[None, :]
    tl.store(target, sums, mask=(t < tokens)[:, None] & (columns < h)[None, :])
