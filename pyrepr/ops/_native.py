"""How tensors become what ``pyrepr._C`` takes: addresses, sizes, strides and codes."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from pyrepr.backend import forced_backend, native
from pyrepr.ops._leaf import watched

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def module() -> ModuleType:
    """The compiled module; only called by implementations that `choose` found available."""
    loaded, reason = native()
    if loaded is None:
        raise RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return loaded


@functools.cache
def _reader() -> ModuleType | None:
    """The compiled module, if there is one and it can read tensors by itself: with PyTorch 2.10 or newer."""
    loaded, _ = native()
    return loaded if loaded is not None and loaded.learn_torch(torch) else None


def direct() -> ModuleType | None:
    """The compiled module, where its functions that take tensors as they are may be tried before anything else.

    Reading, checking and converting a step's tensors in Python takes longer than the step. These functions look at
    their arguments themselves, and return ``None`` for whatever is not plain CPU tensors exactly as the kernel wants
    them, without a gradient; the caller then goes the long way, by the checks and the leaf op.
    """
    return None if watched() or forced_backend() not in (None, "cpu") else _reader()


def optional(name: str, x: Tensor | None) -> int:
    """The address of an argument that may be left out, 0 without it."""
    address = 0 if x is None else x.data_ptr()
    if address == 0 and x is not None and x.numel():
        raise ValueError(f"{name} has no memory (a fake or meta tensor, or a freed storage)")
    return address


def matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """A 2-D tensor as (address, rows, columns, row stride, column stride)."""
    return (x.data_ptr(), *x.shape, *x.stride())


def _reach(x: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last; strides are not negative."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()


def apart(state: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, copied where they have memory in common with `state`, which is about to be overwritten."""
    start, end = _reach(state)
    reaches = (None if x is None else _reach(x) for x in tensors)
    return tuple(
        x.clone() if x is not None and reach[0] < end and start < reach[1] else x
        for x, reach in zip(tensors, reaches, strict=True)
    )
