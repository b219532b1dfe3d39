"""In-context regression by gradient descent: the delta rule is its iterates."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import chunk_delta_rule

PAPER = Paper(
    21,
    "probably von Oswald et al., Transformers learn in-context by gradient descent, 2023",
    "W ← W − β ∇ ½|W x − y|², one example a step",
    "the delta rule's predictions are those of online gradient descent, to 1e-12, and its error on a new query falls "
    "by half from 16 to 64 examples and again to 256",
)
D, OUT, STEPS, TASKS, RATE = 16, 4, 256, 8, 0.5


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TASKS, STEPS, D, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=2, keepdim=True)
    query = torch.randn(TASKS, 1, D, generator=generator, dtype=torch.float64)
    truth = torch.randn(TASKS, D, OUT, generator=generator, dtype=torch.float64)
    queries, rates = query.expand(-1, STEPS, -1), torch.full((TASKS, STEPS, 1), RATE, dtype=torch.float64)
    heads = (part[:, :, None] for part in (queries, x, x @ truth))
    predicted = chunk_delta_rule(*heads, rates, scale=1.0)[0][:, :, 0]

    weight = torch.zeros_like(truth, requires_grad=True)
    error = 0.0
    for step in range(STEPS):
        now = x[:, step, None]
        loss = 0.5 * (now @ weight - now @ truth).square().sum()
        with torch.no_grad():
            weight -= RATE * torch.autograd.grad(loss, weight)[0]
            error = max(error, float((query @ weight - predicted[:, step, None]).abs().max()))
    left = (predicted - query @ truth).square().mean((0, 2)) / (query @ truth).square().mean()
    falls = [float(left[n - 1]) for n in (16, 64, 256)]
    text = f"off by {error:.0e}; error on a query {', '.join(f'{e:.3f}' for e in falls)} after 16, 64, 256 examples"
    holds = error < 1e-12 and falls[1] < falls[0] / 2 and falls[2] < falls[1] / 2
    series = {"delta rule": left[3::4].tolist()}
    chart = Chart(series, list(range(4, STEPS + 1, 4)), "examples in context", "error on a query", "lines", log=True)
    return Finding(text, holds, {"off": error, "16": falls[0], "64": falls[1], "256": falls[2]}, chart)
