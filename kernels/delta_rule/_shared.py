"""What the kernels of the family share inside a program: where a chunk stands, masked tiles, products.

Products take operands of the inputs' dtype and sum in float32. float32 operands go through ``tf32x3``: three tensor
core products of the operand's high and low parts, about float32's accuracy.

How tensors must lie for the kernels: one way only, so that what is launched is what was compiled ahead.

Triton compiles a kernel anew for every combination of arguments that are or are not divisible by 16, or are 1. Here
all addresses, strides, K and V are divisible by 16: then rows are read 16 bytes at a time, asynchronously where that
helps. What comes otherwise is copied: views that start or step oddly, and a K or V in between, which is filled up with
zero columns (they change nothing: zero keys read and write zeros) and cut from the results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pyrepr.kernels._launch import dot_input
from torch import Tensor
from torch.nn.functional import pad

ALIGNMENT = 16
# A kernel counts 32 bits from a chunk's first token to its last.
MOST_STRIDE = 1 << 24


def filled(x: Tensor, *sizes: int) -> Tensor:
    """x with zeros at the end of its last axes, which then have these sizes."""
    gaps = [size - x.shape[axis - len(sizes)] for axis, size in enumerate(sizes)]
    return pad(x, [n for gap in reversed(gaps) for n in (0, gap)]) if any(gaps) else x


def cut(x: Tensor, *sizes: int) -> Tensor:
    """What is left without the end of its last axes, contiguous."""
    for axis, size in enumerate(sizes):
        x = x.narrow(axis - len(sizes), 0, size)
    return x.contiguous()


def dense(x: Tensor) -> Tensor:
    """x contiguous and at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def rows(x: Tensor) -> Tensor:
    """x [B, T, H, K or V] with its last axis dense, and all others as the kernels take them."""
    strides = strides_of(x=x)
    fits = x.stride(3) == 1 and strides["xt"] < MOST_STRIDE and not any(s % ALIGNMENT for s in strides.values())
    return x if fits and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """Batch, token and head strides of every tensor, by its name: 0 where there is one of a kind to step over."""
    return {
        name + axis: 0 if size <= 1 else stride
        for name, x in tensors.items()
        for axis, size, stride in zip("bth", x.shape, x.stride(), strict=False)
    }


@triton.jit
def product(a, b):
    """a b in float32."""
    return tl.dot(dot_input(a), dot_input(b), input_precision="tf32x3")


@triton.jit
def program_place(parts, heads):
    """(part, head, chunk or sequence) of a program: there are so many parts to a head, so many heads to a chunk."""
    pid = tl.program_id(0).to(tl.int64)
    return (pid % parts).to(tl.int32), pid // parts % heads, pid // parts // heads


@triton.jit
def chunk_place(slot, chunks, packed, T, NT, C: tl.constexpr):
    """(row of the batch, first token, tokens) of a chunk; no tokens for a slot that no packed sequence uses."""
    if packed:
        batch = slot * 0
        first = tl.load(chunks + slot * 2)
        rows = tl.load(chunks + slot * 2 + 1)
    else:
        batch = slot // NT
        first = slot % NT * C
        rows = tl.minimum(T - first, C)
    return batch, first, rows.to(tl.int32)


@triton.jit
def load_tile(x, stride, rows, width, r0: tl.constexpr, R: tl.constexpr, c0, W: tl.constexpr):
    """Rows [r0, r0 + R) and columns [c0, c0 + W) at x; zero from `rows` and `width` on."""
    r = r0 + tl.arange(0, R)
    c = c0 + tl.arange(0, W)
    return tl.load(x + r[:, None] * stride + c[None, :], mask=(r < rows)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def store_tile(x, stride, rows, width, r0: tl.constexpr, R: tl.constexpr, c0, W: tl.constexpr, tile):
    r = r0 + tl.arange(0, R)
    c = c0 + tl.arange(0, W)
    mask = (r < rows)[:, None] & (c < width)[None, :]
    tl.store(x + r[:, None] * stride + c[None, :], tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_square(x, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(x + i[:, None] * C + i[None, :])


@triton.jit
def load_state(state, K, V, v0, BV: tl.constexpr, BK: tl.constexpr, there):
    """Sᵀ [BV, BK] of a state [K, V]; zero where `there` is 0."""
    columns = v0 + tl.arange(0, BV)
    keys = tl.arange(0, BK)
    mask = (columns < V)[:, None] & (keys < K * there)[None, :]
    return tl.load(state + keys[None, :] * V + columns[:, None], mask=mask, other=0.0)


@triton.jit
def store_state(state, K, V, v0, BV: tl.constexpr, BK: tl.constexpr, s):
    columns = v0 + tl.arange(0, BV)
    keys = tl.arange(0, BK)
    mask = (columns < V)[:, None] & (keys < K)[None, :]
    tl.store(state + keys[None, :] * V + columns[:, None], s, mask=mask)


@triton.jit
def log_decays(g, step, rows, C: tl.constexpr):
    """[C, C]: the sum of g over (j, i] for i ≥ j, summed from j on: small sums stay exact beside long decays."""
    i = tl.arange(0, C)
    gate = tl.load(g + i * step, mask=i < rows, other=0.0)
    return tl.cumsum(tl.where(i[:, None] > i[None, :], gate[:, None], 0.0), 0)
