"""Weights of two fine-tuned networks, added up: which of the two does the sum resemble?"""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

from pyrepr import cka

PAPER = Paper(
    6,
    "",
    "θ₀ + t (θ_A − θ₀) + (1 − t)(θ_B − θ₀)",
    "CKA of the composed network's last hidden layer with each task's network grows with that task's coefficient, at "
    "every step, in the mean of three seeds",
)
STEPS, SEEDS = (0.0, 0.25, 0.5, 0.75, 1.0), 3


def run() -> Finding:
    x, y, seen, _ = digits()
    curves = torch.zeros(2, len(STEPS), dtype=torch.float64)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        base = trained(base, x, (y % 3 == 0).long(), seed=seed, epochs=4)
        tasks = [trained(copy.deepcopy(base), x, task, seed=seed, epochs=12) for task in (y % 2, (y > 4).long())]
        states = [dict(model.state_dict()) for model in (base, *tasks)]

        @torch.no_grad()
        def hidden(state: dict[str, Tensor], model: nn.Module = base) -> Tensor:
            model.load_state_dict(state)
            return model[:4](seen)

        ends = [hidden(state) for state in states[1:]]
        for step, t in enumerate(STEPS):
            z = hidden({key: t * states[1][key] + (1 - t) * states[2][key] for key in states[1]})
            curves[:, step] += torch.tensor([float(cka(z, end)) for end in ends]) / SEEDS
    a, b = curves.tolist()
    text = f"CKA with A {', '.join(f'{v:.2f}' for v in a)}, with B {', '.join(f'{v:.2f}' for v in b)}"
    holds = all(p < q for p, q in pairwise(a)) and all(p > q for p, q in pairwise(b))
    chart = Chart({"with A": a, "with B": b}, STEPS, "coefficient of A", "CKA", "lines")
    return Finding(text, holds, {"from": a[0], "to": a[-1]}, chart)
