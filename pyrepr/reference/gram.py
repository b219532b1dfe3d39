"""Family `gram` in plain PyTorch.

The first half is the textbook: kernel matrices, HSIC and CKA with explicit centring matrices, against which everything
else is tested. The second half are the reference implementations of the leaf ops, with whole n × n matrices.

Arithmetic is in float32, or float64 for float64 inputs: call with float64 tensors for the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr.reference._dtypes import compute_dtype

KERNELS = ("linear", "rbf", "laplacian", "polynomial", "cosine")
SHIFT_INVARIANT = ("linear", "rbf", "laplacian")


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i − y_j|², exactly 0 on the diagonal if y is x. x: [n, d], y: [m, d] -> [n, m]."""
    distances = ((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * (x @ y.T)).clamp_min(0)
    return distances * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device)) if y is x else distances


def unit_rows(x: Tensor) -> Tensor:
    """x / |x|; a zero row stays one, and has no derivative of any order."""
    zero = (x == 0).all(1, keepdim=True)
    return torch.where(zero, 0, x / torch.where(zero, 1, x).norm(dim=1, keepdim=True))


def kernel_matrix(x: Tensor, y: Tensor, kernel: str, scale: float | Tensor, degree: int, coef0: float) -> Tensor:
    """k(x_i, y_j). x: [n, d], y: [m, d] -> [n, m].

    ``scale`` is σ of rbf, exp(−|x−y|²/(2σ²)), and of laplacian, exp(−|x−y|/σ) with the Euclidean norm, and γ of
    polynomial, (γ⟨x,y⟩ + coef0)^degree. The cosine with a zero row is 0.
    """
    if kernel == "linear":
        return x @ y.T
    if kernel == "polynomial":
        return (scale * (x @ y.T) + coef0) ** degree
    if kernel == "cosine":
        return unit_rows(x) @ unit_rows(y).T
    centred = x - x.mean(0)
    distance = squared_distances(centred, centred if y is x else y - x.mean(0))
    if kernel == "rbf":
        return torch.exp(distance / (-2 * scale**2))
    return torch.exp(-_root(distance) / scale)


def _root(squares: Tensor) -> Tensor:
    """√, which has no derivative at 0: identical rows contribute none."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def median_distance(x: Tensor, centre: bool = True) -> Tensor:
    """Median of |x_i − x_j| over i < j; of an even number the mean of the middle two. x: [n, d] -> scalar."""
    n = x.shape[0]
    x = x - x.mean(0) if centre else x
    upper = torch.triu_indices(n, n, 1, device=x.device)
    distances = squared_distances(x, x)[upper[0], upper[1]].sqrt().sort().values
    count = distances.numel()
    return (distances[(count - 1) // 2] + distances[count // 2]) / 2


def hsic_of_kernels(k: Tensor, l: Tensor, estimator: str = "unbiased") -> Tensor:
    """HSIC of two kernel matrices, word for word. k, l: [n, n] -> scalar.

    biased: tr(KHLH)/(n−1)² (Gretton et al. 2005); unbiased: Song et al. 2012, eq. 5.
    """
    n = k.shape[0]
    if estimator == "biased":
        h = torch.eye(n, dtype=k.dtype, device=k.device) - 1 / n
        return torch.trace(k @ h @ l @ h) / (n - 1) ** 2
    off = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, l = k * off, l * off
    one = torch.ones(n, dtype=k.dtype, device=k.device)
    total = (
        torch.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return total / (n * (n - 3))


def hsic(x: Tensor, y: Tensor, kernel: str = "linear", sigma: float = 1.0, estimator: str = "unbiased") -> Tensor:
    """HSIC of the rows of x: [n, p] and y: [n, q] -> scalar; σ the same for both."""
    k, l = (kernel_matrix(a, a, kernel, sigma, 3, 1.0) for a in (x, y))
    return hsic_of_kernels(k, l, estimator)


def cka(x: Tensor, y: Tensor, kernel: str = "linear", sigma: float = 1.0, estimator: str = "unbiased") -> Tensor:
    """HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)), Kornblith et al. 2019. x: [n, p], y: [n, q] -> scalar."""
    xy, xx, yy = (hsic(a, b, kernel, sigma, estimator) for a, b in ((x, y), (x, x), (y, y)))
    return xy / (xx * yy).sqrt()


# The leaf ops of pyrepr/ops/gram.py, same arguments, same results.


def _centred(x: Tensor) -> Tensor:
    x = x - x[:1]
    return x - x.mean(0)


def gram_stats(
    xs: list[Tensor],
    mask: Tensor | None,
    constants: Tensor,
    kernel: str,
    degree: int,
    centre: bool,
    by_features: bool,
    split: int,
    keep_dots: bool,
) -> tuple[Tensor, ...]:
    """S [M, M], R, D [M, n], shift [M] and norms [M, n] in float64, products [M, n, n], flat or [0]; see `ops.gram`."""
    inputs = _counted([x.to(compute_dtype(x.dtype)) for x in xs], mask, centre and kernel in SHIFT_INVARIANT)
    k = _kernels(inputs, constants, kernel, degree, centre)
    n, shift = k.shape[1], torch.zeros_like(constants[0])
    if kernel != "linear" and n > 1:  # without their mean nothing is lost of kernels that hardly vary
        shift = (k.sum(2) - k.diagonal(dim1=1, dim2=2)).sum(1) / (n * (n - 1))
    s, r, d = _by_pairs(k, kernel == "linear", shift)
    norms = torch.stack([x.double().square().sum(1) for x in inputs])
    dots = inputs[0].new_empty(0)
    if keep_dots:
        dots = _crosses(inputs, split) if by_features else torch.stack([x @ x.T for x in inputs])
    r, d, norms = _over_rows(mask, r, d, norms)
    return s, r, d, shift, norms, dots


def gram_row_stats(xs: list[Tensor], by_features: bool, split: int) -> tuple[Tensor, ...]:
    """The first five of :func:`gram_stats` for a linear kernel, P [M (M + 1)/2, n] and the moved rows [M, M, n] in
    float64, and the products of features; see `ops.gram`."""
    inputs = [_centred(x.to(compute_dtype(x.dtype))) for x in xs]
    if by_features:
        return _row_stats_by_features(inputs, split)
    k = torch.stack([x @ x.T for x in inputs]).double()
    d = k.diagonal(dim1=1, dim2=2).clone()
    k.diagonal(dim1=1, dim2=2).zero_()
    a, b = torch.triu_indices(len(xs), len(xs), device=k.device)
    p = torch.stack([(k[i] * k[j]).sum(1) for i, j in zip(a.tolist(), b.tolist(), strict=True)])
    s = d.new_zeros(len(xs), len(xs))
    s[a, b] = s[b, a] = p.sum(1)
    return s, -d, d, d.new_zeros(len(xs)), d.clone(), p, _moved(inputs, d), inputs[0].new_empty(0)


def _moved(xs: list[Tensor], d: Tensor) -> Tensor:
    return torch.stack([(x.double() @ (d @ x.double()).T).T for x in xs])


def _row_stats_by_features(xs: list[Tensor], split: int) -> tuple[Tensor, ...]:
    s, r, d = _by_features(xs, split)
    p = []
    for a, x in enumerate(xs):
        for b, y in enumerate(xs[a:], a):
            counts = a == b or not split or a < split <= b
            p.append(((x @ (x.T @ y)) * y).sum(1).double() - d[a] * d[b] if counts else torch.zeros_like(d[0]))
    s, r, d = s.double(), r.double(), d.double()
    return s, r, d, d.new_zeros(len(xs)), d.clone(), torch.stack(p), _moved(xs, d), _crosses(xs, split)


def _crosses(xs: list[Tensor], split: int) -> Tensor:
    """X_aᵀX_b of every pair, flat; of X_aᵀX_a the upper half, half its diagonal."""
    cross = []
    for a, x in enumerate(xs):
        for b, y in enumerate(xs[a:], a):
            if a == b or not split or a < split <= b:
                block = x.T @ y
                cross.append((block.triu() - block.diagonal().diag() / 2 if a == b else block).flatten())
    return torch.cat(cross)


def products_of_features(xs: list[Tensor], mask: Tensor | None, split: int) -> Tensor:
    """The products of :func:`gram_stats` by way of features, for a kernel that does not keep them."""
    return _crosses(_counted([x.to(compute_dtype(x.dtype)) for x in xs], mask, True), split)


def statistics(
    xs: list[Tensor],
    mask: Tensor | None,
    constants: Tensor,
    kernel: str,
    degree: int,
    centre: bool,
    by_features: bool,
    split: int,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """S, R and D of :func:`gram_stats`, of kernels minus `shift` [M]: what derivatives of higher order go through.

    In float64, whatever the inputs are. With `by_features` the memory is that of the inputs, else M n × n matrices.
    """
    inputs = _counted([x.double() for x in xs], mask, centre and kernel in SHIFT_INVARIANT)
    if by_features:
        s, r, d = _by_features(inputs, split)
    else:
        s, r, d = _by_pairs(_kernels(inputs, constants, kernel, degree, centre), kernel == "linear", shift)
    return s, *_over_rows(mask, r, d)


def _counted(xs: list[Tensor], mask: Tensor | None, centre: bool) -> list[Tensor]:
    """The rows that count, centred on request."""
    xs = xs if mask is None else [x[mask.nonzero()[:, 0]] for x in xs]
    return [_centred(x) for x in xs] if centre else xs


def _based_matrix(x: Tensor, kernel: str, constants: Tensor, degree: int, centre: bool) -> Tensor:
    """k(x_i, x_j), times e^offset or minus its value at 0 as the constants say, without cancellation. x: [n, d]."""
    scale, offset, base = constants.unbind()
    if kernel == "polynomial":
        z = scale * (x @ x.T)
        value, tail = z, offset
        for _ in range(1, degree):  # (z + c)^m − c^m = (z + c) ((z + c)^(m−1) − c^(m−1)) + z c^(m−1)
            value, tail = value * (z + offset) + z * tail, tail * offset
        return value
    if centre or kernel not in ("rbf", "laplacian"):
        return kernel_matrix(x, x, kernel, scale, degree, offset)
    distance = squared_distances(x, x)
    exponent = distance / (-2 * scale**2) if kernel == "rbf" else _root(distance) / -scale
    near = base > 0
    above = torch.exp(torch.where(near, offset, 0)) * torch.expm1(exponent)
    return torch.where(near, above, torch.exp((exponent + torch.where(near, 0, offset)).clamp_max(600)))


def _kernels(xs: list[Tensor], constants: Tensor, kernel: str, degree: int, centre: bool) -> Tensor:
    """[M, n, n] float64"""
    made = [_based_matrix(x, kernel, c, degree, centre) for x, c in zip(xs, constants.unbind(1), strict=True)]
    return torch.stack(made).double()


def _by_pairs(k: Tensor, linear: bool, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, R and D of kernels [M, n, n] minus `shift` [M]."""
    k = k - shift[:, None, None]
    d = k.diagonal(dim1=1, dim2=2).clone()
    off = k - torch.diag_embed(d)
    n = d.shape[1]
    return torch.einsum("aij,bij->ab", off, off), -d - n * shift[:, None] if linear else off.sum(2), d


def _by_features(xs: list[Tensor], split: int) -> tuple[Tensor, Tensor, Tensor]:
    """The linear kernel's, in O(n d²): S_ab = ‖X_aᵀX_b‖² − Σ_i |x_ai|² |x_bi|², zero for pairs `split` leaves out."""
    d = torch.stack([x.square().sum(1) for x in xs])
    rows = [[d.new_zeros(()) for _ in xs] for _ in xs]
    for a, x in enumerate(xs):
        for b, y in enumerate(xs[a:], a):
            if a == b or not split or a < split <= b:
                rows[a][b] = rows[b][a] = (x.T @ y).square().sum() - (d[a] * d[b]).sum()
    return torch.stack([torch.stack(row) for row in rows]), -d, d


def _over_rows(mask: Tensor | None, *each: Tensor) -> tuple[Tensor, ...]:
    """Numbers of rows, with zeros where rows do not count."""
    if mask is None:
        return each
    rows = mask.nonzero()[:, 0]
    return tuple(a.new_zeros(len(a), len(mask)).index_copy(1, rows, a) for a in each)


def gram_hsic(
    xs: list[Tensor], estimator: str, split: int, normalised: bool, by_features: bool, keep: bool, keep_dots: bool
) -> tuple[Tensor, ...]:
    """HSIC or CKA of all pairs under a linear kernel, [M, M], and which layers are all alike, [M]; on request S [M, M],
    squared norms [M, n] and the products of :func:`gram_stats`. See `ops.gram`."""
    constants = torch.ones(3, len(xs), dtype=torch.float64, device=xs[0].device)
    dtype, none = compute_dtype(xs[0].dtype), constants.new_zeros(len(xs))
    s, r, d = statistics(xs, None, constants, "linear", 1, True, by_features, split, none)
    table, size = hsic_terms(s, r, d, d.shape[1], estimator)
    alike = table.diagonal() <= 8 * torch.finfo(dtype).eps * size
    dots = xs[0].new_empty(0, dtype=dtype)
    if keep_dots:
        dots = gram_stats(xs, None, constants, "linear", 1, True, by_features, split, True)[5]
    kept = (s, d) if keep else (none[:0], none[:0])
    return (_normalised(table, alike) if normalised else table).to(dtype), alike.int(), *kept, dots


def _normalised(table: Tensor, alike: Tensor) -> Tensor:
    """CKA of HSIC, both [M, M]; NaN for layers that are all alike."""
    root = torch.where(alike, torch.nan, table.diagonal()).sqrt()
    return table / torch.outer(root, root)


def gram_hsic_slopes(
    s: Tensor, norms: Tensor, grad: Tensor, estimator: str, split: int, normalised: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`gram_hsic`'s values, of the pairs of `split`, pass on to S [M, M] and to the squared norms [M, n]."""
    side = torch.arange(len(s), device=s.device) < split
    counts = (side[:, None] != side) | torch.eye(len(s), dtype=torch.bool, device=s.device) | (split == 0)

    def values(s: Tensor, norms: Tensor) -> Tensor:
        table, _ = hsic_terms(torch.where(counts, s, 0), -norms, norms, norms.shape[1], estimator)
        return _normalised(table, table.diagonal() <= 0) if normalised else table

    _, pull = torch.func.vjp(values, s, norms)
    return pull(torch.where(counts, grad, 0))


def hsic_terms(s: Tensor, r: Tensor, d: Tensor, n: Tensor | int, estimator: str) -> tuple[Tensor, Tensor]:
    """HSIC of every layer with every layer, [M, M], and the sum of the magnitudes of its terms for each layer, [M].

    S [M, M], R and D [M, n] are sums over i ≠ j and the diagonal (see `ops.gram`). With r = R + D, the full row sums:
    biased  [S + D·D − (2/n) r·r + Σr Σr / n²] / (n−1)²  (Gretton et al. 2005)
    unbiased  [S + ΣR ΣR / ((n−1)(n−2)) − 2/(n−2) R·R] / (n(n−3))  (Song et al. 2012, eq. 5)
    """
    if estimator == "biased":
        r = r + d
        whole, share = s + _row_products(d, d), (n - 1) ** 2
        totals, products = 1 / n**2, 2 / n
    else:
        whole, share = s, n * (n - 3)
        totals, products = 1 / ((n - 1) * (n - 2)), 2 / (n - 2)
    sums = _row_sums(r)
    squares, alike = torch.outer(sums, sums) * totals, _row_products(r, r) * products
    size = (whole + squares + alike).detach().diagonal() / share
    return (whole + squares - alike) / share, size


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ with the same bits for any number of threads, which a matrix product of so long rows has not. [M, n]."""
    if len(x) == 2:  # few operations, which is what counts for two small layers
        return (x[:, None] * y).sum(2)
    return torch.stack([_row_sums(x * each) for each in y], 1)


def _row_sums(x: Tensor) -> Tensor:
    """[M, n] -> [M], with the same bits for any number of threads."""
    if len(x) == 1:  # a sum to one number is cut among threads
        return x.expand(2, -1).sum(1)[:1]
    return x.sum(1)


def gram_matrix(
    x: Tensor, y: Tensor | None, scale: Tensor, kernel: str, degree: int, coef0: float, centre: bool
) -> Tensor:
    """Kernel matrix [n, m] in float32 (float64 for float64). With `centre`, both are shifted by the mean row of x."""
    dtype = compute_dtype(x.dtype)
    x = x.to(dtype)
    mean = x[0] + (x - x[:1]).mean(0) if centre and x.shape[0] else 0
    x = x - mean
    return kernel_matrix(x, x if y is None else y.to(dtype) - mean, kernel, scale[0], degree, coef0)


def gram_median(xs: list[Tensor], mask: Tensor | None, centre: bool) -> tuple[Tensor, Tensor]:
    """Median off-diagonal distance of each layer, [M], and squared norms of the rows, [M, n], in float64."""
    xs = _counted([x.to(compute_dtype(x.dtype)) for x in xs], mask, centre)
    norms = _over_rows(mask, torch.stack([x.double().square().sum(1) for x in xs]))[0]
    return torch.stack([median_distance(x, centre).double() for x in xs]), norms


def gram_apply(weights: Tensor, x: Tensor, centre: bool) -> Tensor:
    """weights @ X, X minus its mean row under `centre`. weights: [m, n], x: [n, d] -> [m, d] in weights' dtype."""
    x = x.to(weights.dtype)
    return weights @ (_centred(x) if centre and x.numel() else x)
