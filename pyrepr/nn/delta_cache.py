"""What delta-rule layers keep between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FREE_STATES = 4  # sizes of layers of which a cache keeps free memory


class DeltaCache:
    """What the layers of a model keep between calls, by the number of the layer (``layer_idx``).

    ``cache[layer_idx]`` is a dict with ``recurrent_state`` [B, HV, K, V] in float32 and ``conv_state``, a tuple of
    [B, D, W − 1] for q, k and v, or ``None``. Memory does not grow with the text. While decoding without gradients a
    layer writes to a set of tensors that is free, and when its output is done hands it over for its own, which the next
    layer of these sizes writes to. So a call that fails or is interrupted leaves the cache of its layer as it was, for
    the memory of one layer more; and what a layer held before must be copied by who wants to keep it.

    Example:
        >>> layer = pyrepr.nn.GatedDeltaNet(hidden_size=32, head_dim=8, num_heads=2, layer_idx=0)
        >>> cache = pyrepr.nn.DeltaCache()
        >>> with torch.no_grad():
        ...     for token in torch.randn(1, 5, 32).split(1, 1):
        ...         o, *_ = layer(token, past_key_values=cache, use_cache=True)
        >>> cache.get_seq_length()
        5
    """

    def __init__(self) -> None:
        # What layers left with how many tokens they have seen, and states whose memory is free, no two of one size. In
        # one place, since an interrupt between two assignments would have a state that is in use among the free ones.
        self._held: tuple[dict[int, tuple[dict[str, Any], int]], tuple[dict[str, Any], ...]] = ({}, ())

    @property
    def _layers(self) -> dict[int, tuple[dict[str, Any], int]]:
        return self._held[0]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self._layers[layer_idx][0]

    @property
    def states(self) -> dict[int, dict[str, Any]]:
        """What all layers left, by their number."""
        return {layer_idx: state for layer_idx, (state, _) in self._layers.items()}

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
        self, layer_idx: int, recurrent_state: Tensor, conv_state: tuple[Tensor, ...] | None, offset: int
    ) -> None:
        """The states of a layer after `offset` more tokens."""
        state = {"recurrent_state": recurrent_state, "conv_state": conv_state}
        layers, free = self._held
        old, new = self.get(layer_idx), _tensors(state)
        if old is not None and any(x is y for x, y in zip(_tensors(old), new, strict=False)):
            old = None  # what was written in place is not free
        kept = tuple(each for each in free if not _fits(_tensors(old or state), _tensors(each)))
        left = {**layers, layer_idx: (state, self.get_seq_length(layer_idx) + offset)}
        self._held = (left, kept if old is None else (old, *kept[: FREE_STATES - 1]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens a layer has seen, padding included."""
        return self._layers[layer_idx][1] if layer_idx in self._layers else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch picked anew, as beam search does. beam_idx: [B] int64."""
        picked = {}
        for layer_idx, (state, seen) in self._layers.items():
            conv_state = state["conv_state"]
            if conv_state is not None:
                conv_state = tuple(x.index_select(0, beam_idx) for x in conv_state)
            recurrent_state = state["recurrent_state"].index_select(0, beam_idx)
            picked[layer_idx] = ({"recurrent_state": recurrent_state, "conv_state": conv_state}, seen)
        self._held = (picked, ())

    def reset(self) -> None:
        """Forgets everything."""
        self._held = ({}, ())


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
