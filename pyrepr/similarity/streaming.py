"""CKA over more samples than fit in memory: one pass over a data loader, any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrepr.similarity._checks import check_count, check_estimator
from pyrepr.similarity._hsic import hsic_table, normalise, warn_if_degenerate
from pyrepr.similarity.kernels import Kernel, as_kernel
from pyrepr.stats._layer_moments import LayerMoments, checked_layers, layout

MODES = ("exact", "minibatch")


class StreamingCKA:
    """All-pairs CKA, fed batch by batch.

    ``mode="exact"`` (linear kernel) gives the value of all samples at once, however they were cut into batches. It
    keeps moments instead of samples: X_aᵀX_b for every pair of layers that is compared and a few vectors, in float64;
    8·(Σ d_a d_b) bytes, independent of the number of samples. For very wide layers (Σ d_a d_b ≫ memory) use
    ``mode="minibatch"``: Σ_batches HSIC(a, b) / √(Σ HSIC(a, a) · Σ HSIC(b, b)) (Nguyen et al. 2020), a ratio of sums
    that keeps [L, L] numbers; with the unbiased estimator its expectation depends little on the batch size. A short
    last batch counts like any other; below 4 samples it is an error.

    Args:
        estimator: ``"unbiased"`` (default, see :func:`pyrepr.cka`) or ``"biased"``.
        mode: ``"exact"`` (default) or ``"minibatch"``.
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`; ``mode="exact"`` takes ``"linear"`` only.

    Example:
        >>> stream = pyrepr.StreamingCKA()
        >>> for _ in range(3):
        ...     batch = torch.randn(32, 8)
        ...     stream = stream.update([batch, batch @ torch.randn(8, 5)])
        >>> stream.compute().shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        *,
        estimator: str = "unbiased",
        mode: str = "exact",
        kernel: str | Kernel = "linear",
        bandwidth: float = 1.0,
        sigma: float | None = None,
    ) -> None:
        check_estimator(estimator)
        if mode not in MODES:
            raise ValueError(f"mode must be 'exact' or 'minibatch', got {mode!r}")
        spec = as_kernel(kernel, bandwidth, sigma)
        if mode == "exact" and spec.name != "linear":
            raise ValueError(
                f"kernel must be 'linear' in mode 'exact', got {spec.name!r}; mode 'minibatch' takes any kernel"
            )
        self.estimator = estimator
        self.mode = mode
        self.kernel = spec
        self._moments = LayerMoments()  # mode "exact"
        self._batches: _Batches | None = None  # mode "minibatch"

    @property
    def samples(self) -> int:
        """How many samples have been seen."""
        return self._batches.n if self._batches else self._moments.samples

    @property
    def _layout(self) -> tuple[list[int], int]:
        """Widths of the layers, and where the second network's begin."""
        if self._batches:
            return list(self._batches.widths), self._batches.split
        return self._moments.widths, self._moments.split

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor] | Tensor, ys: Sequence[Tensor] | Tensor | None = None) -> StreamingCKA:
        """Adds a batch: the same layers in the same order every time, row i of all of them one sample.

        Args:
            xs: layers [n, d_l] of one network, as a list or a tensor [L, n, d]; n may differ between calls.
            ys: layers of the other network for the same n samples; ``None`` compares xs with itself.

        Raises:
            ValueError, TypeError: also if the number or widths of layers differ from the first call; nothing is added.
        """
        layers, split = checked_layers(xs, ys, *self._layout)
        if self.mode == "exact":
            self._moments.add(layers, split)
            return self
        check_count(layers[0].shape[0], self.estimator, "a batch in mode 'minibatch'")
        table, floor = hsic_table(layers, self.kernel, self.estimator, split=split)
        added = _Batches(tuple(x.shape[1] for x in layers), split, layers[0].shape[0], table, floor)
        self._batches = self._batches.plus(added) if self._batches else added
        return self

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The CKA so far: [Lx, Ly] float64 (or [Lx, Lx]); more updates may follow.

        Raises:
            ValueError: before the first update, or with fewer samples than the estimator needs.
        """
        widths, split = self._layout
        if not widths:
            raise ValueError("compute needs at least one update, got none")
        names = [f"xs[{i}]" for i in range(split or len(widths))]
        names += [f"ys[{i}]" for i in range(len(widths) - len(names))]
        if self._batches:
            table, floor = self._batches.hsic, self._batches.floor
        else:
            check_count(self.samples, self.estimator, "the stream")
            table, floor = self._moments.hsic_and_floor(self.estimator)
        own = warn_if_degenerate(table.diagonal(), floor, names)
        return normalise(table[:split, split:], own[:split], own[split:]) if split else normalise(table, own, own)

    @torch.no_grad()
    def merge(self, other: StreamingCKA) -> StreamingCKA:
        """Adds the samples another stream has seen (other shards of the data); `other` is not changed.

        Raises:
            ValueError: if the streams differ in estimator, mode, kernel or layers.
        """
        if not isinstance(other, StreamingCKA):
            raise TypeError(f"other must be a StreamingCKA, got {type(other).__name__}")
        for option in ("estimator", "mode", "kernel"):
            if getattr(self, option) != getattr(other, option):
                raise ValueError(f"other must have {option} {getattr(self, option)!r}, got {getattr(other, option)!r}")
        if self.mode == "exact":
            self._moments.merge(other._moments)
        elif not (self._batches and other._batches):
            self._batches = self._batches or other._batches
        elif self._layout != other._layout:
            raise ValueError(f"other must have layers of widths {layout(*self._layout)}, got {layout(*other._layout)}")
        else:
            self._batches = self._batches.plus(other._batches)
        return self

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> StreamingCKA:
        """Adds up the streams of all processes of a ``torch.distributed`` group; afterwards all hold the whole.

        Every process must call it; one that has seen no sample yet takes part. Tensors stay on their device, so use
        a backend that can reduce there (gloo for the CPU, nccl for CUDA).
        """
        if self.mode == "exact":
            self._moments.all_reduce(group)
        else:
            self._batches = _gathered(self._batches, group)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or elsewhere: tensors, numbers and names; ``torch.save`` takes it."""
        if self._batches:
            batches = self._batches
            state = {"n": batches.n, "hsic": batches.hsic.clone(), "floor": batches.floor.clone()}
            stream = {"widths": list(batches.widths), "split": batches.split, "state": state}
        else:
            stream = self._moments.state_dict()
        return {"estimator": self.estimator, "mode": self.mode, "kernel": vars(self.kernel).copy(), **stream}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, options included.

        Raises:
            ValueError: if it is not such a dict, or its parts do not fit together; nothing is changed.
        """
        wanted = {"estimator", "mode", "kernel", "widths", "split", "state"}
        if not isinstance(state_dict, dict) or not wanted <= set(state_dict):
            missing = sorted(wanted - set(state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"state_dict must come from StreamingCKA.state_dict(), got one without {missing}")
        try:
            kernel = Kernel(**state_dict["kernel"])
        except TypeError as error:
            raise ValueError(f"state_dict: kernel must hold the options of pyrepr.Kernel ({error})") from None
        start = StreamingCKA(estimator=state_dict["estimator"], mode=state_dict["mode"], kernel=kernel)
        if start.mode == "exact":
            start._moments.load_state_dict(state_dict)
        elif state_dict["state"]:
            start._batches = _Batches.loaded(state_dict)
        vars(self).update(vars(start))


@dataclass(frozen=True)
class _Batches:
    """Mode "minibatch": HSIC summed over batches."""

    widths: tuple[int, ...]
    split: int
    n: int
    hsic: Tensor  # [M, M] float64
    floor: Tensor  # [M] float64, the largest self-HSIC that may be rounding in any batch

    def plus(self, other: _Batches) -> _Batches:
        floor = torch.maximum(self.floor, other.floor)
        return replace(self, n=self.n + other.n, hsic=self.hsic + other.hsic, floor=floor)

    def to(self, device: torch.device | str) -> _Batches:
        return replace(self, hsic=self.hsic.to(device), floor=self.floor.to(device))

    @classmethod
    def loaded(cls, state_dict: dict[str, Any]) -> _Batches:
        widths, split, state = tuple(state_dict["widths"]), state_dict["split"], state_dict["state"]
        m = len(widths)
        shapes = {"hsic": (m, m), "floor": (m,)}
        fits = isinstance(state, dict) and set(state) == {"n", *shapes} and isinstance(state["n"], int)
        if not fits or any(getattr(state[key], "shape", None) != shape for key, shape in shapes.items()):
            raise ValueError(f"state_dict must hold n, hsic [M, M] and floor [M] of its M = {m} layers")
        return cls(widths, split, state["n"], state["hsic"].clone(), state["floor"].clone())


def _gathered(batches: _Batches | None, group: Any) -> _Batches | None:
    """The sum of what all processes of the group hold."""
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, batches and batches.to("cpu"), group=group)
    filled = [each for each in found if each is not None]
    if not filled:
        return batches
    if any((each.widths, each.split) != (filled[0].widths, filled[0].split) for each in filled):
        raise ValueError(
            f"all processes must stream the same layers, got {[layout(each.widths, each.split) for each in filled]}"
        )
    total = filled[0]
    for each in filled[1:]:
        total = total.plus(each)
    return total.to(batches.hsic.device) if batches else total
