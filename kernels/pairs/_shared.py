"""What the kernels of family `pairs` share: products of rows, and scores as numbers that sort with their columns.

Operands lie as ``_hosts.Packed`` makes them: rows start at multiples of 16 bytes, and features end at multiples of 64
that are filled up with zeros, so that no loop over features needs a mask.
"""

import triton
import triton.language as tl
from pyrepr.kernels._launch import dot_input

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_tile(x, i, stride, n, start, R: tl.constexpr, BK: tl.constexpr):
    """Rows i … i + R and features start … start + BK; zeros from row n on."""
    # The large part of an address is one number; tensors of int64 addresses would fill the registers.
    rows, features = tl.arange(0, R), tl.arange(0, BK)
    at = x + tl.cast(i, tl.int64) * stride + start
    return tl.load(at + rows[:, None] * stride + features[None, :], mask=(i + rows < n)[:, None], other=0.0)


@triton.jit
def add_products(
    total,  # [BM, BN] float32
    x,
    y,
    i,
    j,
    x_stride,
    y_stride,
    n,
    m,
    start,
    stop,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` plus the inner products of rows i … of x with rows j … of y over features start … stop."""
    for k in range(start, stop, BK):
        a = row_tile(x, i, x_stride, n, k, BM, BK)
        b = row_tile(y, j, y_stride, m, k, BN, BK)
        total = tl.dot(dot_input(a), tl.trans(dot_input(b)), total, input_precision=PRECISION)
    return total


@triton.jit
def as_key(score, column):
    """int64 that sorts as (score, −column) do; score is not NaN. column: int32."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # −0 as 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def score_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def column_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def empty_keys(R: tl.constexpr, KEPT: tl.constexpr):
    """[R, KEPT] keys of the score −∞, all different."""
    worst = tl.full([R, KEPT], float("-inf"), tl.float32)
    return as_key(worst, 0x7FFFFFFF - tl.zeros([R, KEPT], tl.int32) - tl.arange(0, KEPT)[None, :])


@triton.jit
def enter(keys, s, first, R: tl.constexpr, BN: tl.constexpr):
    """The best of `keys` [R, KEPT] and of the scores s [R, BN] of columns first …; −∞ never enters.

    One score of every row a turn takes the place of the least: after the first tiles few turns are left to do.
    """
    columns = tl.arange(0, BN)
    low = tl.min(keys, 1)
    least = score_of(low)
    best, at = tl.max(s, 1, return_indices=True)
    while tl.max((best > least).to(tl.int32), 0) > 0:
        here = (best > least)[:, None] & (keys == low[:, None])
        keys = tl.where(here, as_key(best, first + at.to(tl.int32))[:, None], keys)
        low = tl.min(keys, 1)
        least = score_of(low)
        s = tl.where(columns[None, :] == at[:, None], float("-inf"), s)
        best, at = tl.max(s, 1, return_indices=True)
    return keys
