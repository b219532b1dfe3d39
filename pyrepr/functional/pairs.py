"""Functions over all pairs of rows that never hold the n × m matrix: nearest neighbours, log-sum-exps, InfoNCE."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_device, check_is_tensor, check_shape, check_tensor, name_of, shape_of, shown
from pyrepr._reporting import progress_bar
from pyrepr.ops import pairs as ops
from pyrepr.ops._leaf import at_hand, derives
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.pairs import METRICS, unit_rows

__all__ = ["info_nce", "pairwise_logsumexp", "pairwise_topk"]

KERNELS = ("dot", "cosine")
DIRECTIONS = ("rows", "columns")

# Largest elements of rows between which products of two rows, and their sums, neither overflow nor vanish.
RANGE = {torch.float32: (1e-12, 1e12), torch.float64: (1e-120, 1e120)}

# A database that is not a tensor is read in blocks of this many bytes: large enough that packing x again for every
# block costs nothing, small beside any model.
BLOCK_BYTES = 64 << 20


def _check_rows(name: str, x: object) -> Tensor:
    x = check_tensor(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [n, d], got {shape_of(x)}")
    return x


def _check_pair(x: object, y: object) -> tuple[Tensor, Tensor]:
    """x [n, d] and y [m, d] of one dtype and device. Under autocast, mixed dtypes become the wider of them."""
    x, y = _check_rows("x", x), _check_rows("y", y)
    check_device("y", y, "x", x)
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"y must have the width of x, {x.shape[1]}, got {y.shape[1]}")
    if y.dtype != x.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"y must have the dtype of x, {name_of(x.dtype)}, got {name_of(y.dtype)}")
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    return x, y


def check_scale(scale: object, x: Tensor, name: str = "scale") -> Tensor:
    """scale as a scalar tensor of the compute dtype on the device of x, positive and finite where that can be seen."""
    dtype = compute_dtype(x.dtype)
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number or a scalar tensor, got {type(scale).__name__}")
    if not isinstance(scale, Tensor):
        if not 0 < scale <= sys.float_info.max:
            raise ValueError(f"{name} must be positive and finite, got {shown(scale)}")
        return torch.full((), float(scale), dtype=dtype, device=x.device)
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f"{name} must be one floating-point number, got {shape_of(scale)} {name_of(scale.dtype)}")
    check_device(name, scale, "x", x)
    _check_values(scale, name, "positive and finite", lambda s: bool((s > 0) & s.isfinite()))
    return scale.reshape(()).to(dtype)


def _check_values(values: Tensor, name: str, expected: str, holds: Any) -> None:
    """A look at numbers: on the CPU and outside of tracing and transforms only, where looking costs next to nothing."""
    if not values.is_cpu or values.is_meta or torch.compiler.is_compiling() or values.numel() == 0:
        return
    plain = values.detach()
    if type(plain) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(plain):
        return
    if not holds(plain):
        shown = f"{plain.item():g}" if plain.numel() == 1 else f"from {plain.min().item()} to {plain.max().item()}"
        raise ValueError(f"{name} must be {expected}, got {shown}")


def _check_labels(labels: object, n: int, m: int, x: Tensor) -> Tensor:
    """The column of every row's positive, [n] int64; the row's own number by default."""
    if labels is None:
        if n > m:
            raise ValueError(f"y must have at least the n rows of x, {n}, when labels are not given, got {m}")
        return torch.arange(n, device=x.device)
    labels = check_tensor("labels", labels, INTEGERS)
    check_shape("labels", labels, "[n]", (n,))
    check_device("labels", labels, "x", x)
    _check_values(labels, "labels", f"from 0 to m - 1 = {m - 1}", lambda v: bool((v >= 0).all() & (v < m).all()))
    return labels.long()


def check_weights(weights: object) -> list[float]:
    """Weights of prefixes as floats. Raises TypeError for anything but numbers."""
    try:
        return [float(w) for w in weights]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"weights must be numbers, one per prefix, got {shown(weights)}") from None


def _check_prefixes(prefixes: Sequence[int] | None, weights: object, d: int) -> tuple[list[int], list[float]]:
    if prefixes is None:
        if weights is not None:
            raise ValueError("weights are those of prefixes, and prefixes is None")
        return [d], [1.0]
    if not isinstance(prefixes, (list, tuple, range)):
        raise TypeError(f"prefixes must be widths as ints, at least one, got {shown(prefixes)}")
    prefixes = list(prefixes)
    if not prefixes or any(isinstance(p, bool) or not isinstance(p, int) for p in prefixes):
        raise TypeError(f"prefixes must be widths as ints, at least one, got {shown(prefixes)}")
    if any(a >= b for a, b in itertools.pairwise(prefixes)) or prefixes[0] < 1 or prefixes[-1] > d:
        raise ValueError(f"prefixes must increase from 1 or more to at most d = {d}, got {shown(prefixes)}")
    if weights is None:
        return prefixes, [1.0] * len(prefixes)
    found = check_weights(weights)
    if len(found) != len(prefixes) or not all(math.isfinite(w) for w in found):
        raise ValueError(f"weights must be {len(prefixes)} finite numbers, one per prefix, got {shown(found)}")
    return prefixes, found


def pairwise_logsumexp(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    *,
    scale: float | Tensor = 1.0,
    kernel: str = "dot",
) -> Tensor:  # [n]
    """log Σ_j exp(scale · k(x_i, y_j)) for every row of x, without the n × m matrix.

    Args:
        x, y: [n, d] and [m, d], one floating dtype and device, any strides.
        scale: a positive number or a scalar tensor, which may require a gradient; 1/temperature. Default 1.
        kernel: ``"dot"`` (default), ⟨x, y⟩, or ``"cosine"``, ⟨x, y⟩ / (|x| |y|), 0 with a zero row.

    Returns:
        [n], float64 for float64 inputs, else float32. −inf where y has no row. Differentiable in x, y and scale, with
        the scores computed again in the backward; second derivatives run on the reference, with n × m memory.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> import torch, pyrepr
        >>> x, y = torch.eye(3), torch.zeros(2, 3)
        >>> pyrepr.functional.pairwise_logsumexp(x, y).exp()
        tensor([2., 2., 2.])
    """
    x, y = _check_pair(x, y)
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be 'dot' or 'cosine', got {shown(kernel)}")
    factor = check_scale(scale, x)
    if kernel == "cosine":
        x, y = _in_range(x), _in_range(y)
    keep = derives(x, y, factor) and ops.keeps_logits(x.shape[0], y.shape[0], x.shape[1])
    r, *_ = ops.logsumexp_op(x, y, factor, None, kernel == "cosine", [x.shape[1]], True, False, keep)
    return r[0]


def info_nce(
    x: Tensor,  # [n, d]
    y: Tensor,  # [m, d]
    scale: float | Tensor = 1.0,
    *,
    labels: Tensor | None = None,  # [n]
    directions: str | Sequence[str] = DIRECTIONS,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    prefixes: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:  # []
    """The contrastive loss InfoNCE (van den Oord et al. 2018, eq. 4; CLIP, Radford et al. 2021) in O((n + m)·d) memory.

    With logits s_ij = scale · ⟨x_i, y_j⟩ and l_i the column of row i's positive, the mean over i of

        rows     −log( e^{s_{i, l_i}} / Σ_j e^{s_ij} )      among all columns
        columns  −log( e^{s_{i, l_i}} / Σ_k e^{s_{k, l_i}} )  among all rows

    and the mean of the directions. The positive's share is taken out of the sum, so that the loss is never negative and
    keeps its digits where it has converged.

    Args:
        x, y: [n, d] and [m, d], one floating dtype and device. y may have more rows than x: hard negatives.
        scale: 1/temperature, a positive number or a scalar tensor, which may require a gradient. Default 1.
        labels: [n] int32 or int64, the row of y that belongs to each row of x; by default its own number. Two rows may
            share a positive.
        directions: ``"rows"``, ``"columns"`` or both (default, as CLIP has it; sentence-transformers' has rows alone).
        label_smoothing: α in [0, 1): the target gives α to all classes evenly (ALIGN has 0.1). Default 0.
        normalize: compare rows by their cosine; a zero row has the cosine 0 with everything. Default ``False``, as
            CLIP's features come normalised.
        prefixes: increasing widths: the loss of the first p features is added up for every p (Matryoshka, Kusupati et
            al. 2022), each prefix normalised anew under `normalize`; one product serves all.
        weights: of the prefixes, by default 1 each.

    Returns:
        Scalar, float64 for float64 inputs, else float32; so are the logits of 16-bit inputs. Differentiable in x, y and
        scale, same bits for any number of threads. Logits are kept for the backward only where they take no more
        memory than x and y; else they are computed again, but on a CPU in ``"rows"`` alone, whose gradient is made
        along with the loss wherever gradients are on (three quarters of the work; held in float32), unless x is
        bfloat16 or there are more than 50 000 logits a row. Second derivatives run on the reference, with
        n × m memory.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came; also for n = 0.

    Example:
        >>> import torch, pyrepr
        >>> x = torch.eye(4)
        >>> round(pyrepr.functional.info_nce(x, x, 10.0).item(), 6)
        0.000136
    """
    x, y = _check_pair(x, y)
    n, d = x.shape
    if n == 0 or y.shape[0] == 0:
        raise ValueError(f"x and y must have at least one row in a loss, got n = {n} and m = {y.shape[0]}")
    listed = isinstance(directions, (list, tuple, set, frozenset))
    chosen = tuple(directions) if listed else (directions,)
    if (
        not chosen
        or not all(isinstance(each, str) for each in chosen)
        or len(set(chosen)) != len(chosen)
        or not set(chosen) <= set(DIRECTIONS)
    ):
        raise ValueError(f"directions must be 'rows', 'columns' or both, got {shown(directions)}")
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {shown(label_smoothing)}")
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be a bool, got {shown(normalize)}")
    widths, factors = _check_prefixes(prefixes, weights, d)
    factor = check_scale(scale, x)
    at = _check_labels(labels, n, y.shape[0], x)
    if normalize:
        x, y = _in_range(x), _in_range(y)
    follows = derives(x, y, factor)
    keep = follows and ops.keeps_logits(n, y.shape[0], d, len(widths))
    rows, columns = "rows" in chosen, "columns" in chosen
    if follows and not keep and not columns and ops.fuses_rows(x, y, len(widths)):
        loss = ops.row_loss_op(x, y, factor, at, normalize, widths, [each / n for each in factors])[0]
    else:
        _, _, row_gaps, column_gaps, _ = ops.logsumexp_op(x, y, factor, at, normalize, widths, rows, columns, keep)
        gaps = [g.mean(1) for g, wanted in ((row_gaps, rows), (column_gaps, columns)) if wanted]
        loss = _weighted(torch.stack(gaps).mean(0), factors)
    if label_smoothing:
        excess = _excess(x, y, factor, at, normalize, widths, rows, columns)
        loss = loss + _weighted(excess, [label_smoothing * each for each in factors])
    return loss


def _weighted(losses: Tensor, weights: list[float]) -> Tensor:
    """The weighted sum of what the prefixes have, [P]."""
    # Not w * losses[p]: of a number and a scalar tensor, PyTorch makes a float64 tangent.
    return (losses * torch.tensor(weights, dtype=losses.dtype, device=losses.device)).sum()


def _in_range(x: Tensor) -> Tensor:
    """Rows whose cosines are those of x [n, d], and whose products stay in range: those that are huge or tiny are
    multiplied by a power of two."""
    if not at_hand(x) or not x.numel() or x.dtype == torch.float16:
        return x
    size = torch.linalg.vector_norm(x.detach(), math.inf, 1, keepdim=True).to(compute_dtype(x.dtype))
    least, most = RANGE[size.dtype]
    wrong = size.isfinite() & (size > 0) & ((size < least) | (size > most))
    if not bool(wrong.any()):
        return x
    exponents = torch.where(wrong, -size.frexp().exponent, 0).clamp(-1000, 1000)
    half = exponents // 2  # 2^128 is no float32
    one = torch.ones_like(size)
    return x * one.ldexp(half).to(x.dtype) * one.ldexp(exponents - half).to(x.dtype)


def _excess(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor,
    normalize: bool,
    prefixes: list[int],
    rows: bool,
    columns: bool,
) -> Tensor:
    """What the positives' logits have over the mean logit of their rows and columns, the mean over all: [P].

    The mean logit of a row is the logit of the mean of y, so that this is O(n·d).
    """
    dtype = compute_dtype(x.dtype)
    found = []
    for p in prefixes:
        a, b = x[:, :p].to(dtype), y[:, :p].to(dtype)
        if normalize:
            a, b = unit_rows(a), unit_rows(b)
        positives = b[labels]
        # Differences of rows before products: large logits that differ little lose nothing.
        excess = [(a * (positives - b.mean(0))).sum(1)] * rows + [(positives * (a - a.mean(0))).sum(1)] * columns
        found.append(scale * torch.stack(excess).mean())
    return torch.stack(found)


def pairwise_topk(
    x: Tensor,  # [n, d]
    y: Tensor | np.ndarray | Iterable[Tensor | np.ndarray] | None = None,  # [m, d], or blocks of it
    k: int = 10,
    *,
    metric: str = "ip",
    exclude_self: bool = False,
    return_logsumexp: bool = False,
    progress: bool = False,
) -> tuple[Tensor, ...]:  # [n, k], [n, k], and [n]
    """The k nearest rows of y for every row of x, exactly, without the n × m matrix.

    Exact means: ranked by the exact score rounded once to float32, whatever the data. On a CPU with 16-bit dot products
    these screen the candidates under a proven bound, and the few that could win are scored again. Equal scores go by
    the smaller index. The same bits for any number of threads, and however y is cut into blocks.

    Args:
        x: [n, d], float32, float64, bfloat16 or float16, any strides.
        y: [m, d] of the same dtype and device; ``None`` means x. Also a NumPy array, which may be memory-mapped
            (``np.load(path, mmap_mode="r")``), or an iterable of blocks [m_b, d] of either kind: then a database larger
            than memory is searched in one pass, a block of 64 MiB at a time.
        k: number of neighbours, at most m; default 10.
        metric: ``"ip"``, largest ⟨x, y⟩ first (default, as in ``torch.topk`` of a product and faiss' ``IndexFlatIP``),
            ``"cosine"``, or ``"sqeuclidean"``, smallest |x − y|² first, in which equal rows have exactly 0.
        exclude_self: leave out the pair (i, i) by its index, so that duplicates of a row stay.
        return_logsumexp: also return log Σ_j e^{score_ij} (of −|x − y|² for ``"sqeuclidean"``), mostly right to
            float32's rounding; no score in it is off by more than a thousandth.
        progress: show a bar over the blocks of a streamed y (needs tqdm).

    Returns:
        values [n, k], float64 for float64 inputs, else float32, and indices [n, k] int64; with `return_logsumexp` also
        [n], which may be NaN where a row is not finite. NaN scores sort last; where fewer than k scores are numbers,
        index −1 and value −inf (inf for ``"sqeuclidean"``). Where x or y requires a gradient, the values have one: they
        are computed again from the k rows, in n·k·d memory; indices and the log-sum-exp have none
        (:func:`pairwise_logsumexp` has).

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.

    Example:
        >>> import torch, pyrepr
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> values, indices = pyrepr.functional.pairwise_topk(x, k=1, metric="sqeuclidean", exclude_self=True)
        >>> indices.flatten().tolist(), values.flatten().tolist()
        ([1, 0, 1], [1.0, 1.0, 4.0])
    """
    x = _check_rows("x", x)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {shown(metric)}")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be a positive int, got {shown(k)}")
    stored = x if y is None else y
    if isinstance(stored, Tensor):
        _, stored = _check_pair(x, stored)
        _check_k(k, stored.shape[0], exclude_self)
        found = ops.topk_op(x.detach(), stored.detach(), k, metric, exclude_self, return_logsumexp, 0, None, None, None)
        if derives(x, stored):
            found = (_values_of(x, stored, found[0], found[1], metric), *found[1:])
    else:
        found = _streamed(x, stored, k, metric, exclude_self, return_logsumexp, progress)
    return tuple(found) if return_logsumexp else tuple(found[:2])


def _check_k(k: int, m: int, exclude_self: bool) -> None:
    others = m - exclude_self
    if k > max(others, 0) and m:
        what = "the rows of y but a row's own" if exclude_self else "the rows of y"
        raise ValueError(f"k must be at most {others}, {what}, got {k}")
    if not m:
        raise ValueError(f"y must have at least k = {k} rows, got none")


def _streamed(
    x: Tensor, y: Any, k: int, metric: str, exclude_self: bool, return_logsumexp: bool, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from blocks of y, which are merged as they come."""
    if derives(x):
        raise ValueError("x must not require a gradient when y is streamed; detach it")
    blocks, total = _blocks(y)
    state: tuple[Tensor | None, ...] = (None, None, None)
    m = 0
    for block in progress_bar(blocks, progress, "searching", "block", total):
        rows = _as_tensor(block, x)
        _check_pair(x, rows)
        values, indices, logsumexp = state
        state = ops.topk_op(x, rows, k, metric, exclude_self, return_logsumexp, m, values, indices, logsumexp)
        m += len(rows)
    _check_k(k, m, exclude_self)
    return state  # type: ignore[return-value]


def _blocks(y: Any) -> tuple[Iterator[Any], int | None]:
    """Blocks of rows and how many there are, if that is known."""
    if not isinstance(y, np.ndarray):
        if isinstance(y, (str, bytes)) or not isinstance(y, Iterable):
            raise TypeError(
                f"y must be a tensor, a NumPy array or an iterable of blocks of rows, got {type(y).__name__}"
            )
        return iter(y), len(y) if hasattr(y, "__len__") else None
    if y.ndim != 2:
        raise ValueError(f"y must have shape [m, d], got {list(y.shape)}")
    step = max(1, BLOCK_BYTES // max(1, y.shape[1] * y.itemsize))
    return (y[i : i + step] for i in range(0, len(y), step)), -(-len(y) // step)


def _as_tensor(block: object, x: Tensor) -> Tensor:
    """A block of y as a tensor on the device of x; a read-only array, as a memory map is, is copied."""
    if isinstance(block, np.ndarray):
        try:
            return torch.from_numpy(block if block.flags.writeable else block.copy()).to(x.device)
        except TypeError as error:
            raise TypeError(f"y must hold floating-point numbers, got dtype {block.dtype}") from error
    return check_is_tensor("every block of y", block).to(x.device)


def _values_of(x: Tensor, y: Tensor, values: Tensor, indices: Tensor, metric: str) -> Tensor:
    """The values again, as a function of x and y that autograd can follow; missing ones stay as they are."""
    dtype = compute_dtype(x.dtype)
    missing = indices < 0
    near = y[indices.clamp_min(0)].to(dtype)  # [n, k, d]
    a = x.to(dtype)
    if metric == "sqeuclidean":
        found = (a[:, None] - near).square().sum(2)
    else:
        if metric == "cosine":
            a, near = unit_rows(a), unit_rows(near.flatten(0, 1)).unflatten(0, indices.shape)
        found = (a[:, None] * near).sum(2)
    return torch.where(missing, values, found)
