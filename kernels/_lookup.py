"""What the forward and the backward kernels of family `lookup` share: hashes, one-hot tiles, descriptions.

Triton compiles a function anew for arguments that are 1 or divisible by 16. Here each is compiled in two ways at most
(`kernel`): for rows that all start at multiples of 16 bytes, which are read 16 bytes at a time, and for any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pyrepr.kernels import _launch
from pyrepr.kernels._launch import DTYPE_NAMES, Config, Table, Variant, architecture
from torch import Tensor

from pyrepr.backend import Unsupported, triton_interprets
from pyrepr.reference.lookup import WEIGHTINGS

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FLOATS = (F32, BF16, F16)

# From this many tokens on, the tensor cores have a tile to work on.
ONE_HOT_TOKENS = 64
# Rows a table of the one-hot kernels has, real or not.
ONE_HOT_ROWS = 16
# Programs that fill the GPU, four on each multiprocessor of an A100, H100, B200. Not asked of the device, so that two
# devices of a kind give the same bits.
PROGRAMS = {80: 432, 90: 528, 100: 592}
# What partial sums may take.
PARTIAL_BYTES = 64 << 20

INTERPRETED = tl.constexpr(triton_interprets())

# Programs along the second and the third axis of a grid.
MOST_PROGRAMS = 65535


@dataclass(frozen=True)
class Kernel:
    """A Triton function in the ways it is compiled."""

    whole: Any  # where the arguments named in `aligned` are divisible by 16, pointers in bytes
    odd: Any  # where nothing is known about any argument
    aligned: tuple[str, ...]

    @property
    def arg_names(self) -> list[str]:
        return self.whole.arg_names


def kernel(*aligned: str) -> Callable[[Callable], Kernel]:
    """Makes a :class:`Kernel` of a function; with no name given its two ways are the same."""

    def make(function: Callable) -> Kernel:
        # What is annotated is a constexpr.
        names = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is p.empty]
        whole = triton.jit(function, do_not_specialize=[name for name in names if name not in aligned])
        odd = triton.jit(function, do_not_specialize=names) if aligned else whole
        return Kernel(whole, odd, aligned)

    return make


@triton.jit
def divided(j, by, total):
    """j // by and j % by of int64 0 ≤ j < total. Dividing 64 bits takes several times the instructions of 32."""
    quotient = (j.to(tl.int32) // by).to(tl.int64) if total < 2147483648 else j // by
    return quotient, j - quotient * by


@triton.jit
def chunk_sums(z, mask, bits, slope):
    """Code, Σ |z| and 1 / p = Π (1 + exp(−2|z| / t)) ≤ 2^16 of the chunks that start at the pointers `z`, each by one
    thread. slope: 2 / t. csrc/cpu/lookup_hash.h has the same arithmetic."""
    length = mask.to(tl.int32) * bits
    code = length * 0
    size = code.to(tl.float32)
    inverse = size + 1
    for i in tl.static_range(16):
        inside = i < length
        value = tl.load(z + i, mask=inside, other=0.0).to(tl.float32)
        code += tl.where(inside & (value >= 0), 1 << i, 0)
        size += tl.abs(value)
        inverse *= tl.where(inside, 1 + tl.exp(-tl.abs(value) * slope), 1.0)
    return code, size, inverse


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _product(x):
    """Π over the last axis of [BLOCK, 16]. The interpreter reduces by a function of ours element by element."""
    if INTERPRETED:
        return tl.sum(tl.where((tl.arange(0, 16) == 15)[None, :], tl.cumprod(x, 1), 0.0), 1)
    return tl.reduce(x, 1, _multiply)


@triton.jit
def chunk_sums_together(z, mask, bits, slope):
    """As `chunk_sums`, but a chunk's elements lie side by side in a warp: fewer reads a thread where chunks are few."""
    i = tl.arange(0, 16)
    inside = mask[:, None] & (i < bits)[None, :]
    value = tl.load(z[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    code = tl.sum(tl.where(inside & (value >= 0), (1 << i)[None, :], 0), 1)
    factors = tl.where(inside, 1 + tl.exp(-tl.abs(value) * slope), 1.0)
    return code, tl.sum(tl.abs(value), 1), _product(factors)


@triton.jit
def weight_of(size, inverse, bits, weighting):
    """w from what `chunk_sums` gives; weighting is an index in WEIGHTINGS."""
    weight = tl.where(weighting == 1, size / inverse, tl.where(size == size, 1.0, size))
    return tl.where(weighting == 0, 1 / inverse, tl.where(weighting == 2, size / bits, weight))


@triton.jit
def checked(code, weight, n):
    """A code that is out of range as one that is not, and its weight NaN."""
    wrong = (code < 0) | (code >= n)
    return tl.minimum(tl.maximum(code, 0), n - 1), tl.where(wrong, float("nan"), weight)


@triton.jit
def one_hot(codes, weights, t, k, stride_t, stride_k, tokens, chunks, n, ROWS: tl.constexpr):
    """[BLOCK_T, BLOCK_K · ROWS] float32: the weight at (t, k, code), else 0."""
    inside = (t < tokens)[:, None] & (k < chunks)[None, :]
    at = t.to(tl.int64)[:, None] * stride_t + k.to(tl.int64)[None, :] * stride_k
    code = tl.load(codes + at, mask=inside, other=0)
    weight = tl.load(weights + at, mask=inside, other=0.0)
    code, weight = checked(code, weight, n)
    hot = code[:, :, None] == tl.arange(0, ROWS)[None, None, :]
    return tl.reshape(tl.where(hot, weight[:, :, None], 0.0), [t.shape[0], k.shape[0] * ROWS])


@triton.jit
def all_finite(x):
    # In one reduction: with two, Triton 3.6 finds no layout for sm_100.
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1)) == 0


def table(name: str, config: Config, *candidates: Config, **rows: Config) -> Table:
    """One config for every architecture, but for those in `rows` (``sm_80=…``).

    All are estimates from bytes in flight, registers and shared memory: no GPU has run them yet. ``PYREPR_AUTOTUNE=1``
    tries the candidates, and `python -m pyrepr.gpu_check` tells what the rows give.
    """
    return Table(f"lookup.{name}", {a: rows.get(f"sm_{a}", config) for a in PROGRAMS}, candidates)


def variant(
    kernel: Kernel,
    name: str,
    config: Config,
    pointers: Mapping[str, torch.dtype | None],
    whole: bool = True,
    **constexprs: Any,
) -> Variant:
    """Run-time arguments that are no pointers are 32-bit integers, but `slope`. A pointer of dtype None is left out.

    `whole`: the arguments that the kernel wants aligned are. It must be true of every launch, or the variant another.
    """
    fixed = {**config.blocks, **constexprs, **{p: None for p, dtype in pointers.items() if dtype is None}}
    signature = {a: "fp32" if a == "slope" else "i32" for a in kernel.arg_names if a not in fixed}
    signature.update({p: "*" + DTYPE_NAMES[dtype] for p, dtype in pointers.items() if dtype is not None})
    unnamed = ("codes", "weights", "order", "starts", "rows")
    kinds = [DTYPE_NAMES[d] for p, d in pointers.items() if d is not None and p not in unnamed]
    label = "-".join([name, *kinds] if whole else [name, *kinds, "odd"])
    function = kernel.whole if whole else kernel.odd
    aligned = tuple(a for a in kernel.aligned if a in signature) if whole else ()
    return Variant(label, function, signature, fixed, config.num_warps, config.num_stages, aligned)


def launch(described: Variant, grid: tuple[int, ...], possible: Mapping[str, Any], device: torch.device) -> None:
    """Launches with those of the `possible` arguments that the variant takes at run time."""
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        raise Unsupported(f"backend 'triton' refuses so large a lookup: {described.name} would be a grid of {grid}")
    _launch.launch(described, grid, {name: possible[name] for name in described.signature}, device)


def refuse(*tensors: Tensor | None) -> None:
    """Raises for what the kernels are not made for."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise Unsupported("backend 'triton' computes lookups in float32 and refuses float64 tensors")


def readable(x: Tensor) -> Tensor:
    """x as it is if its rows are contiguous and a 32-bit number of elements apart, whatever lies between them."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if dense and x.stride(0) < 1 << 31 else x.clone(memory_format=torch.contiguous_format)


def is_whole(x: Tensor) -> bool:
    """Whether the rows of a contiguous tensor all start at multiples of 16 bytes, and of 16 elements of each other."""
    return x.shape[-1] % 16 == 0 and x.data_ptr() % 16 == 0


def made_whole(x: Tensor) -> Tensor:
    """x [..., h] with readable rows, in a new place if only its place or its stride keeps it from being whole.

    For what is read many times, or small.
    """
    x = readable(x)
    if x.shape[-1] % 16 == 0 and (x.data_ptr() % 16 or (x.dim() > 1 and x.stride(0) % 16)):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def hash_arguments(x: Tensor, bits: int, weighting: str, temperature: float) -> dict[str, Any]:
    """What the kernels that read x [T, K bits] want to know about it."""
    chunks = x.shape[1] // bits
    sizes = {"stride": x.stride(0), "tokens": x.shape[0], "chunks": chunks, "bits": bits}
    slope = min(2 / temperature, 3e38)
    return {"x": x, **sizes, "slope": slope, "weighting": WEIGHTINGS.index(weighting)}


def parts_of(steps: int, programs: int, part_bytes: int, device: torch.device) -> int:
    """Into how many parts to cut sums of `steps` steps so that `programs` of them fill the GPU."""
    most = PARTIAL_BYTES // max(1, part_bytes)
    return max(1, min(steps, PROGRAMS[architecture(device)] // max(1, programs), most))
