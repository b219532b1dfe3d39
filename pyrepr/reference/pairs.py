"""Family `pairs` in plain PyTorch, with the whole n × m matrix of scores.

Logits are s_ij = scale · ⟨x_i, y_j⟩, or scale times the cosine under `normalize`, of the first `p` features for every p
of `prefixes`; each prefix is normalised anew, and a vector of zeros has the cosine 0 with everything. Row i may have a
positive, column labels[i]. With r_i = log Σ_j e^{s_ij} and c_j = log Σ_i e^{s_ij}, InfoNCE is made of the gaps

    r_i − s_{i, labels[i]}    and    c_{labels[i]} − s_{i, labels[i]},

which are never negative. The positive's share is taken out of the sum,
gap = log(1 + Σ_{j ≠ label} e^{s_ij − s_i,label}), so that a gap of 1e-10 has as many digits as one of 1.

Arithmetic is in float32, or float64 for float64 inputs: call with float64 tensors for the truth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrepr.reference._dtypes import compute_dtype

METRICS = ("ip", "cosine", "sqeuclidean")


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their norms; a row of zeros stays zero, and has a derivative of zero. x: [n, d]."""
    zero = (x == 0).all(1, keepdim=True)
    x = torch.where(zero, x.detach(), x) / _largest(x)  # whose squares are in range
    return x / torch.where(zero, 1, torch.where(zero, 1, x).norm(dim=1, keepdim=True))


def _largest(x: Tensor) -> Tensor:
    """The largest size in each row, 1 in a row of zeros; a constant. x: [n, d] -> [n, 1]."""
    if not x.shape[1]:
        return x.new_ones(len(x), 1)
    size = x.detach().abs().amax(1, keepdim=True)
    return torch.where(size == 0, 1, size)


def logits(x: Tensor, y: Tensor, scale: Tensor | float, normalize: bool, prefixes: list[int]) -> Tensor:
    """scale · ⟨x_i, y_j⟩ (or cosine) of every prefix. x: [n, d], y: [m, d] -> [P, n, m], differentiable."""
    found = []
    for p in prefixes:
        a, b = x[:, :p], y[:, :p]
        found.append(scale * ((unit_rows(a) @ unit_rows(b).T) if normalize else a @ b.T))
    return torch.stack(found)


def pairs_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    normalize: bool,
    prefixes: list[int],
    rows: bool,
    columns: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """r [P, n], c [P, m], the gaps of rows and columns [P, n] each, and the logits [P, n, m]; see `ops.pairs`."""
    dtype = compute_dtype(x.dtype)
    s = logits(x.to(dtype), y.to(dtype), scale.to(dtype), normalize, prefixes)
    none = (len(prefixes), 0)  # a tensor for each: what an op returns must not be one tensor twice
    r = s.logsumexp(2) if rows else s.new_empty(none)
    c = s.logsumexp(1) if columns else s.new_empty(none)
    row_gaps, column_gaps = s.new_empty(none), s.new_empty(none)
    if labels is not None:
        positive = s.gather(2, labels.expand(len(prefixes), -1)[:, :, None])  # [P, n, 1]
        if rows:
            own = labels[:, None] == torch.arange(y.shape[0], device=y.device)
            row_gaps = _gaps(s - positive, own)
        if columns:  # of the column of row i's positive: [P, i, n]
            own = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
            column_gaps = _gaps(s[:, :, labels].transpose(1, 2) - positive, own)
    return r, c, row_gaps, column_gaps, s if keep else s.new_empty(0)


def _gaps(above: Tensor, own: Tensor) -> Tensor:
    """log(1 + Σ_j e^above) over the entries that are not a row's own. above: [P, n, m], own: [n, m] -> [P, n]."""
    if above.shape[2] == 1:
        return above[:, :, 0]
    others = above.masked_fill(own, -math.inf).logsumexp(2)
    # log(1 + e^others): the second derivative of torch.logaddexp is no number where one of the two is far larger.
    return torch.nn.functional.softplus(others, threshold=50)


def pairs_logsumexp_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    normalize: bool,
    prefixes: list[int],
    r: Tensor,
    c: Tensor,
    kept: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    positive_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and dscale of Σ_p Σ_ij dS_ij s_ij for the dS of `ops.pairs`."""
    dtype = compute_dtype(x.dtype)
    a, b, factor = (t.to(dtype) for t in (x, y, scale))
    s = logits(a, b, factor, normalize, prefixes)
    ds = torch.zeros_like(s)
    if r.numel():
        ds += row_weights[:, :, None] * (s - r[:, :, None]).exp()
    if c.numel():
        ds += column_weights[:, None, :] * (s - c[:, None, :]).exp()
    if labels is not None and positive_weights is not None:
        ds.scatter_(2, labels.expand(len(prefixes), -1)[:, :, None], positive_weights[:, :, None])
    dx, dy, dscale = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(factor)
    for p, d in zip(prefixes, ds, strict=True):
        left, right = (unit_rows(t[:, :p]) if normalize else t[:, :p] for t in (a, b))
        dscale += (d * (left @ right.T)).sum()
        for t, unit, grad, total in ((a, left, d @ right, dx), (b, right, d.T @ left, dy)):
            total[:, :p] += factor * (_unit_rows_backward(t[:, :p], unit, grad) if normalize else grad)
    return dx.to(x.dtype), dy.to(y.dtype), dscale


def row_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor,
    normalize: bool,
    prefixes: list[int],
    weights: list[float],
) -> Tensor:
    """Σ_p weights_p Σ_i gap_pi of the rows: InfoNCE in one direction, differentiable."""
    gaps = pairs_logsumexp(x, y, scale, labels, normalize, prefixes, True, False, False)[2]
    return (gaps * gaps.new_tensor(weights)[:, None]).sum()


def pairs_row_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor,
    normalize: bool,
    prefixes: list[int],
    weights: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`row_loss` and its gradients in x, y and scale, in the dtype that is computed in."""
    dtype = compute_dtype(x.dtype)
    a, b, factor = (t.to(dtype) for t in (x, y, scale))
    r, c, gaps, _, kept = pairs_logsumexp(a, b, factor, labels, normalize, prefixes, True, False, False)
    share = gaps.new_tensor(weights)[:, None].expand_as(gaps)
    gradients = pairs_logsumexp_backward(
        a, b, factor, labels, normalize, prefixes, r, c, kept, share, c, share * (-gaps).expm1()
    )
    return ((gaps * share).sum(), *gradients)


def _unit_rows_backward(x: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    """The gradient of :func:`unit_rows`."""
    size = _largest(x)
    norm = (x / size).norm(dim=1, keepdim=True)
    along = (unit * grad).sum(1, keepdim=True)
    return torch.where(norm == 0, 0, (grad - unit * along) / torch.where(norm == 0, 1, norm) / size)


def scores(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """What top-k ranks, larger is nearer: ⟨x_i, y_j⟩, cosine, or −|x_i − y_j|². x: [n, d], y: [m, d] -> [n, m]."""
    if metric == "ip":
        return x @ y.T
    if metric == "cosine":
        return unit_rows(x) @ unit_rows(y).T
    return -torch.stack([(row - y).square().sum(1) for row in x]) if len(x) else x.new_empty(0, len(y))


def pairs_topk(
    x: Tensor,
    y: Tensor,
    k: int,
    metric: str,
    exclude_self: bool,
    return_logsumexp: bool,
    offset: int,
    values: Tensor | None,
    indices: Tensor | None,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest rows of y, merged with those found so far; see `ops.pairs`."""
    s = scores(x.double(), y.double(), metric)
    at = (torch.arange(len(y), device=x.device) + offset).expand(len(x), -1)
    if exclude_self:
        s = s.masked_fill(at == torch.arange(len(x), device=x.device)[:, None], -math.inf)
    dtype = compute_dtype(x.dtype)
    lse = s.new_empty(0, dtype=dtype)
    if return_logsumexp:
        lse = s.logsumexp(1).to(dtype)
        lse = lse if logsumexp is None else torch.logaddexp(lse, logsumexp)
    s = s.to(dtype)
    s = torch.where(s.isnan(), -math.inf, s)
    if values is not None and indices is not None:
        s = torch.cat([-values if metric == "sqeuclidean" else values, s], 1)
        at = torch.cat([indices, at], 1)
    if s.shape[1] < k:
        missing = k - s.shape[1]
        s = torch.nn.functional.pad(s, (0, missing), value=-math.inf)
        at = torch.nn.functional.pad(at, (0, missing), value=-1)
    at, order = at.sort(dim=1, stable=True)  # equal scores stay in the order of their indices
    s, order = s.gather(1, order).sort(dim=1, descending=True, stable=True)
    s, at = s[:, :k].contiguous(), at.gather(1, order)[:, :k]
    at = torch.where(s == -math.inf, -1, at).contiguous()
    return (-s if metric == "sqeuclidean" else s), at, lse
