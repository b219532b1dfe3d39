"""What ``python -m pyrepr.gpu_check`` runs: one module per family with a function ``cases() -> list[GpuCase]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyrepr.benchmarks.harness import relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Problem:
    """One computation with its inputs.

    Args:
        run: pyrepr's public call (with its backward, if that is the case's op). Called again and again under
            ``use_backend``; it must not change its inputs.
        truth: the same result in float64 on the same (already rounded) inputs, by the family's reference. The device
            is up to it: the inputs' own is the fastest.
        peers: name → the same computation by another implementation that is importable; also the plain torch one.
        flops, bytes: arithmetic operations (a multiply-add counts as two) and memory traffic at best; 0 if the bound
            says nothing.
    """

    run: Callable[[], Any]
    truth: Callable[[], Any]
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class GpuCase:
    """A problem that is made when it is its turn.

    Args:
        op, shape: what the report calls it, as for `harness.Case`.
        make: (device, dtype, seed) → Problem. A timed case is made for a few seeds, for rotating inputs.
        tolerance: dtype → largest error against the truth; the dtypes it is run in. Until a GPU has been seen, the
            interpreter's worst error times 4.
        backends: those that have a kernel for it.
        timed: also timed, in every dtype of ``timed_dtypes`` (default: all that have a tolerance).
        graph: also captured into a CUDA graph and replayed, which fails if anything synchronises.
        sanitize: also run under compute-sanitizer; one small case a kernel.
        error: (result, truth) → number.
    """

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype, int], Problem]
    tolerance: dict[torch.dtype, float]
    backends: tuple[str, ...] = ("triton",)
    timed: bool = False
    timed_dtypes: tuple[torch.dtype, ...] | None = None
    graph: bool = False
    sanitize: bool = False
    error: Callable[[Any, Any], float] = relative_error

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"
