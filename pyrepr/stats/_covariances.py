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


def ridge_of(scatter: Scatter, alphas: Tensor, quick: bool = False) -> Ridge:
    """Ridge regression of y on x for every α: coef [A, q, d], intercept [A, q]. `quick`: of float32 features."""
    alphas = alphas.to(scatter.sxx.device)
    coef = (solve_ridge_quickly if quick else solve_ridge)(scatter.sxx, scatter.sxy, alphas).mT
    return Ridge(coef, scatter.mean_y - coef @ scatter.mean_x)


def errors_of(scatter: Scatter, model: Ridge) -> tuple[Tensor, Tensor]:
    """Of every target: Σ (y − model(x))² [..., q] and Σ (y − ȳ)² [q]."""
    sxx, sxy = scatter.sxx, scatter.sxy
    b = model.coef.mT.to(sxx)  # [..., d, q]
    offset = model.coef.to(sxx) @ scatter.mean_x + model.intercept.to(sxx) - scatter.mean_y
    total = scatter.syy.diagonal()
    error = total - 2 * (b * sxy).sum(-2) + (b * (sxx @ b)).sum(-2) + scatter.n * offset.square()
    return error, total


def solve_ridge_quickly(sxx: Tensor, sxy: Tensor, alphas: Tensor) -> Tensor:
    """:func:`solve_ridge` to about eight digits: factors in float32, which take half the time, and corrections by
    residuals in float64. Where the corrections do not shrink, or where one eigendecomposition serves, it is that."""
    largest = sxx.diagonal().max()
    if _by_eigenvalues(sxx, alphas) or not bool(largest > 0):
        return solve_ridge(sxx, sxy, alphas)
    low = torch.mul(sxx, 1 / largest, out=torch.empty_like(sxx, dtype=torch.float32))
    right, shifts = (sxy / largest).expand(len(alphas), *sxy.shape), alphas[:, None, None] / largest
    diagonal, factors = low.diagonal().clone(), []
    for shift in shifts.flatten().tolist():
        low.diagonal().copy_(diagonal + shift)
        factor, info = torch.linalg.cholesky_ex(low)
        if bool(info):
            return solve_ridge(sxx, sxy, alphas)
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
    return solve_ridge(sxx, sxy, alphas)


def _by_eigenvalues(sxx: Tensor, alphas: Tensor) -> bool:
    """Whether there are many α, or one so small that a factor of a singular matrix would be all rounding."""
    return len(alphas) > FACTORED_ALPHAS or bool(alphas.min() < 1e-8 * sxx.diagonal().max())


def solve_ridge(sxx: Tensor, sxy: Tensor, alphas: Tensor) -> Tensor:
    """(S_xx + α)⁻¹ S_xy for every α. sxx: [d, d], sxy: [d, q], alphas: [A] -> [A, d, q].

    With α = 0 and a singular S_xx: the least-squares solution of least norm.
    """
    if _by_eigenvalues(sxx, alphas):
        values, vectors = torch.linalg.eigh(sxx)
        # Where x does not vary S_xy is zero, too, and what is left of it rounding.
        varies = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        inverse = varies / torch.where(varies, values + alphas[:, None], 1)
        return vectors @ (inverse[:, :, None] * (vectors.T @ sxy))
    shifted = sxx.repeat(len(alphas), 1, 1)
    shifted.diagonal(dim1=1, dim2=2).add_(alphas[:, None])
    return torch.cholesky_solve(sxy, torch.linalg.cholesky(shifted))


def principal(sxx: Tensor, mean: Tensor, n: int, k: int) -> PCA:
    """The k largest principal components of a scatter matrix; signs make the largest entry positive."""
    values, vectors = torch.linalg.eigh(sxx)
    values, rows = values.flip(0).clamp_min(0) / (n - 1), vectors.flip(1).T
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return PCA((rows * sign)[:k], values[:k], values[:k] / values.sum(), mean)


def basis(sxx: Tensor, keep: float | int | None, floor: float) -> tuple[Tensor, Tensor]:
    """Whitening of a layer: vectors V [d, r] and values λ [r] with Vᵀ S V = diag(λ), largest first.

    keep: the share of variance to keep (a float up to 1), or the number of directions (an int), or ``None``: all that
    are more than rounding, `floor` times the largest value.
    """
    values, vectors = torch.linalg.eigh(sxx)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > floor * values[0]).sum())
    if isinstance(keep, float):
        share = values.clamp_min(0).cumsum(0)
        rank = min(rank, int((share < keep * share[-1]).sum()) + 1)
    elif keep is not None:
        rank = min(rank, keep)
    return vectors[:, :rank], values[:rank]


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
