"""In-context regression on a fixed representation: the delta rule with step 1 projects, and ends at least squares."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import chunk_delta_rule

PAPER = Paper(
    54,
    "probably Guo et al., How Do Transformers Learn In-Context Beyond Simple Functions? A Case Study on Learning with "
    "Representations, 2024",
    "ridge regression of y on Φ(x), λ → 0; β = 1 and unit keys: Kaczmarz' projections",
    "every step fits its example to 1e-12, sweeps over 24 examples come to the least-squares map of smallest norm "
    "(to 1e-6 of it), and so does ridge regression as λ falls",
)
EXAMPLES, D, WIDTH, SWEEPS = 24, 8, 128, 400
LAMBDAS = (1e-2, 1e-4, 1e-6)


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x, hidden, truth = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((EXAMPLES, D), (D, WIDTH), (WIDTH, 1))
    )
    keys = torch.nn.functional.leaky_relu(x @ hidden, 0.1)
    keys = keys / keys.norm(dim=1, keepdim=True)
    values = keys @ truth
    rows, targets = (part.repeat(SWEEPS, 1)[None, :, None] for part in (keys, values))
    rates = torch.ones(rows.shape[:3], dtype=torch.float64)
    fitted, state = chunk_delta_rule(rows, rows, targets, rates, scale=1.0, output_final_state=True)
    own = float((fitted - targets).abs().max())
    smallest = torch.linalg.pinv(keys) @ values
    off = float((state[0, 0] - smallest).norm() / smallest.norm())
    kernel = keys @ keys.T
    ridges = [keys.T @ torch.linalg.solve(kernel + lam * torch.eye(EXAMPLES), values) for lam in LAMBDAS]
    ridge = [float((r - smallest).norm() / smallest.norm()) for r in ridges]
    text = f"own example off by {own:.0e}; from least squares: {off:.0e}, ridge {', '.join(f'{r:.0e}' for r in ridge)}"
    holds = own < 1e-12 and off < 1e-6 and ridge[0] > 10 * ridge[1] > 100 * ridge[2]
    names = ["delta rule", *(f"ridge {lam:.0e}" for lam in LAMBDAS)]
    chart = Chart({"distance": [off, *ridge]}, names, "", "distance from least squares", log=True)
    return Finding(text, holds, {"own": own, "off": off, "ridge 1e-6": ridge[2]}, chart)
