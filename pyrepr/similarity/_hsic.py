"""The algebra of HSIC and CKA: from the statistics of ``gram_stats`` (pyrepr.ops) to every estimator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrepr.ops._entries import by_entries
from pyrepr.ops._gram_gradient import route_costs
from pyrepr.ops._leaf import readable
from pyrepr.ops.gram import LOSS, Statistics, constants_of, gram_stats, hsic_at_once
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import hsic_terms
from pyrepr.similarity._checks import check_count
from pyrepr.similarity._ranges import careful, suspect, twins
from pyrepr.similarity._rescaled import at_hand
from pyrepr.similarity._whole import whole_op
from pyrepr.similarity.kernels import Kernel


class DegenerateInputWarning(UserWarning):
    """A layer whose samples are all alike: its similarity to anything is undefined, and NaN is returned.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     value = pyrepr.cka(torch.ones(8, 3), torch.randn(8, 3))
        >>> caught[0].category is pyrepr.DegenerateInputWarning, value.isnan().item()
        (True, True)
    """


def _valid_count(xs: Sequence[Tensor], mask: Tensor | None, estimator: str) -> Tensor | int:
    """n, or the number of rows the mask leaves, checked where checking needs no tracing."""
    if mask is None:
        check_count(xs[0].shape[0], estimator)
        return xs[0].shape[0]
    count = mask.sum()
    if readable(count):
        check_count(int(count), estimator, "mask")
    return count.double()


class Table(NamedTuple):
    """HSIC of kernels that were divided by 2^unit."""

    hsic: Tensor  # [M, M] float64
    floor: Tensor  # [M], the largest self-HSIC that may be rounding
    unit: Tensor  # [M]


def scaled_hsic(
    xs: Sequence[Tensor],
    spec: Kernel,
    estimator: str,
    mask: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
    found: Statistics | None = None,
) -> Table:
    """HSIC of every layer with every layer, up to a factor for each of them, of which CKA knows nothing.

    `scales`, [M] float64, are σ or γ of every layer; by default what the kernel chooses for these samples. `found` are
    the layers' statistics, where somebody has them (whose numbers are at hand, and not to be differentiated).
    First in the layers' own arithmetic; where that shows itself not to be enough, again with care (`_ranges.py`).
    """
    if mask is None:
        check_count(xs[0].shape[0], estimator)

    def table(mask: Tensor | None, scales: Tensor | None, *layers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layers[0].is_cpu and not readable(layers[0]):
            return hsic_op(list(layers), mask, scales, *spec.fields(), estimator, split)
        return _table(layers, mask, scales, spec, estimator, split)

    if found is not None:
        return Table(*_table(xs, mask, scales, spec, estimator, split, found))
    hsic, floor, unit = by_entries(table, mask, scales, *xs)
    return Table(hsic, floor, unit)


def _table(
    xs: Sequence[Tensor],
    mask: Tensor | None,
    scales: Tensor | None,
    spec: Kernel,
    estimator: str,
    split: int,
    found: Statistics | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    n = _valid_count(xs, mask, estimator)
    scale = spec.scales(xs, mask) if scales is None else scales
    dtype, biased = compute_dtype(xs[0].dtype), estimator == "biased"
    if found is None:
        found = gram_stats(xs, mask, constants_of(scale, spec.name, spec.coef0), spec.name, spec.degree, split)
    (hsic, size), unit = hsic_terms(found.s, found.r, found.d, n, estimator), torch.zeros_like(found.shift)
    if at_hand(found.s) and (
        suspect(spec, scale, found, hsic.diagonal(), size, dtype, biased)
        or (spec.name == "laplacian" and dtype == torch.float32 and _any_twins(xs, mask, found.norms))
    ):
        # How much larger terms may be than what they add up to.
        most = min(1e8, LOSS[dtype] / torch.finfo(torch.float64).eps)
        dtype = torch.float64
        gram, features = route_costs(xs[0].shape[0], [x.shape[1] for x in xs], split)
        for by_features in (True, False) if features < gram and spec.name in ("linear", "cosine") else (False,):
            found, unit = careful(xs, mask, spec, scale, biased, split, by_features)
            hsic, size = hsic_terms(found.s, found.r, found.d, found.d.shape[1], estimator)
            if bool((size <= most * hsic.diagonal()).all()):
                break
    eps = torch.finfo(dtype).eps
    if spec.name == "linear":
        return hsic, 8 * eps * size, unit
    # Kernels that are not shift-invariant leave rounding errors of their mean value behind, and differences theirs.
    # Rows divided by their norms come with those of a value of 1.
    value = torch.ones_like(found.shift) if spec.name == "cosine" else found.shift
    return hsic, torch.maximum((8 * eps * value).square(), 8 * eps * size), unit


def _any_twins(xs: Sequence[Tensor], mask: Tensor | None, norms: Tensor) -> bool:
    if mask is not None:
        xs, norms = [x[mask] for x in xs], norms[:, mask]
    return any(twins(x, q) for x, q in zip(xs, norms, strict=True))


def _table_fake(xs, mask, scales, *constants):
    return tuple(xs[0].new_empty((len(xs),) * axes, dtype=torch.float64) for axes in (2, 1, 1))


hsic_op = whole_op(
    "gram_hsic",
    "str estimator, int split",
    "(Tensor, Tensor, Tensor)",
    _table_fake,
    lambda xs, mask, scales, *constants: _table(xs, mask, scales, Kernel(*constants[:-2]), *constants[-2:]),
)


def hsic_table(
    xs: Sequence[Tensor],
    spec: Kernel,
    estimator: str,
    mask: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """HSIC of every layer with every layer, [M, M] float64, and the largest self-HSIC that may be rounding, [M]."""
    hsic, floor, unit = scaled_hsic(xs, spec, estimator, mask, split, scales)
    half = torch.exp2((unit[:, None] + unit) / 2)  # twice, so that nothing overflows on the way
    return hsic * half * half, floor * half.diagonal() * half.diagonal()


def out_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    return compute_dtype(xs[0].dtype)


def normalise(cross: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """CKA from HSIC: cross [Lx, Ly], left [Lx], right [Ly]. Two roots: their product cannot overflow."""
    return cross / (left.sqrt()[:, None] * right.sqrt()[None, :])


def warn_if_degenerate(own: Tensor, floor: Tensor, names: Sequence[str]) -> Tensor:
    """Self-HSIC that is no more than rounding becomes NaN, with a warning that names the layer."""
    degenerate = own <= floor
    _warn(degenerate, names)
    return torch.where(degenerate, torch.nan, own)


def values_at_once(
    xs: Sequence[Tensor], spec: Kernel, estimator: str, split: int, names: Sequence[str] | None
) -> Tensor | None:
    """CKA of named layers, or HSIC, [M, M], where one call goes from layers to values (`ops.gram.hsic_at_once`)."""
    if spec.name != "linear":
        return None
    check_count(xs[0].shape[0], estimator)
    found = hsic_at_once(xs, estimator, split, names is not None)
    if found is None:
        return None
    values, alike = found
    if names is not None and alike is not None:
        _warn(alike, names)
    return values


def _warn(degenerate: Tensor, names: Sequence[str]) -> None:
    if degenerate.device.type == "cpu" and readable(degenerate) and degenerate.any():
        which = ", ".join(name for name, bad in zip(names, degenerate.tolist(), strict=True) if bad)
        warnings.warn(
            f"{which}: all samples have the same features, or what sets them apart is no more than rounding errors, so "
            "CKA is undefined; returning NaN",
            DegenerateInputWarning,
            stacklevel=5,
        )
