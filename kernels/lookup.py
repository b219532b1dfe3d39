"""Family `lookup` in Triton: x [T, d] in K = d / bits chunks, codes [T, K], weights [T, K], tables [K, n, h].

    out[t] = bias + Σ_k w[t, k] T_k[code[t, k]]           segments_k[c] = Σ_{t: code[t, k] = c} w[t, k] grad[t]
    dots[t, k] = ⟨grad[t], T_k[code[t, k]]⟩               codes and weights as in csrc/cpu/lookup.h

Sums are in float32 and in one order, without atomics: the same bits every time. What each kernel moves and computes at
best, s being the bytes of a table element; no time here was measured on a GPU:

- rows (few tokens): a program makes the codes of BLOCK_K chunks of a token and adds up their rows; K is split over
  programs until the GPU is full, and `finish` adds the parts up in their order. K h s bytes a token from memory, 2 K h
  flops; x once more for each of the h / BLOCK_H programs, from L2, 1/16 of the bytes with 8 bits, 16-bit x and tables.
  d = h = 4096 in 16 bits are 4 MB a token: 1.3 µs of 3.3 TB/s, hardly more than the two reads that follow each other,
  so every program has 8 KB in flight and four of them fit a multiprocessor.
- stream (many tokens): BLOCK_T tokens × BLOCK_H columns, a row is one 128-byte line, and all programs walk the tables
  in step: memory sees each table once for all programs at work, L2 the distinct rows of BLOCK_T tokens (0.63 BLOCK_T
  for 256 tokens and 8 bits), L1 all T K h s bytes. The ordinary cores do T K h multiply-adds, as many conversions of
  narrow tables, and an address and a load for 16 bytes: about 3 instructions an element. Codes and weights come
  transposed, so that the four rows of a warp's load find theirs in one line each; the hash is a kernel of its own, for
  8 T K bytes, read h / BLOCK_H times, are less work than h / BLOCK_H hashes.
- one_hot (n ≤ 16, 16-bit x): a matrix that holds w at (k, code) and else 0, times the tables, on the tensor cores:
  32 T K h flops. The weights are rounded to 16 bits as the result is, so float32 x is gathered. There 0 · ∞ is NaN, so
  a tile whose result is not finite is gathered again: the reference's NaN and ∞ without a test in the loop.
- segments: the codes of each table are sorted, stably, and a program adds up the rows of grad of one code in the order
  of the tokens, a long segment shared out: T K h elements of grad from L2, K n h elements written, in the dtype of the
  tables. Where most codes have no token the memory is cleared and only the others get a program. For n ≤ 16 the
  one-hot matrix, transposed, times grad, unsorted: 32 T K h flops.
- dots: as stream, with columns outside, so that a tile of grad serves BLOCK_K tables. For n ≤ 16 grad times all the
  rows, from which the code picks.

A code out of range reads a row that exists and makes its result NaN: refusing it, as the CPU does, would take a
synchronisation. float64 is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from pyrepr.kernels._launch import Config, Table, Variant, dot_input
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
    chunk_sums_together,
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
    weight_of,
)
from torch import Tensor

# Up to this many tokens the rows kernel runs: a row is then read once or twice, and L1 has nothing to give.
FEW_TOKENS = 256


@kernel()
def _hash_kernel(
    x,  # [T, K bits], rows `stride` apart
    codes,  # [T, K] int32, or [K, T] if by_chunk
    weights,  # float32, likewise
    stride,
    tokens,
    chunks,
    bits,
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
    code, size, inverse = chunk_sums(x + t * stride + k * bits, inside, bits, slope)
    tl.store(codes + j, code, mask=inside)
    tl.store(weights + j, weight_of(size, inverse, bits, weighting), mask=inside)


@kernel("tables", "out", "h")
def _rows_kernel(
    x,  # [T, K bits], rows `stride` apart, or None: codes and weights are given
    codes,  # [T, K] int32 or None
    weights,  # [T, K] float32 or None
    tables,  # [K, n, h]
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [splits, T, h] float32
    stride,
    tokens,
    chunks,
    bits,
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
            code, size, inverse = chunk_sums_together(x + t * stride + k * bits, inside, bits, slope)
            weight = weight_of(size, inverse, bits, weighting)
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
def _finish_kernel(
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
def _stream_kernel(
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
def _one_hot_kernel(
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


# With 128 threads ptxas aims at fewer registers than a chunk takes on sm_100.
HASH = table("hash", Config({"BLOCK": 256}, 8))
FINISH = table("finish", Config({"BLOCK": 512, "BLOCK_S": 1}))
FINISH_PARTS = table("finish_parts", Config({"BLOCK": 128, "BLOCK_S": 16}))
ROWS = table(
    "rows",
    Config({"BLOCK_K": 32, "BLOCK_H": 128}),
    Config({"BLOCK_K": 16, "BLOCK_H": 128}),
    Config({"BLOCK_K": 16, "BLOCK_H": 256}),
    Config({"BLOCK_K": 8, "BLOCK_H": 512}),
    Config({"BLOCK_K": 64, "BLOCK_H": 64}),
)
# Fewer tokens than threads: Triton then lets every thread read the codes of its own rows instead of passing them round
# through shared memory, with barriers.
STREAM = table(
    "stream",
    Config({"BLOCK_T": 256, "BLOCK_H": 64}, 16),
    Config({"BLOCK_T": 512, "BLOCK_H": 64}, 16),
    Config({"BLOCK_T": 256, "BLOCK_H": 32}, 16),
    Config({"BLOCK_T": 128, "BLOCK_H": 64}, 8),
)
STREAM_FLOAT = table(
    "stream_float", Config({"BLOCK_T": 128, "BLOCK_H": 64}, 8), Config({"BLOCK_T": 256, "BLOCK_H": 32}, 16)
)
# A multiple of every BLOCK_H of the two tables above.
STREAM_COLUMNS = 64
# For rows that are not whole: an address an element, so few elements a thread.
STREAM_ODD = table("stream_odd", Config({"BLOCK_T": 16, "BLOCK_H": 64}, 8))
ONE_HOT = table(
    "one_hot",
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 4}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 256, "BLOCK_K": 4}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 256, "BLOCK_K": 2}, 8, 4),
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 2),
)

# (x, tables) whose rows kernel hashes too; for other pairs the hash is a launch of its own.
FUSED = ((F32, F32), (F32, BF16), (F32, I8), (BF16, BF16), (BF16, I8), (F16, F16), (F16, I8))
# (x, tables) that the tensor cores take. float16 holds the weights of float16 x, but not those of any bfloat16 x.
ONE_HOT_KINDS = ((BF16, BF16), (BF16, I8), (F16, F16), (F16, I8))


@functools.cache
def _hash_variant(config: Config, x: torch.dtype) -> Variant:
    return variant(_hash_kernel, "hash", config, {"x": x, "codes": torch.int32, "weights": F32})


def _sum_pointers(tables: torch.dtype, codes: bool = True) -> dict[str, torch.dtype | None]:
    """What the kernels that add up rows read and write; without `codes` they hash."""
    given = {"codes": torch.int32, "weights": F32} if codes else {"codes": None, "weights": None}
    return {"tables": tables, "scales": F32 if tables == I8 else None, "out": F32, **given}


@functools.cache
def _rows_variant(config: Config, x: torch.dtype | None, tables: torch.dtype, whole: bool) -> Variant:
    """x is None where codes and weights are given."""
    unused = dict.fromkeys(("stride", "bits", "slope", "weighting")) if x is None else {}
    pointers = {"x": x, **_sum_pointers(tables, codes=x is None)}
    return variant(_rows_kernel, "rows", config, pointers, whole, **unused)


@functools.cache
def _stream_variant(config: Config, tables: torch.dtype, whole: bool, full: bool) -> Variant:
    name = "stream_ragged" if whole and not full else "stream"
    return variant(_stream_kernel, name, config, _sum_pointers(tables), whole, FULL=full)


@functools.cache
def _one_hot_variant(config: Config, tables: torch.dtype) -> Variant:
    return variant(_one_hot_kernel, "one_hot", config, _sum_pointers(tables), ROWS=ONE_HOT_ROWS)


@functools.cache
def _finish_variant(config: Config, bias: torch.dtype, out: torch.dtype, whole: bool) -> Variant:
    name = "finish" if config.blocks["BLOCK_S"] == 1 else "finish_parts"
    return variant(_finish_kernel, name, config, {"partial": F32, "bias": bias, "out": out}, whole)


def variants(architecture: int) -> list[Variant]:
    """All that can be launched there."""
    from pyrepr.kernels import lookup_backward as backward_kernels

    a, stored = architecture, (*FLOATS, I8)
    found = [_hash_variant(HASH.rows[a], x) for x in FLOATS]
    for whole in (True, False):
        found += [_rows_variant(ROWS.rows[a], x, tables, whole) for x, tables in FUSED]
        found += [_rows_variant(ROWS.rows[a], None, tables, whole) for tables in stored]
        kinds = [(bias, out) for out in FLOATS for bias in dict.fromkeys((F32, out))]
        found += [_finish_variant(f.rows[a], *kind, whole) for f in (FINISH, FINISH_PARTS) for kind in kinds]
    for whole, full in ((True, True), (True, False), (False, False)):
        found += [_stream_variant(_stream_table(t, whole).rows[a], t, whole, full) for t in stored]
    found += [_one_hot_variant(ONE_HOT.rows[a], tables) for tables in (BF16, F16, I8)]
    return found + backward_kernels.variants(a)


def hash(x: Tensor, bits: int, weighting: str, temperature: float, by_chunk: bool = False) -> tuple[Tensor, Tensor]:
    """Codes [T, K] int32 and weights [T, K] float32 of x [T, d]; with `by_chunk` transposes of contiguous [K, T]."""
    refuse(x)
    x = readable(x)
    tokens, chunks = x.shape[0], x.shape[1] // bits
    shape = (chunks, tokens) if by_chunk else (tokens, chunks)
    codes, weights = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=F32)
    arguments = hash_arguments(x, bits, weighting, temperature)
    arguments.update(codes=codes, weights=weights, by_chunk=int(by_chunk))

    def run(config: Config) -> None:
        grid = (triton.cdiv(codes.numel(), config.blocks["BLOCK"]),)
        launch(_hash_variant(config, x.dtype), grid, arguments, x.device)

    HASH.run(x.device, run)
    return (codes.t(), weights.t()) if by_chunk else (codes, weights)


def finish(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ over the first axis of partial [parts, rows, h], plus bias [h], as [rows, h] of `dtype`."""
    parts, rows, h = partial.shape
    if parts == 1 and bias is None and dtype == partial.dtype:
        return partial[0]
    if bias is not None and bias.dtype not in (F32, dtype):
        bias = bias.float()
    out = partial.new_empty(rows, h, dtype=dtype)
    arguments = {"partial": partial, "out": out, "rows": rows, "h": h, "parts": parts}
    arguments.update(bias=partial if bias is None else made_whole(bias), has_bias=int(bias is not None))

    def run(config: Config) -> None:
        grid = (triton.cdiv(out.numel(), config.blocks["BLOCK"]),)
        described = _finish_variant(config, arguments["bias"].dtype, dtype, h % 16 == 0)
        launch(described, grid, arguments, out.device)

    (FINISH if parts == 1 else FINISH_PARTS).run(out.device, run)
    return out


def _partial_sums(describe: Callable[[Config], Variant], config: Config, tokens: int, arguments: dict) -> Tensor:
    """Runs one of the three kernels that make [parts, T, h] from T tokens and K tables."""
    tables = arguments["tables"]
    chunks, n, h = tables.shape
    block_t, block_k = config.blocks.get("BLOCK_T", 1), config.blocks.get("BLOCK_K", 1)
    columns = triton.cdiv(h, config.blocks["BLOCK_H"])
    blocks, steps = triton.cdiv(tokens, block_t), triton.cdiv(chunks, block_k)
    parts = parts_of(steps, blocks * columns, 4 * tokens * h, tables.device)
    part = triton.cdiv(steps, parts) * block_k
    parts = triton.cdiv(chunks, part)
    out = tables.new_empty(parts, tokens, h, dtype=F32)
    given = {**arguments, "out": out, "tokens": tokens, "chunks": chunks, "n": n, "h": h, "part": part}
    launch(describe(config), (blocks, columns, parts), given, tables.device)
    return out


def _from_x(x: Tensor, tables: Tensor, scales: Tensor | None, bits: int, weighting: str, temperature: float) -> Tensor:
    """Few tokens, hash included: [parts, T, h]."""
    arguments = {**hash_arguments(x, bits, weighting, temperature), "tables": tables, "scales": scales}
    describe = functools.partial(_rows_variant, x=x.dtype, tables=tables.dtype, whole=is_whole(tables))

    def run(config: Config) -> Tensor:
        return _partial_sums(describe, config, x.shape[0], arguments)

    return ROWS.run(x.device, run, (tables.dtype, x.shape[0]))


def _few(tokens: int, route: int) -> bool:
    return route == 1 or (route == 0 and tokens <= FEW_TOKENS)


def _by_chunk(x: Tensor) -> Tensor:
    """[T, K] as the transpose of a contiguous [K, T]: neighbouring tokens' codes of a table in one line."""
    return x.t().contiguous().t()


def _stream_table(tables: torch.dtype, whole: bool) -> Table:
    return STREAM_ODD if not whole else STREAM_FLOAT if tables == F32 else STREAM


def _from_codes(
    codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, few: bool, hot: bool = False
) -> Tensor:
    """[parts, T, h] by the rows kernel if `few`, on the tensor cores if `hot`."""
    tokens, dtype, whole = codes.shape[0], tables.dtype, is_whole(tables)
    if few:
        codes, weights = codes.contiguous(), weights.contiguous()
        configs, describe = ROWS, functools.partial(_rows_variant, x=None, tables=dtype, whole=whole)
    elif hot:
        configs, describe = ONE_HOT, functools.partial(_one_hot_variant, tables=dtype)
    else:
        codes, weights = _by_chunk(codes), _by_chunk(weights)
        full = whole and tables.shape[2] % STREAM_COLUMNS == 0
        configs = _stream_table(dtype, whole)
        describe = functools.partial(_stream_variant, tables=dtype, whole=whole, full=full)
    arguments = {"codes": codes, "weights": weights, "tables": tables, "scales": scales, "stride_k": codes.stride(1)}

    def run(config: Config) -> Tensor:
        return _partial_sums(describe, config, tokens, arguments)

    return configs.run(codes.device, run, (dtype, tokens))


def linear(
    x: Tensor,  # [T, K bits]
    tables: Tensor,  # [K, 2^bits, h]
    scales: Tensor | None,  # [K, 2^bits] float32, for int8 tables
    bias: Tensor | None,  # [h]
    weighting: str,
    temperature: float,
    route: int,
) -> Tensor:
    """The leaf op lookup_linear. Routes: 0 by size, 1 the rows kernel, 2 the stream kernel."""
    refuse(x, tables)
    x, tables = readable(x), tables.contiguous()
    scales = None if scales is None else scales.contiguous()
    chunks, n, h = tables.shape
    bits = n.bit_length() - 1
    if x.shape[0] == 0 or h == 0 or chunks == 0:
        out = x.new_zeros(x.shape[0], h)
        return out if bias is None else out + bias.to(x.dtype)
    hot = n <= ONE_HOT_ROWS and x.shape[0] >= ONE_HOT_TOKENS and (x.dtype, tables.dtype) in ONE_HOT_KINDS
    hot = hot and route == 0 and is_whole(tables)
    few = _few(x.shape[0], route)
    if few and not hot and (x.dtype, tables.dtype) in FUSED:
        partial = _from_x(x, tables, scales, bits, weighting, temperature)
    else:
        codes, weights = hash(x, bits, weighting, temperature, by_chunk=hot or not few)
        partial = _from_codes(codes, weights, tables, scales, few and not hot, hot)
    return finish(partial, bias, x.dtype)


def sum(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, route: int) -> Tensor:
    """The leaf op lookup_sum; codes [T, K] int32, weights [T, K] float32 -> [T, h] float32."""
    refuse(weights, tables)
    tables = tables.contiguous()
    if codes.numel() == 0 or tables.shape[2] == 0:
        return weights.new_zeros(codes.shape[0], tables.shape[2])
    scales = None if scales is None else scales.contiguous()
    few = _few(codes.shape[0], route)
    return finish(_from_codes(codes.contiguous(), weights.contiguous(), tables, scales, few), None, F32)
