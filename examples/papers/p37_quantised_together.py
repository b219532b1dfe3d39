"""Two layers rounded at once: their losses do not add up."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from pyrepr.papers.p29_quantised_layers import rounded
from torch import nn

from pyrepr import cka

PAPER = Paper(
    37,
    "",
    "ΔL(a and b rounded) − ΔL(a) − ΔL(b)",
    "of a digits network with two layers rounded to 2 bits, the loss of both is off the sum of the single losses, "
    "by a fifth of it in the mean of five seeds",
)
BITS, SEEDS = 2, 5


@torch.no_grad()
def run() -> Finding:
    x, y, seen, labels = digits()
    losses: dict[str, list[float]] = {"sum of the single losses": [], "both rounded": []}
    similar = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        with torch.enable_grad():
            model = trained(nn.Sequential(*layers), x, y, seed=seed, epochs=20)
        plain = float(F.cross_entropy(model(seen), labels))
        added = []
        for chosen in ((0,), (2,), (0, 2)):
            changed = copy.deepcopy(model)
            for layer in chosen:
                changed[layer].weight.copy_(rounded(changed[layer].weight, BITS))
            added.append(float(F.cross_entropy(changed(seen), labels)) - plain)
        losses["sum of the single losses"].append(added[0] + added[1])
        losses["both rounded"].append(added[2])
        similar.append(float(cka(changed[:4](seen), model[:4](seen))))
    text = ", ".join(f"{b:.2f} for {a:.2f}" for a, b in zip(*losses.values(), strict=True))
    off = [abs(b - a) / a for a, b in zip(*losses.values(), strict=True)]
    chart = Chart(losses, [f"seed {seed}" for seed in range(SEEDS)], "", "loss added by rounding")
    text = f"loss added together {text}; CKA of the last hidden layer {', '.join(f'{c:.2f}' for c in similar)}"
    return Finding(text, sum(off) / SEEDS >= 0.2, {"mean": sum(off) / SEEDS}, chart)
