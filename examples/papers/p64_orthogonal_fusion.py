"""Local features without what the global one says already."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.functional import orthogonal_residual

PAPER = Paper(
    64,
    "Yang et al., DOLG: Single-Stage Image Retrieval with Deep Orthogonal Fusion of Local and Global Features, 2021",
    "x − ⟨x, g⟩/⟨g, g⟩ g",
    "the residual is orthogonal to g, the parts add up by Pythagoras, and g = 0 is finite",
)


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 49, 64), (8, 1, 64)))
    rest = orthogonal_residual(x, g)
    inner = float((rest * g).sum(-1).abs().max())
    sums = (rest.square().sum(-1) + (x - rest).square().sum(-1) - x.square().sum(-1)).abs().max()
    finite = bool(orthogonal_residual(x, torch.zeros_like(g)).isfinite().all())
    text = f"largest inner product {inner:.1e}, squares off by {float(sums):.1e}, finite at g = 0: {finite}"
    whole, along, left = (z.square().sum((1, 2)) for z in (x, x - rest, rest))
    squares = {"x": whole.tolist(), "along g + residual": (along + left).tolist(), "residual": left.tolist()}
    chart = Chart(squares, [str(i + 1) for i in range(len(x))], "image", "sum of squares")
    holds = inner < 1e-12 and float(sums) < 1e-11 and finite
    return Finding(text, holds, {"inner": inner, "squares": float(sums)}, chart)
