"""The launch configurations of family `gram`, and everything it compiles and launches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from pyrepr.kernels._launch import DTYPE_NAMES, Config, Table, Variant
from pyrepr.kernels.gram._measure import (
    LAYERS,
    fit_kernel,
    pack_layers_kernel,
    parts_kernel,
    reduce_kernel,
    squares_kernel,
    values_kernel,
)
from pyrepr.kernels.gram._tiles import (
    apply_kernel,
    histogram_kernel,
    matrix_kernel,
    moments_kernel,
    pack_kernel,
    pair_kernel,
    products_kernel,
    tiles_kernel,
)

from pyrepr.reference.gram import KERNELS

PARTS = {torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}


def _square(block: int, bk: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK": block, "BK": bk}, warps, stages)


_SEARCH = [_square(b, bk, w, s) for b, w in ((128, 8), (128, 4), (64, 4)) for bk in (32, 64) for s in (2, 3, 4)]


def _table(
    name: str, sm80: Config, sm90: Config, search: Sequence[Config] = _SEARCH, sm100: Config | None = None
) -> Table:
    return Table(name, {80: sm80, 90: sm90, 100: sm100 or sm90}, search)


# PARTS → table. Estimates: blocks that fit registers and shared memory.
PAIR = {
    1: _table("PAIR[1]", _square(128, 32, 8, 3), _square(128, 64, 8, 3)),
    2: _table("PAIR[2]", _square(64, 64, 4, 3), _square(128, 64, 8, 3), sm100=_square(128, 64, 8, 2)),
}
# 96 KB and at most 255 registers of 128 threads let two blocks share an sm_90: one multiplies while the other waits for
# a product, takes its kernel's values or stores. A power keeps its base, which is more registers than that. For sm_100
# some versions of Triton spill with so few threads, and one more stage does not fit.
TILES = {
    1: _table("TILES[1]", _square(128, 32, 8, 3), _square(128, 64, 4, 3), sm100=_square(128, 64, 8, 3)),
    2: _table("TILES[2]", _square(128, 32, 8, 2), _square(128, 32, 4, 3), sm100=_square(128, 64, 8, 2)),
}
POLYNOMIAL_TILES = {
    1: _table("POLYNOMIAL_TILES[1]", _square(128, 32, 8, 3), _square(128, 64, 8, 3)),
    2: _table("POLYNOMIAL_TILES[2]", _square(128, 32, 8, 2), _square(128, 64, 8, 3), sm100=_square(128, 64, 8, 2)),
}
FEATURES = {
    1: _table("FEATURES[1]", _square(128, 32, 8, 3), _square(128, 64, 8, 3)),
    2: _table("FEATURES[2]", _square(64, 32, 4, 2), _square(128, 64, 8, 2)),
}
MATRIX = {
    1: _table("MATRIX[1]", _square(64, 32, 4, 4), _square(64, 64, 4, 4)),
    2: _table("MATRIX[2]", _square(64, 32, 4, 3), _square(64, 64, 4, 3)),
}
# Twice the edge is half the bytes from L2, which bounds 64 × 64 tiles; fewer tiles than LARGE leave processors idle.
LARGE_MATRIX = {
    1: _table("LARGE_MATRIX[1]", _square(64, 32, 4, 4), _square(128, 32, 8, 4), sm100=_square(64, 64, 4, 4)),
    2: _table("LARGE_MATRIX[2]", _square(64, 32, 4, 3), _square(128, 32, 8, 3), sm100=_square(64, 64, 4, 3)),
}
MOMENTS = {
    1: _table("MOMENTS[1]", _square(64, 32, 4, 3), _square(64, 64, 4, 3)),
    2: _table("MOMENTS[2]", _square(64, 32, 4, 3), _square(64, 64, 4, 3)),
}
HISTOGRAM = {
    1: _table("HISTOGRAM[1]", _square(64, 32, 4, 3), _square(64, 64, 4, 3)),
    2: _table("HISTOGRAM[2]", _square(64, 32, 4, 3), _square(64, 64, 4, 3)),
}


def _oblong(bm: int, bk: int, stages: int) -> Config:
    return Config({"BM": bm, "BN": 128, "BK": bk}, 8, stages)


def _layers(bl: int, bk: int, warps: int) -> Config:
    return Config({"BL": bl, "BK": bk}, warps, 3)


_OBLONG = [_oblong(bm, bk, s) for bm in (64, 128) for bk in (32, 64) for s in (2, 3, 4)]
APPLY = {
    1: _table("APPLY[1]", _oblong(128, 32, 2), _oblong(128, 64, 3), _OBLONG),
    2: _table("APPLY[2]", _oblong(64, 32, 2), _oblong(64, 64, 3), _OBLONG),
}
# PARTS → layers at a time → config of `_products`
PRODUCTS = {
    1: {16: _layers(16, 64, 4), 32: _layers(32, 64, 4), 64: _layers(64, 32, 8)},
    2: {16: _layers(16, 64, 4), 32: _layers(32, 64, 4), 64: _layers(64, 32, 8)},
}
PRODUCTS_SPLIT = 8
PACK = Config({"BR": 16, "BC": 128}, 4, 1)
# 16 columns: a whole sector of 16-bit numbers, and as many programs as there can be.
FIT = Config({"BR": 128, "BC": 16}, 4, 1)
SQUARES = Config({"PIECE": 1024}, 4, 1)
REDUCE = Config({}, 4, 1)
LARGEST = Config({}, 8, 1)  # 64 × 64 in float64 are too many registers for fewer
PADDED = (16, 32, 64)  # layers of a table of CKA in one launch
_POINTERS = {
    "packed": "*fp16",
    "starts": "*i32",
    "slab": "*fp16",
    **dict.fromkeys(("q", "valid", "constants", "sums", "units"), "*fp32"),
}
_LAYERS = ("packed", "starts", "q", "valid", "constants")
_ALIGNED = ("n_pad", "width", "x_pad", "y_pad")


def _variant(kernel, config: Config, constexprs: dict, pointers: dict[str, str], integers: tuple[str, ...]) -> Variant:
    """A variant whose pointers are aligned, and of the integers those that padding makes multiples of 16."""
    constexprs = {**constexprs, **config.blocks}
    options = " ".join(f"{name}={value}" for name, value in constexprs.items())
    types = " ".join(sorted({t for p, t in pointers.items() if p in ("x", "weights")} - {"*fp16"}))
    return Variant(
        " ".join(part for part in (kernel.fn.__name__.removesuffix("_kernel"), types.strip("*"), options) if part),
        kernel,
        {**pointers, **dict.fromkeys(integers, "i32")},
        constexprs,
        config.num_warps,
        config.num_stages,
        aligned=(*pointers, *(name for name in integers if name in _ALIGNED)),
    )


@functools.cache
def pack_variant(dtype: torch.dtype) -> Variant:
    pointers = {"x": "*" + DTYPE_NAMES[dtype], **dict.fromkeys(("mean", "scale", "valid"), "*fp32")}
    pointers |= {"packed": "*fp16", "q": "*fp32"}
    integers = ("stride", "n", "d", "start", "n_pad", "width")
    variant = _variant(pack_kernel, PACK, {"PARTS": PARTS[dtype]}, pointers, integers)
    # Rows of x may start anywhere.
    return dataclasses.replace(
        variant, name=f"pack {DTYPE_NAMES[dtype]}", aligned=tuple(a for a in variant.aligned if a != "x")
    )


@functools.cache
def pair_variant(config: Config, parts: int) -> Variant:
    pointers = {"packed": "*fp16", "starts": "*i32", "partial": "*fp64"}
    return _variant(pair_kernel, config, {"PARTS": parts}, pointers, ("blocks", "n_pad", "width"))


@functools.cache
def tiles_variant(config: Config, kind: int, parts: int) -> Variant:
    pointers = {p: _POINTERS[p] for p in (*_LAYERS, "slab", "units", "sums")}
    integers = ("first", "degree", "blocks", "n_pad", "width")
    return _variant(tiles_kernel, config, {"KIND": kind, "PARTS": parts}, pointers, integers)


def tiles_table(kind: int, parts: int) -> Table:
    return (POLYNOMIAL_TILES if KERNELS[kind] == "polynomial" else TILES)[parts]


@functools.cache
def products_variant(block: int, parts: int, layers: int) -> Variant:
    one = layers < max(PRODUCTS[parts])  # with the largest there may be more layers than that
    constexprs = {"PARTS": parts, "ENTRIES": block * block, "SPLIT": PRODUCTS_SPLIT, "ONE": one}
    return _variant(
        products_kernel,
        PRODUCTS[parts][layers],
        constexprs,
        {"slab": "*fp16", "units": "*fp32", "partial": "*fp32"},
        ("first", "layers", "blocks"),
    )


@functools.cache
def parts_variant(config: Config, parts: int, whole: bool) -> Variant:
    pointers = {"packed": "*fp16", "owner": "*i32", "parts": "*fp32", "squares": "*fp64"}
    integers = ("blocks", "split", "rows", "n_pad", "width")
    return _variant(parts_kernel, config, {"PARTS": parts, "WHOLE": whole}, pointers, integers)


@functools.cache
def squares_variant(block: int) -> Variant:
    pointers = {"parts": "*fp32", "owner": "*i32", "squares": "*fp64"}
    return _variant(squares_kernel, SQUARES, {"BLOCK": block}, pointers, ("blocks", "split", "count"))


def _of_layers(
    kernel, config: Config, constexprs: dict, dtype: torch.dtype, pointers: dict, integers: tuple
) -> Variant:
    """A variant that takes the layers themselves, which may start anywhere."""
    layers = tuple(f"x{i}" for i in range(LAYERS))
    variant = _variant(
        kernel, config, constexprs, {**dict.fromkeys(layers, "*" + DTYPE_NAMES[dtype]), **pointers}, integers
    )
    return dataclasses.replace(
        variant,
        name=f"{variant.name} {DTYPE_NAMES[dtype]}",
        aligned=tuple(a for a in variant.aligned if a not in layers),
    )


@functools.cache
def fit_variant(dtype: torch.dtype, even: bool) -> Variant:
    pointers = {"layout": "*i32", "means": "*fp32", "largest": "*fp32"}
    return _of_layers(fit_kernel, FIT, {"EVEN": even}, dtype, pointers, ("first", "n", "blocks", "width"))


@functools.cache
def pack_layers_variant(dtype: torch.dtype, even: bool) -> Variant:
    pointers = {"layout": "*i32", "means": "*fp32", "largest": "*fp32", "packed": "*fp16"}
    pointers |= dict.fromkeys(("q", "scale", "valid"), "*fp32")
    constexprs = {"PARTS": PARTS[dtype], "EVEN": even}
    return _of_layers(pack_layers_kernel, PACK, constexprs, dtype, pointers, ("first", "n", "blocks", "n_pad", "width"))


@functools.cache
def reduce_variant(padded: int, block: int, step: int) -> Variant:
    """step: of a tile's sums of the Gram route; 0 for the other, whose tiles have `block` columns."""
    pointers = {"partial": "*fp32" if step > 3 else "*fp64", "layout": "*i32", "q": "*fp32"}
    pointers |= dict.fromkeys(("s", "products", "totals"), "*fp64")
    constexprs = {"BY_FEATURES": not step, "STEP": step, "PADDED": padded, "BLOCK": block}
    integers = ("layers", "count", "rows", "split", "n", "n_pad")
    return _variant(reduce_kernel, REDUCE, constexprs, pointers, integers)


@functools.cache
def values_variant(padded: int, by_features: bool) -> Variant:
    pointers = dict.fromkeys(("s", "products", "totals"), "*fp64")
    pointers |= {"scale": "*fp32", "values": "*fp32", "degenerate": "*i32"}
    constexprs = {"BY_FEATURES": by_features, "PADDED": padded}
    config = LARGEST if padded > 32 else REDUCE
    return _variant(values_kernel, config, constexprs, pointers, ("layers", "blocks", "n", "biased"))


@functools.cache
def matrix_variant(config: Config, kind: int, parts: int) -> Variant:
    pointers = {"x": "*fp16", "y": "*fp16", **dict.fromkeys(("x_norms", "y_norms", "constants", "out"), "*fp32")}
    integers = ("n", "m", "same", "degree", "x_pad", "y_pad", "width")
    return _variant(matrix_kernel, config, {"KIND": kind, "PARTS": parts}, pointers, integers)


@functools.cache
def histogram_variant(config: Config, parts: int) -> Variant:
    pointers = {"packed": "*fp16", "q": "*fp32", "valid": "*fp32", "prefix": "*i32", "counts": "*i32"}
    return _variant(histogram_kernel, config, {"PARTS": parts}, pointers, ("blocks", "shift", "n_pad", "width"))


@functools.cache
def moments_variant(config: Config, parts: int) -> Variant:
    pointers = {"packed": "*fp16", "unit": "*fp64", "out": "*fp64"}
    integers = ("a", "b", "d_a", "d_b", "n_pad", "width")
    return _variant(moments_kernel, config, {"PARTS": parts}, pointers, integers)


@functools.cache
def apply_variant(config: Config, parts: int, even: bool) -> Variant:
    pointers = {"weights": "*fp32", "factor": "*fp32", "unit": "*fp32", "packed": "*fp16", "out": "*fp32"}
    constexprs = {"PARTS": parts, "EVEN": even}
    return _variant(apply_kernel, config, constexprs, pointers, ("m", "n", "d", "n_pad", "width"))


def variants(architecture: int) -> list[Variant]:
    """Everything this module launches on that architecture."""
    found = [pack_variant(dtype) for dtype in PARTS]
    for parts in (1, 2):
        found.append(pair_variant(PAIR[parts].rows[architecture], parts))
        for kind in range(len(KERNELS)):
            found.append(tiles_variant(tiles_table(kind, parts).rows[architecture], kind, parts))
            configs = dict.fromkeys(table[parts].rows[architecture] for table in (MATRIX, LARGE_MATRIX))
            found += [matrix_variant(config, kind, parts) for config in configs]
        features = FEATURES[parts].rows[architecture]
        found += [parts_variant(features, parts, whole) for whole in (False, True)]
        found.append(squares_variant(features.blocks["BLOCK"]))
        found += [reduce_variant(padded, features.blocks["BLOCK"], 0) for padded in PADDED]
        found.append(moments_variant(MOMENTS[parts].rows[architecture], parts))
        found.append(histogram_variant(HISTOGRAM[parts].rows[architecture], parts))
        found += [apply_variant(APPLY[parts].rows[architecture], parts, even) for even in (False, True)]
        block = TILES[parts].rows[architecture].blocks["BLOCK"]
        found += [products_variant(block, parts, layers) for layers in PRODUCTS[parts]]
    for even in (False, True):
        found += [make(dtype, even) for make in (fit_variant, pack_layers_variant) for dtype in PARTS]
        found += [values_variant(padded, even) for padded in PADDED]
    found += [reduce_variant(padded, 0, padded * padded) for padded in PADDED] + [reduce_variant(PADDED[0], 0, 3)]
    return list({v.key: v for v in found}.values())
