"""Snippets of the README and of the page on probing run as pasted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pyrepr.benchmarks.report import TITLES, markdown

ROOT = Path(__file__).parents[1]
TEXT = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/probing.md"))
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs_as_pasted(number, tmp_path):
    done = subprocess.run([sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{SNIPPETS[number]}\n{done.stderr}"


def test_readme_is_short_and_its_pictures_and_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") < 150
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert os.path.exists(ROOT / target), target


@pytest.mark.parametrize(
    ("folder", "page"), [("", "measured.md"), ("avx2", "measured_avx2.md"), ("amx", "measured_amx.md")]
)
def test_tables_of_measurements_are_those_of_the_committed_runs(folder, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    runs = sorted((ROOT / "benchmarks" / "results" / folder).glob("cpu_*.json"))
    assert runs
    for path in runs:
        run = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem not in TITLES or f"## {TITLES[path.stem]}\n\n{markdown(run)}" in text, path
        assert not run["machine"]["commit"].endswith("+"), f"{path} was measured with uncommitted changes"
