"""A centre that a few rows, however long, do not move."""

from __future__ import annotations

import torch
from torch import Tensor


def robust_centre(x: Tensor) -> Tensor:
    """The mean of the half of the rows nearest to the median of each feature (of up to 512 rows). [n, d] -> [d]."""
    some = x[:: max(1, len(x) // 256)]
    middle = some.contiguous().median(0).values  # torch reads beyond the end of an expanded tensor
    q = (x - middle).square().sum(1)
    near = x[q <= q.median()]
    if not len(near):  # numbers that are not finite
        return middle
    # From the first of them, which is exact for equal rows. Of one column torch would cut the sum among threads.
    return near[0] + (near - near[0]).expand(-1, max(2, x.shape[1])).mean(0)[: x.shape[1]]


def dominated(q: Tensor) -> bool:
    """Whether in one of the layers a row dwarfs the others, so that their mean is its share. q: [M, n] squared norms.

    Of rows around a mean that one of them makes, the largest is (n − 1)² times the others; in a large batch a row
    matters once it outweighs all others together.
    """
    n = q.shape[1]
    rows = torch.stack([q.amax(1), q.median(1).values], 1).tolist()
    return any(largest > min(100 * n, 0.9 * (n - 1) ** 2, n * n / 2) * typical for largest, typical in rows)
