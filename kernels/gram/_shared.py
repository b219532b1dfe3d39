"""What the kernels of family `gram` share inside a program: where a tile stands, products, a kernel's values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def triangle(number):
    """Counting down the columns of an upper triangle: number -> (row, column)."""
    column = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)  # off by one at most
    column -= (column * (column + 1) // 2 > number).to(tl.int32)
    column += ((column + 1) * (column + 2) // 2 <= number).to(tl.int32)
    return number - column * (column + 1) // 2, column


@triton.jit
def tile_place(number):
    """Number of a tile -> (I, J). Tiles go in squares of 8 × 8, squares down the columns of the upper triangle: what
    runs at the same time shares rows in L2. With I > J, or J past the end, there is nothing to do."""
    inside = number % 64
    square_row, square_column = triangle(number // 64)
    row, column = triangle(inside)
    on_diagonal = square_row == square_column
    row = tl.where(on_diagonal, tl.where(inside < 36, row, 8), inside % 8)
    column = tl.where(on_diagonal, tl.where(inside < 36, column, 7), inside // 8)
    return square_row * 8 + row, square_column * 8 + column


@triton.jit
def tile_dots(
    x,  # [PARTS, x_pad, width] float16
    y,  # [PARTS, y_pad, width] float16
    i,
    j,
    start,
    stop,
    x_pad,
    y_pad,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Inner products of rows i... of x with rows j... of y over columns start:stop -> [BLOCK, BLOCK] float32."""
    # The large part of an address is one number; tensors of int64 addresses would fill the registers.
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BK)
    down, across = rows[:, None] * width + columns[None, :], rows[None, :] * width + columns[:, None]
    left, right = x + i.to(tl.int64) * width, y + j.to(tl.int64) * width
    left_low, right_low = left + x_pad.to(tl.int64) * width, right + y_pad.to(tl.int64) * width
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(start, stop, BK):
        a, b = tl.load(left + k + down), tl.load(right + k + across)
        if PARTS == 2:
            total = tl.dot(a, tl.load(right_low + k + across), total)
            total = tl.dot(tl.load(left_low + k + down), b, total)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def kernel_values(
    dots,  # [BLOCK, BLOCK]
    x_norms,  # [BLOCK] squared, like dots in packed units
    y_norms,  # [BLOCK]
    constants,  # pointer to the layer's four numbers, see `_constants`
    degree,
    KIND: tl.constexpr,
):
    """The kernel's values of a tile of inner products, minus the shift."""
    factor, offset, shift = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    if KIND == 1 or KIND == 2:
        distances = x_norms[:, None] + y_norms[None, :] - 2.0 * dots
        distances = tl.where(distances < 0.0, 0.0, distances)  # and NaN stays NaN
        if KIND == 2:
            distances = tl.sqrt(distances)
        values = tl.exp2(factor * distances)
    elif KIND == 3:
        base = factor * dots + offset
        values = base
        for _ in range(1, degree):
            values *= base
    elif KIND == 4:
        x_inverse = tl.where(x_norms > 0, tl.rsqrt(tl.where(x_norms > 0, x_norms, 1.0)), 0.0)
        y_inverse = tl.where(y_norms > 0, tl.rsqrt(tl.where(y_norms > 0, y_norms, 1.0)), 0.0)
        values = dots * x_inverse[:, None] * y_inverse[None, :]
    else:
        values = factor * dots
    return values - shift


@triton.jit
def column_dots(
    packed,  # [PARTS, n_pad, width] float16
    i,
    j,
    start,
    stop,
    n_pad,
    width,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    """Inner products of columns i... with columns j... over rows start... -> [BLOCK, BLOCK] float32."""
    rows, columns = tl.arange(0, BK), tl.arange(0, BLOCK)
    down, across = columns[:, None] + rows[None, :] * width, columns[None, :] + rows[:, None] * width
    long_width = width.to(tl.int64)
    low = n_pad * long_width
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for chunk in range(start, stop, 1024):  # short sums, as in `products_kernel`
        short = tl.zeros([BLOCK, BLOCK], tl.float32)
        for k in range(chunk, tl.minimum(chunk + 1024, stop), BK):
            row = packed + long_width * k
            a, b = tl.load(row + i + down), tl.load(row + j + across)
            if PARTS == 2:
                short = tl.dot(a, tl.load(row + low + j + across), short)
                short = tl.dot(tl.load(row + low + i + down), b, short)
            short = tl.dot(a, b, short)
        total += short
    return total
