"""Do two representations have the same geometry? Dissimilarity matrices (RDMs) and their comparison, distance
correlation, and representations relative to anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from pyrepr._checks import check_layer, shape_of, shown
from pyrepr.ops._leaf import require_finite
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.similarity._protocol import Measure, products

METRICS = ("correlation", "cosine", "euclidean", "sqeuclidean")
METHODS = ("corr", "cosine", "spearman", "cosine_cov")
PROJECTIONS = ("cosine", "ip", "euclidean")
BLOCK_BYTES = 64 << 20


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i − y_j|² of centred rows; features with a large common mean lose no digits."""
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def _root(squares: Tensor) -> Tensor:
    """√, whose derivative at 0 is taken as 0."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def rdm(x: Tensor, metric: str = "correlation") -> Tensor:
    """The representational dissimilarity matrix, condensed: pairs (0, 1), (0, 2), …, (n − 2, n − 1).

    Args:
        x: [n, d].
        metric: ``"correlation"``: 1 − Pearson's r of two rows; ``"cosine"``: 1 − cosine; ``"euclidean"``,
            ``"sqeuclidean"``: SciPy's (rsatoolbox's ``"euclidean"`` is the squared distance / d).

    Returns:
        [n(n − 1)/2], float64 for float64 inputs, else float32; differentiable.

    Raises:
        ValueError, TypeError: for another shape or metric, and for x that is not finite: what follows from an RDM is
            made of all of it.

    Example:
        >>> pyrepr.similarity.rdm(torch.randn(10, 6)).shape  # of 10 samples, 45 pairs
        torch.Size([45])
    """
    x = check_layer("x", x)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {shown(metric)}")
    require_finite("x", x)
    x = x.to(compute_dtype(x.dtype))
    if metric in ("correlation", "cosine"):
        rows = _unit(x - x.mean(1, keepdim=True) if metric == "correlation" else x)
        square = 1 - rows @ rows.T
    else:
        square = _squared_distances(x, x)
        square = _root(square) if metric == "euclidean" else square
    n = x.shape[0]
    return square[torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)]


def geotopological(d: Tensor, low: float = 0.1, up: float = 0.9, *, quantiles: bool = True) -> Tensor:
    """The transform of tRSA: clip((d − l) / (u − l), 0, 1), small distances all the same, large ones, too (Lin 2024).

    Args:
        d: [N] dissimilarities, one RDM; it is not changed.
        low, up: l and u as quantiles of d in [0, 1] (default), or as values of it. (0, 1) is affine, low = up a step:
            1 where d > l.
        quantiles: whether they are quantiles.

    Returns:
        [N]; differentiable in d, l and u being constants.

    Raises:
        ValueError: for another shape, l > u, and d that is not finite, which would move its quantiles.

    Example:
        >>> d = pyrepr.similarity.rdm(torch.randn(20, 6))
        >>> t = pyrepr.similarity.geotopological(d)
        >>> t.min().item(), t.max().item()
        (0.0, 1.0)
    """
    if not isinstance(d, Tensor) or d.dim() != 1 or not d.is_floating_point():
        raise ValueError(f"d must be floating point of shape [N], got {shape_of(d) if isinstance(d, Tensor) else d!r}")
    if not low <= up or (quantiles and not 0 <= low <= up <= 1):
        wanted = "0 ≤ low ≤ up ≤ 1" if quantiles else "low ≤ up"
        raise ValueError(f"low and up must be {wanted}, got {shown(low)} and {up!r}")
    require_finite("d", d)
    if not len(d):
        return d.clone()
    if quantiles:
        order = d.detach().sort().values
        low, up = (_quantile(order, q) for q in (low, up))
    return (d > low).to(d.dtype) if low == up else ((d - low) / (up - low)).clamp(0, 1)


def _quantile(order: Tensor, q: float) -> float:
    """numpy's default, linear between neighbours; torch.quantile takes no more than 2²⁴ numbers."""
    at = q * (len(order) - 1)
    below = int(at)
    value, above = float(order[below]), float(order[min(below + 1, len(order) - 1)])
    return value + (at - below) * (above - value)


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers that grow with those of x, ascending, and where they stood."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return x.sort()
    # Bits of a float32 in the order of their values, and its place, in one integer: NumPy sorts integers with AVX-512.
    bits = (x + 0.0).view(torch.int32)  # −0 + 0 is 0
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | torch.arange(len(x), device=x.device)
    keys = torch.from_numpy(np.sort(keys.numpy()))
    return keys >> 32, keys & 0xFFFFFFFF


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, equal numbers with the mean of theirs. x: [N] -> [N] in x's dtype or float64 from 2²⁴ on."""
    values, order = _sorted(x)
    new = torch.ones_like(values, dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=new[1:])
    starts = new.nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([len(x)])])
    dtype = torch.float64 if len(x) >= 1 << 24 else x.dtype
    means = torch.repeat_interleave((starts + ends - 1).to(dtype) / 2, ends - starts)
    return torch.empty(len(x), dtype=dtype, device=x.device).scatter_(0, order, means)


def _squareform(d: Tensor) -> Tensor:
    n = round((1 + (1 + 8 * len(d)) ** 0.5) / 2)
    square = d.new_zeros(n, n).masked_scatter(torch.ones(n, n, dtype=torch.bool, device=d.device).triu(1), d)
    return square + square.T


def _profile(d: Tensor, method: str) -> Tensor:
    """The unit vector whose inner product with another's is the comparison."""
    if method == "spearman":
        d = _ranks(d.detach())
    if method in ("corr", "spearman"):
        d = d - d.mean()
    if method == "cosine_cov":
        square = _squareform(d)
        means = square.mean(0)
        d = (square - means - means[:, None] + means.mean()).flatten()
    return d / d.norm()


def rsa(d1: Tensor, d2: Tensor, method: str = "corr") -> Tensor:
    """Compares two RDMs.

    Args:
        d1, d2: [N] condensed dissimilarities of the same pairs.
        method: ``"corr"`` (Pearson), ``"cosine"``, ``"spearman"``, or ``"cosine_cov"``: the cosine whitened by the
            covariance of distance estimates (Diedrichsen et al. 2021), which for squared Euclidean distances is the
            biased linear CKA.

    Returns:
        A scalar, NaN where an RDM is constant; differentiable but for ``"spearman"``.

    Raises:
        ValueError: for another method or shape, and RDMs that are not finite, which ranks would take for large ones.

    Example:
        >>> d = pyrepr.similarity.rdm(torch.randn(20, 6))
        >>> round(pyrepr.similarity.rsa(d, d).item(), 4)
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {shown(method)}")
    for name, d in (("d1", d1), ("d2", d2)):
        if not isinstance(d, Tensor) or d.dim() != 1 or not d.is_floating_point():
            came = shape_of(d) if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(f"{name} must be floating point of shape [n(n − 1)/2], got {came}")
        require_finite(name, d)
    if d1.shape != d2.shape:
        raise ValueError(f"d2 must have the length of d1, {len(d1)}, got {len(d2)}")
    return _profile(d1, method) @ _profile(d2, method)


@dataclass(frozen=True)
class RSA(Measure):
    """Representational similarity analysis: the comparison of two RDMs (Kriegeskorte et al. 2008).

    Args:
        metric: of :func:`rdm`.
        method: of :func:`rsa`.
        transform: ``None``, or ``"geotopological"`` with the quantiles `low` and `up` (:func:`geotopological`).

    Example:
        >>> x = torch.randn(50, 5)
        >>> round(pyrepr.similarity.RSA()(x, 2 * x).item(), 4)
        1.0
    """

    metric: str = "correlation"
    method: str = "spearman"
    transform: str | None = None
    low: float = 0.1
    up: float = 0.9

    name: ClassVar[str] = "rsa"
    title: ClassVar[str] = "RSA"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {shown(self.metric)}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {shown(self.method)}")
        if self.transform not in (None, "geotopological"):
            raise ValueError(f"transform must be None or 'geotopological', got {shown(self.transform)}")
        geotopological(torch.zeros(0, device="cpu"), self.low, self.up)  # checks them

    @property
    def least(self) -> int:
        return 3

    def chance(self, n: int) -> float | None:
        return 0.0 if self.method in ("corr", "spearman") else None

    def describe(self) -> str:
        transformed = f", geo-topological {self.low:g} to {self.up:g}" if self.transform else ""
        return f"RSA, {self.metric} RDMs{transformed}, {self.method}"

    def prepare(self, x: Tensor) -> Tensor:
        d = rdm(x, self.metric)
        if self.transform:
            d = geotopological(d, self.low, self.up)
        return _profile(d, self.method)

    def pairs(self, left: Sequence[Tensor], right: Sequence[Tensor] | None) -> Tensor:
        return products(left, right)


@dataclass(frozen=True)
class DistanceCorrelation(Measure):
    """Bias-corrected squared distance correlation (Székely & Rizzo 2013): 0 on average under independence.

    It is the unbiased CKA of the "kernel" −|x_i − x_j|, and is summed in blocks of rows of all layers at once: L·b·n
    numbers are held, not L·n².

    Example:
        >>> x = torch.randn(60, 4)
        >>> round(pyrepr.similarity.DistanceCorrelation()(x, x).item(), 4)
        1.0
    """

    name: ClassVar[str] = "distance_correlation"
    title: ClassVar[str] = "distance correlation"

    @property
    def least(self) -> int:
        return 4

    def chance(self, n: int) -> float:
        return 0.0

    def prepare(self, x: Tensor) -> Tensor:
        return x - x.detach().mean(0)

    def pairs(self, left: Sequence[Tensor], right: Sequence[Tensor] | None) -> Tensor:
        layers = [*left, *(right or ())]
        n = layers[0].shape[0]
        step = max(1, BLOCK_BYTES // (8 * n * len(layers)))
        s, rows = torch.zeros(len(layers), len(layers), dtype=torch.float64, device=layers[0].device), []
        for start in range(0, n, step):
            block = torch.stack([_distances_of_rows(x, start, step) for x in layers])  # [L, b, n]
            rows.append(block.sum(2, dtype=torch.float64))
            flat = block.flatten(1)
            s = s + (flat @ flat.T).double()
        sums = torch.cat(rows, 1)
        total = sums.sum(1)
        table = s + torch.outer(total, total) / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.T
        scale = table.diagonal().sqrt()
        table = table / torch.outer(scale, scale)
        return table if right is None else table[: len(left), len(left) :]


def _distances_of_rows(x: Tensor, start: int, step: int) -> Tensor:
    squares = _squared_distances(x[start : start + step], x)
    own = torch.zeros_like(squares, dtype=torch.bool)
    own.diagonal(start).fill_(True)
    return _root(squares.masked_fill(own, 0))


def relative_representation(x: Tensor, anchors: Tensor, projection: str = "cosine") -> Tensor:
    """Samples described by their similarity to anchors (Moschella et al. 2023): [n, a].

    Args:
        x: [n, d].
        anchors: [a, d], the representations of the anchors in the same space.
        projection: ``"cosine"`` (default; invariant to rotations and scales of the space), ``"ip"``, or
            ``"euclidean"``, the negative distance.

    Returns:
        [n, a], float64 for float64 inputs, else float32; differentiable in both. A row of x that is not finite has NaN.

    Raises:
        ValueError, TypeError: for other shapes or another projection, and anchors that are not finite.

    Example:
        >>> x = torch.randn(50, 5)
        >>> pyrepr.similarity.relative_representation(x, x[:8]).shape
        torch.Size([50, 8])
    """
    x, anchors = check_layer("x", x), check_layer("anchors", anchors)
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {shown(projection)}")
    if x.shape[1] != anchors.shape[1]:
        raise ValueError(f"anchors must have the width of x, {x.shape[1]}, got {anchors.shape[1]}")
    require_finite("anchors", anchors)
    dtype = compute_dtype(torch.promote_types(x.dtype, anchors.dtype))
    x, anchors = x.to(dtype), anchors.to(dtype)
    if projection == "euclidean":
        return -_root(_squared_distances(x, anchors))
    return _unit(x) @ _unit(anchors).T if projection == "cosine" else x @ anchors.T


@dataclass(frozen=True)
class RelativeCosine(Measure):
    """Mean cosine of the relative representations of a sample in two spaces, with the same samples as anchors.

    Args:
        anchors: how many (at most n, drawn with seed 0), or the numbers of the samples.

    Example:
        >>> x = torch.randn(50, 5)
        >>> round(pyrepr.similarity.RelativeCosine(anchors=20)(x, x).item(), 4)
        1.0
    """

    anchors: int | tuple[int, ...] = 256

    name: ClassVar[str] = "relative_cosine"
    title: ClassVar[str] = "relative cosine"

    def __post_init__(self) -> None:
        given = self.anchors
        plain = given.tolist() if isinstance(given, Tensor) else given
        if isinstance(plain, list):  # of numbers of numpy, too
            plain = tuple(int(i) if isinstance(i, SupportsIndex) else i for i in plain)
        object.__setattr__(self, "anchors", plain)
        numbers = (self.anchors,) if isinstance(self.anchors, int) else self.anchors
        least = 1 if isinstance(self.anchors, int) else 0
        if not isinstance(numbers, tuple) or not numbers or any(not isinstance(i, int) or i < least for i in numbers):
            raise ValueError(f"anchors must be a positive number or numbers of samples, got {shown(given)}")

    @property
    def least(self) -> int:
        return 2 if isinstance(self.anchors, int) else max(self.anchors) + 1

    def describe(self) -> str:
        count = f"up to {self.anchors}" if isinstance(self.anchors, int) else f"{len(self.anchors)}"
        return f"relative cosine, {count} anchors"

    def prepare(self, x: Tensor) -> Tensor:
        n, index = x.shape[0], self.anchors
        if isinstance(index, int):
            index = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:index].tolist()
        return _unit(relative_representation(x, x[list(index)])).flatten() / n**0.5

    def pairs(self, left: Sequence[Any], right: Sequence[Any] | None) -> Tensor:
        return products(left, right)
