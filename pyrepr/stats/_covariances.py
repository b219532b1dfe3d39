"""What follows from covariances alone, in float64: regression, principal and canonical components, alignment."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

# A float32 factor whose first answer is off by more than STRAY is not trusted; corrections end below SETTLED.
STRAY, SETTLED, CORRECTIONS = 0.03, 1e-6, 4
# Beyond this many λ one eigendecomposition is cheaper than a Cholesky factor each (d = 768: 25 times a factor).
FACTORED_ALPHAS = 16
# A factor is trusted if no pivot is below this share of its diagonal entry; a solution, if rounding of the covariance
# decides at most the share DOUBT of what it explains (with α = 0 only if few rows make up the covariance: rounded
# copies of features vary that little, too, and then count as constant).
LEAST_PIVOT, DOUBT = 1e-8, 0.003


class Ridge(NamedTuple):
    """Coefficients [q, d] and intercept [q] of linear maps x ↦ coef x + intercept; with a leading axis for many λ.

    Example:
        >>> moments = pyrepr.stats.Moments()
        >>> x = torch.randn(100, 6)
        >>> moments = moments.update(x, x @ torch.randn(6, 2))
        >>> moments.ridge(1e-3).coef.shape[-1]
        6
    """

    coef: Tensor
    intercept: Tensor


class PCA(NamedTuple):
    """Principal components, largest first; the names are scikit-learn's.

    Example:
        >>> moments = pyrepr.stats.Moments()
        >>> moments = moments.update(torch.randn(100, 6))
        >>> moments.pca(2).components.shape
        torch.Size([2, 6])
    """

    components: Tensor  # [k, d] orthonormal rows
    explained_variance: Tensor  # [k]
    explained_variance_ratio: Tensor  # [k]
    mean: Tensor  # [d]


class Scatter(NamedTuple):
    """What samples of x and y are to linear regression: sums around the means, float64."""

    n: int
    mean_x: Tensor  # [d]
    sxx: Tensor  # [d, d]
    mean_y: Tensor  # [q]
    sxy: Tensor  # [d, q]
    syy: Tensor  # [q, q]; of it only the diagonal counts here
    uneven: bool = False  # whether a few rows of x make up almost all of sxx


def ridge_of(scatter: Scatter, alphas: Tensor, quick: bool = False) -> Ridge:
    """Ridge regression of y on x for every α: coef [A, q, d], intercept [A, q]. `quick`: of float32 features."""
    alphas = alphas.to(scatter.sxx.device)
    coef = (solve_ridge_quickly if quick else solve_ridge)(scatter.sxx, scatter.sxy, alphas, scatter.uneven).mT
    return Ridge(coef, scatter.mean_y - coef @ scatter.mean_x)


def errors_of(scatter: Scatter, model: Ridge) -> tuple[Tensor, Tensor]:
    """Of every target: Σ (y − model(x))² [..., q] and Σ (y − ȳ)² [q]."""
    sxx, sxy = scatter.sxx, scatter.sxy
    b = model.coef.mT.to(sxx)  # [..., d, q]
    offset = model.coef.to(sxx) @ scatter.mean_x + model.intercept.to(sxx) - scatter.mean_y
    total = scatter.syy.diagonal()
    error = total - 2 * (b * sxy).sum(-2) + (b * (sxx @ b)).sum(-2) + scatter.n * offset.square()
    return error, total


def solve_ridge_quickly(sxx: Tensor, sxy: Tensor, alphas: Tensor, uneven: bool = False) -> Tensor:
    """:func:`solve_ridge` to about eight digits: factors in float32, which take half the time, and corrections by
    residuals in float64. Where the corrections do not shrink, or where one eigendecomposition serves, it is that."""
    largest = sxx.diagonal().max()
    if _by_eigenvalues(sxx, alphas) or not bool(largest > 0):
        return solve_ridge(sxx, sxy, alphas, uneven)
    low = torch.mul(sxx, 1 / largest, out=torch.empty_like(sxx, dtype=torch.float32))
    right, shifts = (sxy / largest).expand(len(alphas), *sxy.shape), alphas[:, None, None] / largest
    diagonal, factors = low.diagonal().clone(), []
    for shift in shifts.flatten().tolist():
        low.diagonal().copy_(diagonal + shift)
        factor, info = torch.linalg.cholesky_ex(low)
        if bool(info):
            return solve_ridge(sxx, sxy, alphas, uneven)
        factors.append(factor)

    def solved(b: Tensor) -> Tensor:
        size = b.abs().amax().clamp_min(torch.finfo(b.dtype).tiny)  # the residual of a small b would underflow
        parts = [torch.cholesky_solve(one, factor) for one, factor in zip((b / size).float(), factors, strict=True)]
        return torch.stack(parts).double() * size

    found, limit = solved(right), STRAY
    for _ in range(CORRECTIONS):
        flat = found.transpose(0, 1).flatten(1)  # [d, A q]: one product for all α
        product = (sxx @ flat).unflatten(1, (len(alphas), -1)).transpose(0, 1) / largest
        correction = solved(right - product - shifts * found)
        found = found + correction
        share = float((correction.norm(dim=(1, 2)) / found.norm(dim=(1, 2)).clamp_min(1e-300)).max())
        if share <= SETTLED:
            return found
        if not share <= limit:
            break
        limit = share / 2
    return solve_ridge(sxx, sxy, alphas, uneven)


def _by_eigenvalues(sxx: Tensor, alphas: Tensor) -> bool:
    """Whether there are many α, or one so small beside the widest feature that only :func:`solve_ridge` may go on."""
    return len(alphas) > FACTORED_ALPHAS or _small(sxx, alphas)


def _small(sxx: Tensor, alphas: Tensor) -> bool:
    return bool(alphas.min() < 1e-8 * sxx.diagonal().max())


def solve_ridge(sxx: Tensor, sxy: Tensor, alphas: Tensor, uneven: bool = False) -> Tensor:
    """(S_xx + α)⁻¹ S_xy for every α. sxx: [d, d], sxy: [d, q], alphas: [A] -> [A, d, q]. `uneven`: as in Scatter.

    With α = 0 and a singular S_xx: the least-squares solution of least norm.

    Raises:
        ValueError: if y varies along directions in which x does not vary by more than the rounding of S_xx.
    """
    if _small(sxx, alphas) or not _by_eigenvalues(sxx, alphas):
        found = _by_factors(sxx, sxy, alphas)
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(sxx)
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    # Where x does not vary S_xy is zero, too, and what is left of it rounding.
    varies = values > floor
    along = vectors.T @ sxy
    doubted = (alphas > 0) | uneven
    if _small(sxx, alphas) and bool(doubted.any()):
        sizes = torch.where(varies, values, 0) + alphas[doubted, None]
        rounded = 4 * floor * (along[varies] / values[varies, None]).norm(dim=0)  # what zeros of S_xy may be
        clear = torch.where(varies[:, None] | (along.abs() > rounded), along, 0)
        _check_resolved(torch.where(sizes > 0, sizes, 1e-8 * floor), clear, floor)
    inverse = varies / torch.where(varies, values + alphas[:, None], 1)
    return vectors @ (inverse[:, :, None] * along)


def _by_factors(sxx: Tensor, sxy: Tensor, alphas: Tensor) -> Tensor | None:
    """:func:`solve_ridge` by Cholesky factors, whose digits do not depend on the units of the features: a column 1e8
    times as large as the others costs them none. None where S_xx + α is singular but for rounding."""
    found = torch.empty(len(alphas), *sxy.shape, dtype=sxy.dtype, device=sxy.device)
    for i in alphas.argsort().tolist():
        shifted = sxx.clone()
        diagonal = shifted.diagonal().add_(alphas[i]).clone()
        factor, info = torch.linalg.cholesky_ex(shifted)
        if bool(info) or not bool((factor.diagonal().square() > LEAST_PIVOT * diagonal).all()):
            return None
        found[i] = torch.cholesky_solve(sxy, factor)
    return found


def _check_resolved(sizes: Tensor, along: Tensor, floor: Tensor) -> None:
    """Raises ValueError if rounding decides what a model answers. sizes: [A, d], λ + α of the directions of x, along:
    [d, q], S_xy in them. A direction explains s² / (λ + α) of y, of which λ's rounding, `floor`, is its share."""
    sizes = sizes[:, :, None].clamp_min(torch.finfo(sizes.dtype).tiny)
    explained = along.square() / sizes
    doubtful = (explained * (floor / sizes).clamp_max(1)).sum(1)
    if bool((doubtful > DOUBT * explained.sum(1)).any()):
        raise ValueError(
            "x has rows, or directions, so much longer than others that its covariance has lost the others, along "
            f"which y varies: take alphas of at least {float(floor) / DOUBT:.2g}, or leave such rows out"
        )


def principal(sxx: Tensor, mean: Tensor, n: int, k: int) -> PCA:
    """The k largest principal components of a scatter matrix; signs make the largest entry positive."""
    values, vectors = torch.linalg.eigh(sxx)
    values, rows = values.flip(0).clamp_min(0) / (n - 1), vectors.flip(1).T
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return PCA((rows * sign)[:k], values[:k], values[:k] / values.sum(), mean)


class Basis(NamedTuple):
    """Whitening of a layer: vectors V [d, r] and values λ [r] with Vᵀ S V = diag(λ), largest first, and the loadings
    (X V λ^{-1/2})ᵀ X [r, d] of its directions."""

    vectors: Tensor
    values: Tensor
    loadings: Tensor


def basis(sxx: Tensor, keep: float | int | None, floor: float) -> Basis:
    """Directions of a layer by its scatter matrix.

    keep: the share of variance to keep (a float up to 1), or the number of directions (an int), or ``None``: all that
    are more than rounding, `floor` times the largest value. If all are kept the units of the features do not matter,
    and each is measured in its deviation: one with 1e4 times the others' does not hide them.
    """
    units = torch.ones_like(sxx.diagonal())
    if keep is None:
        variances = sxx.diagonal()
        varies = variances > variances.max() * len(sxx) * torch.finfo(sxx.dtype).eps
        units = torch.where(varies, variances, 0).sqrt()
        sxx = torch.where(torch.outer(varies, varies), sxx / torch.outer(units, units), 0)
    values, vectors = torch.linalg.eigh(sxx)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > floor * values[0]).sum())
    if isinstance(keep, float):
        share = values.clamp_min(0).cumsum(0)
        rank = min(rank, int((share < keep * share[-1]).sum()) + 1)
    elif keep is not None:
        rank = min(rank, keep)
    values, vectors = values[:rank], vectors[:, :rank]
    loadings = (units[:, None] * vectors * values.sqrt()).T
    return Basis(torch.where(units > 0, vectors.T / units, 0).T, values, loadings)


def rounding(n: int, d: int) -> float:
    """Eigenvalues of a d × d scatter matrix of n samples below this share of the largest may be rounding of the
    features: products are made in float32, unless those are float64."""
    return max(n, d) * torch.finfo(torch.float64).eps + 2 * torch.finfo(torch.float32).eps


def nuclear_norm(cross: Tensor) -> Tensor:
    """Σ of singular values of the last two axes."""
    return torch.linalg.svdvals(cross).sum(-1)


def procrustes_of(nuclear: Tensor, left: Tensor, right: Tensor, kind: str) -> Tensor:
    """Similarity from ‖XᵀY‖_* and the Frobenius norms of centred X and Y.

    "shape": ‖XᵀY‖_* / (‖X‖ ‖Y‖), the cosine of the best rotation. "angular": 1 − 2/π · arccos of it.
    """
    cosine = nuclear / (left * right)
    return 1 - 2 / math.pi * cosine.clamp(-1, 1).arccos() if kind == "angular" else cosine


def check_samples(n: int, left: int, right: int, what: str) -> None:
    """Two layers that both span all n − 1 directions of n centred samples have canonical correlations of 1."""
    if n - 1 <= max(left, right):
        raise ValueError(
            f"{what} needs more samples than features, got {n} samples, {max(left, right)} directions: any two such "
            "layers correlate perfectly; take more samples, kind='svcca' with few dims, or CKA"
        )


def warn_of_empty_classes(counts: Tensor, so: str = "their rows are NaN") -> None:
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        which = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        warnings.warn(f"classes without samples: {which}; {so}", stacklevel=3)
