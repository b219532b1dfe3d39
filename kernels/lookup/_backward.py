"""Backward kernels of family `lookup`; what they compute and move is told in ``_hosts``."""

from __future__ import annotations

import triton
import triton.language as tl
from pyrepr.kernels._launch import dot_input
from pyrepr.kernels.lookup._shared import all_finite, checked, chunk_sums, divided, kernel, one_hot, standardised


@kernel()
def hash_backward_kernel(
    x,  # [T, K width], rows `stride` apart
    centre,  # [K width] float32, of the first `affine` columns
    scale,  # likewise
    grad_weights,  # [T, K] float32
    grad,  # [T, K width] in the dtype of x
    stride,
    tokens,
    chunks,
    width,
    each,
    affine,
    slope,
    weighting,
    BLOCK: tl.constexpr,
):
    """Every element sums up its own chunk: more arithmetic than a chunk a thread, but reads and writes in order."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tokens.to(tl.int64) * chunks * width
    inside = j < count
    chunk, i = divided(j, width, count)
    t, k = divided(chunk, chunks, count)
    column = k * width
    start = x + t * stride + column
    value = tl.load(start + i, mask=inside, other=0.0).to(tl.float32)
    value = standardised(value, centre, scale, column + i, inside, affine)
    outer = tl.load(grad_weights + chunk, mask=inside, other=0.0)
    outer *= tl.load(scale + column + i, mask=inside & (column + i < affine), other=1.0)
    _, size, inverse = chunk_sums(start, column, centre, scale, inside, width, each, affine, slope)
    decay = tl.exp(-tl.abs(value) * slope)
    other = slope * decay / (1 + decay)  # of log p
    steep = tl.where(weighting == 1, 1 + size * other, other) / inverse
    steep = tl.where(weighting == 2, 1.0 / width, tl.where(weighting == 3, 0.0, steep))
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, value * 0))
    result = outer * sign * steep
    tl.store(grad + j, result.to(grad.dtype.element_ty), mask=inside)


@kernel("grad", "out", "stride", "h")
def segments_kernel(
    grad,  # [T, h], rows `stride` apart
    order,  # [K, T] int64: the tokens of each table by code, then by number
    starts,  # [K, n] int64: where each code's tokens begin in `order`
    rows,  # [R] int64: numbers k n + c of the rows wanted
    codes,  # [T, K] int32
    weights,  # [T, K] float32
    out,  # [parts, R, h]; R = K n but for mode 1
    stride,
    tokens,
    chunks,
    n,
    h,
    mode,  # what a program takes: 0 the row of its number, 1 a row of `rows`, 2 the row that a place in `order` opens
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    r = tl.program_id(0)
    if mode == 2:
        first_token = tl.load(order + r)
        code = tl.load(codes + first_token * chunks + r // tokens)
        row = r // tokens * n + tl.minimum(tl.maximum(code, 0), n - 1)
    else:
        row = tl.load(rows + r, mask=mode == 1, other=r).to(tl.int32)
    k, c = (row // n).to(tl.int64), row % n
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin = tl.load(starts + row).to(tl.int32)
    end = tl.load(starts + row + 1, mask=c + 1 < n, other=tokens).to(tl.int32)
    part = tl.cdiv(end - begin, tl.num_programs(2))
    opens = tl.where(mode == 2, begin == r % tokens, True)
    begin += tl.program_id(2) * part
    end = tl.where(opens, tl.minimum(begin + part, end), begin)
    # Codes out of range were sorted in with the first code or the last.
    suspects = tl.where((c == 0) | (c == n - 1), end, begin)
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for first in range(begin, end, BLOCK_T):
        i = first + tl.arange(0, BLOCK_T)
        inside = i < end
        t = tl.load(order + k * tokens + i, mask=inside, other=0)
        weight = tl.load(weights + t * chunks + k, mask=inside, other=0.0)
        code = tl.load(codes + t * chunks + k, mask=i < suspects, other=0)
        wrong = inside & ((code < 0) | (code >= n))
        weight = tl.where(wrong, float("nan"), weight)
        mask = inside[:, None] & (columns < h)[None, :]
        tile = tl.load(grad + t[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += weight[:, None] * tile
    place = tl.where(mode == 2, row, tl.program_id(2).to(tl.int64) * tl.num_programs(0) + r)
    total = tl.sum(sums, 0).to(out.dtype.element_ty)
    tl.store(out + place * h + columns, total, mask=(columns < h) & opens)


@triton.jit
def _segments_one_by_one(grad, codes, weights, columns, k, c, stride, tokens, chunks, n, h):
    """What one_hot_segments_kernel computes, a token after the other: [BLOCK_K · ROWS, BLOCK_H]."""
    sums = tl.zeros([k.shape[0], columns.shape[0]], tl.float32)
    for t in range(0, tokens):
        at = tl.cast(t, tl.int64) * chunks + k
        code = tl.load(codes + at, mask=k < chunks, other=0)
        weight = tl.load(weights + at, mask=k < chunks, other=0.0)
        code, weight = checked(code, weight, n)
        line = tl.load(grad + tl.cast(t, tl.int64) * stride + columns, mask=columns < h, other=0.0).to(tl.float32)
        sums += tl.where((code == c)[:, None], weight[:, None] * line[None, :], 0.0)
    return sums


@kernel("grad", "out", "stride", "h")
def one_hot_segments_kernel(
    grad,  # [T, h] bfloat16, rows `stride` apart
    codes,  # [T, K] int32
    weights,  # [T, K] float32
    out,  # [K, n, h], n ≤ ROWS
    stride,
    tokens,
    chunks,
    n,
    h,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_K * ROWS)
    first = tl.program_id(0) * BLOCK_K
    k, c = first + lane // ROWS, lane % ROWS
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    kind = grad.dtype.element_ty
    sums = tl.zeros([BLOCK_K * ROWS, BLOCK_H], tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        a = one_hot(codes, weights, t, first + tl.arange(0, BLOCK_K), chunks, 1, tokens, chunks, n, ROWS).to(kind)
        source = grad + t.to(tl.int64)[:, None] * stride + columns[None, :]
        b = tl.load(source, mask=(t < tokens)[:, None] & (columns < h)[None, :], other=0.0)
        sums = tl.dot(tl.trans(dot_input(a)), dot_input(b), sums)
    if not all_finite(sums):
        sums = _segments_one_by_one(grad, codes, weights, columns, k, c, stride, tokens, chunks, n, h)
    real = (k < chunks) & (c < n)
    target = out + (k.to(tl.int64) * n + c)[:, None] * h + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=real[:, None] & (columns < h)[None, :])


@kernel("grad", "tables", "stride", "h")
def dots_kernel(
    grad,  # [T, h] float32, rows `stride` apart
    codes,  # [T, K] int32
    tables,  # [K, n, h]
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [T, K] float32
    stride,
    tokens,
    chunks,
    n,
    h,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    present = t < tokens
    lane = tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * BLOCK_K
    at = t.to(tl.int64) * chunks
    sums = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for start in range(0, h, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        mask = present[:, None] & (columns < h)[None, :]
        source = grad + t.to(tl.int64)[:, None] * stride + columns[None, :]
        g = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        for i in tl.static_range(BLOCK_K):
            k = tl.minimum(first + i, chunks - 1)
            code = tl.load(codes + at + k, mask=present, other=0)
            row = tl.cast(k, tl.int64) * n + tl.minimum(tl.maximum(code, 0), n - 1)
            tile = tl.load(tables + row[:, None] * h + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += tl.where((lane == i)[None, :], tl.sum(g * tile, 1)[:, None], 0.0)
    k = first + lane
    inside = present[:, None] & (k < chunks)[None, :]
    code = tl.load(codes + at[:, None] + k[None, :], mask=inside, other=0)
    code, sums = checked(code, sums, n)
    if scales is not None:
        sums *= tl.load(scales + k.to(tl.int64)[None, :] * n + code, mask=inside, other=0.0)
    tl.store(out + at[:, None] + k[None, :], sums, mask=inside)


@kernel("grad", "tables", "stride", "h")
def dots_few_kernel(
    grad,  # [T, h] float32, rows `stride` apart
    codes,  # [T, K] int32
    tables,  # [K, n, h]
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [T, K] float32
    stride,
    tokens,
    chunks,
    n,
    h,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token a program."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < chunks
    code = tl.load(codes + t * chunks + k, mask=inside, other=0)
    code, factor = checked(code, tl.full([BLOCK_K], 1.0, tl.float32), n)
    row = tl.minimum(k, chunks - 1).to(tl.int64) * n + code
    if scales is not None:
        factor *= tl.load(scales + row)
    sums = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for start in range(0, h, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        g = tl.load(grad + t * stride + columns, mask=columns < h, other=0.0).to(tl.float32)
        source = tables + row[:, None] * h + columns[None, :]
        sums += g[None, :] * tl.load(source, mask=(columns < h)[None, :], other=0.0).to(tl.float32)
    tl.store(out + t * chunks + k, tl.sum(sums, 1) * factor, mask=inside)


@kernel("grad", "tables", "stride", "h")
def one_hot_dots_kernel(
    grad,  # [T, h] in the dtype of tables, rows `stride` apart
    codes,  # [T, K] int32
    tables,  # [K, n, h], n ≤ ROWS
    out,  # [T, K] float32
    stride,
    tokens,
    chunks,
    n,
    h,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_K * ROWS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    table, c = tl.program_id(1) * BLOCK_K + lane // ROWS, lane % ROWS
    real = (table < chunks) & (c < n)
    source = grad + t.to(tl.int64)[:, None] * stride
    target = tables + (table.to(tl.int64) * n + c)[:, None] * h
    products = tl.zeros([BLOCK_T, BLOCK_K * ROWS], tl.float32)
    for start in range(0, h, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        inside = (columns < h)[None, :]
        a = tl.load(source + columns[None, :], mask=(t < tokens)[:, None] & inside, other=0.0)
        b = tl.load(target + columns[None, :], mask=real[:, None] & inside, other=0.0)
        products = tl.dot(dot_input(a), tl.trans(dot_input(b)), products)
    inside = (t < tokens)[:, None] & (k < chunks)[None, :]
    at = t.to(tl.int64)[:, None] * chunks + k[None, :]
    code = tl.load(codes + at, mask=inside, other=0)
    code, none = checked(code, tl.zeros([BLOCK_T, BLOCK_K], tl.float32), n)
    hot = code[:, :, None] == tl.arange(0, ROWS)[None, None, :]
    picked = tl.where(hot, tl.reshape(products, [BLOCK_T, BLOCK_K, ROWS]), 0.0)
    tl.store(out + at, tl.sum(picked, 2) + none, mask=inside)
