"""What delta-rule layers keep between calls."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_tensor, shape_of, shown
from pyrepr._reporting import replacing

FREE_STATES = 4  # sizes of layers of which a cache keeps free memory
_VERSION = 1


@dataclass(frozen=True)
class _Layer:
    """What a layer left: its state, how many tokens it has seen, and how many of them in its last call."""

    state: dict[str, Any]
    seen: int
    offset: int
    earlier: tuple[dict[str, Any], ...] = ()  # states before the last tokens, the newest last

    def after(self, length: int) -> _Layer:
        """As it was after `length` tokens, at most as many as it has seen."""
        back = self.seen - length
        if back == 0:
            return self
        kept = len(self.earlier) - back
        return _Layer(self.earlier[kept], length, max(0, self.offset - back), self.earlier[:kept])


class DeltaCache:
    """What the layers of a model keep between calls, by the number of the layer (``layer_idx``).

    ``cache[layer_idx]`` is a dict with ``recurrent_state`` [B, HV, K, V] in float32 and ``conv_state``, a tuple of
    [B, D, W − 1] for q, k and v, or ``None``. Memory does not grow with the text. While decoding without gradients a
    layer writes to a set of tensors that is free, and when its output is done hands it over for its own, which the next
    layer of these sizes writes to. So a call that fails or is interrupted leaves the cache of its layer as it was, for
    the memory of one layer more; and what a layer held before must be copied by who wants to keep it.

    With ``rollback`` every layer also keeps its states before each of the last tokens, to which :meth:`crop` and
    :meth:`accept` go back: what speculative decoding needs, where a call checks tokens of which only the first may turn
    out right. Tokens are then computed one by one where their states are kept. Calls with padding or packed sequences
    start anew what can be taken back.

    All methods that change the cache do so at their end: one that fails leaves it as it was.

    Args:
        rollback: how many tokens can be taken back; memory for as many states a layer. Default 0.

    Example:
        >>> layer = pyrepr.nn.GatedDeltaNet(hidden_size=32, head_dim=8, num_heads=2, layer_idx=0)
        >>> cache = pyrepr.nn.DeltaCache(rollback=2)
        >>> with torch.no_grad():
        ...     for token in torch.randn(1, 5, 32).split(1, 1):
        ...         o, *_ = layer(token, past_key_values=cache, use_cache=True)
        >>> cache.crop(3)
        >>> cache.get_seq_length()
        3
    """

    def __init__(self, rollback: int = 0) -> None:
        if isinstance(rollback, bool) or not isinstance(rollback, int) or rollback < 0:
            raise ValueError(f"rollback must be a number of tokens, 0 or more, got {shown(rollback)}")
        self.rollback = rollback
        # What layers left, and states whose memory is free, no two of one size. In one place, since an interrupt
        # between two assignments would have a state that is in use among the free ones.
        self._held: tuple[dict[int, _Layer], tuple[dict[str, Any], ...]] = ({}, ())

    @property
    def _layers(self) -> dict[int, _Layer]:
        return self._held[0]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self._layers[layer_idx].state

    @property
    def states(self) -> dict[int, dict[str, Any]]:
        """What all layers left, by their number."""
        return {layer_idx: layer.state for layer_idx, layer in self._layers.items()}

    def get(self, layer_idx: int) -> dict[str, Any] | None:
        """What a layer left, or ``None``."""
        return self[layer_idx] if layer_idx in self._layers else None

    def spare(self, layer_idx: int) -> list[Tensor]:
        """A recurrent state and convolutions' states to write and hand to :meth:`update`; they hold nothing yet."""
        wanted = _tensors(self[layer_idx])
        for free in self._held[1]:
            if _fits(wanted, _tensors(free)):
                return list(_tensors(free))
        return [torch.empty_like(x) for x in wanted]

    def update(
        self,
        layer_idx: int,
        recurrent_state: Tensor,
        conv_state: tuple[Tensor, ...] | None,
        offset: int,
        earlier: list[tuple[Tensor, tuple[Tensor, ...] | None]] | None = None,
    ) -> None:
        """The states of a layer after `offset` more tokens, and those before the last of these that are kept."""
        state = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        layers, free = self._held
        last = layers.get(layer_idx)
        seen = self.get_seq_length(layer_idx) + offset
        if self.rollback:
            before = () if earlier is None else tuple({"recurrent_state": s, "conv_state": c} for s, c in earlier)
            if earlier is not None and len(before) == offset - 1:  # nothing between them and what was there
                history = (_mapped(torch.zeros_like, state),) if last is None else (*last.earlier, last.state)
                before = (*history, *before)
            self._held = ({**layers, layer_idx: _Layer(state, seen, offset, before[-self.rollback :])}, free)
            return
        old, new = None if last is None else last.state, _tensors(state)
        if old is not None and any(x is y for x, y in zip(_tensors(old), new, strict=False)):
            old = None  # what was written in place is not free
        kept = tuple(each for each in free if not _fits(_tensors(old or state), _tensors(each)))
        left = {**layers, layer_idx: _Layer(state, seen, offset)}
        self._held = (left, kept if old is None else (old, *kept[: FREE_STATES - 1]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens a layer has seen, padding included."""
        return self._layers[layer_idx].seen if layer_idx in self._layers else 0

    def crop(self, length: int) -> None:
        """Back to what the layers held after `length` tokens; a negative one takes so many tokens back.

        Raises:
            ValueError: if the cache has seen fewer tokens, or keeps no states from so far back.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an integer, got {shown(length)}")
        if length and not self._layers:
            raise ValueError(f"length must be at most the 0 tokens of the cache, got {length}")
        cropped = {}
        for layer_idx, layer in self._layers.items():
            wanted = length if length >= 0 else layer.seen + length
            if not 0 <= wanted <= layer.seen:
                raise ValueError(f"length must be at most the {layer.seen} tokens of the cache, got {length}")
            self._check_back(layer, layer.seen - wanted if wanted else 0)
            if wanted:
                cropped[layer_idx] = layer.after(wanted)
        self._held = (cropped, ())

    def accept(self, num_accepted_tokens: int | Tensor) -> None:
        """Keeps the first tokens of the last call, of every row of the batch as many as it is said to have.

        Where rows differ, the tokens that a row does not keep count as padding of it: :meth:`get_seq_length` is that of
        the longest, and nothing before can be taken back any more.

        Args:
            num_accepted_tokens: one number for all rows, or [B] int32 or int64; from 0 to the tokens of the last call.

        Raises:
            ValueError: if it is out of range, or the cache keeps no states from so far back.
        """
        if not self._layers:
            if not isinstance(num_accepted_tokens, int):
                check_tensor("num_accepted_tokens", num_accepted_tokens, INTEGERS)
            if isinstance(num_accepted_tokens, Tensor) or num_accepted_tokens:
                came = shown(num_accepted_tokens)
                raise ValueError(f"num_accepted_tokens must be 0, the cache is empty, got {came}")
        accepted = {layer_idx: self._accepted(layer, num_accepted_tokens) for layer_idx, layer in self._layers.items()}
        self._held = ({layer_idx: layer for layer_idx, layer in accepted.items() if layer.seen}, ())

    def _accepted(self, layer: _Layer, counts: object) -> _Layer:
        if isinstance(counts, int) and not isinstance(counts, bool):
            numbers = [counts]
        else:
            tensor = check_tensor("num_accepted_tokens", counts, INTEGERS)
            rows = layer.state["recurrent_state"].shape[0]
            if tensor.shape != (rows,):
                raise ValueError(f"num_accepted_tokens must have shape [B] = [{rows}], got {shape_of(tensor)}")
            numbers = tensor.tolist()
        for number in numbers:
            if not 0 <= number <= layer.offset:
                raise ValueError(
                    f"num_accepted_tokens must be from 0 to the {layer.offset} tokens of the last call, got {number}"
                )
        if not numbers:
            return layer
        self._check_back(layer, layer.offset - min(numbers))
        if len(set(numbers)) == 1:
            return layer.after(layer.seen - layer.offset + numbers[0])
        states = [*layer.earlier, layer.state]
        picked = [states[len(states) - 1 - (layer.offset - number)] for number in numbers]
        state = _mapped(lambda *rows: torch.stack([x[i] for i, x in enumerate(rows)]), *picked)
        return _Layer(state, layer.seen - layer.offset + max(numbers), max(numbers))

    def _check_back(self, layer: _Layer, back: int) -> None:
        if back > len(layer.earlier):
            raise ValueError(
                f"the cache can take back {len(layer.earlier)} tokens, got {back} to take back; what it keeps is said "
                f"when it is made, DeltaCache(rollback={self.rollback}), and begins after a call with padding"
            )

    def select(self, rows: Tensor) -> None:
        """Rows of the batch picked anew, in any order and number. rows: [B'] int32 or int64.

        Raises:
            ValueError, TypeError: if it is not one axis of integers, or a row does not exist.
        """
        rows = check_tensor("rows", rows, INTEGERS)
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape [B'], got {shape_of(rows)}")
        for layer in self._layers.values():
            count = layer.state["recurrent_state"].shape[0]
            if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
                raise ValueError(f"rows must be from 0 to {count - 1}, got {int(rows.min())} to {int(rows.max())}")
        self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """:meth:`select`, as beam search calls it. beam_idx: [B] int64."""
        self.select(beam_idx)

    def copy(self) -> DeltaCache:
        """The same in memory of its own."""
        cache = DeltaCache(self.rollback)
        cache._held = self._held
        cache._map(torch.clone)
        return cache

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        mapped = {
            layer_idx: replace(
                layer,
                state=_mapped(function, layer.state),
                earlier=tuple(_mapped(function, state) for state in layer.earlier),
            )
            for layer_idx, layer in self._layers.items()
        }
        self._held = (mapped, ())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a file, which is there in whole or not at all."""
        layers = {
            layer_idx: {
                "state": _mapped(torch.clone, layer.state),
                "seen": layer.seen,
                "offset": layer.offset,
                "earlier": [_mapped(torch.clone, state) for state in layer.earlier],
            }
            for layer_idx, layer in self._layers.items()
        }
        with replacing(path) as temporary:
            torch.save({"DeltaCache": _VERSION, "rollback": self.rollback, "layers": layers}, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> DeltaCache:
        """What :meth:`save` wrote.

        Args:
            device: where to; default where it was.

        Raises:
            ValueError: if the file holds something else.
        """
        try:
            found = torch.load(path, map_location=device, weights_only=True)
            if found["DeltaCache"] != _VERSION:
                raise KeyError(found["DeltaCache"])
            cache = cls(found["rollback"])
            cache._held = ({int(layer_idx): _read(x) for layer_idx, x in found["layers"].items()}, ())
        except (
            RuntimeError,
            EOFError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"path must be a file that DeltaCache.save wrote, got {shown(str(path))}") from error
        return cache

    def reset(self) -> None:
        """Forgets everything."""
        self._held = ({}, ())


def _read(found: dict[str, Any]) -> _Layer:
    """A layer as :meth:`DeltaCache.save` wrote it; what is not one raises LookupError or TypeError."""
    states = [found["state"], *found["earlier"]]
    shapes = {tuple(check_tensor("state", x).shape for x in _tensors(state)) for state in states}
    numbers = [found["seen"], found["offset"]]
    if len(shapes) > 1 or not all(isinstance(number, int) for number in numbers):
        raise TypeError("not the states of one layer")
    return _Layer(states[0], *numbers, tuple(states[1:]))


def _mapped(function: Callable[..., Tensor], *states: dict[str, Any]) -> dict[str, Any]:
    """A state of what the function makes of the tensors of one, or of the same tensors of several."""
    tensors = tuple(function(*same) for same in zip(*map(_tensors, states), strict=True))
    convolved = states[0]["conv_state"] is not None
    return {"recurrent_state": tensors[0], "conv_state": tensors[1:] if convolved else None}


def _tensors(state: dict[str, Any] | None) -> tuple[Tensor, ...]:
    return () if state is None else (state["recurrent_state"], *(state["conv_state"] or ()))


def _fits(wanted: tuple[Tensor, ...], free: tuple[Tensor, ...]) -> bool:
    """Whether the free tensors may be overwritten with what follows those wanted."""
    return len(wanted) == len(free) and all(
        (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        and not y.requires_grad
        and (torch.is_inference_mode_enabled() or not y.is_inference())
        for x, y in zip(wanted, free, strict=True)
    )
