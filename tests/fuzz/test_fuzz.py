"""Every family in a process of its own, at every SIMD level, for a time: `pytest -m fuzz`, see CONTRIBUTING.md.

A family that crashes, hangs or finds something fails with a script of a few lines that shows it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyrepr import _C

WORKER = Path(__file__).with_name("worker.py")
BOARD_BYTES = 1 << 16
HANG = 120  # seconds without a new case: the slowest cases take a few
# Families whose work is in no kernel run at the best level only.
KERNELS = ("measures", "streams", "delta_rule", "erase", "causal_conv1d", "lookup", "pairs", "stats")
OTHERS = ("layers", "models", "command")
CASES = [(family, level) for family in KERNELS for level in _C.simd_levels()] + [(f, _C.simd_level()) for f in OTHERS]


def last_case(board: Path) -> str:
    count, number, script = board.read_bytes().split(b"\0")[0].decode().split("\n", 2)
    return f"case {number} (the {count}th), as a script:\n\n{script}"


def watched(process: subprocess.Popen, board: Path) -> bool:
    """Waits for the end; False if the process was killed because nothing moved."""
    seen, since = b"", time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        head = board.read_bytes()[:200]
        if head != seen:
            seen, since = head, time.monotonic()
        elif time.monotonic() - since > HANG:
            process.kill()
            process.wait()
            return False
    return True


@pytest.mark.fuzz
@pytest.mark.parametrize(("family", "level"), CASES, ids=[f"{family}-{level}" for family, level in CASES])
def test_family(family, level, tmp_path, request, record_property):
    seconds = request.config.getoption("--fuzz-seconds") / len(CASES)
    seed = request.config.getoption("--fuzz-seed")
    board, report = tmp_path / "board", tmp_path / "report.json"
    board.write_bytes(bytes(BOARD_BYTES))
    command = [sys.executable, str(WORKER), family, str(seed), str(seconds), str(board)]
    command += ["--cases", str(request.config.getoption("--fuzz-cases"))]
    with report.open("wb") as out, (tmp_path / "stderr").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "PYREPR_SIMD": level})
        ended = watched(process, board)
    assert ended, f"hung for {HANG} s at {last_case(board)}"
    if process.returncode:
        stderr = (tmp_path / "stderr").read_text(errors="replace")[-2000:]
        pytest.fail(f"ended with {process.returncode} at {last_case(board)}\n\n{stderr}", pytrace=False)
    found = json.loads(report.read_text())
    for key in ("cases", "calls", "values", "refused"):
        record_property(key, found[key])  # summed up at the end, by conftest.py
    failures = [
        f"{failure['what']}  ({failure['count']} times)\n\n{failure['script']}"
        for failure in found["failures"].values()
    ]
    again = f"python {WORKER.name} {family} {seed} 1 BOARD --case N, with PYREPR_SIMD={level}"
    assert not failures, f"{len(failures)} kinds of failure; {again}\n\n" + "\n\n".join(failures)
