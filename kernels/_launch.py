"""How a Triton kernel is described, launched without autotuning, and proven to compile where there is no GPU.

How a family plugs in. ``kernels/<family>/``, imported only inside the ``triton=`` functions of ``pyrepr/ops``, has the
same rooms in every family, and an ``__init__`` that only hands on:

- ``_tiles``, ``_walks``, ``_forward``, ``_backward`` …: ``@triton.jit`` kernels, and ``_shared``, what they share.
  16-bit loads are cast to float32 before any arithmetic but ``tl.dot`` (the interpreter computes bfloat16 wrongly),
  operands of ``tl.dot`` go through :func:`dot_input`; offsets that can pass 2³¹ are int64;
- ``_variants``: one :class:`Table` per kernel, that is a :class:`Config` per architecture (80, 90, 100) with the
  measurement it came from, and the candidates that ``PYREPR_AUTOTUNE=1`` searches; functions that turn a config and a
  problem into a :class:`Variant`; ``variants(architecture)``, all a family can launch there, made by those functions;
- ``_hosts``: functions that allocate on the tensors' device, launch those very variants through :func:`launch`, and
  never synchronise.

Then these pick the family up by name: ``tests/test_gpu_compile.py`` (every variant for sm_80, sm_90, sm_100: shared
memory, registers, spills), ``tests/test_triton_interpreter.py`` (runs ``tests/interpreted/<family>.py`` with
``TRITON_INTERPRET=1``, where backend ``triton`` takes CPU tensors; a launch that `variants` does not list, or whose
arguments do not fit the variant's signature, fails), and ``python -m pyrepr.gpu_check``
(``benchmarks/gpu/<family>.py``).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from pyrepr.backend import triton_interprets

# Of Triton, for rows that suit one compiler and not another.
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))

ARCHITECTURES = (80, 90, 100)

# Bytes of shared memory a block may have. Row 80 also serves sm_86, sm_89 and sm_120, which have the least.
SHARED_LIMIT = {80: 101376, 90: 232448, 100: 232448}

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FLOATS = (F32, BF16, F16)

_NO_OPERATION = 0x918  # NOP, in an instruction's lowest twelve bits

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Config:
    """What is tuned about a launch: block sizes (constexprs of the kernel), warps, pipeline stages, and the registers a
    thread may have, where the compiler would take more than it needs."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None

    def __hash__(self) -> int:  # so that variants can be cached: making one costs as much as a launch
        return hash((*self.blocks.items(), self.num_warps, self.num_stages, self.registers))

    def __str__(self) -> str:
        last = "" if self.registers is None else f", {self.registers}"
        return f"Config({dict(self.blocks)!r}, {self.num_warps}, {self.num_stages}{last})"


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration: what is compiled ahead of time and what is launched.

    Args:
        name: distinct among the variants of the family; names dtypes and blocks.
        kernel: the ``triton.jit`` function.
        signature: run-time argument → type, ``"*fp32"``, ``"*i64"``, ``"i32"``, ``"fp32"``.
        constexprs: compile-time argument → value.
        aligned: the run-time arguments that are divisible by 16, as Triton finds out about an argument at launch
            (pointers in bytes); list what the usual case has, and a second variant where others matter.
        registers: the most that a thread may have; ``None``: as many as the compiler likes.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    registers: int | None = None

    @property
    def key(self) -> tuple:
        """What tells two compilations apart, but for alignment."""
        function = getattr(self.kernel, "__name__", None) or self.kernel.fn.__name__
        types = tuple(sorted(self.signature.items()))
        constants = tuple(sorted(self.constexprs.items()))
        return function, types, constants, self.num_warps, self.num_stages, self.registers


@dataclass(frozen=True)
class Resources:
    """What a compiled variant takes."""

    shared: int  # bytes of shared memory a block
    registers: int  # a thread
    spilled: int  # bytes of local memory and stack a thread: registers that did not fit
    threads: int  # a block
    instructions: int  # of the machine


def architecture(device: torch.device | int) -> int:
    """The row of the tables for a device (or for a compute capability such as 90)."""
    if isinstance(device, torch.device):
        if device.type == "cpu":  # the interpreter
            return 90
        major, minor = torch.cuda.get_device_capability(device)
        device = 10 * major + minor
    return 80 if device in (86, 87, 89) or device >= 120 else max(a for a in ARCHITECTURES if a <= device)


def source(variant: Variant) -> ASTSource:
    """What Triton compiles, and looks up in its cache, for a launch of the variant with aligned arguments."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constexprs else variant.signature[name] for name in names}
    constexprs = {(i,): variant.constexprs[name] for i, name in enumerate(names) if name in variant.constexprs}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in variant.aligned}
    return ASTSource(variant.kernel, signature, constexprs, attributes)


def options(variant: Variant) -> dict[str, int]:
    """What a variant asks of the compiler; a * b + c in one rounding, whatever this version of Triton does unasked."""
    found = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return found if variant.registers is None else {**found, "maxnreg": variant.registers}


def machine_code(variant: Variant, capability: int) -> Any:
    """What Triton compiles for a GPU that need not be there; raises what Triton raises."""
    return triton.compile(source(variant), target=GPUTarget("cuda", capability, 32), options=options(variant))


def compile_ahead(variant: Variant, capability: int) -> Resources:
    """What the variant takes on a GPU that need not be there."""
    compiled = machine_code(variant, capability)
    cubin = compiled.asm["cubin"]
    registers, spilled = _usage(cubin)
    (count,) = instructions(cubin).values()
    return Resources(compiled.metadata.shared, registers, spilled, 32 * variant.num_warps, count)


@functools.cache
def _text(kernel: Any) -> str:
    """Changes with the source of a kernel or of anything it calls, wherever in a file that stands."""
    texts: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        name = f"{function.__module__}.{function.__name__}"
        if name in texts:
            continue
        texts[name] = inspect.getsource(function)
        for used in function.__code__.co_names:
            value = function.__globals__.get(used)
            if isinstance(value, triton.JITFunction):
                waiting.append(value)
            elif isinstance(value, tl.constexpr):
                texts[name] += f"{used} = {value.value!r}\n"
    return "".join(sorted(texts.values()))


def fingerprint(variant: Variant, capability: int) -> str:
    """Changes whenever compiling the variant could give something else: source, options, architecture, compiler."""
    target = GPUTarget("cuda", capability, 32)
    backend, described = make_backend(target), source(variant)
    arguments = (
        sorted(described.signature.items()),
        sorted(described.constants.items()),
        sorted(described.attrs.items()),
    )
    parts = (_text(variant.kernel), str(arguments), backend.parse_options(options(variant)).hash(), backend.hash())
    return hashlib.sha256(" ".join((triton.__version__, *parts, str(target))).encode()).hexdigest()[:20]


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread, as the cuobjdump that comes with Triton reads them from the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        use = {
            key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _dump(file.name, "-res-usage"))
        }
        local = use["STACK"] + use["LOCAL"]
        # A stack frame need not be a spill: calls have one too. A spill stores to local memory.
        if local and not re.search(r"\bSTL\b", _dump(file.name, "-sass")):
            local = 0
    return use["REG"], local


def instructions(cubin: bytes) -> dict[str, int]:
    """Machine instructions by kernel, read from the ELF file itself: an instruction is 16 bytes since Volta, and a
    section of code ends in as many of no effect as fill it up."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, start, length in sections:
        at = sections[names][1] + name
        label = cubin[at : cubin.index(b"\0", at)].decode()
        if label.startswith(".text."):
            codes = [int.from_bytes(cubin[i : i + 2], "little") & 0xFFF for i in range(start, start + length, 16)]
            while codes and codes[-1] == _NO_OPERATION:
                codes.pop()
            found[label.removeprefix(".text.")] = len(codes)
    return found


def _dump(path: str, option: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


_recording: list[list[Variant]] = []


def assert_bounds(valid: torch.Tensor, T: int) -> None:
    """Refuses bad cu_seqlens, by what an index kernel found [1] bool, without waiting for the device, as torch's own
    index checks do."""
    text = f"cu_seqlens must start at 0, never decrease, and end at T = {T}"
    if valid.device.type == "cpu":
        if not valid.item():
            raise ValueError(text)
    else:
        torch._assert_async(valid, text)


@contextlib.contextmanager
def recorded() -> Iterator[list[Variant]]:
    """The variants launched inside the ``with`` block."""
    seen: list[Variant] = []
    _recording.append(seen)
    try:
        yield seen
    finally:
        _recording.remove(seen)


def launch(variant: Variant, grid: tuple[int, ...], arguments: Mapping[str, Any], device: torch.device) -> None:
    """Launches a variant on the current stream of `device`; does not wait. An empty grid launches nothing."""
    if 0 in grid:
        return
    for seen in _recording:
        seen.append(variant)
    if triton_interprets():
        _check(variant, arguments)
        variant.kernel[grid](**arguments, **variant.constexprs)
        return
    with torch.cuda.device(device):
        variant.kernel[grid](**arguments, **variant.constexprs, **options(variant))


def _check(variant: Variant, arguments: Mapping[str, Any]) -> None:
    """What only the interpreter has time for: do the arguments have the types the variant was compiled for?"""
    if set(arguments) != set(variant.signature):
        raise TypeError(f"{variant.name}: arguments {sorted(arguments)} are not its signature's")
    for name, value in arguments.items():
        expected = variant.signature[name]
        if isinstance(value, torch.Tensor):
            found = "*" + DTYPE_NAMES[value.dtype]
            if name in variant.aligned and value.data_ptr() % 16:
                raise TypeError(f"{variant.name}: {name} must start at a multiple of 16 bytes")
        elif isinstance(value, int):
            found = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name in variant.aligned and value % 16:
                raise TypeError(f"{variant.name}: {name} must be divisible by 16, got {value}")
        else:
            found = "fp32"
        if found != expected:
            raise TypeError(f"{variant.name}: {name} must be {expected}, got {found}")


def gpu_milliseconds(function: Callable[[], Any]) -> float:
    """Median of a few runs between device events, after a warm-up that also compiles."""
    return triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


@dataclass
class Table:
    """The launch configurations of one kernel: the fixed one of every architecture, and what the search may try.

    Triton's own autotuner would compile and time at first call; here a call costs the same the first time as later,
    and two runs take the same configuration, so they give the same bits. ``PYREPR_AUTOTUNE=1`` searches (once a process
    and key) and prints the row to put into the code.
    """

    name: str
    rows: Mapping[int, Config]
    candidates: Sequence[Config] = ()
    milliseconds: Callable[[Callable[[], Any]], float] = gpu_milliseconds
    found: dict[tuple, Config] = field(default_factory=dict)

    def run(self, device: torch.device, function: Callable[[Config], Any], key: tuple = ()) -> Any:
        """`function` with this device's config. `key` tells problems apart that a search should treat apart."""
        row = architecture(device)
        if os.environ.get("PYREPR_AUTOTUNE") != "1" or triton_interprets():
            return function(self.rows[row])
        place = (row, *key)
        if place not in self.found:
            self.found[place] = self.search(row, function, key)
        return function(self.found[place])

    def search(self, row: int, function: Callable[[Config], Any], key: tuple = ()) -> Config:
        """The fastest of the row's config and the candidates; one that fails (too much shared memory) is out."""
        best, least = self.rows[row], float("inf")
        for config in (best, *(c for c in self.candidates if c != best)):
            try:
                time = self.milliseconds(functools.partial(function, config))
            except Exception as error:
                print(f"{self.name} {key}: {config} fails: {type(error).__name__}: {error}")
                continue
            print(f"{self.name} {key}: {config} {time:.4f} ms")
            if time < least:
                best, least = config, time
        print(f"{self.name} {key}: best of its table's row {row}: {best}, {least:.4f} ms")
        return best


_INTERPRETED = tl.constexpr(triton_interprets())


@triton.jit
def dot_input(x):
    """A tile on its way into ``tl.dot``: the interpreter multiplies bfloat16 wrongly, so there it becomes float32."""
    if _INTERPRETED:
        return x.to(tl.float32)
    return x
