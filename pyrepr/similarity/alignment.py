"""Is there a map from one representation to another? Rotations, linear maps and pairings of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import shown
from pyrepr._optional import require
from pyrepr.similarity._protocol import ALIASES, Measure, pair_table
from pyrepr.stats import _covariances as of
from pyrepr.stats._layer_moments import Sums, whole_block
from pyrepr.stats.moments import LayerMoments, Moments, check_kind

CCA_KINDS = ("mean", "svcca", "pwcca")


def _centred(x: Tensor) -> Tensor:
    x = x - x[:1].detach()
    return x - x.mean(0)


def _rotated(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Centred rows with no more columns than rows: x = r Vᵀ, and V [d, r] if that was needed."""
    x = _centred(x)
    if x.shape[1] <= x.shape[0]:
        return x, None
    values, vectors = torch.linalg.eigh((x @ x.T).double())
    keep = values > of.rounding(x.shape[0], x.shape[1]) * values[-1]
    roots, vectors = values[keep].sqrt(), vectors[:, keep]
    return (vectors * roots).to(x.dtype), (x.T.double() @ (vectors / roots)).to(x.dtype)


def _blocks(moments: LayerMoments) -> tuple[Sums, dict[tuple[int, int], Tensor], list[int], list[int]]:
    """Sums around the mean, their blocks by pair, and the layers that are rows and columns of the table."""
    state = moments.centred()
    found = zip(state.blocks.pairs, state.blocks.sums(), strict=True)
    blocks = {(a, b): whole_block(block) if a == b else block for (a, b), block in found}
    layers = list(range(len(state.widths)))
    split = state.split
    return state, blocks, layers[: split or None], layers[split:] if split else layers


@dataclass(frozen=True)
class Procrustes(Measure):
    """How well a rotation, a shift and a scale take one representation to the other: ‖XᵀY‖_* / (‖X‖ ‖Y‖), centred.

    Args:
        kind: ``"shape"``: that cosine; SciPy's disparity is 1 − its square. ``"angular"``: 1 − 2/π · arccos of it, one
            minus a metric (Williams et al. 2021).

    Example:
        >>> x = torch.randn(50, 5)
        >>> turn, _ = torch.linalg.qr(torch.randn(5, 5))
        >>> round(pyrepr.similarity.Procrustes()(x, x @ turn).item(), 4)
        1.0
    """

    kind: str = "shape"

    name: ClassVar[str] = "procrustes"
    title: ClassVar[str] = "Procrustes"

    def __post_init__(self) -> None:
        check_kind(self.kind)

    @property
    def streams(self) -> bool:
        return True

    def describe(self) -> str:
        return f"Procrustes, {self.kind}"

    def prepare(self, x: Tensor) -> Tensor:
        rows = _rotated(x)[0]
        return rows / rows.norm()

    def pairs(self, left: Sequence[Tensor], right: Sequence[Tensor] | None) -> Tensor:
        one = left[0].new_ones(())

        def value(a: Tensor, b: Tensor) -> Tensor:
            nuclear = a.square().sum() if a is b else of.nuclear_norm(a.T @ b)  # ‖XᵀX‖_* needs no singular values
            return of.procrustes_of(nuclear, one, one, self.kind)

        return pair_table(left, right, value)

    def of_moments(self, moments: LayerMoments) -> Tensor:
        _, blocks, rows, columns = _blocks(moments)
        norms = {a: blocks[a, a].trace().sqrt() for a in {*rows, *columns}}

        def value(a: int, b: int) -> Tensor:
            return of.procrustes_of(of.nuclear_norm(blocks[min(a, b), max(a, b)]), norms[a], norms[b], self.kind)

        return pair_table(rows, columns if moments.split else None, value)


class _Whitened(NamedTuple):
    """A layer's orthonormal directions."""

    rows: Tensor  # [n, r] = X W of rows, orthonormal columns; or W [d, r] of moments
    loadings: Tensor  # [r, d] = (X W)ᵀ X, for PWCCA


@dataclass(frozen=True)
class CCA(Measure):
    """Canonical correlation analysis.

    Args:
        kind: ``"mean"``: the mean canonical correlation. ``"svcca"``: the same between the principal components that
            hold `variance` of each layer's variance, or the first `dims` (Raghu et al. 2017). ``"pwcca"``: weighted by
            what the directions hold of the first argument (Morcos et al. 2018); not symmetric.
        variance: of svcca, a share in (0, 1].
        dims: of svcca, a number of components in place of `variance`.

    Raises:
        ValueError: with no more samples than directions, where any two layers correlate perfectly.

    Example:
        >>> x = torch.randn(200, 5)
        >>> round(pyrepr.similarity.CCA()(x, x @ torch.randn(5, 5)).item(), 4)  # any invertible map
        1.0
    """

    kind: str = "mean"
    variance: float = 0.99
    dims: int | None = None

    name: ClassVar[str] = "cca"
    title: ClassVar[str] = "CCA"

    def __post_init__(self) -> None:
        if self.kind not in CCA_KINDS:
            raise ValueError(f"kind must be one of {', '.join(CCA_KINDS)}, got {shown(self.kind)}")
        if not isinstance(self.variance, (int, float)) or not 0 < self.variance <= 1:
            raise ValueError(f"variance must be a share in (0, 1], got {shown(self.variance)}")
        if self.dims is not None and (not isinstance(self.dims, int) or self.dims < 1):
            raise ValueError(f"dims must be a positive integer, got {shown(self.dims)}")

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.kind != "pwcca"

    @property
    def streams(self) -> bool:
        return True

    def describe(self) -> str:
        if self.kind == "mean":
            return "mean CCA"
        if self.kind == "pwcca":
            return "PWCCA"
        return f"SVCCA, {f'{self.dims} components' if self.dims else f'{self.variance:g} of variance'}"

    @property
    def _keep(self) -> float | int | None:
        return None if self.kind != "svcca" else self.dims or float(self.variance)

    def prepare(self, x: Tensor) -> _Whitened:
        rows, back = _rotated(x)
        wide = rows.double()
        vectors, values, loadings = of.basis(wide.T @ wide, self._keep, of.rounding(*rows.shape))
        if back is not None:
            loadings = loadings @ back.double().T
        of.check_samples(rows.shape[0], len(values), len(values), self.describe())
        return _Whitened(((wide @ vectors) / values.sqrt()).to(rows.dtype), loadings)

    def pairs(self, left: Sequence[_Whitened], right: Sequence[_Whitened] | None) -> Tensor:
        def value(a: _Whitened, b: _Whitened) -> Tensor:
            if a is b:  # whose correlations with itself are all the same
                return a.rows.square().sum() / a.rows.shape[1]
            return self._value(a.rows.T @ b.rows, a.loadings)

        return pair_table(left, right, value, self.symmetric)

    def of_moments(self, moments: LayerMoments) -> Tensor:
        state, blocks, rows, columns = _blocks(moments)
        whitened = {}
        for a in {*rows, *columns}:
            vectors, values, loadings = of.basis(blocks[a, a], self._keep, of.rounding(state.n, state.widths[a]))
            of.check_samples(state.n, len(values), len(values), self.describe())
            whitened[a] = _Whitened(vectors / values.sqrt(), loadings)

        def value(a: int, b: int) -> Tensor:
            block = blocks[a, b] if a <= b else blocks[b, a].T
            return self._value(whitened[a].rows.T @ block @ whitened[b].rows, whitened[a].loadings)

        return pair_table(rows, columns if moments.split else None, value, self.symmetric)

    def _value(self, cross: Tensor, loadings: Tensor) -> Tensor:
        """From the inner products [r, s] of two orthonormal bases."""
        if self.kind != "pwcca":
            return of.nuclear_norm(cross) / min(cross.shape)
        left, correlations, _ = torch.linalg.svd(cross, full_matrices=False)
        weights = (left.double().T @ loadings).abs().sum(1)
        return (weights * correlations).sum() / weights.sum()


ALIASES["svcca"] = ("cca", {"kind": "svcca"})
ALIASES["pwcca"] = ("cca", {"kind": "pwcca"})


class _Folds(NamedTuple):
    """A layer's ridge regressions, one a fold: predictions of a target y are left (right y_train)."""

    rows: Tensor  # [n, d] centred
    left: list[Tensor]  # [n_test, r] = X_test V Λ/(Λ² + α)
    right: list[Tensor]  # [r, n_train] = Uᵀ


@dataclass(frozen=True)
class LinearRegression(Measure):
    """Held-out R² of predicting the second representation from the first by ridge regression; not symmetric.

    1 − Σ |y − ŷ|² / Σ |y − ȳ_train|² over all features and all folds; each sample is predicted by a model that has not
    seen it. 0 is what the training mean achieves; below 0 is worse. It can be anything down to −∞, and is not clamped.

    Args:
        alpha: λ of scikit-learn's ``Ridge`` (not divided by n; intercept not penalised), of features divided by their
            common root mean square deviation, so that it does not depend on the layer's scale.
        folds: samples are dealt to them at random (seed 0).

    Example:
        >>> x = torch.randn(200, 5)
        >>> pyrepr.similarity.LinearRegression()(x, x @ torch.randn(5, 3)).item() > 0.99  # x explains y
        True
    """

    alpha: float = 1.0
    folds: int = 5

    name: ClassVar[str] = "linear_regression"
    title: ClassVar[str] = "held-out R²"
    symmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a positive finite number, got {shown(self.alpha)}")
        if not isinstance(self.folds, int) or self.folds < 2:
            raise ValueError(f"folds must be an integer of at least 2, got {shown(self.folds)}")

    @property
    def least(self) -> int:
        return 2 * self.folds

    def chance(self, n: int) -> float:
        return 0.0

    def describe(self) -> str:
        return f"held-out R² of ridge regression, α = {self.alpha:g}, {self.folds} folds"

    def _parts(self, n: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")
        return [
            (
                order[torch.arange(n, device="cpu") % self.folds != fold],
                order[torch.arange(n, device="cpu") % self.folds == fold],
            )
            for fold in range(self.folds)
        ]

    def prepare(self, x: Tensor) -> _Folds:
        x = _centred(x)
        scaled = x / x.square().mean().sqrt()
        left, right = [], []
        for train, test in self._parts(x.shape[0]):
            mean = scaled[train].mean(0)
            seen, unseen = scaled[train] - mean, scaled[test] - mean
            if seen.shape[1] <= seen.shape[0]:
                wide = seen.double()
                factor = torch.linalg.cholesky(
                    wide.T @ wide + self.alpha * torch.eye(seen.shape[1], dtype=wide.dtype, device=x.device)
                )
                left.append(torch.cholesky_solve(unseen.double().T, factor).T.to(x.dtype))
                right.append(seen.T)
            else:
                kernel = (seen @ seen.T).double()
                kernel.diagonal().add_(self.alpha)
                factor = torch.linalg.cholesky(kernel)
                left.append(torch.cholesky_solve((seen @ unseen.T).double(), factor).T.to(x.dtype))
                right.append(torch.eye(len(train), dtype=x.dtype, device=x.device))
        return _Folds(x, left, right)

    def pairs(self, left: Sequence[_Folds], right: Sequence[_Folds] | None) -> Tensor:
        targets = [layer.rows for layer in (left if right is None else right)]
        widths, y = [t.shape[1] for t in targets], torch.cat(targets, 1)  # one product a layer and fold for all targets
        errors = [torch.zeros(len(left), len(widths), dtype=torch.float64, device=y.device)]
        total = torch.zeros(len(widths), dtype=torch.float64, device=y.device)
        for fold, (train, test) in enumerate(self._parts(y.shape[0])):
            mean = y[train].mean(0)
            seen, unseen = y[train] - mean, y[test] - mean
            total = total + _by_layer(unseen, widths)
            found = [layer.left[fold] @ (layer.right[fold] @ seen) for layer in left]
            errors.append(torch.stack([_by_layer(unseen - predicted, widths) for predicted in found]))
        return 1 - torch.stack(errors).sum(0) / total


def _by_layer(y: Tensor, widths: list[int]) -> Tensor:
    """Σ of squares of each layer's columns."""
    return torch.stack([part.double().square().sum() for part in y.split(widths, 1)])


class UnitMatch(NamedTuple):
    """Pairs of units: column `x_units[i]` of x goes with column `y_units[i]` of y, at `correlations[i]`.

    Example:
        >>> x = torch.randn(100, 4)
        >>> match = pyrepr.similarity.match_units(x, x[:, [2, 0, 1, 3]])
        >>> match.correlations.min().item() > 0.999
        True
    """

    x_units: Tensor
    y_units: Tensor
    correlations: Tensor


def match_units(x: Tensor | Moments, y: Tensor | None = None, *, signed: bool = True) -> UnitMatch:
    """One-to-one pairing of the units of two networks with the largest sum of correlations (Li et al. 2016).

    Args:
        x, y: [n, p] and [n, q], the units' activations for the same n stimuli; or for x the
            :class:`pyrepr.stats.Moments` of both, of a long stream, and no y.
        signed: maximise r; if false, |r|.

    Returns:
        min(p, q) pairs, best first. Units that do not vary have no correlation and come last, at NaN.

    Raises:
        ImportError: without SciPy.

    Example:
        >>> x = torch.randn(100, 4)
        >>> match = pyrepr.similarity.match_units(x, x[:, [2, 0, 1, 3]])
        >>> match.correlations.min().item() > 0.999
        True
    """
    optimize = require("scipy.optimize", "scipy")
    if y is None and not isinstance(x, Moments):
        raise ValueError("y must be [n, q], the units of the other network, got None")
    moments = x if isinstance(x, Moments) else Moments().update(x, y)
    correlation = moments.correlation
    weight = correlation.nan_to_num(0.0)
    rows, columns = optimize.linear_sum_assignment((weight if signed else weight.abs()).cpu().numpy(), maximize=True)
    rows, columns = (torch.as_tensor(a, device=correlation.device) for a in (rows, columns))
    found = correlation[rows, columns]
    order = (found if signed else found.abs()).nan_to_num(-2.0).argsort(descending=True, stable=True)
    return UnitMatch(rows[order], columns[order], found[order])
