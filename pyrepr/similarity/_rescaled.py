"""Layers brought near 1, and the median distance of their rows, which is the kernels' scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrepr.backend import triton_interprets
from pyrepr.ops._leaf import readable
from pyrepr.ops.gram import LOSS, median_op
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.stats._robust import dominated, robust_centre

# Squared norms between which inner products, and kernels of them, are safe.
NORMS = {torch.float32: (1e-24, 1e30), torch.float64: (1e-200, 1e200)}


def at_hand(x: Tensor) -> bool:
    """Whether the numbers of a result can be looked at."""
    return x.is_cpu and readable(x) and not triton_interprets()


def within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def near_one(x: Tensor, centre: bool) -> tuple[Tensor, int]:
    """x · 2^−exponent in float64 with a largest entry near 1, and the exponent; under `centre` minus a robust centre.

    The centre counts as a constant, which no measure of a shift-invariant kernel notices.
    """
    x = x.double()
    values = x.detach()
    exponent = _exponent(values)
    values = values * 2.0**-exponent
    x = x * 2.0**-exponent
    if not centre or not x.numel():
        return x, exponent
    middle = robust_centre(values)
    more = _exponent(values - middle)
    return (x - middle) * 2.0**-more, exponent + more


def _exponent(x: Tensor) -> int:
    largest = float(x.abs().amax()) if x.numel() else 0.0
    return max(-1000, math.frexp(largest)[1]) if largest else 0


def medians(xs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """The median distance of different rows of each layer, [M] float64."""
    found, norms = median_op(xs, mask, True)
    if not at_hand(found) or not xs[0].shape[0]:
        return found
    dtype = compute_dtype(xs[0].dtype)
    counted = norms if mask is None else norms[:, mask]
    rows = torch.stack([found, counted.amax(1), counted.median(1).values], 1).tolist()
    blurred = torch.finfo(dtype).eps / LOSS[dtype]
    # Around a mean that one row makes, the smaller of two distances in the middle may be lost beside the other.
    if not dominated(counted) and all(
        not 0 < largest < math.inf or (within(largest, NORMS[dtype]) and median**2 >= blurred * typical)
        for median, largest, typical in rows
    ):
        return found
    moved = [near_one(x if mask is None else x[mask], True) for x in xs]
    again, _ = median_op([x for x, _ in moved], None, False)
    return again * again.new_tensor([2.0**exponent for _, exponent in moved])
