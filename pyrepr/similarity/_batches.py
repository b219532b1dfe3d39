"""HSIC summed over batches: what CKA in mode "minibatch" keeps of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import shown
from pyrepr.similarity._hsic import hsic_table
from pyrepr.similarity.kernels import Kernel
from pyrepr.stats._layer_moments import is_count, layout


def batch_weight(n: int, estimator: str) -> int:
    """How much a batch of n samples counts: the divisor of its HSIC, so that sums over pairs of samples are added up.

    n(n − 3), or (n − 1)² if biased. With equal weights four batches of 128 and one of 4 have 13 times the error of the
    first four alone.
    """
    return n * (n - 3) if estimator == "unbiased" else (n - 1) ** 2


@dataclass(frozen=True)
class Batches:
    """Weighted sums over batches, all with one σ (or γ) a layer."""

    widths: tuple[int, ...]
    split: int  # layers from here on are the other network's; 0: there is one
    n: int
    scales: Tensor  # [M] float64
    hsic: Tensor  # [M, M] float64
    floor: Tensor  # [M] float64, the self-HSIC that may be rounding

    @classmethod
    def of(cls, layers: Sequence[Tensor], split: int, kernel: Kernel, estimator: str, scales: Tensor | None) -> Batches:
        """One batch. Without `scales`, they are chosen from it."""
        scales = kernel.scales(layers) if scales is None else scales
        n = layers[0].shape[0]
        table, floor = hsic_table(layers, kernel, estimator, split=split, scales=scales)
        weight = batch_weight(n, estimator)
        return cls(tuple(x.shape[1] for x in layers), split, n, scales, weight * table, weight * floor)

    @classmethod
    def none(cls, layers: Sequence[Tensor], split: int, kernel: Kernel) -> Batches:
        """No samples yet; the scales are those of these layers."""
        scales = kernel.scales(layers)
        hsic = scales.new_zeros(len(layers), len(layers))
        return cls(tuple(x.shape[1] for x in layers), split, 0, scales, hsic, torch.zeros_like(scales))

    def plus(self, other: Batches) -> Batches:
        """The sums of both.

        Raises:
            ValueError: if the layers or their scales differ.
        """
        if (self.widths, self.split) != (other.widths, other.split):
            raise ValueError(
                f"other must have layers of widths {layout(self.widths, self.split)}, "
                f"got {layout(other.widths, other.split)}"
            )
        if not same_scales(self.scales, other.scales):
            raise ValueError(f"other {differing_scales([self.scales, other.scales])}")
        return replace(self, n=self.n + other.n, hsic=self.hsic + other.hsic, floor=self.floor + other.floor)

    def to(self, device: torch.device | str) -> Batches:
        return replace(self, scales=self.scales.to(device), hsic=self.hsic.to(device), floor=self.floor.to(device))

    def state(self) -> dict[str, Any]:
        return {"n": self.n, **{key: getattr(self, key).clone() for key in ("scales", "hsic", "floor")}}

    @classmethod
    def loaded(cls, widths: object, split: object, state: object) -> Batches:
        """From :meth:`state`, checked."""
        named = isinstance(widths, (list, tuple)) and all(is_count(d) for d in widths)
        if not named or not widths or not is_count(split) or not split < len(widths):
            raise ValueError(
                f"state_dict must name the widths of its layers, got {shown(widths)} with split {split!r:.20}"
            )
        m = len(widths)
        shapes = {"scales": (m,), "hsic": (m, m), "floor": (m,)}
        fits = isinstance(state, dict) and set(state) == {"n", *shapes} and is_count(state["n"])
        if not fits or any(
            not isinstance(state[key], Tensor) or state[key].shape != shape or state[key].dtype != torch.float64
            for key, shape in shapes.items()
        ):
            raise ValueError(
                f"state_dict must hold n and, in float64, scales [M], hsic [M, M] and floor [M] of its M = {m} layers"
            )
        return cls(tuple(widths), split, state["n"], **{key: state[key].clone() for key in shapes})


def same_scales(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(-1.0).cpu(), other.nan_to_num(-1.0).cpu())


def differing_scales(scales: Sequence[Tensor]) -> str:
    came = " and ".join(str([float(f"{value:.4g}") for value in each.tolist()]) for each in scales)
    return (
        f"must have one σ a layer, got {came}, chosen from different first batches: give sigma, or let all calibrate "
        "with the same samples"
    )
