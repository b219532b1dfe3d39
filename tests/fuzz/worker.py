"""One family in a process of its own: `python worker.py FAMILY SEED SECONDS BOARD [--case N]`.

BOARD is a file the parent reads: before every call the case is written there as a script, so that a crash or a call
that never returns has a name. Cases are numbered; seed and number make a case. At the end, or when the limit of
failures is reached, a JSON report goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import mmap
import re
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyrepr

sys.path.insert(0, str(Path(__file__).parent))

import memory
import modes
from draw import Case, Draw, gapped, put, randn

FAMILIES = (
    "measures",
    "streams",
    "delta_rule",
    "erase",
    "causal_conv1d",
    "lookup",
    "pairs",
    "stats",
    "layers",
    "models",
    "command",
)
BOARD_BYTES = 1 << 16
MOST_FAILURES = 25
CLEAR = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, FloatingPointError)
# What a sentence for users never says.
JARGON = re.compile(
    r"INTERNAL ASSERT|incompatible function arguments|std::|pybind|Traceback|object has no attr|'NoneType' object"
    r"|unsupported operand|size of tensor a|must match the size|Expected all tensors|unpack|subscriptable"
)


class Board:
    """The case in progress, in a file that both processes map."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), BOARD_BYTES)
        self._count = 0

    def write(self, number: int, text: str) -> None:
        data = f"{self._count}\n{number}\n{text}".encode()[: BOARD_BYTES - 1] + b"\0"
        self._count += 1
        self._map[: len(data)] = data


def unclear(error: BaseException, case: Case) -> str | None:
    """What is wrong with an error, if it is not one sentence that names what is at fault."""
    text = str(error)
    if not isinstance(error, CLEAR):
        return f"{type(error).__name__} is not an error for bad arguments: {text[:300]}"
    if len(text.strip().splitlines()) != 1 or len(text) > 500:
        return f"{type(error).__name__} is not one sentence: {text[:400]!r}"
    if JARGON.search(text):
        return f"{type(error).__name__} is not for users: {text!r}"
    names = case.names or tuple(re.findall(r"[A-Za-z_]\w*", case.call))
    if not any(re.search(rf"\b{re.escape(name)}\b", text) for name in names):
        return f"{type(error).__name__} names no argument: {text!r}"
    return None


def bytes_of(x: Tensor) -> Tensor:
    """All bytes behind a tensor, the gaps between its elements included."""
    whole = torch.empty(0, dtype=torch.uint8)
    return whole.set_(x.untyped_storage(), 0, (x.untyped_storage().nbytes(),), (1,)).clone()  # type: ignore[call-overload]


def tensors_of(names: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in names.items()
        if isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu" and name != "out"
    }


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = a.detach().resolve_neg().contiguous(), b.detach().resolve_neg().contiguous()
        return not a.numel() or a.is_meta or torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return True


class Worker:
    def __init__(self, family: str, seed: int, board: Board) -> None:
        self.family, self.seed, self.board = importlib.import_module(family), seed, board
        self.calls = self.cases = self.refused = self.values = 0
        self.modes: dict[str, list[int]] = {}
        self.failures: dict[str, dict[str, Any]] = {}

    def fail(self, number: int, case: Case, what: str) -> None:
        mode = case.around.split(" in ")[0] if case.around.startswith("# mode") else ""
        key = f"{case.kind}: {mode} {re.sub(r'[-+]?[0-9.]+(e[-+]?[0-9]+)?', '#', what)[:60]}"
        found = self.failures.setdefault(key, {"what": what, "case": number, "script": case.script(), "count": 0})
        found["count"] += 1

    def run(self, number: int) -> None:
        draw = Draw(f"{self.family.__name__} {self.seed} {number}")
        case = self.family.draw(draw)
        self.cases += 1
        memory.reset()
        names: dict[str, Any] = {
            "np": np,
            "torch": torch,
            "pyrepr": pyrepr,
            "randn": randn,
            "gapped": gapped,
            "put": put,
            "guarded": memory.guarded,
            **getattr(self.family, "NAMES", {}),
        }
        self.board.write(number, case.script())
        try:
            exec("\n".join(case.lines), names)
        except CLEAR as error:
            if what := unclear(error, case):
                raise AssertionError(f"the lines before the call: {what}") from error
            return
        if case.differential and draw.chance(0.6):
            self.differentiate(number, case, names, draw)
        else:
            self.evaluate(number, case, names, draw)

    def evaluate(self, number: int, case: Case, names: dict[str, Any], draw: Draw) -> None:
        around, context = self.mode(draw)
        case.around = around
        threads = draw.choice((1, 2, 2, 3, 5))
        torch.set_num_threads(threads)
        watched = {name: x for name, x in tensors_of(names).items() if name not in case.changed}
        before = {name: bytes_of(x) for name, x in watched.items()}
        kept = {name: bytes_of(names[name]) for name in case.changed if isinstance(names.get(name), Tensor)}
        self.board.write(number, case.script())
        try:
            self.calls += case.calls
            with context:
                exec(case.call, names)
        except Exception as error:
            self.error(number, case, names, error, kept)
        else:
            self.values += 1
            first = names.get("out")
            if case.expect == "error":
                self.fail(number, case, "accepted what it should refuse")
            elif what := case.check(names):
                self.fail(number, case, what)
            elif case.repeatable and not case.changed and draw.chance(0.2):
                self.again(number, case, names, threads, context, first)
        for name, x in watched.items():
            if not torch.equal(bytes_of(x), before[name]):
                self.fail(number, case, f"{name} was changed")

    def error(self, number: int, case: Case, names: dict[str, Any], error: Exception, kept: dict[str, Tensor]) -> None:
        self.refused += 1
        if case.expect == "value":
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fail(number, case, f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name})")
        elif what := unclear(error, case):
            self.fail(number, case, what)
        for name, old in kept.items():
            if not torch.equal(bytes_of(names[name]), old):
                self.fail(number, case, f"{name} was changed by a call that failed")

    def again(self, number: int, case: Case, names: dict[str, Any], threads: int, context: Any, first: Any) -> None:
        torch.set_num_threads(threads % 4 + 1)
        self.calls += case.calls
        with context:
            exec(case.call, names)
        if not same_bits(first, names["out"]):
            self.fail(number, case, f"other bits with {threads} and {threads % 4 + 1} threads")

    def mode(self, draw: Draw) -> tuple[str, Any]:
        kind = draw.choices(("", "grad", "inference", "reference", "meta"), (5, 2, 1, 1.5, 0.3))[0]
        if kind == "inference" and getattr(self.family, "BACKENDS", True):
            return "torch._C._set_grad_enabled(False)  # torch.inference_mode()", torch.inference_mode()
        if kind == "reference" and getattr(self.family, "BACKENDS", True):
            return "pyrepr.use_backend('reference').__enter__()", Again(lambda: pyrepr.use_backend("reference"))
        if kind == "meta" and getattr(self.family, "BACKENDS", True):
            return "torch.set_default_device('meta')", Again(lambda: torch.device("meta"))
        if kind == "grad":
            return "", contextlib.nullcontext()
        return "torch.set_grad_enabled(False)", torch.no_grad()

    def differentiate(self, number: int, case: Case, names: dict[str, Any], draw: Draw) -> None:
        mode = draw.choice(modes.MODES)
        case.around = f"# mode of differentiation: {mode} in {', '.join(case.differential.variables)}"
        context: Any = contextlib.nullcontext()
        if draw.chance(0.15):
            case.around += ", with the reference"
            context = pyrepr.use_backend("reference")
        torch.set_num_threads(draw.choice((1, 2, 2, 3)))
        self.board.write(number, case.script())
        counts = self.modes.setdefault(f"{case.kind} {mode}", [0, 0])
        try:
            with context:
                what, calls = modes.check(mode, case, names, draw)
            self.calls += calls
            counts[0] += 1
            if what:
                self.fail(number, case, what)
        except Exception as error:
            counts[1] += 1
            self.calls += 1
            if what := unclear(error, case):
                self.fail(number, case, f"{what} ({Path(traceback.extract_tb(error.__traceback__)[-1].filename).name})")

    def report(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "calls": self.calls,
            "values": self.values,
            "refused": self.refused,
            "modes": self.modes,
            "failures": self.failures,
        }


class Again:
    """A context that can be entered more than once."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._inner = self._make()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("board", type=Path)
    parser.add_argument("--case", type=int, help="only this one, with its script")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=0, help="how many at most (default: no limit but the seconds)")
    parser.add_argument("--most", type=int, default=MOST_FAILURES, help="kinds of failures after which to stop")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    torch.set_num_threads(2)
    worker = Worker(args.family, args.seed, Board(args.board))
    end, number = time.monotonic() + args.seconds, args.start
    if args.case is not None:
        worker.run(args.case)
    else:
        last = args.start + args.cases if args.cases else sys.maxsize
        while number < last and time.monotonic() < end and len(worker.failures) < args.most:
            worker.run(number)
            number += 1
    print(json.dumps(worker.report()))


if __name__ == "__main__":
    main()
