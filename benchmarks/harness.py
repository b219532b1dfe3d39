"""The one way anything here is measured, for `pyrepr bench` and for `pytest benchmarks` alike.

A family gives a list of :class:`Case`; a case makes a :class:`Workload`: the same computation by several
implementations on the same inputs, pyrepr's own first. Each result is compared with a float64 truth before anything is
timed. Then all implementations are timed in turn, round after round in one process, because machines are noisy:
only ratios of such rounds mean anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrepr
from pyrepr.backend import build_info, native

OURS = "pyrepr"
L2_BYTES = 512 << 10  # of a thread: more than any L1, less than most L2


@dataclass
class Workload:
    """One computation by several implementations.

    Args:
        implementations: name → function without arguments; the first is pyrepr's own, named ``"pyrepr"`` or
            ``"pyrepr <variant>"``.
        truth: computes the result in float64, by other means than any implementation.
        tolerance: largest relative error that pyrepr's own result may have; a worse one is not timed but raises.
        error: relative error of a result against the truth.
        result: takes what an implementation returned to what the truth returns (a part of it, say).
        flops: arithmetic operations at best, ``bytes``: memory traffic at best, and ``cached_bytes``: what is read out
            of L2 at best, for the fraction of the bound.
        calls: calls in a row that are timed together. Several where one is so short that fetching the code again, which
            the other implementations have driven out of the caches, would be most of its time.
        data: what the inputs are, for the report.
    """

    implementations: dict[str, Callable[[], Any]]
    truth: Callable[[], Any]
    tolerance: float
    error: Callable[[Any, Any], float] = None  # type: ignore[assignment]
    result: Callable[[Any], Any] = lambda result: result
    flops: float = 0.0
    bytes: float = 0.0
    cached_bytes: float = 0.0
    calls: int = 1
    data: str = "random"

    def __post_init__(self) -> None:
        if self.error is None:
            self.error = relative_error


@dataclass
class Case:
    """A named workload that is made when it is its turn, so that only one case's inputs are in memory.

    ``quick`` cases make up ``pyrepr bench --quick``. ``threads`` is how many a case runs on where that is not as many
    as PyTorch has.
    """

    op: str
    shape: str
    make: Callable[[], Workload]
    quick: bool = False
    threads: int | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    @contextlib.contextmanager
    def its_threads(self) -> Iterator[None]:
        """Inside, PyTorch has as many threads as the case says."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass
class Row:
    """One implementation of one case, as measured."""

    op: str
    shape: str
    implementation: str
    milliseconds: float | None  # median over rounds
    best_milliseconds: float | None
    speedup: float | None  # pyrepr's time is the unit: how many times faster pyrepr is than this
    error: float | None
    fraction_of_bound: float | None
    bound: str
    peak_mib: float | None
    data: str
    note: str = ""
    rounds: int = 0  # that the median is of


def relative_error(result: Any, truth: Any) -> float:
    """Largest |result − truth| over the largest |truth|, over all tensors of a result; NaN counts as infinite."""
    if isinstance(truth, (list, tuple)):
        return max(relative_error(r, t) for r, t in zip(result, truth, strict=True))
    result, truth = torch.as_tensor(result).double(), torch.as_tensor(truth).double()
    if result.shape != truth.shape:
        raise ValueError(f"result must have the shape of the truth, {tuple(truth.shape)}, got {tuple(result.shape)}")
    if truth.numel() == 0:
        return 0.0
    error = float((result - truth).abs().max() / truth.abs().max())
    return math.inf if math.isnan(error) else error


@functools.cache
def machine() -> dict[str, Any]:
    """Where the numbers come from: versions, processor, and its measured bounds."""
    module, reason = native()
    threads = torch.get_num_threads()
    facts: dict[str, Any] = {
        "pyrepr": pyrepr.__version__,
        "commit": build_info().get("commit"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": threads,
        "pinned": pinned(),
        "simd": module.simd_level() if module else f"none ({reason})",
    }
    return {**facts, **bounds(threads)}


@functools.cache
def bounds(threads: int) -> dict[str, float]:
    """What so many threads can do at most, as measured; nothing without the native module."""
    module, _ = native()
    if not module:
        return {}
    return {
        "fma_peak_gflops": module.fma_peak(threads, 0.3) / 1e9,
        "micro_kernel_gflops": module.micro_kernel(threads, 0.3) / 1e9,
        "read_bandwidth_gbs": module.read_bandwidth(threads, 256 << 20) / 1e9,
        "cache_bandwidth_gbs": module.read_bandwidth(threads, threads * L2_BYTES) / 1e9,
    }


# What a user may have said about where OpenMP's threads run; each is obeyed.
PLACES = ("GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND", "KMP_AFFINITY")


def pinned() -> str:
    """How OpenMP's threads are bound to cores, for the report."""
    return ", ".join(f"{name}={os.environ[name]}" for name in PLACES if os.environ.get(name)) or "no"


def restart_pinned() -> None:
    """Starts this process again with one OpenMP thread a core, where that was not said and can be (Linux).

    Some virtual machines leave a woken thread on its waker's core for up to 15 ms, so that two threads are as fast as
    one. OpenMP reads the binding once, before anything of ours runs. A peer with a thread pool of its own inherits the
    first thread's core: let it run on one thread.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in PLACES):
        return
    cores = _cores()
    if len(cores) > 1:
        environment = {**os.environ, "GOMP_CPU_AFFINITY": " ".join(map(str, cores))}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _cores() -> list[int]:
    """One processor number of every core that this process may use."""
    found: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            core = path.read_text()
        except OSError:
            core = str(cpu)
        found.setdefault(core, cpu)
    return list(found.values())


def read_bandwidth() -> float:
    """Bytes per second, now. 0 without the native module.

    It changes within seconds on a virtual machine: 28 or 55 GB/s were seen for two threads, and always 28 for one, as
    if the two at times shared one path to memory.
    """
    module, _ = native()
    return module.read_bandwidth(torch.get_num_threads(), 256 << 20) if module else 0.0


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _status(field_name: str) -> int | None:
    """A field of /proc/self/status in KiB; ``None`` where there is no such file."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field_name))
    except (OSError, StopIteration):
        return None


def peak_memory(function: Callable[[], Any]) -> tuple[Any, float | None]:
    """The function's result, and by how many MiB memory rose above what was in use before, at its highest (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the highest value so far
    except (OSError, AttributeError):
        return function(), None
    before = _status("VmRSS:")
    result = function()
    highest = _status("VmHWM:")
    return result, None if before is None or highest is None else max(0, highest - before) / 1024


def _timed(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _bound(work: Workload, bandwidth: float) -> tuple[float, str]:
    """The seconds that the slowest of the machine's parts needs at least, and its name."""
    most = bounds(torch.get_num_threads())
    parts = [
        (work.flops, most.get("fma_peak_gflops", 0) * 1e9, "FMA peak"),
        (work.bytes, bandwidth, "bandwidth"),
        (work.cached_bytes, most.get("cache_bandwidth_gbs", 0) * 1e9, "L2 bandwidth"),
    ]
    return max(((amount / rate, name) for amount, rate, name in parts if amount and rate), default=(0.0, ""))


def run_case(case: Case, seconds: float) -> list[Row]:
    """Checks and measures one case; `seconds` is about how long its timing may take."""
    with case.its_threads():
        return _run_case(case, seconds)


def _run_case(case: Case, seconds: float) -> list[Row]:
    work = case.make()
    truth = work.truth()
    rows, errors = [], {}
    bandwidths = [read_bandwidth()]
    times: dict[str, list[float]] = {}
    for name, function in work.implementations.items():
        note = ""
        try:
            result, peak = peak_memory(function)
            error = work.error(work.result(result), truth)
        except Exception as failure:  # a peer that cannot do it is a finding, not the end of the run
            if name.startswith(OURS):
                raise
            result, peak, error, note = None, None, None, f"{type(failure).__name__}: {failure}"[:120]
        if name.startswith(OURS) and not error <= work.tolerance:
            raise AssertionError(f"{case.name}: {name} has relative error {error:.2e}, more than {work.tolerance:.0e}")
        del result
        errors[name] = (error, peak, note)
        if not note:
            times[name] = []
    # One round of everything tells how many rounds there is time for.
    first = {name: _timed(work.implementations[name], work.calls) for name in times}
    rounds = max(3, min(200, int(seconds / max(1e-9, work.calls * sum(first.values())))))
    for i in range(rounds):
        for name, measured in times.items():
            measured.append(_timed(work.implementations[name], work.calls))
        if i % max(3, rounds // 8) == 0:
            bandwidths.append(read_bandwidth())
    least, bound = _bound(work, statistics.median(bandwidths))
    ours = statistics.median(next(iter(times.values())))
    for name, (error, peak, note) in errors.items():
        measured = times.get(name)
        median = statistics.median(measured) if measured else None
        rows.append(
            Row(
                case.op,
                case.shape,
                name,
                median and median * 1e3,
                min(measured) * 1e3 if measured else None,
                median and median / ours,
                error,
                least / median if median and least and name.startswith(OURS) else None,
                bound,
                peak,
                work.data,
                note,
                len(measured or []),
            )
        )
    return rows


def write_json(rows: list[Row], path: Path) -> None:
    """A run as a file that reads well in a diff: the machine, then a line a row, floats in four digits."""
    lines = ",\n".join(json.dumps(_rounded(asdict(row))) for row in rows)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(f'{{"machine": {json.dumps(_rounded(machine()))},\n"rows": [\n{lines}\n]}}\n')
    temporary.replace(path)


def _rounded(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in facts.items()}


def table(rows: list[Row]) -> str:
    """Rows of one case as text, error beside time."""
    lines = []
    for row in rows:
        if row.milliseconds is None:
            lines.append(f"  {row.implementation:<28} {'failed':>12}   {row.note}")
            continue
        shown = f"{row.milliseconds:.3f}" if row.milliseconds < 10 else f"{row.milliseconds:.1f}"
        error = "another result" if math.isnan(row.error) else f"error {row.error:.1e}"
        line = f"  {row.implementation:<28} {shown:>9} ms {row.speedup:>7.2f}x   {error}"
        if row.peak_mib is not None:
            line += f"   +{row.peak_mib:.0f} MiB"
        if row.fraction_of_bound:
            line += f"   {100 * row.fraction_of_bound:.0f} % of {row.bound}"
        lines.append(line)
    return "\n".join(lines)


def module_error(name: str, requirement: str) -> str | None:
    """Why an optional peer cannot be imported, or ``None``."""
    try:
        __import__(name)
    except ImportError as error:
        return f"{requirement} is not installed ({error})"
    return None


def random_layers(count: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Layers [n, d] that share some of their directions, as layers of one network do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, generator=generator)
    return [(shared + (1 + i / count) * torch.randn(n, d, generator=generator)).to(dtype) for i in range(count)]
