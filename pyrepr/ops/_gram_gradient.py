"""Family `gram`: the gradients of its leaf ops, made of two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyrepr.ops._leaf import at_hand
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import SHIFT_INVARIANT

# Rows of the block of kernel matrices that the backward recomputes at a time: all layers' blocks in this many bytes.
BACKWARD_BLOCK_BYTES = 32 << 20
GPU_BACKWARD_BLOCK_BYTES = 256 << 20  # every block packs its layer again (kernels/gram)
# Of the sum of two squared norms. A smaller squared distance that is made of them has lost two digits or more, and with
# it the gradient of laplacian, which goes by directions; such pairs are taken from the differences of their rows.
NEAR = 0.01
NEAR_ELEMENTS = 1 << 22  # of differences of rows at a time


def route_costs(n: int, widths: Sequence[int], split: int = 0) -> tuple[float, float]:
    """Multiply-adds of the Gram route and of the feature route for layers of these widths and n samples.

    The Gram route makes every layer's n × n tiles once, by symmetry half of them: n²(D + M²/2)/2 with D = Σ d_l. The
    feature route makes X_aᵀX_b for every pair it needs: n·d_a·d_b, half of it for a = b. With ``split`` the pairs are
    those of a layer before and a layer from ``split`` on, and every layer with itself.
    """
    m = len(widths)
    gram = n * n * (sum(widths) + m * m / 2) / 2
    own = sum(d * d for d in widths)
    total = sum(widths)
    left = sum(widths[:split])
    cross = left * (total - left) if split else (total * total - own) / 2
    return gram, n * (own / 2 + cross)


class Products(NamedTuple):
    """The two products of the family that gradients are made of; the ops of ``gram.py``."""

    dots: Callable[[Tensor, Tensor | None, bool], Tensor]  # (x [n, d], y [m, d] or None, centre) -> [n, m]
    apply: Callable[[Tensor, Tensor, bool], Tensor]  # (weights [m, n], x [n, d], centre) -> [m, d]


@dataclass
class Slopes:
    """A kernel k as a function of inner products p = ⟨x, y⟩ and squared norms q, and its derivatives."""

    kernel: str
    scale: Tensor  # []
    degree: int
    offset: Tensor  # [] as in `gram_stats`
    base: Tensor | None = None  # []; None: nothing is subtracted, and rbf and laplacian are plain

    def value(self, p: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """k [n, m] minus its base. p: [n, m], rows: [n] and columns: [m], their squared norms."""
        if self.kernel == "linear":
            return p
        if self.kernel == "rbf":
            return self._decay(_distance(p, rows, columns).mul_(-1 / (2 * self.scale**2)))
        if self.kernel == "laplacian":
            return self._decay(_distance(p, rows, columns).sqrt_().mul_(-1 / self.scale))
        if self.kernel == "polynomial":
            return self._power(p)
        return (p * _inverse_norm(rows)[:, None]).mul_(_inverse_norm(columns))

    def _decay(self, exponent: Tensor) -> Tensor:
        if self.base is None:
            return exponent.exp_()
        if self.base > 0:
            return exponent.expm1_().mul_(self.offset.exp())
        return exponent.add_(self.offset).clamp_max_(0).exp_()

    def _power(self, p: Tensor) -> Tensor:
        z = self.scale * p
        whole = z + self.offset
        if self.base is None:
            return whole**self.degree
        value, tail = z.clone(), self.offset
        for _ in range(1, self.degree):  # as in csrc/cpu/pairs.h
            value.mul_(whole).addcmul_(z, tail)
            tail = tail * self.offset
        return value

    def weights(self, pull: Tensor, p: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """pull · dk/dp, [n, m]: how much of y_j is in the gradient of x_i."""
        if self.kernel == "linear":
            return pull
        if self.kernel == "polynomial":
            return pull * (self.degree * self.scale) * (self.scale * p + self.offset) ** (self.degree - 1)
        if self.kernel == "cosine":
            return (pull * _inverse_norm(rows)[:, None]).mul_(_inverse_norm(columns))
        if self.kernel == "rbf":
            return (pull * self._whole(k)).div_(self.scale**2)
        distance = _distance(p, rows, columns).sqrt_()
        alike = distance == 0
        return (pull * self._whole(k)).div_(distance.mul_(self.scale)).masked_fill_(alike, 0)

    def _whole(self, k: Tensor) -> Tensor:
        """k with its base, if it decays."""
        return k if self.base is None or not self.base > 0 else k + self.offset.exp()

    def take_near(
        self, weights: Tensor, pull: Tensor, p: Tensor, k: Tensor, rows: Tensor, columns: Tensor
    ) -> Near | None:
        """Takes from the :meth:`weights` of laplacian those of pairs that are near each other.

        On the CPU: counting them would wait for a GPU.
        """
        if self.kernel != "laplacian" or not at_hand(p):
            return None
        near = _distance(p, rows, columns) < NEAR * (rows[:, None] + columns)
        i, j = near.logical_and_(pull != 0).nonzero(as_tuple=True)
        if not len(i):
            return None
        weights[i, j] = 0
        return Near(i, j, pull[i, j] * self._whole(k[i, j]) / self.scale)

    def own(self, pull: Tensor, weights: Tensor, k: Tensor, q: Tensor, along: int) -> Tensor | None:
        """2 Σ pull · dk/dq, how much of x_i itself is in its gradient; the sum over columns (along 1) or rows (0)."""
        if self.kernel == "cosine":
            return -(pull * k).sum(along) * _inverse_norm(q) ** 2
        return -weights.sum(along) if self.kernel in ("rbf", "laplacian") else None


class Near(NamedTuple):
    """Pairs of rows that pull with a strength along what sets them apart."""

    i: Tensor  # [P]
    j: Tensor  # [P]
    strength: Tensor  # [P]

    def add_to(self, left: Tensor | None, right: Tensor | None, x: Tensor, y: Tensor) -> None:
        """strength · (y_j − x_i) / |y_j − x_i| to left_i, and from right_j."""
        size = max(1, NEAR_ELEMENTS // max(1, x.shape[1]))
        for i, j, strength in zip(*(part.split(size) for part in self), strict=True):
            step = y[j].double() - x[i].double()
            # Twice: torch cuts a sum to a single number among its threads, and no other.
            length = step.square()[:, None].expand(-1, 2, -1).sum(2)[:, :1].sqrt()
            step = step * torch.where(length > 0, strength[:, None] / length, 0)
            if left is not None:
                left.index_add_(0, i, step.to(left.dtype))
            if right is not None:
                right.index_add_(0, j, step.to(right.dtype), alpha=-1)


def _distance(p: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] + columns).sub_(p, alpha=2).clamp_min_(0)


def _inverse_norm(q: Tensor) -> Tensor:
    return torch.where(q == 0, 0, q.rsqrt())


def stats_backward(products: Products, args: tuple, kept: tuple, grads: tuple, wanted: tuple) -> tuple:
    """The gradients of `stats_op` in mask, scale (none) and every layer; the shift counts as a constant."""
    xs, mask, constants, kernel, degree, centre, by_features, split, keep_dots = args
    shift, norms, dots = kept
    grad_s, grad_r, grad_d = grads
    wanted, full = wanted[2:], xs
    if mask is not None:
        rows = mask.nonzero()[:, 0]
        xs = [x[rows] for x in xs]
        norms, grad_r, grad_d = norms[:, rows], grad_r[:, rows], grad_d[:, rows]
    if by_features:
        blocks = blocks_of(dots, xs, split) if keep_dots else {}
        pairs = [(a, b) for a, b in layer_pairs(len(xs), split) if wanted[a] or wanted[b]]
        found = _features_backward(products, xs, norms, pairs, blocks, wanted, grad_s, grad_d - grad_r)
    else:
        slopes = [
            Slopes(kernel, scale, degree, offset, base if kernel == "polynomial" or not centre else None)
            for scale, offset, base in constants.to(compute_dtype(xs[0].dtype)).unbind(1)
        ]
        centre = centre and kernel in SHIFT_INVARIANT
        dots = dots if keep_dots else None
        found = _TilesBackward(products, xs, slopes, centre, norms, shift, dots)(wanted, grad_s, grad_r, grad_d)
    if mask is not None:
        found = [
            g if g is None else torch.zeros_like(x).index_copy_(0, rows, g) for g, x in zip(found, full, strict=True)
        ]
    return None, None, *found


def matrix_backward(products: Products, args: tuple, kept: tuple, grads: tuple, wanted: tuple) -> tuple:
    """The gradients of `matrix_op` in x, y and scale (none)."""
    x, y, scale, kernel, degree, coef0, centre = args
    (pull,) = grads
    dtype = pull.dtype
    left = x.to(dtype)
    mean = left[:1] + (left - left[:1]).mean(0) if centre and x.shape[0] else 0
    left = left - mean
    right = left if y is None else y.to(dtype) - mean
    slopes = Slopes(kernel, scale.to(dtype)[0], degree, torch.full_like(scale[0], coef0, dtype=dtype))
    weights, own_left, own_right, near = pull, None, None, None
    if kernel != "linear":
        p = products.dots(left, None if y is None else right, False)
        rows, columns = (a.double().square().sum(1).to(dtype) for a in (left, right))
        k = slopes.value(p, rows, columns)
        weights = slopes.weights(pull, p, k, rows, columns)
        if y is None and kernel in SHIFT_INVARIANT:
            weights.diagonal().zero_()  # k(x, x) is 1, whatever rounding makes of it
        near = slopes.take_near(weights, pull, p, k, rows, columns)
        own_left = slopes.own(pull, weights, k, rows, 1)
        own_right = slopes.own(pull, weights, k, columns, 0)
    if y is None:
        own = None if own_left is None else own_left + own_right
        dx = _pulled(products, weights + weights.T, left, own, left)
        if near is not None:
            near.add_to(dx, dx, x, x)
        return dx.to(x.dtype), None, None
    dx = _pulled(products, weights, right, own_left, left) if wanted[0] else None
    dy = _pulled(products, weights.T, left, own_right, right) if wanted[1] else None
    if near is not None:
        near.add_to(dx, dy, x, y)
    return *(None if d is None else d.to(of.dtype) for d, of in ((dx, x), (dy, y))), None


def _pulled(products: Products, weights: Tensor, others: Tensor, own: Tensor | None, x: Tensor) -> Tensor:
    grad = products.apply(weights, others, False)
    return grad if own is None else grad.addcmul_(own[:, None], x)


def layer_pairs(m: int, split: int) -> list[tuple[int, int]]:
    """The pairs a ≤ b whose S is wanted: all of them, or with `split` the cross pairs and the diagonal."""
    return [(a, b) for a in range(m) for b in range(a, m) if a == b or not split or a < split <= b]


def _mean_row(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The mean of the rows, with the same bits for any number of threads. x: [n, d] -> [d].

    torch cuts a sum to a single number among its threads, and no other.
    """
    return x.expand(-1, 2).mean(0, dtype=dtype)[:1] if x.shape[1] == 1 else x.mean(0, dtype=dtype)


def blocks_of(flat: Tensor, xs: Sequence[Tensor], split: int) -> dict[tuple[int, int], Tensor]:
    """X_aᵀX_b of every pair, one after the other in `flat`; of X_aᵀX_a the upper half with half of its diagonal."""
    pairs = layer_pairs(len(xs), split)
    shapes = [(xs[a].shape[1], xs[b].shape[1]) for a, b in pairs]
    parts = flat.split([rows * columns for rows, columns in shapes])
    return {pair: part.view(shape) for pair, part, shape in zip(pairs, parts, shapes, strict=True)}


def _features_backward(products, xs, q, pairs, blocks, wanted, grad_s, grad_q):
    """Linear kernel: S_ab = ‖X_aᵀX_b‖² − q_a·q_b gives dX_a = Σ_b 2 (g_ab + g_ba) [X_b (X_bᵀX_a) − diag(q_b) X_a].

    Everything here has the size of the inputs (n > D on this route).
    """
    dtype = compute_dtype(xs[0].dtype)
    centred = [x.to(dtype) - _mean_row(x, torch.float64).to(dtype) for x in xs]
    symmetric = grad_s + grad_s.T
    diagonal = 2 * grad_q
    grads: list[Tensor | None] = [None] * len(xs)
    for a, b in pairs:
        if (block := blocks.get((a, b))) is None:
            product = products.apply(centred[b].T, xs[a], True)  # [d_b, d_a]
        else:
            product = block + block.T if a == b else block.T
        for left, right, cross in ((a, b, product), (b, a, product.T))[: 1 if a == b else 2]:
            if wanted[left]:
                weight = 2 * symmetric[left, right]
                part, so_far = products.apply(centred[right], cross * weight.to(dtype), False), grads[left]
                grads[left] = part if so_far is None else so_far.add_(part)
                diagonal[left] -= weight * q[right]
    for a, grad in enumerate(grads):
        if grad is not None:
            grad += diagonal[a].to(dtype)[:, None] * centred[a]
            grads[a] = (grad - _mean_row(grad)).to(xs[a].dtype)
    return grads


class _TilesBackward:
    """Any kernel: block by block of rows, recompute the kernel matrices (unless the inner products were kept), and
    multiply the weight of every pair with the rows it pulls on. Never more than a block of rows × n of any layer.

    With F the result and k_a symmetric,
    c_ij = dF/dk_a(i, j) + dF/dk_a(j, i) = 2 Σ_b (g_ab + g_ba) k_b(i, j) + r_i + r_j.
    Every kernel here depends on a pair by ⟨x_i, x_j⟩ and the norms, so dF/dx_i = Σ_j w_ij x_j + v_i x_i.
    """

    def __init__(self, products, xs, slopes, centre, norms, shift, dots):
        self.products, self.xs, self.slopes, self.centre, self.dots = products, xs, slopes, centre, dots
        self.dtype, self.kernel = compute_dtype(xs[0].dtype), slopes[0].kernel
        self.n = xs[0].shape[0]
        self.shift = shift.to(self.dtype)
        self.shifted = any(x.shape[1] // 16 > self.n**2 for x in xs)  # a linear kernel only then: csrc/cpu/gram.cpp
        kept = dots is not None and self.kernel != "linear"
        self.q = dots.diagonal(dim1=1, dim2=2) if kept else norms.to(self.dtype)  # [M, n]

    def __call__(self, wanted, grad_s, grad_r, grad_d):
        m = len(self.xs)
        symmetric = (2 * (grad_s + grad_s.T)).to(self.dtype)
        if self.kernel == "linear":  # R = −D
            grad_r, grad_d = torch.zeros_like(grad_r), grad_d - grad_r
        grad_r, grad_d = grad_r.to(self.dtype), grad_d.to(self.dtype)
        item = self.q.element_size()
        limit = BACKWARD_BLOCK_BYTES if self.q.device.type == "cpu" else GPU_BACKWARD_BLOCK_BYTES
        step = max(64, limit // (item * m * max(1, self.n))) if self.dots is None else self.n
        parts: list[list[Tensor]] = [[] for _ in self.xs]
        for start in range(0, self.n, max(1, step)):
            rows = slice(start, min(start + step, self.n))
            dots = [self._dots(b, rows) for b in range(m)]  # [rows, n] each
            kernels = [self.slopes[b].value(dots[b], self.q[b][rows], self.q[b]) for b in range(m)]
            for a in range(m):
                if wanted[a]:
                    pull = self._pull(a, symmetric[a], kernels, grad_r[a], rows)
                    parts[a].append(self._gradient(a, pull, dots[a], kernels[a], grad_d[a], rows))
        return [self._finish(x, p) if p else None for x, p in zip(self.xs, parts, strict=True)]

    def _dots(self, b: int, rows: slice) -> Tensor:
        if self.dots is not None:
            return self.dots[b][rows]
        x = self.xs[b]
        return self.products.dots(x, x[rows], self.centre).T

    def _pull(self, a: int, symmetric: Tensor, kernels: list[Tensor], grad_r: Tensor, rows: slice) -> Tensor:
        """c [rows, n], zero where i = j."""
        pull = kernels[0] * symmetric[0]
        for b in range(1, len(kernels)):
            pull.addcmul_(kernels[b], symmetric[b])
        if self.kernel != "linear" or self.shifted:
            pull -= (symmetric * self.shift).sum()
        if self.kernel != "linear":
            pull.add_(grad_r[rows, None]).add_(grad_r)
        pull.diagonal(rows.start).zero_()
        return pull

    def _gradient(self, a: int, pull: Tensor, dots: Tensor, kernel: Tensor, grad_d: Tensor, rows: slice) -> Tensor:
        slopes, q, near = self.slopes[a], self.q[a], None
        weights = slopes.weights(pull, dots, kernel, q[rows], q)
        if self.kernel == "linear":
            weights, own = pull, 2 * grad_d[rows]
        elif self.kernel == "polynomial":
            own = 2 * slopes.weights(grad_d[rows], q[rows], q[rows], q[rows], q[rows])
        else:
            near = slopes.take_near(weights, pull, dots, kernel, q[rows], q)
            own = slopes.own(pull, weights, kernel, q[rows], 1)
        weights.diagonal(rows.start).copy_(own)  # Σ_j w_ij x_j + v_i x_i in one product
        grad = self.products.apply(weights, self.xs[a], self.centre)
        if near is not None:
            near.add_to(grad, None, self.xs[a][rows], self.xs[a])
        return grad

    def _finish(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        grad = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.kernel == "linear":
            grad -= _mean_row(grad)
        return grad.to(x.dtype)
