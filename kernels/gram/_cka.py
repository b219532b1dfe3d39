"""CKA of all pairs of layers under the linear kernel, from the layers to the values, in at most six launches.

A GPU is through with a pair of layers in less time than it takes to ask for it: then launches are what it costs.
Up to LAYERS layers are measured and packed by one launch each, few tiles are cut along the samples so that every
multiprocessor has one, and what is left to do with the sums are two launches more (kernels in ``_measure``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
from pyrepr.kernels._launch import Config, launch
from pyrepr.kernels.gram import _variants as table
from pyrepr.kernels.gram._hosts import (
    BY_FEATURES,
    COLUMNS,
    ROWS,
    SLAB_BYTES,
    Packed,
    _grid,
    _layer_arguments,
    _on_device,
    parts_of,
    parts_of_rows,
    processors,
    squares,
    wanted_tiles,
)
from pyrepr.kernels.gram._measure import LAYERS
from torch import Tensor

from pyrepr.backend import Unsupported

# In columns of one layer that a tile of 128 × 128 takes in the time of a launch: 4 µs of an H100's share a processor.
LAUNCH = 500
BLOCKS_OF_ROWS, LEAST_ROWS = 64, 32  # whose D Dᵀ are summed apart


def by_features(n: int, widths: Sequence[int], split: int, count: int) -> bool:
    """Whether the feature route is the faster one on a GPU of `count` multiprocessors.

    A tile's time is the length of its sums, and tiles go in waves; the feature route cuts its sums among processors,
    for one launch more. The Gram route of more than two layers multiplies tiles with each other, in one launch a slab.
    """
    m, rows = len(widths), triton.cdiv(n, ROWS)
    tiles = rows * (rows + 1) // 2
    gram = triton.cdiv(tiles, count) * sum(triton.cdiv(d, COLUMNS) * COLUMNS for d in widths)
    if m > 2:
        slabs = triton.cdiv(tiles, max(1, SLAB_BYTES // (2 * m * ROWS * ROWS)))
        gram += triton.cdiv(tiles, count) * m * m // 2 + (2 * slabs - 1) * LAUNCH
    wide = wanted_tiles(widths, split, BY_FEATURES)
    parts = parts_of_rows(rows * ROWS, wide, count)
    features = triton.cdiv(wide * parts, count) * (rows * ROWS // parts) + (parts > 1) * LAUNCH
    return features < gram


class AllPacked(Packed):
    """Layers around their mean rows, packed like :class:`Packed` but all at once; ``scale`` is [M] float32."""

    def __init__(self, xs: Sequence[Tensor], columns: int) -> None:
        xs = [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in xs]
        dtype, self.device, self.n = xs[0].dtype, xs[0].device, xs[0].shape[0]
        self.parts, self.widths = parts_of(dtype), tuple(x.shape[1] for x in xs)
        self.n_pad = max(1, triton.cdiv(self.n, ROWS)) * ROWS
        padded = [max(1, triton.cdiv(width, columns)) * columns for width in self.widths]
        self.first = [0, *itertools.accumulate(padded)]
        self.width = self.first[-1]
        rows = zip(self.first, self.widths, padded, (x.stride(0) if len(x) > 1 else 0 for x in xs), strict=False)
        self.layout = _on_device(tuple(number for row in rows for number in row), self.device)
        new = functools.partial(torch.empty, dtype=torch.float32, device=self.device)
        self.data = torch.empty(self.parts, self.n_pad, self.width, dtype=torch.float16, device=self.device)
        self.q, self.valid, self.scale = new(len(xs), self.n_pad), new(self.n_pad), new(len(xs))
        blocks = triton.cdiv(max(padded), table.FIT.blocks["BC"])
        shared = {"layout": self.layout, "means": new(2, self.width), "largest": new(len(xs), blocks)}
        shared |= {"n": self.n, "blocks": blocks, "width": self.width}
        even = all(x.data_ptr() % 16 == 0 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 for x in xs)
        own = {"packed": self.data, "q": self.q, "valid": self.valid, "scale": self.scale, "n_pad": self.n_pad}
        groups = [(first, xs[first : first + LAYERS]) for first in range(0, len(xs), LAYERS)]
        for programs, variant, more in (
            (blocks, table.fit_variant(dtype, even), {}),
            (self.n_pad // table.PACK.blocks["BR"], table.pack_layers_variant(dtype, even), own),
        ):
            for first, some in groups:
                layers = {f"x{i}": some[i] if i < len(some) else some[0] for i in range(LAYERS)}
                launch(variant, (programs, len(some)), {**layers, **shared, **more, "first": first}, self.device)


def cka(xs: Sequence[Tensor], estimator: str, split: int) -> tuple[Tensor, Tensor]:
    """CKA of all pairs, [M, M] float32, and which layers are all alike, [M] int32; see `ops.gram.at_once_op`."""
    m, device = len(xs), xs[0].device
    if m > table.PADDED[-1]:
        raise Unsupported(f"backend 'triton' takes up to {table.PADDED[-1]} layers at once, got {m}")
    features = by_features(xs[0].shape[0], [x.shape[1] for x in xs], split, processors(device))
    packed = AllPacked(xs, BY_FEATURES if features else COLUMNS)
    padded = next(size for size in table.PADDED if size >= m)
    if features:
        tiles, block = table.FEATURES[packed.parts].run(device, functools.partial(squares, packed=packed, split=split))
        sums, step = {"partial": tiles, "count": len(tiles)}, 0
    else:
        run = functools.partial(_pair_tiles if m == 2 else _slab_tiles, packed=packed)
        choices = table.PAIR[packed.parts] if m == 2 else table.tiles_table(0, packed.parts)
        tiles, block = choices.run(device, run, () if m == 2 else (0, m)), 0
        sums, step = {"partial": tiles, "count": len(tiles)}, tiles[0].numel()
    rows = max(LEAST_ROWS, triton.cdiv(packed.n, BLOCKS_OF_ROWS))
    blocks = triton.cdiv(packed.n, rows)
    new = functools.partial(torch.empty, dtype=torch.float64, device=device)
    found = {"s": new(m * (m + 1) // 2), "products": new(blocks, padded, padded), "totals": new(blocks, padded)}
    shape = {"layers": m, "n": packed.n}
    arguments = {**sums, **found, **shape, "layout": packed.layout, "q": packed.q, "rows": rows, "split": split}
    variant = table.reduce_variant(padded, block, step)
    launch(variant, (m * (m + 1) // 2 + blocks,), {**arguments, "n_pad": packed.n_pad}, device)
    values = torch.empty(m, m, dtype=torch.float32, device=device)
    degenerate = torch.empty(m, dtype=torch.int32, device=device)
    arguments = {**found, **shape, "scale": packed.scale, "values": values, "degenerate": degenerate}
    arguments |= {"blocks": blocks, "biased": int(estimator == "biased")}
    launch(table.values_variant(padded, features), (1,), arguments, device)
    return values, degenerate


def _pair_tiles(config: Config, packed: Packed) -> Tensor:
    """Σ_{i<j} of k k, k l, l l of every tile, [tiles, 3] float64."""
    blocks = packed.n_pad // config.blocks["BLOCK"]
    partial = torch.empty(_grid(blocks), 3, dtype=torch.float64, device=packed.device)
    arguments = {"packed": packed.data, "starts": packed.starts, "partial": partial, "blocks": blocks, **packed.shape}
    launch(table.pair_variant(config, packed.parts), (len(partial),), arguments, packed.device)
    return partial


def _slab_tiles(config: Config, packed: Packed) -> Tensor:
    """Σ_{i<j} k_a k_b of every tile, [parts of tiles, PADDED, PADDED] float32."""
    m, block = len(packed.widths), config.blocks["BLOCK"]
    blocks = packed.n_pad // block
    count = _grid(blocks)
    at_once = min(count, max(1, SLAB_BYTES // (2 * packed.parts * m * block * block)))
    new = functools.partial(torch.empty, dtype=torch.float32, device=packed.device)
    slab = torch.empty(at_once, m, packed.parts, block * block, dtype=torch.float16, device=packed.device)
    units, nothing = new(at_once, m), new(m, 0, packed.n_pad)
    padded = next(size for size in table.PADDED if size >= m)
    partial = new(count * table.PRODUCTS_SPLIT, padded, padded)
    tiles = {**_layer_arguments(packed, packed.q, 1), "slab": slab, "units": units, "sums": nothing}
    for first in range(0, count, at_once):
        some, window = min(at_once, count - first), {"first": first, "blocks": blocks}
        launch(table.tiles_variant(config, 0, packed.parts), (some, m), {**tiles, **window}, packed.device)
        mine = partial[first * table.PRODUCTS_SPLIT : (first + some) * table.PRODUCTS_SPLIT]
        products = {"slab": slab, "units": units, "partial": mine, "layers": m, **window}
        launch(table.products_variant(block, packed.parts, padded), (len(mine), 1, 1), products, packed.device)
    return partial
