"""How tensors must lie for the kernels: one way only, so that what is launched is what was compiled ahead.

Triton compiles a kernel anew for every combination of arguments that are or are not divisible by 16, or are 1. Here
all addresses, strides, K and V are divisible by 16: then rows are read 16 bytes at a time, asynchronously where that
helps. What comes otherwise is copied: views that start or step oddly, and a K or V in between, which is filled up with
zero columns (they change nothing: zero keys read and write zeros) and cut from the results.
"""

from __future__ import annotations

import torch
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
