"""GPU cases of family `pairs`: the leaf ops, since every public function of the family is made of them.

Peers: plain torch with all logits, `open_clip`'s loss, torch `mm` + `topk`, and faiss on a GPU, where they are there.
A peer that searches gives values and indices, and its error is the share of neighbours that are not float64's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyrepr.benchmarks.gpu import GpuCase, Problem
from pyrepr.benchmarks.harness import module_error, relative_error
from torch import Tensor

from pyrepr.ops import pairs as ops
from pyrepr.reference import pairs as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Four times the worst error of the same cases in the interpreter; of gradients the largest entry is the unit.
VALUE = {F32: 2e-5, BF16: 2e-5, F16: 2e-5}
GRADIENT = {F32: 2e-5, BF16: 2e-2, F16: 4e-3}
EXACT = {F32: 0.0, BF16: 0.0, F16: 0.0}
CHECKED = 256  # rows of a large problem that are compared with float64


def embeddings(device: torch.device, dtype: torch.dtype, seed: int, n: int, m: int, d: int) -> tuple[Tensor, Tensor]:
    """x and y whose first rows belong together."""
    generator = torch.Generator(device).manual_seed(seed)
    x, y = (torch.randn(rows, d, generator=generator, device=device) for rows in (n, m))
    y[: min(n, m)] += x[: min(n, m)]
    return x.to(dtype), y.to(dtype)


def mean_of_gaps(x: Tensor, y: Tensor, scale: Tensor, labels: Tensor, prefixes: list[int]) -> tuple[Tensor, ...]:
    """InfoNCE of both directions, and its gradients, as the autograd of the public function runs the leaf ops."""
    keep = ops.keeps_logits(len(x), len(y), x.shape[1], len(prefixes))
    r, c, row_gaps, column_gaps, kept = ops.logsumexp_op(x, y, scale, labels, True, prefixes, True, True, keep)
    share = torch.full_like(row_gaps, 0.5 / row_gaps.shape[1])
    weights = ops.softmax_weights(labels, r, c, row_gaps, column_gaps, 0 * r, 0 * c, share, share)
    gradients = ops.logsumexp_backward_op(x, y, scale, labels, True, prefixes, r, c, kept, *weights)
    return ((row_gaps + column_gaps) * share).sum(), *gradients


def plain(x: Tensor, y: Tensor, scale: Tensor, prefixes: Sequence[int]) -> Tensor:
    """The same loss with all logits."""
    labels, total = torch.arange(len(x), device=x.device), x.new_zeros((), dtype=scale.dtype)
    for p in prefixes:
        logits = scale * (reference.unit_rows(x[:, :p]) @ reference.unit_rows(y[:, :p]).T).to(scale.dtype)
        total = total + 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[: len(x)], labels))
    return total


def _step(loss: Callable[..., Tensor], x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, y, scale)]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def contrastive(n: int, d: int, prefixes: Sequence[int] | None = None) -> Callable[..., Problem]:
    """Loss and gradients of n pairs."""
    cut = list(prefixes or [d])

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, y = embeddings(device, dtype, seed, n, n, d)
        scale, labels = torch.tensor(20.0, device=device), torch.arange(n, device=device)
        peers: dict[str, Callable[[], Any]] = {
            "plain torch": lambda: _step(lambda *leaves: plain(*leaves, cut), x, y, scale),
        }
        if cut == [d] and not module_error("open_clip", "open_clip_torch"):
            loss = importlib.import_module("open_clip").ClipLoss()
            peers["open_clip"] = lambda: _step(
                lambda a, b, s: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), s.to(dtype)).to(F32), x, y, scale
            )
        return Problem(
            lambda: mean_of_gaps(x, y, scale, labels, cut),
            lambda: _step(lambda *leaves: plain(*leaves, cut), x.double(), y.double(), scale.double()),
            peers,
            flops=10.0 * n * n * d,
            bytes=4 * n * d * x.element_size(),
        )

    return make


def worst(result: Any, truth: Any) -> float:
    return max(relative_error(a, b) for a, b in zip(result, truth, strict=True))


def search(n: int, m: int, d: int, k: int, metric: str = "ip", exclude: bool = False) -> Callable[..., Problem]:
    """The k nearest of m rows for n queries."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, y = embeddings(device, dtype, seed, n, m, d)
        asked = (k, metric, exclude, False, 0, None, None, None)

        def mm() -> tuple[Tensor, Tensor]:
            return (x @ y.T).topk(k, 1)

        peers: dict[str, Callable[[], Any]] = {"torch mm + topk": mm} if metric == "ip" and not exclude else {}
        if metric == "ip" and device.type == "cuda" and hasattr(_faiss(), "GpuIndexFlatIP"):
            faiss = _faiss()
            index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), d)
            index.add(y.float().cpu().numpy())
            queries = x.float().cpu().numpy()
            peers["faiss on a GPU"] = lambda: tuple(torch.from_numpy(t).to(device) for t in index.search(queries, k))
        return Problem(
            lambda: ops.topk_op(x, y, *asked)[:2],
            lambda: reference.pairs_topk(x[:CHECKED].double(), y.double(), *asked)[:2],
            peers,
            flops=2.0 * n * m * d,
            bytes=(n + m) * d * x.element_size() + n * k * 12,
        )

    return make


def _faiss() -> Any:
    return None if module_error("faiss", "faiss-gpu") else importlib.import_module("faiss")


def missed(result: Any, truth: Any) -> float:
    """The share of places in which another neighbour stands than float64's; of equal scores either will do."""
    values, indices = (t[: len(truth[0])] for t in result)
    same = (indices == truth[1]) | (values.double() == truth[0].to(values.dtype).double())
    return float((~same).double().mean())


def cases() -> list[GpuCase]:
    found = [
        GpuCase("info_nce", "n=70 d=64", contrastive(70, 64), GRADIENT, sanitize=True, graph=True, error=worst),
        GpuCase("info_nce", "n=300 d=50", contrastive(300, 50), GRADIENT, error=worst),
        GpuCase(
            "info_nce prefixes",
            "n=40 d=130",
            contrastive(40, 130, (5, 64, 100)),
            GRADIENT,
            sanitize=True,
            graph=True,
            error=worst,
        ),
        GpuCase(
            "top-k", "n=20 m=210 d=70 k=10", search(20, 210, 70, 10), EXACT, sanitize=True, graph=True, error=missed
        ),
    ]
    for metric in reference.METRICS:
        for k in (1, 40, 130):
            shape = f"{metric} n=50 m=500 d=96 k={k}"
            found.append(GpuCase("top-k", shape, search(50, 500, 96, k, metric, k > 1), EXACT, error=missed))
    both = (F32, BF16)
    for n, d in ((8192, 512), (32768, 1024)):
        make = contrastive(n, d)
        shape = f"n={n} d={d}"
        found.append(GpuCase("info_nce", shape, make, GRADIENT, timed=True, timed_dtypes=both, error=worst))
    nested = contrastive(2048, 768, (64, 128, 256, 512, 768))
    found.append(
        GpuCase("info_nce prefixes", "n=2048 d=768", nested, GRADIENT, timed=True, timed_dtypes=both, error=worst)
    )
    for n, m, d, k in ((20000, 20000, 384, 10), (16, 1000000, 384, 10), (20000, 20000, 384, 100)):
        shape = f"n={n} m={m} d={d} k={k}"
        found.append(GpuCase("top-k", shape, search(n, m, d, k), EXACT, timed=True, timed_dtypes=both, error=missed))
    return found
