"""Moments of several layers and of pairs of them, over batches: what exact streaming measures are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import check_layers, layer_list, memory, shown
from pyrepr.backend import triton_interprets
from pyrepr.ops._gram_gradient import layer_pairs
from pyrepr.ops._leaf import at_hand
from pyrepr.ops.moments import products_of
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.stats._blocks import Blocks
from pyrepr.stats._robust import dominated, robust_centre

# Squared norms between which products of float32 products are safe.
NORMS = (1e-10, 1e12)
ROUNDING = 64  # units of float64 in which terms that should cancel may differ


@dataclass(frozen=True)
class Sums:
    """Sums over samples around a shift, in float64; the rows x are those of the layers minus their shifts.

    Together they give every covariance and, by q = |x|², the terms of fourth order that unbiased HSIC needs.
    """

    widths: tuple[int, ...]
    split: int  # layers from here on are the other network's; 0: there is one
    n: int
    shift: list[Tensor]  # [d_l] each
    blocks: Blocks  # Σ x_aᵀ x_b
    sums: list[Tensor]  # [d_l] each, Σ x
    norm_sums: Tensor  # [M], Σ q_a
    norm_products: Tensor  # [M, M], Σ q_a q_b
    norm_rows: list[Tensor]  # [M, d_b] each, Σ q_a x_b

    def plus(self, other: Sums, sign: int = 1) -> Sums:
        """The sums of both; they must have one shift. With sign −1 the sums without the other's samples."""
        add: Callable[[Tensor, Tensor], Tensor] = torch.add if sign > 0 else torch.sub
        return replace(
            self,
            n=self.n + sign * other.n,
            blocks=self.blocks.map(add, other.blocks.sums()),
            sums=[add(a, b) for a, b in zip(self.sums, other.sums, strict=True)],
            norm_sums=add(self.norm_sums, other.norm_sums),
            norm_products=add(self.norm_products, other.norm_products),
            norm_rows=[add(a, b) for a, b in zip(self.norm_rows, other.norm_rows, strict=True)],
        )

    def moved(self, shift: Sequence[Tensor], kept: Callable[[Tensor], Tensor] | None = None) -> Sums:
        """The same moments around another shift: x ↦ x + e with e the old shift minus the new one, expanded.

        `kept`: what becomes of each block in turn, where the blocks themselves are not needed a second time.
        """
        n, sums, t, products, rows = self.n, self.sums, self.norm_sums, self.norm_products, self.norm_rows
        e = [old - new for old, new in zip(self.shift, shift, strict=True)]
        ee = torch.stack([inner(v, v) for v in e])
        es = torch.stack([inner(v, s) for v, s in zip(e, sums, strict=True)])
        new_t = t + 2 * es + n * ee
        new_products, new_rows, new_blocks = products.clone(), [r.clone() for r in rows], []
        for (a, b), block in zip(self.blocks.pairs, self.blocks.sums(), strict=True):
            whole = whole_block(block) if a == b else block
            left, right = products_of(e[a][None], whole.T)[0], products_of(whole, e[b][None])[:, 0]
            new_products[a, b] = new_products[b, a] = (
                products[a, b]
                + 2 * (inner(rows[b][a], e[b]) + inner(rows[a][b], e[a]))
                + ee[b] * t[a]
                + ee[a] * t[b]
                + 4 * inner(e[a], right)
                + 2 * (ee[b] * es[a] + ee[a] * es[b])
                + n * ee[a] * ee[b]
            )
            new_rows[b][a] = rows[b][a] + 2 * left + ee[a] * sums[b] + new_t[a] * e[b]
            new_rows[a][b] = rows[a][b] + 2 * right + ee[b] * sums[a] + new_t[b] * e[a]
            moved = torch.addr(whole, sums[a], e[b])
            moved.addr_(e[a], sums[b]).addr_(e[a], e[b], alpha=n)
            new_blocks.append(kept(moved) if kept else moved)
        return replace(
            self,
            shift=list(shift),
            blocks=Blocks(self.blocks.pairs, new_blocks),
            sums=[s + n * v for s, v in zip(sums, e, strict=True)],
            norm_sums=new_t,
            norm_products=new_products,
            norm_rows=new_rows,
        )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of vectors."""
    return products_of(a[None], b[None])[0, 0]


def whole_block(block: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle this is."""
    return block.triu() + block.triu(1).T


class LayerMoments:
    """Sums over samples from which all covariances of layers, and their CKA, follow exactly.

    Fed batch by batch, mergeable, subtractable; however the samples were cut, the result is that of all at once. Kept
    are X_aᵀX_b for every pair of layers that is compared, around a provisional mean, and a few vectors, in float64:
    8·Σ d_a d_b bytes, independent of the number of samples, and the last batches of up to 1024 rows. An update
    computes everything, then commits: an exception at any point leaves the moments as they were.

    Example:
        >>> moments = pyrepr.stats.LayerMoments()
        >>> moments = moments.update([torch.randn(100, 4), torch.randn(100, 6)])
        >>> pyrepr.similarity.CKA().of_moments(moments).shape
        torch.Size([2, 2])
    """

    def __init__(self) -> None:
        self._state: Sums | None = None

    @property
    def samples(self) -> int:
        """How many samples have been seen."""
        return self._state.n if self._state else 0

    @property
    def widths(self) -> list[int]:
        """Features of every layer; empty before the first update."""
        return list(self._state.widths) if self._state else []

    @property
    def split(self) -> int:
        """Number of layers of the first network; 0 where there is one network, compared with itself."""
        return self._state.split if self._state else 0

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor] | Tensor, ys: Sequence[Tensor] | Tensor | None = None) -> LayerMoments:
        """Adds a batch: the same layers in the same order every time, row i of all of them one sample.

        Args:
            xs: layers [n, d_l] of one network, as a list or a tensor [L, n, d]; n may differ between calls.
            ys: layers of the other network for the same n samples; ``None``: pairs are those of xs with itself.

        Raises:
            ValueError, TypeError: also if the number or widths of layers differ from the first call; nothing is added.
            MemoryError: if the moments cannot fit into this machine's memory.
        """
        self.add(*checked_layers(xs, ys, self.widths, self.split))
        return self

    def add(self, layers: list[Tensor], split: int) -> None:
        """:meth:`update` with layers that :func:`checked_layers` has seen."""
        if layers[0].shape[0] == 0:
            return
        state = self._state or _empty(layers, split)
        centred = [(x.double() - s).to(compute_dtype(x.dtype)) for x, s in zip(layers, state.shift, strict=True)]
        wide = [x.double() for x in centred]
        q = torch.stack([x.square().sum(1) for x in wide])  # [M, n] squared norms
        if _needs_double(q, centred):
            centred = wide = [x.double() - s for x, s in zip(layers, state.shift, strict=True)]
            q = torch.stack([x.square().sum(1) for x in wide])
        products, rows = products_of(q, q), [products_of(q, x.T) for x in wide]
        self._state = replace(
            state,
            n=state.n + layers[0].shape[0],
            blocks=state.blocks.plus(centred),
            sums=[s + x.sum(0) for s, x in zip(state.sums, wide, strict=True)],
            norm_sums=state.norm_sums + q.sum(1),
            norm_products=state.norm_products + products,
            norm_rows=[r + new for r, new in zip(state.norm_rows, rows, strict=True)],
        )

    def centred(self, kept: Callable[[Tensor], Tensor] | None = None) -> Sums:
        """The sums around the mean; `kept` as of :meth:`Sums.moved`.

        Raises:
            ValueError: before the first update.
        """
        if self._state is None:
            raise ValueError("moments need at least one update, got none")
        n = self._state.n
        mean = [shift + s / n for shift, s in zip(self._state.shift, self._state.sums, strict=True)]
        return self._state.moved(mean, kept)

    @torch.no_grad()
    def hsic(self, estimator: str = "unbiased") -> Tensor:
        """HSIC (linear kernel) of every pair of layers that is compared, [M, M] float64, NaN elsewhere.

        The formulas are those of :func:`pyrepr.hsic`: with S = ‖X_aᵀX_b‖², biased S / (n−1)²; unbiased
        [S − n/(n−2) Σ q_a q_b + Σq_a Σq_b / ((n−1)(n−2))] / (n(n−3)).
        """
        return self.hsic_and_floor(estimator)[0]

    def hsic_and_floor(self, estimator: str) -> tuple[Tensor, Tensor]:
        """:meth:`hsic`, and the largest self-HSIC that may be rounding errors of its terms, [M]."""
        state = self.centred(lambda block: block.square().sum(0).sum())
        n = state.n
        table = torch.full_like(state.norm_products, torch.nan)
        for (a, b), size in zip(state.blocks.pairs, state.blocks.sums(), strict=True):
            table[a, b] = table[b, a] = size
        if estimator == "biased":
            return table / (n - 1) ** 2, torch.zeros_like(state.norm_sums)
        alike = n / (n - 2) * state.norm_products
        squares = torch.outer(state.norm_sums, state.norm_sums) / ((n - 1) * (n - 2))
        size = (table + alike + squares).diagonal()
        floor = ROUNDING * torch.finfo(torch.float64).eps * size
        return (table - alike + squares) / (n * (n - 3)), floor / (n * (n - 3))

    @torch.no_grad()
    def merge(self, other: LayerMoments) -> LayerMoments:
        """Adds the samples that the other has seen (another shard of the data); `other` is not changed.

        Raises:
            ValueError: if its layers have other widths.
        """
        self._state = self._combined(other, 1)
        return self

    @torch.no_grad()
    def __sub__(self, other: LayerMoments) -> LayerMoments:
        """The moments without the samples of `other`, all of which must be among these: total − fold = the rest."""
        if not isinstance(other, LayerMoments):
            return NotImplemented
        if other.samples > self.samples:
            raise ValueError(f"other must hold some of the {self.samples} samples, got {other.samples}")
        rest = type(self)()
        rest._state = self._combined(other, -1)
        return rest

    def _combined(self, other: LayerMoments, sign: int) -> Sums | None:
        if not isinstance(other, LayerMoments):
            raise TypeError(f"other must be a {type(self).__name__}, got {type(other).__name__}")
        one, two = self._state, other._state
        if one is None or two is None:
            return one or two
        if (one.widths, one.split) != (two.widths, two.split):
            raise ValueError(
                f"other must have layers of widths {layout(self.widths, self.split)}, "
                f"got {layout(other.widths, other.split)}"
            )
        return one.plus(two.moved(one.shift), sign)

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> LayerMoments:
        """Adds up the moments of all processes of a ``torch.distributed`` group; afterwards all hold the whole.

        Every process must call it; one that has seen no sample yet takes part. Tensors stay on their device, so use
        a backend that can reduce there (gloo for the CPU, nccl for CUDA).
        """
        from torch import distributed

        state = self._state
        layouts: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(layouts, state and (state.widths, state.split), group=group)
        filled = [rank for rank, found in enumerate(layouts) if found is not None]
        if not filled:
            return self
        if any(layouts[rank] != layouts[filled[0]] for rank in filled):
            raise ValueError(f"all processes must stream the same layers, got {layouts}")
        first = [state.shift if state and distributed.get_rank(group) == filled[0] else None]
        distributed.broadcast_object_list(first, group=group, group_src=filled[0])
        shift = first[0]
        assert shift is not None
        total = _zeros(*layouts[filled[0]], shift)
        if state:
            total = total.plus(state.moved(shift))
        count = total.norm_sums.new_tensor(total.n, dtype=torch.int64)
        for tensor in (count, *_tensors(total)):
            distributed.all_reduce(tensor, group=group)
        self._state = replace(total, n=int(count))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or elsewhere: tensors and numbers; ``torch.save`` takes it."""
        state: dict[str, Any] = {}
        if self._state:
            for field in fields(Sums)[2:]:
                value = getattr(self._state, field.name)
                value = value.sums() if isinstance(value, Blocks) else value
                state[field.name] = [t.clone() for t in value] if isinstance(value, list) else value
        return {"widths": self.widths, "split": self.split, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is not such a dict, or its tensors do not fit together; nothing is changed.
        """
        self._state = loaded(state_dict, type(self).__name__)


def _needs_double(q: Tensor, centred: list[Tensor]) -> bool:
    """Whether sums of products in the layers' dtype would lose a batch: its squared norms q [M, n] are out of range, a
    row dwarfs all others together, or the rows are far from where they were centred, and near each other."""
    if centred[0].dtype == torch.float64 or not at_hand(q) or triton_interprets() or not q.shape[1]:
        return False
    means = torch.stack([(x.sum(0, dtype=torch.float64) / len(x)).square().sum() for x in centred])
    rows = torch.stack([q.amax(1), q.mean(1), means], 1).tolist()
    if dominated(q) or any(apart > 0.9 * typical > 0 for _, typical, apart in rows):
        return True
    return any(0 < value < math.inf and not NORMS[0] <= value <= NORMS[1] for value, *_ in rows)


def checked_layers(xs: Any, ys: Any, widths: list[int], split: int) -> tuple[list[Tensor], int]:
    """All layers of a batch and where the second network's begin; `widths` and `split` are those of earlier batches."""
    names, layers = layer_list("xs", xs)
    new_split = 0
    if ys is not None:
        new_split = len(layers)
        more_names, more = layer_list("ys", ys)
        names, layers = names + more_names, layers + more
    layers = check_layers(names, layers)
    new = [x.shape[1] for x in layers]
    if widths and (new, new_split) != (widths, split):
        raise ValueError(
            f"xs and ys must have the layers of the first update, widths {layout(widths, split)}, "
            f"got {layout(new, new_split)}"
        )
    return layers, new_split


def layout(widths: Sequence[int], split: int) -> str:
    return f"{list(widths[:split])} and {list(widths[split:])}" if split else str(list(widths))


def _empty(layers: list[Tensor], split: int) -> Sums:
    """No samples yet, around the mean of this batch: its first row plus the mean difference, exact for constants."""
    widths, device = tuple(x.shape[1] for x in layers), layers[0].device
    size = 8 * sum(widths[a] * widths[b] for a, b in layer_pairs(len(layers), split))
    if device.type == "cpu" and size > (have := memory()):
        raise MemoryError(
            f"exact moments of layers of up to {max(widths)} features would take {size / 2**30:.1f} GiB, more than "
            f"this machine's {have / 2**30:.1f}; for CKA there is mode='minibatch'"
        )
    wide = [x.double() for x in layers]
    shift = [x[0] + (x - x[0]).mean(0) for x in wide]
    if at_hand(shift[0]):
        q = torch.stack([(x - s).square().sum(1) for x, s in zip(wide, shift, strict=True)])
        if dominated(q) and bool(q.isfinite().all()):
            shift = [robust_centre(x) if x.shape[1] else s for x, s in zip(wide, shift, strict=True)]
    return _zeros(widths, split, shift)


def _zeros(widths: tuple[int, ...], split: int, shift: list[Tensor]) -> Sums:
    m, device = len(widths), shift[0].device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return Sums(
        widths=widths,
        split=split,
        n=0,
        shift=shift,
        blocks=Blocks.zeros(layer_pairs(m, split), widths, device),
        sums=[zeros(d) for d in widths],
        norm_sums=zeros(m),
        norm_products=zeros(m, m),
        norm_rows=[zeros(m, d) for d in widths],
    )


def _tensors(state: Sums) -> list[Tensor]:
    """What is added up when streams are, as tensors that nobody else holds."""
    return [*state.blocks.sums(), *state.sums, state.norm_sums, state.norm_products, *state.norm_rows]


def is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def loaded(state_dict: Any, name: str) -> Sums | None:
    """The sums in a dict that `state_dict` made, checked."""
    wanted = {"widths", "split", "state"}
    if not isinstance(state_dict, dict) or not wanted <= set(state_dict):
        missing = sorted(wanted - set(state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"state_dict must come from {name}.state_dict(), got one without {missing}")
    widths, split, state = (state_dict[key] for key in ("widths", "split", "state"))
    if isinstance(state, dict) and not state and widths in ([], ()):
        return None
    named = isinstance(widths, (list, tuple)) and all(is_count(d) for d in widths)
    if not named or not widths or not is_count(split) or not split < len(widths):
        raise ValueError(f"state_dict must name the widths of its layers, got {shown(widths)} with split {split!r:.20}")
    widths = tuple(widths)
    pairs, m = layer_pairs(len(widths), split), len(widths)
    shapes: dict[str, list[tuple[int, ...]] | tuple[int, ...]] = {
        "shift": [(d,) for d in widths],
        "blocks": [(widths[a], widths[b]) for a, b in pairs],
        "sums": [(d,) for d in widths],
        "norm_sums": (m,),
        "norm_products": (m, m),
        "norm_rows": [(m, d) for d in widths],
    }
    if not isinstance(state, dict) or set(state) != {"n", *shapes} or not is_count(state["n"]) or state["n"] < 1:
        came = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state_dict must hold n and the sums {', '.join(shapes)}, got {came:.200}")
    for key, shape in shapes.items():
        tensors = state[key] if isinstance(shape, list) else [state[key]]
        expected = shape if isinstance(shape, list) else [shape]
        fits = (
            isinstance(tensors, (list, tuple))
            and [tuple(t.shape) for t in tensors if isinstance(t, Tensor) and t.dtype == torch.float64] == expected
        )
        if not fits:
            raise ValueError(f"state_dict: {key} must hold float64 tensors of shapes {expected}")
    copied = {k: [t.clone() for t in v] if isinstance(v, (list, tuple)) else v for k, v in state.items()}
    blocks = Blocks(pairs, copied.pop("blocks"))
    return Sums(widths=widths, split=split, blocks=blocks, **copied)
