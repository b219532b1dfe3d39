"""Relative representations: a decoder made for one space reads another."""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Finding, Paper
from torch import nn

from pyrepr.similarity import relative_representation

PAPER = Paper(
    28,
    "Moschella et al., Relative representations enable zero-shot latent space communication, 2023",
    "r_i = cos(x_i, anchors): the same samples as anchors in both spaces",
    "a decoder of the relative codes of one autoencoder reads the other's with half the error of the mean image; "
    "one of absolute codes is worse than the mean image",
)


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


def run() -> Finding:
    x, _, held, _ = digits()
    anchors = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:128]
    codes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = trained(Autoencoder(), x, x, seed=seed)
        with torch.no_grad():
            codes.append((model.encoder(x), model.encoder(held)))
    errors = {}
    for kind in ("relative", "absolute"):
        pairs = [
            tuple(relative_representation(z, train[anchors]) if kind == "relative" else z for z in (train, test))
            for train, test in codes
        ]
        read = decoder(pairs[0][0], x, 2)
        with torch.no_grad():
            errors[kind] = float((read(pairs[1][1]) - held).square().mean())
    mean = float((held - x.mean(0)).square().mean())
    text = f"error relative {errors['relative']:.3f}, absolute {errors['absolute']:.3f}, mean image {mean:.3f}"
    return Finding(text, errors["relative"] < mean / 2 and errors["absolute"] > mean, {**errors, "mean": mean})
