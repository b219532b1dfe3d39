"""Are the features a network relies on the simple ones?"""

from __future__ import annotations

from itertools import pairwise

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

from pyrepr.stats import Moments

PAPER = Paper(
    26,
    "probably Fel et al., Understanding Visual Feature Reliance through the Lens of Complexity, 2024",
    "complexity = 1 − mean over layers of what a linear map of the layer tells of the feature; here of R²",
    "R² of the last layer's features rises with every layer, and features that are more complex matter less to the "
    "answers (correlation below −.3 in the mean of three seeds)",
)
DEPTH, WIDTH, SEEDS = 4, 48, 3


def run() -> Finding:
    x, y, seen, _ = digits()
    curves, correlations = [], []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        blocks = [nn.Sequential(nn.Linear(64 if i == 0 else WIDTH, WIDTH), nn.ReLU()) for i in range(DEPTH)]
        model = trained(nn.Sequential(*blocks, nn.Linear(WIDTH, 10)), x, y, seed=seed, epochs=20)
        with torch.no_grad():
            layers = [torch.cat([x, seen])]
            for block in model[:-1]:
                layers.append(block(layers[-1]))
        live = layers[-1].std(0) > 0.05
        features = layers[-1][:, live]
        known = []
        for z in layers:
            fitted, held_out = (
                Moments().update(z[part], features[part]) for part in (slice(len(x)), slice(len(x), None))
            )
            known.append(held_out.r2_of(fitted.ridge(1e-3), "raw_values"))
        known = torch.stack(known)
        weight = model[-1].weight.detach()[:, live]
        importance = features.std(0) * (weight - weight.mean(0)).norm(dim=0)
        curves.append(known.mean(1))
        complexity = 1 - known.mean(0)
        correlations.append(float(torch.corrcoef(torch.stack([complexity, importance.double()]))[0, 1]))
    curve = torch.stack(curves).mean(0).tolist()
    mean = sum(correlations) / SEEDS
    text = f"R² {', '.join(f'{r:.2f}' for r in curve)} from the pixels on; importance with complexity {mean:.2f} ("
    text += f"{', '.join(f'{r:.2f}' for r in correlations)})"
    holds = all(a < b for a, b in pairwise(curve)) and mean < -0.3
    series = {"a feature (last seed)": importance.tolist()}
    chart = Chart(series, complexity.tolist(), "complexity, 1 − mean R²", "importance", "points")
    return Finding(text, holds, {"correlation": mean, **{f"layer {i}": r for i, r in enumerate(curve)}}, chart)
