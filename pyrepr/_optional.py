"""Optional dependencies: imported when needed, and named with their pip command when missing."""

from __future__ import annotations

import importlib
from typing import Any

ONNX = '"pyrepr-kernels[onnx]"'
COMPARE = '"pyrepr-kernels[compare]"'
PLOT = '"pyrepr-kernels[plot]"'


def require(module: str, install: str) -> Any:
    """Imports an optional dependency, or says what to install.

    Raises:
        ImportError: one sentence with the pip command, and the reason where the module exists but does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        why = "is not installed" if missing else f"cannot be imported ({error})"
        raise ImportError(f"{module} is needed here and {why}: pip install {install}") from error
