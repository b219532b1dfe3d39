"""Data of the proofs: what scikit-learn brings along, nothing from the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrepr._optional import require


def digits(classes: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8 × 8 digits: training images [n, 64] in [0, 1] and labels, and 500 held-out ones."""
    datasets = require("sklearn.datasets", "scikit-learn")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    train, test = slice(0, len(x) - 500), slice(len(x) - 500, None)
    keep = [y[part] < classes for part in (train, test)]
    return x[train][keep[0]], y[train][keep[0]], x[test][keep[1]], y[test][keep[1]]


def trained(model: nn.Module, x: Tensor, y: Tensor, *, seed: int, epochs: int = 30, rate: float = 3e-3) -> nn.Module:
    """`model` trained by Adam in batches of 64: by cross-entropy on labels, or on squares for floating-point y."""
    loss = nn.functional.mse_loss if y.is_floating_point() else nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()
