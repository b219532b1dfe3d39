"""Contrastive losses as modules, on :func:`pyrepr.functional.info_nce`: no n × m matrix of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyrepr._checks import check_is_tensor, shape_of, shown
from pyrepr.functional.pairs import check_scale, check_weights, info_nce
from pyrepr.nn._gathering import gather_rows


class ClipLoss(nn.Module):
    """The loss of CLIP (Radford et al. 2021), a drop-in for ``open_clip.ClipLoss`` in O(batch · width) memory.

    (InfoNCE over rows + InfoNCE over columns) / 2 of ``logit_scale`` · image_featuresᵀ · text_features; the features
    come normalised. On several processes the features of all are gathered.

    Args:
        local_loss: every process computes the loss of its own rows against all; the mean over processes is the whole.
            Default ``False``: every process computes the whole.
        gather_with_grad: gradients also flow to the processes that the gathered features came from. Default ``False``.
        cache_labels: accepted, as open_clip's training script passes it; labels are no work here.
        rank, world_size: of this process and of all; with ``world_size > 1`` an initialised ``torch.distributed`` is
            needed. Default one process.
        use_horovod: only ``False``; gathering goes through ``torch.distributed``.

    Shape:
        image_features, text_features: [n, d], the same n on all processes. logit_scale: a number or scalar tensor.
        logit_bias: added to every logit, which changes neither softmax; its gradient is zero.
        Output: scalar, or ``{"contrastive_loss": scalar}`` with ``output_dict=True``.

    Raises:
        ValueError: if processes have different batch sizes, or as of :func:`pyrepr.functional.info_nce`.

    Example:
        >>> import torch, pyrepr
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> round(pyrepr.nn.ClipLoss()(image, text, torch.tensor(2.0)).item(), 4)
        0.3408
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: features are gathered by torch.distributed, got True")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,  # [n, d]
        text_features: Tensor,  # [n, d]
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        for name, x in (("image_features", image_features), ("text_features", text_features)):
            if check_is_tensor(name, x).dim() != 2:
                raise ValueError(f"{name} must have shape [n, d], got {shape_of(x)}")
        if len(image_features) != len(text_features):
            raise ValueError(
                f"text_features must have a row per row of image_features, {len(image_features)}, "
                f"got {len(text_features)}"
            )
        loss = self._loss(image_features, text_features, check_scale(logit_scale, image_features, "logit_scale"))
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # a gradient of zero, not none
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        if self.world_size == 1:
            return info_nce(image, text, scale)
        self._check_batches(len(image), image.device)
        images, texts = self._gathered(image), self._gathered(text)
        if not self.local_loss:
            return info_nce(images, texts, scale)
        own = torch.arange(len(image), device=image.device) + len(image) * self.rank
        pairs = ((image, texts), (text, images))
        return sum(info_nce(a, b, scale, labels=own, directions="rows") for a, b in pairs) / 2

    def _check_batches(self, n: int, device: torch.device) -> None:
        from torch import distributed

        if not distributed.is_initialized():
            raise RuntimeError("ClipLoss with world_size > 1 needs an initialised torch.distributed process group")
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=device)
        sizes[self.rank] = n
        distributed.all_reduce(sizes)
        if len(set(sizes.tolist())) > 1:
            raise ValueError(f"image_features must have the same n on all processes, got {sizes.tolist()}")

    def _gathered(self, x: Tensor) -> Tensor:
        """The rows of all processes; their gradients reach the own ones, and with `gather_with_grad` all."""
        counts = [len(x)] * self.world_size
        if self.gather_with_grad:
            return gather_rows(x, counts)
        parts = list(gather_rows(x.detach(), counts).split(counts))
        if not self.local_loss:
            parts[self.rank] = x
        return torch.cat(parts)

    def extra_repr(self) -> str:
        return f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, world_size={self.world_size}"


class MatryoshkaLoss(nn.Module):
    """InfoNCE of cosines, added up over prefixes of the embedding (Kusupati et al. 2022, "Matryoshka Representation
    Learning", eq. 1), with one product for all prefixes.

    Equal to sentence-transformers' ``MatryoshkaLoss`` around ``MultipleNegativesRankingLoss``, on embeddings instead of
    sentences; :mod:`pyrepr.integrations.sentence_transformers` puts it under those.

    Args:
        dims: widths of the prefixes, in any order.
        weights: one each, in the order of `dims`; by default 1.
        scale: 1/temperature. Default 20, sentence-transformers'.
        directions, label_smoothing: see :func:`pyrepr.functional.info_nce`; by default rows alone and none.

    Shape:
        x: [n, d], y: [m, d] with m ≥ n, row i of both a pair, what follows hard negatives. labels: [n], if the pairs
        are others. Output: scalar.

    Example:
        >>> import torch, pyrepr
        >>> loss = pyrepr.nn.MatryoshkaLoss([8, 4, 2])
        >>> x = torch.randn(16, 8, requires_grad=True)
        >>> loss(x, torch.randn(16, 8)).backward()
    """

    def __init__(
        self,
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        scale: float = 20.0,
        directions: str | Sequence[str] = ("rows",),
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(dims, (list, tuple, range)):
            raise TypeError(f"dims must be a list of widths, got {shown(dims)}")
        dims = list(dims)
        weights = [1.0] * len(dims) if weights is None else check_weights(weights)
        if not dims or len(set(dims)) != len(dims):
            raise ValueError(f"dims must be different widths, at least one, got {dims}")
        if len(weights) != len(dims):
            raise ValueError(f"weights must be one per dim, {len(dims)}, got {len(weights)}")
        self.dims, self.weights = (list(x) for x in zip(*sorted(zip(dims, weights, strict=True)), strict=True))
        self.scale, self.directions, self.label_smoothing = scale, directions, label_smoothing

    def forward(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
        return info_nce(
            x,
            y,
            self.scale,
            labels=labels,
            directions=self.directions,
            label_smoothing=self.label_smoothing,
            normalize=True,
            prefixes=self.dims,
            weights=self.weights,
        )

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}, scale={self.scale}"
