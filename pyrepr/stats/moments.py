"""Moments of a stream of samples, and the linear statistics that follow from them: :class:`Moments`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_agreed, check_device, check_layer, check_tensor, shape_of, shown
from pyrepr.backend import triton_interprets
from pyrepr.ops._leaf import at_hand
from pyrepr.ops.moments import products_of
from pyrepr.stats import _covariances as of
from pyrepr.stats._blocks import Blocks
from pyrepr.stats._class_moments import PAIRS, ClassSums
from pyrepr.stats._covariances import PCA, Ridge
from pyrepr.stats._layer_moments import LayerMoments

__all__ = ["PCA", "LayerMoments", "Moments", "Ridge"]


class Moments:
    """First and second moments of features x, and of x with labels, targets or another representation y.

    Fed batch by batch, in one pass over data of any length; what a fold holds can be taken away again, so that k-fold
    training moments are total minus fold. Sums, and on the CPU products too, are float64 around a provisional mean (of
    each class, with `classes`): exact at means a million times the deviation, and for classes a hundred thousand times
    tighter than their distances.
    Memory is 8·d·(d + q) bytes and the last batches, independent of the number of samples. An update computes
    everything, then commits; an exception leaves the moments as they were.

    Args:
        classes: C, if y are labels in [0, C): adds `counts`, `class_means`, `within` and `between`. ``None``: y is
            ``None``, or targets or another representation of the same samples, [n] or [n, q] floating point; soft
            labels are targets.

    Example:
        >>> moments = pyrepr.stats.Moments()
        >>> for _ in range(3):
        ...     x = torch.randn(100, 6)
        ...     moments = moments.update(x, x @ torch.ones(6, 2))
        >>> moments.covariance.shape
        torch.Size([6, 6])
    """

    def __init__(self, classes: int | None = None) -> None:
        if classes is not None and (not isinstance(classes, int) or classes < 2):
            raise ValueError(f"classes must be an integer of at least 2, got {shown(classes)}")
        self.classes = classes
        self._layers = LayerMoments()  # without classes
        self._labelled: ClassSums | None = None

    @property
    def samples(self) -> int:
        """How many samples have been seen."""
        if self.classes is None:
            return self._layers.samples
        return self._labelled.n if self._labelled else 0

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> Moments:
        """Adds a batch.

        Args:
            x: [n, d] features, float32, float64, bfloat16 or float16.
            y: [n] integer labels with `classes`; else ``None``, or [n] or [n, q] floating point.

        Raises:
            ValueError, TypeError: also if widths differ from the first call, or features or targets are not finite;
                nothing is added.
        """
        x = check_finite("x", check_layer("x", x))
        if self.classes is None:
            pair = [x] if y is None else [x, check_targets(y, x)]
            known, split = self._layers.widths, int(y is not None)
            if known and [a.shape[1] for a in pair] != known:
                raise ValueError(f"x and y must have the widths of the first update, {known}, got {_widths(pair)}")
            widest = widened(x).dtype if y is None else torch.promote_types(widened(x).dtype, pair[1].dtype)
            self._layers.add([a.to(widest) for a in pair], split)
            return self
        labels = check_labels("y", y, x.shape[0], self.classes).to(x.device)
        if self._labelled and self._labelled.shift.shape[1] != x.shape[1]:
            raise ValueError(
                f"x must have the {self._labelled.shift.shape[1]} features of the first update, got {shape_of(x)}"
            )
        if len(x):
            sums = self._labelled or ClassSums.zeros(self.classes, x.shape[1], x.device)
            self._labelled = sums.plus_batch(widened(x), labels)
        return self

    @torch.no_grad()
    def merge(self, other: Moments) -> Moments:
        """Adds the samples another has seen; `other` is not changed.

        Raises:
            ValueError: if the widths or the number of classes differ.
        """
        merged = self._combined(other, 1)
        vars(self).update(vars(merged))
        return self

    @torch.no_grad()
    def __sub__(self, other: Moments) -> Moments:
        """The moments without the samples of `other`, all of which must be among these."""
        return self._combined(other, -1) if isinstance(other, Moments) else NotImplemented

    def _combined(self, other: Moments, sign: int) -> Moments:
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}")
        if other.classes != self.classes:
            raise ValueError(f"other must have classes={self.classes}, got {other.classes}")
        if sign < 0 and other.samples > self.samples:
            raise ValueError(f"other must hold some of the {self.samples} samples, got {other.samples}")
        result = Moments(self.classes)
        if self.classes is None:
            if sign > 0:
                result._layers = LayerMoments().merge(self._layers).merge(other._layers)
            else:
                result._layers = self._layers - other._layers
            return result
        one, two = self._labelled, other._labelled
        if one and two:
            if one.shift.shape != two.shift.shape:
                raise ValueError(f"other must have {one.shift.shape[1]} features, got {two.shift.shape[1]}")
            if sign < 0 and bool((two.counts > one.counts).any()):
                raise ValueError("other must hold some of the samples, but has more of a class")
            result._labelled = one.plus(two, sign)
        else:
            result._labelled = one or two
        return result

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> Moments:
        """Adds up the moments of all processes of a ``torch.distributed`` group; afterwards all hold the whole.

        Raises:
            ValueError: the same in every process, if they differ in `classes` or layers; nothing is changed.
        """
        from torch import distributed

        check_agreed({"classes": self.classes}, group)
        if self.classes is None:
            self._layers.all_reduce(group)
            return self
        found: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(found, self.state_dict(), group=group)
        total = Moments(self.classes)
        for state in found:
            part = Moments(self.classes)
            part.load_state_dict(state)
            total.merge(part)
        vars(self).update(vars(total))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or elsewhere; ``torch.save`` takes it."""
        state: dict[str, Any] = {"classes": self.classes}
        if self.classes is None:
            return {**state, **self._layers.state_dict()}
        if self._labelled:
            blocks = [block.clone() for block in self._labelled.blocks.sums()]
            state["sums"] = {
                "shift": self._labelled.shift.clone(),
                "counts": self._labelled.counts.clone(),
                "blocks": blocks,
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, `classes` included.

        Raises:
            ValueError: if it is not such a dict, or its tensors do not fit together; nothing is changed.
        """
        if not isinstance(state_dict, dict) or "classes" not in state_dict:
            raise ValueError("state_dict must come from Moments.state_dict(), got one without classes")
        start = Moments(state_dict["classes"])
        if start.classes is None:
            start._layers.load_state_dict(state_dict)
        elif "sums" in state_dict:
            start._labelled = _loaded(state_dict["sums"], start.classes)
        vars(self).update(vars(start))

    # What is known of x

    @property
    def mean(self) -> Tensor:
        """[d] float64."""
        return self._scatter()[1]

    @property
    def covariance(self) -> Tensor:
        """[d, d] float64 of x, divided by n − 1 as in ``torch.cov``."""
        n, _, sxx, *_ = self._scatter(least=2)
        return sxx / (n - 1)

    @property
    def correlation(self) -> Tensor:
        """Correlations of units: of x with y, [d, q], if there is a y, else of x, [d, d]. NaN for constant units."""
        _, _, sxx, _, sxy, syy = self._scatter(least=2)
        left = sxx.diagonal().sqrt()
        if sxy is None:
            return sxx / torch.outer(left, left)
        return sxy / torch.outer(left, syy.diagonal().sqrt())

    # Between and within classes

    @property
    def counts(self) -> Tensor:
        """[C] int64: samples of every class."""
        return self._of_classes().counts.long()

    @property
    def class_means(self) -> Tensor:
        """[C, d] float64; NaN, and a warning that names it, for a class without samples."""
        sums = self._of_classes()
        of.warn_of_empty_classes(sums.counts)
        return sums.means()

    @property
    def within(self) -> Tensor:
        """Σ_i (x_i − μ_class(i))(x_i − μ_class(i))ᵀ / n, [d, d] float64."""
        sums = self._of_classes()
        return sums.within() / sums.n

    @property
    def between(self) -> Tensor:
        """Mean over the classes that have samples, each counted once, of (μ_c − μ_G)(μ_c − μ_G)ᵀ, [d, d] float64, μ_G
        the mean of their means."""
        sums = self._of_classes()
        means = sums.means()[sums.counts > 0]
        means = means - means[0]
        means = means - means.mean(0)
        return products_of(means.T, means.T) / len(means)

    # Linear models

    def ridge(self, alphas: float | Sequence[float] | Tensor = 1.0) -> Ridge:
        """Ridge regression of y on x for every λ: scikit-learn's ``Ridge``, X and Y centred, intercept not penalised.

        Args:
            alphas: λ ≥ 0, not divided by n; 0 is least squares, of least norm where the covariance is singular: where
                it is 2e-16·d times its largest eigenvalue or less. The units of the features cost no digits.

        Returns:
            coef [A, q, d] and intercept [A, q], float64; without the leading axis for a single number. Labels count
            as one-hot targets: half of what ``RidgeClassifier`` gives, whose targets are ±1.

        Raises:
            ValueError: for a negative λ; if there was no y; if whole rows of x are so much longer than the others (1e8
                times) that the sums have lost those, and λ is not large enough for that not to matter.
        """
        values = check_alphas(alphas)
        found = of.ridge_of(self._both()._replace(uneven=self._uneven()), values)
        single = isinstance(alphas, (int, float)) or (isinstance(alphas, Tensor) and alphas.dim() == 0)
        return Ridge(found.coef[0], found.intercept[0]) if single else found

    def r2(self, alpha: float = 0.0, multioutput: str = "uniform_average") -> Tensor:
        """Coefficient of determination of :meth:`ridge` on the samples it was fitted to.

        Args:
            alpha: λ.
            multioutput: as in scikit-learn's ``r2_score``: ``"raw_values"`` [q], their ``"uniform_average"``
                (default), or ``"variance_weighted"``.
        """
        if multioutput not in ("raw_values", "uniform_average", "variance_weighted"):
            raise ValueError(
                f"multioutput must be 'raw_values', 'uniform_average' or 'variance_weighted', got {shown(multioutput)}"
            )
        return self.r2_of(self.ridge(alpha), multioutput)

    def r2_of(self, model: Ridge, multioutput: str = "uniform_average") -> Tensor:
        """R² of a linear map on these samples, which may be others than it was fitted to: held-out R² needs no rows."""
        error, total = of.errors_of(self._both(1), model)
        if multioutput == "variance_weighted":
            return 1 - error.sum(-1) / total.sum()
        raw = 1 - error / total
        return raw if multioutput == "raw_values" else raw.mean(-1)

    def pca(self, k: int | None = None) -> PCA:
        """The k (default: all) principal components of x, largest first."""
        n, mean, sxx, *_ = self._scatter(least=2)
        k = len(mean) if k is None else k
        if not isinstance(k, int) or not 1 <= k <= len(mean):
            raise ValueError(f"k must be an integer from 1 to the number of features, {len(mean)}, got {shown(k)}")
        return of.principal(sxx, mean, n, k)

    # Two representations

    def cca(self) -> Tensor:
        """Canonical correlations of x and y, largest first, [min of the ranks] float64.

        Raises:
            ValueError: with no more samples than features, where they are 1 for anything.
        """
        return torch.linalg.svdvals(self._whitened(None)[0])

    def svcca(self, variance: float = 0.99) -> Tensor:
        """Mean canonical correlation of the principal components that hold this share of variance (Raghu 2017)."""
        if not isinstance(variance, (int, float)) or not 0 < variance <= 1:
            raise ValueError(f"variance must be a share in (0, 1], got {shown(variance)}")
        return torch.linalg.svdvals(self._whitened(float(variance))[0]).mean()

    def pwcca(self) -> Tensor:
        """Projection-weighted CCA (Morcos et al. 2018): weights from x, the first argument; not symmetric."""
        cross, loadings = self._whitened(None)
        left, correlations, _ = torch.linalg.svd(cross, full_matrices=False)
        # Canonical variable h_i = X V λ^{-1/2} l_i; its weight Σ_j |⟨h_i, x_j⟩| over the features of x.
        weights = (left.T @ loadings).abs().sum(1)
        return (weights * correlations).sum() / weights.sum()

    def procrustes(self, kind: str = "shape") -> Tensor:
        """How well a rotation, a shift and a scale take x to y: ‖XᵀY‖_* / (‖X‖ ‖Y‖) of centred X and Y.

        Args:
            kind: ``"shape"``: that cosine; scipy's ``procrustes`` disparity is 1 − its square. ``"angular"``:
                1 − 2/π · arccos of it, whose complement is a metric (Williams et al. 2021).
        """
        check_kind(kind)
        _, _, sxx, _, sxy, syy, _ = self._both()
        return of.procrustes_of(of.nuclear_norm(sxy), sxx.trace().sqrt(), syy.trace().sqrt(), kind)

    def cka(self, estimator: str = "unbiased") -> Tensor:
        """Linear CKA of x and y, see :func:`pyrepr.cka`; with labels the biased estimator only."""
        if estimator not in ("unbiased", "biased"):
            raise ValueError(f"estimator must be 'unbiased' or 'biased', got {shown(estimator)}")
        if estimator == "biased":
            _, _, sxx, _, sxy, syy, _ = self._both()
            return sxy.square().sum() / (sxx.norm() * syy.norm())
        if self.classes is not None:
            raise ValueError("estimator must be 'biased' with classes: labels keep no moments of fourth order")
        self._both(least=4)
        table = self._layers.hsic("unbiased")
        return table[0, 1] / (table[0, 0].sqrt() * table[1, 1].sqrt())

    # Inside

    def _of_classes(self) -> ClassSums:
        if self.classes is None:
            raise ValueError("class statistics need Moments(classes=…)")
        if self._labelled is None:
            raise ValueError("moments need at least one update, got none")
        return self._labelled

    def _scatter(self, least: int = 1) -> tuple[int, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """n, mean of x, Σ x xᵀ; and, if there is a y, its mean, Σ x yᵀ and Σ y yᵀ: sums around the means."""
        if self.samples < max(1, least):
            raise ValueError(f"moments need at least {max(1, least)} samples for this, got {self.samples}")
        if self.classes is None:
            state = self._layers.centred()
            n = state.n
            blocks = dict(zip(state.blocks.pairs, state.blocks.sums(), strict=True))
            blocks = {pair: b.triu() + b.triu(1).T if pair[0] == pair[1] else b for pair, b in blocks.items()}
            if len(state.widths) == 1:
                return n, state.shift[0], blocks[0, 0], None, None, None
            return n, state.shift[0], blocks[0, 0], state.shift[1], blocks[0, 1], blocks[1, 1]
        sums = self._of_classes()
        n, counts, mean = sums.n, sums.counts, sums.mean()
        deviation = torch.where(counts[:, None] > 0, sums.means() - mean, 0)  # [C, d]
        sxy = (counts[:, None] * deviation).T
        sxx = sums.within() + products_of(sxy, deviation.T)
        return n, mean, sxx, counts / n, sxy, counts.diag() - torch.outer(counts, counts) / n

    def _both(self, least: int = 2) -> of.Scatter:
        n, mean_x, sxx, mean_y, sxy, syy = self._scatter(least)
        if mean_y is None or sxy is None or syy is None:
            raise ValueError("this needs a y in every update, got none")
        return of.Scatter(n, mean_x, sxx, mean_y, sxy, syy)

    def _uneven(self) -> bool:
        """Whether a tenth of the rows of x, or two, make up almost all of their covariance; not known of classes."""
        if self.classes is not None:
            return False
        state = self._layers.centred()
        return bool(state.norm_sums[0].square() < max(2, state.n / 10) * state.norm_products[0, 0])

    def _whitened(self, keep: float | None) -> tuple[Tensor, Tensor]:
        """Λ_x^{-1/2} V_xᵀ S_xy V_y Λ_y^{-1/2}, whose singular values are the canonical correlations; loadings of x."""
        n, _, sxx, _, sxy, syy, _ = self._both()
        x, y = (of.basis(s, keep, of.rounding(n, len(s))) for s in (sxx, syy))
        of.check_samples(n, len(x.values), len(y.values), "CCA")
        return (x.vectors.T @ sxy @ y.vectors) / torch.outer(x.values.sqrt(), y.values.sqrt()), x.loadings


def check_kind(kind: str) -> None:
    """Raises ValueError for a kind of Procrustes that does not exist."""
    if kind not in ("shape", "angular"):
        raise ValueError(f"kind must be 'shape' or 'angular', got {shown(kind)}")


def check_alphas(alphas: object) -> Tensor:
    """λ as [A] float64."""
    try:
        values = torch.as_tensor(alphas, dtype=torch.float64, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"alphas must be a number or numbers, got {type(alphas).__name__}") from None
    if not values.numel() or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"alphas must be finite numbers of at least 0, got {shown(alphas)}")
    return values


def check_labels(name: str, y: object, n: int, classes: int) -> Tensor:
    """[n] int64 labels in [0, classes)."""
    y = check_tensor(name, y, (*INTEGERS, torch.uint8, torch.int8, torch.int16, torch.bool))
    if y.shape != (n,):
        raise ValueError(f"{name} must have shape [n] = [{n}], one label a sample, got {shape_of(y)}")
    if n and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"{name} must hold labels in [0, {classes}), got {int(y.min())} to {int(y.max())}")
    return y.long()


def check_targets(y: object, x: Tensor) -> Tensor:
    """[n, q] finite targets of x: [n, d]."""
    y = check_tensor("y", y)
    if y.dim() not in (1, 2) or y.shape[0] != x.shape[0]:
        raise ValueError(f"y must have shape [n, q] or [n] with n = {x.shape[0]} samples, got {shape_of(y)}")
    check_device("y", y, "x", x)
    return check_finite("y", y[:, None] if y.dim() == 1 else y)


def widened(x: Tensor) -> Tensor:
    """x as its products are made: in float64, but for GPUs and the kernels that they run."""
    return x.double() if at_hand(x) and not triton_interprets() else x


def check_finite(name: str, x: Tensor) -> Tensor:
    """x [n, d], or a ValueError that names the first row that is not finite."""
    total = x.sum(dtype=torch.float32 if x.element_size() < 4 else None)  # 20 times as fast as looking at each
    if not bool(total.isfinite()) and not bool(x.isfinite().all()):
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {row}")
    return x


def _widths(xs: Sequence[Tensor]) -> list[int]:
    return [x.shape[1] for x in xs]


def _loaded(sums: Any, classes: int) -> ClassSums:
    keys = {"shift", "counts", "blocks"}
    if (
        not isinstance(sums, dict)
        or set(sums) != keys
        or not isinstance(sums["shift"], Tensor)
        or sums["shift"].dim() != 2
    ):
        raise ValueError(f"state_dict: sums must hold {', '.join(sorted(keys))}")
    d = sums["shift"].shape[1]
    tensors = [sums["shift"], sums["counts"], *sums["blocks"]]
    shapes = [(classes, d), (classes,), (d, d), (d, classes)]
    if [(getattr(t, "shape", None), getattr(t, "dtype", None)) for t in tensors] != [
        (s, torch.float64) for s in shapes
    ]:
        raise ValueError(f"state_dict: shift, counts and blocks must be float64 of shapes {shapes}")
    shift, counts, *blocks = (t.clone() for t in tensors)
    return ClassSums(shift, counts, Blocks(PAIRS, blocks))
