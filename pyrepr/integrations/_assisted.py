"""Assisted generation of models that keep one state a layer: it is kept as it was after each of the last tokens.

transformers refuses such models, for its cache drops tokens again by cutting keys off, and a state has none. The one
thing that is missing is which state to go back to, and the rules return it (``output_states``).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from pyrepr import functional
from pyrepr._checks import shown

_EVERY = "_pyrepr_every"  # on a state: those after the last tokens of its call
_HISTORY = "_pyrepr_history"  # on a cache's layer
_depth = [0]  # tokens that can be gone back by; a list, so that it is one for all who import it


def depth() -> int:
    """How many tokens a cache may be asked to go back by: 0 outside :func:`assisted`."""
    return _depth[0]


def remembering(function: Callable, q: Tensor, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A rule's result; its state carries the states after the last tokens to the cache that takes it."""
    recurrent = getattr(functional, function.__name__.replace("chunk", "fused_recurrent"))
    options |= {"output_final_state": True, "output_states": min(q.shape[1], depth() + 1)}
    o, state, every = recurrent(q, *tensors, **options)
    setattr(state, _EVERY, every)
    return o, state


def _update(original: Callable) -> Callable:
    def update_recurrent_state(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        every = getattr(recurrent_states, _EVERY, None)
        if every is None:
            raise RuntimeError(
                "assisted generation needs the states after every token, which the delta rules of pyrepr return after "
                "enable(); this layer's state came from something else"
            )
        result = original(layer, recurrent_states, state_idx, **kwargs)
        histories = layer.__dict__.setdefault(_HISTORY, {})
        histories.setdefault(state_idx, deque(maxlen=depth() + 1)).extend(every.unbind(1))
        return result

    return update_recurrent_state


def _crop(original: Callable) -> Callable:
    def crop(layer: Any, tokens_to_remove: int) -> None:
        removed, histories = abs(tokens_to_remove), layer.__dict__.get(_HISTORY, {})
        kept = min(map(len, histories.values()), default=removed + 1)
        if removed >= kept:
            raise RuntimeError(f"tokens of assisted() must be at least the {removed} to go back by, got {depth()}")
        original(layer, tokens_to_remove)
        for state_idx, history in histories.items():
            for _ in range(removed):
                history.pop()
            layer.recurrent_states[state_idx].copy_(history[-1])

    return crop


@contextlib.contextmanager
def assisted(*models: Any, tokens: int = 32) -> Iterator[None]:
    """Lets ``generate`` take an ``assistant_model`` or ``prompt_lookup_num_tokens``, for the length of a block.

    Leviathan et al. 2023, arXiv 2211.17192. Models of the gated delta rule and of KDA, as the one that is assisted, as
    the assistant or both; needs :func:`enable`. Their caches keep the states of all layers after each of the last
    tokens, and go back to the one after the last token that was accepted. Caches made inside must not be used outside.

    Args:
        models: those that ``generate`` is called on, which transformers refuses otherwise.
        tokens: how many drafted tokens can be taken back; default 32, transformers drafts 20 unless told otherwise.

    Raises:
        RuntimeError: in ``generate``, if more tokens are to be taken back, or a layer's state is not from a rule of
            pyrepr: Mamba-2's models, or without :func:`enable`.
        ValueError: if ``tokens`` is not a positive integer.
    """
    from transformers.cache_utils import LinearAttentionLayer as Layer

    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, got {shown(tokens)}")
    before, update, crop = _depth[0], Layer.update_recurrent_state, Layer.crop
    stateful = [(model, "_is_stateful" in vars(model), model._is_stateful) for model in models]
    _depth[0] = tokens
    try:
        if not before:  # inside another block they are in place
            Layer.update_recurrent_state, Layer.crop = _update(update), _crop(crop)  # type: ignore[method-assign]
        for model in models:
            model._is_stateful = False
        yield
    finally:
        _depth[0] = before
        Layer.update_recurrent_state, Layer.crop = update, crop  # type: ignore[method-assign]
        for model, own, value in stateful:
            if own:
                model._is_stateful = value
            else:
                del model._is_stateful
