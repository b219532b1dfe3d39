"""The launch configurations of family `causal_conv1d`, and everything it compiles and launches."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from pyrepr.kernels._launch import ARCHITECTURES, BF16, DTYPE_NAMES, F16, F32, FLOATS, Config, Table, Variant
from pyrepr.kernels.causal_conv1d._index import index_kernel
from pyrepr.kernels.causal_conv1d._shared import CU_SEQLENS, POINTERS, ROWS_SEQ, SEQ_IDX, WIDTH
from pyrepr.kernels.causal_conv1d._walks import (
    backward_kernel,
    forward_kernel,
    initial_gradient_kernel,
    sums_kernel,
    update_kernel,
)
from pyrepr.kernels.causal_conv1d._wide import wide_input_kernel, wide_kernel, wide_weight_kernel

# (x, weight) that the kernels read as they are where no gradient is wanted; other weights become float32 first.
PAIRS = ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))


def _table(name: str, config: Config, *candidates: Config) -> Table:
    """One config for every architecture: an estimate from bytes in flight and registers."""
    return Table(f"causal_conv1d.{name}", dict.fromkeys(ARCHITECTURES, config), candidates)


def _walk(
    name: str, chosen: tuple[int, int, int], *others: tuple[int, int, int], sm_80: tuple[int, int, int] | None = None
) -> Table:
    """(BLOCK_D, ROWS, warps); a warp each, where nothing has to pass from warp to warp. sm_80: another one there."""
    first, *rest = (Config({"BLOCK_D": d, "ROWS": rows}, warps, 1) for d, rows, warps in (chosen, *others))
    table = _table(name, first, *rest)
    if sm_80 is not None:
        table.rows = {**table.rows, 80: Config({"BLOCK_D": sm_80[0], "ROWS": sm_80[1]}, sm_80[2], 1)}
    return table


# (layout, bytes of an element). Layouts: "dense" and "odd", channels side by side, whose rows start at multiples of 16
# bytes or anywhere; "turned", tokens side by side.
# Forward, dense: a thread has 16 bytes of channels, ROWS × 512 bytes a warp in flight, 12 warps a multiprocessor by
# registers: 48 KB, more than the 20 KB that 3.3 TB/s want. Turned: 16 bytes of tokens, twice; 24 warps, 24 KB.
FORWARD = {
    ("dense", 2): _walk("forward dense 2", (256, 8, 1), (256, 4, 1), (128, 8, 1), (128, 16, 1), (512, 8, 2)),
    ("dense", 4): _walk("forward dense 4", (128, 8, 1), (128, 4, 1), (128, 16, 1), (256, 8, 2)),
    ("odd", 2): _walk("forward odd 2", (64, 8, 1), (128, 8, 1), (64, 16, 1)),
    ("odd", 4): _walk("forward odd 4", (64, 8, 1), (128, 8, 1), (64, 16, 1)),
    ("turned", 2): _walk("forward turned 2", (32, 16, 1), (32, 8, 1), (32, 32, 1), (64, 16, 2)),
    ("turned", 4): _walk("forward turned 4", (32, 16, 1), (32, 8, 1), (32, 32, 1), (64, 16, 2)),
}
# Backward, dense: 8 bytes of channels a thread, because 16 bytes of 16-bit channels take all 255 registers; 4 bytes for
# sm_80, where ptxas spills two registers of 8.
BACKWARD = {
    ("dense", 2): _walk("backward dense 2", (128, 4, 1), (128, 8, 1), (256, 4, 1), (64, 8, 1), sm_80=(64, 8, 1)),
    ("dense", 4): _walk("backward dense 4", (128, 4, 1), (128, 8, 1), (64, 8, 1)),
    ("odd", 2): _walk("backward odd 2", (64, 8, 1), (32, 8, 1), (128, 4, 1)),
    ("odd", 4): _walk("backward odd 4", (64, 8, 1), (32, 8, 1), (128, 4, 1)),
    ("turned", 2): _walk("backward turned 2", (32, 16, 1), (32, 8, 1)),
    ("turned", 4): _walk("backward turned 4", (32, 16, 1), (32, 8, 1)),
}
SUMS = _table("sums", Config({"BLOCK": 128, "BLOCK_S": 16}), Config({"BLOCK": 64, "BLOCK_S": 32}))
INDEX = _table("index", Config({"BLOCK": 256}, 4, 1))
INITIAL_GRADIENT = _table("initial_gradient", Config({"BLOCK_D": 64}, 2, 1), Config({"BLOCK_D": 128}, 4, 1))
_tiles = [Config({"BLOCK_T": t, "BLOCK_D": d}, 4, 1) for t, d in ((32, 64), (16, 128), (64, 32))]
WIDE = _table("wide", *_tiles)
WIDE_INPUT = _table("wide_input", *_tiles)
WIDE_WEIGHT = _table("wide_weight", *_tiles)
# One channel a thread: the state of a token is 2 S s bytes, and there are B D of them.
UPDATE = _table("update", Config({"BLOCK_D": 128}, 4, 1), Config({"BLOCK_D": 64}, 2, 1), Config({"BLOCK_D": 256}, 8, 1))
_INT32 = {"position", "number"}
_FLOAT32 = {"partial", "dy", "dinitial"}


def _make(name: str, kernel: Any, config: Config, kinds: Mapping[str, torch.dtype], **constexprs: Any) -> Variant:
    return _made(name, kernel, config, tuple(kinds.items()), tuple(constexprs.items()))


@functools.cache
def _made(name: str, kernel: Any, config: Config, kinds: tuple, constexprs: tuple) -> Variant:
    """`kinds`: what pointers point to, where their name does not say it. No alignment: see ``_shared``."""
    fixed, of = {**config.blocks, **dict(constexprs)}, dict(kinds)
    of |= {**dict.fromkeys(_INT32, torch.int32), **dict.fromkeys(_FLOAT32, F32), "valid": torch.bool}
    arguments = [a for a in kernel.arg_names if a not in fixed]
    signature = {a: "*" + DTYPE_NAMES[of[a]] if a in POINTERS else "i32" for a in arguments}
    words = [name, *dict.fromkeys(DTYPE_NAMES[dtype] for _, dtype in kinds)]
    label = " ".join([*words, *(f"{a}={b}" for a, b in fixed.items() if b is not None)])
    return Variant(label, kernel, signature, fixed, config.num_warps, config.num_stages)


def _unit(layout: str, dtype: torch.dtype) -> int:
    return 1 if layout == "odd" else 16 // dtype.itemsize


def _walk_options(layout: str, dtype: torch.dtype, packed: bool) -> dict[str, Any]:
    return {"WIDTH": WIDTH, "UNIT": _unit(layout, dtype), "TURNED": layout == "turned", "PACKED": packed}


def forward_variant(config: Config, layout: str, x: torch.dtype, weight: torch.dtype, packed: bool) -> Variant:
    kinds = {"x": x, "initial": x, "out": x, "weight": weight, "bias": weight}
    return _make("forward", forward_kernel, config, kinds, **_walk_options(layout, x, packed))


def backward_variant(config: Config, layout: str, x: torch.dtype, packed: bool) -> Variant:
    kinds = {"x": x, "initial": x, "grad": x, "dx": x, "weight": F32, "bias": F32}
    return _make("backward", backward_kernel, config, kinds, **_walk_options(layout, x, packed))


def sums_variant(config: Config, weight: torch.dtype) -> Variant:
    return _make("sums", sums_kernel, config, {"dweight": weight, "dbias": weight})


def index_variant(config: Config, kind: int, sequences: torch.dtype) -> Variant:
    return _make("index", index_kernel, config, {"sequences": sequences}, KIND=kind)


def initial_gradient_variant(config: Config, x: torch.dtype) -> Variant:
    kinds = {"x": x, "initial": x, "grad": x, "weight": F32, "bias": F32, "sequences": torch.int64}
    return _make("initial gradient", initial_gradient_kernel, config, kinds)


def wide_variant(config: Config, x: torch.dtype, gradient: bool) -> Variant:
    kinds = {"x": x, "initial": x, "weight": F32, "bias": F32, "out": F32 if gradient else x, "grad": x}
    more = {} if gradient else {"grad": None}
    return _make("wide dy" if gradient else "wide", wide_kernel, config, kinds, **more)


def wide_input_variant(config: Config, x: torch.dtype) -> Variant:
    return _make("wide input", wide_input_kernel, config, {"dx": x, "weight": F32})


def wide_weight_variant(config: Config, x: torch.dtype) -> Variant:
    return _make("wide weight", wide_weight_kernel, config, {"x": x, "initial": x})


def update_variant(config: Config, x: torch.dtype, weight: torch.dtype) -> Variant:
    kinds = {"x": x, "state": x, "out": x, "weight": weight, "bias": weight}
    return _make("update", update_kernel, config, kinds)


def variants(architecture: int) -> list[Variant]:
    """Everything the family launches on that architecture."""
    a, found = architecture, []
    for (layout, size), table in FORWARD.items():
        pairs = [(x, weight) for x, weight in PAIRS if x.itemsize == size]
        found += [forward_variant(table.rows[a], layout, *pair, p) for pair in pairs for p in (False, True)]
    for (layout, size), table in BACKWARD.items():
        kinds = [x for x in FLOATS if x.itemsize == size]
        found += [backward_variant(table.rows[a], layout, x, p) for x in kinds for p in (False, True)]
    found += [update_variant(UPDATE.rows[a], *pair) for pair in PAIRS]
    kinds = ((ROWS_SEQ, torch.int64), (SEQ_IDX, torch.int32), (SEQ_IDX, torch.int64), (CU_SEQLENS, torch.int64))
    found += [index_variant(INDEX.rows[a], *kind) for kind in kinds]
    for x in FLOATS:
        found += [sums_variant(SUMS.rows[a], x), initial_gradient_variant(INITIAL_GRADIENT.rows[a], x)]
        found += [wide_variant(WIDE.rows[a], x, gradient) for gradient in (False, True)]
        found += [wide_input_variant(WIDE_INPUT.rows[a], x), wide_weight_variant(WIDE_WEIGHT.rows[a], x)]
    return found
