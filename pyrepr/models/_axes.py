"""Reading a recorded tensor: along which axis its samples are, along which its features, and the rows it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyrepr.models._inputs import Stream, dense, tensors_of

MIXED = "holds its samples in no axis"


class Refused(ValueError):
    """A clause after a layer's name: why it gives no rows."""


@dataclass(frozen=True)
class Place:
    """Where the samples are: along `axis`; with `fold` in k rows each, one sample's after the other ("first"), or all
    samples' first rows first ("last")."""

    axis: int
    fold: str | None = None

    def samples_first(self, x: Tensor, features: int | None, count: int | None) -> Tensor:
        """x with the samples along the first axis and the features along the last: [B, …, C]."""
        rest = [axis for axis in range(x.dim()) if axis != self.axis and axis != features]
        order = [self.axis, *rest]
        if features is not None and features != self.axis:
            order.append(features)
        x = x.permute(order)
        if self.fold is None:
            return x
        if not count or x.shape[0] % count:
            raise Refused(f"has {x.shape[0]} rows in axis {self.axis}, no multiple of the batch's {count} samples")
        return x.unflatten(0, (count, -1)) if self.fold == "first" else x.unflatten(0, (-1, count)).movedim(1, 0)


def second_order(count: int) -> Tensor:
    """A fixed order of `count` samples in which none is at its place, and no rotation or reflection."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(20))
    return order[(torch.argsort(order) + 1) % count] if count > 1 else order


def _size(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _rounding(x: Tensor) -> float:
    """Relative error that a network's rounding leaves in x: some ulps, of 16 bits fewer."""
    eps = torch.finfo(x.dtype).eps
    return eps if x.dtype in (torch.float16, torch.bfloat16) else 64 * eps


def is_noise(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    one, two = one.nan_to_num(), two.nan_to_num()
    return _size(one.double() - two.double()) <= _rounding(one) * _size(one)


def find_samples(one: Tensor, two: Tensor | None, order: Tensor) -> Place | str:
    """Where the samples are in a tensor that is `one`, and `two` after they came in `order`; else why nowhere."""
    count = len(order)
    if one.dim() == 0:
        return "puts out a single number, not one row a sample"
    if two is None or one.shape != two.shape:
        return "has rows of its own: their number changes with the order of the samples"
    rounding = _rounding(one)
    wide = torch.promote_types(one.dtype, torch.float32)
    one, two = one.nan_to_num().to(wide), two.nan_to_num().to(wide)
    moved = _size(one - two)
    if moved <= rounding * _size(one):
        same = any(n == count and bool((one == one.narrow(a, 0, 1)).all()) for a, n in enumerate(one.shape))
        return (
            "is the same for every sample, so there is nothing to compare"
            if same
            else "is the same in whatever order the samples come: a table or a weight, no representation"
        )
    order = order.to(one.device)
    whole = [
        a for a, n in enumerate(one.shape) if n == count and _near(one.index_select(a, order), two, moved, rounding)
    ]
    if len(whole) == 1:
        return Place(whole[0])
    if whole:
        return f"moves with the samples along axes {' and '.join(map(str, whole))} of {list(one.shape)}"
    folded = [
        Place(a, fold)
        for a, n in enumerate(one.shape)
        if n > count and n % count == 0
        for fold in ("first", "last")
        if _near(_refolded(one, a, fold, order), two, moved, rounding)
    ]
    if len(folded) == 1:
        return folded[0]
    return f"{MIXED} of {list(one.shape)}: the model mixes samples in it, or has them in an order of its own"


def _near(one: Tensor, two: Tensor, moved: float, rounding: float) -> bool:
    """Whether `two` is `one` but for rounding, seen against how far exchanging the samples took it."""
    off = _size(one - two)
    return 4 * off < moved and (off <= math.sqrt(rounding) * moved or off <= rounding * _size(one))


def _refolded(x: Tensor, axis: int, fold: str, order: Tensor) -> Tensor:
    shape = (len(order), -1) if fold == "first" else (-1, len(order))
    return x.unflatten(axis, shape).index_select(axis + (fold == "last"), order).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Features:
    """Where the features of a position are: along `axis` of the tensor as it comes; if `None`, why that is unknown."""

    axis: int | None
    unclear: str = ""

    def describe(self, x: Tensor, place: Place) -> str:
        text = f"{list(x.shape)}: samples along axis {place.axis}"
        if place.fold:
            text += " in several rows each"
        return text + (f", features along axis {self.axis}" if self.axis is not None else "")


@dataclass(frozen=True)
class _Made:
    """What a module whose features have a known axis put out."""

    clock: int
    shape: tuple[int, ...]
    axis: int
    width: int


def _convention(module: nn.Module, output: Tensor) -> int | None:
    """The axis along which a module of a known kind puts out features."""
    if output.dim() < 2:
        return None
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return output.dim() - 1
    last = next(
        (w for name in ("normalized_shape", "out_features", "embedding_dim", "nf") if (w := _width(module, name))), 0
    )
    second = next((w for name in ("out_channels", "num_channels", "num_features") if (w := _width(module, name))), 0)
    if type(module).__name__.endswith("2d"):
        last, second = 0, second or last
    if second and output.dim() > 2 and output.shape[1] == second:
        return 1
    if not last and not second and type(module).__name__.endswith("Norm"):
        last = next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 1), 0)
    if last and output.shape[-1] == last:
        return output.dim() - 1
    return 1 if last and output.dim() > 2 and output.shape[1] == last else None


def _width(module: nn.Module, name: str) -> int:
    value = getattr(module, name, 0)
    if isinstance(value, (tuple, list, torch.Size)):
        value = value[-1] if value else 0
    return value if isinstance(value, int) else 0


class Evidence:
    """What modules of a known kind (convolutions, linear layers, norms, embeddings, …) put out in one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.clock = 0
        self._made: list[_Made] = []

    def hooks(self) -> Iterator[Callable[[], RemovableHandle]]:
        """For :func:`pyrepr._modules.hooked`."""
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                yield partial(module.register_forward_hook, self._note, prepend=True)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock += 1
        for _, value in tensors_of(output)[:1]:
            tensor, packed = dense(value)
            axis = tensor.dim() - 1 if packed is not None else _convention(module, tensor)
            if axis is not None:
                self._made.append(_Made(self.clock, tuple(tensor.shape), axis, tensor.shape[axis]))

    def features(
        self,
        x: Tensor,
        place: Place,
        span: tuple[int, int],
        asked: int | None,
        module: nn.Module,
        masks: Sequence[Tensor | None],
    ) -> Features:
        """Where the features of x are: as asked; as what ran inside the layer made them, or before it; as timm's
        ``output_fmt`` says; else along the axis that the mask of the tokens leaves."""
        others = [a for a in range(x.dim()) if a != place.axis]
        if asked is not None:
            if not -x.dim() <= asked < x.dim() or asked % x.dim() == place.axis:
                return Features(None, f"puts out {list(x.shape)}, in which axis {asked} is none of features")
            return Features(asked % x.dim())
        if len(others) < 2:
            return Features(others[0] if others else None)
        inside = [made for made in reversed(self._made) if span[0] < made.clock <= span[1]]
        before = [made for made in reversed(self._made) if made.clock <= span[0]]
        for made, exact in [*((m, True) for m in inside), *((m, False) for m in inside), *((m, True) for m in before)]:
            if exact and made.shape == tuple(x.shape) and made.axis != place.axis:
                return Features(made.axis)
            fitting = [a for a in others if x.shape[a] == made.width]
            if not exact and len(fitting) == 1:
                return Features(fitting[0])
        return self._by_name(x, others, module) or self._by_mask(x, others, masks) or self._by_width(x, others, before)

    def _by_name(self, x: Tensor, others: list[int], module: nn.Module) -> Features | None:
        layout = getattr(module, "output_fmt", None) or getattr(self.model, "output_fmt", None)
        layout = str(getattr(layout, "value", layout)).upper()
        if len(layout) == x.dim() and "C" in layout and layout.index("C") in others:
            return Features(layout.index("C"))
        return None

    @staticmethod
    def _by_mask(x: Tensor, others: list[int], masks: Sequence[Tensor | None]) -> Features | None:
        lengths = {mask.shape[1] for mask in masks if mask is not None}
        positions = [a for a in others if x.shape[a] in lengths]
        return (
            Features(next(a for a in others if a not in positions))
            if len(others) == 2 and len(positions) == 1
            else None
        )

    @staticmethod
    def _by_width(x: Tensor, others: list[int], before: list[_Made]) -> Features:
        for made in before[:1]:
            fitting = [a for a in others if x.shape[a] == made.width]
            if len(fitting) == 1:
                return Features(fitting[0])
        first, last = x.shape[others[0]], x.shape[others[-1]]
        many = math.prod(x.shape[a] for a in others)
        return Features(
            None,
            f"puts out {list(x.shape)}, which reads as {many // last} positions of {last} features or as "
            f"{many // first} positions of {first}; say which with Layer(name, channel_axis=…)",
        )


def _mask_for(x: Tensor, streams: list[Stream]) -> Stream | None:
    """The stream whose positions x [B, …, C] has; `None` where none does."""
    positions = math.prod(x.shape[1:-1])
    for stream in streams:
        mask = stream.mask
        if mask is None or tuple(mask.shape) == (x.shape[0], positions):
            return stream
    return None


def rows_of(x: Tensor, features: Features, streams: list[Stream], samples: str, pool: str | None) -> Tensor:
    """x [B, …, C], samples first and features last, as rows.

    ``"batch"``: [B, all the rest], zero where a position does not count, so that the length of the padding does not
    matter. ``"tokens"``: [Σ positions that count, C]. With `pool`: [B, C].

    Raises:
        Refused: if it has no such reading.
    """
    if x.dim() < 3:
        return x.reshape(x.shape[0], -1)
    whole = samples == "batch" and not pool
    if features.axis is None and not whole:
        raise Refused(features.unclear)
    stream = _mask_for(x, streams) if features.axis is not None else None
    if stream is not None and stream.missing:
        raise Refused(f"has special tokens that cannot be told: {stream.missing}")
    if stream is None:
        masks = [mask for s in streams if (mask := s.mask) is not None]
        if whole and all(bool(mask.all()) for mask in masks):
            return x.flatten(1)
        shape = list(masks[0].shape) if masks else "of its stream"
        raise Refused(f"puts out {list(x.shape)} (samples first), which does not fit the mask {shape} (B, T)")
    mask = None if stream.mask is None else stream.mask.to(x.device)
    if pool:
        return pooled(x, pool, stream)
    flat = x.flatten(1, -2)
    if samples == "tokens":
        return flat.flatten(0, 1) if mask is None else flat[mask]
    if mask is None or bool(mask.all()):
        return x.flatten(1)
    return torch.where(mask[..., None], flat, 0).flatten(1)


def pooled(x: Tensor, pool: str, stream: Stream) -> Tensor:
    """One row a sample from the positions of x [B, …, C] that count."""
    if pool == "spatial":
        return _spatial(x, stream)
    x = x.flatten(1, -2)
    mask = stream.attended if pool == "cls" else stream.mask
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask = mask.to(x.device)
    if not bool(mask.any(1).all()):
        raise Refused(f"has no position that counts in sample {int((~mask.any(1)).nonzero()[0])} of a batch")
    if pool == "mean":
        kept = torch.where(mask[..., None], x, 0)
        return kept.sum(1) / mask.sum(1, keepdim=True).to(x.dtype)
    if pool == "max":
        return torch.where(mask[..., None], x, -torch.inf).amax(1)
    places = torch.arange(x.shape[1], device=x.device)
    chosen = torch.where(mask, places, -1).amax(1) if pool == "last" else torch.where(mask, places, len(places)).amin(1)
    return x[torch.arange(x.shape[0], device=x.device), chosen]


def _spatial(x: Tensor, stream: Stream) -> Tensor:
    """The mean over the grid: of [B, H, W, C] all of it; of [B, T, C] without the tokens before the patches, which are
    those that the largest square leaves (one for 197, a class token; five for 201)."""
    if x.dim() > 3:
        return x.flatten(1, -2).mean(1)
    if stream.mask is not None:
        raise Refused("has the positions of a text, which are not spatial; pool='mean' takes any")
    return x[:, x.shape[1] - math.isqrt(x.shape[1]) ** 2 :].mean(1)
