"""Do two representations have the same neighbours? Mutual k-nearest neighbours, their Jaccard index, and CKNNA.

Neighbours are directed: j among the k of i says nothing of i among those of j. A sample is not its own neighbour, by
its number and not by its rank (with duplicates rank 0 is another sample); equal scores go by the smaller number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import shown
from pyrepr.functional.pairs import pairwise_topk
from pyrepr.similarity._checks import check_estimator
from pyrepr.similarity._protocol import Measure, pair_table

METRICS = ("cosine", "ip", "sqeuclidean")
BLOCK_BYTES = 64 << 20  # of a block of comparisons


def nearest(x: Tensor, k: int, metric: str, exclude_self: bool = True) -> Tensor:
    """The k nearest rows of every row, as sorted numbers [n, k] int64. x: [n, d] float32 or float64.

    Scores are exact, rounded once to x's dtype, so that duplicates tie; ties go to the smaller number.
    """
    return pairwise_topk(x.detach(), k=k, metric=metric, exclude_self=exclude_self)[1].sort(1).values


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def check_neighbours(k: object, metric: str) -> None:
    """Raises ValueError for a k that is no positive int, or a metric that does not exist."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive integer, got {shown(k)}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {shown(metric)}")


@dataclass(frozen=True)
class _Overlap(Measure):
    """Measures of the two sets of k neighbours of every sample."""

    k: int = 10
    metric: str = "cosine"

    def __post_init__(self) -> None:
        check_neighbours(self.k, self.metric)

    @property
    def least(self) -> int:
        return self.k + 1

    def describe(self) -> str:
        return f"{self.title}, k = {self.k}, {self.metric}"

    def prepare(self, x: Tensor) -> Tensor:
        return nearest(x, self.k, self.metric).int()

    def pairs(self, left: Sequence[Tensor], right: Sequence[Tensor] | None) -> Tensor:
        return pair_table(left, right, lambda a, b: self._of(_common(a, b).double()).mean())

    def _of(self, common: Tensor) -> Tensor:
        """The measure of every sample, [n], from the number of neighbours that are the same."""
        raise NotImplementedError


def _common(a: Tensor, b: Tensor) -> Tensor:
    """How many of the numbers in a row of a are in that row of b. [n, k] each, sorted -> [n]"""
    k, rows = a.shape[1], max(1, BLOCK_BYTES // (a.shape[1] ** 2))
    if k <= 32:
        parts = zip(a.split(rows), b.split(rows), strict=True)
        return torch.cat([(p[:, :, None] == q[:, None, :]).sum((1, 2)) for p, q in parts])
    place = torch.searchsorted(b, a).clamp_max(k - 1)
    return (b.gather(1, place) == a).sum(1)


@dataclass(frozen=True)
class MutualKNN(_Overlap):
    """Mean share of the k nearest neighbours that two representations have in common (Huh et al. 2024).

    Args:
        k: neighbours of a sample.
        metric: ``"cosine"``, ``"ip"`` (inner product) or ``"sqeuclidean"``. Chance level is k / (n − 1).

    Example:
        >>> x = torch.randn(50, 5)
        >>> pyrepr.similarity.MutualKNN(k=5)(x, x).item()
        1.0
    """

    name: ClassVar[str] = "mutual_knn"
    title: ClassVar[str] = "mutual kNN"

    def chance(self, n: int) -> float:
        return self.k / (n - 1)

    def _of(self, common: Tensor) -> Tensor:
        return common / self.k


@dataclass(frozen=True)
class JaccardKNN(_Overlap):
    """Mean Jaccard index |A ∩ B| / |A ∪ B| of the two sets of k nearest neighbours; options as :class:`MutualKNN`.

    Example:
        >>> x = torch.randn(50, 5)
        >>> pyrepr.similarity.JaccardKNN(k=5)(x, x).item()
        1.0
    """

    name: ClassVar[str] = "jaccard_knn"
    title: ClassVar[str] = "Jaccard kNN"

    def chance(self, n: int) -> float:
        """The mean over the hypergeometric distribution of |A ∩ B|."""
        common = torch.arange(self.k + 1, dtype=torch.float64, device="cpu")

        def choose(a: Tensor | float, b: Tensor) -> Tensor:
            a = torch.as_tensor(a, dtype=torch.float64, device="cpu")
            return torch.lgamma(a + 1) - torch.lgamma(b + 1) - torch.lgamma(a - b + 1)

        k, m = self.k, n - 1
        possible = common[common >= 2 * k - m]
        weights = (
            choose(k, possible) + choose(m - k, k - possible) - choose(m, torch.tensor(float(k), device="cpu"))
        ).exp()
        return float((weights * possible / (2 * k - possible)).sum() / weights.sum())

    def _of(self, common: Tensor) -> Tensor:
        return common / (2 * self.k - common)


class _Masked(NamedTuple):
    """A layer's kernel on the edges (i, neighbour of i)."""

    neighbours: Tensor  # [n, k] sorted
    values: Tensor  # [n, k]
    own: Tensor  # [] HSIC of the masked kernel with itself


@dataclass(frozen=True)
class CKNNA(Measure):
    """CKA of the kernels at nearest neighbours only (Huh et al. 2024).

    With directed masks M_x, M_y of the k neighbours in each, HSIC(M∘K, M∘L) / √(HSIC(M_x∘K, M_x∘K) HSIC(M_y∘L, M_y∘L)),
    M = M_x∘M_y: the cross term on the edges that both have, the own terms each on its own. Masked kernels are not
    symmetric, and HSIC pairs K_ij with L_ji, as the released code does; the unbiased estimator's Σ K L is another than
    Σ L K then, so that x and y exchanged differ a little. Only the n·k edges are held.

    Args:
        k: neighbours of a sample, at least 2.
        metric: ``"cosine"`` (features of unit length, as there) or ``"ip"``.
        estimator: of HSIC: ``"unbiased"``, or ``"biased"``, in which a sample is among its own neighbours.

    Example:
        >>> x = torch.randn(50, 5)
        >>> round(pyrepr.similarity.CKNNA(k=10)(x, x).item(), 4)
        1.0
    """

    k: int = 10
    metric: str = "cosine"
    estimator: str = "unbiased"

    name: ClassVar[str] = "cknna"
    title: ClassVar[str] = "CKNNA"

    def __post_init__(self) -> None:
        check_neighbours(self.k, self.metric)
        check_estimator(self.estimator)
        if self.k < 2:
            raise ValueError(f"k must be at least 2 for CKNNA, got {self.k}")
        if self.metric == "sqeuclidean":
            raise ValueError("metric must be 'cosine' or 'ip' for CKNNA, got 'sqeuclidean'")

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.estimator == "biased"

    @property
    def least(self) -> int:
        return max(4, self.k + 1)

    def describe(self) -> str:
        return f"CKNNA, k = {self.k}, {self.metric}, {self.estimator}"

    def prepare(self, x: Tensor) -> _Masked:
        neighbours = nearest(x, self.k, self.metric, exclude_self=self.estimator == "unbiased")
        rows = _unit(x) if self.metric == "cosine" else x
        parts = zip(rows.split(4096), neighbours.split(4096), strict=True)
        values = torch.cat([torch.einsum("nd,nkd->nk", part, rows[at]) for part, at in parts]).double()
        return _Masked(neighbours, values, self._hsic(neighbours, values, values, torch.ones_like(neighbours).bool()))

    def pairs(self, left: Sequence[_Masked], right: Sequence[_Masked] | None) -> Tensor:
        return pair_table(left, right, self._pair, self.symmetric)

    def _pair(self, a: _Masked, b: _Masked) -> Tensor:
        place = torch.searchsorted(b.neighbours, a.neighbours).clamp_max(self.k - 1)
        both = b.neighbours.gather(1, place) == a.neighbours
        cross = self._hsic(a.neighbours, a.values, b.values.gather(1, place), both)
        return cross / (a.own.sqrt() * b.own.sqrt())

    def _hsic(self, neighbours: Tensor, k: Tensor, l: Tensor, mask: Tensor) -> Tensor:
        """HSIC of two kernels on the edges (i, neighbours[i]) where `mask`. All [n, k]."""
        n = len(neighbours)
        rows = torch.arange(n, device=neighbours.device)[:, None].expand_as(neighbours)[mask]
        columns, k, l = neighbours[mask], k[mask], l[mask]
        edges, reverse = rows * n + columns, columns * n + rows
        place = torch.searchsorted(edges, reverse).clamp_max(max(0, len(edges) - 1))
        trace = (k * torch.where(edges[place] == reverse, l[place], 0)).sum() if len(edges) else k.sum()

        def sums(values: Tensor, at: Tensor) -> Tensor:
            return torch.zeros(n, dtype=values.dtype, device=values.device).index_add(0, at, values)

        k_rows, k_columns, l_rows, l_columns = sums(k, rows), sums(k, columns), sums(l, rows), sums(l, columns)
        kl, lk, total = k_columns @ l_rows, l_columns @ k_rows, k.sum() * l.sum()
        if self.estimator == "biased":
            return trace - (kl + lk) / n + total / n**2
        return (trace + total / ((n - 1) * (n - 2)) - 2 * kl / (n - 2)) / (n * (n - 3))


def mutual_knn(x: Tensor, y: Tensor, k: int = 10, *, metric: str = "cosine") -> Tensor:
    """:class:`MutualKNN` of x [n, p] and y [n, q], a scalar.

    Example:
        >>> x = torch.randn(50, 5)
        >>> pyrepr.similarity.mutual_knn(x, x, k=5).item()
        1.0
    """
    return MutualKNN(k, metric)(x, y)


def cknna(x: Tensor, y: Tensor, k: int = 10, **options: Any) -> Tensor:
    """:class:`CKNNA` of x [n, p] and y [n, q], a scalar.

    Example:
        >>> x = torch.randn(50, 5)
        >>> round(pyrepr.similarity.cknna(x, x).item(), 4)
        1.0
    """
    return CKNNA(k, **options)(x, y)
