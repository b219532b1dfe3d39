"""Fewer tokens for a transformer in the middle: gathered into clusters, and spread again."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from pyrepr.papers._data import patches, photograph
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.functional import cluster_tokens, unpool_tokens

PAPER = Paper(
    44,
    "Liang et al., Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning, 2022",
    "5 steps of soft k-means in windows of 7 × 7; Σ over the 3 nearest centres of exp(−.05 d²), normalised",
    "a photograph's tokens come back from clusters with less variance unexplained than from average pooling and "
    "bilinear enlargement (at most .8 of it), and with less the more clusters",
)
SIZES = ((13, 20), (20, 32), (26, 40), (40, 62))


def run() -> Finding:
    tokens = patches(photograph(8), 8)
    tokens = (tokens - tokens.mean((0, 1))) / tokens.std()
    high, wide, _ = tokens.shape
    whole = float(tokens.square().sum())
    ours, pooled = [], []
    for size in SIZES:
        centres, _ = cluster_tokens(tokens[None], size)
        back = unpool_tokens(centres, tokens.flatten(0, 1)[None], centres)[0].reshape(tokens.shape)
        ours.append(float((back - tokens).square().sum()) / whole)
        image = tokens.permute(2, 0, 1)[None]
        small = F.adaptive_avg_pool2d(image, size)
        large = F.interpolate(small, size=(high, wide), mode="bilinear", align_corners=False)
        pooled.append(float((large - image).square().sum()) / whole)
    counts = [h * w for h, w in SIZES]
    text = ", ".join(f"{n}: {a:.3f} ({b:.3f} pooled)" for n, a, b in zip(counts, ours, pooled, strict=True))
    falls = all(a > b for a, b in pairwise(ours))
    holds = falls and all(a <= 0.8 * b for a, b in zip(ours, pooled, strict=True))
    numbers = {str(n): a for n, a in zip(counts, ours, strict=True)}
    series = {"clusters": ours, "pooled, enlarged": pooled}
    chart = Chart(series, counts, "tokens kept", "variance unexplained", "lines")
    return Finding(f"unexplained of {high * wide} tokens, by clusters {text}", holds, numbers, chart)
