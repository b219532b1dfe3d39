"""CKA as a measure among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyrepr.similarity._checks import check_estimator
from pyrepr.similarity._hsic import normalise
from pyrepr.similarity._protocol import Measure
from pyrepr.similarity.kernels import Kernel
from pyrepr.similarity.measures import cka_matrix
from pyrepr.stats.moments import LayerMoments


@dataclass(frozen=True)
class CKA(Measure):
    """Centred kernel alignment, :func:`pyrepr.cka`, with the options of :class:`pyrepr.Kernel` and the estimator.

    Example:
        >>> x = torch.randn(50, 5)
        >>> round(pyrepr.similarity.CKA(kernel="rbf")(x, 3 * x).item(), 4)  # scale is no matter
        1.0
    """

    kernel: str = "linear"
    bandwidth: float = 1.0
    sigma: float | None = None
    degree: int = 3
    estimator: str = "unbiased"

    name: ClassVar[str] = "cka"
    title: ClassVar[str] = "CKA"

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        self._kernel  # noqa: B018  (its own checks)

    @property
    def _kernel(self) -> Kernel:
        return Kernel(self.kernel, self.bandwidth, self.sigma, self.degree)

    @property
    def least(self) -> int:
        return 4 if self.estimator == "unbiased" else 2

    @property
    def streams(self) -> bool:
        return self.kernel == "linear"

    def chance(self, n: int) -> float | None:
        return 0.0 if self.estimator == "unbiased" else None

    def describe(self) -> str:
        options = ", ".join(f"{name} {value:g}" for name, value in self._kernel.options().items())
        return f"{self.kernel} CKA{options and f' ({options})'}, {self.estimator} estimator"

    def _values(self, left: list[Tensor], right: list[Tensor] | None) -> Tensor:
        return cka_matrix(left, right, kernel=self._kernel, estimator=self.estimator)

    def stderr(
        self,
        xs: Sequence[Tensor] | Tensor,
        ys: Sequence[Tensor] | Tensor | None = None,
        *,
        groups: Tensor | None = None,
        draws: int = 20,
        seed: int = 0,
    ) -> Tensor:
        """[La, Lb] float64: the exact jackknife of :func:`pyrepr.cka_matrix`; nothing is drawn."""
        options = {"kernel": self._kernel, "estimator": self.estimator, "groups": groups}
        return cka_matrix(xs, ys, return_stderr=True, **options)[1].double()

    def of_moments(self, moments: LayerMoments) -> Tensor:
        if not self.streams:
            return super().of_moments(moments)
        if moments.samples < self.least:
            raise ValueError(f"CKA needs at least {self.least} samples, got {moments.samples}")
        table, floor = moments.hsic_and_floor(self.estimator)
        own, split = torch.where(table.diagonal() > floor, table.diagonal(), torch.nan), moments.split
        return normalise(table[:split, split:], own[:split], own[split:]) if split else normalise(table, own, own)
