"""Features of several seeds side by side know more than one network's."""

from __future__ import annotations

import torch
from pyrepr.papers._data import accuracy, digits, trained
from pyrepr.papers._row import Finding, Paper
from torch import nn

PAPER = Paper(
    49,
    "Zhang & Bottou, Learning useful representations for shifting tasks and distributions, 2023",
    "features of networks of different seeds, concatenated, under a new linear head",
    "of networks that learned whether a digit is odd, four together tell ten digits apart better than the best of "
    "them, by .02",
)


def run() -> Finding:
    x, y, seen, labels = digits()
    features = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = trained(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)), x, y % 2, seed=seed)
        with torch.no_grad():
            features.append((model[:2](x), model[:2](seen)))
    single = [accuracy(z, y, held, labels) for z, held in features]
    joined, held_out = (torch.cat(parts, 1) for parts in zip(*features, strict=True))
    together = accuracy(joined, y, held_out, labels)
    text = f"{together:.2f} together, {', '.join(f'{a:.2f}' for a in single)} each"
    return Finding(text, together - max(single) >= 0.02, {"together": together, "best": max(single)})
