"""What the forward and the backward kernels of family `lookup` share: hashes, one-hot tiles, descriptions.

Triton compiles a function anew for arguments that are 1 or divisible by 16. Here each is compiled in two ways at most
(`kernel`): for rows that all start at multiples of 16 bytes, which are read 16 bytes at a time, and for any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from pyrepr.backend import triton_interprets

# Rows a table of the one-hot kernels has, real or not.
ONE_HOT_ROWS = 16

INTERPRETED = tl.constexpr(triton_interprets())


@dataclass(frozen=True)
class Kernel:
    """A Triton function in the ways it is compiled."""

    whole: Any  # where the arguments named in `aligned` are divisible by 16, pointers in bytes
    odd: Any  # where nothing is known about any argument
    aligned: tuple[str, ...]

    @property
    def arg_names(self) -> list[str]:
        return self.whole.arg_names


def kernel(*aligned: str) -> Callable[[Callable], Kernel]:
    """Makes a :class:`Kernel` of a function; with no name given its two ways are the same."""

    def make(function: Callable) -> Kernel:
        # What is annotated is a constexpr.
        names = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is p.empty]
        whole = triton.jit(function, do_not_specialize=[name for name in names if name not in aligned])
        odd = triton.jit(function, do_not_specialize=names) if aligned else whole
        return Kernel(whole, odd, aligned)

    return make


@triton.jit
def divided(j, by, total):
    """j // by and j % by of int64 0 ≤ j < total. Dividing 64 bits takes several times the instructions of 32."""
    quotient = (j.to(tl.int32) // by).to(tl.int64) if total < 2147483648 else j // by
    return quotient, j - quotient * by


@triton.jit
def standardised(x, centre, scale, column, inside, affine):
    """(x − centre) · scale of elements in these columns, x from column `affine` on. To no product anything is added,
    which a fused multiply-add would round in another way than the CPU."""
    given = inside & (column < affine)
    return (x - tl.load(centre + column, mask=given, other=0.0)) * tl.load(scale + column, mask=given, other=1.0)


@triton.jit
def element_bits(value, i, each, inside):
    """The bits of element i of a chunk, at their place in its code; `each` of them, 1 or 2."""
    large = (each == 2) & (tl.abs(value) >= 1)
    bits = tl.where(value >= 0, 1, 0) + tl.where(large, 2, 0)
    return tl.where(inside, bits << (i * each), 0)


@triton.jit
def chunk_sums(x, column, centre, scale, mask, width, each, affine, slope):
    """Code, Σ |z| and 1 / p = Π (1 + exp(−2|z| / t)) ≤ 2^16 of the chunks of `width` elements that start at the
    pointers x and at these columns, each by one thread. slope: 2 / t. The arithmetic is csrc/cpu/lookup_hash.h's."""
    length = mask.to(tl.int32) * width
    code = length * 0
    size = code.to(tl.float32)
    inverse = size + 1
    for i in tl.static_range(16):
        inside = i < length
        value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
        value = standardised(value, centre, scale, column + i, inside, affine)
        code += element_bits(value, i, each, inside)
        size += tl.abs(value)
        inverse *= tl.where(inside, 1 + tl.exp(-tl.abs(value) * slope), 1.0)
    return code, size, inverse


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _product(x):
    """Π over the last axis of [BLOCK, 16]. The interpreter reduces by a function of ours element by element."""
    if INTERPRETED:
        return tl.sum(tl.where((tl.arange(0, 16) == 15)[None, :], tl.cumprod(x, 1), 0.0), 1)
    return tl.reduce(x, 1, _multiply)


@triton.jit
def chunk_sums_together(x, column, centre, scale, mask, width, each, affine, slope):
    """As `chunk_sums`, but a chunk's elements lie side by side in a warp: fewer reads a thread where chunks are few."""
    i = tl.arange(0, 16)
    inside = mask[:, None] & (i < width)[None, :]
    value = tl.load(x[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    value = standardised(value, centre, scale, column[:, None] + i[None, :], inside, affine)
    code = tl.sum(element_bits(value, i[None, :], each, inside), 1)
    factors = tl.where(inside, 1 + tl.exp(-tl.abs(value) * slope), 1.0)
    return code, tl.sum(tl.abs(value), 1), _product(factors)


@triton.jit
def weight_of(size, inverse, width, weighting):
    """w from what `chunk_sums` gives; weighting is an index in WEIGHTINGS."""
    weight = tl.where(weighting == 1, size / inverse, tl.where(size == size, 1.0, size))
    return tl.where(weighting == 0, 1 / inverse, tl.where(weighting == 2, size / width, weight))


@triton.jit
def checked(code, weight, n):
    """A code that is out of range as one that is not, and its weight NaN."""
    wrong = (code < 0) | (code >= n)
    return tl.minimum(tl.maximum(code, 0), n - 1), tl.where(wrong, float("nan"), weight)


@triton.jit
def one_hot(codes, weights, t, k, stride_t, stride_k, tokens, chunks, n, ROWS: tl.constexpr):
    """[BLOCK_T, BLOCK_K · ROWS] float32: the weight at (t, k, code), else 0."""
    inside = (t < tokens)[:, None] & (k < chunks)[None, :]
    at = t.to(tl.int64)[:, None] * stride_t + k.to(tl.int64)[None, :] * stride_k
    code = tl.load(codes + at, mask=inside, other=0)
    weight = tl.load(weights + at, mask=inside, other=0.0)
    code, weight = checked(code, weight, n)
    hot = code[:, :, None] == tl.arange(0, ROWS)[None, None, :]
    return tl.reshape(tl.where(hot, weight[:, :, None], 0.0), [t.shape[0], k.shape[0] * ROWS])


@triton.jit
def all_finite(x):
    # In one reduction: with two, Triton 3.6 finds no layout for sm_100.
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1)) == 0
