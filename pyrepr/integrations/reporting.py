"""What everything that runs a model over data and reports on it has in common."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch


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
    from pyrepr import __version__

    return {"pyrepr": __version__, "torch": torch.__version__, "python": platform.python_version()}
