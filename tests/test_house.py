"""The rooms of the package and the arrows between them: imports run one way, and never in a circle.

``kernels/``, ``benchmarks/`` and ``examples/papers/`` count under their installed names, ``pyrepr.kernels`` and so on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1]
FOLDERS = {
    "pyrepr": "pyrepr",
    "kernels": "pyrepr.kernels",
    "benchmarks": "pyrepr.benchmarks",
    "examples/papers": "pyrepr.papers",
}

# Every room, from the ground up; rooms of one floor stand side by side. A room may import from floors below its own,
# and what is listed in BESIDE from its own.
FLOORS = [
    ("_version",),
    ("_install", "_ptxas"),
    ("backend", "_checks", "_modules", "_optional", "_reporting"),
    ("reference",),
    ("kernels",),
    ("ops",),
    ("functional",),
    ("stats",),
    ("similarity",),
    ("nn",),
    ("integrations",),
    ("models",),
    ("pyrepr",),  # the face: what the package itself exports
    ("benchmarks", "papers"),
    ("cli", "gpu_check"),
    ("__main__",),
]
BESIDE = {("cli", "gpu_check")}


def modules() -> dict[str, Path]:
    """Installed name → file of every module."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (SOURCES / folder).rglob("*.py"):
            parts = [package, *path.relative_to(SOURCES / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, at its top, inside functions or for its annotations."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in wanted:
            while target not in MODULES and "." in target:
                target = target.rpartition(".")[0]
            if target in MODULES and target != name:
                yield target


IMPORTS = {name: sorted(set(imports_of(name))) for name in MODULES}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def floor(name: str) -> int:
    return next(height for height, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_every_module_has_a_room():
    known = {room for rooms in FLOORS for room in rooms}
    assert {room(name) for name in MODULES} <= known


@pytest.mark.parametrize("name", sorted(MODULES))
def test_arrows_run_downwards(name):
    wrong = [
        target
        for target in IMPORTS[name]
        if room(target) != room(name) and floor(target) >= floor(name) and (room(name), room(target)) not in BESIDE
    ]
    assert not wrong, f"{name} imports {', '.join(wrong)}, which stand no lower"


def test_no_module_imports_itself_by_way_of_others():
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in IMPORTS[name]:
                # A package's __init__ hands on what its own modules hold; they do not need it.
                walk(target, (*path, name))
            done.add(name)

    for name in sorted(MODULES):
        walk(name, ())
