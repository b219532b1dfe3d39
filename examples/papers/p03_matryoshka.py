"""Nested representations: one embedding whose first entries are embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import accuracy, digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

PAPER = Paper(
    3,
    "Kusupati et al., Matryoshka Representation Learning, 2022",
    "Σ_m CE of a linear head on the first m features, weights 1",
    "the heads on 2, 4, 8, 16 and 32 features are within .04 of networks of that width alone, within .01 from 8 on; a "
    "linear probe of 2 and 4 features beats one of a plain embedding's first by .10",
    stronger="the heads are at least as accurate as networks of that width alone, at every width",
)
WIDTHS, SEEDS, PROBED = (2, 4, 8, 16, 32), (0, 1), 5


class Nested(nn.Module):
    """An encoder and a linear head on every prefix of its output: logits [n, prefixes, 10]."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, max(widths)))
        width = torch.tensor(widths)[:, None, None]
        self.register_buffer("prefix", (torch.arange(max(widths)) < width).float())  # [prefixes, 1, d]
        self.weight = nn.Parameter((2 * torch.rand(len(widths), 10, max(widths)) - 1) / width.sqrt())
        self.bias = nn.Parameter(torch.zeros(len(widths), 10))

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.weight * self.prefix).flatten(0, 1)
        return F.linear(self.encoder(x), heads, self.bias.flatten()).unflatten(1, (-1, 10))


def nested(widths: tuple[int, ...], seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        every = labels.repeat_interleave(len(widths))
        return F.cross_entropy(logits.flatten(0, 1), every, reduction="sum") / len(labels)

    return trained(Nested(widths), x, y, seed=seed, epochs=40, rate=5e-3, batch=128, loss=loss)


def run() -> Finding:
    x, y, seen, labels = digits()
    ours, alone = torch.zeros(len(WIDTHS)), torch.zeros(len(WIDTHS))
    probes = torch.zeros(2, len(WIDTHS))
    for seed in range(PROBED):
        model, plain = nested(WIDTHS, seed, x, y), nested(WIDTHS[-1:], seed, x, y)
        single = [nested((width,), seed, x, y) for width in WIDTHS[:-1]] + [plain] if seed in SEEDS else []
        with torch.no_grad():
            if single:
                ours += (model(seen).argmax(2) == labels[:, None]).float().mean(0) / len(SEEDS)
                alone += torch.stack([(m(seen)[:, 0].argmax(1) == labels).float().mean() for m in single]) / len(SEEDS)
            for row, encoder in enumerate((model.encoder, plain.encoder)):
                for column, width in enumerate(WIDTHS):
                    z, held = encoder(x)[:, :width], encoder(seen)[:, :width]
                    probes[row, column] += accuracy(z, y, held, labels) / PROBED
    behind = alone - ours
    text = f"nested {', '.join(f'{a:.3f}' for a in ours)}; alone {', '.join(f'{a:.3f}' for a in alone)}; "
    text += f"probe of 2 and 4: {probes[0, 0]:.2f}, {probes[0, 1]:.2f}, plain {probes[1, 0]:.2f}, {probes[1, 1]:.2f}"
    holds = bool((behind < 0.04).all() and (behind[2:] <= 0.01).all() and (probes[0] - probes[1])[:2].min() >= 0.1)
    numbers = {f"behind {width}": float(b) for width, b in zip(WIDTHS, behind, strict=True)}
    curves = {"a head on a prefix": ours, "a network of that width": alone}
    curves |= {"probe of a nested prefix": probes[0], "probe of a plain one's": probes[1]}
    series = {name: curve.tolist() for name, curve in curves.items()}
    chart = Chart(series, WIDTHS, "features", "accuracy", "lines", log_x=True)
    return Finding(text, holds, numbers, chart, stronger=bool((behind <= 0).all()))
