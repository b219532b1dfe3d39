"""Replacing a model's linear layers by lookup tables or signs, and what it cost: :func:`convert` and its report."""

from __future__ import annotations

import html
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._checks import shown
from pyrepr._modules import as_linear, evaluating, hooked, restored
from pyrepr._optional import require
from pyrepr._reporting import progress_bar, replacing, versions
from pyrepr.functional.lookup import check_bits, check_hash, check_weighting
from pyrepr.models._candidates import (
    FORMS,
    Candidate,
    Measurements,
    asked_name,
    bytes_of,
    check_budget,
    form_options,
    others,
)
from pyrepr.models._inputs import Inputs, Stream, Streams, call, check_data, main_output, taken
from pyrepr.models._layers import Layers, layer_table, unwrap
from pyrepr.models._recording import plain_execution
from pyrepr.models._swapping import Swaps, choose_linears
from pyrepr.nn._lookup_fit import hold_out
from pyrepr.nn.lookup import FITTED_WEIGHTING, Described, LookupLinear
from pyrepr.nn.sign_linear import SignLinear

__all__ = ["Conversion", "ConvertedLayer", "convert"]

FORMAT = "pyrepr.Conversion"


@dataclass(frozen=True)
class ConvertedLayer:
    """What one replacement cost.

    Attributes:
        name: of the layer in the model. in_features, out_features: its widths.
        relative_mse: squared error over the variance of the output, for the input the layer really gets, on an eighth
            of the calibration rows that it was not fitted to; NaN if the output does not vary.
        bytes_before, bytes_after: of parameters and buffers.
        ms_before, ms_after: median milliseconds of a call for each of the report's ``batch_sizes``, measured in turn on
            calibration rows, hot: what fits in the cache is there.
        entropy: of the codes, in bits, mean over the tables; at most the layer's `bits`. NaN without tables.
        rows, dead_rows: of all tables together, and those that no calibration row reads. 0 without tables.
        candidates: what else it could have become, and the chosen one, each with its error, bytes and milliseconds
            (:class:`Candidate`); empty where neither times nor a budget were asked for.
    """

    name: str
    in_features: int
    out_features: int
    relative_mse: float
    bytes_before: int
    bytes_after: int
    ms_before: tuple[float, ...]
    ms_after: tuple[float, ...]
    entropy: float
    rows: int
    dead_rows: int
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Conversion:
    """The report of :func:`convert`; ``print`` shows it as a table.

    Attributes:
        model: what the model is called.
        layers: one :class:`ConvertedLayer` each, in the order they run in.
        skipped: from the name of a layer that was chosen but left alone to the reason.
        output: the model's output that was looked at, by name (``"logits"``, ``"last_hidden_state"``, …); ``""`` for a
            model that puts out a tensor.
        output_mse: of that output over all batches, squared error over variance.
        form, bits, hash, rank, weighting, quantize: as asked for.
        batch_sizes: numbers of rows at which times were measured.
        calibration_rows: the most that a layer was converted with.
        budget: as asked for; form, hash and rank are then those asked for, not those of every layer.
        versions: of pyrepr, torch and Python.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = pyrepr.convert(model, [torch.randn(256, 16)], bits=4, batch_sizes=(), progress=False)
        >>> len(report.layers)
        2
    """

    model: str
    layers: tuple[ConvertedLayer, ...]
    skipped: dict[str, str]
    output_mse: float
    bits: int
    rank: int
    weighting: str
    quantize: str | None
    batch_sizes: tuple[int, ...]
    calibration_rows: int
    output: str = ""
    hash: str = "one_bit"
    budget: dict[str, float] | None = None
    form: str = "tables"
    versions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Conversion({self.model}: {self.describe()})"

    def describe(self) -> str:
        """What was converted, how, and what it did to the model's output, in a line."""
        count = len(self.layers)
        options = f"bits={self.bits}, hash={self.hash!r}, rank={self.rank}, weighting={self.weighting!r}"
        stored = "tables"
        if self.budget is not None:
            shares = " and ".join(f"{share:g} times its {key}" for key, share in self.budget.items())
            options = f"bits={self.bits}, each the most accurate tables or signs within {shares}"
            stored = "tables and weights"
        elif self.form == "signs":
            options = f"form='signs', hash={self.hash!r}, rank={self.rank}"
            stored = "weights"
        return (
            f"{count} layer{'' if count == 1 else 's'} converted, {len(self.skipped)} left alone; {options}"
            + (f", {self.quantize} {stored}" if self.quantize else "")
            + f"; {self.calibration_rows} calibration rows; relative squared error of the output {self.output_mse:.3g}"
        )

    def _title(self) -> str:
        return f"{'Signs' if self.form == 'signs' else 'Lookup tables'} in {self.model}"

    def columns(self) -> list[str]:
        """Headers of :meth:`table`."""
        times = [f"ms at {size}" for size in self.batch_sizes]
        return ["layer", "in → out", "rel. sq. error", "MB", *times, "entropy, bits", "dead rows"]

    def table(self) -> list[list[str]]:
        """The report as cells, a line a layer and a last one for all."""

        def change(before: float, after: float) -> str:
            return f"{before:.3g} → {after:.3g}"

        def line(name: str, shape: str, error: str, some: Sequence[ConvertedLayer], use: list[str]) -> list[str]:
            size = change(sum(x.bytes_before for x in some) / 1e6, sum(x.bytes_after for x in some) / 1e6)
            pairs = [
                (sum(x.ms_before[i] for x in some), sum(x.ms_after[i] for x in some))
                for i in range(len(self.batch_sizes))
            ]
            times = [f"{change(*pair)} ({pair[0] / pair[1]:.2f}×)" for pair in pairs]
            return [name, shape, error, size, *times, *use]

        lines = [
            line(
                layer.name,
                f"{layer.in_features} → {layer.out_features}",
                f"{layer.relative_mse:.4f}",
                [layer],
                [f"{layer.entropy:.2f}", f"{layer.dead_rows} of {layer.rows}"] if layer.rows else ["", ""],
            )
            for layer in self.layers
        ]
        dead, rows = sum(x.dead_rows for x in self.layers), sum(x.rows for x in self.layers)
        used = f"{dead} of {rows}" if rows else ""
        return [*lines, line("all", "", "", self.layers, ["", used])] if lines else []

    def curve(self, name: str | None = None) -> list[list[str]]:
        """What a layer could have become as cells, headers first: its candidates, the fastest first; all that every
        layer has, summed over the layers (errors are means), without a name.

        Raises:
            ValueError: for a name that no converted layer has.
        """
        layers = [layer for layer in self.layers if name in (None, layer.name)]
        if name is not None and not layers:
            raise ValueError(f"name must be that of a converted layer, got {name!r}")
        head = ["could be", "rel. sq. error", "MB", *(f"ms at {size}" for size in self.batch_sizes), "chosen"]
        found = [{each.name: each for each in layer.candidates} for layer in layers]
        lines = []
        for key in found[0] if found else ():
            if all(key in one for one in found):
                some = [one[key] for one in found]
                ms = [sum(each.ms[i] for each in some) for i in range(len(self.batch_sizes))]
                size, error = sum(each.bytes for each in some), statistics.fmean(each.relative_mse for each in some)
                chosen = sum(each.chosen for each in some)
                cells = [key, f"{error:.4f}", f"{size / 1e6:.3g}", *(f"{each:.3g}" for each in ms), str(chosen or "")]
                lines.append((ms or [size], cells))
        return [head, *(cells for _, cells in sorted(lines, key=lambda line: line[0]))] if lines else []

    def __str__(self) -> str:
        left = [f"left alone: {name} {reason}" for name, reason in self.skipped.items()]
        lines = _aligned([self.columns(), *self.table()]) if self.layers else []
        return "\n".join([f"{self.model}: {self.describe()}", *lines, *left, *_aligned(self.curve())])

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Writes one self-contained page: the table, sortable, with bars for the errors.

        Raises:
            OSError: if the file cannot be written (nothing is left behind).
        """
        from pyrepr.models._pages import write_page

        title = title or self._title()
        *lines, total = self.table() or [[]]
        data = {
            "title": title,
            "how": self.describe(),
            "columns": self.columns(),
            "lines": lines,
            "total": total,
            "errors": [x.relative_mse if math.isfinite(x.relative_mse) else None for x in self.layers],
            "skipped": list(self.skipped.items()),
            "curve": self.curve(),
        }
        return write_page(Path(path), "conversion.html", title, data)

    def _repr_html_(self) -> str:
        """For notebooks: the table, and what was left alone."""
        escape = html.escape
        lines = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in self.table()
        )
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns())
        left = "".join(f"<li>{escape(name)} {escape(why)}</li>" for name, why in self.skipped.items())
        return f"<p>{escape(repr(self))}</p><table><tr>{head}</tr>{lines}</table>" + (
            f"<details><summary>{len(self.skipped)} left alone</summary><ul>{left}</ul></details>" if left else ""
        )

    def to_pandas(self) -> Any:
        """A ``DataFrame`` with a line for every layer; times are columns ``ms_before_64``, ``ms_after_64``, …

        Raises:
            ImportError: without pandas.
        """
        pandas = require("pandas", "pandas")
        lines = []
        for layer in self.layers:
            line = {
                key: value for key, value in asdict(layer).items() if key not in ("ms_before", "ms_after", "candidates")
            }
            for i, size in enumerate(self.batch_sizes):
                line |= {f"ms_before_{size}": layer.ms_before[i], f"ms_after_{size}": layer.ms_after[i]}
            lines.append(line)
        frame = pandas.DataFrame(lines).set_index("name") if lines else pandas.DataFrame()
        frame.attrs.update({"model": self.model, "output_mse": self.output_mse, "skipped": dict(self.skipped)})
        return frame

    def to_xarray(self) -> Any:
        """A ``Dataset`` over ``name`` with a variable for every column of :meth:`to_pandas`.

        Raises:
            ImportError: without xarray or pandas.
        """
        xarray = require("xarray", "xarray")
        return xarray.Dataset.from_dataframe(self.to_pandas())

    def plot(
        self,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
        title: str | None = None,
        dpi: float = 150,
    ) -> Any:
        """Draws the relative squared error of every layer as bars with matplotlib and returns the axes.

        Args:
            ax: axes to draw on, or a path as `path`; ``None`` makes a figure of its own.
            path: a file to write as well: PNG, SVG or PDF by its suffix, at `dpi` dots an inch.
            title: above the figure, or above `ax` where that is given.

        Raises:
            ValueError: for another suffix; ImportError: without matplotlib; OSError: if the file cannot be written.
        """
        from pyrepr.models import _figures as figures

        if isinstance(ax, (str, os.PathLike)):
            ax, path = None, ax
        target = None if path is None else figures.check_path(path)
        own = ax is None
        ax = figures.axes_for(ax, max(2, len(self.layers)), 8, target)
        figures.draw_bars(
            ax,
            [layer.name for layer in self.layers],
            [layer.relative_mse for layer in self.layers],
            label="relative squared error",
            title=(title or self._title()) if own else "",
            how=self.describe() if own or title is None else title,
        )
        if target is not None:
            figures.save_figure(ax, target, dpi)
        return ax

    def __eq__(self, other: object) -> bool:
        """Whether all is the same; NaN equals NaN."""
        if not isinstance(other, Conversion):
            return NotImplemented
        return _without_nan(asdict(self)) == _without_nan(asdict(other))

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a ``.json``; :meth:`load` reads it. NaN becomes null.

        Raises:
            ValueError: for another suffix; OSError: if the file cannot be written (nothing is left behind).
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ValueError(f"path must end in .json, got {path.name!r}")
        text = json.dumps({"format": FORMAT, **_without_nan(asdict(self))}, indent=1, allow_nan=False)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Conversion:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the file is something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise KeyError("format")
            layers = tuple(_layer(fields) for fields in content.pop("layers"))
            return cls(layers=layers, **_with_nan(content, "batch_sizes"))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"path must be a file written by Conversion.save, got {os.fspath(path)!r}") from error


def _aligned(cells: list[list[str]]) -> list[str]:
    """Lines of text from lines of cells."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _layer(fields: dict[str, Any]) -> ConvertedLayer:
    candidates = tuple(Candidate(**_with_nan(each, "ms")) for each in fields.get("candidates", ()))
    return ConvertedLayer(**{**_with_nan(fields, "ms_before", "ms_after"), "candidates": candidates})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(fields: dict[str, Any], *tuples: str) -> dict[str, Any]:
    missing = {key: math.nan for key in ("relative_mse", "output_mse", "entropy") if fields.get(key, 0) is None}
    return {**fields, **missing, **{key: tuple(fields[key]) for key in tuples}}


def convert(
    model: nn.Module,
    data: Iterable[Any],
    *,
    inputs: Inputs | None = None,
    select: Layers | None = None,
    form: str = "tables",
    bits: int = 8,
    hash: str | None = None,
    rank: int = 0,
    weighting: str | None = None,
    quantize: str | None = None,
    budget: Mapping[str, float] | None = None,
    batch_sizes: Sequence[int] = (1, 64, 1024),
    max_rows: int = 16384,
    progress: bool = True,
) -> Conversion:
    """Replaces linear layers of a model by :class:`pyrepr.nn.LookupLinear` or :class:`pyrepr.nn.SignLinear`, in place,
    and reports what it cost.

    Layer by layer in the order they run, each fitted by its class's ``from_linear`` to the input it gets from the
    layers replaced before it. The model runs in eval mode and without gradients; afterwards every submodule
    has its training flag again, no hook is left, and new parameters are trainable where the layer's were. If anything
    fails, every layer is back in its place. Expect to follow with :func:`pyrepr.distill`; save with
    :func:`pyrepr.save_converted` or, a model of transformers, with its own ``save_pretrained``: its ``from_pretrained``
    reads that after ``import pyrepr.integrations.transformers``.

    Args:
        model: any module; DataParallel and compiled models are changed inside.
        data: what the model sees in use: an iterable of batches as :func:`pyrepr.compare` takes them. Kept until the
            end. Padding is left out by the mask of the stream a layer works on, as there.
        inputs: a function from a batch to what the model takes, as there.
        select: names; patterns, where ``*`` stays within one part of a dotted name and ``**`` crosses them
            (``"encoder.layer.*.intermediate.dense"``); or a function of (name, module) that says yes or no. By default
            every ``nn.Linear`` (and ``Conv1D`` of transformers) but a language model's head. What is chosen and cannot
            be replaced (tied, quantised, offloaded or meta weights, adapters, a subclass, hooks, parametrizations,
            in_features that is no multiple of a chunk's elements for tables, a weight that the model reads itself, not
            called, an expert that saw no token, …) is left alone and in the report with the reason. What an adapter
            (PEFT) wraps is converted to tables where its own name is among the names; it cannot be merged with the
            adapter then, which raises NotImplementedError. It never becomes signs, which a merge would spoil unseen.
        form: what a layer becomes: ``"tables"`` (default), :class:`pyrepr.nn.LookupLinear`, the fastest for a token at
            a time; or ``"signs"``, :class:`pyrepr.nn.SignLinear`, with a thirty-second of the memory of tables of 8
            bits, faster from a few tokens on, and with fewer parameters to distil.
        bits, rank, weighting: see :class:`pyrepr.nn.LookupLinear` and its ``from_linear``. Signs have no `bits`, and
            no `weighting` but ``"none"``.
        hash: ``"one_bit"`` or ``"two_bit"``; by default the first for tables, and the second for signs. With tables
            the second reads twice as many and loses less than half.
        quantize: ``"int8"`` or ``"bf16"`` to store tables or weights so, which ends training them; ``None`` (default)
            for the dtype of the layer.
        budget: what a layer may take, as multiples of what it takes: ``{"time": 0.8}`` of its milliseconds at the first
            of `batch_sizes`, ``{"bytes": 2.0}`` of its bytes, or both. Each layer then becomes the most accurate thing
            that keeps to it, on unseen rows as measured here and now: tables with `bits` or signs, whatever the `form`,
            of both hashes, without a dense part and with ranks of a sixteenth, an eighth and a quarter of in_features,
            and what was asked for. That is up to seventeen fits a layer instead of one. ``None`` (default): every layer
            becomes what was asked for.
        batch_sizes: numbers of rows at which each layer is timed before and after; ``()`` for no timing. Default: a
            token, a small and a large batch. What else one could do is timed beside it, for the report's ``curve``:
            dense maps of low rank, and torch.ao's dynamic int8.
        max_rows: the most rows of input a layer is fitted to, taken evenly from all batches; at least ten times the
            layer's in_features is good.
        progress: a tqdm bar on stderr, where tqdm is installed.

    Returns:
        A :class:`Conversion`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; patterns that match
            nothing come with near matches, and a budget that nothing a layer can become keeps to with the nearest.
            MemoryError: if tables are larger than the machine's memory.

    Warns:
        UserWarning: for layers that get fewer calibration rows than they have features.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = pyrepr.convert(model, [torch.randn(256, 16)], bits=4, batch_sizes=(), progress=False)
        >>> type(model[0]).__name__
        'LookupLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    hash, weighting, width = _check_form(form, bits, hash, weighting)
    _check_options(rank, quantize, batch_sizes, max_rows)
    check_budget(budget, batch_sizes)
    names, skipped = choose_linears(model, select, width if budget is None else 1)
    job = _Job(unwrap(model), _batches(data), inputs, max_rows)
    done: list[ConvertedLayer] = []
    try:
        with evaluating([job.model]), plain_execution(), torch.no_grad():
            groups = job.groups(names, skipped)
            options = {"form": form, "bits": bits, "hash": hash, "rank": rank, "weighting": weighting}
            for name, rows in progress_bar(job.inputs(groups), progress, "convert", "layer", sum(map(len, groups))):
                layer = job.replace(name, rows, options, quantize, tuple(batch_sizes), budget)
                if isinstance(layer, str):
                    skipped[name] = layer
                else:
                    done.append(layer)
            output, error = job.output_mse()
            report = Conversion(
                model=type(job.model).__name__,
                layers=tuple(done),
                skipped=skipped,
                output=output,
                output_mse=error,
                bits=bits,
                hash=hash,
                rank=rank,
                weighting=weighting,
                quantize=quantize,
                batch_sizes=tuple(batch_sizes),
                calibration_rows=job.most_rows,
                budget=None if budget is None else {key: float(share) for key, share in budget.items()},
                form=form,
                versions=versions(),
            )
            _tell_transformers(job.model)
            return report
    except BaseException:
        job.swaps.undo()
        raise


def _tell_transformers(model: nn.Module) -> None:
    """So that `save_pretrained` of a model of theirs says what its layers are now."""
    theirs = sys.modules.get("transformers.modeling_utils")
    if theirs is not None and isinstance(model, theirs.PreTrainedModel):
        from pyrepr.integrations._quantizer import mark

        mark(model)


def _check_form(form: str, bits: int, hash: str | None, weighting: str | None) -> tuple[str, str, int]:
    """Hash and weighting, and what in_features must be a multiple of."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {shown(form)}")
    check_bits(bits)
    if form == "signs":
        hash = hash or "two_bit"
        check_hash(hash, 2)
        if weighting not in (None, "none"):
            raise ValueError(f"weighting must be 'none' for signs, got {shown(weighting)}")
        return hash, "none", 1
    hash = hash or "one_bit"
    width = check_hash(hash, bits)
    weighting = weighting or FITTED_WEIGHTING[hash]
    check_weighting(weighting, 1.0)
    return hash, weighting, width


def _check_options(rank: int, quantize: str | None, batch_sizes: Sequence[int], max_rows: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank must be an int of at least 0, got {rank!r}")
    if quantize not in (None, "int8", "bf16"):
        raise ValueError(f"quantize must be None, 'int8' or 'bf16', got {quantize!r}")
    sizes = [size for size in batch_sizes if isinstance(size, bool) or not isinstance(size, int) or size < 1]
    if sizes:
        raise ValueError(f"batch_sizes must be positive ints, got {sizes[0]!r}")
    if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 16:
        raise ValueError(f"max_rows must be an int of at least 16, got {max_rows!r}")


def _batches(data: Any) -> list[Any]:
    batches = list(check_data(data))
    if not batches:
        raise ValueError("data must give at least one batch, got none")
    return batches


def kept(x: Tensor, streams: Sequence[Stream]) -> Tensor:
    """x [B, T, d] or [B·T, d] as the rows [n, d] of positions that are no padding; all of them where no mask fits."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    for stream in streams:
        mask = stream.mask
        if mask is None:
            return rows
        if tuple(x.shape[:-1]) == tuple(mask.shape) or (x.dim() == 2 and len(x) == mask.numel()):
            return rows[mask.flatten().to(x.device)]
    return rows


class _Enough(Exception):
    """Ends a forward pass whose rest would tell nothing."""


class _Job:
    """One conversion: the model, the data, and what was replaced so far."""

    def __init__(self, model: nn.Module, batches: list[Any], feed: Inputs | None, max_rows: int) -> None:
        self.model, self.batches, self.feed = model, batches, feed
        self.streams = Streams(model)
        self.quota = max(1, max_rows // len(batches))
        self.table, self.swaps = layer_table(model), Swaps(model)
        self.training = {name: module.training for name, module in self.table.items()}
        self.repeated: set[str] = set()
        self.most_rows = 0

    def call(self, batch: Any) -> Any:
        self.streams.begin(batch, taken(batch, self.feed))
        with hooked(self.streams.hooks()):
            return call(self.model, batch, "model", self.feed)

    def linear(self, name: str) -> nn.Linear:
        return as_linear(self.table[name])

    def output(self, batch: Any) -> tuple[str, Tensor]:
        """What the model puts out for a batch, by name, as rows without padding."""
        found = main_output(self.call(batch))
        if found is None:
            raise ValueError("model must put out a floating-point tensor, got none")
        return found[0], kept(found[1], self.streams.current)

    def output_mse(self) -> tuple[str, float]:
        """The name of the model's output, and its squared error over its variance for all batches: what it puts out
        now against what it put out before."""
        name, rows, error = "", 0, 0.0
        shift = total = squares = torch.zeros(())
        for batch in self.batches:
            with self.swaps.undone():
                name, truth = self.output(batch)
            _, now = self.output(batch)
            truth, now = truth.double(), now.double()
            shift = truth.mean(0) if not rows else shift  # sums around it keep their digits
            rows += len(truth)
            total = total + (truth - shift).sum(0)
            squares = squares + (truth - shift).square().sum()
            error += float((now - truth).square().sum())
        variance = float(squares - total.square().sum() / rows) if rows else 0.0
        return name, error / variance if variance > 0 else math.nan

    def groups(self, names: list[str], skipped: dict[str, str]) -> list[list[str]]:
        """The layers in the order they run in for the first batch; those one tensor goes to, one after the other,
        together."""
        seen: list[tuple[str, Tensor]] = []

        def watch(name: str):
            return lambda module, args, kwargs: seen.append((name, next(iter((*args, *kwargs.values())))))

        with hooked(
            partial(self.table[name].register_forward_pre_hook, watch(name), with_kwargs=True) for name in names
        ):
            self.call(self.batches[0])
        calls = [name for name, _ in seen]
        skipped.update({name: "is not called in the model's forward" for name in names if name not in calls})
        groups: list[list[str]] = []
        previous = None
        for name, x in seen:
            if any(name in group for group in groups):
                continue
            if groups and x is previous and calls.count(name) == calls.count(groups[-1][0]) == 1:
                groups[-1].append(name)
            else:
                groups.append([name])
            previous = x
        self.repeated = {name for name in calls if calls.count(name) > 1}
        return groups

    def inputs(self, groups: list[list[str]]):
        """Each layer with the rows it gets, [n, in_features], as the model is when it is asked for."""
        for group in groups:
            rows = self.rows(group[0])
            self.most_rows = max(self.most_rows, len(rows))
            for name in group:
                yield name, rows

    def rows(self, name: str) -> Tensor:
        """Input rows of a layer over all batches, at most the quota of each, evenly spread."""
        collected: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next(iter((*args, *kwargs.values())))
            collected.append(kept(x.detach(), self.streams.current))
            if name not in self.repeated:
                raise _Enough

        found, linear = [], self.linear(name)
        nothing = linear.weight.new_empty(0, linear.in_features)  # a batch need not reach the layer
        with hooked([partial(self.table[name].register_forward_pre_hook, keep, with_kwargs=True)]):
            for batch in self.batches:
                with suppress(_Enough):
                    self.call(batch)
                rows = torch.cat([nothing, *(x.to(nothing) for x in collected)])
                collected.clear()
                count = min(self.quota, len(rows))
                found.append(rows[torch.arange(count, device=rows.device) * len(rows) // max(1, count)])
        return torch.cat(found)

    def replace(
        self,
        name: str,
        rows: Tensor,
        options: dict[str, Any],
        quantize: str | None,
        batch_sizes: tuple[int, ...],
        budget: Mapping[str, float] | None,
    ) -> ConvertedLayer | str:
        """Fits and puts in place one layer; the reason where the model does not run with it."""
        linear = self.linear(name)
        d, h = linear.in_features, linear.out_features
        if not len(rows):
            return "saw no row of the data"
        if options["rank"] > min(d, h):
            return f"has no rank {options['rank']}: it maps {d} to {h} features"
        held = hold_out(len(rows)).to(rows.device)
        wanted = {asked_name(options): options} if budget is None else form_options(d, h, options)
        if name.rpartition(".")[2] == "base_layer":  # a merge adds to a weight of x, which that of signs is not
            wanted = {key: each for key, each in wanted.items() if each["form"] == "tables"}
        if not wanted:
            return "is wrapped by an adapter, whose merge would spoil signs unseen; tables refuse it"
        measured = Measurements(name, linear, rows, held, batch_sizes)
        best: tuple[Candidate, LookupLinear | SignLinear] | None = None
        for key, each in wanted.items():
            layer = _fitted(name, linear, rows[~held], each, quantize)
            found = measured.add(key, layer, bytes_of(layer), True)
            if budget is not None and not measured.excess(found, budget) <= 1:
                continue
            if best is None or found.relative_mse < best[0].relative_mse:
                best = found, layer
        if best is None:
            assert budget is not None
            raise ValueError(measured.refusal(budget))
        if batch_sizes or budget is not None:
            for key, (function, size) in others(linear, rows[~held]).items():
                measured.add(key, function, size, False)
        chosen, layer = best
        if len(rows) < d:
            warnings.warn(
                f"data gives layer {name} {len(rows)} rows for {d} features; the fit leans on the ridge", stacklevel=3
            )
        for parameter in layer.parameters():
            parameter.requires_grad_(parameter.requires_grad and linear.weight.requires_grad)
        layer.train(self.training[name])
        self.swaps.put(name, layer)
        try:
            with restored([(layer, "__class__", _Unread)] if isinstance(layer, SignLinear) else []):
                self.call(self.batches[0])
        except (AttributeError, TypeError, NotImplementedError) as error:
            self.swaps.undo([name])
            return f"is used in a way a lookup layer cannot be ({error})"
        usage = layer.usage(rows) if isinstance(layer, LookupLinear) else None
        return ConvertedLayer(
            name=name,
            in_features=d,
            out_features=h,
            relative_mse=chosen.relative_mse,
            bytes_before=measured.before.bytes,
            bytes_after=chosen.bytes,
            ms_before=measured.before.ms,
            ms_after=chosen.ms,
            entropy=float(usage.entropy.mean()) if usage else math.nan,
            rows=usage.counts.numel() if usage else 0,
            dead_rows=usage.dead_rows if usage else 0,
            candidates=measured.candidates(chosen) if len(measured.found) > 1 else (),
        )


class _Unread(SignLinear):
    """A layer as it is first called, to find models that compute with its weight themselves: it is no weight of x."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        stored = self._parameters["weight"]
        assert stored is not None
        return Described.of(self.out_features, self.in_features, stored)


def _fitted(
    name: str, linear: nn.Linear, rows: Tensor, options: dict[str, Any], quantize: str | None
) -> LookupLinear | SignLinear:
    layer: LookupLinear | SignLinear
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "calibration has")
            if options["form"] == "signs":
                layer = SignLinear.from_linear(linear, rows, hash=options["hash"], rank=options["rank"])
            else:
                layer = LookupLinear.from_linear(linear, rows, **{k: v for k, v in options.items() if k != "form"})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return layer.quantize_(quantize) if quantize else layer
