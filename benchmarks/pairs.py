"""Cases of family `pairs`. Peers: plain torch, faiss, scikit-learn, open_clip's loss, sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyrepr.benchmarks.harness import Case, Workload, module_error
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import pyrepr
from pyrepr.functional import info_nce, pairwise_topk

SAMPLED = 256  # queries whose neighbours are checked against float64


def _rows(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Unit rows around common directions, as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(64, d, generator=generator)[torch.randint(0, 64, (n,), generator=generator)]
    return functional.normalize(common + 1.5 * torch.randn(n, d, generator=generator)).to(dtype)


# Top-k


def torch_topk(x: Tensor, y: Tensor, k: int, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """mm + topk in blocks of rows, whose scores stay in memory of a sensible size."""
    parts = [(block @ y.T).topk(k, 1) for block in x.split(rows)]
    return torch.cat([p.values for p in parts]).float(), torch.cat([p.indices for p in parts])


def _topk_peers(x: Tensor, y: Tensor, k: int) -> dict[str, Callable]:
    """What one would take instead. On one thread, those that keep to PyTorch's number of threads."""
    half = x.bfloat16(), y.bfloat16()
    peers: dict[str, Callable] = {
        "torch mm + topk": lambda: torch_topk(x, y, k),
        "torch mm + topk, bf16": lambda: torch_topk(*half, k),
    }
    if not module_error("faiss", "faiss-cpu"):
        import faiss

        index = faiss.IndexFlatIP(x.shape[1])
        index.add(y.numpy())

        def search() -> tuple[Tensor, Tensor]:
            faiss.omp_set_num_threads(torch.get_num_threads())
            values, indices = index.search(x.numpy(), k)
            return torch.from_numpy(values), torch.from_numpy(indices)

        peers["faiss IndexFlatIP"] = search
    if torch.get_num_threads() == 1:
        return peers
    if not module_error("sentence_transformers", "sentence-transformers"):
        from sentence_transformers.util import semantic_search

        def search_sentences() -> tuple[Tensor, Tensor]:
            found = semantic_search(x, y, top_k=k)
            table = torch.tensor([[(hit["score"], hit["corpus_id"]) for hit in hits] for hits in found])
            return table[..., 0], table[..., 1].long()

        peers["semantic_search"] = search_sentences
    if not module_error("sklearn", "scikit-learn"):
        from sklearn.neighbors import NearestNeighbors

        tree = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y.numpy())

        def neighbours() -> tuple[Tensor, Tensor]:
            distances, indices = tree.kneighbors(x.numpy())
            return 1 - torch.from_numpy(distances).square() / 2, torch.from_numpy(indices)  # of unit rows

        peers["scikit-learn brute"] = neighbours
    return peers


def _topk(n: int, m: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> Workload:
    """The error is that of the scores of the neighbours found, in float64, relative to the true neighbours'."""
    x, y = _rows(n, d, dtype), _rows(m, d, dtype, 1)
    peers = _topk_peers(x, y, k) if dtype == torch.float32 else {"torch mm + topk, bf16": lambda: torch_topk(x, y, k)}

    def found(result: tuple[Tensor, Tensor]) -> Tensor:
        near = y[result[1][:SAMPLED]].double()
        return (x[:SAMPLED, None].double() * near).sum(2).sort(1, descending=True).values

    return Workload(
        {"pyrepr": lambda: pairwise_topk(x, y, k), **peers},
        truth=lambda: (x[:SAMPLED].double() @ y.double().T).topk(k, 1).values,
        result=found,
        tolerance=1e-6,
        flops=2 * n * m * d,
        data="unit rows around 64 directions",
    )


# InfoNCE


def plain_info_nce(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """CLIP's loss as one writes it: one matrix of logits, two cross entropies."""
    logits = scale * x @ y.T
    at = torch.arange(len(x))
    return (functional.cross_entropy(logits, at) + functional.cross_entropy(logits.T, at)) / 2


def clip_info_nce(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """The same as open_clip computes it: both matrices of logits."""
    at = torch.arange(len(x))
    images, texts = scale * x @ y.T, scale * y @ x.T
    return (functional.cross_entropy(images, at) + functional.cross_entropy(texts, at)) / 2


def checkpointed_info_nce(x: Tensor, y: Tensor, scale: float, rows: int = 1024) -> Tensor:
    """In blocks of rows that are computed again in the backward, both directions: memory n · rows."""

    def block(a: Tensor, b: Tensor, start: int) -> Tensor:
        at = torch.arange(start, start + len(a))
        return functional.cross_entropy(scale * a @ b.T, at, reduction="sum")

    total = x.new_zeros(())
    for a, b in ((x, y), (y, x)):
        for i in range(0, len(a), rows):
            total = total + checkpoint(block, a[i : i + rows], b, i, use_reentrant=False)
    return total / (2 * len(x))


def _gradients(loss: Callable, x: Tensor, y: Tensor, scale: float) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [t.clone().requires_grad_() for t in (x, y)]

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves, scale)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return step


def _ranking(model_loss: nn.Module) -> Callable:
    return lambda x, y, scale: model_loss.compute_loss_from_embeddings([x, y], None)


def _contrastive(n: int, d: int, dtype: torch.dtype = torch.float32) -> Workload:
    x, y, scale = _rows(n, d, dtype), _rows(n, d, dtype, 1), 20.0
    peers = {"plain torch": plain_info_nce, "open_clip's": clip_info_nce}
    if dtype == torch.float32:
        peers["checkpointed chunks"] = checkpointed_info_nce
    name = "pyrepr" if dtype == torch.float32 else "pyrepr, bf16"
    ours = {name: _gradients(info_nce, x, y, scale)}
    return Workload(
        {**ours, **{key: _gradients(loss, x, y, scale) for key, loss in peers.items()}},
        truth=_gradients(plain_info_nce, x.double(), y.double(), scale),
        tolerance=1e-4 if dtype == torch.float32 else 5e-3,
        flops=8 * n * n * d,
        data="unit rows around 64 directions",
    )


def _one_direction(n: int, d: int) -> Workload:
    """Against sentence-transformers' loss, which normalises and has the rows' direction alone."""
    x, y, scale = _rows(n, d), _rows(n, d, seed=1), 20.0

    def own(x: Tensor, y: Tensor, scale: float) -> Tensor:
        return info_nce(x, y, scale, directions="rows", normalize=True)

    def plain(x: Tensor, y: Tensor, scale: float) -> Tensor:
        logits = scale * functional.normalize(x) @ functional.normalize(y).T
        return functional.cross_entropy(logits, torch.arange(len(x)))

    peers = {"plain torch": plain}
    if not module_error("sentence_transformers", "sentence-transformers"):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        peers["MultipleNegativesRankingLoss"] = _ranking(MultipleNegativesRankingLoss(None, scale=scale))
    return Workload(
        {"pyrepr": _gradients(own, x, y, scale), **{k: _gradients(f, x, y, scale) for k, f in peers.items()}},
        truth=_gradients(plain, x.double(), y.double(), scale),
        tolerance=1e-4,
        flops=6 * n * n * d,
        data="unit rows around 64 directions",
    )


def _matryoshka(n: int, dims: list[int]) -> Workload:
    x, y, scale = _rows(n, dims[0]), _rows(n, dims[0], seed=1), 20.0

    def plain(x: Tensor, y: Tensor, scale: float) -> Tensor:
        at = torch.arange(len(x))
        cut = [(functional.normalize(x[:, :p]), functional.normalize(y[:, :p])) for p in dims]
        return sum(functional.cross_entropy(scale * a @ b.T, at) for a, b in cut)

    def own(x: Tensor, y: Tensor, scale: float) -> Tensor:
        return pyrepr.nn.MatryoshkaLoss(dims, scale=scale)(x, y)

    peers = {"plain torch": plain}
    if not module_error("sentence_transformers", "sentence-transformers"):
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        single = MultipleNegativesRankingLoss(None, scale=scale)

        def theirs(x: Tensor, y: Tensor, scale: float) -> Tensor:
            cut = [[functional.normalize(t[:, :p]) for t in (x, y)] for p in dims]
            return sum(single.compute_loss_from_embeddings(pair, None) for pair in cut)

        peers["sentence-transformers"] = theirs
    return Workload(
        {"pyrepr": _gradients(own, x, y, scale), **{k: _gradients(f, x, y, scale) for k, f in peers.items()}},
        truth=_gradients(plain, x.double(), y.double(), scale),
        tolerance=1e-4,
        flops=6 * n * n * dims[0],
        data="unit rows around 64 directions",
    )


def cases() -> list[Case]:
    """What `pyrepr bench pairs` runs."""
    dims = [768, 512, 256, 128, 64]
    both, step = "InfoNCE forward+backward", "InfoNCE, rows, forward+backward"
    return [
        Case("top-k", "n=m=4096 d=384 k=10", lambda: _topk(4096, 4096, 384, 10), quick=True),
        Case("top-k", "n=m=20000 d=384 k=10", lambda: _topk(20_000, 20_000, 384, 10)),
        Case("top-k, one thread", "n=4000 m=20000 d=384 k=10", lambda: _topk(4000, 20_000, 384, 10), threads=1),
        Case("top-k, bf16", "n=m=8192 d=384 k=10", lambda: _topk(8192, 8192, 384, 10, torch.bfloat16)),
        Case(both, "n=m=2048 d=512", lambda: _contrastive(2048, 512), quick=True),
        Case(both, "n=m=8192 d=512", lambda: _contrastive(8192, 512)),
        Case(f"{both}, bf16", "n=m=8192 d=512", lambda: _contrastive(8192, 512, torch.bfloat16)),
        Case(step, "n=m=4096 d=512", lambda: _one_direction(4096, 512)),
        Case(step, "n=m=8192 d=512", lambda: _one_direction(8192, 512)),
        Case("Matryoshka forward+backward", "n=2048 d=768…64", lambda: _matryoshka(2048, dims), quick=True),
    ]
