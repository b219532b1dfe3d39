"""``python -m pyrepr.gpu_check --out DIR``: everything about the GPU kernels that needs a GPU, in under ten minutes.

Builds the CUDA kernels if they are not built, runs the correctness cases of every family against float64, times them,
runs compute-sanitizer, and writes ``gpu.json`` and ``gpu.md``, kept up to date while it runs. Works in a plain clone:
it installs that first, or arranges it in a folder of DIR where it cannot be installed. ``--autotune`` searches launch
configurations instead, and may be repeated: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyrepr.backend import cuda_tool, native

SECONDS = 570.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyrepr.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json and gpu.md go")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="only these, as they are called in kernels/")
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="only these, in this order (benchmarks/gpu/plan.py)"
    )
    parser.add_argument("--ptxas", type=Path, metavar="FILE", help="an assembler to try beside Triton's and CUDA's own")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default {SECONDS:.0f})")
    parser.add_argument(
        "--autotune", action="store_true", help="search the tables of launch configurations (DIR/autotune.json)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="small cases in Triton's interpreter on the CPU: tests the command itself",
    )
    parser.add_argument("--built", action="store_true", help=argparse.SUPPRESS)  # set by the command for itself
    return parser


def missing() -> str | None:
    """What has to be built before the kernels can run, or ``None``."""
    if importlib.util.find_spec("pyrepr.benchmarks") is None:
        return "pyrepr is not installed"
    try:
        module, reason = native()
    except ImportError as error:
        return str(error)
    if module is None:
        return reason
    if not module.has_cuda and (cuda_tool("nvcc") or os.environ.get("CUDACXX")):
        return "pyrepr._C has no CUDA kernels"
    return None


def build(root: Path) -> str | None:
    """Installs the clone in place, with CUDA kernels; returns what went wrong, if anything did."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "-q"]
    command += ["--no-build-isolation", "--no-deps", "-e", str(root)]
    result = subprocess.run(command, text=True, capture_output=True, env=_with_nvcc(), check=False)
    return (result.stderr or result.stdout)[-2000:] if result.returncode else None


def _with_nvcc() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYREPR_CUDA"}
    if nvcc := cuda_tool("nvcc"):
        environment["PATH"] = os.pathsep.join([environment["PATH"], str(Path(nvcc).parent)])
    return environment


def arrange(root: Path, folder: Path) -> str | None:
    """The package as links into the clone, and the native module by CMake alone: for a Python without pip, with an old
    setuptools, or whose packages cannot be written. Returns why there is no native module, if there is none."""
    package, objects = folder / "pyrepr", folder / "build"
    package.mkdir(parents=True, exist_ok=True)
    objects.mkdir(exist_ok=True)
    parts = [path for path in (root / "pyrepr").iterdir() if path.name != "__pycache__" and path.suffix != ".so"]
    for part in (*parts, root / "kernels", root / "benchmarks"):
        link = package / part.name
        link.unlink(missing_ok=True)
        link.symlink_to(part)
    configure = ["cmake", "-S", str(root), "-B", str(objects), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"]
    configure += [f"-DPYREPR_CUDA={'ON' if cuda_tool('nvcc') else 'OFF'}"]
    if importlib.util.find_spec("pybind11"):
        configure += [f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}"]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (configure, ["cmake", "--build", str(objects), "--parallel", str(os.cpu_count() or 2)]):
        try:
            result = subprocess.run(command, text=True, capture_output=True, env=_with_nvcc(), check=False)
        except OSError as error:
            return f"cmake could not start: {error}"
        if result.returncode:
            return (result.stderr or result.stdout)[-2000:]
    return None


def made_ready(root: Path, out: Path) -> dict[str, str]:
    """Builds what is missing; returns the environment in which `pyrepr` can then be imported."""
    environment = dict(os.environ)
    what = missing()
    if what is None:
        return environment
    if not (root / "setup.py").exists():
        print(f"gpu_check: {what}; install from a clone on a machine with nvcc to have it built.")
        return environment
    print(f"gpu_check: {what}; building.", flush=True)
    problem = build(root)
    if problem:
        folder = out / "package"
        print(f"gpu_check: installing failed, arranging the package in {folder}:\n{problem}", flush=True)
        problem = arrange(root, folder)
        if problem:
            print(f"gpu_check: no native module, going on with what is there:\n{problem}", flush=True)
            environment["PYREPR_NATIVE"] = "0"
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return environment


def unfit() -> str | None:
    """What this machine lacks, and why, or ``None``."""
    import torch

    if not torch.cuda.is_available():
        reason = ""
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:  # built without CUDA; no driver, or one that is too old
            reason = f" ({str(error).split('. ')[0].strip('. ')})" if "driver" in str(error) else ""
        return f"a CUDA device and PyTorch sees none{reason}"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_80 or newer, and {torch.cuda.get_device_name()} is sm_{major}{minor}" if major < 8 else None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0: everything passed, 1: something failed (it is in the report), 2: it could not run."""
    started = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    if not args.dry_run and (why := unfit()):
        print(f"gpu_check needs {why}: nothing was run, nothing was written.")
        return 2
    root = Path(__file__).resolve().parents[1]
    if not args.built:
        args.out = args.out.resolve()
        environment = dict(os.environ) if args.dry_run else made_ready(root, args.out)
        # In a fresh process, and not in the clone, whose folder would hide what was installed.
        left = max(1.0, args.seconds - (time.monotonic() - started))  # building counts
        command = [sys.executable, "-m", "pyrepr.gpu_check", *argv, "--built", "--out", str(args.out)]
        command += ["--seconds", f"{left:.1f}"]
        with tempfile.TemporaryDirectory() as elsewhere:
            return subprocess.run(command, cwd=elsewhere, env=environment, check=False).returncode
    from pyrepr.benchmarks.gpu import runner

    try:
        if args.autotune:
            return runner.autotune(args.out, args.families, args.seconds, args.dry_run)
        return runner.run(args.out, args.families, args.seconds, args.dry_run, args.stages, args.ptxas)
    except (OSError, RuntimeError, ValueError) as failure:
        print(f"gpu_check: {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
