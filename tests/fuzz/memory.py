"""Tensors whose first or last byte lies beside a page nobody may touch, so that one element too far is a crash."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


class Arena:
    """Some readable pages between two that are not."""

    def __init__(self, pages: int) -> None:
        self.size = pages * PAGE
        self._map = mmap.mmap(-1, self.size + 2 * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + PAGE
        for guard in (self.start - PAGE, self.start + self.size):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def tensor(self, numel: int, dtype: torch.dtype, side: str) -> Tensor:
        """[numel], its end (side "end") or its start at the guard."""
        size = numel * dtype.itemsize
        offset = PAGE + (self.size - size if side == "end" else 0)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=offset)


class Guard:
    """Arenas that are used again for every case: `reset`, then one `guarded` after the other."""

    def __init__(self, arenas: int = 12, pages: int = 64) -> None:
        self._arenas = [Arena(pages) for _ in range(arenas)]
        self._used = 0

    def reset(self) -> None:
        self._used = 0

    def guarded(self, x: Tensor, side: str = "end") -> Tensor:
        """x with the same strides (overlapping ones too) in memory that spans exactly its elements.

        x itself where that is impossible: no elements, too large, or all arenas taken.
        """
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        if not x.numel() or self._used == len(self._arenas) or span * x.element_size() > self._arenas[0].size:
            return x
        base = self._arenas[self._used].tensor(span, x.dtype, side)
        self._used += 1
        base.copy_(x.detach().as_strided((span,), (1,), x.storage_offset()))
        return base.as_strided(x.shape, x.stride())


_guard = Guard()
reset, guarded = _guard.reset, _guard.guarded
