"""Do networks that differ more gain more from each other?"""

from __future__ import annotations

from itertools import combinations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

from pyrepr import cka
from pyrepr._optional import require

PAPER = Paper(
    25,
    "",
    "gain = accuracy of two networks' mean probabilities − the mean of their accuracies",
    "over pairs of ten digits networks of different inputs and depths, 1 − CKA of the last hidden layers ranks the "
    "gain of averaging two (Spearman at least .3)",
)
NETWORKS = 10


def run() -> Finding:
    stats = require("scipy.stats", "scipy")
    x, y, seen, labels = digits()
    layers, answers, rates = [], [], []
    for seed in range(NETWORKS):
        torch.manual_seed(seed)
        keep = (torch.rand(64) < (0.35, 0.7)[seed % 2]).float()  # of the pixels
        model = [nn.Linear(64, 48), nn.ReLU()] + [nn.Linear(48, 48), nn.ReLU()] * (seed % 3 == 0)
        model = trained(nn.Sequential(*model, nn.Linear(48, 10)), x[:400] * keep, y[:400], seed=seed, epochs=30)
        with torch.no_grad():
            layers.append(model[:-1](seen * keep))
            answers.append(model(seen * keep).softmax(1))
        rates.append(float((answers[-1].argmax(1) == labels).float().mean()))
    apart, gains = [], []
    for i, j in combinations(range(NETWORKS), 2):
        both = float(((answers[i] + answers[j]).argmax(1) == labels).float().mean())
        apart.append(1 - float(cka(layers[i], layers[j])))
        gains.append(both - (rates[i] + rates[j]) / 2)
    rank = float(stats.spearmanr(apart, gains).statistic)
    chart = Chart({"a pair of networks": gains}, apart, "1 − CKA", "gain in accuracy", "points")
    text = f"Spearman {rank:.2f} over {len(gains)} pairs; mean gain {sum(gains) / len(gains):.3f}"
    return Finding(text, rank >= 0.3, {"spearman": rank}, chart)
