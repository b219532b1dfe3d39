"""A small trained network with tables in the place of its matrices."""

from __future__ import annotations

import copy

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

import pyrepr

PAPER = Paper(
    31,
    "",
    "the linear layer becomes hashed tables and a dense part of low rank",
    "a measurement, not the paper's claim (nothing here says anything about scaling): of a digits network the hidden "
    "layer's tables keep all but .05 of its accuracy, in each of three seeds",
)
SEEDS = 3


def run() -> Finding:
    x, y, seen, labels = digits()
    rates: dict[str, list[float]] = {"trained": [], "converted": []}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = trained(nn.Sequential(*layers), x, y, seed=seed, epochs=20)
        changed = copy.deepcopy(model)
        pyrepr.convert(changed, list(x.split(256)), select="2", bits=4, rank=16, progress=False)
        with torch.no_grad():
            for name, network in (("trained", model), ("converted", changed)):
                rates[name].append(float((network(seen).argmax(1) == labels).float().mean()))
    text = ", ".join(f"{a:.3f} → {b:.3f}" for a, b in zip(*rates.values(), strict=True))
    lost = max(a - b for a, b in zip(*rates.values(), strict=True))
    chart = Chart(rates, [f"seed {seed}" for seed in range(SEEDS)], "", "accuracy")
    return Finding(f"accuracy {text}", lost <= 0.05, {"lost": lost}, chart)
