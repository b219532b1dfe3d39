"""What the ops of lookup layers compute, for PyTorch's counter of floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyrepr.reference.lookup import TILE

__all__ = ["flop_formulas"]

Shape = Sequence[int]


def _read(rows: Shape, tables: Shape) -> int:
    """A multiply-add for every table entry that is read: T tokens, K tables of width h, plain or packed."""
    k, h = (tables[1], tables[0] * TILE) if len(tables) == 4 else (tables[0], tables[2])
    return 2 * rows[0] * k * h


def _dense(x: Shape, down: Shape | None, up: Shape) -> int:
    """The low-rank part of a converted layer: what it reads of x, takes from it and adds to the result."""
    return 0 if down is None else 2 * x[0] * down[0] * (2 * down[1] + up[1])


def _linear(x: Shape, tables: Shape, *_: Any, **__: Any) -> int:
    return _read(x, tables)


def _converted(x: Shape, tables: Shape, *rest: Any, **_: Any) -> int:
    return _read(x, tables) + _dense(x, *rest[4:6])  # after scales, bias, centre and scale


def _signs(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1] + _dense(x, *rest[4:6])


def _sum(codes: Shape, weights: Shape, tables: Shape, *_: Any, **__: Any) -> int:
    return _read(codes, tables)


def _segments(values: Shape, codes: Shape, *_: Any, **__: Any) -> int:
    return 2 * codes[0] * codes[1] * values[1]


def _backward(
    grad: Shape,
    codes: Shape,
    weights: Shape,
    tables: Shape | None,
    scales: Shape | None,
    n: int,
    rows: Shape | None,
    want_segments: bool,
    *_: Any,
    **__: Any,
) -> int:
    return _segments(grad, codes) * (want_segments + (tables is not None))


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for ``torch.utils.flop_counter.FlopCounterMode``: :func:`pyrepr.lookup_linear`, its kin and its layers.

    A multiply and an add for every table entry that a token reads, for every weight of its signs, and for the dense
    part of converted layers; hashing is not counted, as activations are not. They are given to the counter by hand, for
    importing it takes as long as importing PyTorch.

    Returns:
        From op to formula, for ``custom_mapping``.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> layer, x = pyrepr.nn.LookupLinear(64, 32), torch.randn(5, 64)
        >>> with FlopCounterMode(display=False, custom_mapping=pyrepr.functional.flop_formulas()) as counter:
        ...     y = layer(x)
        >>> counter.get_total_flops() == 2 * 5 * 8 * 32
        True
    """
    ops = torch.ops.pyrepr
    return {
        ops.lookup_linear: _linear,
        ops.lookup_converted: _converted,
        ops.lookup_sum: _sum,
        ops.lookup_segments: _segments,
        ops.lookup_backward: _backward,
        ops.sign_linear: _signs,
    }
