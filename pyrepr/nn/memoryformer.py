"""Networks of lookup layers: Ding et al. 2024, "MemoryFormer", arXiv 2411.12992."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrepr.nn.lookup import LookupLinear


class LookupQKV(nn.Module):
    """Queries, keys and values of attention by one hash and three tables side by side (rows 3·d wide).

    Args: d, bits, weighting, temperature, table_dtype, sparse as of :class:`LookupLinear`. Shape: [..., d] -> 3 ×
        [..., d].

    Example:
        >>> q, k, v = pyrepr.nn.LookupQKV(64)(torch.randn(2, 10, 64))
        >>> q.shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, d: int, *, bits: int = 8, bias: bool = True, **options) -> None:
        super().__init__()
        self.lookup = LookupLinear(d, 3 * d, bias, bits=bits, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.lookup(x).chunk(3, -1)
        return q, k, v


class MemoryFormerMLP(nn.Module):
    """The paper's feed-forward network: lookup → LayerNorm → lookup with `expand` more bits; no activation.

    K = d/bits tables each; between them (bits + expand)·K features, normalised so that their signs are balanced.

    Args: d, bits, expand (2, as in the paper); others as of :class:`LookupLinear`. Shape: [..., d] -> [..., d].

    Example:
        >>> pyrepr.nn.MemoryFormerMLP(64)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, d: int, *, bits: int = 8, expand: int = 2, **options) -> None:
        super().__init__()
        width = (bits + expand) * (d // bits)
        self.up = LookupLinear(d, width, bits=bits, **options)
        self.norm = nn.LayerNorm(width)
        self.down = LookupLinear(width, d, bits=bits + expand, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): x [..., s, d], its halves as pairs turned by s · θ.

    θ_i = base^(−2i/d), so that products of two vectors depend on the distance of their places.
    """
    s, d = x.shape[-2:]
    speeds = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)  # [d / 2]
    angles = torch.arange(s, device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class MemoryFormerBlock(nn.Module):
    """A transformer block without fully-connected layers: x + attention(norm(x)), then x + MLP(norm(x)).

    Attention's queries, keys and values come from :class:`LookupQKV`; there is no output projection. The norms are
    LayerNorms since their zero mean keeps the hash's bits balanced.

    Args:
        d: width, a multiple of heads and of bits. heads: of attention. bits, expand: see :class:`MemoryFormerMLP`.
        causal: default ``True``, for language models. rotary: turns queries and keys by their place (Su et al. 2021,
            "RoFormer"; d / heads must be even), as the paper's models do. Default ``False``: places are the caller's
            business; but added to the input they change its hash, so that no row is shared by a word's places.
        Others as of :class:`LookupLinear`.

    Shape: [batch, s, d] -> [batch, s, d].

    Example:
        >>> pyrepr.nn.MemoryFormerBlock(64, heads=4)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d: int,
        heads: int,
        *,
        bits: int = 8,
        expand: int = 2,
        causal: bool = True,
        rotary: bool = False,
        **options,
    ) -> None:
        super().__init__()
        if heads < 1 or d % heads:
            raise ValueError(f"d must be a multiple of heads = {heads}, got {d}")
        if rotary and d // heads % 2:
            raise ValueError(f"d must be an even multiple of heads = {heads} with rotary, got {d}")
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv = LookupQKV(d, bits=bits, **options)
        self.mlp = MemoryFormerMLP(d, bits=bits, expand=expand, **options)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(self.attention_norm(x))
        )  # [batch, heads, s, d / heads]
        if self.rotary:
            q, k = rotated(q), rotated(k)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + attended.transpose(-2, -3).flatten(-2)
        return x + self.mlp(self.mlp_norm(x))

    def multiply_adds(self, s: int) -> int:
        """For s tokens: attention's 2·s²·d and a multiply-add for every table entry that is read."""
        layers = (self.qkv.lookup, self.mlp.up, self.mlp.down)
        d = self.mlp.down.out_features
        return 2 * s * s * d + s * sum(a.tables.shape[0] * a.out_features for a in layers)
