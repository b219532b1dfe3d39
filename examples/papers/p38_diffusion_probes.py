"""Which block of a denoiser, at which noise, knows the class?"""

from __future__ import annotations

import torch
from pyrepr.papers._data import accuracy, digits
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

PAPER = Paper(
    38,
    "probably Xiang et al., Denoising Diffusion Autoencoders are Unified Self-supervised Learners, 2023",
    "linear probe of every block of a denoiser at every noise level",
    "the accuracy of the best block falls by .2 from the least noise to the most, and rises by more than .01 at no "
    "step",
    stronger="a block in the middle is read best, by .02 over the first and the last",
)
LEVELS, BLOCKS, WIDTH = (0.05, 0.2, 0.5, 1.0, 2.0), 5, 96


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(65, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(BLOCKS)
        )
        self.last = nn.Linear(WIDTH, 64)

    def layers(self, noisy: Tensor, level: Tensor) -> list[Tensor]:
        h = [self.first(torch.cat([noisy / (1 + level**2).sqrt(), level.log() / 4], 1))]
        for block in self.blocks:
            h.append(h[-1] + block(h[-1]))
        return h[1:]


def run() -> Finding:
    x, y, seen, labels = digits()
    centre, scale = x.mean(), x.std()
    x, seen = (x - centre) / scale, (seen - centre) / scale
    torch.manual_seed(0)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    for _ in range(50):
        for rows in torch.randperm(len(x)).split(64):
            level = torch.empty(len(rows), 1).uniform_(-3.0, 1.0).exp()
            noisy = x[rows] + level * torch.randn(len(rows), 64)
            optimizer.zero_grad()
            nn.functional.mse_loss(model.last(model.layers(noisy, level)[-1]), x[rows]).backward()
            optimizer.step()
    table = torch.zeros(len(LEVELS), BLOCKS)
    with torch.no_grad():
        for row, level in enumerate(LEVELS):
            parts = [model.layers(z + level * torch.randn_like(z), torch.full((len(z), 1), level)) for z in (x, seen)]
            table[row] = torch.tensor([accuracy(a, y, b, labels) for a, b in zip(*parts, strict=True)])
    best = table[table.amax(1).argmax()]
    middle, ends = float(best[1:-1].max()), max(float(best[0]), float(best[-1]))
    falls = table.amax(1)
    text = f"best blocks by noise {', '.join(f'{a:.2f}' for a in falls)}; first {best[0]:.3f}, "
    text += f"best of the middle {middle:.3f}, last {best[-1]:.3f}"
    holds = bool((falls.diff() < 0.01).all()) and float(falls[0] - falls[-1]) >= 0.2
    series = {f"noise {level}": row for level, row in zip(LEVELS, table.tolist(), strict=True)}
    chart = Chart(series, [str(i + 1) for i in range(BLOCKS)], "block", "accuracy of a linear probe", "heat")
    numbers = {"middle": middle, "ends": ends, "clean": float(falls[0]), "noisy": float(falls[-1])}
    return Finding(text, holds, numbers, chart, stronger=middle - ends >= 0.02)
