"""Triton's cache of every kernel, made where there is no GPU, so that a run on one compiles nothing.

    python -m pyrepr.benchmarks.gpu.cache make ARCHIVE --architectures 90 --ptxas "" FILE
    python -m pyrepr.benchmarks.gpu.cache lay ARCHIVE FOLDER

A kernel's place in the cache is named by its source, its options, and the versions of Triton and of the assembler: both
machines must have the same. Where it lies there is not in the name, but in a list of paths, which `lay` writes anew.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

FAMILIES = ("causal_conv1d", "delta_rule", "gram", "lookup", "pairs")
KEPT = (".cubin", ".json")  # what a launch reads


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """With these variables; an empty value: without."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def every_variant(capability: int) -> list[tuple[int, str, str]]:
    """(capability, family, name) of all that is launched there."""
    from pyrepr.kernels import _launch

    found = []
    for family in FAMILIES:
        variants = importlib.import_module(f"pyrepr.kernels.{family}").variants(_launch.architecture(capability))
        found += [(capability, family, variant.name) for variant in variants]
    return found


def _compile(capability: int, family: str, name: str) -> str:
    """In a worker process: what went wrong, or nothing."""
    from pyrepr.kernels import _launch

    variants = importlib.import_module(f"pyrepr.kernels.{family}").variants(_launch.architecture(capability))
    try:
        _launch.compile_ahead(next(v for v in variants if v.name == name), capability)
    except Exception as error:
        return f"sm_{capability} {family} {name}: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def _outcome(kernel: tuple[int, str, str], compiling: concurrent.futures.Future[str]) -> str:
    """What went wrong, also where the compiler took its process with it, and so those of the kernels after it."""
    try:
        return compiling.result()
    except BrokenProcessPool as error:
        capability, family, name = kernel
        return f"sm_{capability} {family} {name}: {error}"


def make(archive: Path, kernels: Sequence[tuple[int, str, str]], assemblers: Sequence[str]) -> list[str]:
    """Compiles with each assembler ("": Triton's own) and packs; what did not compile, a line each."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for assembler in assemblers:
            with (
                environment(TRITON_CACHE_DIR=folder, TRITON_PTXAS_PATH=assembler),
                concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            ):
                running = [pool.submit(_compile, *kernel) for kernel in kernels]
                failures += [found for each in zip(kernels, running, strict=True) if (found := _outcome(*each))]
        partial = archive.with_suffix(".part")
        with tarfile.open(partial, "w:xz") as packed:
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in KEPT:
                    packed.add(path, path.relative_to(folder))
        partial.replace(archive)
    return failures


def lay(archive: Path, folder: Path) -> int:
    """Unpacks into `folder`, to be named by TRITON_CACHE_DIR; how many kernels there are."""
    checked = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # of Python 3.10.12, 3.11.4 and newer
    with tarfile.open(archive) as packed:
        packed.extractall(folder, **checked)
    groups = sorted(folder.rglob("__grp__*.json"))
    for group in groups:
        paths = {path.name: str(path.resolve()) for path in group.parent.iterdir() if path != group}
        group.write_text(json.dumps({"child_paths": paths}))
    return len(groups)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: some kernels could not be compiled, which are said, and the others are in the archive."""
    parser = argparse.ArgumentParser(prog="python -m pyrepr.benchmarks.gpu.cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("archive", type=Path)
    making.add_argument("--architectures", type=int, nargs="+", default=[90], help="default 90: H100, H200")
    making.add_argument("--ptxas", nargs="+", default=[""], help="assemblers; an empty one is Triton's (default)")
    laying = commands.add_parser("lay")
    laying.add_argument("archive", type=Path)
    laying.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    if args.command == "lay":
        print(f"cache: {lay(args.archive, args.folder)} kernels")
        return 0
    kernels = [kernel for capability in args.architectures for kernel in every_variant(capability)]
    failures = make(args.archive, kernels, args.ptxas)
    made = len(kernels) * len(args.ptxas) - len(failures)
    print(f"cache: {made} kernels, {len(failures)} not made", flush=True)
    print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
