"""Bags of visual words: codes of patches, pooled, do not care where a patch is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits
from pyrepr.papers._row import Finding, Paper

from pyrepr.functional import bag_of_codes

PAPER = Paper(
    65,
    "Gidaris et al., OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning, 2021",
    "softmax(−δ d²) over codes, δ = 15 / mean smallest d², max over positions, L1",
    "digits shifted by a pixel, with noise, are found again by their bags (above .8) and not by pixels (below .3)",
)


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x = digits()[2].view(-1, 1, 8, 8)
    moved = F.pad(x, (1, 1, 1, 1))[:, :, 2:10, 2:10] + 0.05 * torch.randn(x.shape, generator=generator)

    def patches(images: torch.Tensor) -> torch.Tensor:
        return F.unfold(F.pad(images, (1, 1, 1, 1)), 3).mT

    words = patches(digits()[0].view(-1, 1, 8, 8)).flatten(0, 1)
    words = words[torch.randperm(len(words), generator=generator)[:512]]
    scale = float(torch.cdist(patches(x).flatten(0, 1), words).amin(1).square().mean())
    bags = [bag_of_codes(patches(images), words, mean_distance=scale) for images in (x, moved)]

    def found(a: torch.Tensor, b: torch.Tensor) -> float:
        nearest = torch.cdist(b.flatten(1), a.flatten(1)).argmin(1)
        return float((nearest == torch.arange(len(a))).float().mean())

    by_codes, by_pixels = found(*bags), found(x, moved)
    text = f"found {by_codes:.2f} by codes, {by_pixels:.2f} by pixels"
    return Finding(text, by_codes > 0.8 and by_pixels < 0.3, {"codes": by_codes, "pixels": by_pixels})
