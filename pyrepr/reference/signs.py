"""Linear maps of signs, in plain PyTorch: what the tables of a layer converted from a linear one are sums of.

Features of z [..., d]: one_bit: sign z_i. two_bit: sign z_i, then sign z_i · sign(|z_i| − 1): four levels cut at 0 and
at ±1. A table of :func:`pyrepr.nn.LookupLinear.from_linear` holds, for every code, the sum of its features' weights;
here the weights stand by themselves, and the sum is a matrix product. Differentiable any number of times; a sign has no
derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.lookup import standardised, without_low_rank


def sign_features(z: Tensor, hash: str = "two_bit") -> Tensor:
    """z [..., d] -> [..., F] of 1 and −1 in the compute dtype, F = d or 2 d. 0 and −0 count as positive; NaN in a row
    makes all of its features NaN."""
    z = z.to(compute_dtype(z.dtype))
    one = torch.ones_like(z)
    sign = torch.where(z >= 0, one, -one)
    if hash == "two_bit":
        sign = torch.stack([sign, torch.where(z.abs() >= 1, sign, -sign)], -1).flatten(-2)
    return torch.where(z.isnan().any(-1, keepdim=True), torch.nan, sign)


def sign_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    hash: str = "two_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    scales: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """bias + (features of z) weightᵀ · scales + (x downᵀ) up, with z = (x − (x downᵀ) down − centre) · scale.

    x: [..., d], weight: [h, F], bias, scales: [h], centre, scale: [d], down: [r, d], up: [r, h] -> [..., h] in x's
    dtype.
    """
    rest, inner = without_low_rank(x, down)
    features = sign_features(standardised(rest, centre, scale), hash)
    out = features @ weight.to(features.dtype).T
    if scales is not None:
        out = out * scales.to(out.dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if inner is not None and up is not None:
        out = out + inner @ up.to(inner.dtype)
    return out.to(x.dtype)


def sign_op(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    hash: str,
) -> Tensor:
    """The leaf op of :func:`sign_linear`: x [T, d] -> [T, h]."""
    parts = {"centre": centre, "scale": scale, "scales": scales, "down": down, "up": up}
    return sign_linear(x, weight, bias, hash=hash, **parts)
