"""Family `lookup` in Triton: x [T, d] in K chunks of `width` elements, codes [T, K], weights [T, K], tables [K, n, h].

    out[t] = bias + Σ_k w[t, k] T_k[code[t, k]]           segments_k[c] = Σ_{t: code[t, k] = c} w[t, k] grad[t]
    dots[t, k] = ⟨grad[t], T_k[code[t, k]]⟩               codes and weights as in csrc/cpu/lookup.h

Sums are in float32 and in one order, without atomics: the same bits every time. What each kernel moves and computes at
best, s being the bytes of a table element:

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
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from pyrepr.kernels import _launch
from pyrepr.kernels._launch import BF16, F16, F32, Config, Variant, architecture
from pyrepr.kernels.lookup import _variants as table
from pyrepr.kernels.lookup._shared import ONE_HOT_ROWS
from torch import Tensor

from pyrepr.backend import Unsupported
from pyrepr.reference.lookup import HASHES, WEIGHTINGS, without_low_rank

# Up to this many tokens the rows kernel runs: a row is then read once or twice, and L1 has nothing to give.
FEW_TOKENS = 256

# Up to this many tokens a program takes one token at a time: blocks of tokens would be too few programs.
FEW_TOKENS_BACKWARD = 64

# From this many tokens on, the tensor cores have a tile to work on.
ONE_HOT_TOKENS = 64

# Programs that fill the GPU, four on each multiprocessor of an A100, H100, B200. Not asked of the device, so that two
# devices of a kind give the same bits.
PROGRAMS = {80: 432, 90: 528, 100: 592}

# What partial sums may take.
PARTIAL_BYTES = 64 << 20

# Programs along the second and the third axis of a grid.
MOST_PROGRAMS = 65535


def launch(described: Variant, grid: tuple[int, ...], possible: Mapping[str, Any], device: torch.device) -> None:
    """Launches with those of the `possible` arguments that the variant takes at run time."""
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise Unsupported(f"backend 'triton' refuses so large a lookup: {described.name} would be a grid of {grid}")
    _launch.launch(described, grid, {name: possible[name] for name in described.signature}, device)


def refuse(*tensors: Tensor | None) -> None:
    """Raises for what the kernels are not made for."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise Unsupported("backend 'triton' computes lookups in float32 and refuses float64 tensors")


def readable(x: Tensor) -> Tensor:
    """x as it is if its rows are contiguous and a 32-bit number of elements apart, whatever lies between them."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if dense and x.stride(0) < 1 << 31 else x.clone(memory_format=torch.contiguous_format)


def is_whole(x: Tensor) -> bool:
    """Whether the rows of a contiguous tensor all start at multiples of 16 bytes, and of 16 elements of each other."""
    return x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == 0


def made_whole(x: Tensor) -> Tensor:
    """x [..., h] with readable rows, in a new place if only its place or its stride keeps it from being whole.

    For what is read many times, or small.
    """
    x = readable(x)
    if x.shape[-1] % 16 == 0 and (x.data_ptr() % 16 or (x.dim() > 1 and x.stride(0) % 16)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def hash_arguments(
    x: Tensor,
    bits: int,
    weighting: str,
    temperature: float,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
) -> dict[str, Any]:
    """What the kernels that read x [T, K width] want to know about it; but for `centre` and `scale`, of which those
    that are not given need an address of float32 all the same."""
    each = HASHES[hash]
    width = bits // each
    sizes = {"stride": x.stride(0), "tokens": x.shape[0], "chunks": x.shape[1] // width, "width": width, "each": each}
    given = {} if centre is None or scale is None else {"centre": _constant(centre), "scale": _constant(scale)}
    slope = min(2 / temperature, 3e38)
    options = {"affine": x.shape[1] if given else 0, "slope": slope, "weighting": WEIGHTINGS.index(weighting)}
    return {"x": x, **sizes, **options, **given}


def _constant(x: Tensor) -> Tensor:
    return x.to(F32).contiguous()


def parts_of(steps: int, programs: int, part_bytes: int, device: torch.device) -> int:
    """Into how many parts to cut sums of `steps` steps so that `programs` of them fill the GPU."""
    most = PARTIAL_BYTES // max(1, part_bytes)
    return max(1, min(steps, PROGRAMS[architecture(device)] // max(1, programs), most))


def hashed(
    x: Tensor,
    bits: int,
    weighting: str,
    temperature: float,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    by_chunk: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes [T, K] int32 and weights [T, K] float32 of x [T, d]; with `by_chunk` transposes of contiguous [K, T]."""
    refuse(x)
    x = readable(x)
    arguments = hash_arguments(x, bits, weighting, temperature, hash, centre, scale)
    tokens, chunks = arguments["tokens"], arguments["chunks"]
    shape = (chunks, tokens) if by_chunk else (tokens, chunks)
    codes, weights = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=F32)
    arguments = {"centre": weights, "scale": weights, **arguments}
    arguments.update(codes=codes, weights=weights, by_chunk=int(by_chunk))

    def run(config: Config) -> None:
        grid = (triton.cdiv(codes.numel(), config.blocks["BLOCK"]),)
        launch(table.hash_variant(config, x.dtype), grid, arguments, x.device)

    table.HASH.run(x.device, run)
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
        described = table.finish_variant(config, arguments["bias"].dtype, dtype, h % 16 == 0)
        launch(described, grid, arguments, out.device)

    (table.FINISH if parts == 1 else table.FINISH_PARTS).run(out.device, run)
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
    given = {
        "centre": out,
        "scale": out,
        **arguments,
        "out": out,
        "tokens": tokens,
        "chunks": chunks,
        "n": n,
        "h": h,
        "part": part,
    }
    launch(describe(config), (blocks, columns, parts), given, tables.device)
    return out


def _from_x(x: Tensor, tables: Tensor, scales: Tensor | None, hashing: tuple) -> Tensor:
    """Few tokens, hash included: [parts, T, h]."""
    arguments = {**hash_arguments(x, *hashing), "tables": tables, "scales": scales}
    describe = functools.partial(table.rows_variant, x=x.dtype, tables=tables.dtype, whole=is_whole(tables))

    def run(config: Config) -> Tensor:
        return _partial_sums(describe, config, x.shape[0], arguments)

    return table.ROWS.run(x.device, run, (tables.dtype, x.shape[0]))


def _few(tokens: int, route: int) -> bool:
    return route == 1 or (route == 0 and tokens <= FEW_TOKENS)


def _by_chunk(x: Tensor) -> Tensor:
    """[T, K] as the transpose of a contiguous [K, T]: neighbouring tokens' codes of a table in one line."""
    return x.t().contiguous().t()


def _from_codes(
    codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, few: bool, hot: bool = False
) -> Tensor:
    """[parts, T, h] by the rows kernel if `few`, on the tensor cores if `hot`."""
    tokens, dtype, whole = codes.shape[0], tables.dtype, is_whole(tables)
    if few:
        codes, weights = codes.contiguous(), weights.contiguous()
        configs, describe = table.ROWS, functools.partial(table.rows_variant, x=None, tables=dtype, whole=whole)
    elif hot:
        configs, describe = table.ONE_HOT, functools.partial(table.one_hot_variant, tables=dtype)
    else:
        codes, weights = _by_chunk(codes), _by_chunk(weights)
        full = whole and tables.shape[2] % table.STREAM_COLUMNS == 0
        configs = table.stream_table(dtype, whole)
        describe = functools.partial(table.stream_variant, tables=dtype, whole=whole, full=full)
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
    sparse: bool = False,
    hash: str = "one_bit",
    centre: Tensor | None = None,  # [d]
    scale: Tensor | None = None,  # [d]
) -> Tensor:
    """The leaf op lookup_linear, `sparse` being the backward's. Routes: 0 by size, 1 the rows kernel, 2 the stream
    kernel."""
    refuse(x, tables)
    x, tables = readable(x), tables.contiguous()
    scales = None if scales is None else scales.contiguous()
    chunks, n, h = tables.shape
    bits = n.bit_length() - 1
    if x.shape[0] == 0 or h == 0 or chunks == 0:
        out = x.new_zeros(x.shape[0], h)
        return out if bias is None else out + bias.to(x.dtype)
    hot = n <= ONE_HOT_ROWS and x.shape[0] >= ONE_HOT_TOKENS and (x.dtype, tables.dtype) in table.ONE_HOT_KINDS
    hot = hot and route == 0 and is_whole(tables)
    few = _few(x.shape[0], route)
    hashing = (bits, weighting, temperature, hash, centre, scale)
    if few and not hot and (x.dtype, tables.dtype) in table.FUSED:
        partial = _from_x(x, tables, scales, hashing)
    else:
        codes, weights = hashed(x, *hashing, by_chunk=hot or not few)
        partial = _from_codes(codes, weights, tables, scales, few and not hot, hot)
    return finish(partial, bias, x.dtype)


def converted(
    x: Tensor,
    tables: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    weighting: str,
    temperature: float,
    route: int,
    sparse: bool = False,
    hash: str = "one_bit",
) -> Tensor:
    """The leaf op lookup_converted; the products with `down` and `up` are PyTorch's, in float32."""
    refuse(x, tables)
    rest, inner = without_low_rank(x, down)
    out = linear(rest, tables, scales, bias, weighting, temperature, route, sparse, hash, centre, scale)
    return out if inner is None else torch.addmm(out, inner, up.to(inner.dtype)).to(x.dtype)


def sum(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, route: int) -> Tensor:
    """The leaf op lookup_sum; codes [T, K] int32, weights [T, K] float32 -> [T, h] float32."""
    refuse(weights, tables)
    tables = tables.contiguous()
    if codes.numel() == 0 or tables.shape[2] == 0:
        return weights.new_zeros(codes.shape[0], tables.shape[2])
    scales = None if scales is None else scales.contiguous()
    few = _few(codes.shape[0], route)
    return finish(_from_codes(codes.contiguous(), weights.contiguous(), tables, scales, few), None, F32)


def hash_backward(
    x: Tensor,
    grad_weights: Tensor,
    bits: int,
    weighting: str,
    temperature: float,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The leaf op lookup_hash_backward: grad_weights [T, K] · ∂w/∂x, [T, d] in the dtype of x."""
    refuse(x)
    x = readable(x)
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_weights = grad_weights.contiguous()
    arguments = {"centre": grad_weights, "scale": grad_weights}
    arguments |= hash_arguments(x, bits, weighting, temperature, hash, centre, scale)
    arguments.update(grad_weights=grad_weights, grad=grad)

    def run(config: Config) -> None:
        grid = (triton.cdiv(grad.numel(), config.blocks["BLOCK"]),)
        launch(table.hash_backward_variant(config, x.dtype), grid, arguments, x.device)

    table.HASH_BACKWARD.run(x.device, run)
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
        described = table.segments_variant(config, grad.dtype, stored, h % 16 == 0)
        grid = (tokens * chunks if scarce else count, columns, parts)
        launch(described, grid, {**arguments, "out": out}, grad.device)
        return out

    configs = table.SEGMENTS if h % 16 == 0 else table.SEGMENTS_ODD
    return finish(configs.run(grad.device, run, (grad.dtype, tokens)), None, dtype)


def _one_hot_segments(grad: Tensor, codes: Tensor, weights: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    (tokens, chunks), h = codes.shape, grad.shape[1]
    out = torch.empty(chunks * n, h, dtype=BF16 if dtype == BF16 else F32, device=grad.device)
    arguments = {"grad": grad, "codes": codes, "weights": weights, "out": out, "stride": grad.stride(0)}
    arguments.update(tokens=tokens, chunks=chunks, n=n, h=h)

    def run(config: Config) -> None:
        grid = (triton.cdiv(chunks, config.blocks["BLOCK_K"]), triton.cdiv(h, config.blocks["BLOCK_H"]))
        launch(table.one_hot_segments_variant(config, out.dtype, h % 16 == 0), grid, arguments, grad.device)

    table.ONE_HOT_SEGMENTS.run(grad.device, run, (tokens,))
    return out.to(dtype)


def _dots(grad: Tensor, codes: Tensor, tables: Tensor, scales: Tensor | None) -> Tensor:
    (tokens, chunks), (_, n, h), dtype = codes.shape, tables.shape, tables.dtype
    out = torch.empty(tokens, chunks, dtype=F32, device=grad.device)
    whole = is_whole(tables)
    hot = n <= ONE_HOT_ROWS and tokens >= ONE_HOT_TOKENS and grad.dtype == dtype and dtype in (BF16, F16) and whole
    few = table.DOTS_FEW if whole else table.DOTS_FEW_ODD
    configs = table.ONE_HOT_DOTS if hot else few if tokens <= FEW_TOKENS_BACKWARD or not whole else table.DOTS
    grad = grad if hot else grad.float()
    arguments = {"grad": grad, "codes": codes, "tables": tables, "scales": scales, "out": out}
    arguments.update(stride=grad.stride(0), tokens=tokens, chunks=chunks, n=n, h=h)

    def run(config: Config) -> None:
        described = table.one_hot_dots_variant(config, dtype) if hot else table.dots_variant(config, dtype, whole)
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
