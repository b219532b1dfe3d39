"""Which layer of one network is which of another? Centred kernel alignment, and what it does not see."""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits
from pyrepr.papers._row import Chart, Finding, Paper
from pyrepr.papers.p67_topological_rsa import DEPTH, activations

from pyrepr.similarity import CCA, CKA, Measure

PAPER = Paper(
    47,
    "Kornblith et al., Similarity of Neural Network Representations Revisited, 2019",
    "CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))",
    "layers of other seeds are identified by CKA more often than by mean CCA, by .05; CKA does not change under "
    "rotations and scalings (1e-5), and does, by .05, where units are scaled apart",
    fails="both invariances hold, but of four-layer perceptrons for digits mean CCA identifies more layers than CKA",
)
SEEDS = 5


def identified(measure: Measure, nets: list[list[torch.Tensor]]) -> float:
    rates = [
        measure.matrix(a, b).argmax(1) == torch.arange(DEPTH)
        for i, a in enumerate(nets)
        for j, b in enumerate(nets)
        if i != j
    ]
    return float(torch.cat(rates).double().mean())


def run() -> Finding:
    x, y, seen, _ = digits()
    nets = [activations(seed, x, y, seen) for seed in range(SEEDS)]
    measures: dict[str, Measure] = {"CKA": CKA(), "CCA": CCA()}
    rates = {name: identified(measure, nets) for name, measure in measures.items()}
    layer, other = nets[0][1].double(), nets[1][1].double()
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(layer.shape[1], layer.shape[1], generator=generator, dtype=torch.float64)
    spread = torch.logspace(-1, 1, layer.shape[1], dtype=torch.float64).diag()
    before = float(CKA()(layer, other))
    turned, scaled = (
        abs(float(CKA()(layer @ turn, other)) - before) for turn in (3 * torch.linalg.qr(square)[0], spread)
    )
    text = f"identified {', '.join(f'{name} {rate:.2f}' for name, rate in rates.items())}; CKA changes by {turned:.0e} "
    text += f"when turned and scaled, {scaled:.2f} where units are scaled apart"
    holds = rates["CKA"] - rates["CCA"] >= 0.05 and turned < 1e-5 and scaled > 0.05
    chart = Chart({"identified": list(rates.values())}, list(rates), "", "share of layers identified")
    return Finding(text, holds, {**rates, "turned": turned, "scaled": scaled}, chart)
