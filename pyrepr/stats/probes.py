"""What can be read out of layers by linear maps: all layers, all λ and all folds from one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrepr._checks import check_layer, check_layers, shape_of, shown
from pyrepr._optional import PLOT, require
from pyrepr._reporting import replacing
from pyrepr.stats._covariances import errors_of, ridge_of, warn_of_empty_classes
from pyrepr.stats._folds import ROWS, FoldSums, rows_of
from pyrepr.stats.moments import Moments, Ridge, check_alphas, check_finite, check_labels, check_targets

TASKS = ("classification", "regression")
ALPHAS = (1.0, 100.0, 10000.0)
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
    little, and a loader's data need not fit in memory: kept are folds·d² numbers a layer (of one layer
    at a time, where all are in memory). Accuracy needs the held-out rows once more, so a loader is then run over twice,
    in the same order; R² follows from moments.

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
    pieces = _layer_by_layer(data, held_out)
    runs = [_Run(values, BLOCKS if held_out else folds, task, classes, seed) for _ in pieces]
    with torch.no_grad():
        found = [run(*piece) for run, piece in zip(runs, pieces, strict=True)]
    if runs[0].empty is not None:
        warn_of_empty_classes(runs[0].empty, "they are never the answer")
    return _joined(found)


def _classes(y: Tensor | None) -> int:
    if y is None:
        raise ValueError("classes must be given with an iterable of batches, got None")
    if not len(y):
        raise ValueError("y must hold at least one label, got none")
    if y.is_floating_point() == (y.dim() == 1) or y.is_complex():
        raise TypeError(
            f"y must hold integer labels [n] or, soft, be floating point [n, C], got {y.dtype} {shape_of(y)}"
        )
    return max(2, y.shape[1] if y.dim() == 2 else int(y.max()) + 1)


Batch = tuple[list[str], list[Tensor], Tensor]


class _Batches:
    """The data as batches of checked layers and their y, as often as wanted; `whole`, if it is one batch in memory."""

    def __init__(self, source: Iterable[Any], argument: str, whole: Batch | None = None) -> None:
        self.source, self.argument, self.whole = source, argument, whole
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
        check_layers(names, xs)
        if y.dim() not in (1, 2) or len(xs[0]) != len(y):
            raise ValueError(f"y must have a row for each of the {len(xs[0])} samples, got {shape_of(y)}")
        return _Batches([(dict(zip(names, xs, strict=True)), y)], argument, (names, xs, y))
    if isinstance(layers, (Tensor, Mapping)) or not isinstance(layers, Iterable):
        if argument == "val":
            raise ValueError(f"val must be (layers, y) or an iterable of such batches, got {type(layers).__name__}")
        raise ValueError("y must be the labels or targets of the layers, got None")
    return _Batches(layers, argument)


def _layer_by_layer(data: _Batches, val: _Batches | None) -> list[tuple[_Batches, _Batches | None]]:
    """Each layer alone, where they are in memory: then the sums of one are, and not those of all."""
    sides = [side for side in (data, val) if side is not None]
    if any(side.whole is None or side.whole[0] != data.whole[0] for side in sides):
        return [(data, val)]
    cut = [
        [_Batches([({name: x}, side.whole[2])], side.argument) for name, x in zip(*side.whole[:2], strict=True)]
        for side in sides
    ]
    return list(zip(cut[0], cut[1] if val else [None] * len(cut[0]), strict=True))


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
    """The probes of some layers: of all that a loader gives, or of one after the other where all are in memory."""

    def __init__(self, alphas: Tensor, folds: int, task: str, classes: int | None, seed: int) -> None:
        self.alphas, self.folds, self.task, self.classes, self.seed = alphas, folds, task, classes, seed
        self.names: list[str] = []
        self.counts = torch.zeros(classes or 0, dtype=torch.float64, device="cpu")  # of classes in what is scored
        self.empty: Tensor | None = None  # counts of classes in what is fitted, with hard labels

    def __call__(self, data: _Batches, val: _Batches | None) -> Probe:
        if self.task == "classification" and val is None and data.once:
            raise ValueError("layers must be an iterable that starts anew every time (a loader), got an iterator")
        layers = self.sums(data, 1 if val else self.folds)
        totals = [layer.total() for layer in layers]
        samples = sum(layers[0].samples)
        if val and samples < 2:
            raise ValueError("layers must hold at least 2 samples, got fewer")
        if not val and samples < 2 * self.folds:
            raise ValueError(f"folds must be at most half of the {samples} samples, got {self.folds}")
        for name, total in zip(self.names, totals, strict=True):
            if not bool(total[0].diagonal().sum().isfinite()):
                raise ValueError(f"layer {name} must have squares that float32 can hold, got larger ones; pass float64")
        if layers[0].classes:
            self.empty = layers[0].counts()
            if int((self.empty > 0).sum()) < 2:
                raise ValueError(f"y must hold at least two classes, got class {int(self.empty.argmax())} alone")
        models = [self.models(layer, total, whole=bool(val)) for layer, total in zip(layers, totals, strict=True)]
        if self.task == "classification":
            centres = [layer.centre(total) for layer, total in zip(layers, totals, strict=True)]
            scores, stderr = self.accuracy(models, centres, val or data, 1 if val else self.folds)
            samples = int(self.counts.sum())
        else:
            parts = self.sums(val, self.folds) if val else layers
            for name, part, layer in zip(self.names, parts, layers, strict=True):
                if part.shift.shape != layer.shift.shape or part.targets != layer.targets:
                    sizes = (layer.shift.shape[1], layer.targets, part.shift.shape[1], part.targets)
                    raise ValueError(
                        "layer {} must have {} features and {} targets in val, got {} and {}".format(name, *sizes)
                    )
            if sum(parts[0].samples) < 2:
                raise ValueError("val must hold at least 2 samples, got fewer")
            scores, stderr = self.r2([fits * self.folds for fits in models] if val else models, parts)
            samples = sum(parts[0].samples)
        best = [float(self.alphas[i]) for i in scores.argmax(1)]
        fitted = []
        for layer, total, alpha in zip(layers, totals, best, strict=True):
            fit = ridge_of(layer.scatter(total), self.alphas.new_tensor([alpha]), quick=layer.quick)
            fitted.append(Ridge(fit.coef[0], fit.intercept[0]))
        return self.result(scores, stderr, samples, fitted)

    def models(self, layer: FoldSums, total: list[Tensor], whole: bool) -> list[Ridge]:
        """All λ fitted to what is in no fold but one, for every fold; or to the whole."""
        trainings = [total] if whole else ([a - b for a, b in zip(total, fold, strict=True)] for fold in layer.folds)
        return [ridge_of(layer.scatter(sums), self.alphas, quick=layer.quick) for sums in trainings]

    def sums(self, data: _Batches, folds: int) -> list[FoldSums]:
        """Of every layer, in one pass over the data."""
        dealer, found = _Dealer(folds, self.seed), []
        for names, xs, y in data:
            if not self.names:
                self.names = names
            self.check_names(names, data.argument)
            hard = self.task == "classification" and y.dim() == 1
            y = check_labels("y", y, len(xs[0]), self.classes) if hard else self.targets(y, xs[0])
            for name, x in zip(names, xs, strict=True):
                if not x.shape[1]:
                    raise ValueError(f"layer {name} must have at least one feature, got {shape_of(x)}")
            if not found:
                classes, targets = (self.classes, self.classes) if hard else (None, y.shape[1])
                found = [FoldSums(folds, x.shape[1], classes, targets, x.device) for x in xs]
            dealt = dealer(len(y))
            rows = self.rows(dealt, folds)
            for name, x, layer in zip(names, xs, found, strict=True):
                _check_width(name, x, layer.shift.shape[1])
                if hard != bool(layer.classes) or (not hard and y.shape[1] != layer.targets):
                    raise ValueError("y must be of one kind and width in all batches, got another")
                check_finite(f"layer {name}", x)
                layer.add(x, y.to(x.device), [at.to(x.device) for at in rows])
        if not found:
            raise ValueError(f"{data.argument} must give at least one batch, got none")
        return found

    def check_names(self, names: list[str], argument: str) -> None:
        if names != self.names:
            raise ValueError(f"{argument} must have the layers {self.names}, got {names}")

    @staticmethod
    def rows(dealt: Tensor, folds: int) -> list[Tensor]:
        return [(dealt == fold).nonzero()[:, 0] for fold in range(folds)]

    def targets(self, y: Tensor, x: Tensor) -> Tensor:
        if self.task == "classification" and (y.dim() != 2 or y.shape[1] != self.classes):
            raise ValueError(f"y must be soft labels [n, C] with C = {self.classes}, got {shape_of(y)}")
        if not y.is_floating_point():
            raise TypeError(f"y must be floating point for task='regression' and soft labels, got {y.dtype}")
        if self.task == "classification" and bool((y < 0).any()):
            raise ValueError(f"y must be soft labels of at least 0, got {float(y.min()):.4g}")
        return check_targets(y, x)

    def r2(self, models: list[list[Ridge]], parts: list[FoldSums]) -> tuple[Tensor, Tensor]:
        """[L, A] R² over all folds and its jackknife error over them."""
        scores, errors = [], []
        for fits, layer in zip(models, parts, strict=True):
            mean = layer.scatter(layer.total()).mean_y
            error, spread = [], []
            for fit, fold in zip(fits, layer.folds, strict=True):
                if bool(fold[2][-1, -1] > 0):
                    scatter = layer.scatter(fold)
                    missed, around = errors_of(scatter, fit)
                    error.append(missed.sum(-1))
                    spread.append(around.sum() + scatter.n * (scatter.mean_y - mean).square().sum())
            error, spread, g = torch.stack(error), torch.stack(spread)[:, None], len(error)
            if not bool(spread.sum() > 0):
                raise ValueError("y must vary, got the same targets for every sample")
            without = 1 - (error.sum(0) - error) / (spread.sum(0) - spread)
            scores.append(1 - error.sum(0) / spread.sum(0))
            errors.append(((g - 1) / g * (without - without.mean(0)).square().sum(0)).sqrt())
        return torch.stack(scores).cpu(), torch.stack(errors).cpu()

    def accuracy(
        self, models: list[list[Ridge]], centres: list[Tensor], data: _Batches, folds: int
    ) -> tuple[Tensor, Tensor]:
        """[L, A] share of right answers about samples that the model has not seen."""
        dealer = _Dealer(folds, self.seed)
        right = torch.zeros(len(models), len(self.alphas), dtype=torch.float64, device="cpu")
        maps = [[_Map(fit, centre) for fit in fits] for fits, centre in zip(models, centres, strict=True)]
        for names, xs, y in data:
            self.check_names(names, data.argument)
            hard = y.dim() == 1
            y = check_labels("y", y, len(xs[0]), self.classes) if hard else self.targets(y, xs[0]).argmax(1)
            self.counts += torch.bincount(y.cpu(), minlength=len(self.counts))
            rows = self.rows(dealer(len(y)), folds)
            for layer, (name, x, fits) in enumerate(zip(names, xs, maps, strict=True)):
                _check_width(name, x, len(centres[layer]))
                check_finite(f"layer {name}", x)
                here, room = y.to(x.device), x.new_empty(min(ROWS, len(x)), x.shape[1], dtype=centres[layer].dtype)
                for fit, at in zip(fits, rows, strict=True):
                    for piece in at.to(x.device).split(ROWS):
                        answers = fit(rows_of(x, piece, room)).unflatten(1, (len(self.alphas), self.classes)).argmax(2)
                        right[layer] += (answers == here[piece, None]).sum(0).cpu()
        n = float(self.counts.sum())
        if not n:
            raise ValueError(f"{data.argument} must hold at least one sample, got none")
        share = right / n
        return share, (share * (1 - share) / n).sqrt()

    def result(self, scores: Tensor, stderr: Tensor, samples: int, fitted: list[Ridge]) -> Probe:
        classification = self.task == "classification"
        return Probe(
            tuple(self.names),
            tuple(self.alphas.tolist()),
            scores,
            stderr,
            "accuracy" if classification else "R²",
            float(self.counts.max() / self.counts.sum()) if classification else 0.0,
            samples,
            dict(zip(self.names, fitted, strict=True)),
        )


def _check_width(name: str, x: Tensor, width: int) -> None:
    if x.shape[1] != width:
        raise ValueError(f"layer {name} must have {width} features, got {shape_of(x)}")


class _Map:
    """All λ of a fit as one affine map, of x around a centre: a large mean would take the digits of the product."""

    def __init__(self, fit: Ridge, centre: Tensor) -> None:
        self.centre, self.weight = centre, fit.coef.flatten(0, 1).to(centre.dtype)
        self.bias = (fit.intercept + fit.coef @ centre.double()).flatten().to(centre.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Of x in the centre's dtype, which is overwritten."""
        return torch.nn.functional.linear(x.sub_(self.centre), self.weight, self.bias)


def _joined(probes: list[Probe]) -> Probe:
    """Probes of one layer each as one of all."""
    return replace(
        probes[0],
        layers=tuple(name for probe in probes for name in probe.layers),
        scores=torch.cat([probe.scores for probe in probes]),
        stderr=torch.cat([probe.stderr for probe in probes]),
        models={name: fit for probe in probes for name, fit in probe.models.items()},
    )


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
        ValueError: for no layers, scores that are not finite, none above chance, or a share out of range.

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
    if not chance < values.max():
        raise ValueError(f"chance must be below the best score, {float(values.max()):.4g}, got {shown(chance)}")
    reached = values >= chance + share * (values.max() - chance) - 1e-12
    layer = int(reached.nonzero()[0, 0])
    rises = values.diff()
    jump = int(rises.argmax()) + 1 if len(rises) and bool(rises.max() > 0) else 0
    return ConceptDepth(layer, layer / max(1, len(values) - 1), jump)
