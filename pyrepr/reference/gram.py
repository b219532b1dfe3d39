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
    """S [M, M], R, D [M, n], shift [M] and norms [M, n] in float64, inner products [M, n, n] or [0]; see `ops.gram`."""
    inputs = _counted([x.to(compute_dtype(x.dtype)) for x in xs], mask, centre and kernel in SHIFT_INVARIANT)
    k = _kernels(inputs, constants, kernel, degree, centre)
    n, shift = k.shape[1], torch.zeros_like(constants[0])
    if kernel != "linear" and n > 1:  # without their mean nothing is lost of kernels that hardly vary
        shift = (k.sum(2) - k.diagonal(dim1=1, dim2=2)).sum(1) / (n * (n - 1))
    s, r, d = _by_pairs(k, kernel == "linear", shift)
    norms = torch.stack([x.double().square().sum(1) for x in inputs])
    dots = torch.stack([x @ x.T for x in inputs]) if keep_dots else inputs[0].new_empty(0)
    r, d, norms = _over_rows(mask, r, d, norms)
    return s, r, d, shift, norms, dots


def gram_row_stats(xs: list[Tensor]) -> tuple[Tensor, ...]:
    """The first five of :func:`gram_stats` for a linear kernel, and P [M (M + 1)/2, n] float64; see `ops.gram`."""
    inputs = [_centred(x.to(compute_dtype(x.dtype))) for x in xs]
    k = torch.stack([x @ x.T for x in inputs]).double()
    d = k.diagonal(dim1=1, dim2=2).clone()
    k.diagonal(dim1=1, dim2=2).zero_()
    a, b = torch.triu_indices(len(xs), len(xs), device=k.device)
    p = torch.stack([(k[i] * k[j]).sum(1) for i, j in zip(a.tolist(), b.tolist(), strict=True)])
    s = d.new_zeros(len(xs), len(xs))
    s[a, b] = s[b, a] = p.sum(1)
    return s, -d, d, d.new_zeros(len(xs)), d.clone(), p


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
