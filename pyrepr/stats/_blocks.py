"""Float64 blocks Σ X_aᵀX_b that batches are added to: what costs time and memory in every sum over a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrepr.ops.moments import moments_op_

# A batch waits until there are this many rows: replacing a block then costs a tenth of adding to it.
WAITING_ROWS = 1024
# Blocks are replaced together up to this many bytes: fewer passes over the rows, and little memory beside the blocks.
GROUP_BYTES = 64 << 20

Batch = Sequence[Tensor]  # one [n, d_l] tensor a layer, float32 or float64


@dataclass(frozen=True)
class _Group:
    """Blocks that are replaced together, and how many of the waiting batches they hold."""

    pairs: tuple[tuple[int, int], ...]
    blocks: tuple[Tensor, ...]
    held: int = 0

    def add(self, waiting: Sequence[Batch]) -> _Group:
        """These blocks with all waiting batches in them, as new tensors."""
        layers = sorted({layer for pair in self.pairs for layer in pair})
        places = [layers.index(layer) for pair in self.pairs for layer in pair]
        blocks = [block.clone() for block in self.blocks]
        for batch in waiting[self.held :]:
            moments_op_(blocks, [batch[layer] for layer in layers], places)
        return _Group(self.pairs, tuple(blocks), len(waiting))


class Blocks:
    """Σ X_aᵀX_b over batches for pairs (a, b) of layers; of a pair (a, a) the upper triangle.

    A value: :meth:`plus` returns another and leaves this one as it is. Still the blocks are in memory once. Batches
    wait, and when their sum is due, one group of blocks after the other is replaced by one that holds them; the sum is
    the same between any two of these steps, so an exception there changes nothing.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], blocks: Sequence[Tensor]) -> None:
        groups, start, size = [], 0, 0
        for i, block in enumerate(blocks):
            size += block.nbytes
            if size >= GROUP_BYTES or i == len(blocks) - 1:
                groups.append(_Group(tuple(pairs[start : i + 1]), tuple(blocks[start : i + 1])))
                start, size = i + 1, 0
        self._state: tuple[list[_Group], tuple[Batch, ...]] = (groups, ())

    @classmethod
    def zeros(cls, pairs: Sequence[tuple[int, int]], widths: Sequence[int], device: torch.device) -> Blocks:
        shapes = [(widths[a], widths[b]) for a, b in pairs]
        return cls(pairs, [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [pair for group in self._state[0] for pair in group.pairs]

    def plus(self, batch: Batch) -> Blocks:
        """The sum with a batch, which is kept: it must not be written to later."""
        if sum(waiting[0].shape[0] for waiting in self._state[1]) >= WAITING_ROWS:
            self._settle()
        groups, waiting = self._state
        more = object.__new__(Blocks)
        more._state = (list(groups), (*waiting, batch))
        return more

    def _settle(self) -> None:
        groups, waiting = self._state
        if waiting:
            for i, group in enumerate(groups):
                groups[i] = group.add(waiting)
            self._state = ([replace(group, held=0) for group in groups], ())

    def sums(self) -> list[Tensor]:
        """The blocks, in the order of the pairs; not to be written to."""
        self._settle()
        return [block for group in self._state[0] for block in group.blocks]

    def map(self, function: Callable[..., Tensor], *others: Sequence[Tensor]) -> Blocks:
        """function(block, *the others' blocks) of every block, as a new sum."""
        return Blocks(self.pairs, [function(*parts) for parts in zip(self.sums(), *others, strict=True)])
