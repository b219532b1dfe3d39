"""What ``python -m pyrepr.gpu_check`` runs: one module per family with a function ``cases() -> list[GpuCase]``."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator
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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Gives memory back that nothing holds any more: the next case may need all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, (list, tuple)):
        return [t for part in result if part is not None for t in flat(part)]
    return [torch.as_tensor(result)]


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0)) for x, y in pairs)


@contextlib.contextmanager
def implementations_taken() -> Iterator[set[tuple[str, str]]]:
    """The (op, backend) pairs that pyrepr's leaf ops chose inside the ``with`` block, in whichever thread."""
    leaf = importlib.import_module("pyrepr.ops._leaf")
    choose, found = leaf.choose, set()

    def noting(op: str, implementations: dict[str, Callable], device: str) -> list[Callable]:
        chosen = choose(op, implementations, device)
        found.update((op, name) for name, function in implementations.items() if function is chosen[0])
        return chosen

    leaf.choose = noting
    try:
        yield found
    finally:
        leaf.choose = choose


def strayed(taken: set[tuple[str, str]], backend: str) -> str | None:
    """What ran elsewhere than in the forced backend, or ``None``."""
    others = sorted(f"{op} in {name}" for op, name in taken if name != backend)
    return f"ran elsewhere than in {backend}: {', '.join(others)}" if others else None
