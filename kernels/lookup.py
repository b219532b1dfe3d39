"""Family `lookup` in Triton: x [T, d] in K = d / bits chunks, codes [T, K], weights [T, K], tables [K, n, h].

    out[t] = bias + Σ_k w[t, k] T_k[code[t, k]]           segments_k[c] = Σ_{t: code[t, k] = c} w[t, k] grad[t]
    dots[t, k] = ⟨grad[t], T_k[code[t, k]]⟩               codes and weights as in csrc/cpu/lookup.h

Sums are in float32 and in one order, without atomics: the same bits every time. With s bytes a table element, at best:

- rows (few tokens): a program makes the codes of BLOCK_K chunks of a token and adds up their rows; K is split over
  programs until the GPU is full, `finish` adds the parts up in their order. K h s bytes a token from memory, 2 K h
  flops. The d elements of x are hashed by each of the h / BLOCK_H programs again: 1/32 of the bytes at 8 bits, 16-bit x
  and tables and BLOCK_H = 128. A few MB take as long to arrive as one dependent read, so all must be asked for at once.
- stream (many tokens): BLOCK_T tokens × BLOCK_H columns, a row is one 128-byte line, and all programs walk the tables
  in step: memory sees each table once, L2 at most min(BLOCK_T, n) rows of a table for each program, L1 the rest of the
  T K h s bytes. The ordinary cores do T K h multiply-adds, as many conversions of 16-bit tables, and one address for 16
  bytes: about 3 instructions an element, which is what bounds it once the rows come from L1. The hash is a kernel of
  its own: 8 T K bytes, read h / BLOCK_H times, are less work than h / BLOCK_H hashes.
- one_hot (n ≤ 16): a matrix that holds w at (k, code) and else 0, times the tables, on the tensor cores: 32 T K h
  flops, or twice that with the weights in two bfloat16 parts. There 0 · ∞ is NaN, so a tile whose result is not finite
  is gathered again: the reference's NaN and ∞ without a test in the loop.
- segments: the codes of each table are sorted, stably, and a program adds up the rows of grad of one code in the order
  of the tokens: T K h elements of grad from L2, K n h floats written. For n ≤ 16 the one-hot matrix, transposed, times
  grad, unsorted: 32 T K h flops.
- dots: as stream, with columns outside, so that a tile of grad serves BLOCK_K tables. For n ≤ 16 grad times all the
  rows, from which the code picks.

A code out of range reads a row that exists and makes its result NaN: refusing it, as the CPU does, would take a
synchronisation. float64 is refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from pyrepr.kernels._launch import Config, Variant, dot_input, launch
from pyrepr.kernels._lookup import (
    BF16,
    F16,
    F32,
    FLOATS,
    I8,
    ONE_HOT_ROWS,
    ONE_HOT_TOKENS,
    all_finite,
    arguments_of,
    checked,
    chunk_sums,
    chunk_sums_together,
    one_hot,
    parts_of,
    readable,
    refuse,
    slope_of,
    table,
    variant,
    weight_of,
)
from torch import Tensor

from pyrepr.reference.lookup import WEIGHTINGS

# Up to this many tokens the rows kernel runs: a row is then read once or twice, and L1 has nothing to give.
FEW_TOKENS = 256


@triton.jit(do_not_specialize=["tokens", "bits", "weighting"])
def _hash_kernel(
    x,  # [T, K bits], rows `stride` apart
    codes,  # [T, K] int32
    weights,  # [T, K] float32
    stride,
    tokens,
    chunks,
    bits,
    slope,
    weighting,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < tokens.to(tl.int64) * chunks
    code, size, inverse = chunk_sums(x + j // chunks * stride + j % chunks * bits, inside, bits, slope)
    tl.store(codes + j, code, mask=inside)
    tl.store(weights + j, weight_of(size, inverse, bits, weighting), mask=inside)


@triton.jit(do_not_specialize=["tokens", "bits", "weighting", "part"])
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
        row = k.to(tl.int64) * n + code
        if scales is not None:
            weight *= tl.load(scales + row, mask=inside, other=0.0)
        mask = inside[:, None] & (columns < h)[None, :]
        tile = tl.load(tables + row[:, None] * h + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += tl.where(inside, weight, 0.0)[:, None] * tile
    target = out + (tl.program_id(2).to(tl.int64) * tokens + t) * h + columns
    tl.store(target, tl.sum(sums, 0), mask=columns < h)


@triton.jit(do_not_specialize=["rows", "parts", "has_bias"])
def _finish_kernel(
    partial,  # [parts, rows, h] float32
    bias,  # [h], read if has_bias
    out,  # [rows, h]
    rows,
    h,
    parts,
    has_bias,
    BLOCK: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = rows.to(tl.int64) * h
    inside = j < count
    total = tl.load(partial + j, mask=inside, other=0.0)
    for s in range(1, parts):
        total += tl.load(partial + s * count + j, mask=inside, other=0.0)
    total += tl.load(bias + j % h, mask=j < count * has_bias, other=0.0).to(tl.float32)
    tl.store(out + j, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather(codes, weights, tables, scales, t, columns, tokens, chunks, n, h, first, last):
    """Σ_k w T_k[code] of tables first ≤ k < last, for the tokens t and these columns -> [BLOCK_T, BLOCK_H]."""
    sums = tl.zeros([t.shape[0], columns.shape[0]], tl.float32)
    at = t.to(tl.int64) * chunks
    present = t < tokens
    mask = present[:, None] & (columns < h)[None, :]
    code = tl.load(codes + at + first, mask=present, other=0)
    weight = tl.load(weights + at + first, mask=present, other=0.0)
    for k in range(first, last):
        now, factor = checked(code, weight, n)
        following = tl.minimum(k + 1, last - 1)  # whose codes are on their way while the rows are
        code = tl.load(codes + at + following, mask=present, other=0)
        weight = tl.load(weights + at + following, mask=present, other=0.0)
        row = tl.cast(k, tl.int64) * n + now
        if scales is not None:
            factor *= tl.load(scales + row, mask=present, other=0.0)
        tile = tl.load(tables + row[:, None] * h + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += factor[:, None] * tile
    return sums


@triton.jit(do_not_specialize=["tokens", "part"])
def _stream_kernel(
    codes,  # [T, K] int32
    weights,  # [T, K] float32
    tables,  # [K, n, h]
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [splits, T, h] float32
    tokens,
    chunks,
    n,
    h,
    part,  # tables in a split
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, chunks)
    sums = _gather(codes, weights, tables, scales, t, columns, tokens, chunks, n, h, first, last)
    target = out + (tl.program_id(2).to(tl.int64) * tokens + t)[:, None] * h + columns[None, :]
    tl.store(target, sums, mask=(t < tokens)[:, None] & (columns < h)[None, :])


@triton.jit(do_not_specialize=["tokens", "part"])
def _one_hot_kernel(
    codes,  # [T, K] int32
    weights,  # [T, K] float32
    tables,  # [K, n, h], n ≤ ROWS
    scales,  # [K, n] float32 for int8 tables, else None
    out,  # [splits, T, h] float32
    tokens,
    chunks,
    n,
    h,
    part,  # tables in a split, a multiple of BLOCK_K
    EXACT: tl.constexpr,  # float32 weights as two parts instead of rounded
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
        a = one_hot(codes, weights, t, start + tl.arange(0, BLOCK_K), tokens, chunks, n, ROWS)
        k, c = start + lane // ROWS, lane % ROWS
        row = k.to(tl.int64) * n + c
        real = (k < chunks) & (c < n)
        if scales is not None:
            a *= tl.load(scales + row, mask=real, other=0.0)[None, :]
        mask = real[:, None] & (columns < h)[None, :]
        b = dot_input(tl.load(tables + row[:, None] * h + columns[None, :], mask=mask, other=0.0).to(kind))
        high = a.to(kind)
        sums = tl.dot(dot_input(high), b, sums)
        if EXACT:
            sums = tl.dot(dot_input((a - high.to(tl.float32)).to(kind)), b, sums)
    if not all_finite(sums):
        sums = _gather(codes, weights, tables, scales, t, columns, tokens, chunks, n, h, first, last)
    target = out + (tl.program_id(2).to(tl.int64) * tokens + t)[:, None] * h + columns[None, :]
    tl.store(target, sums, mask=(t < tokens)[:, None] & (columns < h)[None, :])


HASH = table("hash", Config({"BLOCK": 256}))
FINISH = table("finish", Config({"BLOCK": 512}))
ROWS = table(
    "rows",
    Config({"BLOCK_K": 32, "BLOCK_H": 128}),
    Config({"BLOCK_K": 16, "BLOCK_H": 128}),
    Config({"BLOCK_K": 16, "BLOCK_H": 256}),
    Config({"BLOCK_K": 8, "BLOCK_H": 512}),
    Config({"BLOCK_K": 64, "BLOCK_H": 64}),
)
STREAM = table(
    "stream",
    Config({"BLOCK_T": 256, "BLOCK_H": 64}, 8),
    Config({"BLOCK_T": 512, "BLOCK_H": 64}, 16),
    Config({"BLOCK_T": 256, "BLOCK_H": 128}, 16),
    Config({"BLOCK_T": 128, "BLOCK_H": 128}, 8),
    Config({"BLOCK_T": 128, "BLOCK_H": 64}, 4),
)
ONE_HOT = table(
    "one_hot",
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 4}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 256, "BLOCK_K": 4}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 256, "BLOCK_K": 2}, 8, 4),
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 2),
)

# (x, tables) whose rows kernel hashes too; for other pairs the hash is a launch of its own.
FUSED = ((F32, F32), (F32, BF16), (F32, I8), (BF16, BF16), (BF16, I8), (F16, F16), (F16, I8))
# (tables, exact weights) that the tensor cores take. float16 holds the weights of float16 x, not any float32.
ONE_HOT_KINDS = ((BF16, False), (BF16, True), (I8, False), (I8, True), (F16, False))


def _hash_variant(config: Config, x: torch.dtype) -> Variant:
    return variant(_hash_kernel, "hash", config, {"x": x, "codes": torch.int32, "weights": F32})


def _sum_variant(
    kernel, name: str, config: Config, x: torch.dtype | None, tables: torch.dtype, **constexprs
) -> Variant:
    """x is None where codes and weights are given."""
    pointers = {"tables": tables, "scales": F32 if tables == I8 else None, "out": F32}
    pointers["codes"], pointers["weights"] = (torch.int32, F32) if x is None else (None, None)
    if "x" in kernel.arg_names:
        pointers = {"x": x, **pointers}
    return variant(kernel, name, config, pointers, **constexprs)


def _rows_variant(config: Config, x: torch.dtype | None, tables: torch.dtype) -> Variant:
    return _sum_variant(_rows_kernel, "rows", config, x, tables)


def _stream_variant(config: Config, tables: torch.dtype) -> Variant:
    return _sum_variant(_stream_kernel, "stream", config, None, tables)


def _one_hot_variant(config: Config, tables: torch.dtype, exact: bool) -> Variant:
    name = "one_hot_exact" if exact else "one_hot"
    return _sum_variant(_one_hot_kernel, name, config, None, tables, EXACT=exact, ROWS=ONE_HOT_ROWS)


def _finish_variant(config: Config, bias: torch.dtype, out: torch.dtype) -> Variant:
    return variant(_finish_kernel, "finish", config, {"partial": F32, "bias": bias, "out": out})


def variants(architecture: int) -> list[Variant]:
    """All that can be launched there, aligned as tables with h a multiple of 16 are; two kernels also for others."""
    from pyrepr.kernels import lookup_backward as backward_kernels

    a, stored = architecture, (*FLOATS, I8)
    found = [_hash_variant(HASH.rows[a], x) for x in FLOATS]
    found += [_rows_variant(ROWS.rows[a], x, tables) for x, tables in FUSED]
    found += [_rows_variant(ROWS.rows[a], None, tables) for tables in stored]
    found += [_stream_variant(STREAM.rows[a], tables) for tables in stored]
    found += [_one_hot_variant(ONE_HOT.rows[a], tables, exact) for tables, exact in ONE_HOT_KINDS]
    found += [_finish_variant(FINISH.rows[a], bias, out) for out in FLOATS for bias in dict.fromkeys((F32, out))]
    found += backward_kernels.variants(a)
    usual = ("x", "tables", "grad", "out", "codes", "weights", "order", "partial", "stride", "chunks", "n", "h")
    aligned = [replace(v, aligned=tuple(name for name in usual if name in v.signature)) for v in found]
    odd = [_rows_variant(ROWS.rows[a], BF16, BF16), _stream_variant(STREAM.rows[a], BF16)]
    return aligned + [replace(v, name=v.name + "-odd") for v in odd]


def hash(x: Tensor, bits: int, weighting: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Codes [T, K] int32 and weights [T, K] float32 of x [T, d]."""
    refuse(x)
    x = readable(x)
    tokens, chunks = x.shape[0], x.shape[1] // bits
    codes = x.new_empty(tokens, chunks, dtype=torch.int32)
    weights = x.new_empty(tokens, chunks, dtype=F32)
    arguments = {"x": x, "codes": codes, "weights": weights, "stride": x.stride(0), "tokens": tokens, "chunks": chunks}
    arguments.update(bits=bits, slope=slope_of(temperature), weighting=WEIGHTINGS.index(weighting))

    def run(config: Config) -> None:
        grid = (triton.cdiv(codes.numel(), config.blocks["BLOCK"]),)
        launch(_hash_variant(config, x.dtype), grid, arguments, x.device)

    HASH.run(x.device, run)
    return codes, weights


def finish(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Σ over the first axis of partial [parts, rows, h], plus bias [h], as [rows, h] of `dtype`."""
    parts, rows, h = partial.shape
    if parts == 1 and bias is None and dtype == F32:
        return partial[0]
    if bias is not None and bias.dtype not in (F32, dtype):
        bias = bias.float()
    out = partial.new_empty(rows, h, dtype=dtype)
    arguments = {
        "partial": partial,
        "out": out,
        "rows": rows,
        "h": h,
        "parts": parts,
        "has_bias": int(bias is not None),
    }
    arguments["bias"] = partial if bias is None else bias.contiguous()

    def run(config: Config) -> None:
        grid = (triton.cdiv(out.numel(), config.blocks["BLOCK"]),)
        launch(_finish_variant(config, arguments["bias"].dtype, dtype), grid, arguments, out.device)

    FINISH.run(out.device, run)
    return out


def _partial_sums(describe, config: Config, tokens: int, arguments: dict) -> Tensor:
    """Runs one of the three kernels that make [parts, T, h] from T tokens and K tables."""
    tables = arguments["tables"]
    chunks, _, h = tables.shape
    block_t, block_k = config.blocks.get("BLOCK_T", 1), config.blocks.get("BLOCK_K", 1)
    columns = triton.cdiv(h, config.blocks["BLOCK_H"])
    blocks, steps = triton.cdiv(tokens, block_t), triton.cdiv(chunks, block_k)
    parts = parts_of(steps, blocks * columns, 4 * tokens * h, tables.device)
    part = triton.cdiv(steps, parts) * block_k
    parts = triton.cdiv(chunks, part)
    out = tables.new_empty(parts, tokens, h, dtype=F32)
    described = describe(config)
    given = {**arguments, "out": out, "tokens": tokens, "chunks": chunks, "n": tables.shape[1], "h": h, "part": part}
    launch(described, (blocks, columns, parts), arguments_of(described, given), tables.device)
    return out


def _from_x(x: Tensor, tables: Tensor, scales: Tensor | None, bits: int, weighting: str, temperature: float) -> Tensor:
    """Few tokens, hash included: [parts, T, h]."""
    arguments = {"x": x, "tables": tables, "scales": scales, "stride": x.stride(0), "bits": bits}
    arguments.update(slope=slope_of(temperature), weighting=WEIGHTINGS.index(weighting))

    def run(config: Config) -> Tensor:
        return _partial_sums(lambda c: _rows_variant(c, x.dtype, tables.dtype), config, x.shape[0], arguments)

    return ROWS.run(x.device, run, (tables.dtype, x.shape[0]))


def _from_codes(
    codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, route: int, exact: bool
) -> Tensor:
    """[parts, T, h]; `exact`: the weights may not be rounded to the dtype of the tables."""
    tokens, dtype = codes.shape[0], tables.dtype
    arguments = {"codes": codes, "weights": weights, "tables": tables, "scales": scales}
    # The rows kernel's arguments for hashing.
    arguments.update(stride=0, bits=0, slope=0.0, weighting=0)
    hot = tokens >= ONE_HOT_TOKENS and tables.shape[1] <= ONE_HOT_ROWS and (dtype, exact) in ONE_HOT_KINDS
    if route == 0 and hot:
        configs, describe = ONE_HOT, lambda config: _one_hot_variant(config, dtype, exact)
    elif route == 1 or (route == 0 and tokens <= FEW_TOKENS):
        configs, describe = ROWS, lambda config: _rows_variant(config, None, dtype)
    else:
        configs, describe = STREAM, lambda config: _stream_variant(config, dtype)

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
    tensor_cores = n <= ONE_HOT_ROWS and x.shape[0] >= ONE_HOT_TOKENS
    few = route == 1 or (route == 0 and x.shape[0] <= FEW_TOKENS and not tensor_cores)
    if few and (x.dtype, tables.dtype) in FUSED:
        partial = _from_x(x, tables, scales, bits, weighting, temperature)
    else:
        codes, weights = hash(x, bits, weighting, temperature)
        partial = _from_codes(codes, weights, tables, scales, route, x.dtype == F32)
    return finish(partial, bias, x.dtype)


def sum(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, route: int) -> Tensor:
    """The leaf op lookup_sum; codes [T, K] int32, weights [T, K] float32 -> [T, h] float32."""
    refuse(weights, tables)
    tables = tables.contiguous()
    if codes.numel() == 0 or tables.shape[2] == 0:
        return weights.new_zeros(codes.shape[0], tables.shape[2])
    scales = None if scales is None else scales.contiguous()
    return finish(_from_codes(codes.contiguous(), weights.contiguous(), tables, scales, route, True), None, F32)
