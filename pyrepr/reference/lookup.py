"""Family `lookup` in plain PyTorch: differentiable, any device, float64 for float64 inputs.

Ding et al. 2024, "MemoryFormer: Minimize Transformer Computation by Removing Fully-Connected Layers", arXiv 2411.12992.
x [..., d] is cut into K chunks z_k, one for each table of 2^`bits` rows; y = bias + Σ_k w(z_k) · tables[k, h(z_k)].

one_bit: chunks of `bits` elements, h(z) = Σ_i [z_i ≥ 0] 2^i.
two_bit: chunks of `bits` / 2, h(z) = Σ_i ([z_i ≥ 0] + 2 [|z_i| ≥ 1]) 4^i: sign, and whether z_i is large. Four levels
    cut at 0 and at the standard deviation lose .117 of a normal variable's variance, two lose 1 − 2/π = .363 (Max 1960,
    "Quantizing for minimum distortion").

A code has no derivative (and no straight-through one): between its jumps the gradient with respect to x flows through
the weight w only. A converted layer hashes z = (x − centre) · scale, or with a low-rank part what that leaves of x.

The second half are the reference implementations of the leaf ops in pyrepr/ops/lookup.py: the derivatives written out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrepr.reference._dtypes import compute_dtype

WEIGHTINGS = ("probability", "scaled", "l1", "none")

# Kinds of hash, and the bits they make of an element.
HASHES = {"one_bit": 1, "two_bit": 2}

# Columns of a tile of packed tables.
TILE = 64


def pack(tables: Tensor) -> Tensor:
    """tables [K, n, h] -> [h / 64, K, n, 64]: the columns that one thread works on at a time stand together."""
    k, n, h = tables.shape
    return tables.reshape(k, n, h // TILE, TILE).permute(2, 0, 1, 3).contiguous()


def unpack(tables: Tensor) -> Tensor:
    """The inverse of :func:`pack`."""
    tiles, k, n, _ = tables.shape
    return tables.permute(1, 2, 0, 3).reshape(k, n, tiles * TILE)


def sizes(tables: Tensor) -> tuple[int, int, int]:
    """(K, n, h) of plain tables [K, n, h] or packed ones."""
    shape = tables.shape
    return (shape[1], shape[2], shape[0] * TILE) if len(shape) == 4 else (shape[0], shape[1], shape[2])


def standardised(x: Tensor, centre: Tensor | None, scale: Tensor | None) -> Tensor:
    """(x − centre) · scale in the compute dtype; x itself where they are left out.

    In this order every rounding is the same with and without fused multiply-adds, and a sign is never a rounding's.
    """
    if centre is None or scale is None:
        return x
    dtype = compute_dtype(x.dtype)
    return (x.to(dtype) - centre.to(dtype)) * scale.to(dtype)


def without_low_rank(x: Tensor, down: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [..., d] less what the low-rank part reads of it, and that: x − inner · down and inner = x · downᵀ [..., r]."""
    if down is None:
        return x, None
    x = x.to(compute_dtype(x.dtype))
    down = down.to(x.dtype)
    inner = x @ down.T
    return x - inner @ down, inner


def chunks(x: Tensor, bits: int, hash: str = "one_bit") -> Tensor:
    """x [..., d] -> [..., K, elements of a chunk]."""
    size = bits // HASHES[hash]
    return x.unflatten(-1, (x.shape[-1] // size, size))


def hash_codes(z: Tensor, bits: int, hash: str = "one_bit") -> Tensor:
    """h of every chunk: z [..., d] -> [..., K] int32. 0 and −0 count as positive, NaN as negative and small."""
    z = chunks(z, bits, hash)
    found = (z >= 0)[..., None] if hash == "one_bit" else torch.stack([z >= 0, z.abs() >= 1], -1)
    powers = torch.tensor([1 << i for i in range(bits)], dtype=torch.int32, device=z.device)
    return (found.flatten(-2) * powers).sum(-1, dtype=torch.int32)


def weights(
    z: Tensor, bits: int, weighting: str = "probability", temperature: float = 1.0, hash: str = "one_bit"
) -> Tensor:
    """w of every chunk: z [..., d] -> [..., K] float32, float64 for float64.

    probability: p = Π_i σ(2|z_i|/t); scaled: p · Σ_i |z_i|; l1: the mean of |z_i|; none: 1. NaN anywhere in a chunk
        gives NaN.
    """
    z = chunks(z.to(compute_dtype(z.dtype)), bits, hash)
    if weighting == "none":
        return torch.where(z.isnan().any(-1), torch.nan, torch.ones_like(z[..., 0]))
    size = z.abs().sum(-1)
    if weighting == "l1":
        return size / z.shape[-1]
    p = torch.sigmoid(2 * z.abs() / temperature).prod(-1)
    return p * size if weighting == "scaled" else p


def _check_codes(codes: Tensor, n: int) -> None:
    if codes.numel() and not bool(((codes >= 0) & (codes < n)).all()):
        raise IndexError(f"codes must be from 0 to n - 1 = {n - 1}, got {int(codes.min())} to {int(codes.max())}")


def lookup_sum(
    codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None = None, check: bool = True
) -> Tensor:
    """Σ_k weights[..., k] · tables[k, codes[..., k]]; codes, weights: [..., K], tables: [K, n, h] -> [..., h].

    `scales` [K, n] multiplies the rows of integer tables. `check`: look at the codes first, which vmap cannot.
    """
    if check:
        _check_codes(codes, tables.shape[1])
    k = torch.arange(tables.shape[0], device=tables.device)
    rows = tables[k, codes.long()].to(weights.dtype)  # [..., K, h]
    if scales is not None:
        weights = weights * scales[k, codes.long()].to(weights.dtype)
    return (weights[..., None] * rows).sum(-2)


def segment_sum(values: Tensor, codes: Tensor, n: int, weights: Tensor | None = None, check: bool = True) -> Tensor:
    """Adjoint of :func:`lookup_sum` in the tables: out[k, c] = Σ over rows with codes[..., k] = c of weights · values.

    values: [..., h], codes, weights: [..., K] -> [K, n, h].
    """
    if check:
        _check_codes(codes, n)
    tokens, count = math.prod(values.shape[:-1]), codes.shape[-1]
    values = values.to(compute_dtype(values.dtype)).reshape(tokens, 1, values.shape[-1])
    rows = (codes.long() + n * torch.arange(count, device=codes.device)).reshape(-1)  # [T K]
    if weights is not None:
        values = values * weights.to(values.dtype).reshape(tokens, count, 1)
    values = values.expand(-1, count, -1)
    flat = values.new_zeros(count * n, values.shape[-1]).index_add(0, rows, values.flatten(0, 1))
    return flat.unflatten(0, (count, n))


def lookup_linear(
    x: Tensor,
    tables: Tensor,
    bias: Tensor | None = None,
    *,
    weighting: str = "probability",
    temperature: float = 1.0,
    scales: Tensor | None = None,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """bias + Σ_k w(z_k) tables[k, h(z_k)] + (x downᵀ) up, with z = (x − (x downᵀ) down − centre) · scale.

    x: [..., d], tables: [K, 2^bits, h], bias: [h], centre, scale: [d], down: [r, d], up: [r, h] -> [..., h] in x's
    dtype.
    """
    tables = unpack(tables) if tables.dim() == 4 else tables
    bits = tables.shape[1].bit_length() - 1
    rest, inner = without_low_rank(x, down)
    z = standardised(rest, centre, scale)
    w = weights(z, bits, weighting, temperature, hash)
    out = lookup_sum(hash_codes(z, bits, hash), w, tables, scales, check=False)
    if bias is not None:
        out = out + bias.to(out.dtype)
    if inner is not None and up is not None:
        out = out + inner @ up.to(inner.dtype)
    return out.to(x.dtype)


# The leaf ops of pyrepr/ops/lookup.py, same arguments, same results. Tokens are flattened: x [T, d], codes [T, K].


def hash_op(
    x: Tensor,
    bits: int,
    weighting: str,
    temperature: float,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [T, K] int32 and weights [T, K]."""
    z = standardised(x, centre, scale)
    return hash_codes(z, bits, hash), weights(z, bits, weighting, temperature, hash).contiguous()


def linear_op(
    x: Tensor,
    tables: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    weighting: str,
    temperature: float,
    route: int,
    sparse: bool = False,
    hash: str = "one_bit",
) -> Tensor:
    """The leaf op of :func:`lookup_linear` without its last four arguments; `route` and `sparse` mean nothing here."""
    return lookup_linear(x, tables, bias, weighting=weighting, temperature=temperature, scales=scales, hash=hash)


def converted_op(
    x: Tensor,
    tables: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    weighting: str,
    temperature: float,
    route: int,
    sparse: bool = False,
    hash: str = "one_bit",
) -> Tensor:
    """The leaf op of :func:`lookup_linear` with all its arguments."""
    options = {"weighting": weighting, "temperature": temperature, "scales": scales, "hash": hash}
    return lookup_linear(x, tables, bias, **options, centre=centre, scale=scale, down=down, up=up)


def sum_op(
    codes: Tensor,
    weights: Tensor,
    tables: Tensor,
    scales: Tensor | None,
    route: int,
    sparse: bool = False,
    check: bool = True,
) -> Tensor:
    """The leaf op of :func:`lookup_sum`; `route` and `sparse` mean nothing here."""
    tables = unpack(tables) if tables.dim() == 4 else tables
    return lookup_sum(codes, weights, tables, scales, check)


def segments_op(values: Tensor, codes: Tensor, weights: Tensor, n: int, check: bool = True) -> Tensor:
    """The leaf op of :func:`segment_sum`."""
    return segment_sum(values, codes, n, weights, check)


def backward_op(
    grad: Tensor,
    codes: Tensor,
    weights: Tensor,
    tables: Tensor | None,
    scales: Tensor | None,
    n: int,
    rows: Tensor | None,
    want_segments: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Both derivatives of :func:`sum_op`, each empty where it is not wanted.

    Segments [K n, h], or only those of the sorted row numbers `rows` [R]: Σ weights · grad by code, in `dtype`
    (default: the dtype of weights, in which they are summed up). Dots [T, K], if there are tables:
    ⟨grad[t], tables[k, codes[t, k]]⟩.
    """
    grad = grad.to(weights.dtype)
    segments, dots = weights.new_empty(0, grad.shape[1]), weights.new_empty(0)
    if want_segments:
        segments = segment_sum(grad, codes, n, weights).flatten(0, 1)
        segments = segments if rows is None else segments[rows]
    if tables is not None:
        k = torch.arange(tables.shape[0], device=tables.device)
        dots = (tables[k, codes.long()].to(grad.dtype) * grad[:, None]).sum(-1)
        if scales is not None:
            dots = dots * scales[k, codes.long()].to(dots.dtype)
    return segments.to(dtype or segments.dtype), dots


def hash_backward_op(
    x: Tensor,
    grad_weights: Tensor,
    bits: int,
    weighting: str,
    temperature: float,
    hash: str = "one_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """grad_weights [T, K] · ∂w/∂x, [T, d] in the dtype of x."""
    z = chunks(standardised(x.to(grad_weights.dtype), centre, scale), bits, hash)
    sign, size = z.sign(), z.abs().sum(-1, keepdim=True)
    p = torch.sigmoid(2 * z.abs() / temperature).prod(-1, keepdim=True)
    other = (2 / temperature) * torch.sigmoid(-2 * z.abs() / temperature)  # ∂ log p / ∂|z_i|
    slope = {
        "probability": p * other,
        "scaled": p * (1 + size * other),
        "l1": torch.full_like(z, 1 / z.shape[-1]),
        "none": torch.zeros_like(z),
    }[weighting]
    grad = (grad_weights[..., None] * sign * slope).flatten(-2)
    return (grad if scale is None else grad * scale.to(grad.dtype)).to(x.dtype)
