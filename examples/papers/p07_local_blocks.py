"""Blocks that learn without back-propagation through each other: are their representations alike?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

from pyrepr import cka_matrix

PAPER = Paper(
    7,
    "",
    "every block under a loss of its own, its input detached",
    "CKA of blocks that learn each for itself falls less with their distance than that of a network trained as a "
    "whole: at most half as far from neighbours to the ends, in the mean of three seeds",
    fails="of five blocks for digits, both fall alike",
)
DEPTH, WIDTH, SEEDS = 5, 48, 3


class Blocks(nn.Module):
    def __init__(self, *, local: bool) -> None:
        super().__init__()
        self.local = local
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH if i else 64, WIDTH), nn.ReLU()) for i in range(DEPTH)
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 10) for _ in range(DEPTH))

    def layers(self, x: Tensor) -> list[Tensor]:
        layers = []
        for block in self.blocks:
            x = block(x.detach() if self.local else x)
            layers.append(x)
        return layers

    def forward(self, x: Tensor) -> list[Tensor]:
        layers = self.layers(x)
        chosen = range(DEPTH) if self.local else (DEPTH - 1,)
        return [self.heads[i](layers[i]) for i in chosen]


def summed(outs: list[Tensor], labels: Tensor) -> Tensor:
    return sum(F.cross_entropy(out, labels) for out in outs)


def run() -> Finding:
    x, y, seen, _ = digits()
    curves = {}
    for name, local in (("each for itself", True), ("as a whole", False)):
        apart = torch.zeros(DEPTH - 1, dtype=torch.float64)
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model = trained(Blocks(local=local), x, y, seed=seed, epochs=15, loss=summed)
            with torch.no_grad():
                table = cka_matrix(model.layers(seen)).double()
            apart += torch.stack([table.diagonal(step).mean() for step in range(1, DEPTH)]) / SEEDS
        curves[name] = apart.tolist()
    falls = {name: curve[0] - curve[-1] for name, curve in curves.items()}
    text = "; ".join(f"{name} {', '.join(f'{v:.2f}' for v in curve)}" for name, curve in curves.items())
    chart = Chart(curves, list(range(1, DEPTH)), "blocks apart", "CKA", "lines")
    holds = falls["each for itself"] <= falls["as a whole"] / 2
    return Finding(f"CKA by distance: {text}", holds, falls, chart)
