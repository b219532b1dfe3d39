"""CKA as a training loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyrepr.similarity._checks import check_estimator
from pyrepr.similarity.kernels import Kernel, as_kernel
from pyrepr.similarity.measures import cka

REDUCTIONS = ("mean", "sum", "none")


class CKALoss(nn.Module):
    """1 − CKA between representations of a student and a guide: guidance ("Training the Untrainable"), distillation.

    CKA is a statistic of the whole batch: the batch is the number of samples, so prefer large ones. Features with more
    than two axes are flattened to (batch, −1), as the paper does; to compare tokens instead of sequences flatten to
    (batch · tokens, d) yourself and pass the padding as ``mask``.

    Args:
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`.
        estimator: ``"unbiased"`` (default, see :func:`pyrepr.cka`) or ``"biased"``.
        reduction: over the pairs of layers, ``"mean"`` (default), ``"sum"`` or ``"none"``.
        gather: with ``True`` and an initialised ``torch.distributed``, the batches of all processes are gathered and
            the loss of the whole is computed on each; gradients flow to the local part. Equal batch sizes only.

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
        bandwidth: float = 1.0,
        sigma: float | None = None,
        estimator: str = "unbiased",
        reduction: str = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.kernel = as_kernel(kernel, bandwidth, sigma)
        check_estimator(estimator)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
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
        if self.gather and mask is not None:
            mask = self._gathered(mask)
        losses = torch.stack([1 - self._cka(s, g, mask) for s, g in zip(students, guides, strict=True)])
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def _cka(self, student: Tensor, guide: Tensor, mask: Tensor | None) -> Tensor:
        x, y = (t.flatten(1) if isinstance(t, Tensor) and t.dim() > 2 else t for t in (student, guide))
        if self.gather:
            x, y = self._gathered(x), self._gathered(y)
        return cka(x, y, kernel=self.kernel, estimator=self.estimator, mask=mask)

    @staticmethod
    def _gathered(x: Tensor) -> Tensor:
        """Rows of all processes in rank order; the gradient of a row goes back to the process it came from."""
        from torch import distributed

        if not distributed.is_initialized():
            raise RuntimeError("CKALoss(gather=True) needs an initialised torch.distributed process group, got none")
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x) if x.requires_grad else _plain_gather(x))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel.name!r}, estimator={self.estimator!r}, reduction={self.reduction!r}"


def _plain_gather(x: Tensor) -> list[Tensor]:
    from torch import distributed

    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return parts
