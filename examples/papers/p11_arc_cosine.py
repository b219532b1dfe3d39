"""Infinitely many random units, from a Gram matrix: the arc-cosine kernels."""

from __future__ import annotations

import torch
from pyrepr.papers._data import arc_cosine, digits
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import gram

PAPER = Paper(
    11,
    "probably Cho & Saul, Kernel Methods for Deep Learning, 2009",
    "k₀ = 1 − θ/π, k₁ = |x||y| (sin θ + (π − θ) cos θ)/π: 2 E of products of step and of rectified units",
    "averages over random units come to both kernels, and 16 times as many units come 4 times as near (2.5 to 6.5)",
)
UNITS, REPEATS = (1_024, 4_096, 16_384), 24


def run() -> Finding:
    x = digits()[0][:24].double()
    kernels = arc_cosine(gram(x))
    generator = torch.Generator().manual_seed(0)
    errors = torch.zeros(2, len(UNITS), dtype=torch.float64)
    for column, count in enumerate(UNITS):
        for _ in range(REPEATS):
            z = x @ torch.randn(x.shape[1], count, generator=generator, dtype=torch.float64)
            for order, units in enumerate(((z > 0).double(), z.relu())):
                off = 2 * units @ units.T / count - kernels[order]
                errors[order, column] += off.square().mean() / kernels[order].square().mean() / REPEATS
    errors = errors.sqrt()
    ratios = errors[:, 0] / errors[:, -1]
    text = ", ".join(f"k{order}: {errors[order, 0]:.4f} → {errors[order, -1]:.4f}" for order in range(2))
    holds = bool((ratios > 2.5).all() and (ratios < 6.5).all() and (errors[:, -1] < 0.05).all())
    numbers = {f"k{order} {count}": float(errors[order, i]) for order in range(2) for i, count in enumerate(UNITS)}
    series = {f"order {order}": errors[order].tolist() for order in range(2)}
    chart = Chart(series, UNITS, "random units", "relative error", "lines", log=True, log_x=True)
    return Finding(f"relative error {text}", holds, numbers, chart)
