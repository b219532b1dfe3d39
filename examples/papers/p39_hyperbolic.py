"""Möbius addition in the Poincaré ball, with its derivative written out."""

from __future__ import annotations

from typing import Any

import torch
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

PAPER = Paper(
    39,
    "van Spengler et al., Poincaré ResNet, 2023",
    "x ⊕ y = ((1 + 2c⟨x, y⟩ + c|y|²) x + (1 − c|x|²) y) / (1 + 2c⟨x, y⟩ + c²|x|²|y|²)",
    "written-out gradients in x, y and the curvature c equal autograd's to 1e-9, near the boundary too; "
    "(−x) ⊕ (x ⊕ y) = y",
)
CURVATURES = (0.1, 1.0, 2.0)


def terms(x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """⟨x, y⟩, |x|², |y|² and the three coefficients of Möbius addition, each [n, 1]."""
    xy, xx, yy = (x * y).sum(1, True), x.square().sum(1, True), y.square().sum(1, True)
    return xy, xx, yy, 1 + 2 * c * xy + c * yy, 1 - c * xx, 1 + 2 * c * xy + c**2 * xx * yy


def plain(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    *_, a, b, d = terms(x, y, c)
    return (a * x + b * y) / d


class Addition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, c)
        return plain(x, y, c)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, c = ctx.saved_tensors
        xy, xx, yy, a, b, d = terms(x, y, c)
        g = gradient / d
        of_a, of_b = (g * x).sum(1, True), (g * y).sum(1, True)
        of_d = -(g * (a * x + b * y)).sum(1, True) / d
        of_xy = 2 * c * (of_a + of_d)
        of_xx, of_yy = -c * of_b + c**2 * yy * of_d, c * of_a + c**2 * xx * of_d
        of_c = of_a * (2 * xy + yy) - of_b * xx + of_d * (2 * xy + 2 * c * xx * yy)
        return a * g + of_xy * y + 2 * of_xx * x, b * g + of_xy * x + 2 * of_yy * y, of_c.sum()


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    errors = []
    for curvature in CURVATURES:
        rows = torch.randn(2, 64, 6, generator=generator, dtype=torch.float64)
        lengths = torch.linspace(0.05, 0.99, 64, dtype=torch.float64)[:, None] / curvature**0.5
        x, y = (part / part.norm(dim=1, keepdim=True) * lengths for part in rows)
        inputs = [x.requires_grad_(), y.requires_grad_(), torch.tensor(curvature).double().requires_grad_()]
        cotangent = torch.randn(64, 6, generator=generator, dtype=torch.float64)
        ours, theirs = (torch.autograd.grad(f(*inputs), inputs, cotangent) for f in (Addition.apply, plain))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)])
    worst = max(map(max, errors))
    with torch.no_grad():
        back = float((plain(-x, plain(x, y, inputs[2]), inputs[2]) - y).abs().max())
    text = f"gradients off by {worst:.0e}, cancelling on the left by {back:.0e}"
    series = {f"in {name}": values for name, values in zip("xyc", zip(*errors, strict=True), strict=True)}
    names = [f"c = {c}" for c in CURVATURES]
    chart = Chart(series, names, "", "relative error of gradients", bound=1e-9, log=True)
    return Finding(text, worst < 1e-9 and back < 1e-9, {"gradients": worst, "cancelling": back}, chart)
