"""Where pyrepr meets other libraries. None of them is imported before it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra installs it.

    Raises:
        ImportError: one sentence with the pip command, and the reason where the module exists but does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        why = "which is not installed" if missing else f"which does not import ({error})"
        raise ImportError(f'this needs {module}, {why}: pip install "pyrepr-kernels[{extra}]"') from error
