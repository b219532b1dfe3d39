"""Features of several seeds side by side know more than one network's."""

from __future__ import annotations

import torch
from pyrepr.papers._data import accuracy, digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

PAPER = Paper(
    49,
    "probably Zhang & Bottou, Learning useful representations for shifting tasks and distributions, 2023",
    "features of networks of different seeds, concatenated, under a new linear head",
    "of networks that learned whether a digit is odd, four together tell ten digits apart better than the best of "
    "them, by .02, in each of two groups",
    stronger="four together are better, by .01, than one network of four times the width",
)
GROUPS, WIDTH = 2, 32


def features(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden units, seen in training and not, of a network that learned whether a digit is odd."""
    x, y, seen, _ = digits()
    torch.manual_seed(seed)
    model = trained(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2)), x, y % 2, seed=seed)
    with torch.no_grad():
        return model[:2](x), model[:2](seen)


def run() -> Finding:
    _, y, _, labels = digits()
    rates: dict[str, list[float]] = {"best of four": [], "four together": [], "one, four times as wide": []}
    for group in range(GROUPS):
        single = [features(WIDTH, 4 * group + i) for i in range(4)]
        wide = features(4 * WIDTH, group)
        joined = tuple(torch.cat(parts, 1) for parts in zip(*single, strict=True))
        rates["best of four"].append(max(accuracy(z, y, held, labels) for z, held in single))
        for name, (z, held) in (("four together", joined), ("one, four times as wide", wide)):
            rates[name].append(accuracy(z, y, held, labels))
    best, together, wide = rates.values()
    text = "; ".join(f"{name} {', '.join(f'{a:.2f}' for a in values)}" for name, values in rates.items())
    holds = min(a - b for a, b in zip(together, best, strict=True)) >= 0.02
    chart = Chart(rates, [f"group {i + 1}" for i in range(GROUPS)], "", "accuracy")
    stronger = min(a - b for a, b in zip(together, wide, strict=True)) >= 0.01
    return Finding(text, holds, {"together": min(together), "best": max(best)}, chart, stronger)
