"""Features that are smoothed by those like them."""

from __future__ import annotations

import torch
from pyrepr.papers._data import k_means, patches, photograph
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr import gram

PAPER = Paper(
    33,
    "Xie et al., Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation "
    "Learning, 2021",
    "y_i = Σ_j relu(cos(x_i, x_j))^γ x_j, γ = 2, of unit length",
    "within regions of like colour, features of a photograph propagated once vary at most half as much, beside the "
    "variance between regions; as much as that is not reached without the similarity (plain average of 5 × 5 places)",
)
REGIONS, GAMMA = 8, 2


def scatter(x: Tensor, labels: Tensor) -> float:
    """Variance within regions over variance between them."""
    counts = labels.bincount(minlength=REGIONS)[:, None]
    means = torch.zeros(REGIONS, x.shape[1]).index_add(0, labels, x) / counts.clamp_min(1)
    between = (counts * (means - x.mean(0)).square()).sum()
    return float((x - means[labels]).square().sum() / between)


def run() -> Finding:
    grid = patches(photograph(8), 8)
    high, wide, d = grid.shape
    x = grid.flatten(0, 1)
    _, labels = k_means(x.view(len(x), -1, 3).mean(1), REGIONS)
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True)
    propagated = gram(x, kernel="cosine").relu() ** GAMMA @ x
    image = x.T.view(1, d, high, wide)
    averaged = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False).view(d, -1).T
    ratios = [scatter(z / z.norm(dim=1, keepdim=True), labels) for z in (x, propagated, averaged)]
    text = f"within / between {ratios[0]:.2f} before, {ratios[1]:.2f} propagated, {ratios[2]:.2f} averaged in place"
    holds = ratios[1] <= ratios[0] / 2 < ratios[2]
    numbers = dict(zip(("before", "propagated", "averaged"), ratios, strict=True))
    chart = Chart({"ratio": ratios}, list(numbers), "", "variance within / between regions", bound=ratios[0] / 2)
    return Finding(text, holds, numbers, chart)
