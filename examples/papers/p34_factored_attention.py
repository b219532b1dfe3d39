"""Attention learned as K Qᵀ, and as one matrix: the factors prefer few directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr.stats import effective_rank

PAPER = Paper(
    34,
    "",
    "min of CE(X W x) + λ/2 |W|², or + λ/2 (|K|² + |Q|²) with W = K Qᵀ",
    "which of eight synthetic tokens is asked for is learned with at most .7 of the effective rank where W = K Qᵀ, and "
    "no worse by .02, for each of three seeds",
)
D, TOKENS, SAMPLES, DECAY, SEEDS = 24, 8, 1536, 2e-2, 3


def fitted(parameters: list[Tensor], x: Tensor, query: Tensor, asked: Tensor) -> Tensor:
    """The matrix learned on 1024 samples."""
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = torch.optim.LBFGS(parameters, max_iter=150, line_search_fn="strong_wolfe")

    def matrix() -> Tensor:
        return parameters[0] if len(parameters) == 1 else parameters[0] @ parameters[1].T

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.einsum("ntd,de,ne->nt", x, matrix(), query)
        value = F.cross_entropy(scores, asked) + DECAY / 2 * sum(p.square().sum() for p in parameters)
        value.backward()
        return value

    optimizer.step(loss)
    return matrix().detach()


def run() -> Finding:
    ranks: dict[str, list[float]] = {"K Qᵀ": [], "W": []}
    rates: dict[str, list[float]] = {"K Qᵀ": [], "W": []}
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SAMPLES, TOKENS, D, generator=generator)
        query = torch.randn(SAMPLES, D, generator=generator)
        left, right = (torch.randn(D, 3, generator=generator) for _ in range(2))
        scores = torch.einsum("ntd,de,ne->nt", x, left @ right.T, query) / D**0.5
        asked = scores.softmax(1).multinomial(1, generator=generator)[:, 0]
        cut = SAMPLES - 512
        small = 0.1 * torch.randn(3, D, D, generator=generator)
        for name, start in (("K Qᵀ", [small[0], small[1]]), ("W", [small[2]])):
            w = fitted(start, x[:cut], query[:cut], asked[:cut])
            ranks[name].append(float(effective_rank(w.double(), center=False)))
            found = torch.einsum("ntd,de,ne->nt", x[cut:], w, query[cut:]).argmax(1)
            rates[name].append(float((found == asked[cut:]).float().mean()))
    text = "; ".join(
        f"{name} rank {', '.join(f'{r:.1f}' for r in ranks[name])}, right {', '.join(f'{r:.2f}' for r in rates[name])}"
        for name in ranks
    )
    factored, whole = ranks.values()
    holds = all(a <= 0.7 * b for a, b in zip(factored, whole, strict=True))
    holds = holds and all(a >= b - 0.02 for a, b in zip(*rates.values(), strict=True))
    chart = Chart(ranks, [f"seed {seed}" for seed in range(SEEDS)], "", "effective rank")
    return Finding(text, holds, {name: sum(values) / SEEDS for name, values in ranks.items()}, chart)
