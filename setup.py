"""Builds pyrepr._C with CMake. Everything declarative is in pyproject.toml.

The native module is optional at run time (the PyTorch reference is always there), so a failed build does not fail
the install: the reason is written next to the package and shown by `pyrepr.backends()`. Set PYREPR_REQUIRE_NATIVE=1
to turn a failed build into a failed install, PYREPR_CUDA=0 to leave out the CUDA kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildError(RuntimeError):
    """The native module could not be built; the message is what `pyrepr.backends()` will show."""


def run(step: str, command: list[str]) -> None:
    """Runs one build step; on failure the last error line becomes the reason."""
    try:
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        raise BuildError(f"{step} could not start: {error}") from error
    print(result.stdout)
    if result.returncode:
        lines = [line.strip() for line in result.stdout.splitlines()]
        at = next((i for i, line in enumerate(lines) if "error" in line.lower()), max(0, len(lines) - 1))
        raise BuildError(f"{step} failed: " + " ".join(line for line in lines[at : at + 3] if line))


def commit() -> str | None:
    """The commit that is being built, with a + if files differ from it; ``None`` outside a clone."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        result = subprocess.run(command, text=True, capture_output=True)
    except OSError:
        return None
    return result.stdout.strip() or None


class CMakeBuild(build_ext):
    """Runs CMake and copies the one module it makes; writes `_build_info.json` beside it."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {
            "native": True,
            "reason": None,
            "cuda": False,
            "cuda_reason": None,
            "commit": commit(),
        }
        try:
            self.build_with_cuda_if_possible(module, info)
        except BuildError as error:
            if os.environ.get("PYREPR_REQUIRE_NATIVE") == "1":
                raise
            module.unlink(missing_ok=True)
            info.update(native=False, reason=str(error), cuda=False)
            print(f"warning: pyrepr is installed without compiled kernels: {error}", file=sys.stderr)
        (module.parent / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the module, if there is one, and the build's own account of it."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            target = ROOT / self.get_ext_filename(ext.name)
            target.unlink(missing_ok=True)
            if built.exists():
                self.copy_file(str(built), str(target))
            self.copy_file(str(built.with_name("_build_info.json")), str(target.with_name("_build_info.json")))

    def build_with_cuda_if_possible(self, module: Path, info: dict[str, object]) -> None:
        """CUDA kernels are built where nvcc is found; if they fail to build, the CPU kernels still get built."""
        if os.environ.get("PYREPR_CUDA") == "0":
            info["cuda_reason"] = "left out at build time by PYREPR_CUDA=0"
        elif not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
            info["cuda_reason"] = "no nvcc was found at build time"
        else:
            try:
                self.cmake(module, cuda=True)
                info["cuda"] = True
                return
            except BuildError as error:
                info["cuda_reason"] = str(error)
                print(f"warning: building without CUDA kernels: {error}", file=sys.stderr)
        self.cmake(module, cuda=False)

    def cmake(self, module: Path, *, cuda: bool) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        # pip throws isolated build environments away, and with them the ninja an old cache points to.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYREPR_CUDA={'ON' if cuda else 'OFF'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        run("configuring", configure)
        run("compiling", ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 2)])


setup(ext_modules=[Extension("pyrepr._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
