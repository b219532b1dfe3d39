"""Comparing two networks layer by layer on the same data: :func:`compare` and what it returns."""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from pyrepr._modules import evaluating
from pyrepr._optional import require
from pyrepr._reporting import fixed, progress_bar, replacing, versions
from pyrepr.models._collecting import Checkpoint, Pass, Side, Stored, make_side
from pyrepr.models._inputs import TOKENS, Inputs, Tokens, check_data
from pyrepr.models._layers import Layers, check_pool, unwrap
from pyrepr.models._recording import SAMPLES, Recorder, plain_execution
from pyrepr.models._saved import read
from pyrepr.models._scores import Score
from pyrepr.similarity import Kernel, Measure, StreamingCKA, as_measure

__all__ = ["EXACT_BYTES", "Comparison", "compare"]

# mode="auto" keeps exact moments up to this size: what a laptop can spare beside two models.
EXACT_BYTES = 1 << 30


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """Similarities of every layer of one network with every layer of another.

    Attributes:
        values: [La, Lb] float64 on the CPU, by the first measure. stderr: their standard errors, or ``None``.
        layers_a, layers_b: names of the rows and of the columns.
        model_a, model_b: what the networks are called.
        samples: ``"batch"`` or ``"tokens"``: what a sample was.
        count: number of samples.
        estimator, mode, kernel: how CKA was computed. kernel_options: the options its kernel reads; where batches were
            streamed with σ = bandwidth × median, also ``sigma_a`` and ``sigma_b``, what was chosen for each layer.
        tokens, pool: which tokens counted, and how positions became one row.
        skipped_a, skipped_b: from a layer that was left out to the reason.
        readings_a, readings_b: from a layer to how its tensor was read: which axis holds samples, which features.
        nonfinite_a, nonfinite_b: from a layer to how many of its activations were NaN or infinite, where any were.
        scores: from the key of every measure to its :class:`Score`; the first is that of `values`.
        versions: of pyrepr, torch and Python.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> result = pyrepr.compare(model, model, [torch.randn(64, 8)], progress=False)
        >>> result.values.shape
        torch.Size([2, 2])
    """

    values: Tensor
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    model_a: str
    model_b: str
    samples: str
    count: int
    estimator: str
    mode: str
    kernel: str
    tokens: str = "all"
    pool: str | None = None
    skipped_a: dict[str, str] = field(default_factory=dict)
    skipped_b: dict[str, str] = field(default_factory=dict)
    readings_a: dict[str, str] = field(default_factory=dict)
    readings_b: dict[str, str] = field(default_factory=dict)
    nonfinite_a: dict[str, int] = field(default_factory=dict)
    nonfinite_b: dict[str, int] = field(default_factory=dict)
    stderr: Tensor | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    kernel_options: dict[str, float | list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first, *others = self.scores.items() or [("cka", Score(self.values, self.stderr))]
        scores = {first[0]: replace(first[1], values=self.values, stderr=self.stderr), **dict(others)}
        object.__setattr__(self, "scores", scores)
        shape = (len(self.layers_a), len(self.layers_b))
        for score in scores.values():
            for name in ("values", "stderr"):
                x = getattr(score, name)
                if x is not None and tuple(x.shape) != shape:
                    raise ValueError(f"{name} must have shape [La, Lb] = {list(shape)}, got {list(x.shape)}")

    def __repr__(self) -> str:
        finite = self.values[self.values.isfinite()]
        span = f"{fixed(finite.min(), 3)} to {fixed(finite.max(), 3)}" if finite.numel() else "undefined"
        title = next(iter(self.scores.values())).title
        return (
            f"Comparison({self.model_a} [{len(self.layers_a)} layers] × {self.model_b} [{len(self.layers_b)} layers], "
            f"{title} {span}; {self.describe()})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether all is the same, the values bit for bit (NaN equals NaN)."""
        if not isinstance(other, Comparison):
            return NotImplemented
        mine, theirs = self._arrays(), other._arrays()
        return (
            self.metadata() == other.metadata()
            and list(mine) == list(theirs)
            and all(torch.equal(x.nan_to_num(2e300), theirs[key].nan_to_num(2e300)) for key, x in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def measures(self) -> dict[str, Tensor]:
        """From every measure to its values [La, Lb]."""
        return {key: score.values for key, score in self.scores.items()}

    @property
    def skipped(self) -> dict[str, str]:
        """From each layer that was left out to the reason; if both sides have one of that name, of model A first."""
        both = dict(self.skipped_a)
        for name, why in self.skipped_b.items():
            both[name] = why if both.get(name, why) == why else f"{both[name]} (in {self.model_b}: {why})"
        return both

    def score(self, measure: str | None = None) -> Score:
        """Of a measure by its key; the first one by default.

        Raises:
            ValueError: for one that was not asked for, with those that were.
        """
        if measure is None:
            return next(iter(self.scores.values()))
        if measure not in self.scores:
            raise ValueError(f"measure must be one of {', '.join(self.scores)}, got {measure!r}")
        return self.scores[measure]

    def describe(self, measure: str | None = None) -> str:
        """How the values came about, in a line: ``"2048 tokens, linear kernel, unbiased estimator, exact"``."""
        score = self.score(measure)
        unit = "tokens" if self.samples == "tokens" else "samples"
        if self.tokens != "all":
            unit += " without special tokens" if self.tokens == "no_special" else f" chosen by {self.tokens}"
        if self.pool:
            unit += f" (pool {self.pool})"
        how = "exact" if self.mode == "exact" else "minibatch estimate"
        options = ", ".join(f"{k} {v:g}" for k, v in self.kernel_options.items() if not isinstance(v, list))
        kernel = f"{self.kernel} kernel ({options})" if options else f"{self.kernel} kernel"
        text = score.how or f"{kernel}, {self.estimator} estimator, {how}"
        if score.chance:
            text += f", chance {score.chance:.3g}"
        if score.unsure is not None:
            text += ", hatched: within two standard errors of unrelated layers"
        return f"{self.count} {unit}, {text}"

    def metadata(self) -> dict[str, Any]:
        """Everything but the values, as JSON takes it."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("values", "stderr", "scores")}
        told = ("title", "how", "low", "high", "chance")
        scores = {key: {name: getattr(score, name) for name in told} for key, score in self.scores.items()}
        return copy.deepcopy({**plain, "scores": scores})

    def _arrays(self) -> dict[str, Tensor]:
        """Every table of numbers by the name it has in a file."""
        found = {}
        for i, (key, score) in enumerate(self.scores.items()):
            for name in ("values", "stderr"):
                if (x := getattr(score, name)) is not None:
                    found[f"{name}:{key}" if i else name] = x
        return found

    def plot(
        self,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
        measure: str | None = None,
        vmin: float | None = None,
        vmax: float | None = None,
        origin: str = "upper",
        annotate: bool | None = None,
        title: str | None = None,
        dpi: float = 150,
    ) -> Any:
        """Draws the heatmap with matplotlib and returns its axes.

        Args:
            ax: axes to draw on, or a path as `path`; ``None`` makes a figure of its own.
            path: a file to write as well: PNG, SVG or PDF by its suffix, at `dpi` dots an inch.
            measure: its key; the first by default.
            vmin, vmax: what the colours span; by default the measure's range (0 to 1 for CKA), so that pictures can be
                compared.
            origin: ``"upper"``: the first layer is on top; ``"lower"``: at the bottom.
            annotate: numbers in the cells; by default where there is room for them.
            title: above the figure, by default the measure and the models; ``""`` for none.

        Raises:
            ValueError: for another suffix, origin or measure, or a vmin from vmax on; TypeError: if ax is neither axes
                nor a path; ImportError: without matplotlib; OSError: if the file cannot be written.
        """
        from pyrepr.models import _figures as figures

        if isinstance(ax, (str, os.PathLike)):
            ax, path = None, ax
        target = None if path is None else figures.check_path(path)
        if origin not in ("upper", "lower"):
            raise ValueError(f"origin must be 'upper' or 'lower', got {origin!r}")
        score = self.score(measure)
        low, high = score.low if vmin is None else vmin, score.high if vmax is None else vmax
        numbers = isinstance(low, SupportsFloat) and isinstance(high, SupportsFloat)
        if not numbers or not -math.inf < float(low) < float(high) < math.inf:
            raise ValueError(f"vmin and vmax must be finite numbers, vmin the smaller one, got {low!r} and {high!r}")
        own = ax is None
        ax = figures.axes_for(ax, *self.values.shape, target)
        figures.draw_table(
            ax,
            score.values,
            self.layers_a,
            self.layers_b,
            row_title=self.model_a,
            column_title=self.model_b,
            measure=score.title,
            low=float(low),
            high=float(high),
            origin=origin,
            annotate=annotate,
            unsure=score.unsure,
            title=(f"{score.title}: {self.model_a} × {self.model_b}" if title is None else title) if own else "",
            how=self.describe(measure) if own or title is None else title,
        )
        if target is not None:
            figures.save_figure(ax, target, dpi)
        return ax

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Writes one self-contained page: zoomable heatmap, the pair and its value under the pointer, a switch between
        measures, and what was left out."""
        from pyrepr.models._figures import shared_prefix
        from pyrepr.models._pages import write_page

        measures: list[dict[str, Any]] = [
            {
                "key": key,
                "name": score.title,
                "title": title or f"{score.title}: {self.model_a} × {self.model_b}",
                "how": self.describe(key),
                "low": score.low,
                "high": score.high,
                "values": _numbers(score.values),
                "stderr": None if score.stderr is None else _numbers(score.stderr),
                "unsure": None if score.unsure is None else score.unsure.tolist(),
            }
            for key, score in self.scores.items()
        ]
        data = {
            "model_a": self.model_a,
            "model_b": self.model_b,
            "rows": self.layers_a,
            "columns": self.layers_b,
            "prefixes": [shared_prefix(self.layers_a), shared_prefix(self.layers_b)],
            "skipped": list(self.skipped.items()),
            "measures": measures,
        }
        return write_page(Path(path), "heatmap.html", measures[0]["title"], data)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from pyrepr.models._pages import table_for_notebooks

        score = self.score()
        return table_for_notebooks(
            repr(self), score.values, self.layers_a, self.layers_b, score.low, score.high, self.skipped
        )

    def to_pandas(self, measure: str | None = None) -> Any:
        """A ``DataFrame`` of one measure, layers of A as its index and of B as its columns; the rest is in ``attrs``.

        Raises:
            ImportError: without pandas.
        """
        pandas = require("pandas", "pandas")
        frame = pandas.DataFrame(
            self.score(measure).values.numpy().copy(),
            index=pandas.Index(self.layers_a, name=self.model_a),
            columns=pandas.Index(self.layers_b, name=self.model_b),
        )
        frame.attrs.update(self.metadata())
        return frame

    def to_xarray(self) -> Any:
        """A ``Dataset`` with a variable for every measure, and for its standard errors, over ``layer_a``, ``layer_b``.

        Raises:
            ImportError: without xarray.
        """
        xarray = require("xarray", "xarray")
        variables = {}
        for key, score in self.scores.items():
            variables[key] = (("layer_a", "layer_b"), score.values.numpy().copy())
            if score.stderr is not None:
                variables[f"{key}_stderr"] = (("layer_a", "layer_b"), score.stderr.numpy().copy())
        coordinates = {"layer_a": list(self.layers_a), "layer_b": list(self.layers_b)}
        return xarray.Dataset(variables, coordinates, {"metadata": json.dumps(self.metadata())})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a ``.npz`` with ``values`` (and those of further measures) and, as JSON, the metadata; :meth:`load`
        reads it.

        Raises:
            ValueError: for another suffix; OSError: if the file cannot be written (nothing is left behind).
        """
        import numpy as np

        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {path.name!r}")
        with replacing(path) as temporary, temporary.open("wb") as file:
            metadata = json.dumps({"format": "pyrepr.Comparison", **self.metadata()})
            np.savez(file, metadata=np.array(metadata), **{key: x.numpy() for key, x in self._arrays().items()})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the file is something else. OSError: if it cannot be read.
        """
        return read(path, cls, "Comparison", _tables)


def _tables(arrays: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The scores in a file, whose tables are ``values`` and ``stderr``, and of further measures ``values:KEY``, …"""
    scores = {}
    for i, (key, told) in enumerate(metadata.pop("scores", {}).items()):
        tables = []
        for name in ("values", "stderr"):
            table = arrays.get(f"{name}:{key}" if i else name)
            if table is not None and table.dtype.kind != "f":
                raise TypeError(f"{name} of {key} are {table.dtype}")
            tables.append(None if table is None else torch.from_numpy(table.astype("float64")))
        low, high, chance = told["low"], told["high"], told["chance"]
        if not isinstance(told["title"] + told["how"], str) or not all(
            isinstance(x, (int, float)) for x in (low, high, 0 if chance is None else chance)
        ):
            raise TypeError(f"{key} is described by {told!r:.80}")
        scores[key] = Score(tables[0], tables[1], **told)  # type: ignore[arg-type]
        if tables[0] is None:
            raise KeyError(key)
    first = next(iter(scores.values()), None)
    return {"scores": scores, "stderr": None if first is None else first.stderr}


def _numbers(values: Tensor) -> list[list[float | None]]:
    return [[v if math.isfinite(v) else None for v in line] for line in values.tolist()]


def compare(
    model_a: nn.Module | Stored,
    model_b: nn.Module | Stored,
    data: Iterable[Any] | None = None,
    *,
    layers_a: Layers | None = None,
    layers_b: Layers | None = None,
    samples: str = "batch",
    tokens: Tokens = "all",
    pool: str | None = None,
    inputs: Inputs | tuple[Inputs | None, Inputs | None] | None = None,
    measures: str | Measure | Sequence[str | Measure] | None = None,
    stderr: bool = False,
    estimator: str = "unbiased",
    mode: str = "auto",
    kernel: str | Kernel = "linear",
    progress: bool = True,
    names: tuple[str, str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Comparison:
    """CKA, or other measures, between the layers of two networks, in one pass over the data.

    Every batch goes to both models (so a shuffling loader is fine), in eval mode, eager and without gradients; its
    activations are folded into moments and freed before the next batch. Hooks are removed and the training flag of
    every submodule restored, whatever happens. DataParallel and compiled models are run as the plain module inside. A
    model compared with itself runs once (unless `layers_b` or `inputs` ask for others).

    Which axis of a recorded tensor holds the samples is found by an experiment: some samples of the first batch go
    through each model a second time, in another order, and the samples are along the axis whose slices moved with
    them. Where the features are comes from the module that made the tensor. ``result.readings_a`` says how each layer
    was read, ``result.skipped`` which were left out and why.

    Args:
        model_a, model_b: modules; or stored activations as a dict from layer name to a tensor [N, …] whose rows are
            in the order of the data.
        data: an iterable of batches with one sample along the first axis of each tensor: ``x``; ``(x,)``;
            ``(x, labels)``; a mapping (a tokenizer's output) of keyword arguments, of which each model gets those its
            forward has. Labels are never an input. ``None`` only if both sides are stored activations.
        layers_a, layers_b: names; patterns, where ``*`` stays within one part of a dotted name and ``**`` crosses
            them (``"encoder.layer.*"``); ``"block#2"`` for the second call; a :class:`pyrepr.models.Layer`; several of
            them; or a function of (name, module) that says yes or no. By default the outermost repeated blocks with
            what stands before and after them, and leaf modules with parameters if there are no blocks; those that
            cannot be compared are then left out, with a warning, and are an error if asked for by name. For the same
            model on both sides, ``layers_b`` is by default ``layers_a``. A module called several times gives rows
            ``name#1``, ``name#2``, …
        samples: ``"batch"``: a sample is an item of the batch and its features are all the rest, flattened; positions
            that are padding count as zero, so the values do not depend on its length, but all batches must have one
            shape. ``"tokens"``: every position that is no padding is a sample, (B, T, D) → B·T samples and
            (B, C, H, W) → B·H·W samples of C features. Padding is told by the mask of the stream the layer works on:
            ``attention_mask``, ``decoder_attention_mask``, ``…_key_padding_mask``, packed or nested lengths.
        tokens: which tokens count, beside padding: ``"all"``, ``"no_special"`` (by ``special_tokens_mask`` in the
            batch) or a function from the batch to a mask [B, T]. One token in 32 with ten times the norm (an attention
            sink, as [CLS] and first tokens often are) can move CKA from 0.45 to 0.99.
        pool: makes rows samples whatever the models' tokens, image sizes or modalities: ``"mean"``, ``"max"``,
            ``"last"``, ``"cls"`` (the first) over the positions that count, or ``"spatial"``, the mean over the grid
            of an image without the tokens before it.
        inputs: a function from a batch to what the models take, or a pair of them, one for each: a tensor, a tuple of
            positional arguments or a mapping of keyword arguments.
        measures: what to compute beside or instead of CKA: names with options in brackets, or objects of
            :mod:`pyrepr.similarity`, as in ``("cka", "mutual_knn(k=5)", RSA())``; all in one pass. ``None`` (default):
            CKA with the options below. Measures that moments do not determine hold the rows of all layers.
        stderr: also the standard error of every value, by the jackknife over samples (over texts or images where rows
            are tokens), over blocks of them or, in mode "minibatch", over batches. Exact values hold the rows of all
            layers for it. Cells within two standard errors of chance are hatched, and never called most similar.
        estimator: ``"unbiased"`` or ``"biased"``, see :func:`pyrepr.cka`.
        mode: ``"exact"``: the value of all samples at once; keeps 8·Σ d_a d_b bytes over the pairs of layers that are
            compared, each layer with itself included, and takes 64 MiB and three of the largest blocks more at its
            peak, beside the activations of up to 1024 samples. ``"minibatch"``: keeps a few numbers, estimates from
            every batch (at least 4 samples each) and keeps no activations. ``"auto"`` (default) is exact where that
            takes at most 1 GiB (:data:`EXACT_BYTES`) and the kernel is linear; the result's ``mode`` says which it was.
        kernel: a name or a :class:`pyrepr.Kernel`; others than ``"linear"`` need minibatch.
        progress: a tqdm bar on stderr, where tqdm is installed.
        names: what to call the two networks in the result; by default their class names.
        checkpoint: a file that the state is saved to every minute and when the run is cut short, and read from if it is
            there: the run goes on after the batches it has seen. `data` must give the same batches in the same order.
            Deleted at the end. Not with held rows.

    Returns:
        A :class:`Comparison`. Layers whose samples are all alike give NaN and a :class:`pyrepr.DegenerateInputWarning`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; unknown layers come
            with near matches.

    Warns:
        UserWarning: once, for layers that were left out; for activations that are NaN or infinite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> result = pyrepr.compare(model, model, [torch.randn(64, 8)], progress=False)
        >>> result.layers_a
        ('0', '2')
    """
    check_samples(samples, tokens, pool)
    if mode not in ("auto", "exact", "minibatch"):
        raise ValueError(f"mode must be 'auto', 'exact' or 'minibatch', got {mode!r}")
    spec = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    StreamingCKA(estimator=estimator, kernel=spec, mode="minibatch" if mode == "auto" else mode)  # checks the options
    feeds = inputs if isinstance(inputs, tuple) else (inputs, inputs)
    if len(feeds) != 2 or any(feed is not None and not callable(feed) for feed in feeds):
        raise TypeError(f"inputs must be a function of a batch or a pair of them, got {inputs!r}")
    if names is not None and not (isinstance(names, (tuple, list)) and [type(name) for name in names] == [str, str]):
        raise TypeError(f"names must be two strings, got {names!r}")
    options: dict[str, Any] = {"samples": samples, "pool": pool, "tokens": tokens}
    one_side = model_b is model_a and layers_b is None and feeds[0] is feeds[1]
    side_a = make_side(model_a, layers_a, "model_a", inputs=feeds[0], **options)
    side_b = side_a if one_side else make_side(model_b, layers_b, "model_b", inputs=feeds[1], **options)
    chosen = None if measures is None else _measures(measures, mode, spec, estimator)
    run = Pass(
        side_a,
        side_b,
        samples=samples,
        estimator=estimator,
        mode=mode,
        kernel=spec,
        measures=chosen,
        stderr=stderr,
        limit=EXACT_BYTES,
    )
    models = [side.model for side in run.sides if isinstance(side, Recorder)]
    if data is None and models:
        raise ValueError("data must be an iterable of batches, got None")
    if data is not None and not models:
        raise ValueError("data must be None where both sides are stored activations")
    batches = [None] if data is None else check_data(data)
    saved = Checkpoint(run, checkpoint)
    with evaluating(models), plain_execution(), torch.no_grad():
        try:
            for batch in progress_bar(batches, progress, "compare", "batch"):
                saved.step(batch)
        except BaseException:  # Ctrl-C above all
            saved.save()
            raise
    saved.check_end()
    result = _result(run, names or (_name(model_a), _name(model_b)), tokens, pool)
    saved.remove()
    return result


def _measures(
    measures: str | Measure | Sequence[str | Measure], mode: str, kernel: Kernel, estimator: str
) -> list[Measure]:
    if not isinstance(measures, (str, Measure, type, Iterable)):
        raise TypeError(f"measures must be names or measures, got {type(measures).__name__}")
    wanted = [measures] if isinstance(measures, (str, Measure, type)) else list(measures)
    if not wanted:
        raise ValueError("measures must name at least one measure, got none")
    if mode == "minibatch":
        raise ValueError("mode='minibatch' is an estimate of CKA alone; leave measures out, or the mode")
    if kernel != Kernel() or estimator != "unbiased":
        given = f"kernel={kernel.name!r}" if kernel != Kernel() else f"estimator={estimator!r}"
        raise ValueError(f"{given} is of CKA; beside measures it belongs to one of them, as in 'cka(kernel=rbf)'")
    found = [as_measure(measure) for measure in wanted]
    keys = [measure.key for measure in found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"measures must name each measure once, got {twice!r} twice")
    return found


def check_samples(samples: str, tokens: Tokens, pool: str | None) -> None:
    """Raises ValueError where what a sample is, which tokens count or how they are pooled is none of the choices."""
    if samples not in SAMPLES:
        raise ValueError(f"samples must be 'batch' or 'tokens', got {samples!r}")
    if not callable(tokens) and tokens not in TOKENS:
        raise ValueError(f"tokens must be 'all', 'no_special' or a function from a batch to a mask, got {tokens!r}")
    check_pool(pool)
    if pool and samples == "tokens":
        raise ValueError(f"pool={pool!r} makes one row a sample, so samples must be 'batch', got 'tokens'")


def _name(model: nn.Module | Stored) -> str:
    return type(unwrap(model)).__name__ if isinstance(model, nn.Module) else "activations"


def _result(run: Pass, names: tuple[str, str], tokens: Tokens, pool: str | None) -> Comparison:
    scores = run.scores()
    assert run.stream is not None  # scores() saw to that
    first = next(iter(scores.values()))
    a, b = run.sides[0], run.sides[-1]
    result = Comparison(
        values=first.values,
        stderr=first.stderr,
        scores=scores,
        layers_a=tuple(a.widths),
        layers_b=tuple(b.widths),
        model_a=names[0],
        model_b=names[1],
        samples=run.samples,
        count=run.stream.samples,
        estimator=run.estimator,
        mode="exact" if run.whole else run.stream.mode,
        kernel=run.kernel.name,
        kernel_options=run.kernel_options(),
        tokens=tokens if isinstance(tokens, str) else getattr(tokens, "__name__", type(tokens).__name__),
        pool=pool,
        skipped_a=a.skipped,
        skipped_b=b.skipped,
        readings_a=a.readings,
        readings_b=b.readings,
        nonfinite_a=a.nonfinite,
        nonfinite_b=b.nonfinite,
        versions=versions(),
    )
    _tell(run.sides)
    return result


def _tell(sides: list[Side]) -> None:
    """One warning for what was left out, one for what was not finite."""
    left = [f"{side.argument} {name} {why}" for side in sides for name, why in side.skipped.items()]
    if left:
        more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
        many = f"{len(left)} layer{'s' * (len(left) > 1)} left out"
        warnings.warn(f"{many} (see result.skipped): {'; '.join(left[:3])}{more}", stacklevel=4)
    bad = [f"{side.argument} {name}: {count}" for side in sides for name, count in side.nonfinite.items()]
    if bad:
        more = f" and {len(bad) - 6} more layers" if len(bad) > 6 else ""
        warnings.warn(f"activations that are NaN or infinite: {', '.join(bad[:6])}{more}", stacklevel=4)
