"""Neural collapse in deep linear networks with unbalanced classes: lengths of features and weights in closed form."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

PAPER = Paper(
    5,
    "Dang et al., Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data, 2023",
    "b = MN (N λ_W^M λ_H)^{1/M}; x the largest root of b/n_k = M x^{M−1}/(x^M + 1)²; s_k = (N λ_H x^M)^{1/2M}",
    "trained features of class k are orthogonal to the others', and as long as the formula says to four "
    "decimals, for depths 1, 2, 3",
)
COUNTS, WIDTH, LAMBDA = (40, 20, 10, 5), 8, (5e-4, 5e-4)


def predicted(depth: int) -> torch.Tensor:
    """|h_k| for every class: s_k^M / (s_k^{2M} + N λ_H)."""
    n, (lambda_w, lambda_h) = sum(COUNTS), LAMBDA
    b = depth * n * (n * lambda_w**depth * lambda_h) ** (1 / depth)
    grid = torch.logspace(-3, 4, 400_001, dtype=torch.float64)
    side = depth * grid ** (depth - 1) / (grid**depth + 1) ** 2
    lengths = []
    for count in COUNTS:
        above = (side >= b / count).nonzero()[:, 0]
        x = float(grid[above[-1]]) if len(above) else 0.0
        s = (n * lambda_h * x**depth) ** (1 / (2 * depth))
        lengths.append(s**depth / (s ** (2 * depth) + n * lambda_h))
    return torch.tensor(lengths, dtype=torch.float64)


def trained(depth: int) -> torch.Tensor:
    """Features [d, N] of the network W_M ⋯ W_1 H, minimising ‖W H − Y‖²/2N + Σ λ_W/2 ‖W_m‖² + λ_H/2 ‖H‖²."""
    generator = torch.Generator().manual_seed(depth)
    labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    target = torch.nn.functional.one_hot(labels).double().T
    shapes = [(WIDTH, WIDTH)] * (depth - 1) + [(len(COUNTS), WIDTH)]
    weights = [0.5 * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    h = 0.5 * torch.randn(WIDTH, len(labels), generator=generator, dtype=torch.float64)
    parameters = [p.requires_grad_() for p in (*weights, h)]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=400,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        out = h
        for weight in weights:
            out = weight @ out
        value = (out - target).square().sum() / (2 * len(labels)) + LAMBDA[1] / 2 * h.square().sum()
        value = value + LAMBDA[0] / 2 * sum(w.square().sum() for w in weights)
        value.backward()
        return value

    optimizer.step(loss)
    return h.detach()


def run() -> Finding:
    worst = off = 0.0
    lengths: dict[str, list[float]] = {"trained": [], "formula": []}
    for depth in (1, 2, 3):
        h, expected = trained(depth), predicted(depth)
        means = torch.stack([part.mean(1) for part in h.split(COUNTS, 1)])
        lengths["trained"] += means.norm(dim=1).tolist()
        lengths["formula"] += expected.tolist()
        worst = max(worst, float((means.norm(dim=1) - expected).abs().max()))
        gram = means @ means.T
        off = max(off, float((gram - gram.diag().diag()).abs().max()))
    text = f"lengths off by at most {worst:.1e}, inner products of two classes at most {off:.1e}"
    names = [f"{depth} | {count}" for depth in (1, 2, 3) for count in COUNTS]
    chart = Chart(lengths, names, "depth | samples of the class", "length of the class's feature")
    return Finding(text, worst < 5e-5 and off < 1e-4, {"length": worst, "off_diagonal": off}, chart)
