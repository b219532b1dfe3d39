"""Cases of linear probes: `pyrepr.stats.linear_probe` beside scikit-learn's linear classifiers and himalaya's.

The error is that of the coefficients fitted to all samples, against float64 at the λ that was chosen. Peers run on as
many threads as torch.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyrepr.benchmarks.harness import Case, Workload, module_error, relative_error
from torch import Tensor

from pyrepr.stats import Moments, linear_probe

ALPHAS, FOLDS, CLASSES = (1.0, 100.0, 10000.0), 5, 10
MANY_SAMPLES = 100_000  # of all layers: beyond, the others take minutes a round
HIMALAYA_SAMPLES = 10000  # beyond, himalaya's decompositions take half a minute a layer

Fit = tuple[Tensor, float]  # coefficients [C, d] for one-hot targets, and their λ


def labelled_layers(count: int, n: int, d: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Layers whose variance falls along their features, as that of principal components does, with classes that
    overlap: every other sample held out is told right."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (n,), generator=generator)
    spread = torch.arange(1, d + 1).rsqrt()
    layers = []
    for _ in range(count):
        means = torch.randn(CLASSES, d, generator=generator) * 1.8 / math.sqrt(d)
        layers.append((means[y] + torch.randn(n, d, generator=generator)) * spread)
    return layers, y


def _own(layers: list[Tensor], y: Tensor) -> list[Fit]:
    probe = linear_probe(layers, y, alphas=ALPHAS, folds=FOLDS)
    models = probe.models.values()
    return [(model.coef, alpha) for model, alpha in zip(models, probe.best_alpha.tolist(), strict=True)]


def _scikit_learn(make: Callable[[], Any], layers: list[Tensor], y: Tensor) -> list[Fit]:
    from threadpoolctl import threadpool_limits

    found = []
    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LogisticRegression says when it stops early
        for x in layers:
            model = make().fit(x.numpy(), y.numpy())
            alpha = getattr(model, "alpha_", getattr(model, "alpha", math.nan))
            found.append((torch.as_tensor(model.coef_) / 2, float(alpha)))  # of targets ±1
    return found


def _himalaya(layers: list[Tensor], y: Tensor) -> list[Fit]:
    from himalaya.ridge import RidgeCV
    from threadpoolctl import threadpool_limits

    found, targets = [], torch.nn.functional.one_hot(y, CLASSES).float().numpy()
    with threadpool_limits(torch.get_num_threads()):
        for x in layers:
            model = RidgeCV(alphas=ALPHAS, cv=FOLDS, fit_intercept=True).fit(x.numpy(), targets)
            best = torch.as_tensor(model.best_alphas_)  # each target has its own
            found.append((torch.as_tensor(model.coef_).T, float(best[0]) if len(best.unique()) == 1 else math.nan))
    return found


def _error(found: list[Fit], truth: Callable[[int, float], Tensor]) -> float:
    """NaN for another model than ridge with one λ."""
    return max(math.nan if math.isnan(a) else relative_error(coef, truth(i, a)) for i, (coef, a) in enumerate(found))


def _probe(count: int, n: int, d: int) -> Workload:
    layers, y = labelled_layers(count, n, d)
    peers: dict[str, Callable[[], list[Fit]]] = {}
    if not module_error("sklearn", "scikit-learn"):
        from sklearn.linear_model import LogisticRegression, RidgeClassifier, RidgeClassifierCV

        makers = {
            "RidgeClassifier, one λ, no folds": functools.partial(RidgeClassifier, alpha=ALPHAS[0]),
            "RidgeClassifierCV, leave one out": functools.partial(RidgeClassifierCV, alphas=ALPHAS),
            "RidgeClassifierCV, cv=5": functools.partial(RidgeClassifierCV, alphas=ALPHAS, cv=FOLDS),
            "LogisticRegression, one λ, no folds": LogisticRegression,
        }
        if count * n > MANY_SAMPLES:
            makers = {name: make for name, make in makers.items() if name.startswith("RidgeClassifier,")}
        peers = {name: functools.partial(_scikit_learn, make, layers, y) for name, make in makers.items()}
    if n <= HIMALAYA_SAMPLES and not module_error("himalaya", "himalaya"):
        peers["himalaya RidgeCV, cv=5"] = functools.partial(_himalaya, layers, y)

    def truth() -> Callable[[int, float], Tensor]:
        moments = [Moments(CLASSES).update(x.double(), y) for x in layers]
        return lambda layer, alpha: moments[layer].ridge(alpha).coef

    return Workload(
        {"pyrepr, 3 λ, 5 folds": functools.partial(_own, layers, y), **peers},
        truth=truth,
        error=_error,
        tolerance=1e-4,
        flops=count * n * d * d,
        data=f"{CLASSES} overlapping classes",
    )


def cases() -> list[Case]:
    """Work that `pyrepr bench probe` measures."""
    shapes = [(2, 4000, 384, True), (1, 20000, 768, False), (24, 20000, 768, False)]
    return [
        Case(
            "linear_probe",
            f"{count} x {n} x {d}, {CLASSES} classes",
            functools.partial(_probe, count, n, d),
            quick=quick,
        )
        for count, n, d, quick in shapes
    ]
