"""Functions that look at numbers, under ``vmap``: entry by entry, where there are numbers to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pyrepr.ops._differentiable import _by_new_vmap, _forward_mode_of, _placed, _save, _saved, looped
from pyrepr.ops._leaf import _batched, _is_compiling, _unwrapped, _wrapped


def _hidden(x: Tensor | None) -> bool:
    """Whether an axis of x is hidden by ``vmap``."""
    while x is not None and _wrapped(x):
        if _batched(x):
            return True
        x = _unwrapped(x)
    return False


def by_entries(function: Callable[..., tuple], *tensors: Tensor | None) -> tuple:
    """function(*tensors), a tuple of tensors; looped over every axis that ``vmap`` hides.

    Its derivatives of all orders are those of the function at each entry.
    """
    if _is_compiling() or not any(map(_hidden, tensors)):
        return function(*tensors)
    return _Looped.apply(function, *tensors)


def _pulled(function: Callable, of: Sequence[int], count: int) -> Callable:
    """(count tensors, gradients of outputs) to the gradients in the tensors `of`."""

    def gradients(*given: Tensor | None) -> tuple:
        tensors, grads = given[:count], given[count:]
        out, pull = torch.func.vjp(lambda *some: function(*_placed(tensors, of, some)), *(tensors[i] for i in of))
        return pull(tuple(torch.zeros_like(x) if g is None else g for x, g in zip(out, grads, strict=True)))

    return gradients


def _pushed(function: Callable, of: Sequence[int], count: int) -> Callable:
    """(count tensors, tangents of those `of`) to the tangents of the outputs."""

    def tangents(*given: Tensor | None) -> tuple:
        tensors, along = given[:count], given[count:]
        return _forward_mode_of(lambda *some: function(*_placed(tensors, of, some)), [tensors[i] for i in of], along)

    return tangents


class _Looped(Function):
    """(function, *tensors) to what the function returns."""

    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        _save(ctx, tensors)

    @staticmethod
    @_by_new_vmap
    def backward(ctx, *grads):
        tensors = _saved(ctx)
        of = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
        found = by_entries(_pulled(ctx.function, of, len(tensors)), *tensors, *grads)
        return tuple(_placed([None] * (1 + len(tensors)), [1 + i for i in of], found))

    @staticmethod
    def jvp(ctx, _, *tangents):
        tensors = _saved(ctx)
        of = [i for i, t in enumerate(tangents) if t is not None]
        return by_entries(_pushed(ctx.function, of, len(tensors)), *tensors, *(tangents[i] for i in of))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, function: Callable, *tensors: Tensor | None) -> tuple:
        return looped(lambda *some: by_entries(function, *some), info.batch_size, in_dims[1:], tensors)
