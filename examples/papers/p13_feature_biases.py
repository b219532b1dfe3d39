"""Two features that a network knows equally well take up unequal parts of its representation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import nn

from pyrepr.stats import Moments

PAPER = Paper(
    13,
    "probably Lampinen et al., Learned feature representations are biased by complexity, learning order, position, and "
    "more, 2024",
    "R² of a feature's value in the units of a representation, weighted by variance",
    "of a bit and an exclusive-or, both answered right on 99 % of unseen inputs, the bit explains more variance, by "
    ".05 for each of three seeds",
)
INPUTS, SAMPLES = 16, 2560


def run() -> Finding:
    shares, worst = [], 1.0
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randint(0, 2, (SAMPLES, INPUTS)).float()
        bits = torch.stack([x[:, 0], (x[:, 1] != x[:, 2]).float()], 1)
        x = 2 * x - 1
        model = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))
        cut = SAMPLES - 512
        trained(model, x[:cut], bits[:cut], seed=seed, epochs=25, loss=F.binary_cross_entropy_with_logits)
        with torch.no_grad():
            worst = min(worst, float(((model(x[cut:]) > 0) == bits[cut:].bool()).float().mean(0).min()))
            hidden = model[:4](x[cut:])
        shares.append(
            [float(Moments().update(b[:, None], hidden).r2(multioutput="variance_weighted")) for b in bits[cut:].T]
        )
    text = ", ".join(f"{bit:.2f} against {xor:.2f}" for bit, xor in shares)
    holds = worst >= 0.99 and all(bit - xor >= 0.05 for bit, xor in shares)
    numbers = {
        f"{name} {seed}": s for seed, pair in enumerate(shares) for name, s in zip(("bit", "xor"), pair, strict=True)
    }
    bit, xor = zip(*shares, strict=True)
    chart = Chart({"bit": bit, "exclusive-or": xor}, [f"seed {s}" for s in range(3)], "", "share of variance")
    text = f"share of variance {text}; accuracy at least {worst:.3f}"
    return Finding(text, holds, {**numbers, "accuracy": worst}, chart)
