"""Family `pairs` in Triton: the leaf ops of ``pyrepr/ops/pairs.py`` on the GPU; the n × m matrix is never in memory.

Sums are in one order, without atomics: the same bits every time. Products of float32 operands are taken as three
products of their halves on the tensor cores (``tf32x3``), about float32's accuracy; of 16-bit operands as they are,
summed in float32. float64 is refused. Work and bytes at best, s being the bytes of an element:

- logsumexp: 2 n m d flops for the rows, as many for the columns, which are the same sweep with x and y exchanged. A
  block of rows stays, blocks of columns pass by out of L2; max and sum of every prefix are in registers. Prefixes cut
  the loop over features, so that one product serves them all. The positive is kept out of the sum (r and gaps are made
  of both), its logit is the tile's own. Where rows share a positive, `tags` adds up their logits: n² comparisons.
- logsumexp_backward: 6 n m d. The logits of a slab of columns are computed again and stored as coefficients, 4 bytes
  (2 for bfloat16) an entry, SLAB_BYTES in all; both gradients are products with the slab. Two sweeps that keep their
  gradient on the chip would need 8 n m d, and chips that hold d numbers a row.
- topk: 2 n m d for candidates: a block of rows keeps KEPT of its scores as sorted numbers, columns among splits where
  rows are few. Their scores are computed again in float64, and rounded once. With ε a bound on what the first scores
  are wrong by, a row is sure if its k-th is above the least candidate's first score plus ε: no column left out can
  reach it. All columns of the other rows (ties, mostly) are scored in float64, by a launch in which a sure row's
  program ends at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from pyrepr.kernels import _launch
from pyrepr.kernels._launch import F32, FLOATS, Config, Variant, architecture
from pyrepr.kernels.pairs import _variants as table
from torch import Tensor

from pyrepr.backend import Unsupported
from pyrepr.reference.pairs import METRICS

# Features are padded to this, so that no loop over them needs a mask.
FEATURES = 64
# A tile's last row counts 32 bits from its first.
MOST_STRIDE = 1 << 23
# Rows and columns are counted in 32 bits.
MOST_ROWS = 1 << 30
SLAB_BYTES = 64 << 20
# Programs to aim for, two on every multiprocessor of an A100, H100, B200. Not asked of the device, so that two devices
# of a kind give the same bits.
PROGRAMS = {80: 216, 90: 264, 100: 296}


def _launch_with(variant: Variant, grid: tuple[int, ...], possible: dict[str, Any], device: torch.device) -> None:
    """Launches with those of the `possible` arguments that the variant takes at run time."""
    _launch.launch(variant, grid, {name: possible[name] for name in variant.signature}, device)


def _refuse(x: Tensor, y: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise Unsupported(f"backend 'triton' computes pairs in float32 and refuses {x.dtype} tensors")
    if max(x.shape[0], y.shape[0]) > MOST_ROWS:
        raise Unsupported(f"backend 'triton' takes up to {MOST_ROWS} rows, got {x.shape[0]} and {y.shape[0]}")


def _dense(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    x = x.to(dtype or x.dtype).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


class Packed:
    """Rows as the kernels read them: those of x where they lie right, else a copy with every prefix filled up."""

    def __init__(self, x: Tensor, prefixes: Sequence[int]) -> None:
        self.n, self.device = x.shape[0], x.device
        ends = [0]
        self.pieces = []  # (first feature, end, place in a packed row)
        for start, stop in itertools.pairwise([0, *prefixes]):
            self.pieces.append((start, stop, ends[-1]))
            ends.append(ends[-1] + triton.cdiv(stop - start, FEATURES) * FEATURES)
        self.stops, self.width = ends[1:], ends[-1]
        whole = all(stop % FEATURES == 0 for stop in prefixes) and x.stride(1) == 1 and x.data_ptr() % 16 == 0
        if whole and x.stride(0) % 16 == 0 and self.width <= x.stride(0) < MOST_STRIDE:
            self.data = x
        else:
            if self.width >= MOST_STRIDE:
                raise Unsupported(f"backend 'triton' takes rows of up to {MOST_STRIDE} features, got {self.width}")
            self.data = x.new_zeros(self.n, self.width)
            for start, stop, place in self.pieces:
                self.data[:, place : place + stop - start] = x[:, start:stop]

    @property
    def stride(self) -> int:
        return self.data.stride(0) if self.n else self.width

    def unpacked(self, packed: Tensor, d: int) -> Tensor:
        """[n, d] of [n, width]; features after the last prefix are zeros."""
        out = packed.new_zeros(self.n, d)
        for start, stop, place in self.pieces:
            out[:, start:stop] = packed[:, place : place + stop - start]
        return out


def _inverse_norms(x: Tensor, prefixes: Sequence[int]) -> Tensor:
    """1 / |x_i| of every prefix, 0 for a row of zeros: [P, n] float32."""
    pieces = [x[:, a:b].float().square().sum(1, dtype=torch.float64) for a, b in itertools.pairwise([0, *prefixes])]
    norms = torch.stack(pieces).cumsum(0).sqrt()
    return torch.where(norms == 0, 0, 1 / norms).float()


class Problem:
    """Operands of a group of prefixes, and what logits are made of."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: Tensor, labels: Tensor | None, normalize: bool, prefixes: list[int]
    ):
        self.x, self.y, self.count = Packed(x, prefixes), Packed(y, prefixes), len(prefixes)
        self.n, self.m, self.device, self.dtype = x.shape[0], y.shape[0], x.device, x.dtype
        self.inverse = [_inverse_norms(t, prefixes) if normalize else None for t in (x, y)]
        ones = [
            torch.ones(self.count, len(t), device=x.device) if i is None else i
            for t, i in zip((x, y), self.inverse, strict=True)
        ]
        self.row_factors, self.column_factors = ones[0] * scale.to(F32), ones[1]
        self.stops = _on_device(tuple(self.x.stops), x.device)
        self.labels = self.new(self.n, dtype=torch.int64).fill_(-1) if labels is None else _dense(labels)
        self.numbers = torch.arange(self.m, device=x.device)
        self.room = next(room for room in table.COUNTS if room >= self.count)

    def new(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def turned(self) -> Problem:
        """The same with rows and columns exchanged."""
        other = object.__new__(Problem)
        vars(other).update(vars(self), x=self.y, y=self.x, n=self.m, m=self.n)
        vars(other).update(row_factors=self.column_factors, column_factors=self.row_factors)
        vars(other).update(labels=self.numbers, numbers=self.labels)
        return other

    def sweep(self, positive: Tensor, by_column: bool, kept: Tensor | None = None) -> Tensor:
        """log Σ e^s over the columns that are not a row's positive, [P, n]; writes the positives' logits."""
        config_table = table.logsumexp_table(self.dtype, self.room, kept is not None)
        arguments = {
            **dict(x=self.x.data, y=self.y.data, stops=self.stops, x_stride=self.x.stride, y_stride=self.y.stride),
            **dict(row_factors=self.row_factors, column_factors=self.column_factors),
            **dict(row_tags=self.labels, column_tags=self.numbers, positive=positive, positives=positive.shape[1]),
            **dict(n=self.n, m=self.m, count=self.count, by_column=int(by_column)),
            **dict(kept=positive if kept is None else kept),
        }

        def run(config: Config) -> Tensor:
            part, splits = _split(self.n, self.m, config, self.device)
            others = self.new(splits, self.count, self.n)
            variant = table.logsumexp_variant(config, self.dtype, self.room, kept is not None)
            grid = (triton.cdiv(self.n, config.blocks["BM"]), splits)
            _launch_with(variant, grid, {**arguments, "others": others, "part": part}, self.device)
            return others[0] if splits == 1 else others.logsumexp(0)

        return config_table.run(self.device, run, (self.n, self.m))

    def of_tag(self, row_tags: Tensor, values: Tensor, apart: bool) -> Tensor:
        """log Σ e^value of the rows with a tag as their label, [P, len(row_tags)]; `apart`: without a row itself."""
        out = self.new(self.count, len(row_tags))
        arguments = {"row_tags": row_tags, "column_tags": self.labels, "values": values, "out": out}
        arguments |= {"n": len(row_tags), "m": self.n, "apart": int(apart)}
        grid = (triton.cdiv(len(row_tags), table.TAGS.blocks["BM"]), self.count)
        _launch_with(table.tags_variant(), grid, arguments, self.device)
        return out


@functools.lru_cache(maxsize=64)
def _table_on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A small table on the device, made once: copying it again would synchronise, and not go into a CUDA graph."""
    found = _table_on_device(numbers, device)
    if found.is_cuda:  # its memory is not used again before this stream is done, whichever stream it was made on
        found.record_stream(torch.cuda.current_stream(device))
    return found


def _split(n: int, m: int, config: Config, device: torch.device) -> tuple[int, int]:
    """(columns in a split, splits) that fill the GPU."""
    blocks, steps = triton.cdiv(n, config.blocks["BM"]), triton.cdiv(m, config.blocks["BN"])
    splits = max(1, min(steps, PROGRAMS[architecture(device)] // max(1, blocks)))
    part = triton.cdiv(max(1, steps), splits)
    return part * config.blocks["BN"], max(1, triton.cdiv(steps, part))


def _groups(prefixes: Sequence[int]) -> list[slice]:
    most = max(table.COUNTS)
    return [slice(first, first + most) for first in range(0, len(prefixes), most)]


def logsumexp(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    labels: Tensor | None,  # [n] int64
    normalize: bool,
    prefixes: list[int],
    rows: bool,
    columns: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The leaf op pairs_logsumexp."""
    _refuse(x, y)
    parts = [
        _logsumexp(Problem(x, y, scale, labels, normalize, prefixes[g]), labels is not None, rows, columns, keep)
        for g in _groups(prefixes)
    ]
    none = x.new_empty(0, dtype=F32)
    found = [torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
    return found[0], found[1], found[2], found[3], found[4] if keep else none


def _logsumexp(p: Problem, has_positive: bool, rows: bool, columns: bool, keep: bool) -> tuple[Tensor, ...]:
    positive = p.new(p.count, p.n)
    none = p.new(p.count, 0)
    r = c = row_gaps = column_gaps = none
    kept = p.new(p.count, p.n, p.m) if keep else None
    if rows or keep:
        others = p.sweep(positive, False, kept)
        r = others if rows else none
        if has_positive and rows:
            row_gaps = torch.logaddexp(others - positive, others.new_zeros(()))
            r = torch.logaddexp(others, positive)
    if columns:
        c = others = p.turned().sweep(positive, True)
        if has_positive:
            c = torch.logaddexp(others, p.of_tag(p.numbers, positive, False))
            others = torch.logaddexp(others[:, p.labels], p.of_tag(p.labels, positive, True))
            column_gaps = torch.logaddexp(others - positive, others.new_zeros(()))
    return r, c, row_gaps, column_gaps, none if kept is None else kept


def logsumexp_backward(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: Tensor,  # []
    labels: Tensor | None,  # [n] int64
    normalize: bool,
    prefixes: list[int],
    r: Tensor,  # [P, n] or [P, 0]
    c: Tensor,  # [P, m] or [P, 0]
    kept: Tensor,  # [P, n, m] or [0]
    row_weights: Tensor,  # as r
    column_weights: Tensor,  # as c
    positive_weights: Tensor | None,  # [P, n]
) -> tuple[Tensor, Tensor, Tensor]:
    """The leaf op pairs_logsumexp_backward."""
    _refuse(x, y)
    dx, dy = (torch.zeros(t.shape, device=x.device) for t in (x, y))
    dscale = x.new_zeros((), dtype=torch.float64)
    if x.shape[0] and y.shape[0]:
        for group in _groups(prefixes):
            p = Problem(x, y, scale, labels, normalize, prefixes[group])
            sums = [r, row_weights, c, column_weights, positive_weights]
            of_group = [None if t is None or not t.numel() else _dense(t[group], F32) for t in sums]
            left, right, terms, column_terms = _gradients(
                p, of_group, _dense(kept[group], F32) if kept.numel() else None
            )
            for total, part, inverse, own, t in (
                (dx, left, p.inverse[0], p.x, terms),
                (dy, right, p.inverse[1], p.y, column_terms),
            ):
                total += own.unpacked(part if inverse is None else _through_norm(part, own, inverse, t), x.shape[1])
            dscale += terms.sum(dtype=torch.float64) / scale
    return dx.to(x.dtype), dy.to(y.dtype), dscale.to(F32)


def _through_norm(grad: Tensor, own: Packed, inverse: Tensor, terms: Tensor) -> Tensor:
    """What is left of the gradient in unit rows: x_i Σ_{prefixes with a feature} t_i / |x_i|² is taken off."""
    off = (terms * inverse.square()).flip(0).cumsum(0).flip(0)  # [P, n]
    for number, (start, stop) in enumerate(itertools.pairwise([0, *own.stops])):
        grad[:, start:stop] -= off[number, :, None] * own.data[:, start:stop]
    return grad


def _gradients(p: Problem, sums: list[Tensor | None], kept: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of packed x and y in float32, without what goes through norms, and Σ dS s of rows and columns."""
    r, row_weights, c, column_weights, positive_weights = sums
    none = p.row_factors
    slab_type = table.slab_dtype(p.dtype)
    arguments = {
        **dict(x=p.x.data, y=p.y.data, stops=p.stops, x_stride=p.x.stride, y_stride=p.y.stride, labels=p.labels),
        **dict(row_factors=p.row_factors, column_factors=p.column_factors, n=p.n, m=p.m, count=p.count),
        **dict(row_sums=none if r is None else r, row_weights=none if r is None else row_weights),
        **dict(column_sums=none if c is None else c, column_weights=none if c is None else column_weights),
        **dict(positive_weights=none if positive_weights is None else positive_weights),
        **dict(kept=none if kept is None else kept),
        **dict(has_rows=int(r is not None), has_columns=int(c is not None)),
        **dict(has_positive=int(positive_weights is not None)),
    }

    def run(config: Config) -> tuple[Tensor, ...]:
        bm, bn = config.blocks["BM"], config.blocks["BN"]
        dx, dy = p.new(p.n, p.x.width), p.new(p.m, p.y.width)
        row_terms = p.new(triton.cdiv(p.m, bn), p.count, p.n)
        column_terms = p.new(triton.cdiv(p.n, bm), p.count, p.m)
        most = SLAB_BYTES // (p.count * p.n * slab_type.itemsize) // 128 * 128
        width = min(max(most, 128), triton.cdiv(p.m, 128) * 128)
        slab = p.new(p.count, p.n, width, dtype=slab_type)
        outputs = {"slab": slab, "row_terms": row_terms, "column_terms": column_terms, "width": width}
        variant = table.weights_variant(config, p.dtype, p.room, kept is not None)
        for first in range(0, p.m, width):
            last = min(p.m, first + width)
            grid = (triton.cdiv(p.n, bm), triton.cdiv(last - first, bn))
            _launch_with(variant, grid, {**arguments, **outputs, "first": first, "last": last}, p.device)
            for number, (start, stop) in enumerate(itertools.pairwise([0, *p.x.stops])):
                z = p.y.data[first:last, start:stop]
                _product(slab[number], z, p.y.stride, dx[:, start:stop], p.dtype, add=first > 0)
                _product(
                    slab[number], p.x.data[:, start:stop], p.x.stride, dy[first:last, start:stop], p.dtype, turned=True
                )
        return dx, dy, row_terms.sum(0), column_terms.sum(0)

    return table.weights_table(p.dtype, p.room, kept is not None).run(p.device, run, (p.n, p.m))


def _product(
    weights: Tensor, z: Tensor, z_stride: int, out: Tensor, dtype: torch.dtype, add: bool = False, turned: bool = False
) -> None:
    """out (+)= weights z, or weightsᵀ z. weights: [n, width], z: [inner, features] -> out: [n, features] float32."""
    arguments = {"weights": weights, "z": z, "out": out, "n": out.shape[0], "inner": z.shape[0]}
    arguments |= {"features": z.shape[1], "add": int(add), "z_stride": z_stride}
    arguments |= {"weights_stride": weights.stride(0), "out_stride": out.stride(0)}
    # Written once more, so a search could not repeat it.
    config = table.PRODUCT[table.slab_dtype(dtype).itemsize].rows[architecture(out.device)]
    grid = (triton.cdiv(out.shape[0], config.blocks["BM"]), triton.cdiv(out.shape[1], config.blocks["BN"]))
    _launch_with(table.product_variant(config, dtype, turned), grid, arguments, out.device)


class Screen:
    """What the first scores of a metric are made of, and how far they may be wrong.

    They are factor_j ⟨left_i, right_j⟩ + shift_j, and the metric's own are `unit_i` times that, plus `base_i`. Two
    vectors' product is wrong by at most `relative` times both norms: every operand loses 2⁻²¹ of itself where it is cut
    into halves of 11 bits, whose smallest product is left out, each of d additions 2⁻²³ of a sum no larger than the
    norms' product, and factor, shift, the rounding to float32 and these norms themselves a few 2⁻²⁴; all of it doubled.
    What underflows is below d 2⁻¹²⁰. `error` [n] is the bound in the metric's units, ∞ or NaN where there is none.
    """

    def __init__(self, x: Tensor, y: Tensor, metric: str) -> None:
        self.left, self.right = x, y
        if metric == "sqeuclidean":  # distances stay as they are, and products lose less, around the middle
            centre = y.mean(0, dtype=torch.float64)
            centre = torch.where(centre.isfinite(), centre, 0)
            high = centre.float()
            low = (centre - high).float()
            self.left, self.right = (t.float().sub(high).sub_(low) for t in (x, y))
        d = x.shape[1]
        a, b = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (self.left, self.right))
        ones, none = torch.ones_like(b), torch.zeros_like(b)
        most = torch.cat([b, none.new_zeros(1)]).nan_to_num(0.0, torch.inf).amax()
        relative, tiny = 2.0**-17 + d * 2.0**-22, d * 2.0**-120 * (1 + a + most)
        self.unit, self.base = torch.ones_like(a), torch.zeros_like(a)
        factors, shifts, self.error = ones, none, relative * a * most + tiny
        if metric == "cosine":
            factors = torch.where(b == 0, 0, 1 / b)
            self.unit = torch.where(a == 0, 0, 1 / a)
            largest = torch.cat([factors, none.new_zeros(1)]).nan_to_num(0.0, torch.inf).amax()
            self.error = relative + tiny * largest * self.unit
            self.error = torch.where(largest < 2.0**120, self.error, torch.inf)
        elif metric == "sqeuclidean":
            factors, shifts, self.base = 2 * ones, -b.square(), -a.square()
            self.error = 2 * self.error + 2.0**-20 * (a.square() + most.square())
        self.factors, self.shifts = factors.float(), shifts.float()


def topk(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    k: int,
    metric: str,
    exclude_self: bool,
    return_logsumexp: bool,
    offset: int,
    values: Tensor | None,  # [n, k]
    indices: Tensor | None,  # [n, k]
    logsumexp: Tensor | None,  # [n]
) -> tuple[Tensor, Tensor, Tensor]:
    """The leaf op pairs_topk."""
    _refuse(x, y)
    kept = next((kept for kept in table.KEPT if 5 * k <= 4 * kept), None)
    if kept is None:
        raise Unsupported(f"backend 'triton' takes k up to {4 * max(table.KEPT) // 5}, got {k}")
    if return_logsumexp and metric == "sqeuclidean":
        raise Unsupported("backend 'triton' has no return_logsumexp for metric 'sqeuclidean'")
    best, at = _block(x, y, k, metric, exclude_self, offset, kept)
    if values is not None and indices is not None:
        best = torch.cat([-values if metric == "sqeuclidean" else values, best], 1)
        at = torch.cat([indices, at], 1)
        at, order = at.sort(dim=1, stable=True)  # equal scores stay in the order of their indices
        best, order = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        best, at = best[:, :k].contiguous(), at.gather(1, order)[:, :k].contiguous()
    at = torch.where(best == -torch.inf, -1, at)
    lse = x.new_empty(0, dtype=F32)
    if return_logsumexp:
        lse = _all_scores(x, y, metric, exclude_self, offset)
        lse = lse if logsumexp is None else torch.logaddexp(lse, logsumexp)
    return (-best if metric == "sqeuclidean" else best), at, lse


def _all_scores(x: Tensor, y: Tensor, metric: str, exclude_self: bool, offset: int) -> Tensor:
    """log Σ_j e^score, [n]: an excluded pair is a positive, which the sum leaves out."""
    one = torch.ones((), device=x.device)
    labels = torch.arange(x.shape[0], device=x.device) - offset if exclude_self else None
    p = Problem(x, y, one, labels, metric == "cosine", [x.shape[1]])
    return p.sweep(p.new(1, p.n), False)[0]


def _block(
    x: Tensor, y: Tensor, k: int, metric: str, exclude_self: bool, offset: int, kept: int
) -> tuple[Tensor, Tensor]:
    """Scores [n, k] (larger is nearer) and indices of one block of the database; −∞ where there are fewer."""
    (n, d), m, device = x.shape, y.shape[0], x.device
    screen = Screen(x, y, metric)
    a, b = Packed(screen.left, [d]), Packed(screen.right, [d])
    dtype = screen.left.dtype
    offset_here = max(-MOST_ROWS, min(offset, MOST_ROWS))  # beyond, no pair is a row with itself
    shared = {
        "metric": METRICS.index(metric),
        "exclude": int(exclude_self),
        "offset": offset_here,
        "d": d,
        "n": n,
        "m": m,
    }

    def run(config: Config) -> Tensor:
        part, splits = _split(n, m, config, device)
        keys = torch.empty(n, splits, kept, dtype=torch.int64, device=device)
        arguments = {**shared, "x": a.data, "y": b.data, "x_stride": a.stride, "y_stride": b.stride, "keys": keys}
        arguments |= {"factors": screen.factors, "shifts": screen.shifts, "width": a.width, "part": part}
        grid = (triton.cdiv(n, config.blocks["BM"]), splits)
        _launch_with(table.screen_variant(config, dtype, kept), grid, arguments, device)
        return keys

    keys = table.SCREEN[dtype.itemsize, kept].run(device, run, (n, m))
    splits, chunks = keys.shape[1], keys.shape[1] * kept // table.CHUNK
    least = torch.empty(n, chunks, dtype=F32, device=device)
    arguments = {**shared, "x": _dense(x), "y": _dense(y), "keys": keys, "least": least, "chunks": chunks}
    _launch_with(table.rescore_variant(x.dtype), (n, chunks), arguments, device)
    # No column that was left out has a better score than this.
    bound = least.view(n, splits, -1).amin(2).amax(1).double()
    kth = _decoded(keys.view(n, -1).topk(min(k, splits * kept), 1).values[:, -1])[0].double()
    sure = (bound == -torch.inf) | (kth > screen.unit * bound + screen.base + screen.error)
    arguments |= {"sure": sure & screen.error.isfinite(), "splits": splits}
    _launch_with(table.exact_variant(x.dtype, kept), (n,), arguments, device)
    best, at = _decoded(keys.view(n, -1).topk(k, 1).values)
    return best, at + offset


def _decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and columns of keys, as ``_shared.as_key`` made them."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(F32), 0x7FFFFFFF - (keys & 0x7FFFFFFF)
