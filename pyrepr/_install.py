"""Whether this install is whole: the compiled module, what was built, and what to do where something is missing."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from pyrepr._version import __version__

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent


def in_clone() -> bool:
    """Whether these files are those of a clone (an editable install, or a folder that Python was started in)."""
    return (ROOT / "setup.py").exists() and (ROOT / "csrc").is_dir()


def remedy() -> str:
    """How the compiled module of this install is made (again)."""
    if in_clone():
        return f"pip install --no-deps -e '{ROOT}'"
    return "pip install --force-reinstall --no-deps --no-cache-dir . (in its clone)"


@functools.cache
def build_info() -> dict:
    """What the build wrote down about itself (see setup.py); empty if it wrote nothing."""
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def reference_alone() -> str | None:
    """Why there is no compiled module, if that was asked for; ``None`` if there has to be one.

    Raises:
        ValueError: if ``PYREPR_NATIVE`` is neither 0 nor 1.
    """
    wanted = os.environ.get("PYREPR_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"PYREPR_NATIVE must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "PYREPR_NATIVE=0 is set"
    return None if wanted == "1" or build_info().get("native", True) else build_info()["reason"]


def module_is_there() -> bool:
    """Whether there is a compiled module for this Python, loadable or not."""
    return importlib.machinery.PathFinder.find_spec("pyrepr._C", [str(PACKAGE)]) is not None


def way_to_native() -> str:
    """What someone does who runs the reference alone and wants compiled code."""
    if os.environ.get("PYREPR_NATIVE") != "0":
        return f"run {remedy()}"
    there = build_info().get("native", True) and module_is_there()
    return "unset PYREPR_NATIVE" if there else f"unset PYREPR_NATIVE and run {remedy()}"


def check() -> None:
    """Refuses to be imported without a compiled module, unless that was asked for.

    Raises:
        ImportError: with what is missing and how to get it.
    """
    building = "pyrepr.gpu_check" in sys.orig_argv  # python -m pyrepr.gpu_check builds the module where there is none
    if building or reference_alone() or module_is_there():
        return
    others = sorted(path.name for path in PACKAGE.glob("_C.*"))
    if in_clone() and not others:
        what = f"pyrepr was imported from {ROOT}, a folder of sources in which nothing is compiled"
        what += ": start Python elsewhere if pyrepr is installed, or install it here"
    elif others:
        what = f"{PACKAGE} holds compiled code for another Python ({', '.join(others)}): install it for this one"
    else:
        what = f"{PACKAGE} holds no compiled code: install it again"
    raise ImportError(f"{what}, with {remedy()}; PYREPR_NATIVE=0 runs pyrepr without it, several times slower")


def hash_of(*patterns: str) -> str:
    """A hash of the files in the clone that match, as CMakeLists.txt makes it."""
    paths = sorted({path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)})
    hashes = (hashlib.sha256((ROOT / path).read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@functools.cache
def native() -> tuple[ModuleType | None, str]:
    """The compiled module and ``""``, or ``None`` and the reason why there is none: it was asked for.

    Raises:
        ImportError: if there has to be a module and it cannot be loaded, or was built from other sources.
        ValueError: if ``PYREPR_SIMD`` or ``PYREPR_NATIVE`` have no meaning.
        RuntimeError: if this machine or build lacks the instruction set that ``PYREPR_SIMD`` asks for.
    """
    if asked := reference_alone():
        return None, asked
    try:
        _C = importlib.import_module("pyrepr._C")
    except ImportError as error:
        raise ImportError(f"pyrepr._C cannot be loaded ({error}); build it again with {remedy()}") from error
    build, other = getattr(_C, "build", {}), ""
    if build.get("version") != __version__:
        other = f"version {build.get('version', 'unknown')}, and the Python files are of {__version__}"
    elif in_clone() and build["interface"] != hash_of("csrc/bindings/*.*", "csrc/common.h"):
        other = "bindings that are not those in csrc"
    if other:
        raise ImportError(f"{_C.__file__} was built from {other}; build it again with {remedy()}")
    _C.simd_level()
    return _C, ""


def behind() -> str:
    """Said of a module whose interface fits and which was built from other sources than lie beside it; else empty."""
    module, _ = native()
    if module is None or not in_clone() or module.build["sources"] == hash_of("csrc/*/*.*", "csrc/*.h"):
        return ""
    return f"; csrc has changed since it was built: {remedy()}"


check()
