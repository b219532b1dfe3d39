"""The contrastive loss of image and text encoders, without the matrix of all pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr._optional import require
from pyrepr.functional import info_nce

PAPER = Paper(
    14,
    "Jia et al., Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision, 2021",
    "(CE(rows) + CE(columns))/2 of cosines / temperature, label smoothing 0.1; CLIP: without smoothing",
    "loss and gradients equal those of transformers' ALIGN, and of CLIP's definition, to 1e-5; twice the batch keeps "
    "twice the memory for the backward, where that of the logits is four times as much",
)
BATCHES = (128, 256, 512)


def clip(logits: Tensor) -> Tensor:
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def kept(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """The loss, its gradients and the bytes that autograd keeps between forward and backward."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(*leaves)
    size = sum(seen.values())
    return value.detach(), list(torch.autograd.grad(value, leaves)), size


def run() -> Finding:
    align = require("transformers.models.align.modeling_align", "transformers").align_loss
    generator = torch.Generator().manual_seed(0)
    temperature, error = torch.tensor(0.07), 0.0
    sizes: dict[str, list[int]] = {"ours": [], "logits": []}
    for n in BATCHES:
        x, y = (F.normalize(torch.randn(n, 32, generator=generator), dim=1) for _ in range(2))
        y = F.normalize(x + y, dim=1)
        for smoothing, peer in ((0.1, align), (0.0, clip)):
            ours = kept(lambda a, b, t, s=smoothing: info_nce(a, b, 1 / t, label_smoothing=s), x, y, temperature)
            theirs = kept(lambda a, b, t, p=peer: p(a @ b.T / t), *(z.double() for z in (x, y, temperature)))
            for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
                error = max(error, float((a - b).norm() / b.norm()))
        sizes["ours"].append(ours[2])
        sizes["logits"].append(theirs[2])
    growth = {name: large / small for name, (*_, small, large) in sizes.items()}
    text = f"relative error at most {error:.1e}; {sizes['ours'][-1] / 2**20:.1f} MiB kept, "
    text += f"{growth['ours']:.2f} times that of half the batch; "
    text += f"{sizes['logits'][-1] / 2**20:.0f} MiB by logits, {growth['logits']:.2f} times"
    holds = error < 1e-5 and growth["ours"] < 2.1 and growth["logits"] > 3
    series = {name: [size / 2**20 for size in kept_sizes] for name, kept_sizes in sizes.items()}
    chart = Chart(series, BATCHES, "batch", "MiB kept for the backward", "lines", log=True, log_x=True)
    return Finding(text, holds, {"error": error, **growth}, chart)
