"""Text that every machine with these examples has: the docstrings of installed packages."""

from __future__ import annotations

import ast
import importlib.util
import re
import warnings
from collections.abc import Iterable
from pathlib import Path


def docstrings(packages: Iterable[str]) -> list[str]:
    """Every docstring of at least 80 letters in the sources of these packages, each once, in a fixed order."""
    found: dict[str, None] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"there is no package {package} whose docstrings could be read")
        for file in sorted(Path(spec.origin).parent.rglob("*.py")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in other people's strings
                tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= 80:
                        found[text] = None
    return list(found)


def sentences(texts: Iterable[str]) -> list[str]:
    """Plain sentences of 40 to 200 letters, each once."""
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in text.split("\n\n"):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][^>`\\{}_=:]{38,198}\.", sentence):
                    found[sentence] = None
    return list(found)
