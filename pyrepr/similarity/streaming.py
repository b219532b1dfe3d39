"""CKA over more samples than fit in memory: one pass over a data loader, any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import check_agreed, shown
from pyrepr.similarity._batches import Batches, differing_scales, same_scales
from pyrepr.similarity._checks import check_count, check_estimator
from pyrepr.similarity._hsic import normalise, warn_if_degenerate
from pyrepr.similarity.kernels import Kernel, as_kernel
from pyrepr.stats._layer_moments import LayerMoments, checked_layers, layout

MODES = ("exact", "minibatch")
OPTIONS = ("estimator", "mode", "kernel")


class StreamingCKA:
    """All-pairs CKA, fed batch by batch.

    ``mode="exact"`` (linear kernel) gives the value of all samples at once, however they were cut into batches. It
    keeps moments instead of samples: X_aᵀX_b for every pair of layers that is compared and a few vectors, in float64;
    8·(Σ d_a d_b) bytes, independent of the number of samples. For very wide layers (Σ d_a d_b ≫ memory) use
    ``mode="minibatch"``: Σ w·HSIC(a, b) / √(Σ w·HSIC(a, a) · Σ w·HSIC(b, b)) over batches (Nguyen et al. 2020), a ratio
    of sums that keeps [L, L] numbers; with the unbiased estimator its expectation depends little on the batch size. A
    batch of n samples has the weight w = n(n − 3), or (n − 1)² with the biased estimator, so that a short last one
    disturbs nothing; below 4 samples it is an error.

    Args:
        estimator: ``"unbiased"`` (default, see :func:`pyrepr.cka`) or ``"biased"``.
        mode: ``"exact"`` (default) or ``"minibatch"``.
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`; beside a Kernel(...) the last two are refused.
            ``mode="exact"`` takes ``"linear"`` only. σ = ``bandwidth`` × median is chosen once a layer, from the first
            batch or by :meth:`calibrate`, and held for the whole stream: :attr:`scales`.

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
        bandwidth: float | None = None,
        sigma: float | None = None,
    ) -> None:
        check_estimator(estimator)
        if mode not in MODES:
            raise ValueError(f"mode must be 'exact' or 'minibatch', got {shown(mode)}")
        spec = as_kernel(kernel, bandwidth, sigma)
        if mode == "exact" and spec.name != "linear":
            raise ValueError(
                f"kernel must be 'linear' in mode 'exact', got {shown(spec.name)}; mode 'minibatch' takes any kernel"
            )
        self.estimator = estimator
        self.mode = mode
        self.kernel = spec
        self._moments = LayerMoments()  # mode "exact"
        self._batches: Batches | None = None  # mode "minibatch"

    @property
    def samples(self) -> int:
        """How many samples have been seen."""
        return self._batches.n if self._batches else self._moments.samples

    @property
    def scales(self) -> Tensor | None:
        """σ of every layer, [L] float64, in mode "minibatch" (γ for the polynomial kernel, 1 for linear and cosine);
        ``None`` before the first batch and in mode "exact"."""
        return self._batches.scales.clone() if self._batches else None

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
        before = self._batches
        added = Batches.of(layers, split, self.kernel, self.estimator, before and before.scales.to(layers[0].device))
        self._batches = before.to(layers[0].device).plus(added) if before else added
        return self

    @torch.no_grad()
    def calibrate(self, xs: Sequence[Tensor] | Tensor, ys: Sequence[Tensor] | Tensor | None = None) -> StreamingCKA:
        """Chooses σ of every layer from these samples, which are not counted; before the first update.

        For mode "minibatch" with σ = bandwidth × median, where streams are to be merged or reduced over processes:
        each has to be calibrated with the same samples.

        Raises:
            ValueError: in mode "exact", or after samples were added; else as :meth:`update`.
        """
        if self.mode == "exact":
            raise ValueError("calibrate needs mode 'minibatch'; mode 'exact' has a linear kernel, without a σ")
        if self.samples:
            raise ValueError(f"calibrate must come before the first update, but {self.samples} samples were added")
        layers, split = checked_layers(xs, ys, *self._layout)
        check_count(layers[0].shape[0], "biased", "what calibrate is given")
        self._batches = Batches.none(layers, split, self.kernel)
        return self

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The CKA so far: [Lx, Ly] float64 (or [Lx, Lx]); more updates may follow.

        Raises:
            ValueError: before the first update, or with fewer samples than the estimator needs.
        """
        widths, split = self._layout
        if not widths or (self._batches and not self._batches.n):
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
            ValueError: if the streams differ in estimator, mode, kernel or layers, or in the σ they chose.
        """
        if not isinstance(other, StreamingCKA):
            raise TypeError(f"other must be a StreamingCKA, got {type(other).__name__}")
        for option in OPTIONS:
            if getattr(self, option) != getattr(other, option):
                raise ValueError(f"other must have {option} {getattr(self, option)!r}, got {getattr(other, option)!r}")
        if self.mode == "exact":
            self._moments.merge(other._moments)
        elif not (self._batches and other._batches):
            self._batches = self._batches or other._batches
        else:
            self._batches = self._batches.plus(other._batches)
        return self

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> StreamingCKA:
        """Adds up the streams of all processes of a ``torch.distributed`` group; afterwards all hold the whole.

        Every process must call it; one that has seen no sample yet takes part. Tensors stay on their device, so use
        a backend that can reduce there (gloo for the CPU, nccl for CUDA).

        Raises:
            ValueError: the same in every process, if they differ in estimator, mode, kernel or layers, or in the σ they
                chose (see :meth:`calibrate`); nothing is changed.
        """
        check_agreed({name: getattr(self, name) for name in OPTIONS}, group)
        if self.mode == "exact":
            self._moments.all_reduce(group)
        else:
            self._batches = _gathered(self._batches, group)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or elsewhere: tensors, numbers and names; ``torch.save`` takes it."""
        if self._batches:
            batches = self._batches
            stream = {"widths": list(batches.widths), "split": batches.split, "state": batches.state()}
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
        elif state_dict["state"] or state_dict["widths"]:
            start._batches = Batches.loaded(*(state_dict[key] for key in ("widths", "split", "state")))
        vars(self).update(vars(start))


def _gathered(batches: Batches | None, group: Any) -> Batches | None:
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
    for each in filled[1:]:
        if not same_scales(filled[0].scales, each.scales):
            raise ValueError(f"all processes {differing_scales([filled[0].scales, each.scales])}")
    total = filled[0]
    for each in filled[1:]:
        total = total.plus(each)
    return total.to(batches.hsic.device) if batches else total
