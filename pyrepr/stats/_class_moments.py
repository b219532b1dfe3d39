"""Moments of one layer within and between classes, without cancellation where classes collapse to points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrepr.ops.moments import products_of
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.stats._blocks import Blocks
from pyrepr.stats._layer_moments import whole_block

PAIRS = [(0, 0), (0, 1)]
SHIFT_ROWS = 1024  # of a batch give the provisional means: they need to be near, not exact


@dataclass(frozen=True)
class ClassSums:
    """Sums over samples, each minus its own class's shift s_c: near the mean of the first batch that had the class.

    The scatter within classes then is the block minus Σ_c n_c e_c e_cᵀ, where e_c, the class mean around the shift, is
    small: no digits are lost, however much smaller it is than that between classes.
    """

    shift: Tensor  # [C, d] float64, NaN for a class that has none yet
    counts: Tensor  # [C] float64
    blocks: Blocks  # Σ (x − s)ᵀ (x − s) [d, d] upper triangle, Σ (x − s)ᵀ one-hot [d, C]

    @classmethod
    def zeros(cls, classes: int, d: int, device: torch.device) -> ClassSums:
        shift = torch.full((classes, d), torch.nan, dtype=torch.float64, device=device)
        return cls(shift, shift.new_zeros(classes), Blocks.zeros(PAIRS, (d, classes), device))

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def plus_batch(self, x: Tensor, y: Tensor) -> ClassSums:
        """x: [n, d], y: [n] int64."""
        dtype = compute_dtype(x.dtype)
        start = replace(self, shift=provisional_means(self.shift, x, y))
        classes = len(start.counts)
        centred = x.to(dtype) - start.shift.to(dtype)[y]
        members = torch.zeros(len(y), classes, dtype=dtype, device=x.device).scatter_(1, y[:, None], 1)
        counts = start.counts + torch.bincount(y, minlength=classes)
        return ClassSums(start.shift, counts, start.blocks.plus([centred, members]))

    def parts(self) -> tuple[Tensor, Tensor]:
        """Σ (x − s)(x − s)ᵀ [d, d] and Σ_{class} (x − s) [C, d]."""
        square, sums = self.blocks.sums()
        return whole_block(square), sums.T

    def moved(self, shift: Tensor) -> ClassSums:
        """The same around other shifts."""
        e = torch.where(self.counts[:, None] > 0, self.shift - shift, 0)
        if not bool((e != 0).any()):
            return replace(self, shift=shift)
        square, sums = self.parts()
        cross = products_of(sums.T, e.T)
        square = square + cross + cross.T + products_of((e * self.counts[:, None]).T, e.T)
        return replace(
            self, shift=shift, blocks=Blocks(PAIRS, [square, (sums + self.counts[:, None] * e).T.contiguous()])
        )

    def plus(self, other: ClassSums, sign: int = 1) -> ClassSums:
        """The sums of both; with sign −1 the sums without the other's samples."""
        shift = torch.where(self.shift.isnan(), other.shift, self.shift)
        add = torch.add if sign > 0 else torch.sub
        blocks = self.blocks.map(add, other.moved(shift).blocks.sums())
        return ClassSums(shift, add(self.counts, other.counts), blocks)

    def means(self) -> Tensor:
        """[C, d], NaN for a class without samples."""
        return torch.where(self.counts[:, None] > 0, self.shift + self.parts()[1] / self.counts[:, None], torch.nan)

    def within(self) -> Tensor:
        """Σ (x − μ_class)(x − μ_class)ᵀ, [d, d]."""
        square, sums = self.parts()
        return square - products_of((sums / self.counts.clamp_min(1)[:, None]).T, sums.T)

    def mean(self) -> Tensor:
        """[d], the mean of all samples."""
        means, has = self.means(), self.counts > 0
        centre = means[has].mean(0)  # near enough that weights do not cost digits
        shares = self.counts[has] / self.counts.sum()
        return centre + products_of(shares[None], (means[has] - centre).T)[0]


def provisional_means(shift: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """shift [C, d] with means of classes that had none (NaN) and come first in x: [n, d] with labels y: [n]."""
    counts = torch.bincount(y, minlength=len(shift))
    new = shift[:, 0].isnan() & (counts > 0) if shift.shape[1] else counts < 0
    if not bool(new.any()):
        return shift
    rows = new[y].nonzero()[:, 0]
    first = _first_rows(x, y, len(counts)).double()
    some = rows[:SHIFT_ROWS]
    x, y = x[some], y[some]
    rest = torch.zeros_like(first).index_add_(0, y, x.double() - first[y])
    mean = first + rest / torch.bincount(y, minlength=len(counts))[:, None].clamp_min(1)
    rounded = mean.to(compute_dtype(x.dtype)).double()  # so that x − s is exact nearby
    return torch.where(new[:, None], rounded, shift)


def _first_rows(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """[C, d]: a row of each class that y has, 0 for the others."""
    at = torch.full((classes,), len(y), device=y.device).scatter_reduce_(
        0, y, torch.arange(len(y), device=y.device), "amin"
    )
    rows = x.new_zeros(classes, x.shape[1])
    has = at < len(y)
    rows[has] = x[at[has]]
    return rows
