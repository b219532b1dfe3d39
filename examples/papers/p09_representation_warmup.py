"""How far is one layer's geometry another's? Alignment at nearest neighbours."""

from __future__ import annotations

import torch
from pyrepr.papers._minilm import encoded_docstrings
from pyrepr.papers._row import Finding, Paper
from torch import Tensor

from pyrepr.similarity import CKNNA

PAPER = Paper(
    9,
    "Liu et al., Efficient Generative Model Training via Embedded Representation Warmup, 2025",
    "CKNNA, k = 10, biased, directed neighbours in both; the loss is −mean cosine with a frozen encoder's tokens",
    "CKNNA without n × n matrices equals its dense definition to 1e-5, and puts MiniLM's layers in their order: nearest "
    "to a layer, beside itself, is one next to it",
)
NEIGHBOURS = 10


def dense(x: Tensor, y: Tensor) -> float:
    """HSIC of the two kernels on neighbours in both, over the root of each on its own."""
    kernels = [z @ z.T for z in (x, y)]
    masks = [torch.zeros_like(k).scatter(1, k.topk(NEIGHBOURS, 1).indices, 1) for k in kernels]
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)

    def hsic(k: Tensor, l: Tensor) -> Tensor:
        return (centre @ k @ centre @ l).trace()

    both = masks[0] * masks[1]
    own = [hsic(m * k, m * k) for m, k in zip(masks, kernels, strict=True)]
    return float(hsic(both * kernels[0], both * kernels[1]) / (own[0] * own[1]).sqrt())


def run() -> Finding:
    layers = list(encoded_docstrings().means)
    unit = [(z / z.norm(dim=1, keepdim=True)).double() for z in layers]
    table = CKNNA(NEIGHBOURS, estimator="biased").matrix(layers)
    pairs = ((0, 1), (2, 5), (6, 6))
    off = max(abs(dense(unit[a], unit[b]) - float(table[a, b])) for a, b in pairs)
    itself = float((table.diagonal() - 1).abs().max())
    others = table - 2 * torch.eye(len(layers))
    steps = (others.argmax(1) - torch.arange(len(layers))).abs()
    next_to = [float(table[i, i + 1]) for i in range(len(layers) - 1)]
    text = f"off by {off:.0e}; layers next to each other {', '.join(f'{v:.2f}' for v in next_to)}, "
    text += f"first and last {float(table[0, -1]):.2f}"
    holds = off < 1e-5 and itself < 1e-6 and bool((steps == 1).all())
    return Finding(text, holds, {"off": off, "first_last": float(table[0, -1])})
