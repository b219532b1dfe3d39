"""What layers put out for a batch, as rows that are proved to be samples.

Which axis holds the samples is found by an experiment. A few samples of the first batch go through the model twice, the
second time in another order: the samples are along the axis whose slices moved with them. A tensor without such an axis
(a table of positions, experts' rows in routing order), or with several, is left out with that reason, or refused if it
was asked for by name. Where the features of a position are comes from the module that made the tensor.

Nothing stays on the model: hooks live for one forward pass only, and are removed whatever happens in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pyrepr._modules import hooked
from pyrepr.models._axes import (
    MIXED,
    Evidence,
    Features,
    Place,
    Refused,
    find_samples,
    is_noise,
    rows_of,
    second_order,
)
from pyrepr.models._inputs import (
    Inputs,
    Stream,
    Streams,
    Tokens,
    call,
    count_samples,
    dense,
    reordered,
    taken,
    tensors_of,
)
from pyrepr.models._layers import Layer, Layers, choose_layers, layer_table, unwrap

SAMPLES = ("batch", "tokens")
PROBED = 8  # samples in the experiment


@contextmanager
def plain_execution() -> Iterator[None]:
    """Models run eager and on the slow attention path, where hooks see every layer; both settings come back after."""
    with (stack := ExitStack()), stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@dataclass
class View:
    """A layer, and how its tensor is read: found once, used for every batch."""

    name: str  # in results
    layer: Layer
    call: int
    path: tuple
    place: Place
    features: Features
    text: str  # of this reading, for people
    pool: str | None


@dataclass
class _Seen:
    """One call of a module in the experiment."""

    values: list[tuple[tuple, Tensor, Tensor | None]]  # path, tensor, mask of a packed or nested one
    shape: torch.Size | None  # of what the module was given
    span: tuple[int, int]  # of the evidence from inside
    streams: list[Stream] = field(default_factory=list)


Sink = Callable[[str, str, int, Any, Any], None]


def watched(
    modules: dict[str, nn.Module], sides: dict[str, set[str]], sink: Sink
) -> Iterator[Callable[[], RemovableHandle]]:
    """Hooks that hand every call of some modules to sink(name, side, call, value, given), for
    :func:`pyrepr._modules.hooked`; `given` is what the module takes."""
    for name, module in modules.items():
        calls = [0]

        def before(module: nn.Module, args: Any, kwargs: dict, name: str = name, calls: list = calls) -> None:
            calls[0] += 1
            if "input" in sides[name]:
                sink(name, "input", calls[0], (*args, *kwargs.values()), None)

        def after(
            module: nn.Module, args: Any, kwargs: dict, output: Any, name: str = name, calls: list = calls
        ) -> None:
            if "output" in sides[name]:
                sink(name, "output", calls[0], output, (*args, *kwargs.values()))

        yield partial(module.register_forward_pre_hook, before, with_kwargs=True)
        yield partial(module.register_forward_hook, after, with_kwargs=True)


class Recorder:
    """One model and the layers to record.

    Args:
        model: any module; DataParallel and the like are looked through (see :func:`unwrap`).
        wanted: as ``layers_a`` of :func:`pyrepr.compare`.
        argument: what errors call the model, ``"model_a"``.
        samples, pool, tokens, inputs: as of :func:`pyrepr.compare`, `inputs` for this model.

    Attributes:
        views: what is recorded, after :meth:`prepare`. widths: of their rows. sizes: their norms for the first samples.
        skipped: name → why not.
        nonfinite: name → how many activations were NaN or infinite, where any were.
        groups: of which sample each row of the last batch is, [n]; ``None`` where a row is a sample.
        reduce: what is done to a layer's rows as soon as they are there; ``None`` keeps them.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Layers | None,
        argument: str,
        *,
        samples: str = "batch",
        pool: str | None = None,
        tokens: Tokens = "all",
        inputs: Inputs | None = None,
    ) -> None:
        self.argument = argument
        self.samples, self.pool, self.inputs = samples, pool, inputs
        self.model = unwrap(model)
        self.wanted = choose_layers(self.model, wanted, self.layers_argument)
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.views: list[View] = []
        self.widths: dict[str, int] = {}
        self.sizes: list[float] = []
        self.skipped: dict[str, str] = {}
        self.nonfinite: dict[str, int] = {}
        self.groups: Tensor | None = None
        self._by_default = wanted is None
        self._streams = Streams(self.model, tokens)
        table = layer_table(self.model)
        self._modules = {layer.name: table[layer.name] for layer in self.wanted}
        hooked: dict[int, str] = {}  # a module under two names is hooked once
        self._alias = {name: hooked.setdefault(id(module), name) for name, module in self._modules.items()}
        self._hooked = {name: self._modules[name] for name in hooked.values()}
        self._sides: dict[str, set[str]] = {name: set() for name in self._hooked}
        for layer in self.wanted:
            self._sides[self._alias[layer.name]].add(layer.side)

    @property
    def layers_argument(self) -> str:
        return self.argument.replace("model", "layers")

    @property
    def readings(self) -> dict[str, str]:
        """How each layer's tensor is read."""
        return {view.name: view.text for view in self.views}

    def prepare(self, batch: Any) -> None:
        """The experiment, on the first batch: fills `views`, `widths` and `skipped`."""
        count = count_samples(batch)
        free = all(layer.batch_axis is not None for layer in self.wanted)
        if count is None:
            raise ValueError(f"data: a batch must hold tensors with one sample a row, got {type(batch).__name__}")
        if count < 2 and not free:
            raise ValueError(
                f"data: the first batch must have at least two samples, got {count}: in which axis they are is found "
                "by exchanging them (or say it for each layer, as in Layer(name, batch_axis=0))"
            )
        first = torch.arange(min(count, PROBED))
        order = second_order(len(first))
        few = reordered(batch, first, count)
        evidence = Evidence(self.model)
        seen = self._experiment(few, evidence)
        other = seen if free else self._experiment(reordered(few, order, len(first)))
        problems: dict[str, str] = {}
        rows: dict[str, Tensor] = {}
        again: dict[tuple[str, str, int], _Seen] = {}
        for layer in self.wanted:
            try:
                for view, one in self._views(layer, seen, other, order, evidence):
                    try:
                        rows[view.name] = self._rows(_at(one, view.path), view, one.streams, len(first))
                        self.views.append(view)
                    except Refused as error:
                        problems[view.name] = str(error)
            except Refused as error:
                if MIXED in str(error):
                    again = again or self._experiment(few)
                    problems[layer.name] = self._mixing(layer, seen, again) or str(error)
                else:
                    problems[layer.name] = str(error)
        self._settle(rows, problems)

    def _experiment(self, batch: Any, evidence: Evidence | None = None) -> dict[tuple[str, str, int], _Seen]:
        """One forward pass of which everything is kept."""
        seen: dict[tuple[str, str, int], _Seen] = {}
        starts: dict[str, int] = {}

        def sink(name: str, side: str, call: int, value: Any, given: Any) -> None:
            values = []
            for path, tensor in tensors_of(value):
                tensor, mask = dense(tensor.detach() if isinstance(tensor, Tensor) else tensor)
                values.append((path, tensor.detach().clone(), mask))
            taken = [dense(tensor)[0] for _, tensor in tensors_of(given)]
            span = (starts.get(name, 0), evidence.clock) if evidence else (0, 0)
            seen[name, side, call] = _Seen(values, taken[0].shape if taken else None, span, self._streams.current)

        def more() -> Iterator[Callable[[], RemovableHandle]]:
            if evidence is not None:
                for name, module in self._hooked.items():
                    yield partial(module.register_forward_pre_hook, _starting(starts, name, evidence))
                yield from evidence.hooks()

        self._pass(batch, sink, more())
        return seen

    def _pass(self, batch: Any, sink: Sink, more: Iterable[Callable[[], RemovableHandle]] = ()) -> None:
        """One forward pass under hooks; those of `more` come before the recording ones."""
        self._streams.begin(batch, taken(batch, self.inputs))
        with hooked(chain(self._streams.hooks(), more, watched(self._hooked, self._sides, sink))):
            call(self.model, batch, self.argument, self.inputs)

    def _views(
        self,
        layer: Layer,
        seen: dict[tuple[str, str, int], _Seen],
        other: dict[tuple[str, str, int], _Seen],
        order: Tensor,
        evidence: Evidence,
    ) -> Iterator[tuple[View, _Seen]]:
        """The calls a layer asks for, each with its reading."""
        hooked = self._alias[layer.name]
        calls = [key[2] for key in seen if key[:2] == (hooked, layer.side)]
        if not calls:
            raise Refused("is not called in the model's forward")
        if layer.call is not None and layer.call not in calls:
            raise Refused(f"is called {len(calls)} times, so there is no call {layer.call}")
        for number in calls if layer.call is None else [layer.call]:
            one, two = seen[hooked, layer.side, number], other.get((hooked, layer.side, number))
            path, place = _choose(layer, one, two, order)
            tensor = _at(one, path)[0]
            masks = [stream.mask for stream in one.streams]
            features = evidence.features(tensor, place, one.span, layer.channel_axis, self._modules[layer.name], masks)
            name = layer.name + (f"#{number}" if len(calls) > 1 else "")
            name += " (input)" if layer.side == "input" else ""
            name += f" [{'.'.join(map(str, path))}]" if layer.output is not None and path else ""
            text = features.describe(tensor, place)
            if len(one.values) > 1 and path:
                text += f", output {'.'.join(map(str, path))} of {len(one.values)}"
            yield View(name, layer, number, path, place, features, text, layer.pool or self.pool), one

    def _mixing(self, layer: Layer, seen: dict, again: dict) -> str | None:
        """A sentence for a layer whose samples do not move: does it give the same twice?"""
        key = next(key for key in seen if key[:2] == (self._alias[layer.name], layer.side))
        for (_, one, _), (_, two, _) in zip(seen[key].values, again[key].values, strict=False):
            if one.shape == two.shape and not is_noise(one, two):
                return "gives two values for the same samples (it is random, even in eval mode)"
        return None

    def _settle(self, rows: dict[str, Tensor], problems: dict[str, str]) -> None:
        """Layers that cannot be compared are left out if they were chosen by default, else an error."""
        counts = [len(x) for x in rows.values()]
        usual = max(counts, key=lambda n: (counts.count(n), n), default=0)
        for name, x in rows.items():
            if len(x) != usual:
                other = next(key for key, y in rows.items() if len(y) == usual)
                problems[name] = f"has {len(x)} rows for the same samples, but {other} {usual}"
                if self.samples == "tokens":
                    problems[name] += "; pool='mean' or samples='batch' compares layers of different resolution"
        self.views = [view for view in self.views if view.name not in problems]
        if problems and (not self._by_default or not self.views):
            name, why = next(iter(problems.items()))
            raise ValueError(f"{self.layers_argument}: {name} {why}")
        self.widths = {view.name: rows[view.name].shape[1] for view in self.views}
        self.sizes = [float(rows[view.name].double().norm()) for view in self.views]
        self.skipped = problems

    def run(self, batch: Any) -> dict[str, Tensor]:
        """One forward pass; the layers' rows [n, d], with one n, in the order of `views`, each after `reduce`."""
        count = count_samples(batch)
        by_call: dict[tuple[str, str, int], list[View]] = {}
        for view in self.views:
            by_call.setdefault((self._alias[view.layer.name], view.layer.side, view.call), []).append(view)
        found: dict[str, Tensor] = {}

        def sink(name: str, side: str, call: int, value: Any, given: Any) -> None:
            for view in by_call.get((name, side, call), ()):
                try:
                    tensor, mask = dense(_pick(value, view.path))
                    x = self._rows((tensor.detach(), mask), view, self._streams.current, count)
                except Refused as error:
                    raise ValueError(f"{self.layers_argument}: {view.name} {error}") from None
                self._check_width(view, x)
                if not bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()):
                    bad = int((~x.isfinite()).sum())
                    self.nonfinite[view.name] = self.nonfinite.get(view.name, 0) + bad
                if self.reduce:
                    x = self.reduce(x)
                same = x.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                found[view.name] = x.clone() if same else x  # the module after it may work in place

        self._pass(batch, sink)
        for view in self.views:
            if view.name not in found:
                raise ValueError(f"{self.layers_argument}: {view.name} is not called for every batch")
        return {view.name: found[view.name] for view in self.views}

    def _check_width(self, view: View, x: Tensor) -> None:
        if x.shape[1] != self.widths[view.name]:
            hint = (
                "; give pool='mean' or samples='tokens', or inputs of one shape in all batches"
                if self.samples == "batch" and not view.pool
                else ""
            )
            raise ValueError(
                f"{self.layers_argument}: {view.name} must have the {self.widths[view.name]} features a row of the "
                f"first batch, got {x.shape[1]}{hint}"
            )

    def _rows(
        self, value: tuple[Tensor, Tensor | None], view: View, streams: list[Stream], count: int | None
    ) -> Tensor:
        tensor, own = value
        x = view.place.samples_first(tensor, view.features.axis, count)
        if count is not None and x.shape[0] != count:
            raise Refused(f"has {x.shape[0]} samples in axis {view.place.axis}, but the batch {count}")
        if own is not None:
            counted = next((s.counted for s in streams if s.counted is not None and s.counted.shape == own.shape), None)
            streams = [Stream(own, counted)]
        if self.samples == "tokens" and self.views and view is self.views[0]:
            index = torch.arange(len(x), device=x.device).view(-1, *(1,) * (x.dim() - 1)).expand(*x.shape[:-1], 1)
            self.groups = rows_of(index, view.features, streams, "tokens", None)[:, 0] if x.dim() > 2 else None
        return rows_of(x, view.features, streams, self.samples, view.pool)


def _starting(starts: dict[str, int], name: str, evidence: Evidence) -> Callable[[nn.Module, Any], None]:
    def start(module: nn.Module, args: Any) -> None:
        starts[name] = evidence.clock

    return start


def _at(one: _Seen, path: tuple) -> tuple[Tensor, Tensor | None]:
    return next((tensor, mask) for key, tensor, mask in one.values if key == path)


def _pick(value: Any, path: tuple) -> Any:
    """What lies at a path of positions, keys and attributes."""
    found = dict(tensors_of(value))
    if path not in found:
        raise Refused(f"does not put out {'.'.join(map(str, path)) or 'a tensor'} for every batch")
    return found[path]


def _choose(layer: Layer, one: _Seen, two: _Seen | None, order: Tensor) -> tuple[tuple, Place]:
    """Which of a module's tensors is meant, and where its samples are."""
    if not one.values:
        raise Refused("puts out no floating-point tensor")
    candidates = one.values
    if layer.path is not None:
        candidates = [item for item in one.values if item[0][: len(layer.path)] == layer.path]
        if not candidates and layer.path == (0,) and one.values[0][0] == ():
            candidates = one.values[:1]
        if not candidates:
            there = ", ".join(".".join(map(str, path)) or "a tensor" for path, _, _ in one.values)
            raise Refused(f"puts out nothing under {'.'.join(map(str, layer.path))!r}; there is {there}")
    places: list[tuple[tuple, Tensor, Place]] = []
    reasons: list[str] = []
    for path, tensor, _ in candidates:
        if layer.batch_axis is not None and not -tensor.dim() <= layer.batch_axis < tensor.dim():
            found: Place | str = f"puts out {list(tensor.shape)}, which has no axis {layer.batch_axis}"
        elif layer.batch_axis is not None:
            found = Place(layer.batch_axis % tensor.dim())
        else:
            match = None if two is None else next((y for key, y, _ in two.values if key == path), None)
            found = find_samples(tensor, match, order)
        if isinstance(found, Place):
            places.append((path, tensor, found))
        else:
            reasons.append(found)
    if not places:
        raise Refused(max(reasons, key=lambda reason: "single number" not in reason))
    path, _, place = next((item for item in places if item[1].shape == one.shape), places[0])
    return path, place
