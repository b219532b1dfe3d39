"""`python -m pyrepr.gpu_check` without a GPU: it says so; and its dry run goes through every section and records what
fails, ends its process or hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyrepr.benchmarks import report
from pyrepr.benchmarks.gpu import GpuCase, Problem, runner, timing, verdict, worker

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing interpreted"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, "-m", "pyrepr.gpu_check", "--out", tmp_path / "out"]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 2
    assert result.stdout == (
        "gpu_check needs a CUDA device and PyTorch sees none: nothing was run, nothing was written.\n"
    )
    assert not (tmp_path / "out").exists()


@NEEDS_TRITON
def test_dry_run_of_a_real_family(tmp_path):
    command = [sys.executable, "-m", "pyrepr.gpu_check", "--dry-run", "--families", "gram", "--out", "out"]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    run = json.loads((tmp_path / "out/gpu.json").read_text())
    assert run["finished"] and run["dry_run"] and run["machine"]["device"] == "CPU (dry run)"
    checks = [r for r in run["records"] if r["section"] == "check"]
    assert checks and all(r["error"] <= r["tolerance"] for r in checks)
    assert any(r["implementation"] == "pyrepr triton" for r in run["records"] if r["section"] == "time")
    assert "**pyrepr triton**" in (tmp_path / "out/gpu.md").read_text()
    assert not list((tmp_path / "out").glob("*.partial"))
    # What was made without a GPU is no result.
    assert report.gpu_section(tmp_path / "out") == "GPU: not measured yet."


FAMILY = """
import os, time
from pyrepr.benchmarks.gpu import GpuCase, Problem
import torch

def made(run, peers=None):
    x = torch.ones(3)
    return lambda device, dtype, seed: Problem(lambda: run(x), lambda: x.double(), peers or {}, flops=3e6)

def fail(x):
    raise ValueError("made to fail")

def cases():
    exact = {torch.float32: 0.0}
    def case(op, run, **options):
        return GpuCase(op, "n=3", made(run, options.pop("peers", None)), exact, ("cpu",), sanitize=True, **options)
    return [
        case("good", lambda x: x.clone(), timed=True, peers={"twice": lambda: torch.ones(3), "poor": lambda: fail(0)}),
        case("wrong", lambda x: 2 * x),
        case("raising", fail),
        case("dying", lambda x: os._exit(7)),
        case("last", lambda x: x.clone()),
    ]
"""


@pytest.fixture
def fake_family(tmp_path, monkeypatch):
    """A family of its own in the worker processes, put there by a sitecustomize on their path."""
    (tmp_path / "fake.py").write_text(FAMILY)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc, importlib.util\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pyrepr.benchmarks.gpu.fake':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(tmp_path / 'fake.py')!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return "fake"


def test_failures_are_recorded_and_do_not_end_the_run(fake_family, tmp_path):
    state = runner.Run([], 60, dry=True)
    state.most = None
    state.section("check", fake_family, 30)
    found = {r["op"]: r["failure"] for r in state.records}
    assert found == {
        "good": None,
        "wrong": "error 1.00e+00 is more than 0e+00",
        "raising": "ValueError: made to fail",
        "dying": found["dying"],
        "last": None,
    }
    assert found["dying"].startswith("its process ended with code 7")
    state.section("time", fake_family, 10)
    rows = {r["implementation"]: r for r in state.records if r["section"] == "time" and r["op"] == "good"}
    assert set(rows) == {"pyrepr cpu", "pyrepr reference", "twice", "poor"}
    assert rows["twice"]["milliseconds"] > 0 and rows["poor"]["failure"] == "ValueError: made to fail"
    runner.write(tmp_path / "out", state.report(finished=True))
    text = (tmp_path / "out/gpu.md").read_text()
    assert "fake against float64: dying n=3 cpu float32: its process ended with code 7" in text
    assert "fake against float64 2 of 5" in text
    assert "| poor | ValueError: made to fail |" in text


def test_time_that_is_over_is_said(fake_family):
    state = runner.Run([], 60, dry=True)
    state.most = None
    state.section("check", fake_family, -1)
    assert [r["failure"] for r in state.records] == ["not run: the section's time was over"] * 5


def test_what_is_left_of_a_section_that_hangs_is_counted(fake_family, monkeypatch):
    """A worker that overstays is ended by the runner: here at once."""
    monkeypatch.setattr(runner.Run, "_worker", hanging)
    state = runner.Run([], 60, dry=True)
    state.section("check", fake_family, -1)
    assert [r["failure"] for r in state.records] == ["hung", "not run: 4 more, since the section's time was over"]


def hanging(self, kind, family, options, seconds, shared, tool):
    return "hung", [{"mark": "start", "of": 6, "number": 1, "op": "good"}]


def test_a_peer_that_does_not_come_to_an_end_is_left(monkeypatch):
    monkeypatch.setattr(timing, "FIRST_SECONDS", 0.05)

    def endless():
        while True:
            pass

    x = torch.ones(3)
    problem = Problem(lambda: x.clone(), lambda: x.double(), {"endless": endless, "quick": x.clone}, flops=1)
    case = GpuCase("op", "n=3", lambda *_: problem, {torch.float32: 0.0}, ("cpu",))
    found = timing.time_case((case, torch.float32), torch.device("cpu"), 0.01)
    rows = {r["implementation"]: r for r in found if "mark" not in r}
    assert rows["endless"]["failure"] == "TimeoutError: its first run took more than 0 s"
    assert rows["quick"]["milliseconds"] > 0 and rows["pyrepr cpu"]["milliseconds"] > 0


def test_two_runs_with_different_bits_fail():
    counter = iter(range(9))
    problem = Problem(lambda: torch.tensor(next(counter) * 1e-9), lambda: torch.tensor(1.0))
    case = GpuCase("op", "n=1", lambda *_: problem, {torch.float32: 2.0}, ("cpu",))
    (record,) = worker.check((case, "cpu", torch.float32), torch.device("cpu"), 1.0)
    assert record["failure"] == "two runs gave different bits"


def test_table_of_a_run(tmp_path):
    shared = {"family": "gram", "op": "cka", "shape": "n=9", "dtype": "float32"}
    time = {"section": "time", **shared, "failure": None, "flops": 8e9, "bytes": 1e6, "error": 1e-7, "peak_mib": 3.2}
    run = {
        "date": "D",
        "commit": "C",
        "driver": "7",
        "dry_run": False,
        "finished": True,
        "machine": {"device": "A GPU", "torch": "2", "cuda": "13"},
        "records": [
            {"section": "machine", "op": "copy", "bound": "copy", "value": 100.0, "unit": "GB/s"},
            {
                "section": "machine",
                "op": "matrix product float32",
                "bound": "matrix product float32",
                "value": 40.0,
                "unit": "TFLOP/s",
            },
            {**time, "implementation": "pyrepr triton", "milliseconds": 0.4},
            {**time, "implementation": "pyrepr cuda", "milliseconds": 0.8},
            {**time, "implementation": "plain torch", "milliseconds": 2000.0, "error": "inf"},
            {"section": "check", **shared, "backend": "triton", "failure": None},
            {"section": "check", **shared, "backend": "cuda", "failure": "not run: the section's time was over"},
        ],
    }
    (tmp_path / "gpu_a.json").write_text(json.dumps(run))
    assert report.gpu_section(tmp_path).splitlines() == [
        "A GPU, driver 7, torch 2, cuda 13, commit C, D. Measured in the same run: copy 100 GB/s, "
        "matrix product float32 40 TFLOP/s.",
        "",
        "| op | shape | dtype | implementation | ms | × | error | extra MiB | of bound |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
        "| cka | n=9 | float32 | **pyrepr triton** | 0.4 | 1.00 | 1e-07 | 3 | 50 % |",
        "|  |  |  | **pyrepr cuda** | 0.8 | 2.00 | 1e-07 | 3 | 25 % |",
        "|  |  |  | plain torch | 2000 | 5000.00 | inf | 3 |  |",
        "",
        "Passed: gram against float64 1 of 1. Not run: 1.",
    ]


def test_batch_at_which_a_dense_layer_takes_over():
    from pyrepr.benchmarks.gpu import lookup
    from pyrepr.benchmarks.report import gpu_markdown

    shared = {
        "section": "time",
        "family": "lookup",
        "op": "lookup forward",
        "dtype": "bfloat16",
        "flops": 1,
        "bytes": 1,
    }
    times = {"F.linear bf16": (4.0, 4.0, 4.0), "pyrepr triton": (2.0, 8.0, 99.0), "pyrepr cuda": (1.0, 16.0)}
    records = [
        {**shared, "bytes": 1, "shape": f"T={tokens} d=h=4096 τ=8", "implementation": name, "milliseconds": ms}
        for name, row in times.items()
        for tokens, ms in zip((1, 64, 1024), row, strict=False)
    ]
    run = {"machine": {}, "records": records, "finished": True, "driver": "", "commit": "", "date": ""}
    # The fastest takes 1/4 of the dense layer's time at 1 and 2 of them at 64: two thirds of the way in log T.
    assert "F.linear takes over at about T = 16 (between the measured 1 and 64)" in gpu_markdown(run)
    faster = [r for r in records if r["shape"].startswith("T=1 ")]
    assert "faster up to T = 1," in lookup.notes(faster)[0]
    assert lookup.notes([{**r, "milliseconds": None} for r in records]) == []


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"--families must be among gram, .*got 'grams'"):
        runner.Run(["grams"], 1, dry=True)


def test_every_gpu_default_has_its_measurement():
    """The rule of pyrepr/backend.py: what a recorded run of gpu_check proves, by its records, not by what it says."""
    from pyrepr.backend import GPU_ORDER

    results = Path(__file__).parents[1] / "benchmarks/results"
    assert unproven(GPU_ORDER, results) == []


def unproven(order, results):
    runs = [json.loads(path.read_text()) for path in results.glob("gpu*.json")]
    proven = [verdict.order(run["records"]) for run in runs if not run["dry_run"]]
    return [op for op, backends in order.items() if list(backends) not in [run.get(op) for run in proven]]


def test_a_default_without_its_measurement_is_found(tmp_path):
    shared = {"family": "gram", "ops": ["gram_stats"], "failure": None}
    time = {**shared, "section": "time", "op": "cka", "shape": "n=9", "milliseconds": 1.0}
    records = [
        {**shared, "section": "check", "backend": "triton"},
        {**time, "implementation": "pyrepr triton"},
        {**time, "implementation": "pyrepr reference", "milliseconds": 2.0, "ops": []},
    ]
    (tmp_path / "gpu_h100.json").write_text(json.dumps({"dry_run": False, "records": records}))
    assert unproven({"gram_stats": ("triton",)}, tmp_path) == []
    assert unproven({"gram_stats": ("cuda",), "gram_matrix": ("triton",)}, tmp_path) == ["gram_stats", "gram_matrix"]
    (tmp_path / "gpu_h100.json").write_text(json.dumps({"dry_run": True, "records": records}))
    assert unproven({"gram_stats": ("triton",)}, tmp_path) == ["gram_stats"]
