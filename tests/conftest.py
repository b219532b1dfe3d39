"""Shared by all tests: seeds, and the one lawful skip, a missing GPU, counted and shown at the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import pyrepr

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests

MINUTES = ("test_faults", "test_gpu_check", "test_native", "test_persistence", "test_triton_interpreter")


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "tests/fuzz, run by -m fuzz")
    group.addoption("--fuzz-seconds", type=float, default=120, help="for all families together (default: %(default)s)")
    group.addoption("--fuzz-cases", type=int, default=0, help="most cases of a family and level (default: no limit)")
    group.addoption("--fuzz-seed", type=int, default=0, help="what the cases are drawn from (default: %(default)s)")


def pytest_configure(config):
    config.addinivalue_line("markers", "fuzz: random calls for a time; left out unless -m fuzz asks for them")
    config.addinivalue_line("markers", "levels: run again at every SIMD level that this machine has (test_native.py)")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, and counted, where there is none")
    config.addinivalue_line("markers", "build: runs CMake and compilers; left out unless asked for by -m build")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in MINUTES)  # these first: two processes then end together
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: this kernel was not run here"))


def pytest_terminal_summary(terminalreporter):
    reports = [report for group in terminalreporter.stats.values() for report in group]
    properties = [dict(getattr(report, "user_properties", ())) for report in reports]
    fuzzed = [found for found in properties if "calls" in found]
    faults = sum(found.get("faults", 0) for found in properties)
    if faults:
        terminalreporter.write_line(f"faults injected: {faults}")
    if fuzzed:
        sums = {key: sum(one[key] for one in fuzzed) for key in ("cases", "calls", "values", "refused")}
        terminalreporter.write_line(
            "fuzzed: {cases} cases, {calls} calls, {values} values, {refused} refusals".format(**sums)
        )
    terminalreporter.write_line("pyrepr backends:")
    terminalreporter.write_line(str(pyrepr.backends()))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def away_from_the_sources(tmp_path, monkeypatch):
    """Python looks in the working directory first: in a clone it would find the sources, not the install."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    with pyrepr.use_backend(request.param):
        yield request.param
