"""The kernels the measures compare samples with, and the checks of their options."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrepr._checks import shown
from pyrepr.ops._leaf import readable
from pyrepr.reference.gram import KERNELS
from pyrepr.similarity._rescaled import medians

MAX_DEGREE = 1000  # a larger one would be a mistake, and take as many multiplications per entry


@dataclass(frozen=True)
class Kernel:
    """A kernel and its options, for ``kernel=`` wherever a name is accepted.

    ========== =========================================== ==========================================
    linear     ⟨x, y⟩
    rbf        exp(−|x−y|² / (2σ²))                        σ = ``sigma``, or ``bandwidth`` × median
    laplacian  exp(−|x−y| / σ)                             Euclidean distance (scikit-learn's is the L1)
    polynomial (γ⟨x, y⟩ + coef0)^degree                    γ = ``gamma``, by default 1 / width
    cosine     ⟨x, y⟩ / (|x| |y|)                          0 with a zero row
    ========== =========================================== ==========================================

    Args:
        name: one of the names above.
        bandwidth: σ in units of the median distance |x_i − x_j| over i ≠ j of each layer. Kornblith et al. (2019)
            quote fractions of the same median, in their code with the n zero distances counted in.
        sigma: σ itself, in the units of the features; overrides ``bandwidth``.
        degree, coef0, gamma: of the polynomial kernel, with scikit-learn's defaults.

    Raises:
        ValueError: for an unknown name or an option outside its range.

    Example:
        >>> x, y = torch.randn(50, 5), torch.randn(50, 5)
        >>> value = pyrepr.cka(x, y, kernel=pyrepr.Kernel("polynomial", degree=2))
    """

    name: str = "linear"
    bandwidth: float = 1.0
    sigma: float | None = None
    degree: int = 3
    coef0: float = 1.0
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {shown(self.name)}")
        for option in ("bandwidth", "sigma", "gamma"):
            value = getattr(self, option)
            if value is not None and not (_is_number(value) and 0 < value <= sys.float_info.max):
                raise ValueError(f"{option} must be a positive finite number, got {shown(value)}")
        if not isinstance(self.degree, int) or isinstance(self.degree, bool) or not 1 <= self.degree <= MAX_DEGREE:
            raise ValueError(f"degree must be an integer from 1 to {MAX_DEGREE}, got {shown(self.degree)}")
        if not _is_number(self.coef0) or not math.isfinite(self.coef0):
            raise ValueError(f"coef0 must be a finite number, got {self.coef0!r}")

    @property
    def needs_median(self) -> bool:
        """Whether σ is a multiple of the median distance of the samples at hand."""
        return self.name in ("rbf", "laplacian") and self.sigma is None

    def options(self) -> dict[str, float]:
        """The options that this kernel reads, by name; without ``gamma`` where it is 1 / width."""
        if self.name in ("rbf", "laplacian"):
            return {"bandwidth": self.bandwidth} if self.sigma is None else {"sigma": self.sigma}
        if self.name != "polynomial":
            return {}
        gamma = {} if self.gamma is None else {"gamma": self.gamma}
        return {"degree": self.degree, "coef0": self.coef0, **gamma}

    def fields(self) -> tuple:
        """What makes another of its kind, in order."""
        return self.name, self.bandwidth, self.sigma, self.degree, self.coef0, self.gamma

    def scales(self, xs: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """σ or γ of every layer, [M] float64. The median is held constant: no gradient passes through it."""
        if self.name in ("rbf", "laplacian"):
            if self.sigma is None:
                scale = self.bandwidth * medians([x.detach() for x in xs], mask)
                if scale.is_cpu and readable(scale) and bool((scale == 0).any()):
                    layer = (scale == 0).tolist().index(True)
                    warnings.warn(
                        f"layer {layer} of {len(xs)}: most samples have the same features, so the median distance is 0 "
                        f"and the {self.name} kernel undefined; returning NaN; give sigma",
                        stacklevel=5,
                    )
                return scale
            value = [self.sigma] * len(xs)
        elif self.name == "polynomial":
            value = [self.gamma if self.gamma is not None else 1 / max(1, x.shape[1]) for x in xs]
        else:
            value = [1.0] * len(xs)
        # Fills, not a copy from the host: that would synchronise with a GPU, and not go into a CUDA graph.
        f64, device = torch.float64, xs[0].device
        if len(set(value)) == 1:
            return torch.full((len(value),), value[0], dtype=f64, device=device)
        return torch.stack([torch.full((), v, dtype=f64, device=device) for v in value])


def as_kernel(kernel: str | Kernel, bandwidth: float | None, sigma: float | None) -> Kernel:
    """`kernel=`, `bandwidth=` and `sigma=` of the public functions as one :class:`Kernel`; ``None`` is not given."""
    given = {name: value for name, value in (("sigma", sigma), ("bandwidth", bandwidth)) if value is not None}
    if isinstance(kernel, Kernel):
        for name, value in given.items():
            raise ValueError(
                f"{name} belongs into the Kernel(...) that is given as kernel, got {name}={value!r} beside it"
            )
        return kernel
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a name or a pyrepr.Kernel, got {type(kernel).__name__}")
    return Kernel(kernel, **given)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
