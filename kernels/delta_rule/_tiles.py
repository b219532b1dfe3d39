"""What the kernels of the family share inside a program: where a chunk stands, masked tiles, products, substitution.

Products take operands of the inputs' dtype and sum in float32. float32 operands go through ``tf32x3``: three tensor
core products of the operand's high and low parts, about float32's accuracy.
"""

import triton
import triton.language as tl
from pyrepr.kernels._launch import dot_input


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
def substitute(x, a_t, i):
    """Row i of (I + A)⁻¹ from the rows above it. x, a_t [16, 16]: the inverse so far, Aᵀ."""
    r = tl.arange(0, 16)
    factors = tl.sum(tl.where(r[None, :] == i, a_t, 0.0), 1)
    return tl.where(r[:, None] == i, x - tl.sum(factors[:, None] * x, 0)[None, :], x)


@triton.jit
def log_decays(g, step, rows, C: tl.constexpr):
    """[C, C]: the sum of g over (j, i] for i ≥ j, summed from j on: small sums stay exact beside long decays."""
    i = tl.arange(0, C)
    gate = tl.load(g + i * step, mask=i < rows, other=0.0)
    return tl.cumsum(tl.where(i[:, None] > i[None, :], gate[:, None], 0.0), 0)
