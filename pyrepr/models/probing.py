"""Linear probes of a model's layers: recorded as :func:`pyrepr.compare` records, read out by ``pyrepr.stats``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._modules import evaluating
from pyrepr._reporting import progress_bar
from pyrepr.models._inputs import Inputs, Tokens, check_data
from pyrepr.models._layers import Layers
from pyrepr.models._recording import Recorder, plain_execution
from pyrepr.models.comparison import check_samples
from pyrepr.stats.probes import ALPHAS, Probe, linear_probe

# Recorded rows are kept for the second look up to this size; beyond it the model runs a second time.
KEPT_BYTES = 1 << 30

Labels = Tensor | Sequence[Any] | Callable[[Any], Tensor]


def probe(
    model: nn.Module,
    data: Iterable[Any],
    labels: Labels,
    *,
    layers: Layers | None = None,
    samples: str = "batch",
    pool: str | None = None,
    tokens: Tokens = "all",
    inputs: Inputs | None = None,
    alphas: float | Sequence[float] = ALPHAS,
    folds: int = 5,
    task: str = "classification",
    seed: int = 0,
    progress: bool = True,
) -> Probe:
    """What can be read out of each layer by a linear map: held-out accuracy or R² over depth.

    Args:
        model: any module; it runs in eval mode and is left as it was.
        data: an iterable of batches, as of :func:`pyrepr.compare`, in the same order every time.
        labels: a label a sample, in the order of the data: a tensor [N] (or [N, C] soft, [N, q] targets), a list of
            names or numbers; or a function from a batch to its labels.
        layers, samples, pool, tokens, inputs: which layers, and what a row of them is, as of :func:`pyrepr.compare`;
            ``pool="mean"`` makes one row of a text. With ``samples="tokens"`` every token that counts has a label.
        alphas, folds, task, seed: as of :func:`pyrepr.stats.linear_probe`.
        progress: a tqdm bar on stderr, where tqdm is installed.

    Returns:
        :class:`pyrepr.stats.Probe`, with ``plot``. The model runs once where the rows take at most 1 GiB
        (:data:`KEPT_BYTES`), else twice.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> labels = torch.arange(120) % 3
        >>> pyrepr.models.probe(model, [torch.randn(120, 8)], labels, progress=False).layers
        ('0', '2')
    """
    check_samples(samples, tokens, pool)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    recorder = Recorder(model, layers, "model", samples=samples, pool=pool, tokens=tokens, inputs=inputs)
    given, classes = labels if callable(labels) else _as_tensor(labels, task), None
    if isinstance(given, Tensor) and task == "classification":
        classes = given.shape[1] if given.dim() == 2 else max(2, int(given.max()) + 1) if len(given) else 0
    elif task == "classification":
        classes = max(2, 1 + max(int(given(batch).max()) for batch in check_data(data)))
    recorded = _Recorded(recorder, check_data(data), given, progress)
    with evaluating([recorder.model]), plain_execution(), torch.no_grad():
        return linear_probe(recorded, alphas=alphas, folds=folds, task=task, classes=classes, seed=seed)


def _as_tensor(labels: Any, task: str) -> Tensor:
    """Labels as a tensor; names become numbers in the order of the alphabet."""
    if isinstance(labels, Tensor):
        return labels
    if isinstance(labels, (str, bytes)) or not hasattr(labels, "__len__"):
        raise TypeError(f"labels must be a tensor, a list or a function of a batch, got {type(labels).__name__}")
    if len(labels) and isinstance(labels[0], str):
        if task != "classification":
            raise TypeError("labels must be numbers for task='regression', got strings")
        names = sorted(set(labels))
        return torch.tensor([names.index(label) for label in labels])
    return torch.as_tensor(labels)


class _Recorded:
    """Batches (rows of every layer, labels), as often as wanted."""

    def __init__(self, recorder: Recorder, data: Iterable[Any], labels: Any, progress: bool) -> None:
        self.recorder, self.data, self.labels, self.progress = recorder, data, labels, progress
        self.kept: list[tuple[dict[str, Tensor], Tensor]] | None = []
        self.complete = False
        self.marks: list[float] = []  # of every batch, by which it is known again

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        if self.complete and self.kept is not None:
            yield from self.kept
            return
        if self.complete and isinstance(self.data, Iterator):
            raise ValueError("data must start anew every time, as a list or a DataLoader does, got an iterator")
        taken, size = 0, 0
        for number, batch in enumerate(progress_bar(self.data, self.progress, "probe", "batch")):
            rows = self.run(batch)
            count = len(next(iter(rows.values())))
            y = self.labels(batch) if callable(self.labels) else self.labels[taken : taken + count]
            if len(y) != count:
                have = len(y) if callable(self.labels) else len(self.labels)
                raise ValueError(
                    f"labels must hold one for each row of the layers, got {have} for {taken + count} rows"
                )
            taken += count
            self.check(number, next(iter(rows.values())))
            size += sum(x.nbytes for x in rows.values())
            if not self.complete and self.kept is not None:
                self.kept = [*self.kept, (rows, y)] if size <= KEPT_BYTES else None
            yield rows, y
        if not callable(self.labels) and taken != len(self.labels):
            raise ValueError(f"labels must hold one for each of the {taken} rows of the layers, got {len(self.labels)}")
        self.complete = True

    def run(self, batch: Any) -> dict[str, Tensor]:
        if not self.recorder.views:
            self.recorder.prepare(batch)
        rows = self.recorder.run(batch)
        return {name: x if x.dtype == torch.float64 else x.float() for name, x in rows.items()}

    def check(self, number: int, x: Tensor) -> None:
        mark = float(x.double().sum())
        if number == len(self.marks):
            self.marks.append(mark)
        elif abs(mark - self.marks[number]) > 1e-4 * float(x.double().abs().sum()):
            raise ValueError(
                "data must give the same batches every time, but it is shuffled; the rows do not fit in memory"
            )
