"""Topological RSA: which layer is it, by distances of which small and large ones are made alike?"""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

from pyrepr.similarity import RSA

PAPER = Paper(
    67,
    "Lin & Kriegeskorte, The Topology and Geometry of Neural Representations, 2024",
    "clip((d − l)/(u − l), 0, 1) of an RDM, l and u its quantiles; correlation of two of them",
    "layers of other seeds are identified as well by geo-topological distances as by distances (at most .05 worse)",
)
SEEDS, DEPTH = 5, 4


def activations(seed: int, x: torch.Tensor, y: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    blocks: list[nn.Module] = [nn.Linear(64, 48)]
    for _ in range(DEPTH - 1):
        blocks += [nn.ReLU(), nn.Linear(48, 48)]
    model = trained(nn.Sequential(*blocks, nn.ReLU(), nn.Linear(48, 10)), x, y, seed=seed, epochs=12)
    found = []
    with torch.no_grad():
        for block in model[:-1]:
            seen = block(seen)
            if isinstance(block, nn.ReLU):
                found.append(seen)
    return found


def run() -> Finding:
    x, y, seen, _ = digits()
    nets = [activations(seed, x, y, seen[:200]) for seed in range(SEEDS)]
    rates = {}
    for name, measure in (
        ("RDM", RSA("euclidean", "corr")),
        ("0.1–0.9", RSA("euclidean", "corr", "geotopological", 0.1, 0.9)),
        ("0–0.5", RSA("euclidean", "corr", "geotopological", 0.0, 0.5)),
    ):
        right = [
            measure.matrix(a, b).argmax(1) == torch.arange(DEPTH)
            for i, a in enumerate(nets)
            for j, b in enumerate(nets)
            if i != j
        ]
        rates[name] = float(torch.cat(right).double().mean())
    text = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
    holds = min(rates["0.1–0.9"], rates["0–0.5"]) >= rates["RDM"] - 0.05
    chart = Chart(
        {"identified": list(rates.values())},
        list(rates),
        "quantiles",
        "share of layers identified",
        bound=rates["RDM"] - 0.05,
    )
    return Finding(f"layers identified: {text}", holds, rates, chart)
