"""Backward kernels of family `lookup`; what they compute and move is told in lookup.py."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from pyrepr.kernels._launch import Config, Variant, dot_input
from pyrepr.kernels._lookup import (
    BF16,
    F16,
    F32,
    FLOATS,
    I8,
    ONE_HOT_ROWS,
    ONE_HOT_TOKENS,
    all_finite,
    checked,
    chunk_sums,
    divided,
    hash_arguments,
    is_whole,
    kernel,
    launch,
    made_whole,
    one_hot,
    parts_of,
    readable,
    refuse,
    table,
    variant,
)
from pyrepr.kernels.lookup import finish
from torch import Tensor

# Up to this many tokens a program takes one token at a time: blocks of tokens would be too few programs.
FEW_TOKENS = 64


@kernel()
def _hash_backward_kernel(
    x,  # [T, K bits], rows `stride` apart
    grad_weights,  # [T, K] float32
    grad,  # [T, K bits] in the dtype of x
    stride,
    tokens,
    chunks,
    bits,
    slope,
    weighting,
    BLOCK: tl.constexpr,
):
    """Every element sums up its own chunk: more arithmetic than a chunk a thread, but reads and writes in order."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tokens.to(tl.int64) * chunks * bits
    inside = j < count
    chunk, i = divided(j, bits, count)
    t, k = divided(chunk, chunks, count)
    z = x + t * stride + k * bits
    value = tl.load(z + i, mask=inside, other=0.0).to(tl.float32)
    outer = tl.load(grad_weights + chunk, mask=inside, other=0.0)
    _, size, inverse = chunk_sums(z, inside, bits, slope)
    decay = tl.exp(-tl.abs(value) * slope)
    other = slope * decay / (1 + decay)  # of log p
    steep = tl.where(weighting == 1, 1 + size * other, other) / inverse
    steep = tl.where(weighting == 2, 1.0 / bits, tl.where(weighting == 3, 0.0, steep))
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, value * 0))
    result = outer * sign * steep
    tl.store(grad + j, result.to(grad.dtype.element_ty), mask=inside)


@kernel("grad", "out", "stride", "h")
def _segments_kernel(
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
    """What _one_hot_segments_kernel computes, a token after the other: [BLOCK_K · ROWS, BLOCK_H]."""
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
def _one_hot_segments_kernel(
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
def _dots_kernel(
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
def _dots_few_kernel(
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
def _one_hot_dots_kernel(
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


HASH_BACKWARD = table("hash_backward", Config({"BLOCK": 256}))
SEGMENTS = table(
    "segments",
    Config({"BLOCK_T": 8, "BLOCK_H": 256}, 2),
    Config({"BLOCK_T": 4, "BLOCK_H": 512}, 2),
    Config({"BLOCK_T": 16, "BLOCK_H": 256}, 4),
    Config({"BLOCK_T": 8, "BLOCK_H": 128}, 1),
)
# For rows of grad that are not whole, with an address an element.
SEGMENTS_ODD = table(
    "segments_odd", Config({"BLOCK_T": 4, "BLOCK_H": 256}, 2), Config({"BLOCK_T": 8, "BLOCK_H": 128}, 2)
)
ONE_HOT_SEGMENTS = table(
    "one_hot_segments",
    Config({"BLOCK_T": 64, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 3),
    Config({"BLOCK_T": 64, "BLOCK_H": 256, "BLOCK_K": 8}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 2),
)
DOTS = table(
    "dots",
    Config({"BLOCK_T": 64, "BLOCK_H": 64, "BLOCK_K": 8}, 8),
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 8}, 16),
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 4}, 8),
    Config({"BLOCK_T": 64, "BLOCK_H": 128, "BLOCK_K": 4}, 8),
)
DOTS_FEW = table(
    "dots_few",
    Config({"BLOCK_H": 1024, "BLOCK_K": 4}, 4),
    Config({"BLOCK_H": 512, "BLOCK_K": 4}, 4),
    Config({"BLOCK_H": 512, "BLOCK_K": 8}, 4),
    Config({"BLOCK_H": 256, "BLOCK_K": 16}, 4),
)
# For tables that are not whole, with an address an element.
DOTS_FEW_ODD = table(
    "dots_few_odd", Config({"BLOCK_H": 512, "BLOCK_K": 4}, 4), Config({"BLOCK_H": 256, "BLOCK_K": 8}, 4)
)
ONE_HOT_DOTS = table(
    "one_hot_dots",
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 8}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 16}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 2),
)


@functools.cache
def _hash_variant(config: Config, x: torch.dtype) -> Variant:
    return variant(_hash_backward_kernel, "hash_backward", config, {"x": x, "grad_weights": F32, "grad": x})


@functools.cache
def _segments_variant(config: Config, grad: torch.dtype, out: torch.dtype, whole: bool) -> Variant:
    pointers = {"grad": grad, "codes": torch.int32, "weights": F32, "out": out}
    places = dict.fromkeys(("order", "starts", "rows"), torch.int64)
    return variant(_segments_kernel, "segments", config, {**pointers, **places}, whole)


@functools.cache
def _one_hot_segments_variant(config: Config, out: torch.dtype, whole: bool) -> Variant:
    pointers = {"grad": BF16, "codes": torch.int32, "weights": F32, "out": out}
    return variant(_one_hot_segments_kernel, "one_hot_segments", config, pointers, whole, ROWS=ONE_HOT_ROWS)


@functools.cache
def _dots_variant(config: Config, tables: torch.dtype, whole: bool) -> Variant:
    scales = F32 if tables == I8 else None
    pointers = {"grad": F32, "codes": torch.int32, "tables": tables, "scales": scales, "out": F32}
    kernel, name = (_dots_kernel, "dots") if "BLOCK_T" in config.blocks else (_dots_few_kernel, "dots_few")
    return variant(kernel, name, config, pointers, whole)


@functools.cache
def _one_hot_dots_variant(config: Config, tables: torch.dtype) -> Variant:
    pointers = {"grad": tables, "codes": torch.int32, "tables": tables, "out": F32}
    return variant(_one_hot_dots_kernel, "one_hot_dots", config, pointers, ROWS=ONE_HOT_ROWS)


def variants(architecture: int) -> list[Variant]:
    """All that can be launched there."""
    a, stored = architecture, (*FLOATS, I8)
    found = [_hash_variant(HASH_BACKWARD.rows[a], x) for x in FLOATS]
    for whole in (True, False):
        sorted_ones = SEGMENTS if whole else SEGMENTS_ODD
        kinds = [(grad, out) for grad in FLOATS for out in dict.fromkeys((F32, grad))]
        found += [_segments_variant(sorted_ones.rows[a], *kind, whole) for kind in kinds]
        found += [_one_hot_segments_variant(ONE_HOT_SEGMENTS.rows[a], out, whole) for out in (F32, BF16)]
        few = DOTS_FEW if whole else DOTS_FEW_ODD
        found += [_dots_variant(few.rows[a], tables, whole) for tables in stored]
    # Of rows that start anywhere every element takes an address of its own: no registers for so large tiles.
    found += [_dots_variant(DOTS.rows[a], tables, True) for tables in stored]
    return found + [_one_hot_dots_variant(ONE_HOT_DOTS.rows[a], tables) for tables in (BF16, F16)]


def hash_backward(x: Tensor, grad_weights: Tensor, bits: int, weighting: str, temperature: float) -> Tensor:
    """The leaf op lookup_hash_backward: grad_weights [T, K] · ∂w/∂x, [T, d] in the dtype of x."""
    refuse(x)
    x = readable(x)
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = hash_arguments(x, bits, weighting, temperature)
    arguments.update(grad_weights=grad_weights.contiguous(), grad=grad)

    def run(config: Config) -> None:
        grid = (triton.cdiv(grad.numel(), config.blocks["BLOCK"]),)
        launch(_hash_variant(config, x.dtype), grid, arguments, x.device)

    HASH_BACKWARD.run(x.device, run)
    return grad


def _by_code(codes: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The tokens of each table by code, in their order within a code: [K, T], and where each code begins: [K, n]."""
    dtype = torch.uint8 if n <= 256 else torch.int16 if n <= 1 << 15 else torch.int32  # fewer bytes, fewer passes
    keys = codes.clamp(0, n - 1).t().to(dtype).contiguous()
    keys, order = keys.sort(dim=1, stable=True)
    wanted = torch.arange(n, dtype=dtype, device=codes.device).repeat(codes.shape[1], 1)
    return order, torch.searchsorted(keys, wanted)


def _segments(grad: Tensor, codes: Tensor, weights: Tensor, n: int, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[K n, h], or [R, h] for R rows."""
    (tokens, chunks), h = codes.shape, grad.shape[1]
    count = chunks * n if rows is None else rows.shape[0]
    order, starts = _by_code(codes, n)
    arguments = {"grad": grad, "order": order, "starts": starts, "codes": codes, "weights": weights}
    arguments.update(stride=grad.stride(0), tokens=tokens, chunks=chunks, n=n, h=h)
    # Most rows have no token: they are not worth a program each.
    scarce = rows is None and 0 < 2 * tokens <= n
    arguments.update(rows=starts if rows is None else rows.contiguous(), mode=2 if scarce else int(rows is not None))

    def run(config: Config) -> Tensor:
        columns = triton.cdiv(h, config.blocks["BLOCK_H"])
        # All tokens of a table may have one code: then that many programs do all the work, unless they share it.
        steps = triton.cdiv(tokens, 4 * config.blocks["BLOCK_T"])
        parts = 1 if scarce else parts_of(steps, chunks * columns, 4 * count * h, grad.device)
        stored = dtype if parts == 1 and dtype == grad.dtype else F32
        out = (torch.zeros if scarce else torch.empty)(parts, count, h, dtype=stored, device=grad.device)
        described = _segments_variant(config, grad.dtype, stored, h % 16 == 0)
        grid = (tokens * chunks if scarce else count, columns, parts)
        launch(described, grid, {**arguments, "out": out}, grad.device)
        return out

    configs = SEGMENTS if h % 16 == 0 else SEGMENTS_ODD
    return finish(configs.run(grad.device, run, (grad.dtype, tokens)), None, dtype)


def _one_hot_segments(grad: Tensor, codes: Tensor, weights: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    (tokens, chunks), h = codes.shape, grad.shape[1]
    out = torch.empty(chunks * n, h, dtype=BF16 if dtype == BF16 else F32, device=grad.device)
    arguments = {"grad": grad, "codes": codes, "weights": weights, "out": out, "stride": grad.stride(0)}
    arguments.update(tokens=tokens, chunks=chunks, n=n, h=h)

    def run(config: Config) -> None:
        grid = (triton.cdiv(chunks, config.blocks["BLOCK_K"]), triton.cdiv(h, config.blocks["BLOCK_H"]))
        launch(_one_hot_segments_variant(config, out.dtype, h % 16 == 0), grid, arguments, grad.device)

    ONE_HOT_SEGMENTS.run(grad.device, run, (tokens,))
    return out.to(dtype)


def _dots(grad: Tensor, codes: Tensor, tables: Tensor, scales: Tensor | None) -> Tensor:
    (tokens, chunks), (_, n, h), dtype = codes.shape, tables.shape, tables.dtype
    out = torch.empty(tokens, chunks, dtype=F32, device=grad.device)
    whole = is_whole(tables)
    hot = n <= ONE_HOT_ROWS and tokens >= ONE_HOT_TOKENS and grad.dtype == dtype and dtype in (BF16, F16) and whole
    few = DOTS_FEW if whole else DOTS_FEW_ODD
    configs = ONE_HOT_DOTS if hot else few if tokens <= FEW_TOKENS or not whole else DOTS
    grad = grad if hot else grad.float()
    arguments = {"grad": grad, "codes": codes, "tables": tables, "scales": scales, "out": out}
    arguments.update(stride=grad.stride(0), tokens=tokens, chunks=chunks, n=n, h=h)

    def run(config: Config) -> None:
        described = _one_hot_dots_variant(config, dtype) if hot else _dots_variant(config, dtype, whole)
        tokens_each, chunks_each = config.blocks.get("BLOCK_T", 1), config.blocks["BLOCK_K"]
        grid = (triton.cdiv(tokens, tokens_each), triton.cdiv(chunks, chunks_each))
        launch(described, grid, arguments, grad.device)

    configs.run(grad.device, run, (dtype, tokens))
    return out


def backward(
    grad: Tensor,  # [T, h]
    codes: Tensor,  # [T, K] int32
    weights: Tensor,  # [T, K] float32
    tables: Tensor | None,  # [K, n, h]
    scales: Tensor | None,  # [K, n] float32, for int8 tables
    n: int,
    rows: Tensor | None,  # [R] int64, sorted
    want_segments: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The leaf op lookup_backward: segments [K n, h] or [R, h] in `dtype` (default: that of weights), and dots [T, K],
    each empty if it is not wanted."""
    refuse(grad, weights, tables)
    grad, codes, weights, dtype = made_whole(grad), codes.contiguous(), weights.contiguous(), dtype or weights.dtype
    segments, dots = weights.new_empty(0, grad.shape[1], dtype=dtype), weights.new_empty(0)
    if want_segments and n <= ONE_HOT_ROWS and codes.shape[0] >= ONE_HOT_TOKENS and grad.dtype == BF16 and rows is None:
        segments = _one_hot_segments(grad, codes, weights, n, dtype)
    elif want_segments:
        segments = _segments(grad, codes, weights, n, rows, dtype)
    if tables is not None and grad.shape[1] == 0:
        dots = weights.new_zeros(codes.shape)
    elif tables is not None:
        dots = _dots(grad, codes, tables.contiguous(), None if scales is None else scales.contiguous())
    return segments, dots
