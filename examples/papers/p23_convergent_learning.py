"""Do two networks learn the same units? Matched by correlation on some stimuli, seen again on others."""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

from pyrepr.similarity import match_units

PAPER = Paper(
    23,
    "Li et al., Convergent Learning: Do different neural networks learn the same representations?, 2016",
    "maximum-weight matching of units by their correlation over stimuli",
    "matched units of two seeds correlate as well on held-out stimuli (within .05, above .7), random pairs below .1; "
    "more than .6 of the matched above .7, fewer than .1 below .5",
)
PAIRS = ((0, 1), (2, 3))


def correlations(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p - p.mean(0), q - q.mean(0)
    return ((p * q).sum(0) / (p.norm(dim=0) * q.norm(dim=0))).nan_to_num(0.0)


def units(seed: int, x: torch.Tensor, y: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model = trained(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), x, y, seed=seed)
    with torch.no_grad():
        return [model[:2](part) for part in (x, seen)]


def run() -> Finding:
    x, y, seen, _ = digits()
    found: dict[str, list[torch.Tensor]] = {"matched": [], "held out": [], "random pairs": []}
    for seeds in PAIRS:
        (a, a_held), (b, b_held) = (units(seed, x, y, seen) for seed in seeds)
        match = match_units(a, b)
        live = match.correlations.isfinite()
        left, right = match.x_units[live], match.y_units[live]
        found["matched"].append(match.correlations[live])
        found["held out"].append(correlations(a_held[:, left], b_held[:, right]))
        found["random pairs"].append(correlations(a_held[:, left], b_held[:, right.roll(7)]))
    sets = {name: torch.cat(parts).double().sort(descending=True).values for name, parts in found.items()}
    matched, held, chance = (float(values.mean()) for values in sets.values())
    well, badly = (float(share.double().mean()) for share in (sets["matched"] > 0.7, sets["matched"] < 0.5))
    text = f"mean correlation {matched:.2f} where matched, {held:.2f} held out, {chance:.2f} of random pairs; "
    text += f"{well:.0%} above .7, {badly:.0%} below .5"
    holds = abs(matched - held) < 0.05 and held > 0.7 and chance < 0.1 and well > 0.6 and badly < 0.1
    shortest = min(map(len, sets.values()))
    curves = {name: values[:shortest].tolist() for name, values in sets.items()}
    chart = Chart(curves, list(range(shortest)), "pairs of units, best first", "correlation", "lines")
    return Finding(text, holds, {"matched": matched, "held_out": held, "random": chance, "above": well}, chart)
