"""How much one attention head reads of what another writes, without making a d × d matrix."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

PAPER = Paper(
    10,
    "Elhage et al., A Mathematical Framework for Transformer Circuits, 2021",
    "‖W₁W₂‖_F / (‖W₁‖_F ‖W₂‖_F) of low-rank W = A B",
    "composition of twelve pairs of heads follows from Gram matrices of the size of a head to twelve digits",
)
PAIRS = 12


def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|A B|² from two matrices of the size of a head."""
    return ((a.T @ a) * (b @ b.T)).sum()


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    d, head = 256, 16
    dense, small = [], []
    for pair in range(PAIRS):
        a1, b1, a2, b2 = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, head), (head, d)) * 2
        )
        a2 = a2 + pair / PAIRS * b1.T  # the second head reads ever more of what the first writes
        dense.append(float((a1 @ b1 @ a2 @ b2).norm() / ((a1 @ b1).norm() * (a2 @ b2).norm())))
        middle = b1 @ a2
        small.append(float((squared(a1, middle @ b2) / (squared(a1, b1) * squared(a2, b2))).sqrt()))
    error = max(abs(a - b) for a, b in zip(small, dense, strict=True))
    chart = Chart({"a pair of heads": small}, dense, "from d × d matrices", "from Gram matrices", "points")
    text = f"{min(small):.3f} to {max(small):.3f}, at most {error:.0e} from the dense matrices"
    return Finding(text, error < 1e-12, {"error": error}, chart)
