"""Neural collapse: do features of a class fall together, and means of classes and the classifier line up?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import check_layer, check_tensor, shape_of
from pyrepr.stats._covariances import warn_of_empty_classes
from pyrepr.stats.moments import Moments, check_finite, check_labels


class NeuralCollapse(NamedTuple):
    """The four measures of Papyan et al. (2020), all 0 in full collapse; float64 scalars.

    nc1: tr(Σ_W Σ_B⁺) / C.
    nc2: ‖M Mᵀ/‖M Mᵀ‖ − (I − 11ᵀ/C)/√(C − 1)‖, M the class means minus their mean: how far from a simplex.
    nc3: ‖W/‖W‖ − M/‖M‖‖: how far the classifier is from the means (Frobenius norms); NaN without weight.
    nc4: share of samples that the classifier and the nearest class mean put into different classes; NaN without weight
        or rows.

    Example:
        >>> features, labels = torch.randn(60, 8), torch.arange(60) % 3
        >>> pyrepr.stats.neural_collapse(features, labels).nc1.item() > 0
        True
    """

    nc1: Tensor
    nc2: Tensor
    nc3: Tensor
    nc4: Tensor


def neural_collapse(
    features: Tensor | Moments,  # [n, d]
    labels: Tensor | None = None,  # [n] or [n, C]
    weight: Tensor | None = None,  # [C, d]
    bias: Tensor | None = None,  # [C]
) -> NeuralCollapse:
    """NC1 to NC4 of features and the linear classifier on top.

    Σ_W is the mean over samples of (x − μ_class)(x − μ_class)ᵀ, summed around class means and not as total minus
    between, which would cancel where collapse is interesting. Σ_B is the mean over classes, each counted once, of
    (μ_c − μ_G)(μ_c − μ_G)ᵀ with μ_G the mean of the class means.

    Args:
        features: [n, d] of the last layer; or ``Moments(classes=C)`` of a stream, which give NC1 to NC3.
        labels: [n] integers; or soft, [n, C] ≥ 0 with rows that add up to 1: then means and Σ_W are weighted by them.
        weight, bias: of the classifier, [C, d] and [C]; also the number of classes, else the largest label + 1.

    Raises:
        ValueError, TypeError: one sentence; with fewer than two classes that have samples, too. Classes without samples
            are named in a warning and left out of nc1; nc2 and nc3 are NaN then.

    Example:
        >>> features, labels = torch.randn(60, 8), torch.arange(60) % 3
        >>> pyrepr.stats.neural_collapse(features, labels).nc1.item() > 0
        True
    """
    x = None if isinstance(features, Moments) else check_layer("features", features).detach().double()
    if weight is not None:
        weight = check_finite("weight", check_layer("weight", weight).detach().double())
    elif bias is not None:
        raise ValueError("bias must come with the weight of the classifier, got it alone")
    if isinstance(features, Moments):
        if features.classes is None:
            raise ValueError("features must be Moments(classes=…), got moments without classes")
        counts, means = features.counts, _means_of(features)
        within = features.within
    elif isinstance(labels, Tensor) and labels.dim() == 2:
        soft = _soft(labels, x)
        counts, means, within = _weighted(x, soft)
    else:
        classes = len(weight) if weight is not None else _classes_of(labels)
        check_labels("labels", labels, len(x), classes)
        moments = Moments(max(2, classes)).update(x, labels)
        counts, means, within = moments.counts, _means_of(moments), moments.within
    if weight is not None and weight.shape != means.shape:
        raise ValueError(f"weight must have shape [C, d] = {list(means.shape)}, got {shape_of(weight)}")
    has = counts > 0
    if int(has.sum()) < 2:
        raise ValueError(f"labels must be of at least two classes, got {int(has.sum())}")
    warn_of_empty_classes(counts)
    return NeuralCollapse(_nc1(means[has], within), _nc2(means), _nc3(means, weight), _nc4(x, means, weight, bias))


def _means_of(moments: Moments) -> Tensor:
    return moments._of_classes().means()


def _classes_of(labels: object) -> int:
    labels = check_tensor(
        "labels", labels, (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16, torch.bool)
    )
    if not labels.numel():
        raise ValueError("labels must hold at least one label, got none")
    return int(labels.max()) + 1


def _soft(labels: Tensor, x: Tensor) -> Tensor:
    soft = check_tensor("labels", labels).detach().double()
    if soft.shape[0] != len(x) or soft.shape[1] < 2:
        raise ValueError(f"labels must have shape [n] or [n, C] with n = {len(x)}, got {shape_of(soft)}")
    if not bool((soft >= 0).all()) or not bool(((soft.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError("labels must be ≥ 0 and add up to 1 in every row")
    return soft


def _weighted(x: Tensor, soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_c weights, class means and Σ_W for soft labels."""
    counts, centre = soft.sum(0), x.mean(0)
    means = centre + (soft.T @ (x - centre)) / counts[:, None]
    within = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for c in (counts > 0).nonzero()[:, 0].tolist():
        deviation = x - means[c]
        within += (deviation * soft[:, c : c + 1]).T @ deviation
    return counts, means, within / len(x)


def _centred(means: Tensor) -> Tensor:
    means = means - means[0]  # then rounding is of their distances, however far away they all are
    return means - means.mean(0)


def _nc1(means: Tensor, within: Tensor) -> Tensor:
    m = _centred(means)
    # Σ_B = mᵀ m / C has rank below C: its pseudo-inverse by the singular values of m that are no rounding of means.
    _, values, rows = torch.linalg.svd(m, full_matrices=False)
    values, rows = values[: len(m) - 1], rows[: len(m) - 1]
    keep = values > torch.maximum(values[0], means.abs().max()) * max(m.shape) * torch.finfo(values.dtype).eps
    rows, inverse = rows[keep], len(means) / values[keep].square()
    return ((rows @ within) * rows).sum(1) @ inverse / len(means)


def _nc2(means: Tensor) -> Tensor:
    m, c = _centred(means), len(means)
    gram = m @ m.T
    simplex = torch.eye(c, dtype=m.dtype, device=m.device) - 1 / c
    return (gram / gram.norm() - simplex / (c - 1) ** 0.5).norm()


def _nc3(means: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return means.new_tensor(torch.nan)
    m = _centred(means)
    return (weight / weight.norm() - m / m.norm()).norm()


def _nc4(x: Tensor | None, means: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if x is None or weight is None:
        return means.new_tensor(torch.nan)
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"bias must have shape [C] = [{len(weight)}], got {shape_of(bias)}")
    if bias is not None and not bool(bias.isfinite().all()):
        raise ValueError("bias must be finite, got NaN or infinity")
    chosen = (x @ weight.T + (0 if bias is None else bias.detach().double())).argmax(1)
    centre = means.nanmean(0)
    nearest = torch.cdist(x - centre, means - centre).nan_to_num(torch.inf).argmin(1)
    return (chosen != nearest).double().mean()
