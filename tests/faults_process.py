"""What test_faults.py starts: an action in forked children, each stopped at another place; prints what went wrong.

    faults_process.py ACTION FAULT FOLDER

The child stops itself at its n-th write (any built-in that writes, opens, renames or removes a file, whoever calls it),
for every n, or of very many writes for the first, the last and some between; or it cannot write more than n bytes to a
file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import pyrepr
from pyrepr import cli

WRITES = {
    "write",
    "writelines",
    "flush",
    "close",
    "open",
    "replace",
    "rename",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
    "truncate",
}
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
LIMITS = (0, 1, 30, 100, 300, 1000, 3000, 10000)  # bytes a file may have
MOST = 60  # places of an action
FAILED = 3  # the exit code of a child whose action raised what it may


def results(seed: int) -> tuple[pyrepr.Comparison, pyrepr.Conversion]:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    x = torch.randn(32, 4)
    return pyrepr.compare(net, net, [x], progress=False), pyrepr.convert(
        net, [x], bits=2, batch_sizes=(), progress=False
    )


def stored(folder: Path, seed: int) -> list[str]:
    import numpy as np

    rng = np.random.default_rng(seed)
    for side in "ab":
        np.savez(folder.parent / f"{side}{seed}.npz", one=rng.standard_normal((9, 3)), two=rng.standard_normal((9, 2)))
    return [
        "compare",
        str(folder.parent / f"a{seed}.npz"),
        str(folder.parent / f"b{seed}.npz"),
        "--name-a",
        "A",
        "--name-b",
        "B",
        "--out",
        str(folder),
        "--quiet",
    ]


def action(kind: str, folder: Path, seed: int) -> Callable[[], object]:
    """Writes into `folder`; what is written depends on the seed."""
    if kind == "command":
        argv = stored(folder, seed)
        return lambda: cli.main(argv)
    comparison, conversion = results(seed)
    return {
        "npz": lambda: comparison.save(folder / "result.npz"),
        "html": lambda: comparison.to_html(folder / "result.html"),
        "plot": lambda: comparison.plot(folder / "result.png"),
        "json": lambda: conversion.save(folder / "result.json"),
        "page": lambda: conversion.to_html(folder / "page.html"),
    }[kind]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Writes:
    """A profile function that counts writes, and at one of them sends this process a signal."""

    def __init__(self, number: int = 0, sign: int = 0) -> None:
        self.count, self.number, self.sign = 0, number, sign

    def __call__(self, frame: object, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__name__", "") in WRITES:
            self.count += 1
            if self.count == self.number:
                os.kill(os.getpid(), self.sign)


def places(count: int) -> list[int]:
    """All of 1 … count, or the first and last 15 and some between."""
    if count <= MOST:
        return list(range(1, count + 1))
    middle = MOST - 30
    return [*range(1, 16), *(16 + (count - 31) * i // middle for i in range(middle)), *range(count - 14, count + 1)]


def child(run: Callable[[], object], fault: str, number: int) -> int:
    """The exit code of a child that runs the action with the fault; negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if fault == "disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        else:
            sys.setprofile(Writes(number, SIGNALS[fault]))
        done = run()
        sys.setprofile(None)
        code = FAILED if isinstance(done, int) and done in (2, 130, 143) else 0 if not isinstance(done, int) else done
    except (OSError, KeyboardInterrupt):
        code = FAILED
    except SystemExit as end:
        code = FAILED if end.code in (130, 143) else 1
    finally:
        os._exit(code)


def judge(folder: Path, old: dict[str, bytes], new: dict[str, bytes], fault: str, kind: str, code: int) -> str | None:
    now = content(folder)
    for name in old.keys() | new.keys():
        if now.get(name) not in (old.get(name), new.get(name)):
            return f"{name} is neither the old nor the new one"
    left = [name for name in now if name not in old and name not in new]
    # Nobody can tidy up after SIGKILL; after SIGTERM the command does, a function's caller has to.
    tidy = fault in ("SIGINT", "disk") or (fault == "SIGTERM" and kind == "command")
    if left and tidy:
        return f"{left[0]} is left behind"
    if fault == "disk" and code == FAILED and now != old:
        return "a call that failed changed files"
    if code not in (0, FAILED) and not (fault != "disk" and code == -SIGNALS[fault]):
        return f"exit code {code}"
    return None


def main(kind: str, fault: str, place: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    folder = Path(place) / "out"
    first, second = action(kind, folder, 1), action(kind, folder, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        folder.mkdir()
        second()
        new = content(folder)
        writes = Writes()
        sys.setprofile(writes)
        second()
        sys.setprofile(None)
        assert content(folder) == new, "the same call writes other bytes each time"
        shutil.rmtree(folder)
        folder.mkdir()
        first()
    old = content(folder)
    assert old.keys() == new.keys() and old != new
    faults, trouble, stopped = 0, [], 0
    for number in LIMITS if fault == "disk" else places(writes.count):
        code = child(second, fault, number)
        faults += 1
        stopped += code != 0
        if what := judge(folder, old, new, fault, kind, code):
            trouble.append(f"{fault} at {number}: {what}")
        shutil.rmtree(folder)
        folder.mkdir()
        for name, data in old.items():
            (folder / name).write_bytes(data)
    sys.stdout.write(json.dumps({"faults": faults, "stopped": stopped, "trouble": trouble[:5]}))


if __name__ == "__main__":
    sys.stdout.flush()
    main(*sys.argv[1:])
