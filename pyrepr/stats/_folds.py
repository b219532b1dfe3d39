"""Sums of a layer and its targets over the folds of a cross-validation: what linear probes are fitted from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrepr.ops.moments import moments_op_, products_of
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.stats._class_moments import provisional_means
from pyrepr.stats._covariances import Scatter

ROWS = 2048  # of a layer at a time: what is cut out of it stays in the cache
PAIRS = [0, 0, 0, 1, 1, 1]  # x with x, x with targets, targets with targets


def rows_of(x: Tensor, at: Tensor, room: Tensor) -> Tensor:
    """Rows `at` of x, written to `room`, in its dtype: new memory for every piece would cost more than the copy."""
    rows = room[: len(at)]
    return torch.index_select(x, 0, at, out=rows) if x.dtype == room.dtype else rows.copy_(x[at])


class FoldSums:
    """Σ x xᵀ, Σ x tᵀ and Σ t tᵀ of every fold, float64, 8·folds·d² bytes, in one walk over the rows.

    x is taken around a provisional mean, of each class with hard labels, so that neither a large mean nor classes far
    apart cost digits, and t are one-hot labels, or targets around theirs and a one. All folds share these means: the
    sums of a training set are the total minus those of its fold.

    Args:
        folds: how many.
        width: d.
        classes: C with hard labels, one provisional mean each; ``None``: targets.
    """

    def __init__(self, folds: int, width: int, classes: int | None, targets: int, device: torch.device) -> None:
        self.classes, self.targets = classes, targets
        sizes = [(width, width), (width, targets + 1), (targets + 1, targets + 1)]
        self.folds = [[torch.zeros(size, dtype=torch.float64, device=device) for size in sizes] for _ in range(folds)]
        self.shift = torch.full((classes or 1, width), torch.nan, dtype=torch.float64, device=device)
        self.target_shift = torch.zeros(targets, dtype=torch.float64, device=device)
        self.quick = True  # as long as products are made in float32

    def add(self, x: Tensor, y: Tensor, rows: Sequence[Tensor]) -> None:
        """A batch. x: [n, d], y: [n] labels or [n, q] targets, rows: of every fold."""
        dtype = compute_dtype(x.dtype if self.classes else torch.promote_types(x.dtype, y.dtype))
        group = y if self.classes else torch.zeros(len(y), dtype=torch.int64, device=y.device)
        if not len(y):
            return
        self.quick &= dtype == torch.float32
        if not self.classes and bool(self.shift.isnan().any()):
            self.target_shift = y[:ROWS].double().mean(0).to(dtype).double()
        self.shift = provisional_means(self.shift, x, group)
        targets = self._targets(y, dtype)
        shift = self.shift.to(dtype)
        room, more_room = (x.new_empty(min(ROWS, len(x)), x.shape[1], dtype=dtype) for _ in range(2))
        for fold, at in zip(self.folds, rows, strict=True):
            for piece in at.split(ROWS):
                centred = rows_of(x, piece, room)
                centred -= rows_of(shift, group[piece], more_room) if self.classes else shift
                moments_op_(fold, [centred, targets[piece]], PAIRS)

    def _targets(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, q + 1] one-hot labels, or targets around their shift, and a one."""
        result = torch.zeros(len(y), self.targets + 1, dtype=dtype, device=y.device)
        if self.classes:
            result.scatter_(1, y[:, None], 1)
        else:
            result[:, :-1] = y.to(dtype) - self.target_shift.to(dtype)
        result[:, -1] = 1
        return result

    @property
    def samples(self) -> list[int]:
        """Of every fold."""
        return [int(targets[-1, -1]) for _, _, targets in self.folds]

    def counts(self) -> Tensor:
        """[C] samples of every class, of hard labels."""
        return self.total()[2].diagonal()[:-1]

    def total(self) -> list[Tensor]:
        """The sums over all folds."""
        first, *others = self.folds
        total = [block.clone() for block in first]
        for fold in others:
            for block, more in zip(total, fold, strict=True):
                block += more
        return total

    def scatter(self, sums: Sequence[Tensor]) -> Scatter:
        """Around the means. `sums`: of a fold, the total, or the difference of such."""
        square, cross, targets = sums
        n = targets[-1, -1]
        counts, moved = self._groups(sums)
        if self.classes:
            mean_y, syy = counts / n, counts.diag() - torch.outer(counts, counts) / n
        else:
            around = targets[:-1, -1] / n
            mean_y, syy = self.target_shift + around, targets[:-1, :-1] - n * torch.outer(around, around)
        # With the class means μ_c = s_c + Σ(x − s_c) / n_c and e_c = s_c − μ of the whole mean μ,
        # Σ (x − μ)(x − μ)ᵀ = Σ_c Σ (x − s_c)(x − s_c)ᵀ + u_c e_cᵀ + e_c u_cᵀ + n_c e_c e_cᵀ, u_c = Σ (x − s_c).
        shift, mean = self._mean(counts, moved)
        e = torch.where(counts[:, None] > 0, shift - mean, 0).T  # [d, C]
        half = products_of((moved + 0.5 * counts * e).contiguous(), e.contiguous())
        half += square
        half.diagonal().sub_(0.5 * square.diagonal())
        sxy = moved + counts * e if self.classes else cross[:, :-1] - torch.outer(moved[:, 0], around)
        return Scatter(int(n), mean, half + half.T, mean_y, sxy, syy)

    def _groups(self, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of what has a shift of its own: how many samples [C], and Σ (x − s) [d, C]."""
        _, cross, targets = sums
        return (targets.diagonal()[:-1], cross[:, :-1]) if self.classes else (targets[-1:, -1], cross[:, -1:])

    def _mean(self, counts: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The shifts [C, d], 0 where there are no samples, and the mean of all samples [d]."""
        shift = torch.where(counts[:, None] > 0, self.shift, 0)
        anchor = shift[counts.argmax()]  # near enough that weights do not cost digits
        return shift, anchor + (moved.sum(1) + products_of((shift - anchor).T, counts[None])[:, 0]) / counts.sum()

    def centre(self, sums: Sequence[Tensor]) -> Tensor:
        """[d] the mean as features may be taken around it, float32 where they are."""
        return self._mean(*self._groups(sums))[1].to(torch.float32 if self.quick else torch.float64)
