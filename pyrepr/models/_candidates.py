"""What a linear layer could become, measured: tables and signs of several kinds, and what else makes it smaller."""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrepr.nn._lookup_fit import relative_mse
from pyrepr.nn.lookup import FITTED_WEIGHTING
from pyrepr.reference.lookup import HASHES

FORMS = ("tables", "signs")  # what a layer becomes
BUDGETS = ("time", "bytes")
PARTS = (16, 8, 4)  # of a layer's in_features: the ranks that are tried


@dataclass(frozen=True)
class Candidate:
    """What a layer could become.

    Attributes:
        name: ``"two bits, rank d/8"``, tables, d the layer's in_features; ``"signs, two bits, rank d/8"``;
            ``"dynamic int8"``; ``"dense, rank d/8"``.
        relative_mse: squared error over the variance of the output, on rows that nothing was fitted to.
        bytes: of parameters and buffers. ms: median milliseconds of a call for each of the report's ``batch_sizes``.
        tables: whether it is one that :func:`pyrepr.convert` puts in place, tables or signs; the others are what else
            one could do.
        chosen: whether the layer became it.
    """

    name: str
    relative_mse: float
    bytes: int
    ms: tuple[float, ...]
    tables: bool
    chosen: bool = False


def check_budget(budget: object, batch_sizes: Sequence[int]) -> None:
    """Raises TypeError or ValueError for what is no budget of :func:`pyrepr.convert`."""
    if budget is None:
        return
    if not isinstance(budget, Mapping):
        raise TypeError(f'budget must be a dict as {{"time": 0.8}} or {{"bytes": 2.0}}, got {type(budget).__name__}')
    if not budget or any(key not in BUDGETS for key in budget):
        came = next((key for key in budget if key not in BUDGETS), "none")
        raise ValueError(f"budget must have the keys 'time', 'bytes' or both, got {came!r}")
    for key, share in budget.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
            raise ValueError(f"budget must be positive finite multiples of what a layer takes, got {share!r} for {key}")
    if "time" in budget and not batch_sizes:
        raise ValueError("budget of time needs batch_sizes, the first of which it is for, got none")


def form_options(d: int, h: int, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Names and options of what is tried for a layer: tables and signs of both hashes, at ranks from none to a quarter
    of d, and what was asked for; tables where d is a multiple of a chunk's elements."""
    found: dict[str, dict[str, Any]] = {}
    for form, hash in itertools.product(FORMS, HASHES):
        weighting = FITTED_WEIGHTING[hash] if form == "tables" else "none"
        options = {**asked, "form": form, "hash": hash, "weighting": weighting}
        for part in (0, *PARTS):
            rank = d // part if part else 0
            if _fits(d, options) and rank <= min(d, h) and (rank or not part):
                found[_name(options, f"d/{part}" if part else "0")] = {**options, "rank": rank}
    if asked not in found.values() and _fits(d, asked):
        found[asked_name(asked)] = asked
    return found


def _fits(d: int, options: dict[str, Any]) -> bool:
    bits, per = options["bits"], HASHES[options["hash"]]
    return options["form"] == "signs" or (bits % per == 0 and d % (bits // per) == 0)


def asked_name(asked: dict[str, Any]) -> str:
    return _name(asked, str(asked["rank"]))


def _name(options: dict[str, Any], rank: str) -> str:
    signs = "signs, " if options["form"] == "signs" else ""
    plural = "s" if HASHES[options["hash"]] > 1 else ""
    return f"{signs}{options['hash'].replace('_bit', ' bit')}{plural}, rank {rank}"


def others(linear: nn.Linear, rows: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """What else one could do, as functions of x, each with its bytes: dense maps of low rank, fitted to `rows`, and on
    CPUs torch.ao's dynamic int8 with a scale a channel and, where the processor allows, inputs of eight bits."""
    d, h = linear.in_features, linear.out_features
    weight, x = linear.weight.double(), rows.double()
    found: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {}
    ranks = {f"dense, rank d/{part}": d // part for part in PARTS if 0 < d // part < min(d, h)}
    if ranks:
        y = (x - x.mean(0)) @ weight.T
        _, components = torch.linalg.eigh(y.T @ y)  # ascending
        for name, rank in ranks.items():
            found[name] = _low_rank(linear, components[:, -rank:], x.mean(0))
    int8 = _dynamic_int8(linear)
    if int8 is not None:
        found["dynamic int8"] = int8, d * h + 16 * h + (0 if linear.bias is None else 4 * h)
    return found


def _low_rank(linear: nn.Linear, components: Tensor, mean: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """The layer's output within its principal `components` [h, rank] around that of the mean input."""
    weight = linear.weight.double()
    down, up = components.T @ weight, components
    shift = weight @ mean - up @ (down @ mean) + (0 if linear.bias is None else linear.bias.double())
    first, second, bias = (t.to(linear.weight.dtype).contiguous() for t in (down, up, shift))
    size = sum(t.numel() * t.element_size() for t in (first, second, bias))
    return (lambda x: functional.linear(functional.linear(x, first), second, bias)), size


def _dynamic_int8(linear: nn.Linear) -> Callable[[Tensor], Tensor] | None:
    """torch.ao's layer, with inputs of eight bits: its own forward rounds them to seven, which only processors without
    VNNI need, for whose sums of 16 bits eight are too many. It takes the same time; the error is a third."""
    if linear.weight.device.type != "cpu" or linear.weight.dtype != torch.float32:
        return None
    if torch.backends.quantized.engine == "none":
        return None
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    twin = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    twin.weight, twin.bias = linear.weight, linear.bias
    twin.qconfig = per_channel_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is to move to another package
        layer = Linear.from_float(twin)
    packed, seven = layer._packed_params._packed_params, not torch.cpu._is_vnni_supported()
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, seven)


class Measurements:
    """A layer, the rows it gets, and what it could become instead: each measured in turn with the layer itself, so that
    one is held in memory at a time."""

    def __init__(self, name: str, linear: nn.Linear, rows: Tensor, held: Tensor, batch_sizes: Sequence[int]) -> None:
        self.name, self.linear, self.batch_sizes = name, linear, batch_sizes
        self.rows, self.unseen = rows, rows[held] if bool(held.any()) else rows
        self.truth = linear(self.unseen)
        alone = [_times(linear, linear, rows, size)[0] for size in batch_sizes]
        self.before = Candidate(name, 0.0, bytes_of(linear), tuple(alone), False)
        self.found: list[Candidate] = []

    def add(self, name: str, function: Callable[[Tensor], Tensor], size: int, tables: bool) -> Candidate:
        """Measures a candidate; its milliseconds are those of the layer times how much longer it took beside it."""
        ms = []
        for count, alone in zip(self.batch_sizes, self.before.ms, strict=True):
            before, after = _times(self.linear, function, self.rows, count)
            ms.append(alone * after / before)
        error = relative_mse(function(self.unseen), self.truth)
        self.found.append(Candidate(name, error, size, tuple(ms), tables))
        return self.found[-1]

    def excess(self, candidate: Candidate, budget: Mapping[str, float]) -> float:
        """How many times over the budget a candidate is."""
        return max(share / budget[key] for key, share in self._shares(candidate).items() if key in budget)

    def _shares(self, candidate: Candidate) -> dict[str, float]:
        shares = {"bytes": candidate.bytes / self.before.bytes}
        return shares | ({"time": candidate.ms[0] / self.before.ms[0]} if candidate.ms else {})

    def refusal(self, budget: Mapping[str, float]) -> str:
        """The sentence for a budget that neither tables nor signs keep to."""

        def told(each: Candidate) -> str:
            takes = ", ".join(f"{key} {self._shares(each)[key]:.3g}" for key in budget)
            return f"{each.name} ({takes}, error {each.relative_mse:.3g})"

        nearest = sorted((each for each in self.found if each.tables), key=lambda each: self.excess(each, budget))[:3]
        asked = ", ".join(f"{key} {share:.3g}" for key, share in budget.items())
        return (
            f"budget must be met by some tables or signs for every layer, got {asked} for {self.name}; "
            f"nearest: {'; '.join(map(told, nearest))}"
        )

    def candidates(self, chosen: Candidate) -> tuple[Candidate, ...]:
        return tuple(replace(each, chosen=each is chosen) for each in self.found)


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _times(
    before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor], rows: Tensor, size: int
) -> tuple[float, float]:
    """Median milliseconds of both on `size` rows, in turn."""
    x = rows[torch.arange(size, device=rows.device) % len(rows)]

    def once(module: Callable[[Tensor], Tensor]) -> float:
        start = time.perf_counter()
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return 1e3 * (time.perf_counter() - start)

    first = max(once(before), once(after))  # and a warm-up
    turns = [(once(before), once(after)) for _ in range(max(3, min(30, int(20 / first))))]
    return statistics.median(a for a, _ in turns), statistics.median(b for _, b in turns)
