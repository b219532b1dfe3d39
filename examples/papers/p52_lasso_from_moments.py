"""Which inputs matter: the LASSO needs moments only."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr._optional import require
from pyrepr.stats import Moments

PAPER = Paper(
    52,
    "",
    "min ½ wᵀ Σ_xx w − wᵀ Σ_xy + λ |w|₁; the path by least angles",
    "from moments of ten batches alone, the five inputs that matter of sixty are the first five of the path, for each "
    "of five seeds",
)
D, PLANTED, BATCHES, SEEDS = 60, 5, 10, 5


def run() -> Finding:
    path = require("sklearn.linear_model", "scikit-learn").lars_path_gram
    right, coefficients = [], torch.zeros(D)
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        planted = torch.randperm(D, generator=generator)[:PLANTED]
        truth = torch.zeros(D)
        truth[planted] = torch.rand(PLANTED, generator=generator) + 0.5
        moments = Moments()
        for _ in range(BATCHES):
            x = 5 + torch.randn(100, D, generator=generator)
            y = x @ truth + 0.5 * torch.randn(100, generator=generator)
            moments.update(torch.cat([x, y[:, None]], 1))
        joint = moments.covariance * moments.samples
        gram, cross = joint[:D, :D].numpy(), joint[:D, D].numpy()
        _, active, weights = path(cross, gram, n_samples=moments.samples, max_iter=PLANTED, method="lasso")
        right.append(len(set(active) & set(planted.tolist())))
        coefficients = torch.tensor(weights[:, -1])
    text = f"of {PLANTED} planted inputs, found first: {', '.join(map(str, right))}"
    names = ("planted coefficient (last seed)", "coefficient after five steps")
    chart = Chart({"an input": coefficients.tolist()}, truth.tolist(), *names, "points")
    return Finding(text, min(right) == PLANTED, {"found": min(right)}, chart)
