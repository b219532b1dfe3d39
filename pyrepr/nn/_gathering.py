"""The rows of all processes, as losses over several processes need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """[Σ counts, …] from [counts[rank], …] of every process, in rank order.

    The gradient of a row goes back to the process it came from: the sum of what all processes have for it. It needs
    the backward of all of them, as the forward does.
    """
    return _Gather.apply(x, tuple(counts))


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        from torch import distributed

        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])  # collectives take equal shapes
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(grad, ctx.counts), None


class _Scatter(Function):
    """The transposed of :class:`_Gather`: the own rows of the sum over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        from torch import distributed

        ctx.counts = counts
        whole = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole.split(counts)[distributed.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.counts), None
