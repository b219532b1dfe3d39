"""Running tests again at another SIMD level: the level is chosen when the module loads, so in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pyrepr.backend import native

HERE = Path(__file__).parent


def other_levels() -> list[str]:
    """All that this machine can run but for the one it runs by itself, which the suite itself covers."""
    module, _ = native()
    return [level for level in module.simd_levels() if level != module.simd_level()] if module else []


def run_at(level: str) -> None:
    """All tests that are marked ``levels``, at this level; any failure is one here."""
    files = [str(file) for file in sorted(HERE.glob("test_*.py")) if "mark.levels" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "levels", *files]
    environment = {**os.environ, "PYREPR_SIMD": level}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert f"SIMD level {level} " in result.stdout
