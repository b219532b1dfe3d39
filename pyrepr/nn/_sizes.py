"""The sizes that layers are made with."""

from __future__ import annotations

from pyrepr._checks import shown


def check_sizes(**sizes: object) -> None:
    """Checks the sizes that a layer is made with: positive integers, or ``None`` for a default."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be a positive integer, got {shown(size)}")
