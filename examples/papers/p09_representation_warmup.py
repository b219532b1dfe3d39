"""How far is one layer's geometry another's? Alignment at nearest neighbours."""

from __future__ import annotations

from itertools import pairwise

import torch
from pyrepr.papers._minilm import encoded_docstrings
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr.similarity import CKNNA

PAPER = Paper(
    9,
    "Liu et al., Efficient Generative Model Training via Embedded Representation Warmup, 2025",
    "CKNNA, k = 10, biased, directed neighbours in both; the loss is −mean cosine with a frozen encoder's tokens",
    "CKNNA without n × n matrices equals its dense definition to 1e-5; a layer of MiniLM has 1 with itself and less, "
    "in the mean, with each of those one, two and three layers away",
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
    apart = [float(table.diagonal(step).mean()) for step in range(1, len(layers))]
    text = f"off by {off:.0e}; layers 1 to {len(apart)} apart {', '.join(f'{v:.2f}' for v in apart)}"
    holds = off < 1e-5 and itself < 1e-6 and all(a > b for a, b in pairwise([1.0, *apart[:3]]))
    chart = Chart({"CKNNA": [1.0, *apart]}, list(range(len(layers))), "layers apart", "mean CKNNA", "lines")
    return Finding(text, holds, {"off": off, **{f"{i + 1} apart": v for i, v in enumerate(apart)}}, chart)
