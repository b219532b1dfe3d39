"""CKA under the linear kernel in a handful of launches, however many layers there are.

`fit_kernel` finds every layer's mean row and largest entry, `pack_layers_kernel` packs them all, then come the products
of one route (`parts_kernel` and `squares_kernel` here; the Gram route's are in ``_tiles``), `reduce_kernel` adds up
S, and D Dᵀ by blocks of rows, and `values_kernel` makes HSIC and CKA of them. What a launch takes are up to LAYERS
addresses; where each layer begins, how wide it is and how far apart its rows are stands in `layout`, [M, 4] int32.
"""

import triton
import triton.language as tl
from pyrepr.kernels.gram._shared import column_dots, tile_place, triangle

# Layers of one launch; those that are not there repeat the first one's address.
LAYERS = 32


@triton.jit
def _layer_rows(layer, xs):
    """The address of one of the layers."""
    address = xs[0].to(tl.int64)
    for i in tl.static_range(1, 32):
        if layer == i:
            address = xs[i].to(tl.int64)
    return address.to(xs[0].dtype)


@triton.jit
def _layout(layout, layer):
    """Of a layer: its first column, its width, that with its padding, the elements between its rows."""
    row = layout + layer * 4
    start = tl.multiple_of(tl.load(row), 64)
    return start, tl.load(row + 1), tl.multiple_of(tl.load(row + 2), 64), tl.load(row + 3)


@triton.jit
def _load_some(x, stride, rows, columns, n, d, EVEN: tl.constexpr):
    """Rows and columns of a layer, 0 where there are none. EVEN: rows are whole groups of 16 bytes at such places."""
    if EVEN:
        d = d // 8 * 8
        stride = tl.multiple_of(stride // 8 * 8, 8)
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if EVEN:
        at = tl.multiple_of(at, [1, 16])
    return tl.load(at, mask=(rows < n)[:, None] & (columns < d)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first", "n", "blocks"], do_not_specialize_on_alignment=[f"x{i}" for i in range(LAYERS)])
def fit_kernel(
    x0,  # [n, d] each
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    x8,
    x9,
    x10,
    x11,
    x12,
    x13,
    x14,
    x15,
    x16,
    x17,
    x18,
    x19,
    x20,
    x21,
    x22,
    x23,
    x24,
    x25,
    x26,
    x27,
    x28,
    x29,
    x30,
    x31,
    layout,  # [M, 4] int32
    means,  # out: [2, width] float32: the mean rows and what float32 left of them
    largest,  # out: [M, blocks] float32: the largest entry of every block of columns around the mean
    first,  # of these layers
    n,
    blocks,
    width,
    BR: tl.constexpr,
    BC: tl.constexpr,
    EVEN: tl.constexpr,
):
    lower = (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    upper = (x16, x17, x18, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, x29, x30, x31)
    x = _layer_rows(tl.program_id(1), lower + upper)
    layer = first + tl.program_id(1)
    start, d, padded, stride = _layout(layout, layer)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float64)
    low = tl.full([BC], float("inf"), tl.float32)
    high = -low
    for row in range(0, tl.where(tl.program_id(0) * BC < d, n, 0), BR):
        rows = row + tl.arange(0, BR)
        values = _load_some(x, stride, rows, columns, n, d, EVEN)
        total += tl.sum(values.to(tl.float64), 0)
        there = (rows < n)[:, None]
        low = tl.minimum(low, tl.min(tl.where(there, values, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(there, values, float("-inf")), 0))
    mean = total / n
    near = mean.to(tl.float32)
    inside = columns < padded
    tl.store(means + start + columns, near, mask=inside)
    tl.store(means + width + start + columns, (mean - near.to(tl.float64)).to(tl.float32), mask=inside)
    most = tl.where(columns < d, tl.maximum(high - near, near - low), 0.0)
    tl.store(largest + layer * blocks + tl.program_id(0), tl.max(most, 0))


@triton.jit
def _power_for(largest, blocks, BLOCK: tl.constexpr):
    """The power of two that brings a layer's largest entry into [2¹⁴, 2¹⁵)."""
    most = tl.zeros([BLOCK], tl.float32)
    for first in range(0, blocks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(largest + at, mask=at < blocks, other=0.0))
    exponent = tl.minimum(tl.maximum(268 - (tl.max(most, 0).to(tl.int32, bitcast=True) >> 23), 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "n", "blocks"], do_not_specialize_on_alignment=[f"x{i}" for i in range(LAYERS)])
def pack_layers_kernel(
    x0,  # [n, d] each
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    x8,
    x9,
    x10,
    x11,
    x12,
    x13,
    x14,
    x15,
    x16,
    x17,
    x18,
    x19,
    x20,
    x21,
    x22,
    x23,
    x24,
    x25,
    x26,
    x27,
    x28,
    x29,
    x30,
    x31,
    layout,
    means,
    largest,
    packed,  # out: [PARTS, n_pad, width] float16, with zeros around the layers
    q,  # out: [M, n_pad] float32: squared norms of the packed rows, in units of 1 / scale²
    scale,  # out: [M] float32
    valid,  # out: [n_pad] float32
    first,
    n,
    blocks,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows of one layer as ``pack_kernel`` packs them."""
    lower = (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    upper = (x16, x17, x18, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, x29, x30, x31)
    x = _layer_rows(tl.program_id(1), lower + upper)
    layer = first + tl.program_id(1)
    start, d, padded, stride = _layout(layout, layer)
    factor = _power_for(largest + layer * blocks, blocks, 256)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BC)
    target = packed + rows.to(tl.int64)[:, None] * width + start + columns[None, :]
    norm = tl.zeros([BR], tl.float32)
    for at in range(0, padded, BC):
        values = _load_some(x, stride, rows, at + columns, n, d, EVEN)
        inside = at + columns < padded
        near = tl.load(means + start + at + columns, mask=inside, other=0.0)
        rest = tl.load(means + width + start + at + columns, mask=inside, other=0.0)
        there = (rows < n)[:, None] & (at + columns < d)[None, :]
        values = tl.where(there, (values - near[None, :]) - rest[None, :], 0.0) * factor
        high = values.to(tl.float16)
        tl.store(target + at, high, mask=inside[None, :])
        kept = high.to(tl.float32)
        if PARTS == 2:
            low = (values - kept).to(tl.float16)
            tl.store(target + n_pad.to(tl.int64) * width + at, low, mask=inside[None, :])
            kept += low.to(tl.float32)
        norm += tl.sum(kept * kept, 1)
    tl.store(q + layer.to(tl.int64) * n_pad + rows, norm)
    if tl.program_id(1) + first == 0:
        tl.store(valid + rows, tl.where(rows < n, 1.0, 0.0))
    if tl.program_id(0) == 0:
        tl.store(scale + layer, factor)


@triton.jit
def _pair_of_blocks(number, owner, blocks, split):
    """Number of a tile of XᵀX -> its row and column of blocks, and 2, 1 or 0: how often it counts in ‖X_aᵀX_b‖²."""
    row, column = tile_place(number)
    there = (row <= column) & (column < blocks)
    a = tl.load(owner + row, mask=there, other=0)
    b = tl.load(owner + column, mask=there, other=0)
    wanted = there & ((a == b) | (split == 0) | ((a < split) & (b >= split)))
    return row, column, tl.where(wanted, tl.where((a == b) & (row != column), 2, 1), 0)


@triton.jit(do_not_specialize=["blocks", "split", "rows"])
def parts_kernel(
    packed,  # [PARTS, n_pad, width] float16, layers padded to BLOCK columns
    owner,  # [blocks] int32: the layer of a block of columns
    parts,  # out unless WHOLE: [parts, tiles, BLOCK²] float32
    squares,  # out if WHOLE: [blocks, blocks] float64: what every tile of XᵀX adds to ‖X_aᵀX_b‖²
    blocks,
    split,
    rows,  # of a part
    n_pad,
    width,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of XᵀX over a part of the rows: few tiles alone would leave most of a GPU idle."""
    row, column, times = _pair_of_blocks(tl.program_id(0), owner, blocks, split)
    if times == 0:
        return
    start = tl.multiple_of(tl.program_id(1) * rows, 128)
    stop = tl.minimum(start + rows, n_pad)
    total = column_dots(packed, row * BLOCK, column * BLOCK, start, stop, n_pad, width, PARTS, BLOCK, BK)
    if WHOLE:
        sums = tl.sum(tl.sum(total * total, 1).to(tl.float64))
        tl.store(squares + row.to(tl.int64) * blocks + column, sums * times)
    else:
        place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        tl.store(parts + place * (BLOCK * BLOCK) + columns[:, None] * BLOCK + columns[None, :], total)


@triton.jit(do_not_specialize=["blocks", "split", "count"])
def squares_kernel(
    parts,  # [count, tiles, BLOCK²] float32
    owner,
    squares,  # out: [blocks, blocks] float64
    blocks,
    split,
    count,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Adds the parts of a tile up, always in the same order."""
    row, column, times = _pair_of_blocks(tl.program_id(0), owner, blocks, split)
    if times == 0:
        return
    sums = tl.zeros([PIECE], tl.float32)
    step = tl.num_programs(0).to(tl.int64) * (BLOCK * BLOCK)
    mine = parts + tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK) + tl.arange(0, PIECE)
    for piece in range(0, BLOCK * BLOCK, PIECE):
        total = tl.zeros([PIECE], tl.float32)
        for part in range(0, count):
            total += tl.load(mine + part * step + piece)
        sums += total * total
    tl.store(squares + row.to(tl.int64) * blocks + column, tl.sum(sums.to(tl.float64), 0) * times)


@triton.jit
def _pair_sum(
    partial,
    layout,
    a,
    b,
    count,
    split,
    BY_FEATURES: tl.constexpr,
    STEP: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S of layers a and b: the sum of what their tiles give."""
    some = tl.arange(0, 256)
    total = tl.zeros([256], tl.float64)
    if BY_FEATURES:
        if (a == b) | (split == 0) | ((a < split) & (b >= split)):
            top, left = tl.load(layout + a * 4) // BLOCK, tl.load(layout + b * 4) // BLOCK
            high, wide = tl.load(layout + a * 4 + 2) // BLOCK, tl.load(layout + b * 4 + 2) // BLOCK
            for first in range(0, high * wide, 256):
                i, j = top + (first + some) // wide, left + (first + some) % wide
                inside = (first + some < high * wide) & (i <= j)
                total += tl.load(partial + i.to(tl.int64) * count + j, mask=inside, other=0.0)
    else:
        offset = a + b if STEP == 3 else a * PADDED + b
        for first in range(0, count, 256):
            at = (first + some).to(tl.int64) * STEP + offset
            total += 2.0 * tl.load(partial + at, mask=first + some < count, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["layers", "count", "rows", "split", "n"])
def reduce_kernel(
    partial,  # BY_FEATURES: squares [count, count] float64; else [count, STEP] of sums over i < j, for each tile
    layout,
    q,  # [M, n_pad] float32
    s,  # out: [M (M + 1) / 2] float64, in packed units
    products,  # out: [blocks of rows, PADDED, PADDED] float64: D Dᵀ of some rows, in packed units
    totals,  # out: [blocks of rows, PADDED] float64: the same rows' sums of D
    layers,
    count,
    rows,  # of a block
    split,
    n,
    n_pad,
    BY_FEATURES: tl.constexpr,
    STEP: tl.constexpr,  # of a tile's sums: 3 of a pair, else PADDED²
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first M (M + 1) / 2 programs each add up a pair's S, the others D Dᵀ over a block of rows each."""
    pairs = layers * (layers + 1) // 2
    number = tl.program_id(0)
    if number < pairs:
        a, b = triangle(number)
        tl.store(s + number, _pair_sum(partial, layout, a, b, count, split, BY_FEATURES, STEP, PADDED, BLOCK))
        return
    block = number - pairs
    l, m = tl.arange(0, PADDED), tl.arange(0, PADDED)
    product = tl.zeros([PADDED, PADDED], tl.float64)
    total = tl.zeros([PADDED], tl.float64)
    for row in range(block * rows, tl.minimum(block * rows + rows, n)):
        down = tl.load(q + l.to(tl.int64) * n_pad + row, mask=l < layers, other=0.0).to(tl.float64)
        across = tl.load(q + m.to(tl.int64) * n_pad + row, mask=m < layers, other=0.0).to(tl.float64)
        product += down[:, None] * across[None, :]
        total += down
    tl.store(products + block * (PADDED * PADDED) + l[:, None] * PADDED + m[None, :], product)
    tl.store(totals + block * PADDED + l, total)


@triton.jit(do_not_specialize=["layers", "blocks", "n", "biased"])
def values_kernel(
    s,  # [M (M + 1) / 2] float64
    products,  # [blocks, PADDED, PADDED] float64
    totals,  # [blocks, PADDED] float64
    scale,  # [M] float32
    values,  # out: [M, M] float32: CKA
    degenerate,  # out: [M] int32: 1 where a layer's own HSIC may be rounding
    layers,
    blocks,
    n,
    biased,
    BY_FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """HSIC as in ``similarity/_hsic.py`` of R = −D, and CKA."""
    l, m = tl.arange(0, PADDED), tl.arange(0, PADDED)
    unit_l = tl.load(scale + l, mask=l < layers, other=1.0).to(tl.float64)
    unit_m = tl.load(scale + m, mask=m < layers, other=1.0).to(tl.float64)
    unit_l, unit_m = 1.0 / (unit_l * unit_l), 1.0 / (unit_m * unit_m)
    alike = tl.zeros([PADDED, PADDED], tl.float64)
    sum_l = tl.zeros([PADDED], tl.float64)
    sum_m = tl.zeros([PADDED], tl.float64)
    for block in range(0, blocks):
        alike += tl.load(products + block * (PADDED * PADDED) + l[:, None] * PADDED + m[None, :])
        sum_l += tl.load(totals + block * PADDED + l)
        sum_m += tl.load(totals + block * PADDED + m)
    a, b = tl.minimum(l[:, None], m[None, :]), tl.maximum(l[:, None], m[None, :])
    inside = (l < layers)[:, None] & (m < layers)[None, :]
    whole = tl.load(s + b * (b + 1) // 2 + a, mask=inside, other=0.0)
    units = unit_l[:, None] * unit_m[None, :]
    whole, alike = whole * units, alike * units
    if BY_FEATURES:
        whole -= alike
    squares = sum_l[:, None] * sum_m[None, :] * units
    count = n.to(tl.float64)
    if biased:
        share = (count - 1.0) * (count - 1.0)
        whole, squares, alike = whole + alike, squares * 0.0, alike * 0.0
    else:
        share = count * (count - 3.0)
        squares, alike = squares / ((count - 1.0) * (count - 2.0)), alike * (2.0 / (count - 2.0))
    hsic = (whole + squares - alike) / share
    size = (whole + squares + alike) / share
    eye = l[:, None] == m[None, :]
    floor = 8.0 * 1.1920928955078125e-07 * size
    flat = (hsic <= floor) & eye
    own = tl.where(eye & (hsic > floor), tl.sqrt(tl.where(eye & (hsic > floor), hsic, 1.0)), 0.0)
    # NaN where a layer is flat, or holds one: 0 / 0 of it, and NaN is in the products of the other.
    value = hsic / (tl.sum(own, 1)[:, None] * tl.sum(own, 0)[None, :])
    value = tl.where((tl.sum(own, 1)[:, None] > 0.0) & (tl.sum(own, 0)[None, :] > 0.0), value, float("nan"))
    tl.store(values + l[:, None] * layers + m[None, :], value.to(tl.float32), mask=inside)
    tl.store(degenerate + l, tl.max(flat.to(tl.int32), 1), mask=l < layers)
