"""Relative representations: a decoder made for one space reads another."""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

from pyrepr.similarity import relative_representation

PAPER = Paper(
    28,
    "Moschella et al., Relative representations enable zero-shot latent space communication, 2023",
    "r_i = cos(x_i, anchors): the same samples as anchors in both spaces",
    "a decoder of the relative codes of one autoencoder reads the other's with half the error of the mean image; "
    "one of absolute codes is worse than the mean image",
)
SEEDS = (0, 2)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 24))
        self.decoder = nn.Sequential(nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


def decoder(codes: torch.Tensor, x: torch.Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained(nn.Sequential(nn.Linear(codes.shape[1], 256), nn.ReLU(), nn.Linear(256, 64)), codes, x, seed=seed)


def errors(start: int, x: torch.Tensor, held: torch.Tensor) -> list[float]:
    """Of the first autoencoder's decoder on the second's relative and absolute codes."""
    anchors = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:128]
    codes = []
    for seed in (start, start + 1):
        torch.manual_seed(seed)
        model = trained(Autoencoder(), x, x, seed=seed)
        with torch.no_grad():
            codes.append((model.encoder(x), model.encoder(held)))
    found = []
    for kind in ("relative", "absolute"):
        pairs = [
            tuple(relative_representation(z, train[anchors]) if kind == "relative" else z for z in (train, test))
            for train, test in codes
        ]
        read = decoder(pairs[0][0], x, 2)
        with torch.no_grad():
            found.append(float((read(pairs[1][1]) - held).square().mean()))
    return found


def run() -> Finding:
    x, _, held, _ = digits()
    relative, absolute = zip(*(errors(seed, x, held) for seed in SEEDS), strict=True)
    mean = float((held - x.mean(0)).square().mean())
    text = ", ".join(f"{value:.3f}" for value in relative)
    text = f"error relative {text}, absolute {', '.join(f'{value:.3f}' for value in absolute)}, mean image {mean:.3f}"
    holds = max(relative) < mean / 2 and min(absolute) > mean
    series = {"relative": relative, "absolute": absolute}
    chart = Chart(series, [f"pair {i + 1}" for i in range(len(SEEDS))], "", "error of a pixel", bound=mean)
    return Finding(text, holds, {"relative": max(relative), "absolute": min(absolute), "mean": mean}, chart)
