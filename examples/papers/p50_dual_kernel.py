"""A random deep network's representation, as its layers grow wide: a kernel applied to a kernel."""

from __future__ import annotations

import torch
from pyrepr.papers._data import arc_cosine, digits
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import cka, gram

PAPER = Paper(
    50,
    "probably Daniely et al., Toward Deeper Understanding of Neural Networks: The Power of Initialization and a Dual "
    "View on Expressivity, 2016",
    "K_{l+1} = k₁(K_l): the Gram matrix of rectified layers of infinite width",
    "Gram matrices of random networks of three layers come to the composed kernel, 16 times the width 4 times as near "
    "(2.5 to 6.5)",
)
WIDTHS, DEPTH, SEEDS = (128, 512, 2048), 3, 16


def features(x: torch.Tensor, width: int, generator: torch.Generator) -> torch.Tensor:
    for _ in range(DEPTH):
        weight = torch.randn(x.shape[1], width, generator=generator) * (2 / width) ** 0.5
        x = (x @ weight).relu()
    return x


def run() -> Finding:
    x = digits()[0][:48]
    x = x / x.norm(dim=1, keepdim=True)
    kernel = gram(x.double())
    for _ in range(DEPTH):
        kernel = arc_cosine(kernel)[1]
    generator = torch.Generator().manual_seed(0)
    errors, similarity = [], 0.0
    for width in WIDTHS:
        nets = [features(x, width, generator) for _ in range(SEEDS)]
        off = torch.stack([(gram(net).double() - kernel).square().mean() for net in nets])
        errors.append(float((off.mean() / kernel.square().mean()).sqrt()))
        similarity = float(cka(nets[0], nets[1]))
    text = f"relative error {errors[0]:.3f} at width {WIDTHS[0]}, {errors[-1]:.3f} at {WIDTHS[-1]}"
    holds = 2.5 < errors[0] / errors[-1] < 6.5 and errors[-1] < 0.1
    numbers = {**{str(w): e for w, e in zip(WIDTHS, errors, strict=True)}, "cka": similarity}
    chart = Chart({"three layers": errors}, WIDTHS, "width", "relative error", "lines", log=True, log_x=True)
    return Finding(f"{text}; CKA of two wide networks {similarity:.3f}", holds, numbers, chart)
