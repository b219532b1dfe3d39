"""The launch configurations of family `lookup`, and everything it compiles and launches."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from pyrepr.kernels._launch import ARCHITECTURES, BF16, DTYPE_NAMES, F16, F32, FLOATS, I8, Config, Table, Variant
from pyrepr.kernels.lookup._backward import (
    dots_few_kernel,
    dots_kernel,
    hash_backward_kernel,
    one_hot_dots_kernel,
    one_hot_segments_kernel,
    segments_kernel,
)
from pyrepr.kernels.lookup._forward import finish_kernel, hash_kernel, one_hot_kernel, rows_kernel, stream_kernel
from pyrepr.kernels.lookup._shared import ONE_HOT_ROWS, Kernel


def _table(name: str, config: Config, *candidates: Config, **rows: Config) -> Table:
    """One config for every architecture, but for those in `rows` (``sm_80=…``).

    All are estimates from bytes in flight, registers and shared memory. ``PYREPR_AUTOTUNE=1``
    tries the candidates, and `python -m pyrepr.gpu_check` tells what the rows give.
    """
    return Table(f"lookup.{name}", {a: rows.get(f"sm_{a}", config) for a in ARCHITECTURES}, candidates)


def _variant(
    kernel: Kernel,
    name: str,
    config: Config,
    pointers: Mapping[str, torch.dtype | None],
    whole: bool = True,
    **constexprs: Any,
) -> Variant:
    """Run-time arguments that are no pointers are 32-bit integers, but `slope`. A pointer of dtype None is left out.

    `whole`: the arguments that the kernel wants aligned are. It must be true of every launch, or the variant another.
    """
    fixed = {**config.blocks, **constexprs, **{p: None for p, dtype in pointers.items() if dtype is None}}
    signature = {a: "fp32" if a == "slope" else "i32" for a in kernel.arg_names if a not in fixed}
    signature.update({p: "*" + DTYPE_NAMES[dtype] for p, dtype in pointers.items() if dtype is not None})
    unnamed = ("centre", "scale", "codes", "weights", "order", "starts", "rows")
    kinds = [DTYPE_NAMES[d] for p, d in pointers.items() if d is not None and p not in unnamed]
    label = "-".join([name, *kinds] if whole else [name, *kinds, "odd"])
    function = kernel.whole if whole else kernel.odd
    aligned = tuple(a for a in kernel.aligned if a in signature) if whole else ()
    return Variant(label, function, signature, fixed, config.num_warps, config.num_stages, aligned)


# With 128 threads ptxas aims at fewer registers than a chunk takes on sm_100.
HASH = _table("hash", Config({"BLOCK": 256}, 8))
FINISH = _table("finish", Config({"BLOCK": 512, "BLOCK_S": 1}))
FINISH_PARTS = _table("finish_parts", Config({"BLOCK": 128, "BLOCK_S": 16}))
ROWS = _table(
    "rows",
    Config({"BLOCK_K": 32, "BLOCK_H": 128}),
    Config({"BLOCK_K": 16, "BLOCK_H": 128}),
    Config({"BLOCK_K": 16, "BLOCK_H": 256}),
    Config({"BLOCK_K": 8, "BLOCK_H": 512}),
    Config({"BLOCK_K": 64, "BLOCK_H": 64}),
)
# Fewer tokens than threads: Triton then lets every thread read the codes of its own rows instead of passing them round
# through shared memory, with barriers.
STREAM = _table(
    "stream",
    Config({"BLOCK_T": 256, "BLOCK_H": 64}, 16),
    Config({"BLOCK_T": 512, "BLOCK_H": 64}, 16),
    Config({"BLOCK_T": 256, "BLOCK_H": 32}, 16),
    Config({"BLOCK_T": 128, "BLOCK_H": 64}, 8),
)
STREAM_FLOAT = _table(
    "stream_float", Config({"BLOCK_T": 128, "BLOCK_H": 64}, 8), Config({"BLOCK_T": 256, "BLOCK_H": 32}, 16)
)
# A multiple of every BLOCK_H of the two tables above.
STREAM_COLUMNS = 64
# For rows that are not whole: an address an element, so few elements a thread.
STREAM_ODD = _table("stream_odd", Config({"BLOCK_T": 16, "BLOCK_H": 64}, 8))
ONE_HOT = _table(
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
def hash_variant(config: Config, x: torch.dtype) -> Variant:
    pointers = {"x": x, "centre": F32, "scale": F32, "codes": torch.int32, "weights": F32}
    return _variant(hash_kernel, "hash", config, pointers)


def _sum_pointers(tables: torch.dtype, codes: bool = True) -> dict[str, torch.dtype | None]:
    """What the kernels that add up rows read and write; without `codes` they hash."""
    given = {"codes": torch.int32, "weights": F32} if codes else {"codes": None, "weights": None}
    return {"tables": tables, "scales": F32 if tables == I8 else None, "out": F32, **given}


@functools.cache
def rows_variant(config: Config, x: torch.dtype | None, tables: torch.dtype, whole: bool) -> Variant:
    """x is None where codes and weights are given."""
    unused = dict.fromkeys(("stride", "width", "each", "affine", "slope", "weighting")) if x is None else {}
    affine = None if x is None else F32
    pointers = {"x": x, "centre": affine, "scale": affine, **_sum_pointers(tables, codes=x is None)}
    return _variant(rows_kernel, "rows", config, pointers, whole, **unused)


@functools.cache
def stream_variant(config: Config, tables: torch.dtype, whole: bool, full: bool) -> Variant:
    name = "stream_ragged" if whole and not full else "stream"
    return _variant(stream_kernel, name, config, _sum_pointers(tables), whole, FULL=full)


@functools.cache
def one_hot_variant(config: Config, tables: torch.dtype) -> Variant:
    return _variant(one_hot_kernel, "one_hot", config, _sum_pointers(tables), ROWS=ONE_HOT_ROWS)


@functools.cache
def finish_variant(config: Config, bias: torch.dtype, out: torch.dtype, whole: bool) -> Variant:
    name = "finish" if config.blocks["BLOCK_S"] == 1 else "finish_parts"
    return _variant(finish_kernel, name, config, {"partial": F32, "bias": bias, "out": out}, whole)


def stream_table(tables: torch.dtype, whole: bool) -> Table:
    return STREAM_ODD if not whole else STREAM_FLOAT if tables == F32 else STREAM


HASH_BACKWARD = _table("hash_backward", Config({"BLOCK": 256}))
SEGMENTS = _table(
    "segments",
    Config({"BLOCK_T": 8, "BLOCK_H": 256}, 2),
    Config({"BLOCK_T": 4, "BLOCK_H": 512}, 2),
    Config({"BLOCK_T": 16, "BLOCK_H": 256}, 4),
    Config({"BLOCK_T": 8, "BLOCK_H": 128}, 1),
)
# For rows of grad that are not whole, with an address an element.
SEGMENTS_ODD = _table(
    "segments_odd", Config({"BLOCK_T": 4, "BLOCK_H": 256}, 2), Config({"BLOCK_T": 8, "BLOCK_H": 128}, 2)
)
ONE_HOT_SEGMENTS = _table(
    "one_hot_segments",
    Config({"BLOCK_T": 64, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 3),
    Config({"BLOCK_T": 64, "BLOCK_H": 256, "BLOCK_K": 8}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 2),
)
DOTS = _table(
    "dots",
    Config({"BLOCK_T": 64, "BLOCK_H": 64, "BLOCK_K": 8}, 8),
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 8}, 16),
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 4}, 8),
    Config({"BLOCK_T": 64, "BLOCK_H": 128, "BLOCK_K": 4}, 8),
)
DOTS_FEW = _table(
    "dots_few",
    Config({"BLOCK_H": 1024, "BLOCK_K": 4}, 4),
    Config({"BLOCK_H": 512, "BLOCK_K": 4}, 4),
    Config({"BLOCK_H": 512, "BLOCK_K": 8}, 4),
    Config({"BLOCK_H": 256, "BLOCK_K": 16}, 4),
)
# For tables that are not whole, with an address an element.
DOTS_FEW_ODD = _table(
    "dots_few_odd", Config({"BLOCK_H": 512, "BLOCK_K": 4}, 4), Config({"BLOCK_H": 256, "BLOCK_K": 8}, 4)
)
ONE_HOT_DOTS = _table(
    "one_hot_dots",
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 8}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 64, "BLOCK_K": 16}, 8, 3),
    Config({"BLOCK_T": 128, "BLOCK_H": 128, "BLOCK_K": 8}, 8, 2),
)


@functools.cache
def hash_backward_variant(config: Config, x: torch.dtype) -> Variant:
    pointers = {"x": x, "centre": F32, "scale": F32, "grad_weights": F32, "grad": x}
    return _variant(hash_backward_kernel, "hash_backward", config, pointers)


@functools.cache
def segments_variant(config: Config, grad: torch.dtype, out: torch.dtype, whole: bool) -> Variant:
    pointers = {"grad": grad, "codes": torch.int32, "weights": F32, "out": out}
    places = dict.fromkeys(("order", "starts", "rows"), torch.int64)
    return _variant(segments_kernel, "segments", config, {**pointers, **places}, whole)


@functools.cache
def one_hot_segments_variant(config: Config, out: torch.dtype, whole: bool) -> Variant:
    pointers = {"grad": BF16, "codes": torch.int32, "weights": F32, "out": out}
    return _variant(one_hot_segments_kernel, "one_hot_segments", config, pointers, whole, ROWS=ONE_HOT_ROWS)


@functools.cache
def dots_variant(config: Config, tables: torch.dtype, whole: bool) -> Variant:
    scales = F32 if tables == I8 else None
    pointers = {"grad": F32, "codes": torch.int32, "tables": tables, "scales": scales, "out": F32}
    kernel, name = (dots_kernel, "dots") if "BLOCK_T" in config.blocks else (dots_few_kernel, "dots_few")
    return _variant(kernel, name, config, pointers, whole)


@functools.cache
def one_hot_dots_variant(config: Config, tables: torch.dtype) -> Variant:
    pointers = {"grad": tables, "codes": torch.int32, "tables": tables, "out": F32}
    return _variant(one_hot_dots_kernel, "one_hot_dots", config, pointers, ROWS=ONE_HOT_ROWS)


def _backward_variants(a: int) -> list[Variant]:
    stored = (*FLOATS, I8)
    found = [hash_backward_variant(HASH_BACKWARD.rows[a], x) for x in FLOATS]
    for whole in (True, False):
        sorted_ones = SEGMENTS if whole else SEGMENTS_ODD
        kinds = [(grad, out) for grad in FLOATS for out in dict.fromkeys((F32, grad))]
        found += [segments_variant(sorted_ones.rows[a], *kind, whole) for kind in kinds]
        found += [one_hot_segments_variant(ONE_HOT_SEGMENTS.rows[a], out, whole) for out in (F32, BF16)]
        few = DOTS_FEW if whole else DOTS_FEW_ODD
        found += [dots_variant(few.rows[a], tables, whole) for tables in stored]
    # Of rows that start anywhere every element takes an address of its own: no registers for so large tiles.
    found += [dots_variant(DOTS.rows[a], tables, True) for tables in stored]
    return found + [one_hot_dots_variant(ONE_HOT_DOTS.rows[a], tables) for tables in (BF16, F16)]


def variants(architecture: int) -> list[Variant]:
    """Everything the family launches on that architecture."""
    a, stored = architecture, (*FLOATS, I8)
    found = [hash_variant(HASH.rows[a], x) for x in FLOATS]
    for whole in (True, False):
        found += [rows_variant(ROWS.rows[a], x, tables, whole) for x, tables in FUSED]
        found += [rows_variant(ROWS.rows[a], None, tables, whole) for tables in stored]
        kinds = [(bias, out) for out in FLOATS for bias in dict.fromkeys((F32, out))]
        found += [finish_variant(f.rows[a], *kind, whole) for f in (FINISH, FINISH_PARTS) for kind in kinds]
    for whole, full in ((True, True), (True, False), (False, False)):
        found += [stream_variant(stream_table(t, whole).rows[a], t, whole, full) for t in stored]
    found += [one_hot_variant(ONE_HOT.rows[a], tables) for tables in (BF16, F16, I8)]
    return found + _backward_variants(a)
