"""Fitting lookup tables to samples of a function, in float64: the mathematics behind ``from_…`` of lookup layers.

The model of y: b + U V x + Σ_k w(z_k) T_k[h(z_k)], z = (x − Vᵀ V x − centre) · scale. First the dense part U V of rank
r for the directions that carry most of the output, then the tables for the rest of x, in one or two steps:

sign-linear: the features of an element are s₁ = sign(z_i), and with two bits also s₁ s₂, s₂ = sign(|z_i| − 1): levels
    cut at 0 and at the standard deviation. A ridge regression on w(z_k) times these gives A, and T_k[c] = Σ_j f_j(c)
    A_{kτ+j} for the features f of code c. For a linear target nothing is lost against free tables, and only as many
    rows as there are features are estimated. With w = 1 Aᵀ is the weight of a ``SignLinear``.
full: what is left of a nonlinear target is fitted by all K·2^τ rows freely, Σ ‖r − Φ T‖² + λ ‖T‖², Φ the weighted
    one-hot matrix. λ shrinks rows that few tokens read towards the sign-linear ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrepr.functional.lookup import lookup_sum, segment_sum
from pyrepr.reference.lookup import HASHES, hash_codes, standardised, weights, without_low_rank

# λ in tokens: the number that must read a row for the data to weigh as much as the sign-linear start.
SHRINKAGE = (1024.0, 256.0, 64.0, 16.0, 4.0, 1.0)
# Jacobi-preconditioned conjugate gradients start from the solution for the λ before, so few steps do.
STEPS = 8


@dataclass(frozen=True)
class Fit:
    """What converting a layer cost: squared error over the variance of its outputs, and bytes."""

    relative_mse: float  # on the calibration data the layer was fitted to
    held_out_mse: float | None  # on calibration data it was not; None if all of it was used
    dense_bytes: int
    table_bytes: int  # of tables, or of a weight of signs; 0 without
    dead_rows: int  # that no calibration row reads
    # In a batch, where gathering rows moves as many bytes as reading the dense weights; NaN where no rows are gathered.
    break_even_tokens: float


@dataclass
class Parts:
    """A fitted layer, float64. With rank 0 down and up are ``None``."""

    weights: Tensor  # [K bits, h], of the features: A
    bias: Tensor  # [h]
    centre: Tensor  # [d]
    scale: Tensor  # [d]
    down: Tensor | None  # [rank, d]
    up: Tensor | None  # [rank, h]
    tables: Tensor | None = None  # [K, 2^bits, h], where they are more than sums of A

    def in_units(self, x: float, y: float) -> Parts:
        """The layer for inputs `x` times as large, and outputs `y` times, as those it was fitted to."""
        up = None if self.up is None else self.up * (y / x)
        tables = None if self.tables is None else self.tables * y
        return Parts(self.weights * y, self.bias * y, self.centre * x, self.scale / x, self.down, up, tables)


def unit(x: Tensor) -> float:
    """The power of two that brings the largest of x near 1: squares of it, in float32 too, are then in range."""
    largest = float(x.abs().amax()) if x.numel() else 0.0
    return math.ldexp(1.0, max(-1000, min(1000, math.frexp(largest)[1])))


def hold_out(count: int) -> Tensor:
    """[count] bool: an eighth of the rows in evenly spread runs, since neighbours (tokens of a sentence) are alike.

    None of fewer than 16: one row has no variance to compare an error with.
    """
    run = max(1, min(64, count // 64))
    return (torch.arange(count, device="cpu") // run % 8 == 7) & (count >= 16)


def relative_mse(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖² over the variance of truth [N, h]; NaN where truth does not vary."""
    y, truth = (each.double() / unit(truth) for each in (y, truth))
    error, variance = (y - truth).square().sum(), (truth - truth.mean(0)).square().sum()
    return float(error / torch.where(variance > 0, variance, torch.nan))


def regression(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The linear map [h, d] that best gives y [N, h] from x [N, d], up to a constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    return _ridge(x, y, ridge).T


def _ridge(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """[d, h] from centred [N, d] and [N, h]; `ridge` is relative to the features' mean square."""
    moments = features.T @ features
    size = moments.diagonal().mean()
    moments.diagonal().add_(ridge * torch.where(size > 0, size, 1))
    return torch.linalg.solve(moments, features.T @ targets)


def output_directions(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """Orthonormal rows [rank, d] spanning what the `rank` principal components of W x [N, h] read of x [N, d]."""
    y = (x - x.mean(0)) @ weight.T
    _, vectors = torch.linalg.eigh(y.T @ y)
    read = vectors[:, -rank:].T @ weight  # [rank, d]
    _, _, rows = torch.linalg.svd(read, full_matrices=False)
    return rows


def features_of_codes(bits: int, hash: str, like: Tensor) -> Tensor:
    """[2^bits, bits]: what code c says of its elements, as the signs that a linear target is a sum of."""
    codes = torch.arange(1 << bits, device=like.device)[:, None] >> torch.arange(bits, device=like.device)
    signs = 2.0 * (codes & 1).to(like) - 1
    if HASHES[hash] == 2:
        signs[:, 1::2] *= signs[:, ::2]
    return signs


def tables_of(weights: Tensor, bits: int, hash: str) -> Tensor:
    """[K, 2^bits, h] from weights of features [K bits, h]: for every code the sum of its features' weights."""
    signs = features_of_codes(bits, hash, weights)
    return torch.einsum("ci,kih->kch", signs, weights.unflatten(0, (-1, bits)))


def of_linear(linear: nn.Linear, x: Tensor, **options: Any) -> tuple[Parts, float]:
    """The parts for a linear layer with inputs x [N, d], and their error; `options` as of :func:`sign_linear`."""
    weight = linear.weight.double()
    x = x.to(weight.device, torch.float64)
    y = functional.linear(x, weight, None if linear.bias is None else linear.bias.double())
    units = unit(x), unit(y)
    near, y, weight = x / units[0], y / units[1], weight * (units[0] / units[1])
    parts, left = sign_linear(near, y, weight, **options)
    return parts.in_units(*units), relative_mse(y - left, y)


def sign_linear(
    x: Tensor, y: Tensor, weight: Tensor, *, bits: int, weighting: str, hash: str, rank: int, ridge: float
) -> tuple[Parts, Tensor]:
    """Dense part and weights of features for x [N, d], y [N, h], and what is left of y; `weight` [h, d] is its linear
    part. Without weights of chunks (``"none"``) `bits` changes nothing."""
    down = up = None
    least = 1e-6 * x.std(0, correction=0).max()  # what a full rank leaves is the products' rounding
    if rank:
        down = output_directions(weight, x, rank)
        up = down @ weight.T
        x, inner = without_low_rank(x, down)
        y = y - inner @ up
    deviation, centre = x.std(0, correction=0), x.mean(0)
    # Elements that hardly vary are 0, whatever comes later: no table magnifies roundings.
    scale = torch.where(deviation > least, 1 / deviation, 0)
    z = standardised(x, centre, scale)
    signs, codes = features_of_codes(bits, hash, z), hash_codes(z, bits, hash)
    features = (weights(z, bits, weighting, hash=hash)[..., None] * signs[codes]).flatten(-2)  # [N, K bits]
    constant, mean = features.mean(0), y.mean(0)
    features = features - constant
    a = _ridge(features, y - mean, ridge)  # [K bits, h]
    return Parts(a, mean - constant @ a, centre, scale, down, up), y - mean - features @ a


def outputs(parts: Parts, tables: Tensor, rows: Rows, x: Tensor) -> Tensor:
    """The fitted layer with these tables on x [N, d], whose Φ is `rows`: [N, h]."""
    out = rows.apply(tables.float()) + parts.bias
    return out if parts.down is None or parts.up is None else out + x @ parts.down.T @ parts.up


class Rows:
    """The weighted one-hot matrix Φ of some tokens, as its products: Φ T is a lookup, Φᵀ r a segment sum; float32."""

    def __init__(self, parts: Parts, x: Tensor, bits: int, weighting: str, hash: str) -> None:
        z = standardised(without_low_rank(x, parts.down)[0], parts.centre, parts.scale)
        self.rows, self.codes = 1 << bits, hash_codes(z, bits, hash)  # [N, K]
        self.weights = weights(z, bits, weighting, hash=hash).float()

    def apply(self, tables: Tensor) -> Tensor:  # [K, 2^bits, h] -> [N, h]
        return lookup_sum(self.codes, self.weights, tables)

    def adjoint(self, values: Tensor) -> Tensor:  # [N, h] -> [K, 2^bits, h]
        return segment_sum(values, self.codes, self.rows, weights=self.weights)

    def squares(self) -> Tensor:  # [K, 2^bits, 1]
        ones = torch.ones(len(self.codes), 1, dtype=self.weights.dtype, device=self.codes.device)
        return segment_sum(ones, self.codes, self.rows, weights=self.weights.square())


def _solve(rows: Rows, tables: Tensor, residual: Tensor, penalty: float, squares: Tensor) -> tuple[Tensor, Tensor]:
    """A few preconditioned conjugate-gradient steps for every column at once, from `tables` with its residual on."""
    inverse = 1 / (squares + penalty)
    descent = rows.adjoint(residual) - penalty * tables
    step = inverse * descent
    size = (descent * step).sum((0, 1))  # [h]
    for _ in range(STEPS):
        image = rows.apply(step)
        curvature = image.square().sum(0) + penalty * step.square().sum((0, 1))
        length = torch.where(curvature > 0, size / curvature, 0)
        tables, residual = tables + length * step, residual - length * image
        descent = rows.adjoint(residual) - penalty * tables
        conditioned = inverse * descent
        size, before = (descent * conditioned).sum((0, 1)), size
        step = conditioned + torch.where(before > 0, size / before, 0) * step
    return tables, residual


def with_full_tables(
    parts: Parts, x: Tensor, residual: Tensor, unseen: Tensor, truth: Tensor, bits: int, weighting: str, hash: str
) -> Parts:
    """`parts` with tables that also explain `residual` [N, h] of x [N, d], for the λ of :data:`SHRINKAGE` that serves
    the held-out `unseen` and `truth` best; unchanged if none serves them."""
    fitted, held = (Rows(parts, t, bits, weighting, hash) for t in (x, unseen))
    start = tables_of(parts.weights, bits, hash)
    residual, held_residual = residual.float(), (truth - outputs(parts, start, held, unseen)).float()
    squares, typical = fitted.squares(), float(fitted.weights.square().mean())
    if not typical:
        return parts  # no table has a weight
    best, least = start, float(held_residual.square().sum())
    added = torch.zeros_like(start, dtype=torch.float32)
    for tokens in SHRINKAGE:
        added, residual = _solve(fitted, added, residual, tokens * typical, squares)
        error = float((held_residual - held.apply(added)).square().sum())
        if not error < least:
            break
        best, least = start + added, error
    return replace(parts, tables=best)


def dense_map(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight [h, d] and bias [h] of the linear map that best gives y [N, h] from x [N, d]."""
    weight = regression(x, y, ridge)
    return weight, y.mean(0) - weight @ x.mean(0)


def beside_tables(
    x: Tensor, y: Tensor, unseen: Tensor, truth: Tensor, *, bits: int, weighting: str, hash: str, ridge: float
) -> tuple[Tensor, Tensor, Parts]:
    """A dense map (weight, bias) and the tables that hash x [N, d] beside it, for y [N, h]: the map, the sign-linear
    tables for what it leaves, the map again for what those leave, then full tables."""
    options = {"bits": bits, "weighting": weighting, "hash": hash}
    weight, bias = dense_map(x, y, ridge)
    for _ in range(2):
        rest = y - x @ weight.T - bias
        parts, left = sign_linear(x, rest, weight, rank=0, ridge=ridge, **options)
        weight, bias = dense_map(x, y - (rest - left), ridge)
    left = y - x @ weight.T - bias - (rest - left)
    return weight, bias, with_full_tables(parts, x, left, unseen, truth - unseen @ weight.T - bias, **options)


def strongest_neurons(x: Tensor, hidden: Tensor, out: Tensor, count: int, ridge: float) -> Tensor:
    """Numbers, ascending, of the neurons whose part of the output no linear map of x [N, d] has: those with the largest
    variance of what a regression leaves of hidden [N, n], times the square of what they write, out [h, n]."""
    weight, bias = dense_map(x, hidden, ridge)
    strength = (hidden - x @ weight.T - bias).var(0) * out.square().sum(0)
    return strength.topk(count).indices.sort().values


def _spread(x: Tensor) -> Tensor:
    """Standard deviations [d] of x [N, d]; of what varies by roundings alone its size, of zeros 1."""
    spread, size = x.std(0), x.abs().amax(0)
    return torch.where(spread > 1e-12 * size, spread, torch.where(size > 0, size, 1))


def beside_neurons(x: Tensor, hidden: Tensor, y: Tensor, out: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and what neurons hidden [N, n] write [h, n] so that together they give y [N, h]; the ridge pulls
    towards what they wrote in the network, `out` [h, n], which is right where all of them are here."""
    sizes = [_spread(part) for part in (x, hidden)]
    features = torch.cat([part / size for part, size in zip((x, hidden), sizes, strict=True)], 1)
    change, bias = dense_map(features, y - hidden @ out.T, ridge)
    weight, written = change.split([x.shape[1], hidden.shape[1]], 1)
    return weight / sizes[0], bias, out + written / sizes[1]
