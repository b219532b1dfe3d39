"""The examples run, with settings so small that nothing is learned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_recall(tmp_path):
    options = "--steps 3 --pairs 4 8 --batch 4 --width 16 --vocabulary 32 --evaluated 4"
    command = [sys.executable, str(EXAMPLES / "recall.py"), str(tmp_path / "out"), *options.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out/recall.json").read_text())
    assert set(written["results"]) == {"delta rule", "additive"}
    for run in written["results"].values():
        assert [step for step, _ in run["curve"]] == [1, 2, 3]
        assert set(run["recall"]) == {"4", "8"} and all(0 <= share <= 1 for share in run["recall"].values())
    assert (tmp_path / "out/recall.png").stat().st_size > 1000
