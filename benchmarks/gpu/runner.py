"""Runs the sections of the GPU check, each in processes of its own, and keeps the report written while they run.

The stages and their order are in ``plan``: what decides most comes first. Each works in processes of its own within its
share of the time, what is timed is alone on the device, and what was found is on disk at any moment.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyrepr.benchmarks import report as reports
from pyrepr.benchmarks.gpu import plan, verdict

import pyrepr
from pyrepr.backend import build_info, cuda_tool

FAMILIES = ("gram", "delta_rule", "causal_conv1d", "lookup", "pairs")
COMPILING = 0.4  # most of a timed stage's time that goes into compiling beforehand
TOOLS = ("memcheck", "racecheck")
# Longest that a worker may give no sign: a kernel that hangs must not take the section's time.
SILENCE = {
    "right": 60.0,
    "check": 60.0,
    "prepare": 120.0,
    "time": 100.0,
    "behaviour": 120.0,
    "sanitize": 150.0,
    "autotune": 200.0,
}
GRACE = 5.0  # seconds for a worker to see for itself that its time is over
WRITE_EVERY = 10.0


class Run:
    """The state of one run: what there is to do, what came out, and when it must end."""

    def __init__(
        self, families: list[str] | None, seconds: float, dry: bool, ptxas: Path | None = None, names: Any = None
    ) -> None:
        known = [f for f in FAMILIES if importlib.util.find_spec(f"pyrepr.benchmarks.gpu.{f}")]
        for family in families or []:
            if family not in known:
                raise ValueError(f"--families must be among {', '.join(known)}, got {family!r}")
        self.families = families or known
        self.stages = plan.chosen(names)
        self.assemblers = [] if dry else plan.assemblers(ptxas)
        self.assembler: plan.Assembler | None = None  # the one that the stages after `right` take
        self.started, self.dry = time.monotonic(), dry
        self.end = self.started + seconds
        self.most = 1 if dry else None  # items of a section: a dry run tests this command, the kernels have their tests
        # What is doubted is what the run is to find out.
        self.environment = {**os.environ, "PYREPR_ANY_PTXAS": "1", **({"TRITON_INTERPRET": "1"} if dry else {})}
        self.records: list[dict[str, Any]] = []
        self.live: dict[Path, dict[str, Any]] = {}  # files of running workers → what their lines lack
        self.lock = threading.Lock()
        self.stopped = False
        self.processors = 2 if dry else max(1, os.cpu_count() or 1)
        self.commit = _commit()

    def left(self) -> float:
        return self.end - time.monotonic()

    def section(
        self,
        kind: str,
        family: str,
        seconds: float,
        place: tuple[int, int] = (0, 1),
        tool: str | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        """Works through every ``place[1]``-th item; starts the worker again behind an item that ended it.

        An implementation that ended it while a case was being timed is left out, and the case begins anew.
        """
        end, (first, step), count = time.monotonic() + seconds, place, place[0] + 1
        shared: dict[str, Any] = {"section": kind, "family": family, **({"tool": tool} if tool else {})}
        shared |= {"assembler": str(self.assembler)} if self.assembler else {}
        without: list[str] = []
        while first < count:
            asked = [f"--first={first}", f"--step={step}", *(f"--without={name}" for name in without), *options]
            note, lines = self._worker(kind, family, asked, end - time.monotonic(), shared, tool)
            marks = [line for line in lines if "mark" in line]
            count = next((line["of"] for line in reversed(marks) if "of" in line), count)
            if note is None:
                return
            last = marks[-1] if marks else {**shared, "number": first, "op": kind, "mark": "start"}
            unfinished = {key: value for key, value in last.items() if key not in ("mark", "of")}
            stopped = not marks or time.monotonic() >= end or self.stopped
            if last["mark"] == "end":
                if last["number"] + step >= count:
                    self._add({**shared, "op": "at the end of all", "failure": note})
                first, without = last["number"] + step, []
            elif last["mark"] == "implementation" and not stopped:
                self._add({**unfinished, "failure": note})
                without = [*(without if last["number"] == first else []), last["implementation"]]
                first = last["number"]
            else:
                self._add({**unfinished, "failure": note})
                first, without = last["number"] + step, []
            if stopped:
                rest = len(range(first, count, step))
                said = f"not run: {rest} more, since the section's time was over"
                if rest:
                    self._add({**shared, "number": first, "op": kind, "failure": said})
                return

    def _add(self, *records: dict[str, Any]) -> None:
        with self.lock:
            self.records += records

    def _worker(
        self, kind: str, family: str, options: list[str], seconds: float, shared: dict[str, Any], tool: str | None
    ) -> tuple[str | None, list[dict[str, Any]]]:
        """Runs a worker; returns why it ended early, or ``None``, and the lines it wrote. Its records are kept."""
        command = [*_watched_by(tool), sys.executable, "-m", "pyrepr.benchmarks.gpu.worker", kind, family]
        with tempfile.TemporaryDirectory() as folder, open(Path(folder, "output"), "w+") as output:
            path = Path(folder, "records")
            path.touch()
            command += [str(path), *options, f"--seconds={seconds}", *(["--dry-run"] if self.dry else [])]
            command += [] if self.most is None else [f"--most={self.most}"]
            with self.lock:
                self.live[path] = shared
            try:
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment(kind),
                    start_new_session=True,
                )
                note = self._watch(process, path, SILENCE.get(kind, 60.0), time.monotonic() + max(1, seconds) + GRACE)
                output.seek(0)
                text = output.read()
            finally:
                with self.lock:
                    self.live.pop(path)
                    lines = [{**line, **shared} for line in _read(path)]
                    self.records += [line for line in lines if "mark" not in line]
        if note is None and process.returncode == 0:
            return None, lines
        sys.stderr.write(text[-4000:])
        return note or _last_words(process.returncode, text, tool), lines

    def _environment(self, kind: str) -> dict[str, str]:
        special = {
            "sanitize": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else overruns end in memory that is allocated
            "prepare": {"FLA_CACHE_RESULTS": "0"},  # nothing is timed: there is no result to keep
            "autotune": {"PYREPR_AUTOTUNE": "1"},
        }
        found = {**self.environment, **special.get(kind, {})}
        if self.assembler is not None:
            found.pop("TRITON_PTXAS_PATH", None)
            found |= {"TRITON_PTXAS_PATH": self.assembler.path} if self.assembler.path else {}
        return found

    def _watch(self, process: subprocess.Popen, path: Path, silence: float, end: float) -> str | None:
        """Waits for a worker; one that hangs is ended with all it started, and the reason returned."""
        size, since = 0, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                return None
            now = time.monotonic()
            if path.stat().st_size != size:
                size, since = path.stat().st_size, now
            if now - since <= silence and now <= end and not self.stopped:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the driver's hands it may stay: go on without it
                process.wait(10)
            if now - since > silence:
                return f"it hung: no sign for {silence:.0f} s"
            return "it was still running when the section's time was over"

    def together(self, calls: list[Callable[[], None]], count: int) -> None:
        """Calls that do not disturb each other, as nothing in them is timed; one that fails is recorded."""
        with concurrent.futures.ThreadPoolExecutor(max(1, count)) as pool:
            for future in [pool.submit(call) for call in calls]:
                try:
                    future.result()
                except Exception as failure:
                    self._add(_failure("check", "all", failure))

    def check(self, seconds: float, kind: str = "check") -> None:
        """Every family's cases, in as many processes as there are processors: a first launch compiles."""
        families = [f for f in self.families if kind == "check" or f in plan.MULTIPLY]
        shards = 1 if self.dry else max(1, min(5, self.processors // max(1, len(families))))
        calls = [lambda f=f, i=i: self.section(kind, f, seconds, (i, shards)) for i in range(shards) for f in families]
        self.together(calls, self.processors)

    def right(self, seconds: float) -> None:
        """The kernels that multiply, under each assembler; what follows takes the newest that was right."""
        end, good = time.monotonic() + seconds, []
        for i, assembler in enumerate(self.assemblers or [None]):
            self.assembler, before = assembler, len(self.records)
            self.check((end - time.monotonic()) / max(1, len(self.assemblers) - i), "right")
            if not any(verdict.state(r) == "failed" for r in self.records[before:]):
                good.append(assembler)
        self.assembler = (good or [None, *self.assemblers])[-1]

    def time(self, stage: plan.Stage, seconds: float) -> None:
        """A stage's timed cases, each family's alone on the device."""
        end = time.monotonic() + seconds
        timed = [(family, pattern) for family, pattern in stage.timed if family in self.families]
        self.prepare(timed, COMPILING * seconds)
        for i, (family, pattern) in enumerate(timed):
            share = (end - time.monotonic()) / (len(timed) - i)
            self.section("time", family, share, options=("--ops", pattern))

    def prepare(self, timed: list[tuple[str, str]], seconds: float) -> None:
        """Compiles what is timed, and what its peers tune; what fails here fails again where it is recorded."""
        if self.dry or seconds <= 0:
            return
        count = min(12, self.processors)
        before = len(self.records)
        calls = [
            lambda f=f, p=p, i=i: self.section(
                "prepare", f, seconds, options=("--shard", str(i), str(count), "--ops", p)
            )
            for i in range(count)
            for f, p in timed
            if f == "delta_rule" or i < 3
        ]
        self.together(calls, max(count, len(timed)))
        with self.lock:
            self.records[before:] = []

    def sanitize_all(self, seconds: float) -> None:
        """compute-sanitizer, a process for each family and tool: nothing of it is timed."""
        calls = [lambda f=f, t=t: self.sanitize(f, t, seconds) for t in TOOLS for f in self.families]
        self.together(calls, len(calls) if self.processors > 4 else 2)

    def work(self, stage: plan.Stage, seconds: float) -> None:
        """Does a stage within so many seconds."""
        if stage.timed:
            self.time(stage, seconds)
        elif stage.name in ("machine", "behaviour"):
            self.section(stage.name, "all", max(seconds, 30.0) if stage.name == "machine" else seconds)
        else:
            {"right": self.right, "check": self.check, "sanitize": self.sanitize_all}[stage.name](seconds)

    def sanitize(self, family: str, tool: str, seconds: float) -> None:
        if not self.dry and cuda_tool("compute-sanitizer"):
            self.section("sanitize", family, seconds, tool=tool)
            return
        from pyrepr.benchmarks.gpu.worker import describe, sanitize_items

        note = "not run: " + ("dry run" if self.dry else "there is no compute-sanitizer")
        shared = {"section": "sanitize", "family": family, "tool": tool, "failure": note}
        self._add(*({**shared, **describe(item)} for item in sanitize_items(family, self.dry)))

    def report(self, finished: bool) -> dict[str, Any]:
        with self.lock:
            running = [{**line, **shared} for path, shared in self.live.items() for line in _read(path)]
            records = [*self.records, *(line for line in running if "mark" not in line)]
        facts = next((r["facts"] for r in records if "facts" in r), {})
        records = [r for r in records if "facts" not in r]
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": self.commit,
            "driver": _driver(),
            "dry_run": self.dry,
            "finished": finished,
            "seconds": round(time.monotonic() - self.started, 1),
            "machine": facts,
            "clocks": _clocks(),
            "build": build_info(),
            "stages": [stage.name for stage in self.stages],
            "assemblers": [str(assembler) for assembler in self.assemblers],
            "assembler": None if self.assembler is None else str(self.assembler),
            "aims": _concluded(verdict.aims, records, []),
            "ops": _concluded(verdict.ops, records, []),
            "order": _concluded(verdict.order, records, {}),
            "records": records,
        }


def _concluded(conclude: Callable[[list], Any], records: list[dict[str, Any]], otherwise: Any) -> Any:
    """What follows from the records; should that fail, the records are still worth keeping."""
    try:
        return conclude(records)
    except Exception as failure:
        print(f"gpu_check: {conclude.__name__}: {type(failure).__name__}: {failure}", file=sys.stderr)
        return otherwise


def _failure(section: str, family: str, failure: BaseException) -> dict[str, Any]:
    return {"section": section, "family": family, "op": section, "failure": f"{type(failure).__name__}: {failure}"}


def _watched_by(tool: str | None) -> list[str]:
    if tool is None:
        return []
    # Only this process: the compilers that Triton starts have nothing to be looked at.
    options = ["--target-processes", "application-only", "--error-exitcode", "9", "--print-limit", "20"]
    return [str(cuda_tool("compute-sanitizer")), "--tool", tool, *options]


def _last_words(code: int, text: str, tool: str | None) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    found = [line for line in lines if tool and line.startswith("=========") and "COMPUTE-SANITIZER" not in line][:8]
    return f"its process ended with code {code}: {' | '.join(found or lines[-3:])}"[:900]


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a worker; a last one that its end cut off is dropped."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, text=True, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _smi(fields: str) -> str | None:
    output = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
    return output.splitlines()[0] if output else None


def _driver() -> str | None:
    return _smi("driver_version")


def _clocks() -> str | None:
    """Of now, and the most there is: whether the device was free to run at its speed."""
    return _smi("clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu")


def _root() -> Path:
    return Path(pyrepr.__file__).resolve().parents[1]


def _commit() -> str:
    """The commit of the clone pyrepr was installed from, with + if something was changed; or the environment's word."""
    git = ["git", "-c", "safe.directory=*", "-C", str(_root())]  # the clone may be another user's
    commit = _output([*git, "rev-parse", "--short=12", "HEAD"]) if (_root() / "setup.py").exists() else None
    if not commit:
        return build_info().get("commit") or os.environ.get("PYREPR_COMMIT", "unknown")
    return commit + ("+" if _output([*git, "status", "--porcelain", "-uno"]) else "")


def write(out: Path, report: dict[str, Any], name: str = "gpu") -> None:
    """Both files, each complete or as it was before."""
    out.mkdir(parents=True, exist_ok=True)
    forms = {
        ".json": lambda: json.dumps(report, indent=1, allow_nan=False),
        ".md": lambda: reports.gpu_markdown(report),
    }
    for suffix, made in forms.items():
        temporary = out / f"{name}{suffix}.partial"
        temporary.write_text(made() + "\n")
        temporary.replace(out / f"{name}{suffix}")


@contextlib.contextmanager
def _kept_written(out: Path, state: Run) -> Iterator[None]:
    """Writes the report every few seconds: what a machine that goes away has measured is on its disk."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(WRITE_EVERY):
            with contextlib.suppress(OSError):  # a disk that is full now may not be so at the end
                write(out, state.report(finished=False))

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _ended_by_signals(state: Run) -> Iterator[None]:
    """SIGINT and SIGTERM end the workers, which are sessions of their own, and leave a report."""

    def stop(*_: Any) -> None:
        state.stopped, state.end = True, time.monotonic()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    out: Path,
    families: list[str] | None,
    seconds: float,
    dry: bool,
    stages: list[str] | None = None,
    ptxas: Path | None = None,
) -> int:
    """All stages; 1 if something of pyrepr's failed, 2 if it could not run."""
    state = Run(families, seconds, dry, ptxas, stages)
    with _alone(out), _ended_by_signals(state), _kept_written(out, state):
        write(out, state.report(finished=False))  # that it can be written is known before anything is measured
        for i, stage in enumerate(state.stages):
            if state.stopped:
                break
            before = len(state.records)
            rest = sum(later.share for later in state.stages[i:])
            try:
                state.work(stage, max(0.0, state.left() - GRACE) * stage.share / rest)
            except Exception as failure:
                state._add(_failure(stage.name, "all", failure))
            states = [verdict.state(record) for record in state.records[before:]]
            failed, missing = states.count("failed"), states.count("unmeasured")
            told = f"{len(states)} results, {failed} failed, {missing} unmeasured, {state.left():.0f} s left"
            print(f"{stage.name}: {told}", flush=True)
    write(out, state.report(finished=not state.stopped))
    print((out / "gpu.md").read_text())
    bad = [r for r in state.records if verdict.state(r) == "failed"]
    ours = (None, "pyrepr triton", "pyrepr cuda")  # a peer that cannot do it is a finding, no failure
    return 1 if state.stopped or any(r.get("implementation") in ours for r in bad) else 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds DIR's lock: two runs would spoil each other's times, and their report."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".gpu_check.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another gpu_check is at work in {out}") from None
        try:
            yield
        finally:
            (out / ".gpu_check.lock").unlink(missing_ok=True)


def autotune(out: Path, families: list[str] | None, seconds: float, dry: bool) -> int:
    """Searches the tables of launch configurations, goes on where an earlier run with this commit stopped."""
    state = Run(families, seconds, dry)
    path = out / "autotune.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("commit") != state.commit:
        found = {"commit": state.commit, "next": {}, "records": []}
    with _ended_by_signals(state):
        for i, family in enumerate(state.families):
            before = len(state.records)
            share = max(0.0, state.left() - GRACE) / len(state.families[i:])
            state.section("autotune", family, share, (found["next"].get(family, 0), 1))
            new = state.records[before:]
            found["records"] += [r for r in new if "table" in r]
            done = [
                r["number"] for r in new if "table" in r or (r.get("failure") and "time was over" not in r["failure"])
            ]
            found["next"][family] = max([found["next"].get(family, 0), *(number + 1 for number in done)])
            out.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({**found, "rows": verdict.rows(found["records"])}, indent=1) + "\n")
            partial.replace(path)
            print(f"autotune {family}: {len(new)} searches, {state.left():.0f} s left", flush=True)
    print("\n".join(verdict.rows(found["records"])) or "nothing was searched")
    return 0
