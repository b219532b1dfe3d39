"""Runs the suites in tests/interpreted/ with TRITON_INTERPRET=1, each in a process of its own.

Triton reads the variable when it is imported, and an interpreted kernel cannot be compiled, so it cannot be here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = sorted(path for path in (Path(__file__).parent / "interpreted").glob("*.py") if path.stem != "conftest")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing interpreted")
@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_interpreted(suite):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", suite.parents[2], suite]
    command += ["-c", suite.parents[2] / "pyproject.toml", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, text=True, capture_output=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) > 0, f"no test ran:\n{result.stdout}"
    assert " skipped" not in result.stdout
