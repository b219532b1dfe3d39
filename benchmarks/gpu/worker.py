"""One section of the GPU check, in a process of its own, so that a fault in a kernel ends this process only.

``python -m pyrepr.benchmarks.gpu.worker SECTION FAMILY RECORDS --first I --seconds S [--dry-run]`` works through the
items of a section from number I on, and appends one line of JSON before (``start``) and after each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyrepr.benchmarks.gpu import GpuCase, Problem

import pyrepr
from pyrepr.backend import _PROBES

FLUSH_BYTES = 512 << 20  # more than any L2
SEEDS = 3
FIRST_SECONDS = 20.0  # what a peer may take for its first run, in which it may compile and tune; what it found is kept
BROKEN = 3  # exit code: the CUDA context is lost, start again behind this item


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, (list, tuple)):
        return [t for part in result if part is not None for t in _flat(part)]
    return [torch.as_tensor(result)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    """Gives memory back that nothing holds any more: the next case may need all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def family_cases(family: str, dry: bool) -> list[GpuCase]:
    """A family's cases; of a dry run the small ones that the interpreter can run, in their first dtype."""
    cases = importlib.import_module(f"pyrepr.benchmarks.gpu.{family}").cases()
    if not dry:
        return cases
    small = [case for case in cases if case.sanitize and set(case.backends) & {"triton", "cpu"}]
    first = [dict([next(iter(case.tolerance.items()))]) for case in small]
    return [dataclasses.replace(case, tolerance=t) for case, t in zip(small, first, strict=True)]


def check_items(family: str, dry: bool) -> list[tuple[GpuCase, str, torch.dtype]]:
    cases = family_cases(family, dry)
    return [(case, backend, dtype) for case in cases for backend in case.backends for dtype in case.tolerance]


def time_items(family: str, dry: bool) -> list[tuple[GpuCase, torch.dtype]]:
    cases = family_cases(family, dry)[: 1 if dry else None]
    return [(c, dtype) for c in cases if c.timed or dry for dtype in (c.timed_dtypes or c.tolerance)]


def check(item: tuple[GpuCase, str, torch.dtype], device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """The error against float64, and whether a second run, on a side stream, and a CUDA graph give the same bits."""
    case, backend, dtype = item
    problem = case.make(device, dtype, 0)
    with pyrepr.use_backend(backend):
        result = problem.run()
        _synchronise(device)
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                again = problem.run()
            _synchronise(device)
        else:
            again = problem.run()
        graph = _graph_failure(problem, result, device) if case.graph and device.type == "cuda" else None
    error = case.error(result, problem.truth())
    tolerance = case.tolerance[dtype]
    if not error <= tolerance:
        failure = f"error {error:.2e} is more than {tolerance:.0e}"
    else:
        failure = graph if _same_bits(result, again) else "two runs gave different bits"
    return [
        {"backend": backend, "dtype": dtype_name(dtype), "error": error, "tolerance": tolerance, "failure": failure}
    ]


def _same_bits(a: Any, b: Any) -> bool:
    pairs = zip(_flat(a), _flat(b), strict=True)
    return all(torch.equal(x.nan_to_num(0.0), y.nan_to_num(0.0)) for x, y in pairs)


def _graph_failure(problem: Problem, expected: Any, device: torch.device) -> str | None:
    """What is wrong with the problem in a CUDA graph: capturing one fails if anything synchronises."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = problem.run()
    except Exception as failure:
        return f"it does not go into a CUDA graph: {type(failure).__name__}: {failure}"[:300]
    for tensor in _flat(result):
        tensor.detach().zero_()
    graph.replay()
    _synchronise(device)
    return None if _same_bits(result, expected) else "its CUDA graph gave different bits"


def _timer(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Milliseconds of one call with a cold L2 between device events. The flush also hides the time to launch."""
    if device.type == "cpu":

        def by_clock(function: Callable[[], Any]) -> float:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)

        return by_clock
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def by_events(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return by_events


def _under(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    def function() -> Any:
        with pyrepr.use_backend(backend):
            return run()

    return function


def _implementations(case: GpuCase, problem: Problem) -> dict[str, Callable[[], Any]]:
    ours = [backend for backend in case.backends if _PROBES[backend]()[0]]
    functions = {f"pyrepr {backend}": _under(backend, problem.run) for backend in ours}
    return {**functions, "pyrepr reference": _under("reference", problem.run), **problem.peers}


def _problems(case: GpuCase, device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """The same problem on several inputs, as many as leave half of the memory free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    problems = [case.make(device, dtype, 0)]
    if device.type == "cuda":
        taken = free - torch.cuda.mem_get_info(device)[0]
        problems += [case.make(device, dtype, seed) for seed in range(1, SEEDS) if 2 * (seed + 1) * taken < free]
    return problems


@contextlib.contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
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
    _synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    _synchronise(device)
    return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def time_case(item: tuple[GpuCase, torch.dtype], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Every implementation in turn, round after round, on rotating inputs; medians. Errors beside the times."""
    case, dtype = item
    problems = _problems(case, device, dtype)
    functions = [_implementations(case, problem) for problem in problems]
    clock = _timer(device)
    rows: dict[str, dict[str, Any]] = {}
    truth: Any = None
    try:
        truth = problems[0].truth()
    except Exception as failure:
        print(f"{case.name}: no truth: {failure}", file=sys.stderr)
    for name, function in functions[0].items():
        row = rows[name] = {"dtype": dtype_name(dtype), "implementation": name, "failure": None, "rounds": []}
        try:
            with _at_most(FIRST_SECONDS if name in problems[0].peers else None):
                result, row["peak_mib"] = _first_run(function, device)
            row["error"] = None if truth is None else case.error(result, truth)
            row["first"] = clock(function)
        except Exception as failure:
            _synchronise(device)  # a lost context ends the process here
            _forget(device)
            row["failure"] = f"{type(failure).__name__}: {failure}"[:300]
        result = None
    truth = None
    running = [name for name, row in rows.items() if row["failure"] is None]
    round_seconds = sum(rows[name].pop("first") for name in running) / 1e3 + 1e-3 * len(running)
    for i in range(max(1 if device.type == "cpu" else 3, min(100, int(seconds / round_seconds)))):
        for name in running:
            rows[name]["rounds"].append(clock(functions[i % len(functions)][name]))
    for name in running:
        row = rows[name]
        row["milliseconds"], row["best"] = statistics.median(row["rounds"]), min(row["rounds"])
        row["flops"], row["bytes"] = problems[0].flops, problems[0].bytes
    return list(rows.values())


def machine_items(_family: str, _dry: bool) -> list[str]:
    return ["facts", "matrix product bfloat16", "matrix product float16", "matrix product float32", "copy"]


def measure_machine(item: str, device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """What the device is, and what plain PyTorch gets out of it: the bounds everything else is compared with."""
    if item == "facts":
        return [{"facts": facts(device)}]
    clock = _timer(device)
    size = 8192 if device.type == "cuda" else 128
    if item == "copy":
        a = torch.empty(size * size * 4, dtype=torch.float32, device=device)
        b = torch.empty_like(a)
        times = [clock(lambda: b.copy_(a)) for _ in range(9)]
        return [{"bound": item, "value": 2 * a.nbytes / statistics.median(times) / 1e6, "unit": "GB/s"}]
    dtype = getattr(torch, item.rsplit(" ", 1)[1])
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    x @ y
    times = [clock(lambda: x @ y) for _ in range(9)]
    return [{"bound": item, "value": 2 * size**3 / statistics.median(times) / 1e9, "unit": "TFLOP/s"}]


def facts(device: torch.device) -> dict[str, Any]:
    """The device and the versions, for the report."""
    import importlib.metadata as metadata
    import platform

    found: dict[str, Any] = {"pyrepr": pyrepr.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    found["python"] = platform.python_version()
    for package in ("triton", "flash-linear-attention", "pytorch-cka"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (dry run)"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"sm_{properties.major}{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    found["backends"] = {name: backend.detail for name, backend in pyrepr.backends().items()}
    return found


def sanitize_items(family: str, dry: bool) -> list[tuple[GpuCase, str]]:
    return [(case, b) for case in family_cases(family, dry) if case.sanitize for b in case.backends]


def run_once(item: tuple[GpuCase, str], device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """What compute-sanitizer watches: the problem of the first dtype, once."""
    case, backend = item
    problem = case.make(device, next(iter(case.tolerance)), 0)
    with pyrepr.use_backend(backend):
        problem.run()
    _synchronise(device)
    return [{"backend": backend}]


def prepare_items(family: str, dry: bool) -> list[tuple[GpuCase, str, torch.dtype]]:
    return [item for item in check_items(family, dry) if not item[0].timed and item[1] == "triton"]


def compile_once(item: tuple[GpuCase, str, torch.dtype], device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """Triton compiles at the first launch and keeps what it made on disk: several processes do that at a time."""
    case, backend, dtype = item
    with pyrepr.use_backend(backend):
        case.make(device, dtype, 0).run()
    return []


SECTIONS: dict[str, tuple[Callable, Callable]] = {
    "machine": (machine_items, measure_machine),
    "prepare": (prepare_items, compile_once),
    "check": (check_items, check),
    "time": (time_items, time_case),
    "sanitize": (sanitize_items, run_once),
}


def describe(item: Any) -> dict[str, Any]:
    """What the report calls an item, known before it runs."""
    if isinstance(item, str):
        return {"op": item, "shape": ""}
    found = {"op": item[0].op, "shape": item[0].shape}
    for part in item[1:]:
        found.update({"dtype": dtype_name(part)} if isinstance(part, torch.dtype) else {"backend": part})
    return found


def records(
    section: str, family: str, seconds: float, dry: bool, first: int = 0, step: int = 1, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """Works through a section; yields a ``start`` line and then the records of every item."""
    device = torch.device("cpu" if dry else "cuda")
    make_items, work = SECTIONS[section]
    items = make_items(family, dry)[:most]
    end = time.monotonic() + seconds
    for number in range(first, len(items), step):
        item = items[number]
        shared = {"section": section, "family": family, "number": number, **describe(item)}
        left = end - time.monotonic()
        if left <= 0:
            yield {**shared, "failure": "not run: the section's time was over"}
            continue
        yield {**shared, "start": True, "of": len(items)}
        try:
            for record in work(item, device, left / (len(items) - number) / 2):
                yield {**shared, **record}
        except Exception as failure:
            yield {**shared, "failure": f"{type(failure).__name__}: {failure}"[:600]}
            _synchronise(device)
        _forget(device)


def finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("family")
    parser.add_argument("records", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--most", type=int)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    with open(args.records, "a") as file:
        try:
            place = (args.first, args.step, args.most)
            for record in records(args.section, args.family, args.seconds, args.dry_run, *place):
                file.write(json.dumps({key: finite(value) for key, value in record.items()}) + "\n")
                file.flush()
        except Exception as failure:
            print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
