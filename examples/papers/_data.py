"""Data of the proofs: what scikit-learn brings along, nothing from the network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrepr._optional import require
from pyrepr.functional import pairwise_topk
from pyrepr.stats import linear_probe


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


def trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    epochs: int = 30,
    rate: float = 3e-3,
    batch: int = 64,
    loss: Callable[..., Tensor] | None = None,
) -> nn.Module:
    """`model` trained by Adam: by cross-entropy on labels, on squares for floating-point y, or `loss`
    of the model's output and y."""
    if loss is None:
        loss = nn.functional.mse_loss if y.is_floating_point() else nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def accuracy(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor) -> float:
    """Held-out accuracy of a linear read-out, the better of three λ."""
    return float(linear_probe([x], y, alphas=(0.01, 1.0, 100.0), val=([seen], labels)).best[0])


def nearest_right(queries: Tensor, labels: Tensor, index: Tensor, known: Tensor) -> float:
    """Share of queries whose nearest row of an index, by cosine, has their label."""
    _, at = pairwise_topk(queries, index, 1, metric="cosine")
    return float((known[at[:, 0]] == labels).float().mean())


def arc_cosine(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Arc-cosine kernels of order 0 and 1 of a Gram matrix [n, n]."""
    lengths = gram.diagonal().sqrt()
    norms = torch.outer(lengths, lengths)
    cosine = (gram / norms).clamp(-1, 1)
    angle = cosine.acos()
    return 1 - angle / torch.pi, norms * (angle.sin() + (torch.pi - angle) * cosine) / torch.pi


def photograph(width: int) -> Tensor:
    """A photograph of scikit-learn's, [H, W, 3] in [0, 1], cut to multiples of `width`."""
    datasets = require("sklearn.datasets", "scikit-learn")
    require("PIL", "pillow")
    image = torch.tensor(datasets.load_sample_image("china.jpg")).float() / 255
    return image[: len(image) // width * width, : image.shape[1] // width * width]


def patches(image: Tensor, width: int) -> Tensor:
    """[H/width, W/width, width · width · channels] of an image [H, W, channels]."""
    high, wide, channels = image.shape
    grid = image.reshape(high // width, width, wide // width, width, channels)
    return grid.permute(0, 2, 1, 3, 4).reshape(high // width, wide // width, -1)


def k_means(x: Tensor, codes: int, *, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random rows: centres [codes, d] and the nearest one of every row."""
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:codes]]
    for step in range(steps + 1):
        at = pairwise_topk(x, centres, 1, metric="sqeuclidean")[1][:, 0]
        if step < steps:
            counts = at.bincount(minlength=codes)[:, None]
            sums = torch.zeros_like(centres).index_add(0, at, x)
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres, at


def residual_codes(x: Tensor, seen: Tensor, codes: int, levels: int) -> tuple[Tensor, Tensor]:
    """Tables [levels, codes, d], each of what those before left of x, and the codes [n, levels] of `seen`."""
    tables, found = [], []
    for _ in range(levels):
        centres, at = k_means(x, codes)
        tables.append(centres)
        found.append(pairwise_topk(seen, centres, 1, metric="sqeuclidean")[1][:, 0])
        x, seen = x - centres[at], seen - centres[found[-1]]
    return torch.stack(tables), torch.stack(found, 1)
