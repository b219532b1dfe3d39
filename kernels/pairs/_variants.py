"""The launch configurations of family `pairs`, and everything it compiles and launches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from pyrepr.kernels._launch import BF16, DTYPE_NAMES, F32, FLOATS, VERSION, Config, Table, Variant
from pyrepr.kernels.pairs._backward import product_kernel, weights_kernel
from pyrepr.kernels.pairs._forward import logsumexp_kernel, tags_kernel
from pyrepr.kernels.pairs._topk import exact_kernel, rescore_kernel, screen_kernel

# Prefixes that a launch has room for.
COUNTS = (1, 8)
# Candidates that a row keeps, for k up to four fifths of them.
KEPT = (16, 64, 256)
CHUNK = 16  # candidates of a program that scores them again


def _tile(bm: int, bn: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BM": bm, "BN": bn, "BK": bk}, warps, stages)


def _table(name: str, sm80: Config, sm90: Config, *candidates: Config, sm100: Config | None = None) -> Table:
    """Estimates from registers and shared memory."""
    return Table(f"pairs.{name}", {80: sm80, 90: sm90, 100: sm100 or sm90}, candidates)


# By bytes of an element and room for prefixes. float32 goes as three products of halves, and holds both halves of its
# operands; more prefixes hold on to a tile's products while its scores are worked on. With Triton 3.6 sm_90 has smaller
# tiles than later ones: theirs spill 112 (prefixes) and 168 bytes a thread there.
_small = _tile(64, 64, 64, 8, 3)
_large = [_tile(128, 64, 64, 8, s) for s in (2, 3, 4)]
_wide = [_tile(64, 64, 32, 8, s) for s in (3, 4)]
if VERSION < (3, 7):
    _large[1:1], _wide[:0] = [_small], [_tile(64, 32, 32, 8, 3)]
LOGSUMEXP = {
    (2, 1): _table("logsumexp 2", *_large, sm100=_small),
    (2, 8): _table("logsumexp 2 prefixes", *(_tile(64, 64, 64, 8, s) for s in (2, 3, 4))),
    (4, 1): _table("logsumexp 4", _tile(64, 32, 32, 8, 2), *(_tile(64, 64, 32, 8, s) for s in (3, 4))),
    (4, 8): _table("logsumexp 4 prefixes", _tile(64, 32, 32, 8, 2), *_wide),
}
WEIGHTS = {
    (2, 1): _table("weights 2", *(_tile(128, 64, 64, 8, s) for s in (2, 3, 4))),
    (2, 8): _table("weights 2 prefixes", *(_tile(64, 64, 64, 8, s) for s in (2, 3)), sm100=_tile(64, 32, 64, 8, 3)),
    (4, 1): _table("weights 4", *(_tile(64, 64, 32, 8, s) for s in (2, 3, 4))),
    (4, 8): _table("weights 4 prefixes", *(_tile(64, 32, 32, 8, s) for s in (2, 3))),
}
# Where logits are kept there are few of them.
KEEPING = {
    2: _table("keeping 2", *[_tile(32, 32, 64, 4, 2)] * 2),
    4: _table("keeping 4", *[_tile(32, 32, 32, 4, 2)] * 2),
}
PRODUCT = {
    2: _table("product 2", _tile(128, 64, 64, 8, 2), _tile(128, 128, 64, 8, 3), _tile(128, 64, 64, 4, 4)),
    4: _table("product 4", _tile(64, 64, 32, 4, 2), _tile(128, 64, 32, 8, 3), _tile(64, 64, 32, 4, 3)),
}
# The kept keys are 8 bytes each: the more of them, the fewer rows. Of 128 columns, compilers before 3.9 spill 40 bytes.
_square = _tile(64, 64, 64, 4, 3)
_screen_16 = _square if VERSION < (3, 9) else _tile(64, 128, 64, 4, 3)
SCREEN = {
    (2, 16): _table("screen 2 16", _tile(64, 64, 64, 4, 2), _screen_16, _tile(64, 128, 64, 8, 3), sm100=_square),
    (2, 64): _table("screen 2 64", _tile(32, 64, 64, 4, 2), _tile(32, 128, 64, 4, 3), _tile(64, 128, 64, 8, 3)),
    (2, 256): _table("screen 2 256", _tile(16, 64, 64, 4, 2), _tile(16, 128, 64, 4, 3)),
    (4, 16): _table("screen 4 16", _tile(32, 64, 32, 4, 2), _tile(64, 64, 32, 4, 3), _tile(64, 128, 32, 8, 3)),
    (4, 64): _table("screen 4 64", _tile(32, 64, 32, 4, 2), _tile(32, 64, 32, 4, 3)),
    (4, 256): _table("screen 4 256", _tile(16, 64, 32, 4, 2), _tile(16, 64, 32, 4, 3)),
}
TAGS = Config({"BM": 64, "BN": 64}, 4, 1)
RESCORE = Config({"BK": 32}, 1, 1)
EXACT = Config({"BN": 32, "BK": 32}, 4, 1)

_INT32, _INT64 = {"stops"}, {"row_tags", "column_tags", "labels", "keys"}
_ALIGNED = {"x_stride", "y_stride", "weights_stride", "z_stride", "out_stride"}
_NUMBERS = {"n", "m", "d", "part", "count", "positives", "by_column", "apart", "first", "last", "width", "add"}
_NUMBERS |= {"has_rows", "has_columns", "has_positive", "inner", "features", "exclude", "offset", "splits"}
_NUMBERS |= {"chunks", "metric"}


def precision(dtype: torch.dtype) -> str:
    """How products of float32 operands are taken: as three of halves with 11 bits each, about float32's accuracy."""
    return "tf32" if dtype == BF16 else "tf32x3"


def slab_dtype(dtype: torch.dtype) -> torch.dtype:
    """What coefficients are stored in; float16 would flush the small ones."""
    return BF16 if dtype == BF16 else F32


def _make(kernel: Any, config: Config, kinds: Mapping[str, torch.dtype], **constexprs: Any) -> Variant:
    """`kinds`: what pointers point to, where their name does not say it: float32 otherwise."""
    fixed = {**config.blocks, **constexprs}
    arguments = [a for a in kernel.arg_names if a not in fixed]
    of = {**dict.fromkeys(_INT32, torch.int32), **dict.fromkeys(_INT64, torch.int64), "sure": torch.bool, **kinds}
    numbers = _NUMBERS | _ALIGNED
    signature = {a: "i32" if a in numbers else "*" + DTYPE_NAMES[of.get(a, F32)] for a in arguments}
    aligned = tuple(a for a in arguments if a in _ALIGNED or signature[a][0] == "*")
    name = kernel.fn.__name__.removesuffix("_kernel")
    words = [name, *dict.fromkeys(DTYPE_NAMES[dtype] for dtype in kinds.values())]
    label = " ".join([*words, *(f"{a}={b}" for a, b in fixed.items())])
    return Variant(label, kernel, signature, fixed, config.num_warps, config.num_stages, aligned)


def logsumexp_table(dtype: torch.dtype, count: int, keep: bool) -> Table:
    return KEEPING[dtype.itemsize] if keep else LOGSUMEXP[dtype.itemsize, count]


def weights_table(dtype: torch.dtype, count: int, kept: bool) -> Table:
    return KEEPING[dtype.itemsize] if kept else WEIGHTS[dtype.itemsize, count]


@functools.cache
def logsumexp_variant(config: Config, dtype: torch.dtype, count: int, keep: bool) -> Variant:
    options = {"COUNT": count, "KEEP": keep, "PRECISION": precision(dtype)}
    return _make(logsumexp_kernel, config, {"x": dtype, "y": dtype}, **options)


@functools.cache
def tags_variant() -> Variant:
    return _make(tags_kernel, TAGS, {})


@functools.cache
def weights_variant(config: Config, dtype: torch.dtype, count: int, kept: bool) -> Variant:
    kinds = {"x": dtype, "y": dtype, "slab": slab_dtype(dtype)}
    return _make(weights_kernel, config, kinds, COUNT=count, KEPT=kept, PRECISION=precision(dtype))


@functools.cache
def product_variant(config: Config, dtype: torch.dtype, turned: bool) -> Variant:
    kinds = {"weights": slab_dtype(dtype), "z": dtype}
    return _make(product_kernel, config, kinds, TURNED=turned, PRECISION=precision(dtype))


@functools.cache
def screen_variant(config: Config, dtype: torch.dtype, kept: int) -> Variant:
    return _make(screen_kernel, config, {"x": dtype, "y": dtype}, KEPT=kept, PRECISION=precision(dtype))


@functools.cache
def rescore_variant(dtype: torch.dtype) -> Variant:
    return _make(rescore_kernel, RESCORE, {"x": dtype, "y": dtype}, CHUNK=CHUNK)


@functools.cache
def exact_variant(dtype: torch.dtype, kept: int) -> Variant:
    return _make(exact_kernel, EXACT, {"x": dtype, "y": dtype}, KEPT=kept)


def variants(architecture: int) -> list[Variant]:
    """Everything the family launches on that architecture."""
    a, found = architecture, [tags_variant()]
    for dtype in FLOATS:
        size = dtype.itemsize
        slab = slab_dtype(dtype).itemsize
        for count, keep in itertools.product(COUNTS, (False, True)):
            found.append(logsumexp_variant(logsumexp_table(dtype, count, keep).rows[a], dtype, count, keep))
            found.append(weights_variant(weights_table(dtype, count, keep).rows[a], dtype, count, keep))
        found += [product_variant(PRODUCT[slab].rows[a], dtype, turned) for turned in (False, True)]
        found += [screen_variant(SCREEN[size, kept].rows[a], dtype, kept) for kept in KEPT]
        found.append(rescore_variant(dtype))
        found += [exact_variant(dtype, kept) for kept in KEPT]
    return found
