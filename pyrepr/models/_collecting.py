"""The pass of :func:`pyrepr.compare` over its data: two sides in, one table of similarities out."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._checks import memory
from pyrepr._reporting import replacing
from pyrepr.models._inputs import Inputs, Tokens, count_samples
from pyrepr.models._layers import Layer, Layers, choose_names
from pyrepr.models._recording import Recorder
from pyrepr.models._scores import Score
from pyrepr.similarity import DegenerateInputWarning, Kernel, Measure, StreamingCKA, cka_matrix, gram
from pyrepr.similarity._batches import Batches
from pyrepr.similarity._hsic import normalise, warn_if_degenerate
from pyrepr.stats import LayerMoments
from pyrepr.stats._blocks import GROUP_BYTES

Stored = Mapping[str, Tensor]


class StoredSide:
    """Activations that were computed elsewhere, handed out in step with the other side."""

    def __init__(self, stored: Stored, wanted: Layers | None, argument: str) -> None:
        argument_layers = argument.replace("model", "layers")
        if callable(wanted) and not isinstance(wanted, Layer):
            raise TypeError(f"{argument_layers} must be names or patterns for stored activations, got a function")
        if not stored:
            raise ValueError(f"{argument} must hold at least one layer, got none")
        self.argument = argument
        chosen = list(stored)
        if wanted is not None:
            chosen = [layer.name for layer in choose_names(list(stored), wanted, argument_layers, argument)]
        self._stored = {name: stored[name] for name in chosen}
        for name, x in self._stored.items():
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1:
                raise TypeError(f"{argument}[{name!r}] must be a floating-point tensor [N, …]")
        lengths = {name: x.shape[0] for name, x in self._stored.items()}
        self.total = next(iter(lengths.values()))
        for name, length in lengths.items():
            if length != self.total:
                first = next(iter(lengths))
                raise ValueError(
                    f"{argument}: all layers must have the rows of {first}, {self.total}, got {name}: {length}"
                )
        self.widths = {name: x[0].numel() if len(x) else 1 for name, x in self._stored.items()}
        self.readings = {name: f"{list(x.shape)}: stored, samples along axis 0" for name, x in self._stored.items()}
        self.skipped: dict[str, str] = {}
        self.nonfinite = {name: bad for name, x in self._stored.items() if (bad := int((~x.isfinite()).sum()))}
        self.taken = 0

    def take(self, n: int | None) -> dict[str, Tensor]:
        """The next n rows; all of them for `None`."""
        n = self.total if n is None else n
        if self.taken + n > self.total:
            raise ValueError(f"{self.argument} has {self.total} stored rows, but the data gives more samples")
        rows = slice(self.taken, self.taken + n)
        self.taken += n
        return {name: x[rows].flatten(1) if x.dim() > 1 else x[rows, None] for name, x in self._stored.items()}

    def check_end(self) -> None:
        if self.taken != self.total:
            raise ValueError(f"{self.argument} has {self.total} stored rows, but the data gives {self.taken} samples")


Side = Recorder | StoredSide


def make_side(
    model: object,
    wanted: Layers | None,
    argument: str,
    *,
    samples: str,
    pool: str | None,
    tokens: Tokens,
    inputs: Inputs | None,
) -> Side:
    if isinstance(model, nn.Module):
        return Recorder(model, wanted, argument, samples=samples, pool=pool, tokens=tokens, inputs=inputs)
    if isinstance(model, Mapping):
        return StoredSide(model, wanted, argument)
    raise TypeError(f"{argument} must be a torch.nn.Module or a dict of stored activations, got {type(model).__name__}")


class Held:
    """The rows of every layer, for measures that moments do not determine and for standard errors."""

    mode = "exact"

    def __init__(self, why: str) -> None:
        self.why = why
        self.samples, self.split, self.bytes = 0, 0, 0
        self.parts: list[list[Tensor]] = []
        self.groups: list[Tensor] = []

    def update(self, xs: list[Tensor], ys: list[Tensor] | None = None) -> None:
        layers = [*xs, *(ys or [])]
        self.bytes += sum(x.numel() * x.element_size() for x in layers)
        if layers[0].is_cpu and 2 * self.bytes > (have := memory()):
            raise MemoryError(
                f"{self.why} needs the rows of all samples: {self.bytes / 2**30:.1f} GiB so far, on a machine of "
                f"{have / 2**30:.1f}; give fewer samples or layers, pool='mean', or a measure that streams"
            )
        self.split, self.samples = len(xs) if ys else 0, self.samples + len(xs[0])
        self.parts.append(layers)

    def layers(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Both sides' layers with all rows; the batches are let go one layer at a time."""
        count = len(self.parts[0])
        whole = []
        for i in range(count):
            whole.append(torch.cat([part[i] for part in self.parts]))
            for part in self.parts:
                part[i] = part[i][:0]
        return whole[: self.split or None], whole[self.split :] if self.split else None


class Streamed:
    """Moments, for several measures that they determine."""

    mode = "exact"

    def __init__(self) -> None:
        self.moments = LayerMoments()

    @property
    def samples(self) -> int:
        return self.moments.samples

    def update(self, xs: list[Tensor], ys: list[Tensor] | None = None) -> None:
        self.moments.update(xs, ys)

    def state_dict(self) -> dict[str, Any]:
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state)


class Batchwise:
    """Mode "minibatch": a ratio of weighted sums over batches (see :class:`pyrepr.StreamingCKA`), of which each batch's
    table [M, M] is kept: their spread gives the standard error. The layers' widths may differ between batches. σ is
    chosen from the first one."""

    mode = "minibatch"

    def __init__(self, kernel: Kernel, estimator: str) -> None:
        self.kernel, self.estimator = kernel, estimator
        self.samples, self.split = 0, 0
        self.tables: list[Tensor] = []
        self.floor: Tensor | None = None
        self.scales: Tensor | None = None

    def update(self, xs: list[Tensor], ys: list[Tensor] | None = None) -> None:
        split = len(xs) if ys else 0
        # γ = 1 / width is no scale to keep: widths may differ.
        batch = Batches.of([*xs, *(ys or [])], split, self.kernel, self.estimator, self.scales)
        self.scales = batch.scales if self.kernel.needs_median else None
        self.split = split
        self.floor = batch.floor if self.floor is None else self.floor + batch.floor
        self.samples += batch.n
        self.tables.append(batch.hsic)

    def _ratio(self, table: Tensor, floor: Tensor | None) -> Tensor:
        own, split = table.diagonal(), self.split
        if floor is not None:
            names = [f"xs[{i}]" for i in range(split or len(own))] + [f"ys[{i}]" for i in range(len(own) - split)]
            own = warn_if_degenerate(own, floor, names[: len(own)])
        return normalise(table[:split, split:], own[:split], own[split:]) if split else normalise(table, own, own)

    def compute(self) -> Tensor:
        return self._ratio(torch.stack(self.tables).sum(0), self.floor)

    def stderr(self) -> Tensor:
        """[La, Lb]: the jackknife over batches; NaN for a single one."""
        tables = torch.stack(self.tables)
        total, count = tables.sum(0), len(tables)
        left = torch.stack([self._ratio(total - table, None) for table in tables])
        if count < 2:
            return torch.full_like(left[0], torch.nan)
        return ((count - 1) / count * (left - left.mean(0)).square().sum(0)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        kept = {key: getattr(self, key) for key in ("samples", "split", "floor", "scales")}
        return {**kept, "tables": torch.stack(self.tables)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self.split, self.floor, self.scales = (
            state[key] for key in ("samples", "split", "floor", "scales")
        )
        self.tables = list(state["tables"])


class Pass:
    """Batches go in with :meth:`step`; what was recorded of one dies before the next, unless rows are held.

    Args:
        a, b: the sides; one object twice for a model and itself.
        samples, estimator, mode, kernel: as of :func:`pyrepr.compare`.
        measures: what to compute; ``None``: CKA with that kernel and estimator.
        stderr: whether standard errors are asked for.
        limit: bytes that ``mode="auto"`` gives to exact moments.
    """

    def __init__(
        self,
        a: Side,
        b: Side,
        *,
        samples: str,
        estimator: str,
        mode: str,
        kernel: Kernel,
        measures: Sequence[Measure] | None,
        stderr: bool,
        limit: int,
    ) -> None:
        self.sides = [a] if b is a else [a, b]
        self.samples, self.estimator, self.mode, self.kernel, self.limit = samples, estimator, mode, kernel, limit
        self.measures, self.stderr = measures, stderr
        # Stored activations are one batch, of which the estimate is exact and costs no moments.
        self.whole = all(isinstance(side, StoredSide) for side in self.sides)
        self.stream: StreamingCKA | Batchwise | Held | Streamed | None = None

    @property
    def widths(self) -> list[dict[str, int]]:
        return [side.widths for side in self.sides]

    def begin(self, batch: Any) -> None:
        """Looks at the first batch: which layers there are, how they are read, what is kept of them."""
        for side in self.sides:
            if isinstance(side, Recorder):
                side.prepare(batch)
        self.stream = self.choose_stream()
        if isinstance(self.stream, Batchwise) and not self.whole:
            for side in self.sides:
                if isinstance(side, Recorder):
                    side.reduce = self.compact

    def step(self, batch: Any) -> None:
        """One batch through both sides."""
        if self.stream is None:
            self.begin(batch)
        assert self.stream is not None
        layers, split = self.rows(batch)
        if isinstance(self.stream, Batchwise):
            self.check_batch(layers[0].shape[0])
        if isinstance(self.stream, Held):
            groups = next((g for side in self.sides if (g := getattr(side, "groups", None)) is not None), None)
            first = int(self.stream.groups[-1].max()) + 1 if self.stream.groups else 0
            self.stream.groups.append(first + (torch.arange(len(layers[0])) if groups is None else groups.cpu()))
        self.stream.update(layers[: split or None], layers[split:] if split else None)

    def rows(self, batch: Any) -> tuple[list[Tensor], int]:
        """What both sides record of a batch, in one dtype on one device, and where the second begins."""
        recorded = [side.run(batch) if isinstance(side, Recorder) else None for side in self.sides]
        n = next((_count(rows) for rows in recorded if rows is not None), None)
        both = [
            side.take(n) if isinstance(side, StoredSide) else rows or {}
            for side, rows in zip(self.sides, recorded, strict=True)
        ]
        self.check_counts(_count(both[0]), _count(both[-1]))
        layers = [x for rows in both for x in rows.values()]
        dtype = layers[0].dtype
        for x in layers:
            dtype = torch.promote_types(dtype, x.dtype)
        return [x.to(layers[0].device, dtype) for x in layers], len(both[0]) if len(both) > 1 else 0

    def compact(self, x: Tensor) -> Tensor:
        """Rows [n, d] with more features than samples turned into n dimensions: [n, n] with the same inner products,
        so the same similarities, of which one batch's worth is small. Only where that is much less: the eigenvectors
        cost as much as the similarities of a layer ten times as wide as the batch."""
        n, d = x.shape
        if d <= 8 * n or (self.kernel.name == "polynomial" and self.kernel.gamma is None):
            return x
        k = gram(x, center=self.kernel.name not in ("polynomial", "cosine")).double()
        if not bool(k.isfinite().all()):
            return torch.full_like(k, torch.nan)
        sizes, directions = torch.linalg.eigh(k)
        return (directions * sizes.clamp_min(0).sqrt()).to(torch.promote_types(x.dtype, torch.float32))

    def check_counts(self, count: int, other: int) -> None:
        if count != other:
            unit = "tokens" if self.samples == "tokens" else "samples"
            raise ValueError(
                f"model_a and model_b must give the same {unit} for a batch, got {count} and {other}"
                + ("; pool='mean' compares models that cut their input differently" if unit == "tokens" else "")
            )

    def choose_stream(self) -> StreamingCKA | Batchwise | Held | Streamed:
        """What is kept of the batches: by the measures, the stated rule of mode="auto", and a refusal of exact moments
        that cannot fit."""
        rows = [measure.key for measure in self.measures or () if not measure.streams]
        if rows:
            return Held(rows[0])
        batchwise = self.mode == "minibatch" or (self.kernel.name != "linear" and self.measures is None)
        if self.stderr and (self.whole or not batchwise):
            return Held("stderr=True")
        if self.measures is not None:
            return Streamed()
        if batchwise or self.whole:
            return Batchwise(self.kernel, self.estimator)
        widths = [width for side in self.widths for width in side.values()]
        need = exact_bytes(widths, len(self.widths[0]) if len(self.widths) > 1 else 0)
        if self.mode == "auto" and need > self.limit:
            return Batchwise(self.kernel, self.estimator)
        if need > (have := memory()):
            raise ValueError(
                f"mode='exact' would keep {need / 2**30:.1f} GiB of moments (layers of up to {max(widths)} features), "
                f"this machine has {have / 2**30:.1f} GiB; use mode='minibatch', pool='mean' or fewer layers"
            )
        return StreamingCKA(estimator=self.estimator, kernel=self.kernel)

    def check_batch(self, n: int) -> None:
        least = 4 if self.estimator == "unbiased" else 2
        if n < least:
            if self.whole:
                raise ValueError(f"model_a must have at least {least} rows for the {self.estimator} estimator, got {n}")
            raise ValueError(
                f"data: every batch must have at least {least} samples in mode 'minibatch' with the {self.estimator} "
                f"estimator, got {n}; drop a short last batch (DataLoader's drop_last=True)"
            )

    def scores(self) -> dict[str, Score]:
        """By measure, of all batches."""
        for side in self.sides:
            if isinstance(side, StoredSide) and self.stream is not None:
                side.check_end()
        if self.stream is None or self.stream.samples == 0:
            raise ValueError("data must give at least one batch, got none")
        needs = [(m.least, m.describe()) for m in self.measures or ()]
        least, what = max(needs or [(4 if self.estimator == "unbiased" else 2, f"the {self.estimator} estimator")])
        if self.stream.samples < least:
            raise ValueError(f"data must give at least {least} samples for {what}, got {self.stream.samples}")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scores = self._scores()
        for warning in caught:
            self.warn(warning)
        return scores

    def kernel_options(self) -> dict[str, float | list[float]]:
        """The options of CKA's kernel, and of a stream of batches the σ that was chosen for each layer."""
        options: dict[str, float | list[float]] = dict(self.kernel.options())
        if isinstance(self.stream, Batchwise) and self.stream.scales is not None:
            sigma, split = self.stream.scales.tolist(), self.stream.split or None
            options["sigma_a"] = sigma[:split]
            options["sigma_b"] = sigma[split:] if split else sigma
        return options

    def _scores(self) -> dict[str, Score]:
        chance = 0.0 if self.estimator == "unbiased" else None
        if isinstance(self.stream, (StreamingCKA, Batchwise)):
            values = self.stream.compute().cpu()
            stderr = self.stream.stderr().cpu() if self.stderr and isinstance(self.stream, Batchwise) else None
            return {"cka": Score(values, stderr, chance=chance)}
        assert self.stream is not None
        if isinstance(self.stream, Streamed):
            moments = self.stream.moments
            return {m.key: _score(m, m.of_moments(moments), None, moments.samples) for m in self.measures or ()}
        (xs, ys), n = self.stream.layers(), self.stream.samples
        groups = torch.cat(self.stream.groups).to(xs[0].device) if self.samples == "tokens" else None
        if self.measures is None:
            options: dict[str, Any] = {"kernel": self.kernel, "estimator": self.estimator}
            values, errors = cka_matrix(xs, ys, return_stderr=True, groups=groups, **options)
            return {"cka": Score(values.double().cpu(), errors.double().cpu(), chance=chance)}
        found = {}
        for measure in self.measures:
            errors = measure.stderr(xs, ys, groups=groups) if self.stderr else None
            found[measure.key] = _score(measure, measure.matrix(xs, ys), errors, n)
        return found

    def warn(self, warning: warnings.WarningMessage) -> None:
        """The stream's warning again, with names of layers where it says xs[3]."""
        message = str(warning.message)
        for list_name, prefix, widths in zip(("xs", "ys"), ("model_a", "model_b"), self.widths, strict=False):
            for i, name in enumerate(widths):
                message = message.replace(f"{list_name}[{i}]", f"{prefix} {name}")
        category = warning.category if issubclass(warning.category, DegenerateInputWarning) else UserWarning
        warnings.warn(message, category, stacklevel=4)


SAVE_SECONDS = 60.0


class Checkpoint:
    """A pass that is saved every minute, and goes on from what was saved."""

    def __init__(self, run: Pass, path: str | os.PathLike[str] | None) -> None:
        self.run, self.path = run, None if path is None else Path(path)
        self.done, self.seen, self.saved = 0, 0, time.monotonic()  # batches in the file, in this run, time
        self.rows = 0  # of the batches seen
        self.state: dict[str, Any] | None = None
        if self.path is not None and self.path.exists():
            try:
                self.state = torch.load(self.path, weights_only=True)
                self.done = int(self.state["done"])
            except Exception as error:  # torch.load raises whatever its reader meets
                raise ValueError(f"checkpoint must be a file that an interrupted compare left, got {path}") from error

    def step(self, batch: Any) -> None:
        if self.run.stream is None:
            self.run.begin(batch)
            if self.path is not None and isinstance(self.run.stream, Held):
                raise ValueError(f"checkpoint cannot hold the rows that {self.run.stream.why} needs")
            if self.state is not None:
                self._restore(self.state)
        if self.seen >= self.done:
            self.run.step(batch)
        self.seen += 1
        self.rows += count_samples(batch) or 0
        if self.state is not None and self.seen == self.done and self.rows != self.state["rows"]:
            raise ValueError(
                f"data must give the batches that checkpoint {self.path} has seen, {self.state['rows']} samples in the "
                f"first {self.done}, got {self.rows}"
            )
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def _layout(self) -> list[Any]:
        run = self.run
        return [
            run.samples,
            run.estimator,
            type(run.stream).__name__,
            run.kernel.name,
            run.kernel.options(),
            [list(w.items()) for w in run.widths],
        ]

    def _print(self) -> Tensor:
        """A number a layer by which weights and data are known again: a norm of what the first samples gave."""
        return torch.tensor([size for side in self.run.sides for size in getattr(side, "sizes", ())])

    def _restore(self, state: dict[str, Any]) -> None:
        if state["layout"] != self._layout():
            raise ValueError(f"checkpoint {self.path} is of other layers or options; delete it to start again")
        if not torch.allclose(state["print"], self._print(), rtol=1e-3, equal_nan=True):
            raise ValueError(f"checkpoint {self.path} is of other weights, data or batches; delete it to start again")
        self.run.stream.load_state_dict(state["stream"])  # type: ignore[union-attr]

    def save(self) -> None:
        """Nothing without a path, or before a batch that the file does not have."""
        stream = self.run.stream
        if self.path is None or self.seen <= self.done or stream is None or isinstance(stream, Held):
            return
        with replacing(self.path) as temporary:
            state = {"done": self.seen, "rows": self.rows, "layout": self._layout(), "print": self._print()}
            torch.save({**state, "stream": stream.state_dict()}, temporary)
        self.saved = time.monotonic()

    def check_end(self) -> None:
        if self.seen < self.done:
            raise ValueError(
                f"data must give the batches that checkpoint {self.path} has seen, {self.done}, got {self.seen}"
            )

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _score(measure: Measure, values: Tensor, stderr: Tensor | None, n: int) -> Score:
    how = measure.describe() + ("" if measure.symmetric else ", asymmetric: rows explain columns")
    low, high = measure.limits
    errors = None if stderr is None else stderr.double().cpu()
    return Score(values.double().cpu(), errors, measure.title, how, low, high, measure.chance(n))


def _count(rows: dict[str, Tensor]) -> int:
    return next(iter(rows.values())).shape[0]


def exact_bytes(widths: list[int], split: int) -> int:
    """What exact moments take at their peak: 8·Σ d_a d_b over the pairs that they keep, and beside it a group of blocks
    that is being replaced and three blocks while the sums are centred."""
    own = sum(d * d for d in widths)
    pairs = own + sum(widths[:split]) * sum(widths[split:]) if split else (own + sum(widths) ** 2) // 2
    return 8 * (pairs + 3 * max(widths) ** 2) + min(8 * pairs, GROUP_BYTES)
