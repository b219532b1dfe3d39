"""`python -m pyrepr.gpu_check` without a GPU: it says so; and its dry run goes through every section and records what
fails, ends its process or hangs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyrepr.benchmarks import report
from pyrepr.benchmarks.gpu import GpuCase, Problem, plan, runner, timing, verdict, worker

from pyrepr import _ptxas, gpu_check

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


@pytest.mark.parametrize(
    ("error", "capability", "said"),
    [
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update."),
            None,
            "a CUDA device and PyTorch sees none (The NVIDIA driver on your system is too old (found version 11040)): ",
        ),
        (
            RuntimeError("Found no NVIDIA driver on your system. Please check."),
            None,
            "a CUDA device and PyTorch sees none (Found no NVIDIA driver on your system): ",
        ),
        (AssertionError("Torch not compiled with CUDA enabled"), None, "a CUDA device and PyTorch sees none: "),
        (None, (7, 5), "sm_80 or newer, and Some GPU is sm_75: "),
    ],
)
def test_a_machine_that_will_not_do_is_told_why(error, capability, said, monkeypatch, tmp_path, capsys):
    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out == f"gpu_check needs {said}nothing was run, nothing was written.\n"
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


def test_time_that_is_over_is_said(fake_family, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 60.0)  # a busy machine takes long to start a worker
    state = runner.Run([], 60, dry=True)
    state.most = None
    state.section("check", fake_family, -1)
    assert [r["failure"] for r in state.records] == ["not run: the section's time was over"] * 5


def test_nothing_is_prepared_when_the_time_is_over(monkeypatch):
    state, asked = runner.Run([], 60, dry=False), []
    monkeypatch.setattr(state, "section", lambda *arguments, **options: asked.append(arguments[:2]))
    state.prepare([("gram", "cka")], 0.0)
    assert not asked
    state.prepare([("gram", "cka")], 1.0)
    assert asked == [("prepare", "gram")] * min(3, state.processors)


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


def test_unknown_stage_is_refused():
    with pytest.raises(ValueError, match=r"--stages must be among machine, right, .*got 'rigth'"):
        runner.Run(None, 1, dry=True, names=["rigth"])
    assert [stage.name for stage in runner.Run(None, 1, dry=True, names=["cka", "machine"]).stages] == [
        "cka",
        "machine",
    ]


def test_every_timed_case_has_one_stage_and_every_aim_a_timed_case():
    timed = {}
    for family in runner.FAMILIES:
        for case in importlib.import_module(f"pyrepr.benchmarks.gpu.{family}").cases():
            if case.timed:
                timed[family, case.op, case.shape] = case.timed_dtypes or tuple(case.tolerance)
    patterns = [(family, pattern) for stage in plan.STAGES for family, pattern in stage.timed]
    for family, op, _ in timed:
        assert sum(family == f and re.match(p, op) is not None for f, p in patterns) == 1, (family, op)
    aimed = {(family, op, shape) for family, op, shape, *_ in verdict._aims()}
    assert {rule for _, op, _ in aimed for rule in ("plain", "gated", "kda") if op.startswith(rule)} == {
        "plain",
        "gated",
        "kda",
    }
    assert [aim for aim in sorted(aimed) if torch.bfloat16 not in timed.get(aim, ())] == []


def test_a_report_of_nothing_shows_every_aim(tmp_path):
    state = runner.Run(None, 60, dry=True)
    runner.write(tmp_path, state.report(finished=False))
    text = (tmp_path / "gpu.md").read_text()
    assert "The run did not finish." in text
    assert text.count("unmeasured: pyrepr has no time") == len(list(verdict._aims()))


def record(section, op="cka", failure=None, assembler=None, **more):
    found = {"family": "gram", "section": section, "op": op, "shape": "n=9", "failure": failure, **more}
    return found if assembler is None else {**found, "assembler": assembler}


def test_a_check_that_did_not_run_disqualifies_nothing():
    took = {"ops": ["gram_stats"]}
    right = record("check", backend="triton", **took)
    times = [
        record("time", implementation="pyrepr triton", milliseconds=1.0, **took),
        record("time", implementation="pyrepr reference", milliseconds=2.0, ops=[]),
    ]
    unmeasured = record("check", failure="not run: the section's time was over", backend="triton")
    stopped = record("check", failure="it was still running when the section's time was over", backend="triton")
    assert verdict.order([right, *times, unmeasured, stopped]) == {"gram_stats": ["triton"]}
    assert verdict.ops([right, *times, unmeasured, stopped]) == [
        {"op": "gram_stats", "backend": "triton", "right": 2, "failed": 0, "unmeasured": 2}
    ]
    # What failed is enough, whichever ops it would have taken.
    assert verdict.order([right, *times, record("check", failure="it hung", backend="triton")]) == {}
    assert verdict.order([right, *times, record("check", "other", "it hung", backend="triton")]) == {}
    other = record("check", "other", backend="triton", ops=["gram_median"])
    assert verdict.order([right, *times, other, record("check", "other", "it hung", backend="triton")]) != {}


def test_only_the_assembler_that_was_timed_counts():
    took = {"ops": ["gram_stats"], "backend": "triton"}
    times = [
        record("time", implementation="pyrepr triton", milliseconds=1.0, assembler="new", ops=["gram_stats"]),
        record("time", implementation="pyrepr reference", milliseconds=2.0, assembler="new", ops=[]),
    ]
    old = record("right", failure="3 of 20 runs gave different bits", assembler="old", **took)
    assert verdict.order([old, record("right", assembler="new", **took), *times]) == {"gram_stats": ["triton"]}
    assert verdict.order([{**old, "assembler": "new"}, *times]) == {}


def test_the_newest_assembler_that_is_right_is_taken(monkeypatch):
    found = [plan.Assembler("bundled", None, (12, 8, 93)), plan.Assembler("carried", "/p", (13, 1, 80))]
    monkeypatch.setattr(plan, "assemblers", lambda carried: found)
    for wrong, expected in (("bundled", "carried"), ("carried", "bundled"), ("", "carried"), ("both", "carried")):
        state = runner.Run(None, 60, dry=True, names=["right"])
        state.assemblers = found

        def check(seconds, kind, state=state, wrong=wrong):
            failure = "wrong" if wrong in (state.assembler.name, "both") else None
            state._add(record("right", failure=failure, backend="triton", ops=["x"]))

        monkeypatch.setattr(state, "check", check)
        state.right(1.0)
        assert state.assembler.name == expected
    assert state._environment("time")["TRITON_PTXAS_PATH"] == "/p"


def test_two_runs_into_one_folder_are_refused(tmp_path):
    with runner._alone(tmp_path), pytest.raises(RuntimeError, match="another gpu_check is at work"):
        runner.run(tmp_path, None, 1, True)


def test_an_out_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "pyrepr.gpu_check", "--dry-run", "--built", "--out", tmp_path / "file"]
    result = subprocess.run(command, text=True, capture_output=True, check=False, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("gpu_check: ")


def test_every_gpu_default_has_its_measurement():
    """The rule of pyrepr/backend.py: what a recorded run of gpu_check proves, by its records, not by what it says."""
    from pyrepr.backend import GPU_ORDER

    results = Path(__file__).parents[1] / "benchmarks/results"
    assert unproven(GPU_ORDER, results) == []


def test_every_trusted_assembler_has_its_run():
    results = Path(__file__).parents[1] / "benchmarks/results"
    runs = [json.loads(path.read_text()) for path in results.glob("gpu*.json")]
    tried = [r for run in runs for r in run["records"] if r["section"] == "right"]
    right = {r["assembler"].split()[-1] for r in tried if verdict.state(r) == "right"}
    right -= {r["assembler"].split()[-1] for r in tried if verdict.state(r) == "failed"}
    assert [version for version in _ptxas.PROVEN if ".".join(map(str, version)) not in right] == []


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
