"""States of the delta rule that stand in a pool, have another layout, or are asked for token by token."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_device, check_shape, check_tensor, shown
from pyrepr.functional._delta_rule import run
from pyrepr.ops._leaf import require
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.delta_rule import Gate

EVERY_TOKEN = "every token"
STATES_LIMIT = 1 << 31  # bytes that output_states may take


class Layout(NamedTuple):
    """How a caller's states stand, against the rule's [N, HV, K, V]."""

    v_first: bool  # [N, HV, V, K]
    by_value: bool  # the rule has [N, HV · V, K, 1]
    value_width: int

    def load(self, state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        if self.by_value:
            return (state if self.v_first else state.mT).flatten(1, 2)[..., None]
        return state.mT if self.v_first else state

    def store(self, state: Tensor) -> Tensor:  # [..., HV, K, V]
        if self.by_value:
            state = state[..., 0].unflatten(-2, (-1, self.value_width))
            return state if self.v_first else state.mT
        return state.mT if self.v_first else state


def pool_size(pool: object) -> int:
    if pool is None:
        raise ValueError("state_indices name rows of initial_state, which must be given with them, got None")
    pool = check_tensor("initial_state", pool)
    return pool.shape[0] if pool.dim() else 0


class Slots:
    """Rows of a pool, one for each sequence. One with -1 stands in for the first that has a row: it reads what that one
    reads and writes the same."""

    def __init__(self, indices: object, sequences: int, pool: Tensor) -> None:
        indices = check_tensor("state_indices", indices, INTEGERS)
        check_device("state_indices", indices, "initial_state", pool)
        check_shape("state_indices", indices, "[N]", (sequences,))
        rows = pool.shape[0]
        inside = ((indices >= -1) & (indices < rows)).all()
        require(inside, f"state_indices must be from -1 to {rows - 1}, the rows of initial_state")
        ordered = indices.sort().values
        twice = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
        require(~twice.any(), "state_indices must name a row of initial_state once at most")
        self.empty = not sequences or not rows
        self.used = indices >= 0
        if not self.empty:
            places = torch.arange(sequences, device=indices.device)
            self.source = torch.where(self.used, places, self.used.int().argmax())
            self.index = indices.long()[self.source].clamp_min(0)

    def kept(self, last: Tensor, first: Tensor) -> Tensor:
        """The final states, for the rows at `index`; the states before where no sequence has a row."""
        return torch.where(self.used.any(), last.index_select(0, self.source), first)

    def without_skipped(
        self, o: Tensor, every: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Zeros where a sequence has no row."""
        skipped = ~self.used
        tokens = skipped[:, None].expand(o.shape[:2]) if cu_seqlens is None else _by_token(skipped, cu_seqlens, o)
        o = o.masked_fill(tokens[..., None, None], 0)
        if every is not None:
            rows = tokens if every.shape[:2] == o.shape[:2] and cu_seqlens is not None else skipped[:, None]
            every = every.masked_fill(rows[..., None, None, None], 0)
        return o, every


def _by_token(of_sequence: Tensor, cu_seqlens: Tensor, o: Tensor) -> Tensor:
    """What holds for a sequence, for each of its tokens: [1, T]."""
    return of_sequence.repeat_interleave(cu_seqlens.diff().long(), output_size=o.shape[1])[None]


def native_count(output_states: object) -> int:
    """What it is to :func:`pyrepr.ops.delta_rule.states_after`; 0: nothing that it takes."""
    if output_states == EVERY_TOKEN:
        return -1
    good = isinstance(output_states, int) and not isinstance(output_states, bool)
    return max(0, min(int(output_states), STATES_LIMIT)) if good else 0  # type: ignore[call-overload]


def count_of(output_states: object, v: Tensor, shape: tuple[int, ...]) -> int | str | None:
    """For how many of the last tokens states are asked for, or for every token; within memory."""
    if output_states is None or output_states == EVERY_TOKEN:
        states = v.shape[0] * v.shape[1]
    elif isinstance(output_states, int) and not isinstance(output_states, bool) and output_states > 0:
        states = shape[0] * output_states
    else:
        raise ValueError(
            f"output_states must be None, {EVERY_TOKEN!r} or a positive number of tokens, got {shown(output_states)}"
        )
    size = states * shape[1] * shape[2] * shape[3] * compute_dtype(v.dtype).itemsize
    if output_states is not None and size > STATES_LIMIT:
        raise ValueError(
            f"output_states must fit into {STATES_LIMIT / 2**30:g} GiB, got {states} states of together "
            f"{size / 2**30:.3g} GiB; ask for fewer of the last tokens, or in shorter calls"
        )
    return output_states  # type: ignore[return-value]


def token_by_token(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor],  # q, k, v, g, beta
    first: Tensor | None,  # [N, HV, K, V]
    edges: list[int],  # where sequences start and end, counting tokens through the batch
    count: int | str,
    rest: tuple[float | None, bool, Gate],  # scale, normalisation of q and k, kind of gate
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final states, and the states after the last tokens: [N, count, HV, K, V], or [B, T, HV, K, V] for all.

    What comes before those tokens is one call; they are one call each, over all sequences that have that many.
    """
    v = inputs[2]
    packed = tuple(None if x is None else x.flatten(0, 1) for x in inputs)  # [all tokens, ...]
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    steps = max(lengths, default=0) if count == EVERY_TOKEN else int(count)
    sequences = len(lengths)
    state = first
    if state is None:
        q, _, values, *_ = inputs
        shape = (sequences, values.shape[2], q.shape[3], values.shape[3])
        state = values.new_zeros(shape, dtype=compute_dtype(values.dtype))
    before = [list(range(a, max(a, b - steps))) for a, b in itertools.pairwise(edges)]
    order = list(itertools.chain.from_iterable(before))
    outputs: list[Tensor] = []
    if order:
        bounds = [0, *itertools.accumulate(map(len, before))]
        o, state = _rule(_at(packed, order, True), state, rest, torch.tensor(bounds, device=v.device))
        outputs.append(o[0])
    snapshots, at_tokens = [], []
    for step in range(steps, 0, -1):
        active = [i for i, length in enumerate(lengths) if length >= step]
        tokens = [edges[i + 1] - step for i in active]
        if active:
            rows = torch.tensor(active, device=v.device)
            own = state if len(active) == sequences else state.index_select(0, rows)
            o, new = _rule(_at(packed, tokens, False), own, rest, None)
            state = new if len(active) == sequences else state.index_copy(0, rows, new)
            outputs.append(o[:, 0])
            order += tokens
            at_tokens.append(new)
        snapshots.append(state)
    place = torch.tensor(order, dtype=torch.long, device=v.device).argsort()
    o = torch.cat(outputs).index_select(0, place).reshape(v.shape) if outputs else torch.zeros_like(v)
    if count != EVERY_TOKEN:
        return o, state, torch.stack(snapshots, 1)
    if not at_tokens:
        return o, state, state.new_zeros(*v.shape[:2], *state.shape[1:])
    return o, state, torch.cat(at_tokens).index_select(0, place).unflatten(0, v.shape[:2])


def _at(packed: tuple[Any, ...], tokens: list[int], in_a_row: bool) -> tuple[Any, ...]:
    """These tokens as one row [1, T, ...], or as rows of one token [N, 1, ...]."""
    place = torch.tensor(tokens, device=packed[2].device)
    picked = (None if x is None else x.index_select(0, place) for x in packed)
    return tuple(None if x is None else x[None] if in_a_row else x[:, None] for x in picked)


def _rule(
    inputs: tuple[Any, ...], state: Tensor, rest: tuple[float | None, bool, Gate], cu_seqlens: Tensor | None
) -> tuple[Tensor, Any]:
    scale, l2norm, gate = rest
    return run(*inputs, scale, state, True, l2norm, cu_seqlens, gate)


def nothing(v: Tensor, shape: tuple[int, ...], count: int | str | None, layout: Layout) -> tuple[Tensor, Any]:
    """o and the states asked for where there is no sequence, or no row for one."""
    kv = (shape[3], shape[2]) if layout.v_first else shape[2:]
    size = v.shape[:2] if count == EVERY_TOKEN else (shape[0], count or 0)
    every = None if count is None else v.new_zeros((*size, shape[1], *kv), dtype=compute_dtype(v.dtype))
    return torch.zeros_like(v), every
