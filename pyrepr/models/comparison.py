"""Comparing two networks layer by layer on the same data: :func:`compare` and what it returns."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._modules import evaluating
from pyrepr._reporting import progress_bar, replacing, versions
from pyrepr.models._collecting import Pass, Side, Stored, make_side
from pyrepr.models._inputs import TOKENS, Inputs, Tokens, check_data
from pyrepr.models._layers import Layers, check_pool, unwrap
from pyrepr.models._recording import SAMPLES, Recorder, plain_execution
from pyrepr.similarity import Kernel, StreamingCKA

__all__ = ["EXACT_BYTES", "Comparison", "compare"]

# mode="auto" keeps exact moments up to this size: what a laptop can spare beside two models.
EXACT_BYTES = 1 << 30


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """CKA of every layer of one network with every layer of another.

    Attributes:
        values: [La, Lb] float64 on the CPU.
        layers_a, layers_b: names of the rows and of the columns.
        model_a, model_b: what the networks are called.
        samples: ``"batch"`` or ``"tokens"``: what a sample was.
        count: number of samples.
        estimator, mode, kernel: how the values were computed.
        tokens, pool: which tokens counted, and how positions became one row.
        skipped_a, skipped_b: from a layer that was left out to the reason.
        readings_a, readings_b: from a layer to how its tensor was read: which axis holds samples, which features.
        nonfinite_a, nonfinite_b: from a layer to how many of its activations were NaN or infinite, where any were.
        versions: of pyrepr, torch and Python.
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
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != (len(self.layers_a), len(self.layers_b)):
            raise ValueError(
                f"values must have shape [La, Lb] = [{len(self.layers_a)}, {len(self.layers_b)}], "
                f"got {list(self.values.shape)}"
            )

    def __repr__(self) -> str:
        finite = self.values[self.values.isfinite()]
        span = f"{finite.min():.3f} to {finite.max():.3f}" if finite.numel() else "undefined"
        return (
            f"Comparison({self.model_a} [{len(self.layers_a)} layers] × {self.model_b} [{len(self.layers_b)} layers], "
            f"CKA {span}; {self.describe()})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether all is the same, the values bit for bit (NaN equals NaN)."""
        if not isinstance(other, Comparison):
            return NotImplemented
        same = self.values.shape == other.values.shape and bool(
            ((self.values == other.values) | (self.values.isnan() & other.values.isnan())).all()
        )
        return same and self.metadata() == other.metadata()

    __hash__ = None  # type: ignore[assignment]

    @property
    def skipped(self) -> dict[str, str]:
        """From each layer that was left out to the reason; if both sides have one of that name, of model A first."""
        both = dict(self.skipped_a)
        for name, why in self.skipped_b.items():
            both[name] = why if both.get(name, why) == why else f"{both[name]} (in {self.model_b}: {why})"
        return both

    def describe(self) -> str:
        """How the values came about, in a line: ``"2048 tokens, linear kernel, unbiased estimator, exact"``."""
        unit = "tokens" if self.samples == "tokens" else "samples"
        if self.tokens != "all":
            unit += " without special tokens" if self.tokens == "no_special" else f" chosen by {self.tokens}"
        if self.pool:
            unit += f" (pool {self.pool})"
        how = "exact" if self.mode == "exact" else "minibatch estimate"
        return f"{self.count} {unit}, {self.kernel} kernel, {self.estimator} estimator, {how}"

    def metadata(self) -> dict[str, Any]:
        """Everything but the values, as JSON takes it."""
        return {key: value for key, value in asdict(self).items() if key != "values"}

    def plot(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Draws the heatmap to a file; PNG, SVG or PDF by its suffix. Needs matplotlib.

        Raises:
            ValueError: for another suffix; ImportError: without matplotlib; OSError: if the file cannot be written.
        """
        from pyrepr.models._pages import save_heatmap

        return save_heatmap(self, path, title=title)

    def to_html(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Writes one self-contained page: zoomable heatmap, the pair and its value under the pointer."""
        from pyrepr.models._pages import save_page

        return save_page(self, path, title=title)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a ``.npz`` with ``values`` and, as JSON, the metadata; :meth:`load` reads it.

        Raises:
            ValueError: for another suffix; OSError: if the file cannot be written (nothing is left behind).
        """
        import numpy as np

        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {path.name!r}")
        with replacing(path) as temporary, temporary.open("wb") as file:
            metadata = json.dumps({"format": "pyrepr.Comparison", **self.metadata()})
            np.savez(file, values=self.values.numpy(), metadata=np.array(metadata))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the file is something else.
        """
        import zipfile

        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as file:
                values, metadata = torch.from_numpy(file["values"]), json.loads(str(file["metadata"]))
        except (KeyError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
            raise ValueError(f"path must be a file written by Comparison.save, got {os.fspath(path)!r}") from error
        metadata.pop("format", None)
        metadata["layers_a"], metadata["layers_b"] = tuple(metadata["layers_a"]), tuple(metadata["layers_b"])
        return cls(values=values, **metadata)


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
    estimator: str = "unbiased",
    mode: str = "auto",
    kernel: str | Kernel = "linear",
    progress: bool = True,
    names: tuple[str, str] | None = None,
) -> Comparison:
    """CKA between the layers of two networks, in one pass over the data.

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
        estimator: ``"unbiased"`` or ``"biased"``, see :func:`pyrepr.cka`.
        mode: ``"exact"``: the value of all samples at once; keeps 8·Σ d_a d_b bytes over the pairs of layers that are
            compared, each layer with itself included. ``"minibatch"``: keeps a few numbers, estimates from every
            batch (at least 4 samples each) and keeps no activations. ``"auto"`` (default) is exact where that takes at
            most 1 GiB (:data:`EXACT_BYTES`) and the kernel is linear; the result's ``mode`` says which it was.
        kernel: a name or a :class:`pyrepr.Kernel`; others than ``"linear"`` need minibatch.
        progress: a tqdm bar on stderr, where tqdm is installed.
        names: what to call the two networks in the result; by default their class names.

    Returns:
        A :class:`Comparison`. Layers whose samples are all alike give NaN and a :class:`pyrepr.DegenerateInputWarning`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; unknown layers come
            with near matches.

    Warns:
        UserWarning: once, for layers that were left out; for activations that are NaN or infinite.
    """
    check_samples(samples, tokens, pool)
    if mode not in ("auto", "exact", "minibatch"):
        raise ValueError(f"mode must be 'auto', 'exact' or 'minibatch', got {mode!r}")
    spec = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    StreamingCKA(estimator=estimator, kernel=spec, mode="minibatch" if mode == "auto" else mode)  # checks the options
    feeds = inputs if isinstance(inputs, tuple) else (inputs, inputs)
    if len(feeds) != 2 or any(feed is not None and not callable(feed) for feed in feeds):
        raise TypeError(f"inputs must be a function of a batch or a pair of them, got {inputs!r}")
    options: dict[str, Any] = {"samples": samples, "pool": pool, "tokens": tokens}
    one_side = model_b is model_a and layers_b is None and feeds[0] is feeds[1]
    side_a = make_side(model_a, layers_a, "model_a", inputs=feeds[0], **options)
    side_b = side_a if one_side else make_side(model_b, layers_b, "model_b", inputs=feeds[1], **options)
    run = Pass(side_a, side_b, samples=samples, estimator=estimator, mode=mode, kernel=spec, limit=EXACT_BYTES)
    models = [side.model for side in run.sides if isinstance(side, Recorder)]
    if data is None and models:
        raise ValueError("data must be an iterable of batches, got None")
    if data is not None and not models:
        raise ValueError("data must be None where both sides are stored activations")
    batches = [None] if data is None else check_data(data)
    with evaluating(models), plain_execution(), torch.no_grad():
        for batch in progress_bar(batches, progress, "compare", "batch"):
            run.step(batch)
    return _result(run, names or (_name(model_a), _name(model_b)), tokens, pool)


def check_samples(samples: str, tokens: Tokens, pool: str | None) -> None:
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
    values = run.values()
    assert run.stream is not None  # values() saw to that
    a, b = run.sides[0], run.sides[-1]
    result = Comparison(
        values=values,
        layers_a=tuple(a.widths),
        layers_b=tuple(b.widths),
        model_a=names[0],
        model_b=names[1],
        samples=run.samples,
        count=run.stream.samples,
        estimator=run.estimator,
        mode="exact" if run.whole else run.stream.mode,
        kernel=run.kernel.name,
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
