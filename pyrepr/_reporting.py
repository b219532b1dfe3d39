"""What everything that runs a model over data and reports on it has in common."""

from __future__ import annotations

import os
import platform
import signal
import threading
from collections.abc import Iterable, Iterator
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
        return items
    return tqdm(items, desc=description, unit=unit, total=total, leave=False)


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
    or when the process is told to end."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    with ending():
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
