"""A feed-forward network of hashed tables in place of matrices."""

from __future__ import annotations

import torch
from pyrepr.papers._data import digits, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

from pyrepr.nn import MemoryFormerMLP

PAPER = Paper(
    58,
    "Ding et al., MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers, 2024",
    "y = Σ_k p(z_k) T_k[h(z_k)], h the signs of a chunk of z, p = Π σ(2|z_i|/t); two such layers, a norm between",
    "digits are told apart with a block of tables as with a dense one of four times the width (at most .01 less in the "
    "mean of three seeds) and better than without a block, with less than a tenth of the multiplications",
    fails="trained on 1297 images, the tables' block makes digits no better told apart than none",
)
WIDTH, BITS, SEEDS = 64, 4, 3


class Network(nn.Module):
    """An embedding, a residual block behind a norm, and a head."""

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(h if self.block is None else h + self.block(self.norm(h)))


def run() -> Finding:
    x, y, seen, labels = digits()
    blocks = {
        "tables": lambda: MemoryFormerMLP(WIDTH, bits=BITS),
        "dense": lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
        "none": lambda: None,
    }
    rates = dict.fromkeys(blocks, 0.0)
    for seed in range(SEEDS):
        for name, block in blocks.items():
            torch.manual_seed(seed)
            model = trained(Network(block()), x, y, seed=seed, epochs=15)
            with torch.no_grad():
                rates[name] += float((model(seen).argmax(1) == labels).float().mean()) / SEEDS
    tables, dense = blocks["tables"](), blocks["dense"]()
    products = sum(layer.tables.shape[0] * layer.tables.shape[2] for layer in (tables.up, tables.down))
    share = products / sum(layer.weight.numel() for layer in (dense[0], dense[2]))
    text = f"accuracy {', '.join(f'{name} {rate:.3f}' for name, rate in rates.items())}; {share:.2f} of the products"
    holds = rates["dense"] - rates["tables"] <= 0.01 and rates["tables"] > rates["none"] and share < 0.1
    chart = Chart({"accuracy": list(rates.values())}, list(rates), "block", "accuracy")
    return Finding(text, holds, {**rates, "share": share}, chart)
