"""Layers of any magnitude, and with rows that dwarf the others.

Statistics are made of float32 products first, which is right for ordinary layers. They say of themselves when it was
not: a norm near the ends of float32's range, a result that is a small difference of large terms (a dominant row, which
centring spreads over all others), a kernel whose values differ by less than its rounding, or all but vanish. Then
everything is done again in float64, on layers that are brought near 1 first, with kernels of which a constant is
subtracted, and a factor taken out, before digits are lost (:func:`careful`). It takes two to three times as long.

Seen on the CPU only, where numbers are at hand: under ``vmap`` entry by entry (`ops/_entries.py`), in a graph by an op
of the whole measure (`_whole.py`), and not on a GPU, whose kernels scale layers by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyrepr.ops._leaf import readable
from pyrepr.ops.gram import LINEAR_NORMS, LOSS, Statistics, constants_of, gram_stats, matrix_op
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import SHIFT_INVARIANT, unit_rows
from pyrepr.similarity._rescaled import NORMS, at_hand, near_one, within
from pyrepr.similarity.kernels import Kernel

# Mean squares of a kernel's entries, of which products are made.
ENTRIES = {torch.float32: (1e-20, 1e20), torch.float64: (1e-150, 1e150)}
CLOSE = 20  # exponents beyond which a kernel of all pairs counts as vanishing
ROWS = 256  # rows of blocks of the inner products that are looked through
TWINS = 1e-5  # of a squared norm: rows whose distance float32 makes of norms, with few digits or none
SIDE = 8  # rows on either side, in order, among which twins are looked for


def suspect(
    spec: Kernel, scale: Tensor, found: Statistics, own: Tensor, size: Tensor, dtype: torch.dtype, biased: bool
) -> bool:
    """Whether statistics may have lost digits that the layers had.

    Args:
        own: [M] self-HSIC as the sum of terms that add up to `size` [M] without their signs.
        dtype: in which products were made.
    """
    n, first = found.d.shape[1], [own, size, found.norms.amax(1), scale]
    if spec.name == "linear":
        return any(_suspect_products(dtype, *row) for row in _rows(first))
    with torch.no_grad():
        entries = found.s.diagonal() + (found.d.square().sum(1) if biased else 0)
        numbers = [*first, entries / n**2, found.shift.abs(), found.norms.median(1).values]
        return any(_suspect(spec.name, dtype, *row) for row in _rows(numbers))


def _rows(columns: Sequence[Tensor]) -> Iterator[tuple[float, ...]]:
    """What vectors hold of layer after layer; cheaper one by one than stacked."""
    return zip(*(column.tolist() for column in columns), strict=True)


def twins(x: Tensor, norms: Tensor) -> bool:
    """Whether rows all but meet, which laplacian notices: its root makes 1e-7 of a squared norm 3e-4 of a distance.

    Looked for where one projection and the norms of both agree, among neighbours in order: what is duplicated often, or
    exactly, is found; a single pair among very many rows may not be, and moves their HSIC by as little.

    Args:
        x: [n, d], in float32 or narrower.
        norms: [n], squared, of the rows around their mean.
    """
    with torch.no_grad():
        n, d = x.shape
        x = x.to(compute_dtype(x.dtype))
        weights = torch.arange(1, d + 1, dtype=torch.float64, device=x.device).square().cos().to(x.dtype)
        along, order = (x * weights).sum(1).sort()
        q = norms[order]
        later = [torch.cat([a, a.new_full((SIDE,), math.inf)])[1:].unfold(0, n, 1) for a in (along, q)]  # [SIDE, n]
        close = (later[0] - along).square() <= 16 * TWINS * q
        step, at = close.logical_and_((later[1] - q).abs() <= 4 * TWINS**0.5 * q).nonzero(as_tuple=True)
        for left, right in zip(order[at].split(1024), order[(at + step + 1).clamp_max(n - 1)].split(1024), strict=True):
            apart = (x[left] - x[right]).square().expand(2, -1, -1).sum(2)[0]
            if bool((apart <= TWINS * norms[left]).any()):
                return True
    return False


def _suspect_products(dtype: torch.dtype, own: float, size: float, largest: float, scale: float) -> bool:
    """A layer under a linear kernel; see :func:`suspect`. `largest` squared norm of its rows."""
    if _nothing(largest, scale):
        return False
    lost = not size * torch.finfo(dtype).eps <= LOSS[dtype] * own
    return lost or not within(largest, LINEAR_NORMS[dtype])


def _nothing(largest: float, scale: float) -> bool:
    """Whether there is nothing to be found, or no number."""
    return largest == 0 or not math.isfinite(largest) or math.isnan(scale) or scale == 0


def _suspect(
    kernel: str,
    dtype: torch.dtype,
    own: float,
    size: float,
    largest: float,
    scale: float,
    entry: float,
    shift: float,
    typical: float,
) -> bool:
    """A layer under another kernel. `typical` squared norm of its rows, mean square of an `entry`."""
    if _nothing(largest, scale):
        return False
    eps, loss = torch.finfo(dtype).eps, LOSS[dtype]
    if not size * eps <= loss * own:
        return True
    if kernel in ("rbf", "laplacian") and eps * typical > loss * scale**2:
        return True  # squared distances are differences of norms
    safe = within(largest, NORMS[dtype]) and within(entry, ENTRIES[dtype])
    return not safe or own < (eps / (10 * loss) * shift) ** 2


def careful(
    xs: Sequence[Tensor], mask: Tensor | None, spec: Kernel, scale: Tensor, biased: bool, split: int, by_features: bool
) -> tuple[Statistics, Tensor]:
    """`gram_stats` of the rows that count, in float64 and of kernels divided by 2^unit; and the units, [M].

    Args:
        scale: [M] as `Kernel.scales` has it.
        biased: whether the diagonal matters.
        by_features: linear and cosine kernel: this route, which loses what the mean row loses.
    """
    if mask is not None:
        rows = mask.nonzero()[:, 0]
        xs = [x.index_select(0, rows) for x in xs]
    if spec.name == "cosine":
        xs = [unit_rows(near_one(x, False)[0]) for x in xs]
    moved = [near_one(x, spec.name != "polynomial") for x in xs]
    layers, exponents = [x for x, _ in moved], [exponent for _, exponent in moved]
    if spec.name in ("linear", "cosine"):
        units = [2.0 * e if spec.name == "linear" else 0.0 for e in exponents]
        if spec.name == "cosine":
            layers = [x * 2.0**e for x, e in moved]
        ones = torch.ones(len(xs), dtype=torch.float64, device=xs[0].device)
        if by_features:
            found = gram_stats(layers, None, constants_of(ones, "linear"), "linear", 1, split, by_features=True)
        else:  # the linear kernel without centring
            found = gram_stats(layers, None, constants_of(ones, "polynomial"), "polynomial", 1, split, centre=False)
        return found, torch.tensor(units, dtype=torch.float64, device=xs[0].device)
    make = _polynomial if spec.name == "polynomial" else _decaying
    made = [make(x.detach(), e, spec, s, biased) for x, e, s in zip(layers, exponents, scale.tolist(), strict=True)]
    table = torch.tensor(made, dtype=torch.float64, device=xs[0].device).T
    found = gram_stats(layers, None, table[:3].contiguous(), spec.name, spec.degree, split, centre=False)
    return found, table[3]


def _polynomial(
    x: Tensor, exponent: int, spec: Kernel, scale: float, biased: bool
) -> tuple[float, float, float, float]:
    """γ, coef0 and base with which the largest of γ⟨x_i, x_j⟩ + coef0 and coef0 is 1, and log₂ of what divides k."""
    low, high = _range_of_dots(x, biased)
    gamma, power = math.frexp(scale)
    coef0, coef0_power = math.frexp(spec.coef0)
    power += 2 * exponent
    terms = [power + math.frexp(z)[1] for z in (low, high) if z] + ([coef0_power] if coef0 else [])
    top = max(terms, default=0)
    gamma, coef0 = math.ldexp(gamma, power - top), math.ldexp(coef0, coef0_power - top)
    largest = max(abs(gamma * low + coef0), abs(gamma * high + coef0), abs(coef0)) or 1.0
    return gamma / largest, coef0 / largest, 1.0, spec.degree * (top + math.log2(largest))


def _decaying(x: Tensor, exponent: int, spec: Kernel, scale: float, biased: bool) -> tuple[float, float, float, float]:
    """σ, offset and base of rbf and laplacian, and log₂ of what divides k.

    Where rows are near each other on the scale of σ, k − 1 is divided by its mean; where all are far, k by its largest.
    """
    sigma = math.ldexp(scale, -exponent) if exponent > -1000 else scale
    squared = 2 * float(x.square().sum()) / max(1, len(x) - 1)  # mean of |x_i − x_j|² if rows add up to 0, else above

    def steps(distance: float) -> float:
        return distance / (2 * sigma**2) if spec.name == "rbf" else math.sqrt(distance) / sigma

    if not 0 < sigma < math.inf:
        return sigma, 0.0, 0.0, 0.0
    mean = steps(squared)
    if 0 < mean < 0.1:
        return sigma, -math.log(mean), 1.0, math.log2(mean)
    nearest = steps(_least_distance(x)) if not biased and mean > CLOSE else 0.0
    if CLOSE < nearest < math.inf:
        return sigma, nearest, 0.0, -nearest * math.log2(math.e)
    return sigma, 0.0, 0.0, 0.0


def _blocks_of_dots(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, inner products of some rows with all of them)."""
    one = torch.ones(1, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), ROWS):
        yield start, matrix_op(x[start : start + ROWS].contiguous(), x, one, "linear", 1, 0.0, False)


def _range_of_dots(x: Tensor, diagonal: bool) -> tuple[float, float]:
    """The smallest and largest of ⟨x_i, x_j⟩, over i ≠ j or with the diagonal."""
    low, high = math.inf, -math.inf
    for start, dots in _blocks_of_dots(x):
        own = dots.diagonal(start)
        if not diagonal:
            own.fill_(torch.nan)
        low = min(low, float(dots.nan_to_num(math.inf).amin()))
        high = max(high, float(dots.nan_to_num(-math.inf).amax()))
    return (low, high) if low <= high else (0.0, 0.0)


def _least_distance(x: Tensor) -> float:
    """The smallest |x_i − x_j|² over i ≠ j."""
    q, least = x.square().sum(1), math.inf
    for start, dots in _blocks_of_dots(x):
        distances = (q[start : start + ROWS, None] + q - 2 * dots).clamp_min_(0)
        distances.diagonal(start).fill_(math.inf)
        least = min(least, float(distances.amin()))
    return least


def careful_matrix(x: Tensor, y: Tensor | None, spec: Kernel, scale: Tensor) -> Tensor | None:
    """The kernel matrix of :func:`pyrepr.gram` in float64, where float32 could not hold what it is made of."""
    if spec.name == "linear" or not at_hand(x) or (y is not None and not readable(y)) or not x.numel():
        return None
    both = (x,) if y is None else (x, y)
    if not _strange(both, spec, float(scale[0])):
        return None
    if spec.name in ("cosine", "polynomial"):
        moved = [near_one(each, False) for each in both]
        layers = [each for each, _ in moved]
        if spec.name == "cosine":
            layers = [unit_rows(each) for each in layers]
            return matrix_op(layers[0], layers[1] if y is not None else None, scale, "linear", 1, 0.0, False)
        factor = scale * 2.0 ** sum(moved[i][1] for i in (0, -1))
        return matrix_op(
            layers[0], layers[1] if y is not None else None, factor, spec.name, spec.degree, spec.coef0, False
        )
    whole, exponent = near_one(torch.cat(both), True)
    layers = whole.split([len(each) for each in both])
    sigma = scale * 2.0**-exponent
    return matrix_op(layers[0], layers[1] if y is not None else None, sigma, spec.name, 1, 0.0, False)


def _strange(both: Sequence[Tensor], spec: Kernel, scale: float) -> bool:
    dtype = compute_dtype(both[0].dtype)
    with torch.no_grad():
        mean = both[0].mean(0, dtype=torch.float64) if spec.name in SHIFT_INVARIANT else 0
        largest = max(float(each.abs().amax()) if each.numel() else 0.0 for each in both)
        some = [each[:: max(1, len(each) // 32)].double() - mean for each in both if len(each)]
        typical = max(float(each.square().sum(1).median()) for each in some)
    if largest == 0 or not math.isfinite(largest) or not 0 < scale < math.inf:
        return False
    if not within(largest**2, NORMS[dtype]):
        return True
    if spec.name == "laplacian" and dtype == torch.float32:
        whole = torch.cat(both).detach()
        if twins(whole, (whole - mean).square().sum(1)):
            return True
    return spec.name in SHIFT_INVARIANT and torch.finfo(dtype).eps * typical > LOSS[dtype] * scale**2
