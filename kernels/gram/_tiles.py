"""The kernels of family `gram` in Triton; what they are for and how exact they are is said in ``_hosts``.

Layers are packed: ``packed`` [PARTS, n_pad, width] float16 holds them side by side, padded by zeros so that no loop
over a layer needs a mask. Tiles are BLOCK × BLOCK; KIND is the number of the kernel in `reference.gram.KERNELS`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyrepr.kernels.gram._shared import column_dots, kernel_values, tile_dots, tile_place


@triton.jit(do_not_specialize=["stride", "n", "d", "start"], do_not_specialize_on_alignment=["x"])
def pack_kernel(
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
def _layer_tile(
    layer,
    i,
    j,
    packed,
    starts,  # [M + 1] int32: the columns of each layer
    q,  # [M, n_pad]
    valid,  # [n_pad]
    constants,  # [M, 4] float32
    degree,
    n_pad,
    width,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """One layer's values k(i, j) of the pairs i < j that count, 0 elsewhere."""
    start, stop = tl.multiple_of(tl.load(starts + layer), 64), tl.load(starts + layer + 1)
    values = tile_dots(packed, packed, i, j, start, stop, n_pad, n_pad, width, PARTS, BLOCK, BK)
    rows, columns = i + tl.arange(0, BLOCK), j + tl.arange(0, BLOCK)
    counts = rows[:, None] < columns[None, :]
    if KIND != 0:  # rows that do not count are zeros, which is enough for the linear kernel
        norms = q + layer.to(tl.int64) * n_pad
        x_norms, y_norms = tl.load(norms + rows), tl.load(norms + columns)
        values = kernel_values(values, x_norms, y_norms, constants + 4 * layer, degree, KIND)
        counts &= (tl.load(valid + rows) > 0)[:, None] & (tl.load(valid + columns) > 0)[None, :]
    return tl.where(counts, values, 0.0)


@triton.jit
def _store_row_sums(values, sums, layer, row, column, blocks, n_pad, BLOCK: tl.constexpr):
    """Row sums of a tile, and of its mirror image, each to a slot of its own. sums: [M, blocks, n_pad]."""
    at = tl.arange(0, BLOCK)
    down, across = tl.sum(values, 1), tl.sum(values, 0)
    mine = sums + layer.to(tl.int64) * blocks * n_pad
    if row == column:
        tl.store(mine + row.to(tl.int64) * n_pad + row * BLOCK + at, down + across)
    else:
        tl.store(mine + column.to(tl.int64) * n_pad + row * BLOCK + at, down)
        tl.store(mine + row.to(tl.int64) * n_pad + column * BLOCK + at, across)


@triton.jit
def _total(values):
    return tl.sum(tl.sum(values, 1).to(tl.float64))


@triton.jit(do_not_specialize=["blocks"])
def pair_kernel(
    packed,  # [PARTS, n_pad, width] float16, two layers
    starts,
    partial,  # [tiles, 3] float64: Σ_{i<j} of k k, k l, l l
    blocks,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """The linear kernel of two layers: both tiles stay in registers."""
    number = tl.program_id(0)
    row, column = tile_place(number)
    out = partial + number.to(tl.int64) * 3
    if (row > column) | (column >= blocks):
        tl.store(out, 0.0)
        tl.store(out + 1, 0.0)
        tl.store(out + 2, 0.0)
        return
    i, j = row * BLOCK, column * BLOCK
    middle = tl.multiple_of(tl.load(starts + 1), 64)
    k = tile_dots(packed, packed, i, j, 0, middle, n_pad, n_pad, width, PARTS, BLOCK, BK)
    l = tile_dots(packed, packed, i, j, middle, width, n_pad, n_pad, width, PARTS, BLOCK, BK)
    rows = tl.arange(0, BLOCK)
    upper = (i + rows)[:, None] < (j + rows)[None, :]
    k, l = tl.where(upper, k, 0.0), tl.where(upper, l, 0.0)
    tl.store(out, _total(k * k))
    tl.store(out + 1, _total(k * l))
    tl.store(out + 2, _total(l * l))


@triton.jit(do_not_specialize=["first", "degree", "blocks"])
def tiles_kernel(
    packed,  # [PARTS, n_pad, width] float16
    starts,
    q,
    valid,
    constants,
    slab,  # [count, M, PARTS, BLOCK²] float16
    units,  # [count, M] float32: what one in the slab is
    sums,  # [M, blocks, n_pad] float32; not of the linear kernel
    first,
    degree,
    blocks,
    n_pad,
    width,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Tiles first, first + 1, ... of every layer, for `_products`. Layers run slowest: they share nothing."""
    row, column = tile_place(first + tl.program_id(0))
    if (row > column) | (column >= blocks):
        return
    layer = tl.program_id(1)
    values = _layer_tile(
        layer,
        row * BLOCK,
        column * BLOCK,
        packed,
        starts,
        q,
        valid,
        constants,
        degree,
        n_pad,
        width,
        KIND,
        PARTS,
        BLOCK,
        BK,
    )
    if KIND != 0:
        _store_row_sums(values, sums, layer, row, column, blocks, n_pad, BLOCK)
    # Rounded to float16 like the packed layers, after a power of two that brings the largest value into [2¹⁴, 2¹⁵).
    largest = tl.max(tl.max(tl.abs(values), 1))
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 14, 1), 253)
    values *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    high = values.to(tl.float16)
    at = tl.arange(0, BLOCK)
    slot = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + layer
    tl.store(units + slot, (exponent << 23).to(tl.float32, bitcast=True))
    target = slab + slot * (PARTS * BLOCK * BLOCK) + at[:, None] * BLOCK + at[None, :]
    tl.store(target, high)
    if PARTS == 2:
        tl.store(target + BLOCK * BLOCK, (values - high.to(tl.float32)).to(tl.float16))


@triton.jit
def _slab_rows(mine, layers, first, at, PARTS: tl.constexpr, ENTRIES: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr):
    """Entries at... of the tiles of layers first...: where they are, and which exist. -> [BL, BK]"""
    rows = first + tl.arange(0, BL)
    return mine + rows[:, None] * (PARTS * ENTRIES) + at + tl.arange(0, BK)[None, :], (rows < layers)[:, None]


@triton.jit(do_not_specialize=["first", "layers", "blocks"])
def products_kernel(
    slab,  # [tiles, layers, PARTS, ENTRIES] float16
    units,  # [tiles, layers] float32
    partial,  # [tiles, SPLIT, padded, padded] float32, padded = layers rounded up to BL
    first,
    layers,
    blocks,
    PARTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPLIT: tl.constexpr,
    BL: tl.constexpr,
    BK: tl.constexpr,
    ONE: tl.constexpr,
):
    """Inner products of all layers' tiles over one of SPLIT parts of one tile. ONE: no more layers than BL."""
    tile, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    a, b = tl.program_id(1) * BL, tl.program_id(2) * BL
    row, column = tile_place(first + tile)
    total = tl.zeros([BL, BL], tl.float32)
    if (row <= column) & (column < blocks):
        mine = slab + tile.to(tl.int64) * layers * (PARTS * ENTRIES) + part * (ENTRIES // SPLIT)
        # Sums inside a tensor core are cut off, not rounded; short ones, added up outside, keep that small.
        for chunk in range(0, ENTRIES // SPLIT, 256):
            short = tl.zeros([BL, BL], tl.float32)
            for at in range(chunk, chunk + 256, BK):
                here, exists = _slab_rows(mine, layers, a, at, PARTS, ENTRIES, BL, BK)
                left = tl.load(here, mask=exists, other=0.0)
                if ONE:
                    right = left
                    if PARTS == 2:
                        left_low = tl.load(here + ENTRIES, mask=exists, other=0.0)
                        right_low = left_low
                else:
                    there, exists_too = _slab_rows(mine, layers, b, at, PARTS, ENTRIES, BL, BK)
                    right = tl.load(there, mask=exists_too, other=0.0)
                    if PARTS == 2:
                        left_low = tl.load(here + ENTRIES, mask=exists, other=0.0)
                        right_low = tl.load(there + ENTRIES, mask=exists_too, other=0.0)
                if PARTS == 2:
                    short = tl.dot(left, tl.trans(right_low), short)
                    short = tl.dot(left_low, tl.trans(right), short)
                short = tl.dot(left, tl.trans(right), short)
            total += short
    padded = tl.num_programs(1) * BL
    out = partial + tl.program_id(0).to(tl.int64) * padded * padded
    a, b = a + tl.arange(0, BL), b + tl.arange(0, BL)
    mine = units + tile.to(tl.int64) * layers
    unit_a, unit_b = tl.load(mine + a, mask=a < layers, other=0.0), tl.load(mine + b, mask=b < layers, other=0.0)
    # Nothing was stored of a tile that is not there.
    total = tl.where((row <= column) & (column < blocks), total * unit_a[:, None] * unit_b[None, :], 0.0)
    tl.store(out + a[:, None] * padded + b[None, :], total)


@triton.jit(do_not_specialize=["n", "m", "same", "degree"])
def matrix_kernel(
    x,  # [PARTS, x_pad, width] float16
    y,  # [PARTS, y_pad, width] float16
    x_norms,  # [x_pad]
    y_norms,  # [y_pad]
    constants,  # [1, 4] float32
    out,  # [n, m] float32
    n,
    m,
    same,
    degree,
    x_pad,
    y_pad,
    width,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """A kernel matrix, stored. same: y is x, and only the upper half is computed."""
    if same:
        row, column = tile_place(tl.program_id(0))
    else:
        row, column = tl.program_id(0), tl.program_id(1)
    if ((same != 0) & (row > column)) | (column * BLOCK >= m):
        return
    dots = tile_dots(x, y, row * BLOCK, column * BLOCK, 0, width, x_pad, y_pad, width, PARTS, BLOCK, BK)
    rows, columns = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    values = kernel_values(dots, tl.load(x_norms + rows), tl.load(y_norms + columns), constants, degree, KIND)
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    at = tl.arange(0, BLOCK)
    if same:
        # Of a tile on the diagonal the lower half is the mirror image of the upper one, to the bit.
        inside &= rows[:, None] <= columns[None, :]
        if KIND == 1 or KIND == 2:
            values = tl.where(rows[:, None] == columns[None, :], 1.0, values)
    tl.store(out + (row * BLOCK).to(tl.int64) * m + column * BLOCK + at[:, None] * m + at[None, :], values, mask=inside)
    if same:
        mirror = out + (column * BLOCK).to(tl.int64) * m + row * BLOCK
        inside = (columns < m)[:, None] & (rows[None, :] <= columns[:, None])
        tl.store(mirror + at[:, None] * m + at[None, :], tl.trans(values), mask=inside)


@triton.jit(do_not_specialize=["blocks", "shift"])
def histogram_kernel(
    packed,  # [PARTS, n_pad, width] float16
    q,  # [n_pad]
    valid,  # [n_pad]
    prefix,  # [2] int32: the bits above shift + 8 of the two wanted distances
    counts,  # [programs, 2, 256] int32
    blocks,
    shift,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Of the squared distances of pairs i < j whose upper bits are those of `prefix`: how often every next 8 bits."""
    number = tl.program_id(0)
    row, column = tile_place(number)
    out = counts + number.to(tl.int64) * 512 + tl.arange(0, 512)
    if (row > column) | (column >= blocks):
        tl.store(out, tl.zeros([512], tl.int32))
        return
    i, j = row * BLOCK, column * BLOCK
    dots = tile_dots(packed, packed, i, j, 0, width, n_pad, n_pad, width, PARTS, BLOCK, BK)
    rows, columns = i + tl.arange(0, BLOCK), j + tl.arange(0, BLOCK)
    distances = tl.load(q + rows)[:, None] + tl.load(q + columns)[None, :] - 2.0 * dots
    distances = tl.where(distances < 0.0, 0.0, distances)
    bits = distances.to(tl.int32, bitcast=True)  # ordered like the numbers, which are not negative
    here = (rows[:, None] < columns[None, :]) & (tl.load(valid + rows) > 0)[:, None]
    here &= (tl.load(valid + columns) > 0)[None, :]
    for rank in tl.static_range(2):
        wanted = here & ((bits >> shift >> 8) == tl.load(prefix + rank))
        bins = tl.where(wanted, (bits >> shift) & 255, 256)
        found = tl.histogram(tl.reshape(bins, [BLOCK * BLOCK]), 512)
        at = tl.arange(0, 512)
        tl.store(counts + (number.to(tl.int64) * 2 + rank) * 256 + at, found, mask=at < 256)


@triton.jit(do_not_specialize=["a", "b", "d_a", "d_b"])
def moments_kernel(
    packed,  # [PARTS, n_pad, width] float16, layers padded to BLOCK columns
    unit,  # [1] float64: what one unit of the product is
    out,  # [d_a, d_b] float64
    a,
    b,
    d_a,
    d_b,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """out += X_aᵀX_b for the layers in columns a... and b...; of a layer with itself the upper triangle."""
    row, column = tl.program_id(0), tl.program_id(1)
    if (a == b) & (row > column):
        return
    i, j = tl.multiple_of(a + row * BLOCK, 64), tl.multiple_of(b + column * BLOCK, 64)
    total = column_dots(packed, i, j, 0, n_pad, n_pad, width, PARTS, BLOCK, BK)
    rows, columns = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < d_a)[:, None] & (columns < d_b)[None, :]
    if a == b:
        inside &= rows[:, None] <= columns[None, :]
    at = out + rows.to(tl.int64)[:, None] * d_b + columns[None, :]
    tl.store(at, tl.load(at, mask=inside) + total.to(tl.float64) * tl.load(unit), mask=inside)


@triton.jit(do_not_specialize=["m", "n", "d"])
def apply_kernel(
    weights,  # [m, n] float32
    factor,  # [1] float32: the power of two that brings the largest weight into [2¹⁴, 2¹⁵)
    unit,  # [1] float32: what one unit of the product is
    packed,  # [PARTS, n_pad, width] float16
    out,  # [m, d] float32
    m,
    n,
    d,
    n_pad,
    width,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """weights @ X, the weights split into two float16 like the packed layers. EVEN: n is a multiple of 16."""
    if EVEN:  # rows of weights start at multiples of 16 bytes, so they are copied 16 bytes at a time, not 4
        n = tl.multiple_of(n, 16)
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    w = weights + (tl.program_id(0) * BM).to(tl.int64) * n
    down, across = tl.arange(0, BM)[:, None] * n + inner[None, :], inner[:, None] * width + columns[None, :]
    long_width = width.to(tl.int64)
    low = n_pad * long_width
    scale = tl.load(factor)
    total = tl.zeros([BM, BN], tl.float32)
    for k in range(0, n, BK):
        inside = (rows < m)[:, None] & (k + inner < n)[None, :]
        value = tl.load(w + k + down, mask=inside, other=0.0) * scale
        high = value.to(tl.float16)
        x = packed + long_width * k + across
        b = tl.load(x)
        if PARTS == 2:
            total = tl.dot((value - high.to(tl.float32)).to(tl.float16), b, total)
            total = tl.dot(high, tl.load(x + low), total)
        total = tl.dot(high, b, total)
    inside = (rows < m)[:, None] & (columns < d)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * d + columns[None, :], total * tl.load(unit), mask=inside)
