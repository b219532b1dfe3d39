"""What follows from covariances alone, in float64: regression, principal and canonical components, alignment."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

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


def solve_ridge(sxx: Tensor, sxy: Tensor, alphas: Tensor) -> Tensor:
    """(S_xx + α)⁻¹ S_xy for every α. sxx: [d, d], sxy: [d, q], alphas: [A] -> [A, d, q].

    With α = 0 and a singular S_xx: the least-squares solution of least norm.
    """
    tiny = alphas.min() < 1e-8 * sxx.diagonal().max()  # where a factor of a singular matrix would be all rounding
    if len(alphas) > FACTORED_ALPHAS or bool(tiny):
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
