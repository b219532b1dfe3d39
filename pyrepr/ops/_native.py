"""How tensors become what ``pyrepr._C`` takes: addresses, sizes, strides and codes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pyrepr.backend import native

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def module() -> ModuleType:
    """The compiled module; only called by implementations that `choose` found available."""
    loaded, reason = native()
    if loaded is None:
        raise RuntimeError(f"backend 'cpu' is unavailable: {reason}")
    return loaded


def matrix(x: Tensor) -> tuple[int, int, int, int, int]:
    """A 2-D tensor as (address, rows, columns, row stride, column stride)."""
    return (x.data_ptr(), *x.shape, *x.stride())
