"""Builds pyrepr._C with CMake. Everything declarative is in pyproject.toml.

A build makes the native module or fails, and its last words say what is missing and how to get it. PYREPR_NATIVE=0 asks
for the PyTorch reference alone, as a pure wheel. PYREPR_CUDA=0 leaves out the CUDA kernels, which are built where nvcc
is found and works; PYREPR_CUDA=1 insists on them; PYREPR_CUDA_ARCHS says for which GPUs. CXX, CXXFLAGS, CMAKE_ARGS,
CMAKE_BUILD_PARALLEL_LEVEL and MAX_JOBS do what they do elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ALONE = "PYREPR_NATIVE=0 installs pyrepr without compiled code, several times slower."

# What CMake or the compiler says → what that means, and what brings it: Debian and Ubuntu, Fedora, macOS, conda.
COMPILER = ("g++", "gcc-c++", "xcode-select --install", "cxx-compiler")
OPENMP = (
    "g++ (or libomp-dev, for Clang)",
    "gcc-c++ (or libomp-devel, for Clang)",
    "brew install libomp",
    "llvm-openmp",
)
HEADERS = ("python3-dev", "python3-devel", "brew install python", "python")
TOOLS = ("cmake ninja-build", "cmake ninja-build", "brew install cmake ninja", "cmake ninja")
MISSING = (
    (r"No CMAKE_CXX_COMPILER could be found", "there is no C++ compiler", COMPILER),
    (
        r"is not a full path|Could not find the compiler",
        "the C++ compiler {CXX} is not there",
        COMPILER,
    ),
    (r"is not able to compile a simple test program", "the C++ compiler {CXX} cannot make a program", COMPILER),
    (r"OpenMP is missing", "the C++ compiler {CXX} has no OpenMP", OPENMP),
    (r"Could NOT find Python|Could NOT find pybind11", "the headers of this Python are missing", HEADERS),
    (r"unable to find a build program", "neither ninja nor make is there", TOOLS),
    (r"could not start", "cmake is not there", TOOLS),
)
SHORT_OF_MEMORY = r"Killed|cannot allocate memory|virtual memory exhausted|bad_alloc"


class BuildError(RuntimeError):
    """A step of the build failed; the message is a clause that says why."""


def refuse(message: str) -> NoReturn:
    """Ends the build with these as its last words."""
    sys.stdout.flush()
    raise SystemExit(f"\npyrepr was not built: {message}")


def switch(name: str) -> bool | None:
    """An environment variable that is 0, 1 or not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        refuse(f"{name} must be 0 or 1, got {value!r}.")
    return None if value == "" else value == "1"


def what_failed(step: str, output: str) -> str:
    """One clause for the output of a failed step, with the commands that help."""
    for pattern, meaning, remedies in MISSING:
        if re.search(pattern, output):
            debian, fedora, macos, conda = remedies
            compiler = os.environ.get("CXX")
            meaning = meaning.replace("{CXX}", f"{compiler} (from CXX)" if compiler else "that was found")
            return (
                f"{meaning}. Debian and Ubuntu bring it with apt install {debian}, Fedora with dnf install {fedora}, "
                f"macOS with {macos}, conda with conda install -c conda-forge {conda}"
            )
    lines = [line.strip() for line in output.splitlines()]
    at = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 1))
    memory = "; with MAX_JOBS=1 it takes less memory" if re.search(SHORT_OF_MEMORY, output) else ""
    return f"{step} failed: " + " ".join(line for line in lines[at : at + 3] if line) + memory


def run(step: str, command: list[str]) -> None:
    """Runs one build step and shows what it prints."""
    try:
        result = subprocess.run(
            command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise BuildError(what_failed(step, f"{command[0]} could not start: {error}")) from error
    print(result.stdout, flush=True)
    if result.returncode:
        raise BuildError(what_failed(step, result.stdout))


def jobs() -> list[str]:
    """How many compilers run at once, as arguments of `cmake --build`; each takes up to 1 GB."""
    name = "CMAKE_BUILD_PARALLEL_LEVEL" if os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") else "MAX_JOBS"
    wanted = os.environ.get(name, "")
    if wanted and not (wanted.isdigit() and int(wanted)):
        refuse(f"{name} must be a positive number, got {wanted!r}.")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    except (ValueError, OSError):
        memory = cpus
    return ["--parallel", wanted or str(max(1, min(cpus, memory)))]


def commit() -> str | None:
    """The commit that is being built, with a + if files differ from it; ``None`` outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        result = subprocess.run(command, text=True, capture_output=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None


def write_info(folder: Path, **info: object) -> None:
    """What the build says of itself, for `pyrepr.backends()` and `pyrepr info`."""
    info = {"native": True, "reason": None, "cuda": False, "cuda_reason": None, "commit": commit(), **info}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class PyBuild(build_py):
    """Copies the Python files, and no others: what an older build left behind would go into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "pyrepr", ignore_errors=True)
        super().run()
        if switch("PYREPR_NATIVE") is False:
            folder = ROOT / "pyrepr" if self.editable_mode else Path(self.build_lib) / "pyrepr"
            write_info(folder, native=False, reason="it was built with PYREPR_NATIVE=0")


class CMakeBuild(build_ext):
    """Runs CMake and copies the one module it makes; writes `_build_info.json` beside it."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        try:
            reason = self.why_without_cuda(module)
            if reason:
                self.cmake(module, cuda=False)
        except BuildError as error:
            refuse(f"{error}. {ALONE}")
        write_info(module.parent, cuda=not reason, cuda_reason=reason)

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the module and the build's own account of it."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            target = ROOT / self.get_ext_filename(ext.name)
            target.unlink(missing_ok=True)  # a process that has loaded the old one keeps it
            self.copy_file(str(built), str(target))
            self.copy_file(str(built.with_name("_build_info.json")), str(target.with_name("_build_info.json")))

    def why_without_cuda(self, module: Path) -> str | None:
        """Builds with CUDA kernels where nvcc is found; else, or if they fail and nobody insists, says why not."""
        wanted = switch("PYREPR_CUDA")
        if wanted is False:
            return "left out at build time by PYREPR_CUDA=0"
        if not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
            if wanted:
                refuse("PYREPR_CUDA=1 asks for CUDA kernels, and there is no nvcc on the path (or in CUDACXX).")
            return "no nvcc was found at build time"
        try:
            self.cmake(module, cuda=True)
        except BuildError as error:
            if wanted:
                raise
            print(f"warning: building without CUDA kernels: {error}", file=sys.stderr, flush=True)
            return str(error)
        return None

    def cmake(self, module: Path, *, cuda: bool) -> None:
        try:
            import pybind11
        except ImportError:
            refuse("without build isolation, pip install 'setuptools>=77' cmake ninja pybind11 comes first.")
        build = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        # pip throws isolated build environments away, and with them the ninja an old cache points to.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYREPR_CUDA={'ON' if cuda else 'OFF'}",
            f"-DPYREPR_CUDA_ARCHS={re.sub('[ ,]+', ';', os.environ.get('PYREPR_CUDA_ARCHS', '').strip())}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run("configuring", configure)
        run("compiling", ["cmake", "--build", str(build), *jobs()])


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < 77:
        refuse(
            f"it needs setuptools 77 or newer, and this is {setuptools.__version__}: pip install -U setuptools, or "
            "leave build isolation on."
        )
    if not os.access(ROOT, os.W_OK):
        refuse(f"{ROOT} cannot be written, and a build puts its files there: copy it to where it can.")
    native = switch("PYREPR_NATIVE") is not False
    setup(
        # `kernels` and `benchmarks` go into the package: see package-dir in pyproject.toml.
        packages=[
            *find_packages(include=["pyrepr", "pyrepr.*"]),
            *(f"pyrepr.{name}" for name in find_packages(include=["kernels*", "benchmarks*"])),
        ],
        ext_modules=[Extension("pyrepr._C", sources=[])] if native else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": PyBuild},
    )


if __name__ == "__main__":  # tests import this file
    main()
