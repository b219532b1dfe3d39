"""Sums of products of features over samples, in plain PyTorch: the leaf op of ``pyrepr/ops/moments.py``."""

from __future__ import annotations

from torch import Tensor

from pyrepr.reference._dtypes import compute_dtype


def gram_moments_(blocks: list[Tensor], xs: list[Tensor], pairs: list[int]) -> None:
    """blocks[p] += X_aᵀ X_b for (a, b) = pairs[2p : 2p + 2], in float64; of a pair (a, a) the upper triangle."""
    for p, block in enumerate(blocks):
        a, b = pairs[2 * p], pairs[2 * p + 1]
        dtype = compute_dtype(xs[a].dtype)
        product = (xs[a].to(dtype).T @ xs[b].to(dtype)).double()
        block += product.triu() if a == b else product
