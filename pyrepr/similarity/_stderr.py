"""The standard error of CKA: its exact leave-one-out (or leave-one-group-out) jackknife.

CKA is a ratio of U-statistics, so the values without each group cost hardly more than the value. For kernel matrices K
and L with row sums r and s, and a group g of rows that is left out, with κ_j = Σ_{i∈g} K_ij, λ likewise:

    Σ_{ij} K_ij L_ij      falls by 2 Σ_{i∈g} P_i − W     P_i = Σ_j K_ij L_ij, W = Σ_{i,j∈g} K_ij L_ij
    Σ_j r_j s_j           falls by Σ_{j∈g} r_j s_j + Σ_{j∉g} (κ_j s_j + λ_j r_j − κ_j λ_j)
    Σ_j r_j               falls by Σ_{j∈g} r_j + Σ_{j∉g} κ_j

K and L have a zero diagonal for the unbiased estimator. Along rows ("gram") P comes from blocks of kernel matrices,
n² (D + M²) multiply-adds for M layers of D features in all; with a linear kernel it comes with the values, from the
same tiles. Along features P_i = x_iᵀ (XᵀY) y_i, and XᵀY is that of the values: n d_a d_b more for a pair, half of that
for a layer with itself, which is what the values cost. Where a row dwarfs the others, all values are computed one by
one. The standard error is √((G−1)/G Σ_g (CKA₋g − mean)²) for G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrepr.ops.gram import LINEAR_NORMS, Shares, Statistics, gram_row_stats, matrix_op
from pyrepr.similarity._hsic import normalise, scaled_hsic
from pyrepr.similarity._rescaled import within
from pyrepr.similarity.kernels import Kernel
from pyrepr.stats._robust import dominated

Pair = tuple[int, int]
Found = tuple[Statistics | None, Shares | None]
ROWS = 2048  # of a product that is summed at once: what it fills stays in the cache
BLOCK_BYTES = 1 << 26  # of kernel rows of all layers at a time


@dataclass
class _Layer:
    """What one layer contributes, whatever the other. Rows are sorted by group."""

    x: Tensor | None  # [n, d] centred where the kernel allows; None where shares of single samples stand for it
    r: Tensor  # [n] row sums
    diagonal: Tensor  # [n]
    inside: Tensor  # [n], Σ_{i∈g(j), i≠j} K_ij
    blocks: Tensor  # K_ij of all pairs i ≠ j of one group, one after the other


@dataclass
class _Groups:
    sizes: Tensor  # [G]
    index: Tensor  # [n], the group of each row; ascending
    left: Tensor  # first and second row of every ordered pair of different rows in one group
    right: Tensor

    @classmethod
    def of(cls, groups: Tensor | None, n: int, device: torch.device) -> tuple[_Groups, Tensor]:
        """The groups, and the order that sorts rows by them."""
        if groups is None:
            alone = torch.arange(n, device=device)
            empty = alone[:0]
            return cls(torch.ones_like(alone), alone, empty, empty), alone
        _, index, sizes = groups.to(device).unique(return_inverse=True, return_counts=True)
        order = torch.argsort(index, stable=True)
        index = index[order]
        start = sizes.cumsum(0) - sizes
        left = torch.arange(n, device=device).repeat_interleave(sizes[index])
        right = torch.arange(len(left), device=device) - (sizes[index].cumsum(0) - sizes[index]).repeat_interleave(
            sizes[index]
        )
        right = right + start[index[left]]
        return cls(sizes, index, left[left != right], right[left != right]), order

    @property
    def single(self) -> bool:
        """Whether every row is a group of its own."""
        return len(self.sizes) == len(self.index)

    def sum(self, values: Tensor) -> Tensor:
        """[..., n] summed over the rows of each group: [..., G]."""
        if self.single:
            return values
        out = values.new_zeros(*values.shape[:-1], len(self.sizes))
        return out.index_add_(-1, self.index, values)


def check_groups(groups: object, n: int, estimator: str) -> Tensor | None:
    """Groups [n] that can be left out one by one."""
    least = 4 if estimator == "unbiased" else 2
    if groups is None:
        if n <= least:
            raise ValueError(f"return_stderr leaves out one sample at a time and needs at least {least + 1}, got {n}")
        return None
    if not isinstance(groups, Tensor) or groups.is_floating_point() or tuple(groups.shape) != (n,):
        came = f"{list(groups.shape)} {groups.dtype}" if isinstance(groups, Tensor) else type(groups).__name__
        raise ValueError(f"groups must be integers of shape [n] = [{n}], got {came}")
    sizes = groups.unique(return_counts=True)[1]
    if len(sizes) < 2 or n - int(sizes.max()) < least:
        raise ValueError(
            f"groups must leave at least {least} samples when one of them is left out, got {len(sizes)} "
            f"group{'s' * (len(sizes) != 1)} of up to {int(sizes.max())} among {n} samples"
        )
    return groups


def row_stats(xs: list[Tensor], by_features: bool, split: int) -> Found:
    """The statistics of a linear kernel, and the shares of single samples in them."""
    found, shares = gram_row_stats(xs, by_features, split)
    return found, shares if not bool(found.shift.any()) else None  # very wide layers: a shift is in the shares


@torch.no_grad()
def cka_stderr(
    xs: list[Tensor],
    spec: Kernel,
    estimator: str,
    groups: Tensor | None,
    split: int,
    features: bool,
    found: Found = (None, None),
) -> Tensor:
    """[La, Lb] float64; without `split` [L, L]. Layers are checked, `features` says along which route. `found`: of a
    linear kernel, from the pass that made the values."""
    n = xs[0].shape[0]
    parts, order = _Groups.of(groups, n, xs[0].device)
    g = len(parts.sizes)
    stats, shares = found
    spread = torch.stack([_norms(x) for x in xs]) if stats is None else stats.norms
    if dominated(spread):
        out = _word_for_word(xs, spec, estimator, [order[parts.index != i] for i in range(g)], split)
        return out[:split, split:] if split else out
    largest = [*spread.amax(1).tolist(), *(q for x in xs for q in _lengths(x))]
    if not all(within(q, LINEAR_NORMS[torch.float32]) for q in largest):  # what float32 tiles hold has lost its digits
        xs = [x.double() for x in xs]
        if shares is not None:
            stats, shares = row_stats(xs, features, split)
    if shares is None:
        scales = spec.scales(xs).tolist()
        layers = [_prepare(x[order], spec, scale, parts, estimator) for x, scale in zip(xs, scales, strict=True)]
    else:
        layers = [_of_norms(x, q[order], order, parts, estimator) for x, q in zip(xs, stats.norms, strict=True)]
    left = range(split or len(xs))
    right = range(split, len(xs)) if split else range(len(xs))
    pairs = [(a, b) for a in left for b in right if split or a <= b]
    every = [*pairs, *((a, a) for a in range(len(xs)) if split)]
    if shares is not None:
        rest = dict(_of_shares(layers, every, parts, estimator, shares, order))
    elif features:
        rest = dict(_linear(layers, every, parts, estimator))
    else:
        rest = dict(_along_rows(layers, every, spec, scales, parts, estimator))
    out = torch.full((len(xs), len(xs)), torch.nan, dtype=torch.float64, device=xs[0].device)
    roots = torch.stack([rest[a, a] for a in range(len(xs))]).sqrt()
    one, two = torch.tensor(pairs, device=out.device).T
    values = torch.stack([rest[pair] for pair in pairs]).div_(roots[one]).div_(roots[two])
    out[one, two] = out[two, one] = (g - 1) / g**0.5 * values.std(1, correction=1 if g > 1 else 0)
    return out[:split, split:] if split else out


def _norms(x: Tensor) -> Tensor:
    """Squared norms of the rows around their mean, [n] float64."""
    x = x.double()
    return (x - x.mean(0)).square().sum(1)


def _lengths(x: Tensor) -> tuple[float, float]:
    """Between what the largest squared norm of a row around 0 is."""
    if not x.numel():
        return 0.0, 0.0
    low, high = x.aminmax()
    largest = max(-float(low), float(high)) ** 2
    return largest, largest * x.shape[1]


def _word_for_word(xs: list[Tensor], spec: Kernel, estimator: str, kept: list[Tensor], split: int) -> Tensor:
    """[L, L], from the CKA of all rows `kept` without each group: where a row dwarfs the others, differences of sums
    that hold it have no digits of the rest."""
    scales, found = spec.scales(xs), []
    for rows in kept:
        table = scaled_hsic([x[rows] for x in xs], spec, estimator, split=split, scales=scales).hsic
        own = table.diagonal()
        found.append(normalise(table, own, own))
    values, g = torch.stack(found), len(kept)
    return ((g - 1) / g * (values - values.mean(0)).square().sum(0)).sqrt()


def _prepare(x: Tensor, spec: Kernel, scale: float, parts: _Groups, estimator: str) -> _Layer:
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    if spec.name in ("linear", "rbf", "laplacian"):
        x = x - x[:1]
        x = x - x.mean(0)
    if spec.name == "linear":
        diagonal = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
        return _linear_layer(x, diagonal, parts, estimator)
    rows = [_kernel(x[i : i + 256], x, spec, scale) for i in range(0, x.shape[0], 256)]
    computed = torch.cat([block.diagonal(256 * i) for i, block in enumerate(rows)]).double()
    diagonal = torch.ones_like(computed) if spec.name in ("rbf", "laplacian") else computed
    r = torch.cat([block.sum(1, dtype=torch.float64) for block in rows]) - computed
    r = r if estimator == "unbiased" else r + diagonal
    chunks = zip(parts.left.split(1 << 15), parts.right.split(1 << 15), strict=True)
    blocks = torch.cat([_pairs(x[i], x[j], spec, scale) for i, j in chunks]).double()
    return _Layer(x, r, diagonal, torch.zeros_like(r).index_add_(0, parts.right, blocks), blocks)


def _linear_layer(x: Tensor | None, diagonal: Tensor, parts: _Groups, estimator: str) -> _Layer:
    r = -diagonal if estimator == "unbiased" else torch.zeros_like(diagonal)  # centred rows add up to zero
    if x is None or parts.single:
        return _Layer(x, r, diagonal, torch.zeros_like(r), r[:0])
    blocks = _inside(x, parts).double()
    return _Layer(x, r, diagonal, torch.zeros_like(r).index_add_(0, parts.right, blocks), blocks)


def _of_norms(x: Tensor, q: Tensor, order: Tensor, parts: _Groups, estimator: str) -> _Layer:
    """A linear kernel's, of which squared norms are known; rows only where groups ask for them."""
    if parts.single:
        return _linear_layer(None, q, parts, estimator)
    x = x[order].to(torch.promote_types(x.dtype, torch.float32))
    x = x - x[:1]
    return _linear_layer(x - x.mean(0), q, parts, estimator)


def _inside(x: Tensor, parts: _Groups) -> Tensor:
    """⟨x_i, x_j⟩ of all pairs (`left`, `right`), by products of groups of one size at a time."""
    out = x.new_empty(len(parts.left))
    pairs = parts.sizes * (parts.sizes - 1)
    rows, places = parts.sizes.cumsum(0) - parts.sizes, pairs.cumsum(0) - pairs
    for size in parts.sizes.unique().tolist() if len(out) else ():
        chosen = (parts.sizes == size).nonzero()[:, 0]
        y = x[rows[chosen, None] + torch.arange(size, device=x.device)]  # [groups of that size, size, d]
        others = ~torch.eye(size, dtype=torch.bool, device=x.device).flatten()
        products = (y @ y.transpose(1, 2)).flatten(1)[:, others]
        out[places[chosen, None] + torch.arange(size * (size - 1), device=x.device)] = products
    return out


def _kernel(x: Tensor, y: Tensor, spec: Kernel, scale: float) -> Tensor:
    """k(x_i, y_j): x: [b, d], y: [n, d] -> [b, n]."""
    value = torch.tensor([scale], dtype=torch.float64, device=x.device)
    return matrix_op(x, y, value, spec.name, spec.degree, spec.coef0, False)


def _pairs(x: Tensor, y: Tensor, spec: Kernel, scale: float) -> Tensor:
    """k(x_i, y_i): [m, d] twice -> [m]."""
    if spec.name in ("rbf", "laplacian"):
        squared = (x - y).square().sum(1)
        return torch.exp(-squared / (2 * scale**2)) if spec.name == "rbf" else torch.exp(-squared.sqrt() / scale)
    dots = (x * y).sum(1)
    if spec.name == "cosine":
        norms = x.norm(dim=1) * y.norm(dim=1)
        return dots / torch.where(norms == 0, 1, norms)
    return (scale * dots + spec.coef0) ** spec.degree if spec.name == "polynomial" else dots


def _hsic(
    one: _Layer,
    two: _Layer,
    p: Tensor,  # [n], Σ_j K_ij L_ij with the diagonal as the estimator has it
    both: Tensor,  # [G], Σ_{j∉g} κ_j λ_j
    one_r: Tensor,  # [G], Σ_{j∉g} κ_j s_j
    two_r: Tensor,  # [G], Σ_{j∉g} λ_j r_j
    parts: _Groups,
    estimator: str,
) -> Tensor:
    """[G] float64: HSIC without each group."""
    if parts.single and estimator == "unbiased":  # the same without what is zero
        return _hsic_of_singles(one.r, two.r, p, one_r, two_r)
    r, s = one.r, two.r
    within = torch.zeros_like(both)
    if not parts.single:
        within = parts.sum(torch.zeros_like(r).index_add_(0, parts.left, one.blocks * two.blocks))
    inside = [one.inside, two.inside]
    if estimator == "biased":
        within = within + parts.sum(one.diagonal * two.diagonal)
        inside = [one.inside + one.diagonal, two.inside + two.diagonal]
    total = p.sum() - 2 * parts.sum(p) + within
    # Σ_{j∉g} κ_j = Σ_{i∈g} (row sum − what is inside the group)
    sums = [v.sum() - 2 * parts.sum(v) + parts.sum(w) for v, w in ((r, inside[0]), (s, inside[1]))]
    products = (r * s).sum() - parts.sum(r * s) - one_r - two_r + both
    n = len(r) - parts.sizes.double()
    if estimator == "biased":
        return (total - 2 / n * products + sums[0] * sums[1] / n**2) / (n - 1) ** 2
    return (total + sums[0] * sums[1] / ((n - 1) * (n - 2)) - 2 / (n - 2) * products) / (n * (n - 3))


def _hsic_of_singles(r: Tensor, s: Tensor, p: Tensor, one_r: Tensor, two_r: Tensor) -> Tensor:
    """[..., n] of each, what :func:`_hsic` takes."""
    n = r.shape[-1] - 1
    total = p.sum(-1, keepdim=True) - 2 * p
    squares = (r.sum(-1, keepdim=True) - 2 * r) * (s.sum(-1, keepdim=True) - 2 * s)
    both = r * s
    products = both.sum(-1, keepdim=True) - both - one_r - two_r + p
    return (total + squares / ((n - 1) * (n - 2)) - 2 / (n - 2) * products) / (n * (n - 3))


def _of_shares(
    layers: list[_Layer], pairs: list[Pair], parts: _Groups, estimator: str, shares: Shares, order: Tensor
) -> Iterator[tuple[Pair, Tensor]]:
    """Linear kernels: (pair, HSIC without each group), from what single samples contribute."""
    count = len(layers)
    if parts.single and estimator == "unbiased":  # all pairs at once, the same without what is zero
        one, two = torch.tensor(pairs, device=order.device).T
        low, high = torch.minimum(one, two), torch.maximum(one, two)
        q = torch.stack([layer.diagonal for layer in layers])
        p, squares = shares.p[low * count - low * (low - 1) // 2 + high - low], q[one] * q[two]
        found = _hsic_of_singles(
            -q[one], -q[two], p, squares - shares.moved[one, two], squares - shares.moved[two, one]
        )
        yield from zip(pairs, found, strict=True)
        return
    kept = [layer.inside + layer.diagonal for layer in layers]
    own = {} if parts.single else _squares_of_groups(layers, pairs, parts, shares)

    def outside(a: int, b: int) -> Tensor:  # Σ_{j∉g} κ_j(a) r_j(b)
        if estimator == "biased":
            return torch.zeros_like(kept[a][: len(parts.sizes)])  # there r = 0
        return parts.sum(kept[a] * layers[b].diagonal - shares.moved[a, b][order])

    for a, b in pairs:
        one, two, low, high = layers[a], layers[b], min(a, b), max(a, b)
        bare = shares.p[low * count - low * (low - 1) // 2 + high - low][order]
        both = bare if parts.single else own[a, b] - parts.sum(kept[a] * kept[b])
        p = bare if estimator == "unbiased" else bare + one.diagonal * two.diagonal
        yield (a, b), _hsic(one, two, p, both, outside(a, b), outside(b, a), parts, estimator)


def _squares_of_groups(layers: list[_Layer], pairs: list[Pair], parts: _Groups, shares: Shares) -> dict[Pair, Tensor]:
    """Σ_j κ_j λ_j of every group, [G] float64."""
    summed = [parts.sum(layer.x.T).T for layer in layers]  # [G, d], Σ_{i∈g} x_i
    if not shares.cross:
        found = _products_of_groups(layers, summed, len(layers[0].r))
        return {(a, b): found[a, b] for a, b in pairs}
    return {
        (a, b): (1 + (a == b)) * ((summed[a] @ shares.cross[a, b].to(summed[a])) * summed[b]).sum(1).double()
        for a, b in pairs
    }


def _linear(layers: list[_Layer], pairs: list[Pair], parts: _Groups, estimator: str) -> Iterator[tuple[Pair, Tensor]]:
    """Linear kernels: (pair, HSIC without each group), along features."""
    sums = torch.stack([layer.r for layer in layers])  # [M, n]
    kept = [layer.inside + layer.diagonal for layer in layers]
    summed = [layer.x if parts.single else parts.sum(layer.x.T).T for layer in layers]  # [G, d], Σ_{i∈g} x_i
    outside = [  # [M, G], Σ_{j∉g} κ_j r_j
        (sums.to(layer.x) @ layer.x @ y.T).double() - parts.sum(k * sums)
        for layer, y, k in zip(layers, summed, kept, strict=True)
    ]
    for a, b in pairs:
        one, two = layers[a], layers[b]
        own = one.diagonal * two.diagonal
        cross = one.x.T @ two.x  # [d_a, d_b]
        rows = zip(one.x.split(ROWS), two.x.split(ROWS), strict=True)
        p = torch.cat([(x @ cross).mul_(y).sum(1) for x, y in rows]).double()
        both = p - own
        if not parts.single:
            both = ((summed[a] @ cross) * summed[b]).sum(1).double() - parts.sum(kept[a] * kept[b])
        p = p - own if estimator == "unbiased" else p
        yield (a, b), _hsic(one, two, p, both, outside[a][b], outside[b][a], parts, estimator)


def _products_of_groups(layers: list[_Layer], summed: list[Tensor], n: int) -> Tensor:
    """Σ_j κ_j λ_j of every pair of layers and every group, [M, M, G]; κ = X Σ_{i∈g} x_i."""
    rows = max(1, BLOCK_BYTES // (len(layers) * n * layers[0].x.element_size()))
    parts = []
    for start in range(0, len(summed[0]), rows):
        kappa = torch.stack([y[start : start + rows] @ x.x.T for x, y in zip(layers, summed, strict=True)])
        parts.append(torch.bmm(kappa.transpose(0, 1), kappa.permute(1, 2, 0)).permute(1, 2, 0).double())
    return torch.cat(parts, 2)


def _along_rows(
    layers: list[_Layer], pairs: list[Pair], spec: Kernel, scales: list[float], parts: _Groups, estimator: str
) -> Iterator[tuple[Pair, Tensor]]:
    """Any kernel: (pair, HSIC without each group), from blocks of kernel rows that hold whole groups."""
    m, n, g = len(layers), len(layers[0].r), len(parts.sizes)
    device = layers[0].r.device
    single = parts.single
    narrow = torch.stack([layer.r for layer in layers]).T.to(layers[0].x)  # [n, M]
    p = torch.zeros(m, m, n, dtype=torch.float64, device=device)
    both = torch.zeros(m, m, 0 if single else g, dtype=torch.float64, device=device)
    other = torch.zeros(m, m, g, dtype=torch.float64, device=device)  # Σ_{j∉g} κ_j(a) r_j(b)
    per_row = m * n * layers[0].x.element_size()
    ends = parts.sizes.cumsum(0)
    start = first = 0
    while start < n:
        last = int(torch.searchsorted(ends, start + max(1, BLOCK_BYTES // per_row), right=True))
        last = max(last, first + 1)
        stop = int(ends[last - 1])
        block = torch.stack([_kernel(x.x[start:stop], x.x, spec, s) for x, s in zip(layers, scales, strict=True)])
        own = torch.arange(start, stop, device=device)
        diagonal = torch.stack([layer.diagonal[start:stop] for layer in layers]).to(block)
        block[:, own - start, own] = diagonal if estimator == "biased" else 0
        p[:, :, start:stop] = torch.bmm(block.transpose(0, 1), block.permute(1, 2, 0)).permute(1, 2, 0)
        local = parts.index[start:stop] - first
        kappa = block if single else block.new_zeros(m, last - first, n).index_add_(1, local, block)
        kappa = kappa.clone() if single and estimator == "biased" else kappa
        kappa[:, local, own] = 0  # Σ over j∉g only
        other[:, :, first:last] = (kappa @ narrow).transpose(1, 2)
        if not single:
            both[:, :, first:last] = torch.bmm(kappa.transpose(0, 1), kappa.permute(1, 2, 0)).permute(1, 2, 0)
        start, first = stop, last
    for a, b in pairs:
        one, two = layers[a], layers[b]
        own = one.diagonal * two.diagonal if estimator == "biased" else 0
        shared = p[a, b] - own if single else both[a, b]
        yield (a, b), _hsic(one, two, p[a, b], shared, other[a, b], other[b, a], parts, estimator)
