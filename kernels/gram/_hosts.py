"""Family `gram` in Triton: tiles of the kernel matrices are made and reduced on the chip, nothing n × n is in memory.

Maths as in ``csrc/cpu/gram.h``: S, R, D of M layers of n samples.

Precision. Every layer is packed once, O(n·d): centred (where the kernel is shift-invariant), scaled by a power of two
so that its largest entry lies in [2¹⁴, 2¹⁵), and rounded to float16 — 11 bits, so bfloat16 and float16 inputs lose
nothing but what centring costs. float32 inputs get a second float16 holding what the first left over, 22 bits in all,
and a product is three tensor-core products, hi·hi + hi·lo + lo·hi, accumulated in float32. That is the accuracy of
``tf32x3`` at twice its rate, since tensor cores multiply float16 twice as fast as tf32; the scaling puts float16's
smallest step 2³⁹ below the largest entry, so there is no underflow to see. float64 is refused.

Work at best: n² D flops, D = Σ d (the upper half of 2 n² D), three times that for float32; bytes at best: 2 n D once
for packing. A tile of 128 × 128 does 64 flops a byte that it reads from L2, 96 for float32. Tiles of more than two
layers pass once through memory between the two kernels that make and multiply them: 2 bytes an entry and layer, 4 for
float32. Sums of a tile are taken in float32 over a row of it and in float64 from there on, tile by tile in a fixed
order: same input, same bits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from pyrepr.kernels._launch import Config, architecture, launch
from pyrepr.kernels.gram import _variants as table
from torch import Tensor

from pyrepr.backend import Unsupported, triton_interprets
from pyrepr.reference.gram import KERNELS, SHIFT_INVARIANT

# Layers are padded to these, so that no loop over tiles needs a mask.
ROWS, COLUMNS, BY_FEATURES = 128, 64, 128

LARGE = 1 << 22  # entries of a kernel matrix: 256 tiles

# Rows of a part of the samples, where few tiles are cut along them.
SHORTEST = 512

# The slab that all layers' tiles pass through on their way to their inner products.
SLAB_BYTES = 128 << 20


class Packed:
    """M layers, packed: ``data`` [table.PARTS, n_pad, width] float16, ``q`` [M, n_pad] and ``scale`` [M] as in `_pack`.

    Args:
        xs: M layers, [n, d_l] each.
        mask: [n] bool, the rows that count; the others become zeros.
        centre: subtract the mean row, or this row.
        columns: what layers are padded to.
        scale: the scale to take instead of one that fits each layer, [1].
    """

    def __init__(
        self,
        xs: Sequence[Tensor],
        mask: Tensor | None = None,
        centre: bool | Tensor = False,
        columns: int = COLUMNS,
        scale: Tensor | None = None,
    ) -> None:
        dtype, self.device, self.n = xs[0].dtype, xs[0].device, xs[0].shape[0]
        self.parts, self.widths = parts_of(dtype), tuple(x.shape[1] for x in xs)
        self.n_pad = max(1, triton.cdiv(self.n, ROWS)) * ROWS
        self.first = [0]  # of every layer, its first column
        for width in self.widths:
            self.first.append(self.first[-1] + max(1, triton.cdiv(width, columns)) * columns)
        self.width = self.first[-1]
        new = functools.partial(torch.empty, device=self.device)
        self.data = new(self.parts, self.n_pad, self.width, dtype=torch.float16)
        if self.width > sum(self.widths):
            self.data.zero_()  # the padding between layers, which nothing else writes
        self.q = new(len(xs), self.n_pad, dtype=torch.float32)
        self.valid = new(self.n_pad, dtype=torch.float32).zero_()
        self.valid[: self.n] = 1 if mask is None else mask
        fits = [_mean_and_scale(x, mask, centre) for x in xs]
        self.means = [mean for mean, _ in fits]
        self.scale = torch.stack([fit for _, fit in fits]) if scale is None else scale
        factors = self.scale.float()
        for layer, x in enumerate(xs):
            self._pack(layer, x, factors[layer : layer + 1])

    def _pack(self, layer: int, x: Tensor, factor: Tensor) -> None:
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        high = self.means[layer].float()
        mean = torch.stack([high, (self.means[layer] - high).float()])
        pointers = {"x": x, "mean": mean, "scale": factor.clone(), "valid": self.valid, "packed": self.data}
        integers = {"stride": x.stride(0), "n": self.n, "d": x.shape[1], "start": self.first[layer]}
        arguments = {**pointers, "q": self.q[layer], **integers, **self.shape}
        launch(table.pack_variant(x.dtype), (self.n_pad // table.PACK.blocks["BR"],), arguments, self.device)

    @property
    def shape(self) -> dict[str, int]:
        return {"n_pad": self.n_pad, "width": self.width}

    @property
    def starts(self) -> Tensor:
        return _on_device(tuple(self.first), self.device)


def parts_of(dtype: torch.dtype) -> int:
    """In how many float16 a dtype is packed."""
    if dtype not in table.PARTS:
        raise Unsupported(f"backend 'triton' computes float32, bfloat16 and float16 layers, got {dtype}")
    return table.PARTS[dtype]


@functools.lru_cache(maxsize=64)
def _table_on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A small table on the device, made once: copying it again would synchronise, and not go into a CUDA graph."""
    table = _table_on_device(numbers, device)
    if table.is_cuda:  # its memory is not used again before this stream is done, whichever stream it was made on
        table.record_stream(torch.cuda.current_stream(device))
    return table


def _mean_and_scale(x: Tensor, mask: Tensor | None, centre: bool | Tensor) -> tuple[Tensor, Tensor]:
    """The row to subtract, [d] float64, and the power of two that then brings the largest entry of x into
    [2¹⁴, 2¹⁵), float64. Rows outside the mask do not count."""
    count: Tensor | int = max(1, x.shape[0])
    if mask is not None:
        x, count = torch.where(mask[:, None], x, 0), mask.sum().clamp_min(1)
    if isinstance(centre, Tensor):
        mean = centre
    elif centre:
        mean = x.sum(0, dtype=torch.float64) / count
    else:
        mean = x.new_zeros(x.shape[1], dtype=torch.float64)
    largest = mean.new_zeros(())
    if x.numel():
        # Rows outside the mask count as zeros here, which can only make the scale smaller than need be.
        low, high = torch.aminmax(x, dim=0)
        largest = torch.maximum(high - mean, mean - low).amax()
    return mean, _scale_of(largest)


def _scale_of(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` into [2¹⁴, 2¹⁵), float64: its bits, since a power may be off by one."""
    exponent = (15 - torch.frexp(largest.double()).exponent.long()).clamp(-126, 126)
    return ((exponent + 1023) << 52).view(torch.float64)


def _constants(packed: Packed, kernel: str, scale: Tensor, coef0: Tensor | float) -> Tensor:
    """[M, 4] float32 for `kernel_values`: factor, offset and shift of every layer in packed units."""
    unit = packed.scale
    if kernel == "rbf":
        factor = -math.log2(math.e) / (2 * (scale * unit) ** 2)
    elif kernel == "laplacian":
        factor = -math.log2(math.e) / (scale * unit)
    else:
        factor = (scale if kernel == "polynomial" else 1) / unit**2
    zero = torch.zeros_like(unit)
    return torch.stack([factor, zero + coef0, zero, zero], 1).float()


def _near_mean(packed: Packed, kernel: str, constants: Tensor, degree: int) -> Tensor:
    """A number near the mean value of every layer's kernel, [M] float64: that of up to 128 rows with each other.

    The measures do not notice a constant added to the kernel, but the rounding errors of their sums shrink with it.
    """
    step = max(1, packed.n // 128)
    valid = packed.valid[: packed.n : step][:128]
    pairs = (valid[:, None] * valid).triu_(1)
    means = []
    for layer, (start, stop) in enumerate(itertools.pairwise(packed.first)):
        rows = packed.data[:, : packed.n : step, start:stop][:, :128].float().sum(0)
        dots, q = rows @ rows.T, packed.q[layer, : packed.n : step][:128]
        factor, offset = constants[layer, 0], constants[layer, 1]
        if kernel == "polynomial":
            values = (factor * dots + offset) ** degree
        elif kernel == "cosine":
            inverse = torch.where(q > 0, q.rsqrt(), 0)
            values = dots * inverse[:, None] * inverse
        else:
            distance = (q[:, None] + q - 2 * dots).clamp_min_(0)
            values = torch.exp2(factor * (distance.sqrt() if kernel == "laplacian" else distance))
        means.append((values * pairs).sum(dtype=torch.float64) / pairs.sum().clamp_min(1))
    return torch.stack(means).nan_to_num(0.0, 0.0, 0.0)


def _norms(packed: Packed) -> Tensor:
    """|x_i|² of the rows that count, 0 of the others: [M, n] float64."""
    return packed.q[:, : packed.n].double() / packed.scale[:, None] ** 2


def _diagonal(packed: Packed, kernel: str, scale: Tensor, degree: int, coef0: Tensor, shift: Tensor) -> Tensor:
    """k_l(i, i) − shift of the rows that count, 0 of the others: [M, n] float64."""
    q = _norms(packed)
    if kernel == "polynomial":
        q = (scale[:, None] * q + coef0[:, None]) ** degree
    elif kernel == "cosine":
        q = (q > 0).double()
    elif kernel != "linear":
        q = torch.ones_like(q) + 0 * q  # NaN where a row is
    return torch.where(packed.valid[: packed.n] > 0, q - shift[:, None], 0)


def stats(
    xs: Sequence[Tensor],
    mask: Tensor | None,
    constants: Tensor,
    kernel: str,
    degree: int,
    by_features: bool,
    split: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """S [M, M], R [M, n], D [M, n], shift [M], norms [M, n], float64; see `ops.gram`."""
    scale, coef0, base = constants.unbind()
    packed = Packed(xs, mask, kernel in SHIFT_INVARIANT, BY_FEATURES if by_features else COLUMNS)
    if kernel == "linear":
        shift = torch.zeros_like(packed.scale)
        d = _diagonal(packed, kernel, scale, degree, coef0, shift)
        unit = packed.scale**2
        if by_features:
            squares = _square_sums(packed, split)
            s = squares / torch.outer(unit, unit) - d @ d.T
        else:
            s, _ = _gram_sums(packed, _constants(packed, kernel, scale, coef0), kernel, degree)
            s = s / torch.outer(unit, unit)
        return s, -d, d, shift, _norms(packed)
    packed_constants = _constants(packed, kernel, scale, coef0)
    shift = _near_mean(packed, kernel, packed_constants, degree).float()
    packed_constants[:, 2] = shift
    s, r = _gram_sums(packed, packed_constants, kernel, degree)
    shift = shift.double()
    d = _diagonal(packed, kernel, scale, degree, coef0, shift)
    # The base goes with the shift: here it is not subtracted on its own.
    return s, r, d, shift - base * coef0**degree if kernel == "polynomial" else shift, _norms(packed)


def _layer_arguments(packed: Packed, constants: Tensor, degree: int) -> dict[str, Any]:
    pointers = {"packed": packed.data, "starts": packed.starts, "q": packed.q, "valid": packed.valid}
    return {**pointers, "constants": constants, "degree": degree, **packed.shape}


def _grid(blocks: int) -> int:
    """How many tiles `tile_place` numbers for blocks × blocks tiles, empty ones in the last squares among them."""
    if blocks <= 8:
        return blocks * (blocks + 1) // 2
    squares = triton.cdiv(blocks, 8)
    return 32 * squares * (squares + 1)


def _gram_sums(packed: Packed, constants: Tensor, kernel: str, degree: int) -> tuple[Tensor, Tensor]:
    """Σ_{i≠j} k_a k_b, [M, M] float64, and Σ_{j≠i} k_l(i, j), [M, n] float64 (empty for the linear kernel)."""
    m, kind = len(packed.widths), KERNELS.index(kernel)
    if kernel == "linear" and m == 2:
        return table.PAIR[packed.parts].run(packed.device, functools.partial(_pair_sums, packed=packed)), constants
    run = functools.partial(_slab_sums, packed=packed, constants=constants, kind=kind, degree=degree)
    s, sums = table.tiles_table(kind, packed.parts).run(packed.device, run, (kind, m))
    return s, sums.sum(1, dtype=torch.float64)[:, : packed.n]


def _pair_sums(config: Config, packed: Packed) -> Tensor:
    blocks = packed.n_pad // config.blocks["BLOCK"]
    partial = torch.empty(_grid(blocks), 3, dtype=torch.float64, device=packed.device)
    pointers = {"packed": packed.data, "starts": packed.starts, "partial": partial}
    launch(
        table.pair_variant(config, packed.parts),
        (len(partial),),
        {**pointers, "blocks": blocks, **packed.shape},
        packed.device,
    )
    kk, kl, ll = (2 * partial.sum(0)).unbind()
    return torch.stack([kk, kl, kl, ll]).view(2, 2)


def _slab_sums(config: Config, packed: Packed, constants: Tensor, kind: int, degree: int) -> tuple[Tensor, Tensor]:
    """Any number of layers: their tiles go through a slab of fixed size, written once and read once."""
    m, block = len(packed.widths), config.blocks["BLOCK"]
    blocks = packed.n_pad // block
    tile_count = _grid(blocks)
    at_once = min(tile_count, max(1, SLAB_BYTES // (2 * packed.parts * m * block * block)))
    slab = torch.empty(at_once, m, packed.parts, block * block, dtype=torch.float16, device=packed.device)
    units = torch.empty(at_once, m, dtype=torch.float32, device=packed.device)
    sums = torch.empty(m, blocks if kind else 0, packed.n_pad, dtype=torch.float32, device=packed.device)
    arguments = {**_layer_arguments(packed, constants, degree), "slab": slab, "units": units, "sums": sums}
    s = torch.zeros(m, m, dtype=torch.float64, device=packed.device)
    for first in range(0, tile_count, at_once):
        count = min(at_once, tile_count - first)
        window = {"first": first, "blocks": blocks}
        launch(table.tiles_variant(config, kind, packed.parts), (count, m), {**arguments, **window}, packed.device)
        s += _slab_products(slab, units, count, block, window)
    return 2 * s, sums


def _slab_products(slab: Tensor, units: Tensor, count: int, block: int, window: dict[str, int]) -> Tensor:
    m, parts = slab.shape[1], slab.shape[2]
    layers = 16 if m <= 16 else 32 if m <= 32 else 64
    padded = triton.cdiv(m, layers)
    shape = (count * table.PRODUCTS_SPLIT, padded * layers, padded * layers)
    partial = torch.empty(shape, dtype=torch.float32, device=slab.device)
    arguments = {"slab": slab, "units": units, "partial": partial, "layers": m, **window}
    launch(table.products_variant(block, parts, layers), (shape[0], padded, padded), arguments, slab.device)
    return partial.sum(0, dtype=torch.float64)[:m, :m]


def processors(device: torch.device) -> int:
    """Multiprocessors there are to fill; without a GPU an H100's, of which the interpreter has one."""
    if device.type == "cpu":
        return 1 if triton_interprets() else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def wanted_tiles(widths: Sequence[int], split: int, block: int) -> int:
    """Tiles of the feature route."""
    blocks = [max(1, triton.cdiv(d, block)) for d in widths]
    left, whole = sum(blocks[:split]), sum(blocks)
    cross = left * (whole - left) if split else (whole * whole - sum(b * b for b in blocks)) // 2
    return cross + sum(b * (b + 1) // 2 for b in blocks)


def parts_of_rows(n_pad: int, tiles: int, count: int) -> int:
    """Into how many parts the samples are cut."""
    return max(1, min(n_pad // SHORTEST, count // max(1, tiles)))


def squares(config: Config, packed: Packed, split: int) -> tuple[Tensor, int]:
    """What every tile of XᵀX adds to ‖X_aᵀX_b‖², [blocks, blocks] float64 with gaps where nothing is asked for, and
    the tiles' edge."""
    block = config.blocks["BLOCK"]
    owner = tuple(l for l, (a, b) in enumerate(itertools.pairwise(packed.first)) for _ in range(a, b, block))
    blocks, device = len(owner), packed.device
    found = torch.empty(blocks, blocks, dtype=torch.float64, device=device)
    count = parts_of_rows(packed.n_pad, wanted_tiles(packed.widths, split, block), processors(device))
    rows = triton.cdiv(packed.n_pad // ROWS, count) * ROWS
    count = triton.cdiv(packed.n_pad, rows)
    parts = torch.empty(count if count > 1 else 0, _grid(blocks), block * block, dtype=torch.float32, device=device)
    shared = {"owner": _on_device(owner, device), "parts": parts, "squares": found, "blocks": blocks, "split": split}
    arguments = {**shared, "packed": packed.data, "rows": rows, **packed.shape}
    launch(table.parts_variant(config, packed.parts, count == 1), (_grid(blocks), count), arguments, device)
    if count > 1:
        launch(table.squares_variant(block), (_grid(blocks),), {**shared, "count": count}, device)
    return found, block


def _square_sums(packed: Packed, split: int) -> Tensor:
    """‖X_aᵀX_b‖² in packed units, [M, M] float64; of pairs that `split` leaves out 0."""
    run = functools.partial(squares, packed=packed, split=split)
    found, block = table.FEATURES[packed.parts].run(packed.device, run)
    places = [(a // block, b // block) for a, b in itertools.pairwise(packed.first)]
    upper = found.triu()
    rows = torch.stack([upper[a:b].sum(0) for a, b in places])
    s = torch.stack([rows[:, a:b].sum(1) for a, b in places], 1)
    s = s.triu() + s.triu(1).T
    if not split:
        return s
    left = torch.arange(len(s), device=s.device) < split
    return torch.where((left[:, None] != left) | torch.eye(len(s), dtype=torch.bool, device=s.device), s, 0)


def matrix(x: Tensor, y: Tensor | None, scale: Tensor, kernel: str, degree: int, coef0: float, centre: bool) -> Tensor:
    """The kernel matrix [n, m] float32; with `centre`, x and y are shifted by the mean row of x."""
    left = Packed([x], None, centre)
    right = left if y is None else Packed([y], None, left.means[0])
    if kernel in ("rbf", "laplacian") and y is not None:  # a distance needs both in the same units
        common = torch.minimum(left.scale, right.scale)
        left = Packed([x], None, left.means[0], scale=common)
        right = Packed([y], None, left.means[0], scale=common)
    constants = _constants(left, kernel, scale, coef0)
    if y is not None and kernel in ("linear", "polynomial"):
        constants[:, 0] *= (left.scale / right.scale).float()
    n, m = left.n, right.n
    out = torch.empty(n, m, dtype=torch.float32, device=x.device)

    def run(config: Config) -> Tensor:
        block = config.blocks["BLOCK"]
        rows, columns = triton.cdiv(n, block), triton.cdiv(m, block)
        pointers = {"x": left.data, "y": right.data, "x_norms": left.q, "y_norms": right.q, "constants": constants}
        integers = {"n": n, "m": m, "same": int(y is None), "degree": degree}
        padded = {"x_pad": left.n_pad, "y_pad": right.n_pad, "width": left.width}
        grid = (_grid(columns),) if y is None else (rows, columns)
        arguments = {**pointers, "out": out, **integers, **padded}
        launch(table.matrix_variant(config, KERNELS.index(kernel), left.parts), grid, arguments, x.device)
        return out

    return (table.LARGE_MATRIX if n * m >= LARGE else table.MATRIX)[left.parts].run(x.device, run)


def median(xs: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The median distance of the rows of each layer, [M] float64: the exact one of the distances in float32. And norms
    [M, n] float64."""
    packed = [Packed([x], mask, True) for x in xs]
    return torch.stack([_median(each) for each in packed]), torch.cat([_norms(each) for each in packed])


def _median(packed: Packed) -> Tensor:
    """Radix selection, 8 bits a pass, of the two middle ones (the same one twice of an odd number of distances)."""
    count = packed.valid.sum(dtype=torch.float64).long()
    total = count * (count - 1) // 2
    rank = torch.stack([(total - 1) // 2, total // 2]).clamp_min(0)
    prefix = torch.zeros(2, dtype=torch.int32, device=packed.device)
    for shift in (24, 16, 8, 0):
        run = functools.partial(_counts, packed=packed, prefix=prefix, shift=shift)
        counts = table.HISTOGRAM[packed.parts].run(packed.device, run)
        below = counts.cumsum(1)  # [2, 256] int64
        digit = (below <= rank[:, None]).sum(1).clamp_max(255)
        rank = rank - (below - counts).gather(1, digit[:, None])[:, 0]
        prefix = prefix * 256 + digit.int()
    distances = prefix.view(torch.float32).double().sqrt() / packed.scale
    return torch.where(packed.q.isnan().any(), torch.nan, distances.mean())


def _counts(config: Config, packed: Packed, prefix: Tensor, shift: int) -> Tensor:
    blocks = packed.n_pad // config.blocks["BLOCK"]
    counts = torch.empty(_grid(blocks), 2, 256, dtype=torch.int32, device=packed.device)
    pointers = {"packed": packed.data, "q": packed.q, "valid": packed.valid, "prefix": prefix, "counts": counts}
    arguments = {**pointers, "blocks": blocks, "shift": shift, **packed.shape}
    launch(table.histogram_variant(config, packed.parts), (len(counts),), arguments, packed.device)
    return counts.sum(0, dtype=torch.int64)


def moments_(blocks: Sequence[Tensor], xs: Sequence[Tensor], pairs: Sequence[int]) -> None:
    """blocks[p] += X_aᵀ X_b for (a, b) = pairs[2p : 2p + 2], in float64; of a pair (a, a) the upper triangle."""
    packed = Packed(xs, columns=BY_FEATURES)
    config = table.MOMENTS[packed.parts].rows[architecture(packed.device)]
    block = config.blocks["BLOCK"]
    units = 1 / (packed.scale[:, None] * packed.scale)
    for p, out in enumerate(blocks):
        a, b = pairs[2 * p], pairs[2 * p + 1]
        target = out.contiguous()
        pointers = {"packed": packed.data, "unit": units[a, b].reshape(1).clone(), "out": target}
        integers = {"a": packed.first[a], "b": packed.first[b], "d_a": out.shape[0], "d_b": out.shape[1]}
        grid = (triton.cdiv(out.shape[0], block), triton.cdiv(out.shape[1], block))
        launch(
            table.moments_variant(config, packed.parts), grid, {**pointers, **integers, **packed.shape}, packed.device
        )
        if target is not out:
            out.copy_(target)


def apply(weights: Tensor, x: Tensor, centre: bool) -> Tensor:
    """weights @ X, X minus its mean row under `centre`. weights: [m, n] float32, x: [n, d] -> [m, d] float32."""
    packed = Packed([x], None, centre, BY_FEATURES)
    weights = weights.contiguous()
    (m, n), d = weights.shape, x.shape[1]
    factor = _scale_of(weights.abs().amax() if weights.numel() else weights.new_zeros(())).reshape(1)
    out = weights.new_empty(m, d)
    pointers = {"weights": weights, "factor": factor.float(), "unit": (1 / (factor * packed.scale)).float()}
    arguments = {**pointers, "packed": packed.data, "out": out, "m": m, "n": n, "d": d, **packed.shape}

    def run(config: Config) -> Tensor:
        grid = (triton.cdiv(m, config.blocks["BM"]), triton.cdiv(d, config.blocks["BN"]))
        launch(table.apply_variant(config, packed.parts, n % 16 == 0), grid, arguments, x.device)
        return out

    return table.APPLY[packed.parts].run(x.device, run)
