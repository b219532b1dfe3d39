"""How far the gated delta rule is from float64, by kind of input: ``python -m pyrepr.benchmarks.delta_errors``.

Prints the table of docs/measured.md. Beside pyrepr's kernels stand flash-linear-attention's naive chunk form and
transformers' fallback, on the same inputs; the truth is pyrepr's float64 kernel on them, as they are rounded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from pyrepr.benchmarks.delta_rule import _transformers
from torch import Tensor
from torch.nn.functional import normalize

import pyrepr

# Name -> tokens, cosine between keys, largest and smallest step size, strongest decay a token.
KINDS = {
    "random keys": (1024, 0.0, (0.0, 1.0), 0.2),
    "keys at cosine 0.9": (1024, 0.9, (0.0, 1.0), 0.2),
    "keys at cosine 0.9, β = 2": (1024, 0.9, (2.0, 2.0), 0.2),
    "repeated keys": (1024, 1.0, (0.0, 1.0), 0.2),
    "repeated keys, β = 2, no decay": (1024, 1.0, (2.0, 2.0), 0.0),
    "β = 2, no decay": (1024, 0.0, (2.0, 2.0), 0.0),
    "long decays, to e^−0.001 a token": (4096, 0.0, (0.0, 1.0), 1e-3),
    "fast decays, to e^−100 a token": (1024, 0.0, (0.0, 1.0), 100.0),
    "T = 131 072": (131072, 0.0, (0.0, 1.0), 1e-3),
}
GRADIENTS_UP_TO = 8192  # tokens: peers keep every chunk for autograd


def inputs(kind: str, dtype: torch.dtype, K: int = 64) -> list[Tensor]:
    """q, k (unit), v [1, T, 1, K], g, beta [1, T, 1]."""
    T, cosine, (least, most), decay = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 1, K, generator=generator) for _ in range(3))
    shared = normalize(torch.randn(1, 1, 1, K, generator=generator), dim=-1)
    k = cosine**0.5 * shared + (1 - cosine) ** 0.5 * normalize(k, dim=-1)
    beta, g = (torch.rand(1, T, 1, generator=generator) for _ in range(2))
    q, k, v = (x.to(dtype) for x in (normalize(q, dim=-1), normalize(k, dim=-1), v))
    return [q, k, v, -decay * g, least + (most - least) * beta]


def implementations() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Name → function of q, k, v, g, beta that returns o and the final state."""
    options = {"output_final_state": True}
    found = {"pyrepr": lambda q, k, v, g, beta: pyrepr.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **options)}
    try:
        naive = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_chunk_gated_delta_rule
        found["fla, naive"] = lambda q, k, v, g, beta: naive(q, k, v, g=g, beta=beta, **options)
    except ImportError:
        pass
    fallback = _transformers("qwen3_next", "torch_chunk_gated_delta_rule")
    if fallback:
        found["transformers"] = lambda q, k, v, g, beta: fallback(q, k, v, g=g, beta=beta, **options)
    return found


def results(function: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], weights: Tensor) -> list[Tensor]:
    """o, the final state, and where T allows the gradients of q, k, v, g and beta."""
    if given[0].shape[1] > GRADIENTS_UP_TO:
        with torch.no_grad():
            return list(function(*given))
    leaves = [x.detach().requires_grad_() for x in given]
    o, state = function(*leaves)
    return [o, state, *torch.autograd.grad((o * weights.to(o.dtype)).sum(), leaves)]


def errors(found: list[Tensor], truth: list[Tensor]) -> tuple[float, ...]:
    """Of o, of the state, and the worst of the gradients, each against the largest number of the truth."""
    each = [
        float("nan") if not got.isfinite().all() else ((got.double() - true).abs().max() / true.abs().max()).item()
        for got, true in zip(found, truth, strict=True)
    ]
    return (*each[:2], max(each[2:])) if len(each) > 2 else tuple(each)


def table() -> str:
    functions = implementations()
    lines = ["| inputs | dtype | " + " | ".join(functions) + " |", "|---|---|" + "---|" * len(functions)]
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs(kind, dtype)
            weights = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            truth = results(functions["pyrepr"], [x.double() for x in given], weights.double())
            cells = [kind, str(dtype).removeprefix("torch.")]
            for function in functions.values():
                found = errors(results(function, given, weights), truth)
                cells.append(", ".join(f"{x:.0e}" for x in found))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
