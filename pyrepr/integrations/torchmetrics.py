"""Streaming CKA as a metric of torchmetrics, which Lightning and others sync across processes and reset by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyrepr._optional import require
from pyrepr.similarity import Kernel, StreamingCKA

torchmetrics = require("torchmetrics", "torchmetrics")

__all__ = ["CKAMetric"]


class CKAMetric(torchmetrics.Metric):
    """:class:`pyrepr.StreamingCKA` with ``update``, ``compute``, ``reset``, ``forward`` and sync of a ``Metric``.

    Merging is that of the stream, so the value over all processes is that of all their samples at once. ``forward``
    gives the value of the batch alone.

    Args:
        mode, estimator, kernel: as of :class:`pyrepr.StreamingCKA`. kwargs: as of ``torchmetrics.Metric``.

    Raises:
        ImportError: without torchmetrics, when this module is imported.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(
        self, *, mode: str = "exact", estimator: str = "unbiased", kernel: str | Kernel = "linear", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._options = {"mode": mode, "estimator": estimator, "kernel": kernel}
        StreamingCKA(**self._options)  # checks the options
        self.add_state("streams", default=[], dist_reduce_fx=None)

    def update(self, xs: Sequence[Tensor] | Tensor, ys: Sequence[Tensor] | Tensor | None = None) -> None:
        """Adds a batch of layers, as :meth:`pyrepr.StreamingCKA.update` takes them."""
        stream = self.streams[0] if self.streams else StreamingCKA(**self._options)
        self.streams = [stream.update(xs, ys)]

    def compute(self) -> Tensor:
        """[La, Lb] float64 over all updates, and all processes."""
        total = StreamingCKA(**self._options)
        for stream in self.streams:
            total.merge(stream)
        return total.compute()

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        merged = StreamingCKA(**self._options)
        for stream in [*incoming_state["streams"], *self.streams]:
            merged.merge(stream)
        self.streams = [merged]

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        total = StreamingCKA(**self._options)
        for stream in self.streams:
            total.merge(stream)
        self.streams = [total.all_reduce(process_group or self.process_group)]

    def _copy_state_dict(self) -> dict[str, Any]:
        copies = []
        for stream in self.streams:
            copy = StreamingCKA(**self._options)
            copy.load_state_dict(stream.state_dict())
            copies.append(copy)
        return {"streams": copies}

    def _move_list_states_to_cpu(self) -> None:
        """Streams are small; they stay where they are."""

    def _apply(self, fn: Any, exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(fn, exclude_state=("streams",))
