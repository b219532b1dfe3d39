"""The code of `pyrepr.gpu_check` that a GPU alone would run, with a device that only says it is one: its tensors are
the CPU's, its events count, its graphs give what they recorded."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from pyrepr.benchmarks.gpu import GpuCase, Problem, runner, timing, tuning, verdict, worker

import pyrepr
from pyrepr import gpu_check

F32 = torch.float32
DEVICE = types.SimpleNamespace(type="cuda")


class Event:
    clock = itertools.count()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = next(self.clock)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 2.0 * (end.time - self.time)


class Graph:
    """Records nothing: a replay puts back what was zeroed, or something else."""

    right = True

    def replay(self):
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value if self.right else value + 1)


@pytest.fixture
def fake_gpu(monkeypatch):
    """What happens to the device, in order."""
    happened = []

    @contextlib.contextmanager
    def capture(graph):
        happened.append("capture")
        Graph.tensors = []
        yield
        graph.values = [tensor.clone() for tensor in Graph.tensors]

    @contextlib.contextmanager
    def on_stream(stream):
        happened.append("side stream")
        yield

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 64)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": on_stream,
        "synchronize": lambda device=None: happened.append("synchronize"),
        "_sleep": lambda cycles: happened.append(("sleep", cycles)),
        "empty_cache": lambda: happened.append("empty cache"),
        "mem_get_info": lambda device: (80 << 30, 80 << 30),
        "memory_allocated": lambda device: 1 << 20,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 3 << 20,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return happened


def case_of(run, peers=None, **options):
    def make(device, dtype, seed):
        x = torch.full((3,), float(seed + 1))
        return Problem(lambda: run(x), lambda: x.double(), peers or {}, flops=1e9, bytes=1e6)

    return GpuCase("op", "n=3", make, {F32: 0.0}, ("reference",), **options)


def rows_of(case, seconds=0.1):
    found = list(timing.time_case((case, F32), DEVICE, seconds))
    return {r["implementation"]: r for r in found if "mark" not in r}


def test_times_between_events_with_the_launches_ahead(fake_gpu):
    rows = rows_of(case_of(lambda x: x.clone(), {"peer": lambda: torch.ones(3)}))
    assert set(rows) == {"pyrepr reference", "peer"}
    ours = rows["pyrepr reference"]
    assert ours["milliseconds"] == ours["best"] == 2.0 and ours["error"] == 0 and ours["peak_mib"] == 2.0
    assert len(ours["rounds"]) > 3 and ours["host_milliseconds"] < 2
    assert any(what[0] == "sleep" and 0 < what[1] <= timing.CYCLES * timing.AHEAD for what in fake_gpu)
    json.dumps(rows, allow_nan=False)


def test_a_lost_context_ends_the_process_and_says_why(fake_gpu, monkeypatch):
    def fail(x):
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise RuntimeError("an illegal memory access was encountered")

    def lost(device=None):
        raise RuntimeError("sticky")

    with pytest.raises(timing.Lost, match="illegal memory access"):
        list(timing.time_case((case_of(fail), F32), DEVICE, 0.1))
    monkeypatch.setitem(
        worker.SECTIONS, "check", (lambda family, dry: [(case_of(fail), "reference", F32)], worker.check)
    )
    monkeypatch.setattr(worker.torch, "device", lambda kind: DEVICE)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    seen = []
    with pytest.raises(RuntimeError, match="sticky"):
        for record in worker.records("check", "f", 5, False):
            seen.append(record)
    assert "illegal memory access" in seen[1]["failure"] and seen[-1]["mark"] == "end"


def test_what_fails_between_rounds_does_not_take_the_others_with_it(fake_gpu):
    calls = itertools.count()

    def peer():
        if next(calls) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return torch.ones(3)

    rows = rows_of(case_of(lambda x: x.clone(), {"peer": peer}))
    assert rows["peer"]["failure"] == "OutOfMemoryError: out of memory" and "milliseconds" not in rows["peer"]
    assert rows["pyrepr reference"]["milliseconds"] == 2.0


def test_wrong_numbers_and_changing_bits_are_failures_beside_their_times(fake_gpu):
    assert rows_of(case_of(lambda x: 2 * x))["pyrepr reference"]["failure"] == "error 1.00e+00 is more than 0e+00"
    counter = itertools.count()

    def make(*_):
        return Problem(lambda: torch.tensor(float(next(counter))), lambda: torch.tensor(1.0))

    row = rows_of(GpuCase("op", "n", make, {F32: 99.0}, ("reference",)))["pyrepr reference"]
    assert row["failure"] == "two runs gave different bits" and row["milliseconds"] == 2.0


def checked(case):
    (record,) = worker.check((case, "reference", F32), DEVICE, 1.0)
    return record


def graphed(x):
    y = x.clone()
    Graph.tensors = [y]
    return y


def test_check_on_a_side_stream_and_in_a_graph(fake_gpu, monkeypatch):
    record = checked(case_of(graphed, graph=True))
    assert record == {"ops": [], "error": 0.0, "tolerance": 0.0, "failure": None}
    assert fake_gpu.index("side stream") < fake_gpu.index("capture")
    monkeypatch.setattr(Graph, "right", False)
    assert checked(case_of(graphed, graph=True))["failure"] == "its CUDA graph gave different bits"

    def synchronising(x):
        if fake_gpu.count("capture") > 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x.clone()

    assert "does not go into a CUDA graph: RuntimeError" in checked(case_of(synchronising, graph=True))["failure"]


def test_an_op_that_ran_in_another_backend_is_a_failure(fake_gpu):
    """As a backward would whose thread does not know what was forced."""
    x = torch.randn(9, 3)

    def run(_):
        with pyrepr.use_backend("cpu"):
            return pyrepr.cka(x, x)

    case = GpuCase("op", "n", lambda *_: Problem(lambda: run(x), lambda: run(x)), {F32: 1e-3}, ("reference",))
    assert checked(case)["failure"] == "ran elsewhere than in reference: gram_hsic_at_once in cpu"
    assert checked(case)["ops"] == ["gram_hsic_at_once"]


def test_bounds_of_the_machine(fake_gpu, monkeypatch):
    monkeypatch.setattr(worker, "PRODUCT", 8)
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, device=None: randn(*a))
    records = [worker.measure_machine(item, DEVICE, 1)[0] for item in worker.machine_items("all", False)[1:]]
    assert [r["bound"].split()[-1] for r in records] == ["bfloat16", "float16", "float32", "tf32", "copy"]
    assert all(r["value"] > 0 for r in records) and not torch.backends.cuda.matmul.allow_tf32


FAMILY = """
import os, time
from pyrepr.benchmarks.gpu import GpuCase, Problem
import torch

def cases():
    def make(device, dtype, seed):
        x = torch.ones(3)
        peers = {"dying": lambda: os._exit(7), "hanging": lambda: time.sleep(60), "good": x.clone}
        return Problem(x.clone, x.double, peers, flops=3e6)
    return [GpuCase("op", f"n={n}", make, {torch.float32: 0.0}, ("cpu",), sanitize=True, timed=True) for n in (3, 4)]
"""


@pytest.fixture
def fake_family(tmp_path, monkeypatch):
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


def test_an_implementation_that_dies_or_hangs_is_left_out_and_the_others_measured(fake_family, monkeypatch):
    monkeypatch.setitem(runner.SILENCE, "time", 10.0)
    state = runner.Run([], 60, dry=True)
    state.section("time", fake_family, 60)
    rows = {r["implementation"]: r for r in state.records}
    assert rows["dying"]["failure"].startswith("its process ended with code 7")
    assert rows["hanging"]["failure"] == "it hung: no sign for 10 s" and rows["hanging"]["shape"] == "n=3"
    assert rows["good"]["milliseconds"] > 0 and rows["pyrepr cpu"]["milliseconds"] > 0
    assert len(state.records) == 5


def test_stopping_ends_the_workers_and_leaves_a_report(fake_family, tmp_path):
    state = runner.Run([], 60, dry=True)
    state.stopped = True
    state.section("time", fake_family, 60)
    assert state.records[0]["failure"] == "it was still running when the section's time was over"
    state.live[tmp_path / "records"] = {"section": "check", "family": "gram"}
    (tmp_path / "records").write_text(json.dumps({"op": "half", "failure": None}) + "\n" + '{"op": "cut o')
    runner.write(tmp_path / "out", state.report(finished=False))
    saved = json.loads((tmp_path / "out/gpu.json").read_text())
    assert [r["op"] for r in saved["records"]][-1] == "half" and not saved["finished"]
    assert "The run did not finish." in (tmp_path / "out/gpu.md").read_text()


def test_what_compute_sanitizer_is_asked_and_says(monkeypatch):
    monkeypatch.setattr(runner, "cuda_tool", lambda name: f"/cuda/{name}")
    command = runner._watched_by("racecheck")
    assert command[:3] == ["/cuda/compute-sanitizer", "--tool", "racecheck"] and "application-only" in command
    text = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\nnoise\n"
    assert runner._last_words(9, text, "memcheck").endswith("code 9: ========= Invalid __global__ read of size 4 bytes")


def time_row(name, ms, **more):
    shared = {"section": "time", "family": "gram", "op": "cka", "shape": "n=16 384 p=q=1 024", "dtype": "bfloat16"}
    row = {**shared, "implementation": name, "milliseconds": ms, "failure": None, "flops": 7e11, "bytes": 2**26}
    return {**row, "error": 1e-5, "peak_mib": 100.0, "ops": ["gram_stats"] if "pyrepr" in name else [], **more}


def run_records():
    bound = {"section": "machine", "family": "all", "op": "b", "bound": "matrix product bfloat16", "value": 700.0}
    check = {"section": "check", "family": "gram", "backend": "triton", "ops": ["gram_stats"], "failure": None}
    times = [("pyrepr triton", 1.25), ("pyrepr cuda", 5.0), ("pyrepr reference", 9.0), ("plain torch, float32", 2.4)]
    return [bound, check, *(time_row(name, ms) for name, ms in times)]


def test_aims_are_met_missed_or_unmeasured():
    found = {(a["kind"], a["shape"]): a for a in verdict.aims(run_records())}
    pair = "n=16 384 p=q=1 024"
    assert found["product", pair]["value"] == pytest.approx(0.8) and found["product", pair]["met"] is True
    times = found["times", pair]
    assert times["value"] == pytest.approx(1.92) and times["met"] is False and times["peer_error"] == 1e-5
    assert found["memory", pair]["value"] == pytest.approx(100 / 64) and found["memory", pair]["met"] is True
    broken = [time_row("pyrepr triton", 1.0, failure="error 1e+0 is more than 1e-4")]
    of_pair = [a for a in verdict.aims(broken) if (a["op"], a["shape"]) == ("cka", pair)]
    assert {(a["met"], a["why"]) for a in of_pair} == {(None, "error 1e+0 is more than 1e-4")}


def test_a_kernel_earns_its_default_by_passing_and_being_faster():
    records = run_records()
    assert verdict.order(records) == {"gram_stats": ["triton", "cuda"]}
    assert verdict.order_lines(verdict.order(records))[1] == '    "gram_stats": ("triton", "cuda",),'
    wrong = {**records[1], "failure": "two runs gave different bits"}
    assert verdict.order([*records, wrong]) == {"gram_stats": ["cuda"]}
    never_ran = {"section": "check", "family": "gram", "backend": "cuda", "failure": "not run: no time"}
    assert verdict.order([*records, never_ran]) == {"gram_stats": ["triton", "cuda"]}  # unmeasured, not failed
    slower = [time_row("pyrepr triton", 10.0) if r.get("implementation") == "pyrepr triton" else r for r in records]
    assert verdict.order(slower) == {"gram_stats": ["cuda"]}


def test_rows_that_a_search_proposes():
    searched = {"table": "PAIR", "row": 90, "now": "A"}
    records = [{**searched, "times": {"A": 2.0, "B": 1.0, "C": 0.1}}, {**searched, "times": {"A": 2.0, "B": 1.0}}]
    assert verdict.rows(records) == ["PAIR sm_90: B  # 50.0 % less time than A, 2 problems"]
    assert verdict.rows([{**searched, "times": {"A": 1.0, "B": 2.0}}]) == ["PAIR sm_90: A  # as it is, 1 problems"]
    assert verdict.rows([{**searched, "times": {"B": 1.0}}]) == [
        "PAIR sm_90: today's row did not run in any of 1 problems"
    ]


def test_searches_are_noted_with_their_times(monkeypatch):
    _launch = pytest.importorskip("pyrepr.kernels._launch", reason="triton is not installed: no launch to configure")
    small, large = _launch.Config({"BLOCK": 32}), _launch.Config({"BLOCK": 128}, 8, 3)
    table = _launch.Table("SOME", dict.fromkeys(_launch.ARCHITECTURES, small), [large], lambda call: 1.0 / call())
    monkeypatch.setenv("PYREPR_AUTOTUNE", "1")
    with tuning._noting_searches() as found:
        assert table.run(torch.device("cpu"), lambda config: config.blocks["BLOCK"], (7,)) == 128
    times = {str(small): 1 / 32, str(large): 1 / 128}
    assert found == [{"table": "SOME", "row": 90, "key": ["7"], "now": str(small), "times": times}]


def test_a_search_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []

    def section(self, kind, family, seconds, place):
        asked.append((family, place[0]))
        times = {"table": "T", "row": 90, "now": "A", "times": {"A": 1.0}}
        self._add({**times, "number": 4}, {"number": 5, "failure": "not run: the section's time was over"})

    monkeypatch.setattr(runner.Run, "section", section)
    for _ in range(2):
        assert runner.autotune(tmp_path, ["gram"], 9, True) == 0
    assert asked == [("gram", 0), ("gram", 5)]
    assert json.loads((tmp_path / "autotune.json").read_text())["rows"] == ["T sm_90: A  # as it is, 2 problems"]


def test_processes_share_the_compilations_of_an_autotuner(monkeypatch):
    """Triton's own, with a kernel that only counts."""
    pytest.importorskip("triton", reason="triton is not installed: nothing to tune")
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    compiled = []

    class Kernel:
        arg_names = ("n",)

        def __init__(self):
            self.fn = lambda n: None

        def run(self, *args, **options):
            compiled.append(options["num_warps"])

    monkeypatch.setattr(tuning, "SHARD", (1, 2))
    monkeypatch.setattr(tuning, "_turn", itertools.count())
    tuner = Autotuner(Kernel(), ("n",), [Config({}, num_warps=w) for w in (1, 2, 4, 8)], ["n"], None, None)
    with tuning._compiling_only():
        tuner.run(5, grid=(1,))
    assert compiled == [2, 8, 1]  # its half, and what it launches in the end


def test_arranged_without_pip(tmp_path, monkeypatch):
    real, asked = subprocess.run, []

    def cmake(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu_check.subprocess, "run", cmake)
    root = gpu_check.Path(__file__).parents[1]
    assert gpu_check.arrange(root, tmp_path) is None
    assert [command[0] for command in asked] == ["cmake", "cmake"]
    code = "import pyrepr.benchmarks.gpu.runner as r, pyrepr.kernels; print(r._root(), pyrepr.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYREPR_NATIVE": "0"}  # nothing was compiled
    found = real([sys.executable, "-c", code], text=True, capture_output=True, env=environment, check=True)
    assert found.stdout.split() == [str(tmp_path), str(tmp_path / "pyrepr/__init__.py")] or str(root) in found.stdout


def test_installing_asks_no_network_and_a_failure_is_said(monkeypatch):
    def pip(command, **options):
        assert "--no-index" in command and "--disable-pip-version-check" in command
        return subprocess.CompletedProcess(command, 1, "", "No module named pip")

    monkeypatch.setattr(gpu_check.subprocess, "run", pip)
    assert gpu_check.build(gpu_check.Path("clone")) == "No module named pip"
