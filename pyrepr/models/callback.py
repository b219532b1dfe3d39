"""Comparisons during training, in the form of Lightning's callbacks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from pyrepr.models.comparison import Comparison

__all__ = ["ComparisonCallback"]


class ComparisonCallback:
    """Logs a comparison of the model that is trained, at the end of every so many epochs, to whatever logger there is.

    It has the methods of ``lightning.pytorch.Callback`` that it needs, and works without Lightning too: call
    ``on_train_epoch_end(trainer, module)`` with a trainer that has ``current_epoch``, ``is_global_zero`` and
    ``loggers``. Numbers go to ``logger.log_metrics``, one for every layer of the model: its largest similarity to a
    layer of the other that is beyond chance. The picture goes to ``log_image`` (Weights & Biases), or
    ``experiment.add_figure`` (TensorBoard), where the logger has either and matplotlib is installed; what cannot be
    logged is left out, with one warning.

    Args:
        run: what is compared, a function of the model as it is: ``lambda model: pyrepr.compare(model, teacher,
            batches, progress=False)``.
        every: epochs between comparisons. Default: 1.
        name: under which it is logged.

    Attributes:
        last: the last comparison.

    Raises:
        TypeError, ValueError: if `run` is no function, or does not give a :class:`pyrepr.Comparison`.

    Example:
        >>> teacher, batches = torch.nn.Linear(8, 8), [torch.randn(64, 8)]
        >>> callback = pyrepr.models.ComparisonCallback(
        ...     lambda model: pyrepr.compare(model, teacher, batches, progress=False)
        ... )
    """

    def __init__(self, run: Callable[[nn.Module], Comparison], *, every: int = 1, name: str = "comparison") -> None:
        if not callable(run):
            raise TypeError(f"run must be a function of the model, got {type(run).__name__}")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an int from 1 on, got {every!r}")
        self.run, self.every, self.name = run, every, name
        self.last: Comparison | None = None
        self._told: set[str] = set()

    def __getattr__(self, attribute: str) -> Any:
        """All other hooks of a callback do nothing."""
        if attribute.startswith(("on_", "setup", "teardown", "state_dict", "load_state_dict")):
            return _nothing
        raise AttributeError(attribute)

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def on_train_epoch_end(self, trainer: Any, module: nn.Module) -> None:
        if not getattr(trainer, "is_global_zero", True) or (trainer.current_epoch + 1) % self.every:
            return
        result = self.run(module)
        if not isinstance(result, Comparison):
            raise TypeError(f"run must give a pyrepr.Comparison, got {type(result).__name__}")
        self.last = result
        score, step = result.score(), getattr(trainer, "global_step", trainer.current_epoch)
        values = score.values if score.unsure is None else score.values.masked_fill(score.unsure, float("nan"))
        best = values.nan_to_num(nan=-float("inf")).amax(1).tolist()
        numbers = {
            f"{self.name}/{layer}": value
            for layer, value in zip(result.layers_a, best, strict=True)
            if value > -float("inf")
        }
        for logger in trainer.loggers:
            if hasattr(logger, "log_metrics"):
                logger.log_metrics(numbers, step=step)
            else:
                self._warn(f"logger {type(logger).__name__} takes no numbers; the comparison is the callback's last")
            self._picture(logger, result, step)

    def _picture(self, logger: Any, result: Comparison, step: int) -> None:
        experiment = getattr(logger, "experiment", None)
        if not hasattr(logger, "log_image") and not hasattr(experiment, "add_figure"):
            return self._warn(f"logger {type(logger).__name__} takes no pictures; numbers are logged")
        try:
            figure = result.plot().figure
        except ImportError as error:
            return self._warn(f"no pictures are logged, numbers are: {error}")
        if hasattr(logger, "log_image"):
            logger.log_image(self.name, [figure], step=step)
        else:
            experiment.add_figure(self.name, figure, step)
        if pyplot := sys.modules.get("matplotlib.pyplot"):  # it would keep the figure
            pyplot.close(figure)

    def _warn(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            warnings.warn(sentence, stacklevel=4)


def _nothing(*_: Any, **__: Any) -> dict:
    return {}
