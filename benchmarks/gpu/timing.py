"""Device times of one case: every implementation in turn, on rotating inputs, with a cold L2."""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyrepr.benchmarks.gpu import (
    GpuCase,
    Problem,
    dtype_name,
    forget,
    implementations_taken,
    same_bits,
    strayed,
    synchronise,
)

import pyrepr
from pyrepr.backend import _PROBES

FLUSH_BYTES = 512 << 20  # more than any L2
CYCLES = 1.8e6  # of a GPU's clock in a millisecond, about
AHEAD = 5.0  # most milliseconds that the device is kept waiting so that all launches are there when it begins
SEEDS = 3
# Most seconds for a first run of what is not ours, which may compile; and where it also tunes. What it found is kept.
FIRST_SECONDS = 20.0
TUNED_PEERS = {"flash-linear-attention": 75.0}
SLOW = 0.25  # seconds: what takes longer is measured once


class Lost(RuntimeError):
    """The CUDA context is gone: nothing more can be done in this process."""


def clock_of(device: torch.device) -> Callable[..., tuple[float, float]]:
    """Milliseconds of one call, between device events with a cold L2, and of the processor until it was launched.

    The second argument says how long the device is to wait for the launches; the flush alone hides about 0.2 ms.
    """
    if device.type == "cpu":

        def by_clock(function: Callable[[], Any], _ahead: float = 0.0) -> tuple[float, float]:
            start = time.perf_counter()
            function()
            taken = 1e3 * (time.perf_counter() - start)
            return taken, taken

        return by_clock
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def by_events(function: Callable[[], Any], ahead: float = 0.0) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        flush.zero_()
        if ahead:
            torch.cuda._sleep(int(CYCLES * min(AHEAD, ahead)))
        start.record()
        begun = time.perf_counter()
        function()
        launched = 1e3 * (time.perf_counter() - begun)
        end.record()
        end.synchronize()
        return start.elapsed_time(end), launched

    return by_events


def under(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def function() -> Any:
        with pyrepr.use_backend(backend):
            return run()

    return function


def _implementations(case: GpuCase, problem: Problem) -> dict[str, Callable[[], Any]]:
    ours = [backend for backend in case.backends if _PROBES[backend]()[0]]
    functions = {f"pyrepr {backend}": under(backend, problem.run) for backend in ours}
    return {**functions, **problem.peers, "pyrepr reference": under("reference", problem.run)}


def _problems(case: GpuCase, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The same problem on several inputs, as many as leave most of the memory free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    problems = [case.make(device, dtype, 0)]
    if device.type == "cuda":
        forget(device)
        taken = free - torch.cuda.mem_get_info(device)[0]
        problems += [case.make(device, dtype, seed) for seed in range(1, SEEDS) if 5 * (seed + 1) * taken < free]
    return problems


@contextlib.contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in the block when it has taken that long, between two steps of Python."""

    def over(*_: Any) -> None:
        raise TimeoutError(f"its first run took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_run(function: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """The result, and by how many MiB device memory rose at its highest; also compiles what needs it."""
    if device.type == "cpu":
        return function(), None
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    synchronise(device)
    return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _introduce(
    row: dict[str, Any], function: Callable[[], Any], case: GpuCase, truth: Any, device: torch.device, seconds: float
) -> Callable[[], Any]:
    """Runs an implementation for the first time: its error, memory, ops; what is timed afterwards is returned."""
    name = row["implementation"]
    ours = name in (f"pyrepr {backend}" for backend in case.backends)
    with at_most(TUNED_PEERS.get(name, None if ours else seconds)), implementations_taken() as taken:
        result, row["peak_mib"] = _first_run(function, device)
    row["error"] = None if truth is None else case.error(result, truth)
    if ours:
        row["ops"] = sorted(op for op, _ in taken)
        tolerance = row["tolerance"] = case.tolerance[getattr(torch, row["dtype"])]
        row["failure"] = strayed(taken, name.removeprefix("pyrepr "))
        if row["error"] is not None and not row["error"] <= tolerance:
            row["failure"] = f"error {row['error']:.2e} is more than {tolerance:.0e}"
        elif not same_bits(result, function()):
            row["failure"] = "two runs gave different bits"
    return function


def _truth(problem: Problem, case: GpuCase, device: torch.device) -> Any:
    try:
        return problem.truth()
    except Exception as failure:
        print(f"{case.name}: no truth: {failure}", file=sys.stderr)
        forget(device)
        return None


def _failed(row: dict[str, Any], failure: Exception, device: torch.device) -> None:
    text = f"{type(failure).__name__}: {failure}"[:300]
    try:
        synchronise(device)
    except Exception:
        raise Lost(text) from None
    row["failure"], row["rounds"] = text, []
    forget(device)


def time_case(
    item: tuple[GpuCase, torch.dtype], device: torch.device, seconds: float, without: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Every implementation in turn, round after round, on rotating inputs; medians. Errors beside the times.

    Says whose first run comes next, so that whoever looks after this process knows what ended it.
    """
    case, dtype = item
    problems = _problems(case, device, dtype)
    functions = [_implementations(case, problem) for problem in problems]
    clock = clock_of(device)
    rows: dict[str, dict[str, Any]] = {}
    truth = _truth(problems[0], case, device)
    first: dict[str, tuple[float, float]] = {}
    for name, function in functions[0].items():
        if name in without:
            continue
        row = rows[name] = {"dtype": dtype_name(dtype), "implementation": name, "failure": None, "rounds": []}
        yield {"mark": "implementation", **{key: row[key] for key in ("dtype", "implementation")}}
        try:
            _introduce(row, function, case, truth, device, FIRST_SECONDS)
            first[name] = clock(function)
            first[name] = clock(function, 1.5 * first[name][1])
        except Exception as failure:
            first.pop(name, None)
            _failed(row, failure, device)
    truth = None
    yield {"mark": "rounds"}
    yield from _rounds(rows, functions, first, problems[0], clock, device, seconds)


def _rounds(
    rows: dict[str, dict[str, Any]],
    functions: list[dict[str, Callable[[], Any]]],
    first: dict[str, tuple[float, float]],
    problem: Problem,
    clock: Callable[..., tuple[float, float]],
    device: torch.device,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Times what has run once, and yields all rows."""
    running = [name for name, (taken, _) in first.items() if taken < 1e3 * SLOW]
    for name in first:
        rows[name]["rounds"], rows[name]["host"] = [first[name][0]], [first[name][1]]
    each = sum(sum(first[name]) for name in running) / 1e3 + 1e-3 * len(running)
    for i in range(max(1 if device.type == "cpu" else 3, min(100, int(seconds / max(each, 1e-6))))):
        for name in [name for name in running if name in first]:
            try:
                taken, host = clock(functions[i % len(functions)][name], 1.5 * first[name][1])
            except Exception as failure:
                first.pop(name)
                _failed(rows[name], failure, device)
            else:
                rows[name]["rounds"].append(taken)
                rows[name]["host"].append(host)
    for name in first:
        row = rows[name]
        row["milliseconds"], row["best"] = statistics.median(row["rounds"]), min(row["rounds"])
        row["host_milliseconds"] = statistics.median(row.pop("host"))
        row["flops"], row["bytes"] = problem.flops, problem.bytes
    yield from rows.values()
