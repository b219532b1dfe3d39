"""Soft codes: rows looked up in a codebook by distance, bags of codes, tokens gathered into clusters and spread again.

Plain PyTorch in blocks of rows: the matrix of all rows × codes is never in memory, forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyrepr._checks import check_device, check_tensor, shape_of, shown
from pyrepr.ops._leaf import require_finite
from pyrepr.reference._dtypes import compute_dtype

BLOCK_BYTES = 32 << 20  # of rows × codes
POOLS = ("max", "mean", "none")
NORMS = ("l1", "l2")


def _checked(x: object, codebook: object, name: str = "codebook") -> tuple[Tensor, Tensor]:
    """x [..., d] and codes [C, d] in the dtype of computation, around the mean code: distances keep their digits."""
    x, codebook = check_tensor("x", x), check_tensor(name, codebook)
    if codebook.dim() != 2 or not len(codebook) or x.dim() < 1 or x.shape[-1] != codebook.shape[1]:
        width = x.shape[-1] if x.dim() else 0
        raise ValueError(f"{name} must have shape [C, d] with C ≥ 1 and the d of x, {width}, got {shape_of(codebook)}")
    check_device(name, codebook, "x", x)
    require_finite(name, codebook)  # every row is compared with all codes
    dtype = compute_dtype(torch.promote_types(x.dtype, codebook.dtype))
    x, codebook = x.to(dtype), codebook.to(dtype)
    centre = codebook.detach().mean(0)
    return x - centre, codebook - centre


def check_positive(name: str, value: object) -> None:
    """Raises ValueError for anything but a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, got {shown(value)}")


def _scores(x: Tensor, codes: Tensor) -> Tensor:
    """−|x − c|² + |x|² [..., C]: what a softmax over codes and the order of codes need of the distances."""
    return 2 * x @ codes.T - codes.square().sum(1)


def _in_blocks(function: Callable[..., Tensor], rows: Tensor, codes: int, *others: Tensor) -> Tensor:
    """function(block of rows, *others), concatenated; blocks are computed again in the backward, not kept."""
    step = max(1, BLOCK_BYTES // (rows.element_size() * codes))
    parts = []
    for block in rows.split(step) if len(rows) else [rows]:
        kept = torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *others))
        parts.append(checkpoint(function, block, *others, use_reentrant=False) if kept else function(block, *others))
    return torch.cat(parts)


def soft_lookup(x: Tensor, codebook: Tensor, temperature: float, values: Tensor | None = None) -> Tensor:
    """Σ_c softmax_c(−|x − c|² / temperature) values_c: the soft version of the nearest code.

    Args:
        x: [..., d].
        codebook: [C, d].
        temperature: T > 0; towards 0 it is the nearest code's value.
        values: [C, h]; ``None``: the codes themselves.

    Returns:
        [..., h], float64 for float64 inputs, else float32; differentiable in x, codebook and values. A row of x that is
        not finite gives NaN, the others do not notice.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; also for a codebook or
            values that are not finite, which all rows would get.

    Example:
        >>> x, codebook = torch.randn(5, 4), torch.randn(16, 4)
        >>> pyrepr.functional.soft_lookup(x, codebook, 0.5).shape
        torch.Size([5, 4])
    """
    check_positive("temperature", temperature)
    rows, codes = _checked(x, codebook)
    values = check_tensor("values", codebook if values is None else values)
    if values.dim() != 2 or len(values) != len(codes):
        raise ValueError(f"values must have shape [C, h] with C = {len(codes)}, got {shape_of(values)}")
    require_finite("values", values)  # every row gets some of all values

    def look_up(block: Tensor, codes: Tensor, values: Tensor) -> Tensor:
        # One attention head; of −|x − c|² the query's own term is the same for all keys.
        bias = -codes.square().sum(1) / temperature
        return F.scaled_dot_product_attention(
            block[None], codes[None], values[None], attn_mask=bias.expand(len(block), -1), scale=2 / temperature
        )[0]

    found = _in_blocks(look_up, rows.reshape(-1, rows.shape[-1]), len(codes), codes, values.to(rows.dtype))
    return found.reshape(*rows.shape[:-1], values.shape[1])


def bag_of_codes(
    x: Tensor, codebook: Tensor, inv_delta: float = 15.0, pool: str = "max", *, mean_distance: float | None = None
) -> Tensor:
    """Bags of soft codes (Gidaris et al. 2021, OBoW): softmax_c(−δ |x − c|²) pooled over positions, rows of sum 1.

    Args:
        x: [B, T, d], T positions (borders cropped by the caller).
        codebook: [C, d].
        inv_delta: δ = inv_delta / mean_distance.
        pool: over positions: ``"max"`` (default), ``"mean"``, or ``"none"``, which returns the codes [B, T, C].
        mean_distance: mean smallest squared distance; by default that of this x (in training: a running mean).

    Returns:
        [B, C], float64 for float64 inputs, else float32; differentiable. With a given `mean_distance`, an entry of the
        batch that is not finite gives NaN, and the others do not notice.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; also for a codebook
            that is not finite, and without `mean_distance` for such an x.

    Example:
        >>> pyrepr.functional.bag_of_codes(torch.randn(2, 9, 4), torch.randn(16, 4)).shape
        torch.Size([2, 16])
    """
    check_positive("inv_delta", inv_delta)
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {shown(pool)}")
    if mean_distance is not None:
        check_positive("mean_distance", mean_distance)
    x = check_tensor("x", x)
    if x.dim() != 3 or not x.numel():
        raise ValueError(f"x must have shape [B, T, d] with no empty axis, got {shape_of(x)}")
    rows, codes = _checked(x, codebook)
    if mean_distance is None:
        mean_distance = float(_smallest(rows.detach().flatten(0, 1), codes.detach()).mean())
    if not math.isfinite(mean_distance):
        raise ValueError("x and codebook must be finite, got NaN or infinity")
    delta = inv_delta / mean_distance if mean_distance > 0 else float("inf")
    if delta == float("inf"):
        raise ValueError("mean_distance must be positive, but every position of x is a code")

    def pooled(block: Tensor, codes: Tensor) -> Tensor:
        soft = (delta * _scores(block, codes)).softmax(-1)
        if pool == "none":
            return soft
        bag = soft.amax(1) if pool == "max" else soft.mean(1)
        return bag / bag.sum(1, keepdim=True)

    return _in_blocks(pooled, rows, x.shape[1] * len(codes), codes)


def _smallest(rows: Tensor, codes: Tensor) -> Tensor:
    """Smallest squared distance of every row, [n], by its coordinates: 0 for a row that is a code."""
    at = nearest_codes(rows, codes, 1)[:, 0]
    return (rows - codes[at]).square().sum(1)


def nearest_codes(rows: Tensor, codes: Tensor, k: int) -> Tensor:
    """The k nearest codes of every row, nearest first. [n, d], [C, d] -> [n, k] int64"""
    with torch.no_grad():
        return _in_blocks(lambda block: _scores(block, codes).topk(k, dim=1).indices, rows, len(codes))


class Clusters(NamedTuple):
    """Tokens gathered into clusters.

    Example:
        >>> image = torch.randn(1, 64, 8)
        >>> pyrepr.functional.cluster_tokens(image.reshape(1, 8, 8, 8), (4, 4)).centres.shape[-1]
        8
    """

    centres: Tensor  # [B, h·w, d]
    labels: Tensor  # [B, H·W] int64, the nearest centre of every token


def cluster_tokens(
    x: Tensor, size: tuple[int, int], *, steps: int = 5, window: int = 7, temperature: float | None = None
) -> Clusters:
    """Tokens on a grid gathered into h × w clusters, without parameters (Liang et al. 2022, Expedit).

    Centres start as averages over cells of the grid; each step is one of soft k-means, in which a token belongs to the
    centres of the window × window cells around its own by softmax(−temperature · |x − c|²). The labels then are the
    nearest of all centres.

    Args:
        x: [B, H, W, d].
        size: (h, w), at most (H, W).
        steps: of k-means.
        window: an odd number of cells.
        temperature: multiplies the squared distance, as in the released code; by default 1 / the mean squared distance
            of a token to the average of its cell.

    Returns:
        :class:`Clusters`; centres are float64 for float64 inputs, else float32, and differentiable.

    Example:
        >>> pyrepr.functional.cluster_tokens(torch.randn(1, 8, 8, 4), (4, 4)).centres.shape[-1]
        4
    """
    x = check_tensor("x", x)
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x must have shape [B, H, W, d] with no empty axis, got {shape_of(x)}")
    high, wide = x.shape[1:3]
    h, w = size
    if not (1 <= h <= high and 1 <= w <= wide):
        raise ValueError(f"size must be from (1, 1) to the grid's ({high}, {wide}), got {size}")
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {shown(steps)}")
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd positive integer, got {shown(window)}")
    if temperature is not None:
        check_positive("temperature", temperature)
    require_finite("x", x)  # labels would be numbers all the same
    x = x.to(compute_dtype(x.dtype))
    cells = _cells(high, h, x.device)[:, None] * w + _cells(wide, w, x.device)  # [H, W] the cell of every token
    row, column = (torch.arange(h * w, device=x.device) // w, torch.arange(h * w, device=x.device) % w)
    reach = window // 2
    near = ((row[:, None] - row).abs() <= reach) & ((column[:, None] - column).abs() <= reach)  # [h·w, h·w]
    found = [_clusters_of(tokens.flatten(0, 1), cells.flatten(), near, steps, temperature) for tokens in x]
    return Clusters(torch.stack([c for c, _ in found]), torch.stack([labels for _, labels in found]))


def _cells(length: int, parts: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) * parts // length


def _clusters_of(
    tokens: Tensor, cells: Tensor, near: Tensor, steps: int, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Centres [C, d] and labels [N] of one grid's tokens [N, d]."""
    shift = tokens.detach().mean(0)
    tokens = tokens - shift
    counts = cells.bincount(minlength=len(near)).to(tokens.dtype)[:, None]
    centres = torch.zeros(len(near), tokens.shape[1], dtype=tokens.dtype, device=tokens.device)
    centres = centres.index_add(0, cells, tokens) / counts
    if temperature is None:
        spread = (tokens - centres[cells]).detach().square().sum(1).mean()
        temperature = float(1 / spread) if spread > 0 else 1.0
    step = max(1, BLOCK_BYTES // (tokens.element_size() * len(near)))

    def sums(block: Tensor, at: Tensor, centres: Tensor) -> Tensor:
        """Σ weight · token and Σ weight of every centre, [C, d + 1]."""
        soft = (temperature * _scores(block, centres)).masked_fill(~near[at], -torch.inf).softmax(1)
        return torch.cat([soft.T @ block, soft.sum(0)[:, None]], 1)

    for _ in range(steps):
        total = torch.zeros(len(near), tokens.shape[1] + 1, dtype=tokens.dtype, device=tokens.device)
        for block, at in zip(tokens.split(step), cells.split(step), strict=True):
            if torch.is_grad_enabled() and tokens.requires_grad:
                total = total + checkpoint(sums, block, at, centres, use_reentrant=False)
            else:
                total = total + sums(block, at, centres)
        weight = total[:, -1:]
        centres = torch.where(weight > 0, total[:, :-1] / torch.where(weight > 0, weight, 1), centres)
    return centres + shift, nearest_codes(tokens.detach(), centres.detach(), 1)[:, 0]


def unpool_tokens(
    processed: Tensor, x: Tensor, centres: Tensor, k: int = 3, norm: str = "l1", *, temperature: float = 0.05
) -> Tensor:
    """Spreads what was computed of clusters over the tokens again: Σ over the k nearest centres of w_c processed_c.

    w ∝ exp(−temperature · |x − c|²), divided by their sum, or, ``norm="l2"`` as in the released code, by the root of
    the sum of their squares: then they add up to as much as √k, which a layer norm behind it hides.

    Args:
        processed: [B, C, h], what became of the centres.
        x: [B, N, d] tokens before clustering.
        centres: [B, C, d] centres before processing.
        k: nearest centres; exactly k, where the released code takes all that tie with the last.
        norm: ``"l1"`` (default) or ``"l2"``.
        temperature: multiplies the squared distance.

    Returns:
        [B, N, h], float64 for float64 inputs, else float32; differentiable in all three.

    Example:
        >>> x, centres = torch.randn(1, 20, 4), torch.randn(1, 6, 4)
        >>> pyrepr.functional.unpool_tokens(torch.randn(1, 6, 8), x, centres).shape
        torch.Size([1, 20, 8])
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be 'l1' or 'l2', got {shown(norm)}")
    check_positive("temperature", temperature)
    processed, x, centres = (check_tensor(n, t) for n, t in (("processed", processed), ("x", x), ("centres", centres)))
    if x.dim() != 3 or centres.dim() != 3 or processed.dim() != 3:
        shapes = ", ".join(map(shape_of, (processed, x, centres)))
        raise ValueError(f"processed, x and centres must have shapes [B, C, h], [B, N, d] and [B, C, d], got {shapes}")
    if centres.shape[::2] != x.shape[::2] or processed.shape[:2] != centres.shape[:2]:
        raise ValueError(
            f"centres must have the B and d of x, {shape_of(x)}, and processed the B and C of centres, got "
            f"{shape_of(centres)} and {shape_of(processed)}"
        )
    if not isinstance(k, int) or not 1 <= k <= centres.shape[1]:
        raise ValueError(f"k must be an integer from 1 to the number of centres, {centres.shape[1]}, got {shown(k)}")
    found = []
    for one, tokens, codes in zip(processed, x, centres, strict=True):
        rows, codes = _checked(tokens, codes, "centres")
        at = nearest_codes(rows.detach(), codes.detach(), k)  # [N, k]
        distance = (rows[:, None] - codes[at]).square().sum(2)
        weights = (-temperature * (distance - distance.detach().amin(1, keepdim=True))).exp()
        weights = weights / (weights.sum(1, keepdim=True) if norm == "l1" else weights.norm(dim=1, keepdim=True))
        found.append(F.embedding_bag(at, one.to(rows.dtype), mode="sum", per_sample_weights=weights))
    return torch.stack(found)
