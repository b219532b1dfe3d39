"""What can be read out of layers by linear maps: all layers, all λ and all folds from one pass over the data."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_layer, check_layers, shape_of, shown
from pyrepr._optional import PLOT, require
from pyrepr._reporting import replacing
from pyrepr.stats._covariances import warn_of_empty_classes
from pyrepr.stats.moments import Moments, Ridge, check_alphas, check_finite, check_labels

TASKS = ("classification", "regression")
ALPHAS = (1.0, 100.0, 10000.0)
ROWS = 2048  # of a layer at a time: what is cut out of it stays in the cache
BLOCKS = 10  # that validation samples are dealt to, for the standard error of R²

Layers = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Probe:
    """What :func:`linear_probe` found.

    Attributes:
        layers: names, in order of depth.
        alphas: the λ that were tried.
        scores: [L, A] float64: accuracy, or R² over all targets, of samples the model has not seen.
        stderr: [L, A] float64, its standard error.
        metric: ``"accuracy"`` or ``"R²"``.
        chance: what a constant prediction achieves: the largest class's share, or 0.
        samples: how many the scores are of.
        models: name → :class:`pyrepr.stats.Ridge`, fitted to all training samples with the layer's best λ.

    Example:
        >>> layers = {"first": torch.randn(200, 8), "last": torch.randn(200, 8)}
        >>> probe = pyrepr.stats.linear_probe(layers, torch.arange(200) % 2)
        >>> probe.layers
        ('first', 'last')
    """

    layers: tuple[str, ...]
    alphas: tuple[float, ...]
    scores: Tensor
    stderr: Tensor
    metric: str
    chance: float
    samples: int
    models: Mapping[str, Ridge] = field(default_factory=dict, repr=False, compare=False)

    @property
    def best(self) -> Tensor:
        """[L] the score of the best λ of each layer (chosen by these same scores)."""
        return self.scores.max(1).values

    @property
    def best_stderr(self) -> Tensor:
        """[L] its standard error."""
        return self.stderr.gather(1, self.scores.argmax(1, keepdim=True))[:, 0]

    @property
    def best_alpha(self) -> Tensor:
        """[L] the best λ of each layer."""
        return self.scores.new_tensor(self.alphas)[self.scores.argmax(1)]

    def table(self) -> list[tuple[str, float, float, float]]:
        """A row a layer: name, score, standard error, λ."""
        columns = (self.best.tolist(), self.best_stderr.tolist(), self.best_alpha.tolist())
        return list(zip(self.layers, *columns, strict=True))

    def __str__(self) -> str:
        wide = max(5, *map(len, self.layers))
        lines = [
            f"{'layer':<{wide}}  {self.metric:>8}  ± s.e.        λ   ({self.samples} samples, chance {self.chance:.3f})"
        ]
        lines += [f"{name:<{wide}}  {s:8.4f}  {e:6.4f}  {a:9g}" for name, s, e, a in self.table()]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None, *, ax: Any = None, title: str | None = None) -> Any:
        """Draws the score over depth with bars of one standard error; needs matplotlib.

        Args:
            path: a file to write (PNG, SVG or PDF by its suffix); ``None``: none.
            ax: axes to draw on; ``None``: a new figure's.

        Returns:
            The axes.
        """
        require("matplotlib", PLOT)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        count = len(self.layers)
        if ax is None:
            figure = Figure(figsize=(min(16.0, max(4.0, 0.35 * count + 2)), 3.6), layout="constrained")
            FigureCanvasAgg(figure)
            ax = figure.add_subplot()
        depth = range(count)
        ax.errorbar(depth, self.best.tolist(), yerr=self.best_stderr.tolist(), fmt="o-", ms=4, capsize=2, lw=1.2)
        ax.axhline(self.chance, color="0.6", lw=1, ls=":")
        ax.annotate(
            "chance",
            (1, self.chance),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.45",
        )
        step = -(-count // 40)
        ax.set_xticks(
            list(depth)[::step], self.layers[::step], rotation=45, ha="right", rotation_mode="anchor", fontsize=8
        )
        ax.set_ylabel(f"held-out {self.metric}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(title or f"linear probes, {self.samples} samples", fontsize=10)
        if path is not None:
            path = Path(path)
            if path.suffix not in (".png", ".svg", ".pdf"):
                raise ValueError(f"path must end in .png, .svg or .pdf, got {shown(path.name)}")
            with replacing(path) as temporary:
                ax.figure.savefig(temporary, dpi=150)
        return ax


def linear_probe(
    layers: Layers | Iterable[tuple[Layers, Tensor]],
    y: Tensor | None = None,
    *,
    alphas: float | Sequence[float] = ALPHAS,
    folds: int = 5,
    val: tuple[Layers, Tensor] | Iterable[tuple[Layers, Tensor]] | None = None,
    task: str = "classification",
    classes: int | None = None,
    seed: int = 0,
) -> Probe:
    """Held-out accuracy (or R²) of a linear read-out of every layer, with its standard error.

    The read-out is ridge regression, on one-hot labels for classification (``RidgeClassifier``). Moments of every layer
    and fold are taken in one pass; training moments of a fold are total minus fold; so more λ, folds and layers cost
    little, and a loader's data need not fit in memory: kept are folds·d² numbers a layer. Accuracy needs the held-out
    rows once more, so a loader is then run over twice, in the same order; R² follows from moments.

    Args:
        layers: a dict or list of [n, d_l], or a tensor [L, n, d], row i of all of them one sample; or, with y ``None``,
            an iterable of batches (layers, y).
        y: [n] integer labels; soft labels [n, C]; or for regression targets [n] or [n, q].
        alphas: λ to try, as scikit-learn's (not divided by n, intercept not penalised).
        folds: of the cross-validation; samples are dealt at random, each fold equally many. Not used with `val`.
        val: data to score on instead, in the form of the training data: (layers, y), or an iterable of batches.
        task: ``"classification"`` or ``"regression"``.
        classes: number of classes; by default the largest label + 1 (needed for an iterable of batches). Those
            without samples are named in a warning.
        seed: of the dealing.

    Returns:
        A :class:`Probe`. The standard error of an accuracy p is √(p(1−p)/n), that of R² a jackknife over folds.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> layers = {"first": torch.randn(200, 8), "last": torch.randn(200, 8)}
        >>> probe = pyrepr.stats.linear_probe(layers, torch.arange(200) % 2)
        >>> probe.layers
        ('first', 'last')
    """
    values = check_alphas(alphas)
    if task not in TASKS:
        raise ValueError(f"task must be 'classification' or 'regression', got {shown(task)}")
    if not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds must be an integer of at least 2, got {shown(folds)}")
    data = _batches(layers, y, "layers")
    held_out = None
    if val is not None:
        pair = isinstance(val, tuple) and len(val) == 2 and isinstance(val[1], Tensor)
        held_out = _batches(*(val if pair else (val, None)), "val")
    if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 2):
        raise ValueError(f"classes must be an integer of at least 2, got {shown(classes)}")
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if task == "classification":
        classes = classes or _classes(y)
    run = _Run(values, BLOCKS if held_out else folds, task, classes, seed)
    with torch.no_grad():
        return run.with_validation(data, held_out) if held_out else run.with_folds(data)


def _classes(y: Tensor | None) -> int:
    if y is None:
        raise ValueError("classes must be given with an iterable of batches, got None")
    if y.dim() == 2:
        return y.shape[1]
    if y.dtype not in (*INTEGERS, torch.uint8, torch.int8, torch.int16, torch.bool) or not len(y):
        raise TypeError(f"y must hold integer labels or, soft, be [n, C], got {y.dtype} {shape_of(y)}")
    return int(y.max()) + 1


Batch = tuple[list[str], list[Tensor], Tensor]


class _Batches:
    """The data as batches of checked layers and their y, as often as wanted."""

    def __init__(self, source: Iterable[Any], argument: str) -> None:
        self.source, self.argument = source, argument
        self.once = isinstance(source, Iterator)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                raise TypeError(f"{self.argument} must give batches (layers, y), got {type(batch).__name__}")
            names, xs = _named(batch[0], self.argument)
            yield names, check_layers(names, xs), batch[1]


def _batches(layers: Any, y: Tensor | None, argument: str) -> _Batches:
    if y is not None:
        if not isinstance(y, Tensor):
            raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}")
        names, xs = _named(layers, argument)
        xs = [check_layer(name, x) for name, x in zip(names, xs, strict=True)]
        if y.dim() not in (1, 2) or any(len(x) != len(y) for x in xs):
            raise ValueError(f"y must have a row for each of the {len(xs[0])} samples, got {shape_of(y)}")
        return _Batches([(layers, y)], argument)
    if isinstance(layers, (Tensor, Mapping)) or not isinstance(layers, Iterable):
        if argument == "val":
            raise ValueError(f"val must be (layers, y) or an iterable of such batches, got {type(layers).__name__}")
        raise ValueError("y must be the labels or targets of the layers, got None")
    return _Batches(layers, argument)


def _named(layers: Any, argument: str) -> tuple[list[str], list[Tensor]]:
    if isinstance(layers, Mapping):
        found = list(layers.items())
    elif isinstance(layers, Tensor) and layers.dim() == 2:
        found = [("0", layers)]
    elif isinstance(layers, (Tensor, list, tuple)):
        found = [(str(i), x) for i, x in enumerate(layers)]
    else:
        raise TypeError(f"{argument} must hold layers as a dict, a list or a tensor, got {type(layers).__name__}")
    if not found:
        raise ValueError(f"{argument} must hold at least one layer, got none")
    return [str(name) for name, _ in found], [x for _, x in found]


class _Dealer:
    """Deals samples to folds: of every `folds` in a row one to each, however they are cut into batches."""

    def __init__(self, folds: int, seed: int) -> None:
        self.folds, self.generator = folds, torch.Generator().manual_seed(seed)
        self.left = torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, n: int) -> Tensor:
        rounds = max(0, -(-(n - len(self.left)) // self.folds))
        more = torch.rand(rounds, self.folds, generator=self.generator, device="cpu").argsort(1).flatten()
        dealt = torch.cat([self.left, more])
        self.left = dealt[n:]
        return dealt[:n]


class _Run:
    def __init__(self, alphas: Tensor, folds: int, task: str, classes: int | None, seed: int) -> None:
        self.alphas, self.folds, self.task, self.classes, self.seed = alphas, folds, task, classes, seed
        self.names: list[str] = []
        self.counts = torch.zeros(classes or 0, dtype=torch.float64, device="cpu")

    def with_folds(self, data: _Batches) -> Probe:
        if self.task == "classification" and data.once:
            raise ValueError("layers must be an iterable that starts anew every time (a loader), got an iterator")
        parts = self.moments(data, self.folds)
        totals = [self.total(folds) for folds in parts]
        if totals[0].samples < 2 * self.folds:
            raise ValueError(f"folds must be at most half of the {totals[0].samples} samples, got {self.folds}")
        self.warn(totals[0])
        models = [
            [(total - fold).ridge(self.alphas) for fold in folds] for total, folds in zip(totals, parts, strict=True)
        ]
        if self.task == "regression":
            scores, stderr = self.r2(models, parts)
        else:
            scores, stderr = self.accuracy(models, data, self.folds)
        return self.result(scores, stderr, totals, totals[0].samples)

    def with_validation(self, data: _Batches, val: _Batches) -> Probe:
        totals = [folds[0] for folds in self.moments(data, 1)]
        if not totals or totals[0].samples < 2:
            raise ValueError("layers must hold at least 2 samples, got fewer")
        self.warn(totals[0])
        models = [[total.ridge(self.alphas)] for total in totals]
        if self.task == "regression":
            parts = self.moments(val, self.folds)
            scores, stderr = self.r2([fits * self.folds for fits in models], parts)
            return self.result(scores, stderr, totals, self.total(parts[0]).samples)
        self.counts = torch.zeros_like(self.counts)
        scores, stderr = self.accuracy(models, val, 1)
        return self.result(scores, stderr, totals, int(self.counts.sum()))

    def warn(self, total: Moments) -> None:
        """Of classes that nobody can learn, as they have no samples (hard labels only)."""
        if total.classes is not None:
            warn_of_empty_classes(total.counts, "they are never the answer")

    def moments(self, data: _Batches, folds: int) -> list[list[Moments]]:
        """Moments of every layer and fold."""
        dealer, parts = _Dealer(folds, self.seed), []
        for names, xs, y in data:
            if not self.names:
                self.names = names
            if names != self.names:
                raise ValueError(f"{data.argument} must have the layers {self.names}, got {names}")
            hard = self.task == "classification" and y.dim() == 1
            y = check_labels("y", y, len(xs[0]), self.classes) if hard else self.targets(y)
            if not parts:
                parts = [self.start(x, y, folds, hard) for x in xs]
            rows = self.rows(dealer(len(y)), folds, y.device)
            for name, x, row in zip(names, xs, parts, strict=True):
                try:
                    for moments, at in zip(row, rows, strict=True):
                        for piece in at.split(ROWS):
                            moments.update(x[piece], y[piece])
                except ValueError:  # of a piece: its row is another one here
                    check_finite(f"layer {name}", x)
                    if not hard:
                        check_finite("y", y.reshape(len(y), -1))
                    raise
        if not parts:
            raise ValueError(f"{data.argument} must give at least one batch, got none")
        return parts

    def start(self, x: Tensor, y: Tensor, folds: int, hard: bool) -> list[Moments]:
        """Empty moments of a layer's folds. With classes they have one provisional mean: then adding them up and taking
        one away again moves nothing."""
        if not hard:
            return [Moments() for _ in range(folds)]
        first = Moments(self.classes)
        first.shift_to(x[:ROWS], y[:ROWS])
        return [copy.copy(first) for _ in range(folds)]  # what moments hold are values

    @staticmethod
    def rows(dealt: Tensor, folds: int, device: torch.device) -> list[Tensor]:
        return [(dealt == fold).nonzero()[:, 0].to(device) for fold in range(folds)]

    def targets(self, y: Tensor) -> Tensor:
        if self.task == "classification" and (y.dim() != 2 or y.shape[1] != self.classes):
            raise ValueError(f"y must be soft labels [n, C] with C = {self.classes}, got {shape_of(y)}")
        if not y.is_floating_point():
            raise TypeError(f"y must be floating point for task='regression' and soft labels, got {y.dtype}")
        return y

    def total(self, folds: list[Moments]) -> Moments:
        total = Moments(folds[0].classes)
        for fold in folds:
            total.merge(fold)
        return total

    def r2(self, models: list[list[Ridge]], parts: list[list[Moments]]) -> tuple[Tensor, Tensor]:
        """[L, A] R² over all folds and its jackknife error over them."""
        scores, errors = [], []
        for fits, folds in zip(models, parts, strict=True):
            mean = self.total(folds)._both()[3]
            filled = [(fit, fold) for fit, fold in zip(fits, folds, strict=True) if fold.samples]
            found = [fold.errors_of(fit, mean) for fit, fold in filled]
            error, spread = torch.stack([e for e, _ in found]), torch.stack([s for _, s in found])[:, None]
            without = 1 - (error.sum(0) - error) / (spread.sum(0) - spread)
            g = len(filled)
            scores.append(1 - error.sum(0) / spread.sum(0))
            errors.append(((g - 1) / g * (without - without.mean(0)).square().sum(0)).sqrt())
        return torch.stack(scores), torch.stack(errors)

    def accuracy(self, models: list[list[Ridge]], data: _Batches, folds: int) -> tuple[Tensor, Tensor]:
        """[L, A] share of right answers about samples that the model has not seen."""
        dealer = _Dealer(folds, self.seed)
        right = torch.zeros(len(models), len(self.alphas), dtype=torch.float64, device="cpu")
        maps: list[list[tuple[Tensor, Tensor]]] = []
        for names, xs, y in data:
            if names != self.names:
                raise ValueError(f"{data.argument} must have the layers {self.names}, got {names}")
            y = y.argmax(1) if y.dim() == 2 else y.long()
            self.counts += torch.bincount(y.cpu(), minlength=len(self.counts))
            rows = self.rows(dealer(len(y)), folds, y.device)
            if not maps:
                maps = [[_as_map(fit, x) for fit in fits] for fits, x in zip(models, xs, strict=True)]
            for layer, (x, fits) in enumerate(zip(xs, maps, strict=True)):
                for (weight, bias), at in zip(fits, rows, strict=True):
                    for piece in at.split(ROWS):
                        logits = torch.addmm(bias, x[piece].to(weight.dtype), weight)
                        answers = logits.unflatten(1, (len(self.alphas), self.classes)).argmax(2)
                        right[layer] += (answers == y[piece, None]).sum(0).cpu()
        n = float(self.counts.sum())
        share = right / n
        return share, (share * (1 - share) / n).sqrt()

    def result(self, scores: Tensor, stderr: Tensor, totals: list[Moments], samples: int) -> Probe:
        best = scores.argmax(1)
        models = {name: t.ridge(float(self.alphas[i])) for name, t, i in zip(self.names, totals, best, strict=True)}
        classification = self.task == "classification"
        return Probe(
            tuple(self.names),
            tuple(self.alphas.tolist()),
            scores.cpu(),
            stderr.cpu(),
            "accuracy" if classification else "R²",
            float(self.counts.max() / self.counts.sum()) if classification else 0.0,
            samples,
            models,
        )


def _as_map(fit: Ridge, x: Tensor) -> tuple[Tensor, Tensor]:
    """coef [A, C, d], intercept [A, C] as one matrix [d, A·C] and vector, in the dtype that x is multiplied in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return fit.coef.flatten(0, 1).T.to(dtype).contiguous(), fit.intercept.flatten().to(dtype)


def v_information(x: Tensor | Moments, y: Tensor | None = None, *, alpha: float = 0.0) -> Tensor:
    """Linear V-information from x to y (Xu et al. 2020): what affine maps with Gaussian noise can use of x, in nats.

    With predictive family y_j ~ N(affine map of x, fitted variance), H_V(y) − H_V(y | x) = −½ Σ_j ln(1 − R²_j): for
    jointly Gaussian variables with one target the mutual information, and a function of R² alone.

    Args:
        x, y: [n, d] and [n] or [n, q]; or for x the :class:`Moments` of both, one-hot labels included.
        alpha: λ of the regression.

    Returns:
        A float64 scalar ≥ 0; infinite where a target is a linear function of x. In-sample: take many more samples than
        features, or a λ.

    Example:
        >>> x = torch.randn(500, 6)
        >>> pyrepr.stats.v_information(x, x[:, :2]).shape
        torch.Size([])
    """
    moments = x if isinstance(x, Moments) else Moments().update(x, y)
    return -0.5 * torch.log1p(-moments.r2(alpha, "raw_values").clamp(0, 1)).nansum()


class ConceptDepth(NamedTuple):
    """Where along the depth a concept can be read out.

    Example:
        >>> pyrepr.stats.concept_depth([0.5, 0.7, 0.99, 1.0], chance=0.5).layer
        2
    """

    layer: int  # the first whose score is `share` of the way from chance to the best
    depth: float  # layer / (L − 1), 0 to 1
    jump: int  # the layer with the largest rise over the one before; 0 if nothing rises


def concept_depth(
    scores: Probe | Tensor | Sequence[float], *, chance: float = 0.0, share: float = 0.95
) -> ConceptDepth:
    """The depth at which a probe's score is reached.

    Args:
        scores: a :class:`Probe` (its best scores and its chance level) or [L] scores from the first layer to the last.
        chance: where the way begins.
        share: which part of the way from chance to the best score counts as reached, in (0, 1].

    Raises:
        ValueError: for no layers, scores that are not finite, or a share out of range.

    Example:
        >>> pyrepr.stats.concept_depth([0.5, 0.7, 0.99, 1.0], chance=0.5).layer
        2
    """
    if isinstance(scores, Probe):
        scores, chance = scores.best, scores.chance
    try:
        values = torch.as_tensor(scores, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"scores must be a Probe or numbers [L], got {type(scores).__name__}") from None
    if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"scores must be finite numbers of shape [L] with L ≥ 1, got {shape_of(values)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {shown(share)}")
    reached = values >= chance + share * (values.max() - chance) - 1e-12
    layer = int(reached.nonzero()[0, 0])
    rises = values.diff()
    jump = int(rises.argmax()) + 1 if len(rises) and bool(rises.max() > 0) else 0
    return ConceptDepth(layer, layer / max(1, len(values) - 1), jump)
