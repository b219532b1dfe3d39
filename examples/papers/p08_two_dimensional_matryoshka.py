"""Embeddings that may be cut in depth and in width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits, nearest_right, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

PAPER = Paper(
    8,
    "Li et al., 2D Matryoshka Sentence Embeddings, 2024",
    "loss of the last layer + of a sampled one, both at all prefixes, + τ KL(softmax(last/τ) ‖ softmax(layer/τ)), "
    "τ = .3",
    "nearest neighbours by 4 features of the first layer are right more often by .10 than in the plainly trained "
    "network; the whole embedding loses at most .01",
)
WIDTHS, BLOCKS, TAU, SEEDS = (4, 8, 16, 32), 4, 0.3, (0, 1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, WIDTHS[-1])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTHS[-1], 64), nn.ReLU(), nn.Linear(64, WIDTHS[-1])) for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The embedding and what every block makes of it."""
        layers = [self.embed(x)]
        for block in self.blocks:
            layers.append(layers[-1] + block(layers[-1]))
        return layers


def network(seed: int, x: Tensor, y: Tensor, *, nested: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = Residual()
    generator = torch.Generator().manual_seed(seed)

    def classify(z: Tensor, width: int, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(z[:, :width], model.head.weight[:, :width], model.head.bias), labels)

    def loss(layers: list[Tensor], labels: Tensor) -> Tensor:
        last = layers[-1]
        if not nested:
            return classify(last, WIDTHS[-1], labels)
        layer = layers[int(torch.randint(BLOCKS, (), generator=generator))]
        total = sum(classify(z, width, labels) for z in (last, layer) for width in WIDTHS)
        target = (last.detach() / TAU).softmax(1)
        return total + TAU * F.kl_div((layer / TAU).log_softmax(1), target, reduction="batchmean")

    return trained(model, x, y, seed=seed, epochs=20, loss=loss)


def run() -> Finding:
    x, y, seen, labels = digits()
    rates = torch.zeros(2, 3)
    for seed in SEEDS:
        for row, nested in enumerate((False, True)):
            model = network(seed, x, y, nested=nested)
            with torch.no_grad():
                index, queries = model(x), model(seen)
            for column, (layer, width) in enumerate(((0, 4), (1, 4), (-1, WIDTHS[-1]))):
                found = nearest_right(queries[layer][:, :width], labels, index[layer][:, :width], y)
                rates[row, column] += found / len(SEEDS)
    plain, ours = rates.tolist()
    names = ("layer 0 at 4", "layer 1 at 4", "whole")
    text = ", ".join(f"{name} {a:.3f} → {b:.3f}" for name, a, b in zip(names, plain, ours, strict=True))
    holds = ours[0] - plain[0] >= 0.1 and plain[2] - ours[2] <= 0.01
    series = {"plain": plain, "nested in depth and width": ours}
    numbers = {f"{n}, {k}": r for k, row in series.items() for n, r in zip(names, row, strict=True)}
    return Finding(text, holds, numbers, Chart(series, names, "", "neighbour is right"))
