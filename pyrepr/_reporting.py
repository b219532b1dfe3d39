"""What everything that runs a model over data and reports on it has in common."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pyrepr._version import __version__


def progress_bar(
    items: Iterable[Any], wanted: bool, description: str, unit: str, total: int | None = None
) -> Iterable[Any]:
    """`items` under a tqdm bar on stderr if that is wanted and tqdm installed, else as they are."""
    if not wanted:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return _reported(items, description, unit, total)
    return tqdm(items, desc=description, unit=unit, total=total, leave=False)


def _reported(items: Iterable[Any], description: str, unit: str, total: int | None) -> Iterator[Any]:
    """`items`, with a line on stderr every half minute: how many are done, and how long the rest will take."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    start = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= 30:
            told = now
            left = "" if total is None else f" of {total}, {remaining((now - start) / done * (total - done))} left"
            print(f"{description}: {done}{left or f' {unit}'}", file=sys.stderr)
        yield item


def remaining(seconds: float) -> str:
    """A span of time for people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def fixed(value: float, digits: int) -> str:
    """`value` with so many digits after the point; what rounds to zero has no sign."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def versions() -> dict[str, str]:
    """Of what made a result."""
    return {"pyrepr": __version__, "torch": torch.__version__, "python": platform.python_version()}


def printable(text: str) -> str:
    """Text for a terminal: what would move its cursor or change its colours is written out, as in ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def ending() -> Iterator[None]:
    """In this block the signals that ask a process to end raise SystemExit, so that what is half done is cleaned up.

    Only where nobody else handles them, and in the main thread, where signals arrive.
    """
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        wanted = []

    def leave(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise SystemExit(128 + number)

    taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, leave)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and is deleted when it does not,
    or when the process is told to end.

    Raises:
        FileNotFoundError: if the folder of `path` is none.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    with ending():
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
