"""Bags of visual words: codes of patches, pooled, do not care where a patch is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.functional import bag_of_codes

PAPER = Paper(
    65,
    "Gidaris et al., OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning, 2021",
    "softmax(−δ d²) over codes, δ = 15 / mean smallest d², max over positions, L1",
    "digits shifted by a pixel, with noise, are found again by their bags (above .8) and not by pixels (below .3)",
)
SHIFTS = ((-1, -1), (1, 1), (1, -1))


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    x = digits()[2].view(-1, 1, 8, 8)

    def patches(images: torch.Tensor) -> torch.Tensor:
        return F.unfold(F.pad(images, (1, 1, 1, 1)), 3).mT

    words = patches(digits()[0].view(-1, 1, 8, 8)).flatten(0, 1)
    words = words[torch.randperm(len(words), generator=generator)[:512]]
    scale = float(torch.cdist(patches(x).flatten(0, 1), words).amin(1).square().mean())
    bags = bag_of_codes(patches(x), words, mean_distance=scale)

    def found(a: torch.Tensor, b: torch.Tensor) -> float:
        nearest = torch.cdist(b.flatten(1), a.flatten(1)).argmin(1)
        return float((nearest == torch.arange(len(a))).float().mean())

    rates: dict[str, list[float]] = {"codes": [], "pixels": []}
    for right, down in SHIFTS:
        moved = F.pad(x, (1, 1, 1, 1))[:, :, 1 - down : 9 - down, 1 - right : 9 - right]
        moved = moved + 0.05 * torch.randn(x.shape, generator=generator)
        rates["codes"].append(found(bags, bag_of_codes(patches(moved), words, mean_distance=scale)))
        rates["pixels"].append(found(x, moved))
    text = "; ".join(f"found by {name} {', '.join(f'{r:.2f}' for r in values)}" for name, values in rates.items())
    by_codes, by_pixels = min(rates["codes"]), max(rates["pixels"])
    chart = Chart(rates, [f"{right:+d}, {down:+d}" for right, down in SHIFTS], "shift in pixels", "found again")
    return Finding(text, by_codes > 0.8 and by_pixels < 0.3, {"codes": by_codes, "pixels": by_pixels}, chart)
