"""Fitting lookup tables to samples of a function, in float64: the mathematics behind ``LookupLinear.from_…``.

The model of y: b + U V x + Σ_k w(z_k) T_k[h(z_k)], z = (x − Vᵀ V x) · scale + shift. First the dense part U V of rank r
for the directions that carry most of the output, then the tables for the rest of x, in one or two steps:

sign-linear: with features w(z_k)·sign(z_i) a ridge regression gives A [d, h], and T_k[c] = Σ_i s_i(c) A_{kτ+i}. For a
    linear target nothing is lost against free tables, and only d·h numbers are estimated.
full: what is left of a nonlinear target is fitted by all K·2^τ rows freely, Σ ‖r − Φ T‖² + λ ‖T‖², Φ the weighted
    one-hot matrix. λ shrinks rows that few tokens read towards the sign-linear ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrepr.functional.lookup import lookup_sum, segment_sum
from pyrepr.reference.lookup import hash_codes, weights

# λ in tokens: the number that must read a row for the data to weigh as much as the sign-linear start.
SHRINKAGE = (1024.0, 256.0, 64.0, 16.0, 4.0, 1.0)
# Jacobi-preconditioned conjugate gradients start from the solution for the λ before, so few steps do.
STEPS = 8


@dataclass
class Parts:
    """A fitted layer, float64. With rank 0 down and up are ``None``."""

    tables: Tensor  # [K, 2^bits, h]
    bias: Tensor  # [h]
    shift: Tensor  # [d]
    scale: Tensor  # [d]
    down: Tensor | None  # [rank, d]
    up: Tensor | None  # [h, rank]


def hold_out(count: int) -> Tensor:
    """[count] bool: an eighth of the rows in evenly spread runs, since neighbours (tokens of a sentence) are alike.

    None of fewer than 16: one row has no variance to compare an error with.
    """
    run = max(1, min(64, count // 64))
    return (torch.arange(count, device="cpu") // run % 8 == 7) & (count >= 16)


def relative_mse(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖² over the variance of truth [N, h]; NaN where truth does not vary."""
    truth = truth.double()
    error, variance = (y.double() - truth).square().sum(), (truth - truth.mean(0)).square().sum()
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


def sign_linear(
    x: Tensor, y: Tensor, weight: Tensor, *, bits: int, weighting: str, rank: int, ridge: float
) -> tuple[Parts, Tensor]:
    """Dense part and sign-linear tables for x [N, d], y [N, h], and what is left of y; `weight` [h, d] is its linear
    part."""
    down = up = None
    if rank:
        down = output_directions(weight, x, rank)
        up = weight @ down.T
        inner = x @ down.T
        x, y = x - inner @ down, y - inner @ up.T
    deviation = x.std(0, correction=0)
    scale = 1 / torch.where(deviation > 1e-6 * deviation.max(), deviation, 1)
    shift = -x.mean(0) * scale
    z = x * scale + shift
    features = weights(z, bits, weighting).repeat_interleave(bits, -1) * torch.where(z >= 0, 1.0, -1.0).to(z)
    centre, mean = features.mean(0), y.mean(0)
    features = features - centre
    a = _ridge(features, y - mean, ridge)  # [d, h]
    corner = torch.arange(1 << bits, device=x.device)[:, None] >> torch.arange(bits, device=x.device)
    signs = 2.0 * (corner & 1).to(a) - 1  # [2^bits, bits]
    tables = torch.einsum("ci,kih->kch", signs, a.unflatten(0, (-1, bits)))
    return Parts(tables, mean - centre @ a, shift, scale, down, up), y - mean - features @ a


def outputs(parts: Parts, rows: Rows, x: Tensor) -> Tensor:
    """The fitted layer on x [N, d], whose Φ is `rows`: [N, h]."""
    out = rows.apply(parts.tables.float()) + parts.bias
    return out if parts.down is None or parts.up is None else out + x @ parts.down.T @ parts.up.T


class Rows:
    """The weighted one-hot matrix Φ of some tokens, as its products: Φ T is a lookup, Φᵀ r a segment sum; float32."""

    def __init__(self, parts: Parts, x: Tensor, bits: int, weighting: str) -> None:
        rest = x if parts.down is None else x - x @ parts.down.T @ parts.down
        z = rest * parts.scale + parts.shift
        self.rows = 1 << bits
        self.codes, self.weights = hash_codes(z, bits), weights(z, bits, weighting).float()  # [N, K]

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
    parts: Parts, x: Tensor, residual: Tensor, unseen: Tensor, truth: Tensor, bits: int, weighting: str
) -> Parts:
    """`parts` with tables that also explain `residual` [N, h] of x [N, d], for the λ of :data:`SHRINKAGE` that serves
    the held-out `unseen` and `truth` best; unchanged if none serves them."""
    fitted, held = (Rows(parts, t, bits, weighting) for t in (x, unseen))
    residual, held_residual = residual.float(), (truth - outputs(parts, held, unseen)).float()
    squares, unit = fitted.squares(), float(fitted.weights.square().mean())
    best, least = parts.tables, float(held_residual.square().sum())
    added = torch.zeros_like(parts.tables, dtype=torch.float32)
    for tokens in SHRINKAGE:
        added, residual = _solve(fitted, added, residual, tokens * unit, squares)
        error = float((held_residual - held.apply(added)).square().sum())
        if not error < least:
            break
        best, least = parts.tables + added, error
    return replace(parts, tables=best)
