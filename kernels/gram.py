"""Family `gram` in Triton: tiles of the kernel matrices are made and reduced on the chip, nothing n × n is in memory.

Maths as in ``csrc/cpu/gram.h``: S, R, D of M layers of n samples.

Precision. Every layer is packed once, O(n·d): centred (where the kernel is shift-invariant), scaled by a power of two
so that its largest entry lies in [2¹⁴, 2¹⁵), and rounded to float16 — 11 bits, so bfloat16 and float16 inputs lose
nothing but what centring costs. float32 inputs get a second float16 holding what the first left over, 22 bits in all,
and a product is three tensor-core products, hi·hi + hi·lo + lo·hi, accumulated in float32. That is the accuracy of
``tf32x3`` at twice its rate, since tensor cores multiply float16 twice as fast as tf32; the scaling puts float16's
smallest step 2³⁹ below the largest entry, so there is no underflow to see. float64 is refused.

Work at best: n² D multiply-adds, D = Σ d (the upper half of 2 n² D), three times that for float32; bytes at best:
2 n D once for packing. Sums of a tile are taken in float32 over a row of it and in float64 from there on, tile by tile
in a fixed order: same input, same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from pyrepr.kernels._launch import DTYPE_NAMES, Config, Table, Variant, launch
from torch import Tensor

from pyrepr.backend import Unsupported

# Layers are padded to these, so that no loop over tiles needs a mask.
ROWS, COLUMNS = 128, 64

PARTS = {torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}

PACK_ROWS, PACK_COLUMNS = 16, 128


@triton.jit(do_not_specialize=["stride", "n", "d", "start"], do_not_specialize_on_alignment=["x"])
def _pack(
    x,  # [n, d], rows `stride` apart
    mean,  # [2, d] float32: the mean row and what float32 left of it
    scale,  # [1] float32, a power of two
    valid,  # [n_pad] float32: 1, or 0 for rows that do not count
    packed,  # [PARTS, n_pad, width] float16
    q,  # [n_pad] float32: squared norms of the packed rows, in units of 1 / scale²
    stride,
    n,
    d,
    start,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BC)
    counts = tl.load(valid + rows)[:, None] > 0
    source = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    target = packed + rows.to(tl.int64)[:, None] * width + start + columns[None, :]
    factor = tl.load(scale)
    norm = tl.zeros([BR], tl.float32)
    for first in range(0, d, BC):
        inside = first + columns < d
        values = tl.load(source + first, mask=counts & inside[None, :] & (rows < n)[:, None], other=0.0).to(tl.float32)
        shift = tl.load(mean + first + columns, mask=inside, other=0.0)
        rest = tl.load(mean + d + first + columns, mask=inside, other=0.0)
        values = tl.where(counts, (values - shift[None, :]) - rest[None, :], 0.0) * factor
        high = values.to(tl.float16)
        low = (values - high.to(tl.float32)).to(tl.float16)
        # The padding of the last block of columns belongs to the next layer or to nobody; it was zeroed.
        tl.store(target + first, high, mask=inside[None, :])
        kept = high.to(tl.float32)
        if PARTS == 2:
            tl.store(target + n_pad.to(tl.int64) * width + first, low, mask=inside[None, :])
            kept += low.to(tl.float32)
        norm += tl.sum(kept * kept, 1)
    tl.store(q + rows, norm)


@triton.jit
def _upper_tile(number):
    """Number of a tile -> (I, J), I ≤ J, counting down the columns of the upper triangle."""
    column = ((tl.sqrt(8.0 * number.to(tl.float64) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column -= (column * (column + 1) // 2 > number).to(tl.int32)
    column += ((column + 1) * (column + 2) // 2 <= number).to(tl.int32)
    return number - column * (column + 1) // 2, column


@triton.jit
def _dots(packed, i, j, start, stop, n_pad, width, PARTS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr):
    """Inner products of rows i... with rows j... of the layer in columns start:stop -> [BLOCK, BLOCK] float32."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BK)
    left = packed + (i + rows).to(tl.int64)[:, None] * width + start + columns[None, :]
    right = packed + (j + rows).to(tl.int64)[None, :] * width + start + columns[:, None]
    low = n_pad.to(tl.int64) * width
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(start, stop, BK):
        a, b = tl.load(left), tl.load(right)
        if PARTS == 2:
            total = tl.dot(a, tl.load(right + low), total)
            total = tl.dot(tl.load(left + low), b, total)
        total = tl.dot(a, b, total)
        left += BK
        right += BK
    return total


@triton.jit(do_not_specialize=["a", "b", "tiles"])
def _pair(
    packed,  # [PARTS, n_pad, width] float16
    starts,  # [M + 1] int32: the columns of each layer
    partial,  # [tiles, 3] float64: Σ_{i<j} of k k, k l, l l
    a,
    b,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    number = tl.program_id(0)
    row, column = _upper_tile(number)
    i, j = row * BLOCK, column * BLOCK
    start, stop = tl.multiple_of(tl.load(starts + a), 64), tl.load(starts + a + 1)
    k = _dots(packed, i, j, start, stop, n_pad, width, PARTS, BLOCK, BK)
    start, stop = tl.multiple_of(tl.load(starts + b), 64), tl.load(starts + b + 1)
    l = _dots(packed, i, j, start, stop, n_pad, width, PARTS, BLOCK, BK)
    rows = tl.arange(0, BLOCK)
    upper = (i + rows)[:, None] < (j + rows)[None, :]
    k, l = tl.where(upper, k, 0.0), tl.where(upper, l, 0.0)
    tl.store(partial + number.to(tl.int64) * 3, tl.sum(tl.sum(k * k, 1).to(tl.float64)))
    tl.store(partial + number.to(tl.int64) * 3 + 1, tl.sum(tl.sum(k * l, 1).to(tl.float64)))
    tl.store(partial + number.to(tl.int64) * 3 + 2, tl.sum(tl.sum(l * l, 1).to(tl.float64)))


# Not measured on a GPU yet: the blocks are those that fit registers (two float32 tiles a block) and shared memory.
PAIR = Table(
    "PAIR",
    {
        80: Config({"BLOCK": 128, "BK": 32}, 8, 2),
        90: Config({"BLOCK": 128, "BK": 64}, 8, 3),
        100: Config({"BLOCK": 128, "BK": 64}, 8, 3),
    },
    [
        Config({"BLOCK": block, "BK": bk}, w, s)
        for block, w in ((128, 8), (64, 4))
        for bk in (32, 64)
        for s in (2, 3, 4)
    ],
)


def pack_variant(dtype: torch.dtype) -> Variant:
    return Variant(
        f"pack {DTYPE_NAMES[dtype]}",
        _pack,
        {
            "x": "*" + DTYPE_NAMES[dtype],
            **dict.fromkeys(("mean", "scale", "valid"), "*fp32"),
            "packed": "*fp16",
            "q": "*fp32",
            **dict.fromkeys(("stride", "n", "d", "start", "n_pad", "width"), "i32"),
        },
        {"PARTS": PARTS[dtype], "BR": PACK_ROWS, "BC": PACK_COLUMNS},
        aligned=("mean", "scale", "valid", "packed", "q", "n_pad", "width"),
    )


def pair_variant(config: Config, parts: int) -> Variant:
    return Variant(
        f"pair parts={parts} {config}",
        _pair,
        {
            "packed": "*fp16",
            "starts": "*i32",
            "partial": "*fp64",
            **dict.fromkeys(("a", "b", "n_pad", "width"), "i32"),
        },
        {"PARTS": parts, **config.blocks},
        config.num_warps,
        config.num_stages,
        aligned=("packed", "starts", "partial", "n_pad", "width"),
    )


def variants(architecture: int) -> list[Variant]:
    """Everything this module launches on that architecture."""
    packs = [pack_variant(dtype) for dtype in PARTS]
    return packs + [pair_variant(PAIR.rows[architecture], parts) for parts in (1, 2)]


class Packed:
    """M layers, packed: ``data`` [PARTS, n_pad, width] float16, ``q`` [M, n_pad] and ``scale`` [M] as in `_pack`."""

    def __init__(self, xs: Sequence[Tensor], mask: Tensor | None, centre: bool) -> None:
        dtype, self.device, self.n = xs[0].dtype, xs[0].device, xs[0].shape[0]
        if dtype not in PARTS:
            raise Unsupported(f"backend 'triton' computes float32, bfloat16 and float16 layers, got {dtype}")
        self.parts, self.widths = PARTS[dtype], tuple(x.shape[1] for x in xs)
        self.n_pad = max(1, triton.cdiv(self.n, ROWS)) * ROWS
        self.first = [0]  # of every layer, its first column
        for width in self.widths:
            self.first.append(self.first[-1] + max(1, triton.cdiv(width, COLUMNS)) * COLUMNS)
        self.width = self.first[-1]
        self.starts = _on_device(tuple(self.first), self.device)
        self.data = torch.zeros(self.parts, self.n_pad, self.width, dtype=torch.float16, device=self.device)
        self.q = torch.empty(len(xs), self.n_pad, dtype=torch.float32, device=self.device)
        self.valid = torch.zeros(self.n_pad, dtype=torch.float32, device=self.device)
        self.valid[: self.n] = 1 if mask is None else mask
        self.scale = torch.stack([self._pack(layer, x, mask, centre) for layer, x in enumerate(xs)])

    def _pack(self, layer: int, x: Tensor, mask: Tensor | None, centre: bool) -> Tensor:
        """Writes one layer and returns its scale, float64."""
        x = x if x.stride(1) == 1 else x.contiguous()
        mean, scale = _centre_and_scale(x, mask, centre)
        arguments = {
            "x": x,
            "mean": mean,
            "scale": scale.float()[None],
            "valid": self.valid,
            "packed": self.data,
            "q": self.q[layer],
            "stride": x.stride(0),
            "n": self.n,
            "d": x.shape[1],
            "start": self.first[layer],
            "n_pad": self.n_pad,
            "width": self.width,
        }
        launch(pack_variant(x.dtype), (self.n_pad // PACK_ROWS,), arguments, self.device)
        return scale


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A small table on the device, made once: copying it again would synchronise, and not go into a CUDA graph."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _centre_and_scale(x: Tensor, mask: Tensor | None, centre: bool) -> tuple[Tensor, Tensor]:
    """The mean row as two float32 [2, d] (zeros without `centre`), and the power of two that brings the largest entry
    of the centred x into [2¹⁴, 2¹⁵), float64. Rows outside the mask do not count."""
    count: Tensor | int = max(1, x.shape[0])
    if mask is not None:
        x, count = torch.where(mask[:, None], x, 0), mask.sum().clamp_min(1)
    mean = x.sum(0, dtype=torch.float64) / count if centre else x.new_zeros(x.shape[1], dtype=torch.float64)
    high = mean.float()
    largest = mean.new_zeros(())
    if x.numel():
        # A masked row of zeros counts here as if it were data, so the range is that of x and 0.
        largest = torch.maximum(x.amax(0).double() - mean, mean - x.amin(0).double()).amax()
    exponent = torch.frexp(largest).exponent
    return torch.stack([high, (mean - high).float()]), torch.ldexp(torch.ones_like(largest), 15 - exponent)


def _pair_sums(packed: Packed, a: int, b: int) -> Tensor:
    """Σ_{i≠j} of k_a k_a, k_a k_b, k_b k_b, in packed units: [3] float64."""

    def run(config: Config) -> Tensor:
        blocks = packed.n_pad // config.blocks["BLOCK"]
        tiles = blocks * (blocks + 1) // 2
        partial = torch.empty(tiles, 3, dtype=torch.float64, device=packed.device)
        arguments = {
            "packed": packed.data,
            "starts": packed.starts,
            "partial": partial,
            "a": a,
            "b": b,
            "n_pad": packed.n_pad,
            "width": packed.width,
        }
        launch(pair_variant(config, packed.parts), (tiles,), arguments, packed.device)
        return 2 * partial.sum(0)

    return PAIR.run(packed.device, run, (packed.parts,))
