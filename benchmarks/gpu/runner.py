"""Runs the sections of the GPU check one after the other, each in its own process, and writes the report."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pyrepr.benchmarks.report import gpu_markdown

FAMILIES = ("gram", "delta_rule", "lookup")
# Shares of the time that is left when a section's turn comes. Correctness first: it is worth most.
SHARES = {"machine": 1.0, "check": 4.0, "time": 5.0, "sanitize": 3.0}
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
        self.environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if dry else {})}
        self.records: list[dict[str, Any]] = []
        self.sections = [("machine", "all")]
        self.sections += [(kind, f) for kind in ("check", "time", "sanitize") for f in families or known]
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
            if time.monotonic() >= end or not started:
                return
            first = unfinished["number"] + 1

    def _worker(
        self, kind: str, family: str, path: Path, options: list[str], seconds: float, prefix: tuple[str, ...] = ()
    ) -> str | None:
        """Runs a worker; returns why it ended early, or ``None``."""
        command = [*prefix, sys.executable, "-m", "pyrepr.benchmarks.gpu.worker", kind, family, str(path), *options]
        command += ["--seconds", str(seconds), *(["--dry-run"] if self.dry else [])]
        try:
            # Some time more: the worker sees for itself that its time is over, unless it hangs.
            result = subprocess.run(
                command, text=True, capture_output=True, env=self.environment, timeout=max(1, seconds) + 20, check=False
            )
        except subprocess.TimeoutExpired:
            return "it was still running when the section's time was over"
        sys.stderr.write(result.stderr)
        if result.returncode == 0:
            return None
        last = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()][-3:]
        return f"its process ended with code {result.returncode}: {' | '.join(last)}"[:600]

    def sanitize(self, family: str, seconds: float) -> None:
        """compute-sanitizer on every small case, each in its own process."""
        from pyrepr.benchmarks.gpu.worker import describe, sanitize_items

        items = sanitize_items(family, self.dry)
        tool_path = shutil.which("compute-sanitizer")
        end = time.monotonic() + seconds
        for number, item in enumerate(items):
            shared = {"section": "sanitize", "family": family, "number": number, **describe(item)}
            for tool in TOOLS:
                left = end - time.monotonic()
                if self.dry or tool_path is None:
                    note = "not run: dry run" if self.dry else "not run: there is no compute-sanitizer"
                elif left <= 0:
                    note = "not run: the section's time was over"
                else:
                    prefix = (tool_path, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
                    with tempfile.TemporaryDirectory() as folder:
                        path = Path(folder, "records")
                        options = ["--only", str(number)]
                        note = self._worker("sanitize", family, path, options, min(left, 90), prefix)
                        failed = [line["failure"] for line in _read(path) if line.get("failure")]
                        note = note or (failed[0] if failed else None)
                self.records.append({**shared, "tool": tool, "failure": note})

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


def _commit() -> str:
    """The commit of the clone pyrepr was installed from, with + if something was changed; or the environment's word."""
    import pyrepr

    root = str(Path(pyrepr.__file__).resolve().parents[1])
    commit = _output(["git", "-C", root, "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return os.environ.get("PYREPR_COMMIT", "unknown")
    return commit + ("+" if _output(["git", "-C", root, "status", "--porcelain", "-uno"]) else "")


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
            if kind == "sanitize":
                state.sanitize(family, budget)
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
    return 1 if any(not r.get("implementation") or r["implementation"].startswith("pyrepr") for r in bad) else 0
