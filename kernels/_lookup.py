"""What the forward and the backward kernels of family `lookup` share: hashes, one-hot tiles, descriptions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pyrepr.kernels._launch import DTYPE_NAMES, Config, Table, Variant, architecture
from torch import Tensor

from pyrepr.backend import Unsupported, triton_interprets

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
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1), 0) == 0


def table(name: str, config: Config, *candidates: Config, **rows: Config) -> Table:
    """One config for every architecture, but for those in `rows` (``sm_80=…``).

    All are estimates from bytes in flight, registers and shared memory: no GPU has run them yet. ``PYREPR_AUTOTUNE=1``
    tries the candidates, and `python -m pyrepr.gpu_check` tells what the rows give.
    """
    return Table(f"lookup.{name}", {a: rows.get(f"sm_{a}", config) for a in PROGRAMS}, candidates)


def variant(kernel, name: str, config: Config, pointers: dict[str, torch.dtype | None], **constexprs) -> Variant:
    """Run-time arguments that are no pointers are 32-bit integers, but `slope`. A pointer of dtype None is left out."""
    fixed = {**config.blocks, **constexprs, **{p: None for p, dtype in pointers.items() if dtype is None}}
    signature = {a: "fp32" if a == "slope" else "i32" for a in kernel.arg_names if a not in fixed}
    signature.update({p: "*" + DTYPE_NAMES[dtype] for p, dtype in pointers.items() if dtype is not None})
    kinds = [DTYPE_NAMES[d] for p, d in pointers.items() if d is not None and p not in ("codes", "weights")]
    return Variant("-".join([name, *kinds]), kernel, signature, fixed, config.num_warps, config.num_stages)


def arguments_of(described: Variant, possible: dict) -> dict:
    """Those that the variant takes at run time."""
    return {name: possible[name] for name in described.signature}


def refuse(*tensors: Tensor | None) -> None:
    """Raises for what the kernels are not made for."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        raise Unsupported("backend 'triton' computes lookups in float32 and refuses float64 tensors")


def readable(x: Tensor) -> Tensor:
    """x as it is if its rows are contiguous, whatever lies between them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def slope_of(temperature: float) -> float:
    return min(2 / temperature, 3e38)


def parts_of(steps: int, programs: int, part_bytes: int, device: torch.device) -> int:
    """Into how many parts to cut sums of `steps` steps so that `programs` of them fill the GPU."""
    most = PARTIAL_BYTES // max(1, part_bytes)
    return max(1, min(steps, PROGRAMS[architecture(device)] // max(1, programs), most))
