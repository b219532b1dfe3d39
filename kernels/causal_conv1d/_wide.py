"""The kernels of family `causal_conv1d` for any width: tap by tap."""

import triton
import triton.language as tl
from pyrepr.kernels.causal_conv1d._shared import POINTERS, SIZES, activation, initial_value, only_if, slope


@triton.jit
def _seen(x, initial, row, d, place, n, j, rows, D, W, has_initial):
    """What the tokens `row` see through tap j, [BLOCK_T, BLOCK_D]. x [rows, D]; nothing through tap W."""
    back = W - 1 - j
    own = (row < rows)[:, None]
    mask = own & (back <= place)[:, None] & (d < only_if(back >= 0, D))[None, :]
    value = tl.load(x + (row - back)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    mask = own & (back > place)[:, None] & (d < only_if(has_initial != 0, D))[None, :]
    return value + initial_value(initial, n[:, None], (place + j)[:, None], d[None, :], D, W, mask)


@triton.jit
def _tile(position, number, rows, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's tokens, their places and sequences, and its channels."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(position + row, mask=row < rows, other=0)
    n = tl.load(number + row, mask=row < rows, other=0)
    return row, place, n, tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def wide_kernel(
    x,  # [rows, D]
    weight,  # [D, W] float32
    bias,  # [D] float32, read if has_bias
    initial,  # [N, D, W − 1] in x's dtype, read if has_initial
    position,  # [rows] int32
    number,  # [rows] int32
    grad,  # [rows, D] or None
    out,  # [rows, D]: the result, or with grad dy in float32
    rows,
    D,
    W,
    has_bias,
    has_initial,
    silu,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, place, n, d = _tile(position, number, rows, D, BLOCK_T, BLOCK_D)
    constant = tl.load(bias + d, mask=d < only_if(has_bias != 0, D), other=0.0)
    y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32) + constant[None, :]
    for j in range(W):
        tap = tl.load(weight + d.to(tl.int64) * W + j, mask=d < D, other=0.0)
        y += tap[None, :] * _seen(x, initial, row, d, place, n, j, rows, D, W, has_initial)
    offset, mask = row[:, None] * D + d[None, :], (row < rows)[:, None] & (d < D)[None, :]
    if grad is not None:
        result = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32) * slope(y, silu)
    else:
        result = activation(y, silu)
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def wide_input_kernel(
    dy,  # [rows, D] float32
    weight,  # [D, W] float32
    position,  # [rows] int32
    dx,  # [rows, D]
    rows,
    D,
    W,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, _, _, d = _tile(position, position, rows, D, BLOCK_T, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for back in range(W):
        later = row + back
        seen = tl.load(position + later, mask=later < rows, other=-1) >= back
        mask = seen[:, None] & (d < D)[None, :]
        value = tl.load(dy + later[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += tl.load(weight + d.to(tl.int64) * W + (W - 1 - back), mask=d < D, other=0.0)[None, :] * value
    mask = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(dx + row[:, None] * D + d[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def wide_weight_kernel(
    x,  # [rows, D]
    initial,  # [N, D, W − 1] in x's dtype, read if has_initial
    position,  # [rows] int32
    number,  # [rows] int32
    dy,  # [rows, D] float32
    partial,  # [spans, W + 1, D] float32
    rows,
    D,
    W,
    span,
    has_initial,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    j, part = tl.program_id(0) // blocks % (W + 1), (tl.program_id(0) // blocks // (W + 1)).to(tl.int64)
    first = part * span
    last = tl.minimum(first + span, rows)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        mask = (row < last)[:, None] & (d < D)[None, :]
        value = tl.load(dy + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        place = tl.load(position + row, mask=row < last, other=0)
        n = tl.load(number + row, mask=row < last, other=0)
        seen = _seen(x, initial, row, d, place, n, j, last, D, W, has_initial)
        total += value * tl.where(j == W, 1.0, seen)
    tl.store(partial + (part * (W + 1) + j) * D + d, tl.sum(total, 0), mask=d < D)
