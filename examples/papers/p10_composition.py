"""How much one attention head reads of what another writes, without making a d × d matrix."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Finding, Paper

PAPER = Paper(
    10,
    "Elhage et al., A Mathematical Framework for Transformer Circuits, 2021",
    "‖W₁W₂‖_F / (‖W₁‖_F ‖W₂‖_F) of low-rank W = A B",
    "composition of two heads follows from Gram matrices of the size of a head to twelve digits",
)


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    d, head = 256, 16
    a1, b1, a2, b2 = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, head), (head, d)) * 2
    )
    dense = (a1 @ b1 @ a2 @ b2).norm() / ((a1 @ b1).norm() * (a2 @ b2).norm())

    def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a.T @ a) * (b @ b.T)).sum()  # ‖A B‖²

    middle = b1 @ a2
    small = (squared(a1, middle @ b2) / (squared(a1, b1) * squared(a2, b2))).sqrt()
    error = float((small - dense).abs())
    return Finding(f"{float(small):.6f}, {error:.0e} from the dense matrices", error < 1e-12, {"error": error})
