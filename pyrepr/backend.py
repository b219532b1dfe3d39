"""Which implementations exist, which can run here, and which one an op takes.

Four backends: ``reference`` (plain PyTorch, any device, the truth), ``cpu`` (``pyrepr._C``, compiled C++),
``triton`` and ``cuda`` (GPU). Left alone, an op takes the fastest one that is proven on the tensors' device.
:func:`use_backend` and the environment variable ``PYREPR_BACKEND`` force one; forcing one that cannot run is an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyrepr import _ptxas
from pyrepr._install import behind, build_info, native, way_to_native

__all__ = ["Backend", "backends", "use_backend"]

NAMES = ("reference", "cpu", "triton", "cuda")

# What an op takes for CPU tensors when nothing is forced, best first.
CPU_ORDER = ("cpu", "reference")

# The same for CUDA tensors, op by op; an op that is not listed takes the reference. A GPU kernel has to earn its line:
# it has passed `python -m pyrepr.gpu_check` on a GPU and was faster there than what stands behind it, and the file in
# benchmarks/results/ that says so is in the repository (tests/test_backends.py looks for the op in it). Until then
# `use_backend("triton")` and `use_backend("cuda")` ask for the kernels.
GPU_ORDER: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Backend:
    """One row of :func:`backends`: its name, whether it can run here, and how or why not."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<10} {'available' if self.available else 'unavailable':<12} {self.detail}"


class BackendTable(dict[str, Backend]):
    """A dict from backend name to :class:`Backend` that prints as a table."""

    def __str__(self) -> str:
        return "\n".join(str(backend) for backend in self.values())

    __repr__ = __str__


@functools.cache
def _cpu() -> tuple[bool, str]:
    module, reason = native()
    if module is None:
        return False, reason
    detail = f"SIMD level {module.simd_level()} (this machine can run: {', '.join(module.simd_levels())}"
    if left_out := module.build["left_out"]:
        detail += f"; {module.build['compiler']} could not make: {', '.join(left_out.split())}"
    return True, detail + ")"


@functools.cache
def _warn_of_the_reference(reason: str) -> None:
    warnings.warn(
        f"pyrepr runs on its reference in plain PyTorch, several times slower than compiled code: {reason}; to change "
        f"that, {way_to_native()}",
        stacklevel=4,
    )


class Unsupported(RuntimeError):
    """What an implementation raises, before it writes anything, for arguments it was not made for.

    Left alone, the op then takes its next implementation; a forced one lets the error through.
    """


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter (``TRITON_INTERPRET=1``): on CPU tensors, slowly, for tests."""
    return _INTERPRETED


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    version = f"triton {importlib.metadata.version('triton')}"
    if triton_interprets():
        return True, f"{version}, interpreting on CPU tensors (TRITON_INTERPRET=1)"
    import torch

    if torch.version.cuda is None:
        return False, f"{version} is installed; PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return False, f"{version} is installed; PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    if major < 8:
        return False, f"{version} is installed; the kernels need sm_80 or newer, {name} is sm_{major}{minor}"
    doubt = _ptxas.doubted(major)
    off = f"; without the delta rule's backward: {doubt}" if doubt else ""
    return True, f"{version}; device {name} (sm_{major}{minor}){off}"


def _cuda() -> tuple[bool, str]:
    module, reason = native()
    if module is None:
        return False, reason
    if not module.has_cuda:
        return False, build_info().get("cuda_reason") or "built without CUDA kernels"
    import torch

    architectures = module.build["architectures"].split()
    made = "compiled for " + ", ".join(f"sm_{name.removesuffix('-real')}" for name in architectures)
    if not torch.cuda.is_available():
        return False, f"{made}; PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if not any(_runs_on(name, major, minor) for name in architectures):
        return False, f"{made}; {torch.cuda.get_device_name()} is sm_{major}{minor}"
    return True, f"{made}; device {torch.cuda.get_device_name()}"


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for this architecture, as CMake spells it, runs on a device: "90a-real" on that alone, "86-real" on
    later ones of the generation, "80" also has PTX, which newer ones translate."""
    name, _, kind = architecture.partition("-")
    only, here, made_for = name.lstrip("0123456789"), 10 * major + minor, int(name.rstrip("af"))
    if only == "a":
        return here == made_for
    return here >= made_for and (not (kind == "real" or only) or here // 10 == made_for // 10)


def cuda_tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: on the path, or where the toolkit goes by itself."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    return shutil.which(name) or next(
        (found for home in homes if home and (found := shutil.which(f"{home}/bin/{name}"))), None
    )


_PROBES: dict[str, Callable[[], tuple[bool, str]]] = {
    "reference": lambda: (True, "plain PyTorch, any device"),
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}


def backends() -> BackendTable:
    """Every backend, whether it can run here, and how or why not.

    Returns:
        A dict from name (``reference``, ``cpu``, ``triton``, ``cuda``) to :class:`Backend`; printing it shows a table.

    Example:
        >>> pyrepr.backends()["reference"].available
        True
    """
    return BackendTable((name, _row(name)) for name in NAMES)


def _row(name: str) -> Backend:
    try:
        available, detail = _PROBES[name]()
    except (ImportError, ValueError, RuntimeError) as error:  # what an operation would raise
        return Backend(name, False, str(error))
    return Backend(name, available, detail + behind() if name == "cpu" and available else detail)


_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("pyrepr_backend", default=None)

# PyTorch runs the backward of CUDA tensors in threads of its own, where the context variable is not set. What is
# stashed here goes along with a call of backward into these threads.
_STASH = "pyrepr_backend"
_stashed = False  # whether anything ever was: looking it up takes time


def _check_available(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    available, detail = _PROBES[name]()
    if not available:
        raise RuntimeError(f"{source} asks for backend {name!r}, which is unavailable: {detail}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every pyrepr op inside the ``with`` block (of this thread or task).

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if it is unavailable here, with the reason; also later, if an op called in the block has no
            implementation of that backend for its tensors' device. It never falls back silently.

    Example:
        >>> x = torch.randn(20, 4)
        >>> with pyrepr.use_backend("reference"):
        ...     value = pyrepr.cka(x, x)
    """
    import torch

    global _stashed
    _check_available(name, "use_backend")
    token = _forced.set(name)
    _stashed = True
    torch._C._stash_obj_in_tls(_STASH, name)
    try:
        yield
    finally:
        _forced.reset(token)
        torch._C._stash_obj_in_tls(_STASH, _forced.get())


def forced_backend() -> str | None:
    """The backend forced by :func:`use_backend` or ``PYREPR_BACKEND``, checked; ``None`` if the choice is free.

    A backward takes what was forced where it was called, in whichever thread it runs.
    """
    return _forced.get() or (_stashed and _forced_for_backward()) or _environment()


def _forced_for_backward() -> str | None:
    import torch

    running = torch._C._current_graph_task_id() != -1
    return torch._C._get_obj_in_tls(_STASH) if running and torch._C._is_key_in_tls(_STASH) else None


@functools.cache
def _environment() -> str | None:
    """``PYREPR_BACKEND``, checked; read at the first op, because looking it up costs as much as a small op does."""
    name = os.environ.get("PYREPR_BACKEND") or None
    if name is not None:
        _check_available(name, "PYREPR_BACKEND")
    return name


def choose(op: str, implementations: dict[str, Callable], device: str) -> list[Callable]:
    """The implementations of `op` to try for tensors on a device of this type, in order; one, if it is forced."""
    forced = forced_backend()
    if forced is None:
        order = CPU_ORDER if device == "cpu" else (*GPU_ORDER.get(op, ()), "reference") if device == "cuda" else ()
        if "cpu" in implementations and device == "cpu" and not _PROBES["cpu"]()[0]:
            _warn_of_the_reference(native()[1])
        usable = (name for name in order if name in implementations)
        found = [implementations[name] for name in usable if name == "reference" or _PROBES[name]()[0]]
        return found or [implementations["reference"]]
    on = {"cpu": "cpu", "triton": "cpu" if triton_interprets() else "cuda", "cuda": "cuda"}.get(forced, device)
    if forced not in implementations:
        raise RuntimeError(
            f"{op} has no implementation in backend {forced!r}, which use_backend or PYREPR_BACKEND forces"
        )
    if on != device:
        raise RuntimeError(f"backend {forced!r} runs on {on} tensors, but {op} was given {device} tensors")
    return [implementations[forced]]
