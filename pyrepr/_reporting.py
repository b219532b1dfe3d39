"""What everything that runs a model over data and reports on it has in common."""

from __future__ import annotations

import os
import platform
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


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and is deleted when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
