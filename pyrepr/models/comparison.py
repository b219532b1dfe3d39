"""Comparing two networks layer by layer on the same data: :func:`compare` and what it returns."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._checks import memory
from pyrepr._modules import evaluating
from pyrepr._reporting import progress_bar, replacing, versions
from pyrepr.models._layers import SAMPLES, Layers, Recorder, choose_names, unwrap
from pyrepr.models._saved import read
from pyrepr.similarity import DegenerateInputWarning, Kernel, StreamingCKA

__all__ = ["EXACT_BYTES", "Comparison", "compare"]

# mode="auto" keeps exact moments up to this size: what a laptop can spare beside two models.
EXACT_BYTES = 1 << 30

Stored = Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class Comparison:
    """CKA of every layer of one network with every layer of another.

    Attributes:
        values: [La, Lb] float64 on the CPU.
        layers_a, layers_b: names of the rows and of the columns.
        model_a, model_b: what the networks are called.
        samples: ``"batch"`` or ``"tokens"``: what a sample was.
        count: number of samples.
        estimator, mode, kernel: how the values were computed.
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

    def describe(self) -> str:
        """How the values came about, in a line: ``"2048 tokens, linear kernel, unbiased estimator, exact"``."""
        unit = "tokens" if self.samples == "tokens" else "samples"
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
            ValueError: if the file is something else. OSError: if it cannot be read.
        """
        return read(path, cls, "Comparison")


def compare(
    model_a: nn.Module | Stored,
    model_b: nn.Module | Stored,
    data: Iterable[Any] | None = None,
    *,
    layers_a: Layers | None = None,
    layers_b: Layers | None = None,
    samples: str = "batch",
    estimator: str = "unbiased",
    mode: str = "auto",
    kernel: str | Kernel = "linear",
    progress: bool = True,
    names: tuple[str, str] | None = None,
) -> Comparison:
    """CKA between the layers of two networks, in one pass over the data.

    Every batch goes to both models (so a shuffling loader is fine), in eval mode and without gradients; its activations
    are folded into a :class:`pyrepr.StreamingCKA` and freed before the next batch. Hooks are removed and the training
    flag of every submodule restored, whatever happens. DataParallel and compiled models are run as the plain module
    inside. A model compared with itself runs once (unless `layers_b` asks for others).

    Args:
        model_a, model_b: modules; or stored activations as a dict from layer name to a tensor [N, …] whose rows are
            in the order of the data.
        data: any iterable of batches: a tensor; a tuple or list of positional arguments; a dict (or a tokenizer's
            output) of keyword arguments, of which each model gets those its forward has. ``None`` only if both sides
            are stored activations.
        layers_a, layers_b: names; patterns, where ``*`` stays within one part of a dotted name and ``**`` crosses
            them (``"encoder.layer.*"``); or a function of (name, module) that says yes or no. By default the outermost
            repeated blocks with what stands before and after them, and leaf modules with parameters if there are no
            blocks; those the forward does not call or whose samples differ are then left out. For the same model on
            both sides, ``layers_b`` is by default ``layers_a``. A module called several times counts with its last
            call, and of several outputs the first floating-point tensor.
        samples: ``"batch"``: a sample is an item of the batch and its features are all the rest, flattened, so all
            batches must have one shape. ``"tokens"``: every position is a sample, (B, T, D) → B·T samples and
            (B, C, H, W) → B·H·W samples of C features (channels first, always); padding is left out by the batch's
            ``attention_mask``.
        estimator: ``"unbiased"`` or ``"biased"``, see :func:`pyrepr.cka`.
        mode: ``"exact"``: the value of all samples at once; keeps 8·Σ d_a d_b bytes over the pairs of layers that are
            compared, each layer with itself included. ``"minibatch"``: keeps a few numbers, estimates from every
            batch (at least 4 samples each). ``"auto"`` (default) is exact where that takes at most 1 GiB
            (:data:`EXACT_BYTES`) and the kernel is linear; the result's ``mode`` says which it was.
        kernel: a name or a :class:`pyrepr.Kernel`; others than ``"linear"`` need minibatch.
        progress: a tqdm bar on stderr, where tqdm is installed.
        names: what to call the two networks in the result; by default their class names.

    Returns:
        A :class:`Comparison`. Layers whose samples are all alike give NaN and a :class:`pyrepr.DegenerateInputWarning`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; unknown layers come
            with near matches.
    """
    if samples not in SAMPLES:
        raise ValueError(f"samples must be 'batch' or 'tokens', got {samples!r}")
    if mode not in ("auto", "exact", "minibatch"):
        raise ValueError(f"mode must be 'auto', 'exact' or 'minibatch', got {mode!r}")
    spec = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    StreamingCKA(estimator=estimator, kernel=spec, mode="minibatch" if mode == "auto" else mode)  # checks the options
    one_model = model_b is model_a
    side_a = _side(model_a, layers_a, samples, "model_a")
    side_b = side_a if one_model and layers_b is None else _side(model_b, layers_b, samples, "model_b")
    run = _Run(side_a, side_b, samples, estimator, mode, spec)
    sides = [side_a] if side_a is side_b else [side_a, side_b]
    models = [side.model for side in sides if isinstance(side, Recorder)]
    if data is None and models:
        raise ValueError("data must be an iterable of batches, got None")
    if data is not None and (not isinstance(data, Iterable) or isinstance(data, (str, bytes))):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    if data is not None and not models:
        raise ValueError("data must be None where both sides are stored activations")
    with evaluating(models), torch.no_grad():
        for batch in progress_bar([None] if data is None else data, progress, "compare", "batch"):
            run.step(batch)
    return run.result(names or (_name(model_a), _name(model_b)))


def _name(model: nn.Module | Stored) -> str:
    return type(unwrap(model)).__name__ if isinstance(model, nn.Module) else "activations"


class _StoredSide:
    """Activations that were computed elsewhere, handed out in step with the other side."""

    def __init__(self, stored: Stored, wanted: Layers | None, argument: str) -> None:
        argument_layers = argument.replace("model", "layers")
        if callable(wanted):
            raise TypeError(f"{argument_layers} must be names or patterns for stored activations, got a function")
        if not stored:
            raise ValueError(f"{argument} must hold at least one layer, got none")
        self.argument = argument
        self.layers = list(stored) if wanted is None else choose_names(list(stored), wanted, argument_layers)
        self._stored = {name: stored[name] for name in self.layers}
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


def _side(model: object, wanted: Layers | None, samples: str, argument: str) -> Recorder | _StoredSide:
    if isinstance(model, nn.Module):
        return Recorder(model, wanted, samples, argument)
    if isinstance(model, Mapping):
        return _StoredSide(model, wanted, argument)
    raise TypeError(f"{argument} must be a torch.nn.Module or a dict of stored activations, got {type(model).__name__}")


class _Run:
    """The pass over the data: two sides in, one stream."""

    def __init__(
        self,
        side_a: Recorder | _StoredSide,
        side_b: Recorder | _StoredSide,
        samples: str,
        estimator: str,
        mode: str,
        kernel: Kernel,
    ) -> None:
        self.a, self.b = side_a, side_b
        self.samples, self.estimator, self.mode, self.kernel = samples, estimator, mode, kernel
        # Stored activations are one batch, of which the estimate is exact and costs no moments.
        self.whole = isinstance(side_a, _StoredSide) and isinstance(side_b, _StoredSide)
        self.widths: list[dict[str, int]] = []
        self.stream: StreamingCKA | None = None

    def step(self, batch: Any) -> None:
        """One batch through both sides. What is recorded dies with this frame."""
        mask = _mask(batch) if self.samples == "tokens" else None
        sides = [self.a] if self.b is self.a else [self.a, self.b]
        recorded = [side.run(batch, mask) if isinstance(side, Recorder) else None for side in sides]
        n = next((_count(rows) for rows in recorded if rows is not None), None)
        both = [
            side.take(n) if isinstance(side, _StoredSide) else rows or {}
            for side, rows in zip(sides, recorded, strict=True)
        ]
        self.check(both)
        layers = [x for rows in both for x in rows.values()]
        dtype = layers[0].dtype
        for x in layers:
            dtype = torch.promote_types(dtype, x.dtype)
        layers = [x.to(layers[0].device, dtype) for x in layers]
        split = len(both[0]) if len(both) > 1 else 0
        if self.stream is None:
            mode = self.choose_mode([x.shape[1] for x in layers], split, layers[0].device)
            self.stream = StreamingCKA(estimator=self.estimator, mode=mode, kernel=self.kernel)
        if self.stream.mode == "minibatch":
            self.check_batch(layers[0].shape[0])
        self.stream.update(layers[: split or None], layers[split:] if split else None)

    def check(self, both: list[dict[str, Tensor]]) -> None:
        """The same samples on both sides, and the features of the first batch."""
        count, other = _count(both[0]), _count(both[-1])
        if count != other:
            unit = "tokens" if self.samples == "tokens" else "samples"
            raise ValueError(
                f"model_a and model_b must give the same {unit} for a batch, got {count} and {other}"
                + ("; samples='batch' compares models that cut their input differently" if unit == "tokens" else "")
            )
        widths = [{name: x.shape[1] for name, x in rows.items()} for rows in both]
        self.widths = self.widths or widths
        for argument, before, now in zip(("layers_a", "layers_b"), self.widths, widths, strict=False):
            for name, width in now.items():
                if width != before[name]:
                    hint = (
                        "; samples='batch' needs inputs of one shape in all batches, samples='tokens' takes any length"
                        if self.samples == "batch"
                        else ""
                    )
                    raise ValueError(
                        f"{argument}: {name} must have the {before[name]} features a sample of the first batch, "
                        f"got {width}{hint}"
                    )

    def choose_mode(self, widths: list[int], split: int, device: torch.device) -> str:
        """The stated rule of mode="auto", and a refusal of exact moments that cannot fit."""
        if self.mode == "minibatch" or self.whole:
            return "minibatch"
        need = _exact_bytes(widths, split)
        if self.mode == "auto":
            return "exact" if need <= EXACT_BYTES and self.kernel.name == "linear" else "minibatch"
        if device.type == "cpu" and need > (have := memory()):
            raise ValueError(
                f"mode='exact' would keep {need / 2**30:.0f} GiB of moments (layers of up to {max(widths)} features), "
                f"this machine has {have / 2**30:.0f} GiB; use mode='minibatch', samples='tokens' or fewer layers"
            )
        return "exact"

    def check_batch(self, n: int) -> None:
        least = 4 if self.estimator == "unbiased" else 2
        if n < least:
            if self.whole:
                raise ValueError(f"model_a must have at least {least} rows for the {self.estimator} estimator, got {n}")
            raise ValueError(
                f"data: every batch must have at least {least} samples in mode 'minibatch' with the {self.estimator} "
                f"estimator, got {n}; drop a short last batch (DataLoader's drop_last=True)"
            )

    def result(self, names: tuple[str, str]) -> Comparison:
        for side in (self.a, self.b):
            if isinstance(side, _StoredSide) and self.stream is not None:
                side.check_end()
        if self.stream is None or self.stream.samples == 0:
            raise ValueError("data must give at least one batch, got none")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = self.stream.compute().cpu()
        for warning in caught:
            self.warn(warning)
        layers_a = tuple(self.widths[0])
        return Comparison(
            values=values,
            layers_a=layers_a,
            layers_b=tuple(self.widths[1]) if len(self.widths) > 1 else layers_a,
            model_a=names[0],
            model_b=names[1],
            samples=self.samples,
            count=self.stream.samples,
            estimator=self.estimator,
            mode="exact" if self.whole else self.stream.mode,
            kernel=self.kernel.name,
            versions=versions(),
        )

    def warn(self, warning: warnings.WarningMessage) -> None:
        """The stream's warning again, with names of layers where it says xs[3]."""
        message = str(warning.message)
        for list_name, prefix, widths in zip(("xs", "ys"), ("model_a", "model_b"), self.widths, strict=False):
            for i, name in enumerate(widths):
                message = message.replace(f"{list_name}[{i}]", f"{prefix} {name}")
        category = warning.category if issubclass(warning.category, DegenerateInputWarning) else UserWarning
        warnings.warn(message, category, stacklevel=4)


def _count(rows: dict[str, Tensor]) -> int:
    return next(iter(rows.values())).shape[0]


def _mask(batch: Any) -> Tensor | None:
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is None:
        return None
    mask = batch["attention_mask"]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError("data: attention_mask must be a tensor [B, T] with samples='tokens'")
    return mask.bool()


def _exact_bytes(widths: list[int], split: int) -> int:
    """8·Σ d_a d_b over the pairs StreamingCKA keeps."""
    own = sum(d * d for d in widths)
    if split:
        return 8 * (own + sum(widths[:split]) * sum(widths[split:]))
    return 8 * (own + sum(widths) ** 2) // 2
