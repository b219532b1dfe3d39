"""Many inputs without labels and few with: principal components first, then regression."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.stats import Moments

PAPER = Paper(
    41,
    "",
    "ridge regression on the first k principal components of all inputs",
    "with 5000 inputs of a factor model and labels of 15, components first leave at most .75 of the error of "
    "regression on the inputs, in the mean of sixteen draws",
)
D, FACTORS, UNLABELLED, LABELLED, DRAWS, ALPHAS = 60, 4, 5000, 15, 16, (0.01, 0.1, 1.0, 10.0, 100.0)


def run() -> Finding:
    errors = torch.zeros(2, len(ALPHAS), dtype=torch.float64)
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)

        def normal(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        loads, effect = normal(FACTORS, D), normal(FACTORS, 1) / FACTORS**0.5
        factors = normal(UNLABELLED + 500, FACTORS)
        x = factors @ loads + normal(len(factors), D)
        y = factors @ effect
        few, asked = slice(0, LABELLED), slice(UNLABELLED, None)
        noisy = y[few] + 0.2 * normal(LABELLED, 1)
        pca = Moments().update(x[:UNLABELLED]).pca(FACTORS)
        for row, z in enumerate(((x - pca.mean) @ pca.components.T, x)):
            model = Moments().update(z[few], noisy).ridge(ALPHAS)
            for column in range(len(ALPHAS)):
                guess = z[asked] @ model.coef[column].T + model.intercept[column]
                errors[row, column] += (guess - y[asked]).square().mean() / y[asked].square().mean() / DRAWS
    first, plain = errors.tolist()
    text = f"error, share of variance, at the best λ: components first {min(first):.3f}, inputs {min(plain):.3f}"
    curves = {"components first": first, "inputs": plain}
    chart = Chart(curves, ALPHAS, "λ", "error / variance", "lines", log_x=True)
    return Finding(text, min(first) <= 0.75 * min(plain), {"components": min(first), "inputs": min(plain)}, chart)
