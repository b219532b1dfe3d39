"""The same cases under pytest-benchmark: `pytest benchmarks`. Correctness is asserted before timing.

Group = op and shape, parameter = implementation. For ratios use `pyrepr bench`, which interleaves implementations.
"""

from __future__ import annotations

import functools

import pytest
import torch
from pyrepr.benchmarks.command import FAMILIES, cases_of
from pyrepr.benchmarks.harness import OURS, bounds, machine, peak_memory

CASES = {f"{family}: {case.name}": case for family in FAMILIES for case in cases_of(family)}


@functools.lru_cache(maxsize=1)
def made(name):
    """One case at a time in memory: its workload and its truth."""
    case = CASES[name]
    with case.its_threads():
        work = case.make()
        return work, work.truth()


def implementations_of(name):
    case = CASES[name]
    with case.its_threads():
        return list(case.make().implementations)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, implementation) for name in CASES for implementation in implementations_of(name)],
)
def test_benchmark(benchmark, name, implementation):
    with CASES[name].its_threads():
        measure(benchmark, name, implementation)


def measure(benchmark, name, implementation):
    work, truth = made(name)
    function = work.implementations[implementation]
    result, peak = peak_memory(function)
    error = work.error(work.result(result), truth)
    if implementation.startswith(OURS):
        assert error <= work.tolerance
    benchmark.group = name
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)
    most = bounds(torch.get_num_threads())
    benchmark.extra_info.update({**machine(), **most}, max_relative_error=error, peak_memory_mib=peak, data=work.data)
    seconds = benchmark.stats.stats.median
    if work.flops:
        benchmark.extra_info["gflops"] = work.flops / seconds / 1e9
        if "fma_peak_gflops" in most:
            benchmark.extra_info["fraction_of_fma_peak"] = work.flops / seconds / 1e9 / most["fma_peak_gflops"]
    if work.bytes:
        benchmark.extra_info["gb_per_s"] = work.bytes / seconds / 1e9
        if "read_bandwidth_gbs" in most:
            benchmark.extra_info["fraction_of_bandwidth"] = work.bytes / seconds / 1e9 / most["read_bandwidth_gbs"]
