"""GPU cases of family `lookup`. Peers: `F.embedding_bag` over ready codes and weights, and dense `F.linear`.

A dense layer computes another function, so it has a time and no error. Of large problems the first tokens, or the
gradients of the first tables, are compared with float64: all rows in float64 would not fit.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from pyrepr.benchmarks.gpu import GpuCase, Problem
from pyrepr.benchmarks.harness import relative_error
from pyrepr.benchmarks.lookup import Other
from torch import Tensor

import pyrepr
from pyrepr.reference import lookup as reference

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
# Sums in float32 were wrong by at most 3e-7 of their norm in the interpreter, half a unit in the last place of 16 bits
# comes on top, and once more for weights that the tensor cores take in 16 bits; times 4.
TOLERANCE = {F32: 2e-6, BF16: 1.5e-2, F16: 2e-3}
CHECKED = 4  # tokens, or tables, of a large problem


def error_of(result: Any, truth: Any) -> float:
    """The largest error of the parts; none for a peer that computes another function."""
    if isinstance(result, Other):
        return math.nan
    if not isinstance(result, (tuple, list)):
        result, truth = [result], [truth]
    return max(relative_error(_part(a, b), b) for a, b in zip(result, truth, strict=True))


def _part(result: Tensor, truth: Tensor) -> Tensor:
    return result[tuple(slice(size) for size in truth.shape)]


def _layer(device, dtype: torch.dtype, seed: int, tokens: int, d: int, h: int, bits: int, stored=None):
    """x, tables, scales, the tables in float64 as far as CHECKED needs them."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, d, generator=generator, device=device)
    x = (x + 0.05 * x.sign()).to(dtype)
    shape = (d // bits, 1 << bits, h)
    if stored == I8:
        tables = torch.randint(-127, 128, shape, dtype=I8, generator=generator, device=device)
        return x, tables, torch.rand(shape[:2], generator=generator, device=device) + 0.5
    tables = torch.empty(shape, dtype=stored or dtype, device=device)
    for part in tables:  # in float32 all at once they would take as much memory again
        part.copy_(torch.randn(shape[1:], generator=generator, device=device))
    return x, tables, None


def _rows(x: Tensor, tables: Tensor, scales: Tensor | None) -> Tensor:
    """The rows that these tokens read, in float64: [T, K, h]."""
    k = torch.arange(len(tables), device=x.device)
    codes = reference.hash_codes(x, tables.shape[1].bit_length() - 1).long()
    rows = tables[k, codes].double()
    return rows if scales is None else rows * scales[k, codes].double()[..., None]


def _bag(codes: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    flat = codes.long() + tables.shape[1] * torch.arange(len(tables), device=codes.device)
    return F.embedding_bag(flat, tables.flatten(0, 1), per_sample_weights=weights, mode="sum")


def forward(tokens: int, d: int, h: int, bits: int = 8, stored=None, weighting: str = "probability", bias: bool = True):
    """`stored`: the dtype of the tables, that of x by default."""

    def make(device, dtype, seed):
        x, tables, scales = _layer(device, dtype, seed, tokens, d, h, bits, stored)
        added = torch.randn(h, device=device).to(dtype) if bias else None
        dense = torch.randn(h, d, device=device).to(BF16)
        x_dense = x.to(BF16)

        def truth() -> Tensor:
            first = x[:CHECKED] if tokens > 300 else x
            w = reference.weights(first.double(), bits, weighting)
            out = (w[..., None] * _rows(first, tables, scales)).sum(1)
            return out if added is None else out + added.double()

        peers = {"F.linear bf16": lambda: Other(F.linear(x_dense, dense))}
        if scales is None:
            codes, weights = reference.hash_op(x, bits, weighting, 1.0)
            weights = weights.to(tables.dtype)
            peers["F.embedding_bag"] = lambda: Other(_bag(codes, weights, tables))
        used = (1 << bits) * (1 - (1 - 2.0**-bits) ** tokens)  # rows of a table that are read, on average
        return Problem(
            lambda: pyrepr.lookup_linear(x, tables, added, weighting=weighting, scales=scales),
            truth,
            peers,
            flops=2 * tokens * (d // bits) * h,
            bytes=used * (d // bits) * h * tables.element_size() + tokens * (d + h) * x.element_size(),
        )

    return make


def backward(tokens: int, d: int, h: int, bits: int = 8):
    """Gradients to x and tables; of the first tables only where everything does not fit float64."""

    def make(device, dtype, seed):
        x, tables, _ = _layer(device, dtype, seed, tokens, d, h, bits)
        leaves = x.requires_grad_(), tables.requires_grad_()
        grad = torch.randn(tokens, h, device=device).to(dtype)
        codes, weights = reference.hash_op(x.detach(), bits, "probability", 1.0)
        weights = weights.to(dtype).requires_grad_()

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(pyrepr.lookup_linear(*leaves), leaves, grad)

        def truth() -> tuple[Tensor, ...]:
            few = min(len(tables), CHECKED if tokens > 300 else 10**9)
            first = (
                x.detach()[:, : few * bits].double().requires_grad_(),
                tables.detach()[:few].double().requires_grad_(),
            )
            return torch.autograd.grad(reference.lookup_linear(*first), first, grad.double())

        def bag() -> Other:
            return Other(torch.autograd.grad(_bag(codes, weights, tables), (weights, tables), grad))

        return Problem(
            run,
            truth,
            {"F.embedding_bag": bag},
            flops=6 * tokens * (d // bits) * h,
            bytes=tables.numel() * (tables.element_size() + 4),
        )

    return make


def views(tokens: int, d: int, h: int, bits: int, stored=None, shift: int = 1):
    """Output and gradients where x, tables, bias and the incoming gradient begin `shift` elements behind an aligned
    place, with as many elements between their rows."""

    def shifted(x: Tensor, between: int = 0) -> Tensor:
        wide = torch.empty(*x.shape[:-1], x.shape[-1] + between, dtype=x.dtype, device=x.device)
        memory = torch.empty(wide.numel() + shift, dtype=x.dtype, device=x.device)[shift:]
        return memory.view(wide.shape)[..., : x.shape[-1]].copy_(x)

    def make(device, dtype, seed):
        x, tables, scales = _layer(device, dtype, seed, tokens, d, h, bits, stored)
        x, tables = shifted(x, shift).requires_grad_(), shifted(tables)
        bias, grad = shifted(torch.randn(h, device=device).to(dtype)), torch.randn(tokens, h, device=device).to(dtype)
        leaves = (x,) if scales is not None else (x, tables.requires_grad_())
        grad = shifted(grad, shift)

        def run() -> tuple[Tensor, ...]:
            out = pyrepr.lookup_linear(x, tables, bias, scales=scales)
            return out.detach(), *torch.autograd.grad(out, leaves, grad)

        def truth() -> tuple[Tensor, ...]:
            wide = tables.detach().double() if scales is None else tables.double() * scales.double()[..., None]
            true = x.detach().double().requires_grad_(), wide.requires_grad_()
            out = reference.lookup_linear(*true, bias.double())
            return out.detach(), *torch.autograd.grad(out, true[: len(leaves)], grad.double())

        return Problem(run, truth)

    return make


def sums(tokens: int, k: int, n: int, h: int, skewed: bool = False):
    """`lookup_sum` and `segment_sum` over any number of rows a table; `skewed`: nearly all tokens have one code."""

    def make(device, dtype, seed):
        generator = torch.Generator(device).manual_seed(seed)
        new = {"generator": generator, "device": device}
        codes = torch.randint(0, n, (tokens, k), **new)
        if skewed:
            codes = torch.where(torch.rand(tokens, k, **new) < 0.95, n // 2, codes)
        weights, values = torch.randn(tokens, k, **new), torch.randn(tokens, h, **new).to(dtype)
        tables = torch.randn(k, n, h, **new).to(dtype)
        exact = codes.int(), weights.double()
        return Problem(
            lambda: (
                pyrepr.lookup_sum(codes, weights, tables),
                pyrepr.segment_sum(values, codes, n, weights=weights),
            ),
            lambda: (
                reference.lookup_sum(*exact, tables.double()),
                reference.segment_sum(values.double(), codes, n, weights.double()),
            ),
        )

    return make


def codes_bits(tokens: int, d: int):
    """Codes on the GPU and on the CPU: the error is the share of chunks whose code differs. Special values included."""

    def make(device, dtype, seed):
        x = torch.randn(tokens, d, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
        tiny = torch.finfo(dtype).smallest_normal / 2
        special = torch.tensor([0.0, -0.0, tiny, -tiny, math.inf, -math.inf, math.nan, 1.0], device=device).to(dtype)
        x[0] = special.repeat(d)[:d]
        all_bits = [bits for bits in range(1, 17) if d % bits == 0]
        return Problem(
            lambda: torch.cat([pyrepr.hash_codes(x, bits).flatten() for bits in all_bits]),
            lambda: torch.cat([reference.hash_codes(x.cpu(), bits).flatten() for bits in all_bits]),
        )

    return make


def _differing(result: Tensor, truth: Tensor) -> float:
    return (result.cpu() != truth).double().mean().item()


def _checks() -> list[GpuCase]:
    case = functools.partial(GpuCase, error=error_of, tolerance=TOLERANCE)
    both = ("triton", "cuda")
    found = [
        GpuCase(
            "codes",
            "T=3 d=720720, τ from 1 to 16",
            codes_bits(3, 720720),
            dict.fromkeys(TOLERANCE, 0.0),
            error=_differing,
        ),
    ]
    for weighting in reference.WEIGHTINGS:
        make = forward(5, 240, 200, 8, weighting=weighting)
        found.append(case(f"lookup {weighting}", "T=5 d=240 h=200 τ=8", make, backends=both, graph=True))
    for stored in (F32, BF16, F16, I8):
        name = str(stored).removeprefix("torch.")
        small = forward(3, 64, 48, 8, stored)
        found += [  # one case a backend: a dry run has but one of them
            case(f"lookup {name} tables, {backend}", "T=3 d=64 h=48 τ=8", small, backends=(backend,), sanitize=True)
            for backend in both
        ]
        odd = forward(65, 65, 131, 5, stored)
        found.append(case(f"lookup {name} tables", "T=65 d=65 h=131 τ=5", odd, backends=both))
        wide = forward(2, 4096, 70, 8, stored, bias=False)
        found.append(case(f"lookup {name} tables", "T=2 d=4096 h=70 τ=8", wide, backends=both))
        found.append(case(f"lookup {name} tables", "T=300 d=64 h=96 τ=4", forward(300, 64, 96, 4, stored), graph=True))
        found.append(
            case(f"lookup {name} tables", "T=700 d=96 h=80 τ=6", forward(700, 96, 80, 6, stored), sanitize=True)
        )
    for bits in (1, 3, 12, 16):
        found.append(case("lookup", f"T=9 τ={bits}", forward(9, 3 * bits, 33, bits), backends=both))
    for tokens, d, h, bits in ((1, 64, 40, 8), (70, 96, 130, 8), (300, 64, 96, 4), (900, 24, 131, 3)):
        shape = f"T={tokens} d={d} h={h} τ={bits}"
        found.append(case("lookup gradient", shape, backward(tokens, d, h, bits), graph=True, sanitize=tokens < 301))
    for shape in ((1, 8, 64, 8), (5, 5, 1, 5), (9, 24, 33, 8), (300, 16, 64, 4), (300, 16, 80, 8), (300, 18, 33, 6)):
        name = "T={} d={} h={} τ={}".format(*shape)
        for stored in (None, F32, I8):
            kind = "the dtype of x" if stored is None else str(stored).removeprefix("torch.")
            found += [
                case(f"lookup of {kind} in aligned places", name, views(*shape, stored, 0)),
                case(f"lookup of {kind} in unaligned places", name, views(*shape, stored, 1)),
            ]
    exact = dict.fromkeys(TOLERANCE, 2e-6)
    found.append(case("sums", "T=300 K=7 n=1000 h=70", sums(300, 7, 1000, 70), tolerance=exact))
    found.append(case("sums", "T=20 000 K=1 n=10 h=33, skewed", sums(20000, 1, 10, 33, True), tolerance={F32: 2e-6}))
    return found


def _timed() -> list[GpuCase]:
    """The sizes that the aims name."""
    found = []
    for tokens in (1, 64, 1024, 8192):
        backends = ("triton", "cuda") if tokens <= 64 else ("triton",)
        new = functools.partial(GpuCase, timed=True, error=error_of, backends=backends)
        shape = f"T={tokens} d=h=4096 τ=8"
        dtypes = {t: TOLERANCE[t] for t in ((BF16, F32) if tokens == 1 else (BF16,))}
        found.append(new("lookup forward", shape, forward(tokens, 4096, 4096), dtypes))
        if tokens <= 64:
            found.append(new("lookup forward, int8 tables", shape, forward(tokens, 4096, 4096, 8, I8), {BF16: 1.5e-2}))
    new = functools.partial(GpuCase, timed=True, error=error_of, tolerance={BF16: TOLERANCE[BF16]})
    found.append(new("lookup forward", "T=8192 d=h=4096 τ=4", forward(8192, 4096, 4096, 4)))
    for tokens in (1, 64, 1024, 8192):
        found.append(new("lookup forward+backward", f"T={tokens} d=h=4096 τ=8", backward(tokens, 4096, 4096)))
    found.append(new("lookup forward+backward", "T=8192 d=h=4096 τ=4", backward(8192, 4096, 4096, 4)))
    return found


def cases() -> list[GpuCase]:
    """Correctness of every kernel, and the sizes that the targets name."""
    return _checks() + _timed()


def _fastest(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(op, shape) → implementation → its record, in bfloat16; "pyrepr" is the fastest of our kernels."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for r in records:
        if r.get("dtype") != "bfloat16" or not r.get("milliseconds") or r["implementation"] == "pyrepr reference":
            continue
        case = found.setdefault((r["op"], r["shape"]), {})
        name = "pyrepr" if r["implementation"].startswith("pyrepr ") else r["implementation"]
        if name not in case or r["milliseconds"] < case[name]["milliseconds"]:
            case[name] = r
    return found


def notes(records: list[dict[str, Any]]) -> list[str]:
    """The batch at which a dense bfloat16 layer takes over (d = h = 4096, τ = 8, bfloat16 tables), and of every case
    what the aims ask: the bandwidth, to be held against the copy's above, and how many times as fast as its
    peers the faster of our kernels is."""
    cases = {case: found for case, found in _fastest(records).items() if "pyrepr" in found}
    ours: dict[int, float] = {}
    dense: dict[int, float] = {}
    lines = []
    for (op, shape), found in cases.items():
        own = found["pyrepr"]["milliseconds"]
        ratios = [f"{r['milliseconds'] / own:.2f} × as fast as {name}" for name, r in found.items() if name != "pyrepr"]
        rate = found["pyrepr"].get("bytes", 0) / own / 1e6
        lines.append(f"{op}, {shape}, bfloat16: {', '.join([f'{rate:.0f} GB/s of the bytes that must move', *ratios])}")
        if op == "lookup forward" and shape.endswith("d=h=4096 τ=8") and "F.linear bf16" in found:
            tokens = int(shape.split()[0].removeprefix("T="))
            ours[tokens], dense[tokens] = own, found["F.linear bf16"]["milliseconds"]
    both = sorted(ours)
    break_even = [f"lookup, d = h = 4096, τ = 8, bfloat16: {_break_even(both, ours, dense)}"] if both else []
    return break_even + lines


def _break_even(sizes: list[int], ours: dict[int, float], dense: dict[int, float]) -> str:
    """Where log(time ratio), straight between the measured sizes in log T, is 0."""
    ratios = [math.log(ours[t] / dense[t]) for t in sizes]
    if ratios[0] >= 0:
        return f"F.linear is faster from T = {sizes[0]}, the smallest batch measured"
    for i in range(1, len(sizes)):
        if ratios[i] >= 0:
            share = ratios[i - 1] / (ratios[i - 1] - ratios[i])
            t = math.exp(math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1]))
            return f"F.linear takes over at about T = {t:.0f} (between the measured {sizes[i - 1]} and {sizes[i]})"
    return f"the lookup is faster up to T = {sizes[-1]}, the largest batch measured"
