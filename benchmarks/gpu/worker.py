"""One section of the GPU check, in a process of its own, so that a fault in a kernel ends this process only.

``python -m pyrepr.benchmarks.gpu.worker SECTION FAMILY RECORDS --first I --step N --seconds S [--dry-run]`` works
through the items I, I + N, … of a section. It appends lines of JSON: a mark at the start and at the end of each item,
so that whoever looks after it knows which one ended or stopped it, and the records between them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyrepr.benchmarks.gpu import (
    GpuCase,
    Problem,
    behaviour,
    dtype_name,
    flat,
    forget,
    implementations_taken,
    same_bits,
    strayed,
    synchronise,
    timing,
    tuning,
)

import pyrepr

PRODUCT = 8192  # rows and columns of the matrices whose product is the bound
AGAIN = 20  # runs of a kernel whose assembler is in question
BROKEN = 3  # exit code: the CUDA context is lost, start again behind this item


def family_cases(family: str, dry: bool) -> list[GpuCase]:
    """A family's cases; of a dry run the small ones that the interpreter can run, in their first dtype."""
    cases = importlib.import_module(f"pyrepr.benchmarks.gpu.{family}").cases()
    if not dry:
        return cases
    small = [case for case in cases if case.sanitize and set(case.backends) & {"triton", "cpu"}]
    first = [dict([next(iter(case.tolerance.items()))]) for case in small]
    return [dataclasses.replace(case, tolerance=t) for case, t in zip(small, first, strict=True)]


def check_items(family: str, dry: bool) -> list[tuple[GpuCase, str, torch.dtype]]:
    """All small cases; those that are timed are checked when they are. The kernels' usual dtypes come first."""
    cases = [case for case in family_cases(family, dry) if dry or not case.timed]
    items = [(case, backend, dtype) for case in cases for backend in case.backends for dtype in case.tolerance]
    return sorted(items, key=lambda item: not item[0].sanitize)  # one of every kernel


def right_items(family: str, dry: bool) -> list[tuple[GpuCase, str, torch.dtype]]:
    """One of every kernel, in every dtype."""
    return [item for item in check_items(family, dry) if item[0].sanitize]


def check_again(item: tuple[GpuCase, str, torch.dtype], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """As `check`, and many times over: what an assembler got wrong may be right most of the time."""
    case, backend, dtype = item
    found = check(item, device, seconds)
    problem = case.make(device, dtype, 0)
    with pyrepr.use_backend(backend):
        first = problem.run()
        differ = sum(not same_bits(first, problem.run()) for _ in range(1 if device.type == "cpu" else AGAIN))
    if differ and not found[0]["failure"]:
        found[0]["failure"] = f"{differ} of {AGAIN} runs gave different bits"
    return found


def time_items(family: str, dry: bool) -> list[tuple[GpuCase, torch.dtype]]:
    cases = family_cases(family, dry)
    return [(c, dtype) for c in cases if c.timed or dry for dtype in (c.timed_dtypes or c.tolerance)]


def check(item: tuple[GpuCase, str, torch.dtype], device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """The error against float64, and whether a second run, on a side stream, and a CUDA graph give the same bits."""
    case, backend, dtype = item
    problem = case.make(device, dtype, 0)
    with pyrepr.use_backend(backend):
        with implementations_taken() as taken:
            result = problem.run()
        again = _on_a_side_stream(problem.run, device)
        graph = _graph_failure(problem, result, device) if case.graph and device.type == "cuda" else None
    error = case.error(result, problem.truth())
    tolerance = case.tolerance[dtype]
    if not error <= tolerance:
        failure = f"error {error:.2e} is more than {tolerance:.0e}"
    elif not same_bits(result, again):
        failure = "two runs gave different bits"
    else:
        failure = strayed(taken, backend) or graph
    ops = sorted(op for op, _ in taken)
    return [{"ops": ops, "error": error, "tolerance": tolerance, "failure": failure}]


def _on_a_side_stream(run: Callable[[], Any], device: torch.device) -> Any:
    if device.type != "cuda":
        return run()
    synchronise(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = run()
    synchronise(device)
    return result


def _graph_failure(problem: Problem, expected: Any, device: torch.device) -> str | None:
    """What is wrong with the problem in a CUDA graph: capturing one fails if anything synchronises."""
    kept = [tensor.detach().clone() for tensor in flat(expected)]  # it may be a buffer that the graph writes to again
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = problem.run()
    except Exception as failure:
        return f"it does not go into a CUDA graph: {type(failure).__name__}: {failure}"[:300]
    for tensor in flat(result):
        tensor.detach().zero_()
    graph.replay()
    synchronise(device)
    return None if same_bits(flat(result), kept) else "its CUDA graph gave different bits"


def machine_items(_family: str, _dry: bool) -> list[str]:
    return ["facts", *(f"matrix product {kind}" for kind in ("bfloat16", "float16", "float32", "tf32")), "copy"]


def measure_machine(item: str, device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """What the device is, and what plain PyTorch gets out of it: the bounds everything else is compared with."""
    if item == "facts":
        return [{"facts": facts(device)}]
    clock = timing.clock_of(device)
    size = PRODUCT if device.type == "cuda" else 128
    if item == "copy":
        a = torch.empty(size * size * 4, dtype=torch.float32, device=device)
        b = torch.empty_like(a)
        times = [clock(lambda: b.copy_(a), 0.2)[0] for _ in range(9)]
        return [{"bound": item, "value": 2 * a.nbytes / statistics.median(times) / 1e6, "unit": "GB/s"}]
    kind = item.rsplit(" ", 1)[1]
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        x @ y
        times = [clock(lambda: x @ y, 0.2)[0] for _ in range(9)]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    return [{"bound": item, "value": 2 * size**3 / statistics.median(times) / 1e9, "unit": "TFLOP/s"}]


def facts(device: torch.device) -> dict[str, Any]:
    """The device and the versions, for the report."""
    import importlib.metadata as metadata
    import platform

    found: dict[str, Any] = {"pyrepr": pyrepr.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    found["python"] = platform.python_version()
    for package in ("triton", "fla-core", "pytorch-cka", "numpy"):
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
    synchronise(device)
    return [{"failure": None}]


def behaviour_items(_family: str, _dry: bool) -> list[str]:
    return list(behaviour.ALL)


def behave(item: str, device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    """How the ops behave inside PyTorch: an assertion that fails is the record's failure."""
    if device.type != "cuda":
        return [{"failure": "not run: dry run"}]
    try:
        behaviour.ALL[item]()
        synchronise(device)
    except behaviour.NotHere as reason:
        return [{"failure": f"not run: {reason}"}]
    return [{"failure": None}]


def prepare(item: tuple[GpuCase, torch.dtype], device: torch.device, _seconds: float) -> list[dict[str, Any]]:
    tuning.compile_shard(item, device)
    return []


SECTIONS: dict[str, tuple[Callable, Callable]] = {
    "machine": (machine_items, measure_machine),
    "right": (right_items, check_again),
    "check": (check_items, check),
    "prepare": (time_items, prepare),
    "time": (time_items, timing.time_case),
    "behaviour": (behaviour_items, behave),
    "sanitize": (sanitize_items, run_once),
    "autotune": (time_items, tuning.search),
}


def describe(item: Any) -> dict[str, Any]:
    """What the report calls an item, known before it runs."""
    if isinstance(item, str):
        return {"op": item, "shape": ""}
    found = {"op": item[0].op, "shape": item[0].shape}
    for part in item[1:]:
        found.update({"dtype": dtype_name(part)} if isinstance(part, torch.dtype) else {"backend": part})
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """Which items of a section: every `step`-th from number `first` on, at most `most`; of the first one without the
    implementations that ended a process before."""

    first: int = 0
    step: int = 1
    most: int | None = None
    without: tuple[str, ...] = ()
    ops: str = ""  # a pattern: only the cases of these ops


def records(section: str, family: str, seconds: float, dry: bool, place: Place = Place()) -> Iterator[dict[str, Any]]:
    """Works through a section; yields marks, and between them the records of every item."""
    device = torch.device("cpu" if dry else "cuda")
    make_items, work = SECTIONS[section]
    items = [i for i in make_items(family, dry) if not place.ops or re.match(place.ops, describe(i)["op"])][
        : place.most
    ]
    end = time.monotonic() + seconds
    numbers = range(place.first, len(items), place.step)
    for number in numbers:
        item = items[number]
        shared = {"section": section, "family": family, "number": number, **describe(item)}
        left = end - time.monotonic()
        if left <= 0:
            yield {**shared, "failure": "not run: the section's time was over"}
            continue
        yield {**shared, "mark": "start", "of": len(items)}
        options = {"without": place.without} if place.without and number == place.first else {}
        share = left / (1 + numbers.index(numbers[-1]) - numbers.index(number)) / 2
        try:
            for record in work(item, device, share, **options):
                yield {**shared, **record}
        except timing.Lost:
            raise
        except Exception as failure:
            yield {**shared, "failure": f"{type(failure).__name__}: {failure}"[:600]}
        yield {**shared, "mark": "end"}
        synchronise(device)  # a lost context ends the process here
        forget(device)


def finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("family")
    parser.add_argument("records", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--most", type=int)
    parser.add_argument("--shard", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--without", action="append", default=[])
    parser.add_argument("--ops", default="")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    place = Place(args.first, args.step, args.most, tuple(args.without), args.ops)
    tuning.SHARD = tuple(args.shard)
    with open(args.records, "a") as file:
        try:
            for record in records(args.section, args.family, args.seconds, args.dry_run, place):
                file.write(json.dumps(finite(record), allow_nan=False) + "\n")
                file.flush()
        except Exception as failure:
            print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
