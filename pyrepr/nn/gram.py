"""CKA as a training loss."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._checks import check_layers, name_of, shown
from pyrepr.nn._gathering import gather_rows
from pyrepr.similarity._checks import check_estimator, check_mask
from pyrepr.similarity.kernels import Kernel, as_kernel
from pyrepr.similarity.measures import cka

Pair = tuple[Tensor, Tensor]

REDUCTIONS = ("mean", "sum", "none")


class CKALoss(nn.Module):
    """1 − CKA between representations of a student and a guide: guidance ("Training the Untrainable"), distillation.

    CKA is a statistic of the whole batch: the batch is the number of samples, so prefer large ones. Features with more
    than two axes are flattened to (batch, −1), as the paper does; to compare tokens instead of sequences flatten to
    (batch · tokens, d) yourself and pass the padding as ``mask``.

    Args:
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`; beside a Kernel(...) the last two are refused.
        estimator: ``"unbiased"`` (default, see :func:`pyrepr.cka`) or ``"biased"``.
        reduction: over the pairs of layers, ``"mean"`` (default), ``"sum"`` or ``"none"``.
        gather: with ``True`` and an initialised ``torch.distributed``, the batches of all processes are gathered and
            the loss of the whole is computed on each; gradients flow to the local part. Batch sizes may differ, and be
            0; what is gathered is padded to the largest. All processes give the same layers, and all a mask or none;
            else all of them raise one ValueError.

    Shape:
        student, guide: [n, ...] each, or lists of such pairs; widths may differ. mask: [n] bool, the rows that count.
        Output: scalar, or [pairs] for ``reduction="none"``; float64 for float64 inputs, else float32.

    A guide that needs no gradient costs its forward only. Value and gradient are finite also where the unbiased HSIC of
    student and guide is negative; a layer whose samples are all alike gives NaN and a warning.

    Example:
        >>> student, guide = torch.randn(32, 8, requires_grad=True), torch.randn(32, 6)
        >>> pyrepr.nn.CKALoss()(student, guide).backward()
    """

    def __init__(
        self,
        *,
        kernel: str | Kernel = "linear",
        bandwidth: float | None = None,
        sigma: float | None = None,
        estimator: str = "unbiased",
        reduction: str = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.kernel = as_kernel(kernel, bandwidth, sigma)
        check_estimator(estimator)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {shown(reduction)}")
        self.estimator = estimator
        self.reduction = reduction
        self.gather = gather

    def forward(
        self,
        student: Tensor | Sequence[Tensor],  # [n, ...]
        guide: Tensor | Sequence[Tensor],  # [n, ...]
        mask: Tensor | None = None,  # [n] bool
    ) -> Tensor:
        students = [student] if isinstance(student, Tensor) else list(student)
        guides = [guide] if isinstance(guide, Tensor) else list(guide)
        if len(students) != len(guides):
            raise ValueError(f"guide must hold one tensor per tensor of student, {len(students)}, got {len(guides)}")
        if not students:
            raise ValueError("student must hold at least one tensor, got none")
        pairs = [tuple(map(_flat, pair)) for pair in zip(students, guides, strict=True)]
        if self.gather:
            pairs, mask = _gathered(pairs, mask)
        losses = torch.stack([1 - cka(x, y, kernel=self.kernel, estimator=self.estimator, mask=mask) for x, y in pairs])
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        return f"kernel={self.kernel.name!r}, estimator={self.estimator!r}, reduction={self.reduction!r}"


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1) if isinstance(x, Tensor) and x.dim() > 2 else x


def _gathered(pairs: Sequence[Pair], mask: Tensor | None) -> tuple[list[Pair], Tensor | None]:
    """The rows of all processes in rank order; the gradient of a row goes back to the process it came from."""
    from torch import distributed

    if not distributed.is_initialized():
        raise RuntimeError("CKALoss(gather=True) needs an initialised torch.distributed process group, got none")
    counts = _agreed(pairs, mask)
    whole = [(gather_rows(x, counts), gather_rows(y, counts)) for x, y in pairs]
    return whole, None if mask is None else gather_rows(mask, counts)


def _agreed(pairs: Sequence[Pair], mask: Tensor | None) -> list[int]:
    """The number of rows of every process. Where one of them cannot take part, all raise, and none waits for it.

    Raises:
        ValueError: in every process, with the reason of each.
    """
    from torch import distributed

    n, refusal = 0, ""
    try:
        for x, y in pairs:
            n = check_layers(["student", "guide"], [x, y])[0].shape[0]
            if n != pairs[0][0].shape[0]:
                raise ValueError(f"student must hold tensors of one n, {pairs[0][0].shape[0]}, got {n}")
        if mask is not None:
            check_mask(mask, n, pairs[0][0].device)
    except (TypeError, ValueError) as error:
        refusal = f"{type(error).__name__}: {error}"
    told = refusal or f"widths and dtypes {_layout(pairs)}, {'no' if mask is None else 'a'} mask"
    first, world = pairs[0][0], distributed.get_world_size()
    device = first.device if isinstance(first, Tensor) else "cpu"
    mine = torch.tensor([n, bool(refusal), zlib.crc32(told.encode())], device=device)
    found = [torch.empty_like(mine) for _ in range(world)]
    distributed.all_gather(found, mine)
    rows = torch.stack(found).tolist()
    if any(refused for _, refused, _ in rows) or len({told for *_, told in rows}) > 1:
        reasons: list[Any] = [None] * world
        distributed.all_gather_object(reasons, told)
        listed = "; ".join(f"process {rank}: {reason}" for rank, reason in enumerate(reasons))
        raise ValueError(f"student, guide and mask must be alike in all processes, but for their n, got {listed}")
    return [n for n, *_ in rows]


def _layout(pairs: Sequence[Pair]) -> list[str]:
    return [" and ".join(f"{x.shape[1]} {name_of(x.dtype)}" for x in pair) for pair in pairs]
