"""Runs the sections of the GPU check one after the other, each in its own process, and writes the report."""

from __future__ import annotations

import concurrent.futures
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pyrepr.benchmarks.report import gpu_markdown

import pyrepr
from pyrepr.backend import build_info
from pyrepr.gpu_check import cuda_tool

FAMILIES = ("gram", "delta_rule", "causal_conv1d", "lookup")
# Shares of the time that is left when a section's turn comes. Correctness first: it is worth most.
SHARES = {"machine": 1.0, "prepare": 4.0, "check": 4.0, "time": 5.0, "tests": 2.0, "sanitize": 3.0}
TOOLS = ("memcheck", "racecheck")


class Run:
    """The state of one run: what there is to do, what came out, and when it must end."""

    def __init__(self, families: list[str] | None, seconds: float, dry: bool) -> None:
        known = [f for f in FAMILIES if importlib.util.find_spec(f"pyrepr.benchmarks.gpu.{f}")]
        for family in families or []:
            if family not in known:
                raise ValueError(f"--families must be among {', '.join(known)}, got {family!r}")
        self.started, self.dry = time.monotonic(), dry
        self.end = self.started + seconds
        self.most = 1 if dry else None  # items of a section: a dry run tests this command, the kernels have their tests
        self.environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if dry else {})}
        self.records: list[dict[str, Any]] = []
        self.tuned: list[str] = []
        self.sections = [("machine", "all"), *(("prepare", f) for f in families or known)]
        self.sections += [(kind, f) for kind in ("check", "time") for f in families or known]
        self.sections += [("tests", "all"), *(("sanitize", f) for f in families or known)]
        self.commit = _commit()

    def left(self) -> float:
        return self.end - time.monotonic()

    def section(self, kind: str, family: str, seconds: float) -> None:
        """Starts the worker again behind an item that ended it, until the section or its time is over."""
        end = time.monotonic() + seconds
        first, count = 0, 1
        while first < count:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "records")
                path.touch()
                options = ["--first", str(first)]
                end_note = self._worker(kind, family, path, options, end - time.monotonic())
                lines = _read(path)
            started = [line for line in lines if line.get("start")]
            self.records += [line for line in lines if not line.get("start")]
            count = started[-1]["of"] if started else count
            if end_note is None:
                return
            unfinished = started[-1] if started else {"section": kind, "family": family, "number": first, "op": kind}
            if not any(r["number"] == unfinished["number"] for r in lines if not r.get("start")):
                kept = {key: value for key, value in unfinished.items() if key not in ("start", "of")}
                self.records.append({**kept, "failure": end_note})
            first = unfinished["number"] + 1
            if (time.monotonic() >= end or not started) and first < count:
                note = f"not run: {count - first} more, since the section's time was over"
                self.records.append({"section": kind, "family": family, "number": first, "op": kind, "failure": note})
            if time.monotonic() >= end or not started:
                return

    def _worker(
        self, kind: str, family: str, path: Path, options: list[str], seconds: float, prefix: tuple[str, ...] = ()
    ) -> str | None:
        """Runs a worker; returns why it ended early, or ``None``."""
        command = [*prefix, sys.executable, "-m", "pyrepr.benchmarks.gpu.worker", kind, family, str(path), *options]
        command += ["--seconds", str(seconds), *(["--dry-run"] if self.dry else [])]
        command += [] if self.most is None else ["--most", str(self.most)]
        try:
            # Some time more: the worker sees for itself that its time is over, unless it hangs.
            result = subprocess.run(
                command, text=True, capture_output=True, env=self.environment, timeout=max(1, seconds) + 20, check=False
            )
        except subprocess.TimeoutExpired:
            return "it was still running when the section's time was over"
        sys.stderr.write(result.stderr)
        sys.stdout.write(result.stdout)
        # Of PYREPR_AUTOTUNE=1: what the tables in the code should say.
        self.tuned += [line for line in result.stdout.splitlines() if "best of its table's row" in line]
        if result.returncode == 0:
            return None
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("=========")][:6] or lines[-3:]  # compute-sanitizer's report
        return f"its process ended with code {result.returncode}: {' | '.join(found)}"[:900]

    def prepare(self, family: str, seconds: float) -> None:
        """Compiles what the cases launch, on all processors; what fails here fails again where it is recorded."""
        if self.dry:
            return
        count = min(8, os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(count) as pool:
            for i in range(count):
                options = ["--first", str(i), "--step", str(count)]
                pool.submit(self._worker, "prepare", family, Path(folder, str(i)), options, seconds)

    def sanitize(self, family: str, seconds: float) -> None:
        """compute-sanitizer on every small case: one process a tool, because starting one takes half a minute."""
        from pyrepr.benchmarks.gpu.worker import describe, sanitize_items

        names = [describe(item) for item in sanitize_items(family, self.dry)]
        shared = {"section": "sanitize", "family": family}
        path_of_tool = cuda_tool("compute-sanitizer")
        end = time.monotonic() + seconds
        for i, tool in enumerate(TOOLS):
            if self.dry or path_of_tool is None:
                note = "not run: " + ("dry run" if self.dry else "there is no compute-sanitizer")
                self.records += [{**shared, **name, "tool": tool, "failure": note} for name in names]
                continue
            prefix = (path_of_tool, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "records")
                path.touch()
                budget = (end - time.monotonic()) / (len(TOOLS) - i)
                note = self._worker("sanitize", family, path, [], budget, prefix)
                lines = [{**line, "tool": tool} for line in _read(path) if not line.get("start")]
            self.records += lines
            if note is not None:
                self.records.append({**shared, "op": "all of the above", "tool": tool, "failure": note})

    def tests(self, family: str, seconds: float) -> None:
        """The tests marked ``gpu``, where pyrepr was installed from a clone."""
        folder = _root() / "tests"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(folder)]
        if self.dry or not folder.is_dir() or importlib.util.find_spec("pytest") is None:
            note = "not run: " + ("dry run" if self.dry else "there is no clone, or no pytest")
        else:
            try:
                result = subprocess.run(command, text=True, capture_output=True, timeout=max(1, seconds), check=False)
                failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                note = " | ".join(failed or result.stdout.splitlines()[-3:])[:900] if result.returncode else None
            except subprocess.TimeoutExpired:
                note = "it was still running when the section's time was over"
        self.records.append({"section": "tests", "family": family, "op": "pytest -m gpu", "shape": "", "failure": note})

    def report(self, finished: bool) -> dict[str, Any]:
        facts = next((r["facts"] for r in self.records if "facts" in r), {})
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": self.commit,
            "driver": _driver(),
            "dry_run": self.dry,
            "finished": finished,
            "seconds": round(time.monotonic() - self.started, 1),
            "machine": facts,
            "tuned": self.tuned,
            "records": [r for r in self.records if "facts" not in r],
        }


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a worker; a last line that its end cut off is dropped."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, text=True, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _driver() -> str | None:
    output = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return output.splitlines()[0] if output else None


def _root() -> Path:
    return Path(pyrepr.__file__).resolve().parents[1]


def _commit() -> str:
    """The commit of the clone pyrepr was installed from, with + if something was changed; or the environment's word."""
    git = ["git", "-C", str(_root())]
    commit = _output([*git, "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return build_info().get("commit") or os.environ.get("PYREPR_COMMIT", "unknown")
    return commit + ("+" if _output([*git, "status", "--porcelain", "-uno"]) else "")


def write(out: Path, report: dict[str, Any]) -> None:
    """Both files, each complete or as it was before."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(report, indent=1)), ("gpu.md", gpu_markdown(report))):
        temporary = out / (name + ".partial")
        temporary.write_text(text + "\n")
        temporary.replace(out / name)


def run(out: Path, families: list[str] | None, seconds: float, dry: bool) -> int:
    """All sections. The report is written after each, so that a machine that goes away leaves what it measured."""
    state = Run(families, seconds, dry)
    for i, (kind, family) in enumerate(state.sections):
        shares = [SHARES[later] for later, _ in state.sections[i:]]
        budget = max(0.0, state.left() - 5) * shares[0] / sum(shares)
        before = len(state.records)
        try:
            if kind in ("prepare", "sanitize", "tests"):
                getattr(state, kind)(family, budget)
            else:
                state.section(kind, family, budget)
        except Exception as failure:
            state.records.append(
                {"section": kind, "family": family, "op": kind, "failure": f"{type(failure).__name__}: {failure}"}
            )
        new = state.records[before:]
        failed = sum(1 for record in new if record.get("failure"))
        print(f"{kind} {family}: {len(new)} results, {failed} failed, {state.left():.0f} s left", flush=True)
        write(out, state.report(finished=i + 1 == len(state.sections)))
    print((out / "gpu.md").read_text())
    bad = [r for r in state.records if r.get("failure") and not str(r["failure"]).startswith("not run")]
    ours = (None, "pyrepr triton", "pyrepr cuda")  # a peer that cannot do it is a finding, no failure
    return 1 if any(r.get("implementation") in ours for r in bad) else 0
