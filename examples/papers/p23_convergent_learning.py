"""Do two networks learn the same units? Matched by correlation on some stimuli, seen again on others."""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Finding, Paper
from torch import nn

from pyrepr.similarity import match_units

PAPER = Paper(
    23,
    "Li et al., Convergent Learning: Do different neural networks learn the same representations?, 2016",
    "maximum-weight matching of units by their correlation over stimuli",
    "matched units of two seeds correlate as well on held-out stimuli (within .05, above .5); random pairs below .2",
)


def units(seed: int, x: torch.Tensor, y: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model = trained(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), x, y, seed=seed)
    with torch.no_grad():
        return [model[:2](part) for part in (x, seen)]


def run() -> Finding:
    x, y, seen, _ = digits()
    (a, a_held), (b, b_held) = (units(seed, x, y, seen) for seed in (0, 1))
    match = match_units(a, b)
    live = match.correlations.isfinite()
    left, right = match.x_units[live], match.y_units[live]

    def correlations(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        p, q = a_held[:, left], b_held[:, right]
        p, q = p - p.mean(0), q - q.mean(0)
        return ((p * q).sum(0) / (p.norm(dim=0) * q.norm(dim=0))).nan_to_num(0.0)

    matched, held = float(match.correlations[live].mean()), float(correlations(left, right).mean())
    chance = float(correlations(left, right.roll(7)).mean())
    text = f"mean correlation {matched:.2f} where matched, {held:.2f} held out, {chance:.2f} of random pairs"
    holds = abs(matched - held) < 0.05 and held > 0.5 and chance < 0.2
    return Finding(text, holds, {"matched": matched, "held_out": held, "random": chance})
