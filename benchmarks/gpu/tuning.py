"""Compiling ahead of the timing, in many processes, and searching launch configurations (``gpu_check --autotune``)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyrepr.benchmarks.gpu import GpuCase, forget
from pyrepr.benchmarks.gpu.timing import TUNED_PEERS, under

# Which share of the compilations is this process's: (number, of how many).
SHARD = (0, 1)
_turn = itertools.count()


def _mine() -> bool:
    number, count = SHARD
    return next(_turn) % count == number


@contextlib.contextmanager
def _compiling_only() -> Iterator[None]:
    """Triton's autotuner compiles this process's share of the configurations and times none; all count as equal.

    What is compiled is kept on disk, so that the timing, alone on the device, has only to run it.
    """
    from triton.runtime.autotuner import Autotuner

    bench = Autotuner._bench

    def compile_mine(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if _mine():
            before = vars(self).get("do_bench")
            vars(self)["do_bench"] = lambda call, quantiles: call()
            try:
                bench(self, *args, config=config, **meta)
            finally:
                vars(self).pop("do_bench") if before is None else vars(self).update(do_bench=before)
        return [1.0, 1.0, 1.0]

    Autotuner._bench = compile_mine
    try:
        yield
    finally:
        Autotuner._bench = bench


def compile_shard(item: tuple[GpuCase, torch.dtype], device: torch.device) -> None:
    """Runs what an item times once, as far as that compiles something and is this process's share."""
    case, dtype = item
    problem = case.make(device, dtype, 0)
    if "triton" in case.backends and _mine():
        under("triton", problem.run)()
    with _compiling_only():
        for name in TUNED_PEERS.keys() & problem.peers.keys():
            problem.peers[name]()
    forget(device)


@contextlib.contextmanager
def _noting_searches() -> Iterator[list[dict[str, Any]]]:
    """What the tables of launch configurations search inside the ``with`` block."""
    from pyrepr.kernels._launch import Table

    found: list[dict[str, Any]] = []
    search = Table.search

    def noting(self: Any, row: int, function: Callable, key: tuple = ()) -> Any:
        times: dict[str, float] = {}
        clock = self.milliseconds

        def timed(call: Any) -> float:
            times[str(call.args[0])] = milliseconds = clock(call)
            return milliseconds

        self.milliseconds = timed
        try:
            return search(self, row, function, key)
        finally:
            self.milliseconds = clock
            now = str(self.rows[row])
            found.append({"table": self.name, "row": row, "key": [str(k) for k in key], "now": now, "times": times})

    Table.search = noting
    try:
        yield found
    finally:
        Table.search = search


def search(item: tuple[GpuCase, torch.dtype], device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """Runs one timed problem with PYREPR_AUTOTUNE=1 set: every table that it meets is searched, one record each."""
    case, dtype = item
    if "triton" not in case.backends:
        return []
    with _noting_searches() as found:
        under("triton", case.make(device, dtype, 0).run)()
    return found
