"""Told to end, a process leaves no temporary files behind; names and files from elsewhere do no harm."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import pyrepr
from pyrepr import cli
from pyrepr._reporting import printable

RED = "\x1b[31mred\x1b[0m"


def told_to_end(command, folder, ready, number):
    """The exit code of a process that gets the signal as soon as `ready` holds."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < until and process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(60)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_in_the_middle_of_writing_leaves_the_old_file(tmp_path, name):
    number = getattr(signal, name)
    path = tmp_path / "result.npz"
    path.write_text("old")
    code = (
        "import time\nfrom pyrepr._reporting import replacing\n"
        "with replacing('result.npz') as temporary:\n    temporary.write_text('half')\n    time.sleep(60)\n"
    )
    ended = told_to_end([sys.executable, "-c", code], tmp_path, lambda: len(os.listdir(tmp_path)) == 2, number)
    assert ended == (-number if name == "SIGINT" else 128 + number)
    assert os.listdir(tmp_path) == ["result.npz"] and path.read_text() == "old"


def test_a_command_told_to_end_leaves_nothing(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time, pathlib\nfrom torch import nn\n"
        "class Slow(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = nn.Linear(3, 3)\n"
        "    def forward(self, x):\n        pathlib.Path('running').touch()\n        time.sleep(60)\n"
    )
    np.save(tmp_path / "data.npy", np.zeros((8, 3), dtype=np.float32))
    command = [sys.executable, "-c", "import sys; from pyrepr.cli import main; sys.exit(main())", "compare"]
    command += ["py:slow:Slow", "py:slow:Slow"]
    command += ["--data", "data.npy", "--out", "deep/results"]
    ended = told_to_end(command, tmp_path, (tmp_path / "running").exists, signal.SIGTERM)
    assert ended == 128 + signal.SIGTERM
    assert not (tmp_path / "deep").exists()


def comparison(**change):
    given = {
        "values": torch.tensor([[0.5, -0.25]], dtype=torch.float64),
        "layers_a": ("a",),
        "layers_b": ("b", "c"),
        "model_a": "A",
        "model_b": "B",
        "samples": "batch",
        "count": 9,
        "estimator": "unbiased",
        "mode": "exact",
        "kernel": "linear",
        "versions": {"pyrepr": "0"},
    }
    return pyrepr.Comparison(**given | change)


def test_names_do_not_reach_a_terminal_as_commands(tmp_path, capsys):
    assert printable("ä → 层\t\x07") == "ä → 层\\t\\x07"
    summary = cli._summary(comparison(layers_a=(RED,), layers_b=(f"{RED}\n2", "c"), model_a=RED))
    assert "\x1b" not in summary and len(summary.splitlines()) == 6
    assert "\\x1b[31mred" in summary
    np.savez(tmp_path / "a.npz", **{RED: np.random.rand(9, 2)})
    command = ["compare", str(tmp_path / "a.npz"), str(tmp_path / "a.npz"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert cli.main([*command, "--layers-a", "missing"]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\\x1b[31mred" in out and "\\x1b[31mred" in err


def test_cells_that_a_spreadsheet_would_compute(tmp_path):
    names = ('=HYPERLINK("x")', "+1", "-1", "@sum", " =1", "\t=1", "layer.0", "a=b")
    values = torch.zeros(8, 2)
    cli._write_csv(comparison(values=values, layers_a=names), values, tmp_path / "values.csv")
    with open(tmp_path / "values.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:]] == [*(f"'{name}" for name in names[:6]), *names[6:]]
    assert rows[1][1:] == ["0.0", "0.0"]


def saved(path, values=None, **change):
    """A file as Comparison.save writes it, with changes; ``...`` leaves something out."""
    metadata = {"format": "pyrepr.Comparison", **comparison().metadata(), **change}
    metadata = {key: value for key, value in metadata.items() if value is not ...}
    values = comparison().values.numpy() if values is None else values
    np.savez(path, metadata=np.array(json.dumps(metadata)), **({} if values is ... else {"values": values}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": ...}, r"npz'$"),
        ({"values": np.zeros(2)}, r"whose values are float64 of shape \[2\]"),
        ({"values": np.zeros((1, 2), complex)}, "whose values are complex128"),
        ({"values": np.array([["a", "b"]])}, "whose values are <U1"),
        ({"values": np.zeros((2, 2))}, r"values must have shape \[La, Lb\] = \[1, 2\], got \[2, 2\]"),
        ({"layers_a": ...}, "without layers_a"),
        ({"layers_a": "a"}, "whose layers_a is 'a'"),
        ({"layers_b": [1, 2]}, r"whose layers_b is \[1, 2\]"),
        ({"count": "9"}, "whose count is '9'"),
        ({"count": True}, "whose count is True"),
        ({"versions": [1]}, r"whose versions is \[1\]"),
        ({"kernel": None}, "whose kernel is None"),
        ({"format": "pyrepr.Conversion"}, "whose metadata are of something else"),
        ({"more": 1}, "with 'more', which this version does not know"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(tmp_path, change, words):
    path = tmp_path / "file.npz"
    saved(path, **change)
    with pytest.raises(ValueError, match=f"^path must be a file written by Comparison.save, got .*{words}"):
        pyrepr.Comparison.load(path)


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "file.npz"
    saved(path)
    whole = path.read_bytes()
    assert torch.equal(pyrepr.Comparison.load(path).values, comparison().values)
    for content in (
        b"",
        b"PK",
        whole[:40],
        whole[: len(whole) // 2],
        whole[:-9],
        whole.replace(b"{", b"["),
        b"\0" * 99,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^path must be a file written by Comparison\.save"):
            pyrepr.Comparison.load(path)
    np.savez(path, values=np.zeros((1, 2)), metadata=np.array("[]"))
    with pytest.raises(ValueError, match="whose metadata are of something else"):
        pyrepr.Comparison.load(path)
    with pytest.raises(FileNotFoundError):
        pyrepr.Comparison.load(tmp_path / "missing.npz")
