"""A layer that reads a large table of values by keys that are learnt: product-key memory.

Lample et al. 2019, "Large Memory Layers with Product Keys", arXiv 1907.05242; Berges et al. 2024, "Memory Layers at
Scale", arXiv 2412.09764.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrepr._checks import check_tensor, shape_of, shown
from pyrepr.functional.pairs import pairwise_topk
from pyrepr.nn._sizes import check_sizes
from pyrepr.ops._differentiable import transformed


class ProductKeyMemory(nn.Module):
    """The k values whose keys fit a query best, added up by a softmax of how well they fit.

    A query q = norm(W x) of each head is cut into halves q₁ and q₂. Slot (i, j) of n² has the key (c_i, c'_j), so that
    its score ⟨q₁, c_i⟩ + ⟨q₂, c'_j⟩ is among the k best only if both terms are among the k best of their n: 2n products
    and k² sums find the k best of n² exactly (Lample et al. 2019, section 3.2). Heads have keys of their own and share
    the values. Work grows with n, parameters with n² · h: that is what the layer is for.

    Args:
        in_features: d. out_features: h; by default d.
        keys: n of each half; the memory has n² slots. Default 128, 16 384 slots.
        k: values a head reads. Default 32, as in both papers. heads: 4, as there.
        key_dim: of a head's query, even; by default the even number next to d / 2, as in the first paper.
        gate: multiplies what was read by silu(W₁ x) and maps it by W₂ (Berges et al. 2024, section 3.2). Default
            ``False``, the first paper's.
        sparse: gradients of the values as a sparse tensor of those that were read, for ``torch.optim.SparseAdam``.
            Dense ones are the default since they work with every optimizer.
        device, dtype: of all parameters.

    Shape:
        x: [..., d] -> [..., h] in the dtype of x. NaN in a token makes its result NaN.

    Attributes:
        keys: [heads, 2, n, key_dim / 2]. values: ``nn.EmbeddingBag``, whose weight [n², h] has slot (i, j) in row
            i · n + j. query: ``nn.Linear``; norm:
            ``nn.LayerNorm`` over a head's query, not the batch norm of the first paper: it needs no other tokens, in
            training or in use, and keeps scores in range as well. gate_in, gate_out: ``nn.Linear`` or ``None``.

    First derivatives in reverse; more, and forward mode, under ``torch.func`` or with dual numbers, in
    [T, heads · k, h] memory. A second ``backward`` is an error. Choosing has no derivative: the result jumps where the
    k best change. The values want a larger learning rate than the rest: a row learns from few tokens.

    Raises:
        TypeError, ValueError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> memory = pyrepr.nn.ProductKeyMemory(64, keys=32, k=8)
        >>> memory(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    gate_in: nn.Linear | None
    gate_out: nn.Linear | None

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        keys: int = 128,
        k: int = 32,
        heads: int = 4,
        key_dim: int | None = None,
        gate: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features)
        out_features = in_features if out_features is None else out_features
        key_dim = max(2, in_features // 4 * 2) if key_dim is None else key_dim
        check_sizes(out_features=out_features, keys=keys, k=k, heads=heads, key_dim=key_dim)
        if key_dim % 2:
            raise ValueError(f"key_dim must be even, for it is cut in halves, got {key_dim}")
        if k > keys:
            raise ValueError(f"k must be at most keys = {keys}, got {k}")
        for name, flag in (("gate", gate), ("sparse", sparse)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {shown(flag)}")
        options = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.k, self.heads = (
            in_features,
            out_features,
            k,
            heads,
        )
        self.query = nn.Linear(in_features, heads * key_dim, **options)
        self.norm = nn.LayerNorm(key_dim, **options)
        self.keys = nn.Parameter(torch.empty(heads, 2, keys, key_dim // 2, **options))
        # torch's module, since DistributedDataParallel asks it, and no other, whether gradients are sparse.
        self.values = nn.EmbeddingBag(keys * keys, out_features, mode="sum", sparse=sparse, **options)
        self.gate_in = nn.Linear(in_features, out_features, **options) if gate else None
        self.gate_out = nn.Linear(out_features, out_features, **options) if gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys uniform within ±1/√(key_dim / 2), values N(0, 1 / h), as in the released code."""
        for module in (self.query, self.norm, self.gate_in, self.gate_out):
            if module is not None:
                module.reset_parameters()
        bound = 1 / math.sqrt(self.keys.shape[-1])
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values.weight, std=1 / math.sqrt(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        x = check_tensor("x", x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have a last axis of in_features = {self.in_features}, got shape {shape_of(x)}")
        if x.device != self.keys.device:
            raise ValueError(f"x must be on the memory's device, {self.keys.device}, got {x.device}")
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        out = self._read(*self.slots(rows)).to(x.dtype)
        if self.gate_in is not None and self.gate_out is not None:
            out = self.gate_out(out * functional.silu(self.gate_in(rows))).to(x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def slots(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which values the tokens x [T, d] read, and their weights: [T, heads, k] int64 and [T, heads, k]; a head's add
        up to 1, the largest first."""
        queries = self.norm(self.query(x).unflatten(-1, (self.heads, -1)))  # [T, heads, key_dim]
        found = [self._best(query, keys) for query, keys in zip(queries.unbind(1), self.keys, strict=True)]
        rows, scores = (torch.stack(part, 1) for part in zip(*found, strict=True))
        return rows, scores.softmax(-1)

    def _best(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The k best slots for query [T, key_dim] and keys [2, n, key_dim / 2], and their scores: [T, k] each."""
        halves = query.unflatten(-1, (2, -1)).unbind(1)
        (first, i), (second, j) = (pairwise_topk(q, c, self.k) for q, c in zip(halves, keys, strict=True))
        sums = (first[:, :, None] + second[:, None, :]).flatten(1)  # [T, k · k]
        # Of a token that is not a number no slot is found, −1: any will do, for its weights are not numbers either.
        slots = (i[:, :, None] * keys.shape[1] + j[:, None, :]).flatten(1).clamp_min(0)
        scores, at = sums.topk(self.k, dim=1)
        return slots.gather(1, at), scores

    def _read(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Σ weights · values[rows]: [T, heads, k] -> [T, h]."""
        values = self.values.weight
        rows, weights = rows.flatten(1), weights.flatten(1).to(values.dtype)
        if transformed():
            return (weights[..., None] * values[rows]).sum(1)
        return self.values(rows, per_sample_weights=weights)

    def extra_repr(self) -> str:
        _, _, n, half = self.keys.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, keys={n}, k={self.k}, "
            f"heads={self.heads}, key_dim={2 * half}"
        )
