"""Family `gram`: the one differentiable function on its leaf ops, :func:`gram_stats`, and its derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrepr.backend import triton_interprets
from pyrepr.ops.gram import apply_op, matrix_op, stats_op
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.gram import SHIFT_INVARIANT

# Rows of the block of kernel matrices that the backward recomputes at a time: all layers' blocks in this many bytes.
BACKWARD_BLOCK_BYTES = 32 << 20
GPU_BACKWARD_BLOCK_BYTES = 256 << 20  # every block packs its layer again (kernels/gram)


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


class _GramStats(torch.autograd.Function):
    """(S, R, D, shift) of M layers, with the derivative of the first three; the shift counts as a constant."""

    @staticmethod
    def forward(mask, scale, kernel, degree, coef0, by_features, split, keep_dots, *xs):
        return stats_op(list(xs), mask, scale, kernel, degree, coef0, by_features, split, keep_dots)

    @staticmethod
    def setup_context(ctx, inputs, output):
        mask, scale, kernel, degree, coef0, by_features, split, keep_dots, *xs = inputs
        _, _, d, shift, dots = output
        ctx.options = (kernel, degree, coef0, by_features, split, keep_dots)
        ctx.mark_non_differentiable(shift, dots)
        ctx.set_materialize_grads(True)
        ctx.save_for_backward(mask, scale, d, shift, dots, *xs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_s, grad_r, grad_d, _shift, _dots):
        mask, scale, d, shift, dots, *xs = ctx.saved_tensors
        kernel, degree, coef0, by_features, split, keep_dots = ctx.options
        wanted = ctx.needs_input_grad[8:]
        if mask is not None:
            rows = mask.nonzero()[:, 0]
            xs, full = [x[rows] for x in xs], xs
            d, grad_r, grad_d = d[:, rows], grad_r[:, rows], grad_d[:, rows]
        if by_features:
            pairs = layer_pairs(len(xs), split)
            grads = _features_backward(xs, d, pairs, wanted, grad_s, grad_d - grad_r)
        else:
            backward = _TilesBackward(xs, scale, kernel, degree, coef0, d, shift, dots if keep_dots else None)
            grads = backward(wanted, grad_s, grad_r, grad_d)
        if mask is not None:
            grads = [
                g if g is None else torch.zeros_like(x).index_copy_(0, rows, g)
                for g, x in zip(grads, full, strict=True)
            ]
        return (None,) * 8 + tuple(grads)


def layer_pairs(m: int, split: int) -> list[tuple[int, int]]:
    """The pairs a ≤ b whose S is wanted: all of them, or with `split` the cross pairs and the diagonal."""
    return [(a, b) for a in range(m) for b in range(a, m) if a == b or not split or a < split <= b]


def _times(a: Tensor, b: Tensor, x: Tensor | None = None) -> Tensor:
    """a @ b, where b may be what centring x gave. On the CPU by torch; on a GPU by the op, whose kernels get float32's
    accuracy out of tensor cores, and take a narrow x as it is."""
    if a.device.type == "cpu" and not triton_interprets():
        return a @ b
    return apply_op(a, b, False) if x is None else apply_op(a, x, True)


def _features_backward(xs, d, pairs, wanted, grad_s, grad_q):
    """Linear kernel: S_ab = ‖X_aᵀX_b‖² − q_a·q_b gives dX_a = Σ_b 2 (g_ab + g_ba) [X_b (X_bᵀX_a) − diag(q_b) X_a].

    Everything here has the size of the inputs (n > D on this route), so plain matrix products do.
    """
    dtype = compute_dtype(xs[0].dtype)
    centred = [x.to(dtype) - x.mean(0, dtype=torch.float64).to(dtype) for x in xs]
    symmetric = grad_s + grad_s.T
    diagonal = 2 * grad_q
    grads: list[Tensor | None] = [None] * len(xs)
    for a, b in pairs:
        product = _times(centred[b].T, centred[a], xs[a])  # [d_b, d_a]
        for left, right, cross in ((a, b, product), (b, a, product.T))[: 1 if a == b else 2]:
            if wanted[left]:
                weight = 2 * symmetric[left, right]
                part, so_far = _times(centred[right], cross * weight.to(dtype)), grads[left]
                grads[left] = part if so_far is None else so_far.add_(part)
                diagonal[left] -= weight * d[right]
    for a, grad in enumerate(grads):
        if grad is not None:
            grad += diagonal[a].to(dtype)[:, None] * centred[a]
            grads[a] = (grad - grad.mean(0)).to(xs[a].dtype)
    return grads


class _TilesBackward:
    """Any kernel: block by block of rows, recompute the kernel matrices (unless the inner products were kept), and
    multiply the weight of every pair with the rows it pulls on. Never more than a block of rows × n of any layer.

    With F the result and k_a symmetric,
    c_ij = dF/dk_a(i, j) + dF/dk_a(j, i) = 2 Σ_b (g_ab + g_ba) k_b(i, j) + r_i + r_j.
    Every kernel here depends on a pair by ⟨x_i, x_j⟩ and the norms, so dF/dx_i = Σ_j w_ij x_j + v_i x_i.
    """

    def __init__(self, xs, scale, kernel, degree, coef0, d, shift, dots):
        self.xs, self.kernel, self.degree, self.coef0, self.d, self.dots = xs, kernel, degree, coef0, d, dots
        self.dtype = compute_dtype(xs[0].dtype)
        self.centre = kernel in SHIFT_INVARIANT
        self.n = xs[0].shape[0]
        self.scale, self.shift = scale.to(self.dtype), shift.to(self.dtype)
        self.none = scale.new_ones(1)
        if kernel == "linear":
            self.q = d
        elif dots is not None:
            self.q = dots.diagonal(dim1=1, dim2=2)
        else:
            self.q = torch.stack([_row_norms(x, self.centre) for x in xs])
        self.q = self.q.to(self.dtype)  # [M, n] squared norms of the (centred) rows

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
            kernels = [self._kernel(b, dots[b], rows) for b in range(m)]
            for a in range(m):
                if wanted[a]:
                    pull = self._pull(a, symmetric[a], kernels, grad_r[a], rows)
                    parts[a].append(self._gradient(a, pull, dots[a], kernels[a], grad_d[a], rows))
        return [self._finish(x, p) if p else None for x, p in zip(self.xs, parts, strict=True)]

    def _dots(self, b: int, rows: slice) -> Tensor:
        if self.dots is not None:
            return self.dots[b][rows]
        x = self.xs[b]
        return matrix_op(x, x[rows], self.none, "linear", 1, 0.0, self.centre).T

    def _distance(self, b: int, dots: Tensor, rows: slice) -> Tensor:
        return (self.q[b][rows, None] + self.q[b][None, :] - 2 * dots).clamp_min_(0)

    def _inverse_norm(self, b: int) -> Tensor:
        return torch.where(self.q[b] == 0, 0, self.q[b].rsqrt())

    def _kernel(self, b: int, dots: Tensor, rows: slice) -> Tensor:
        """k_b of these rows, without the shift."""
        if self.kernel == "linear":
            return dots
        if self.kernel == "rbf":
            return self._distance(b, dots, rows).mul_(-1 / (2 * self.scale[b] ** 2)).exp_()
        if self.kernel == "laplacian":
            return self._distance(b, dots, rows).sqrt_().mul_(-1 / self.scale[b]).exp_()
        if self.kernel == "polynomial":
            return (self.scale[b] * dots + self.coef0) ** self.degree
        inverse = self._inverse_norm(b)
        return dots * inverse[rows, None] * inverse

    def _pull(self, a: int, symmetric: Tensor, kernels: list[Tensor], grad_r: Tensor, rows: slice) -> Tensor:
        """c [rows, n], zero where i = j."""
        pull = kernels[0] * symmetric[0]
        for b in range(1, len(kernels)):
            pull.addcmul_(kernels[b], symmetric[b])
        if self.kernel != "linear":
            pull -= (symmetric * self.shift).sum()
            pull += grad_r[rows, None] + grad_r
        pull.diagonal(rows.start).zero_()
        return pull

    def _gradient(self, a: int, pull: Tensor, dots: Tensor, kernel: Tensor, grad_d: Tensor, rows: slice) -> Tensor:
        x = self.xs[a]
        if self.kernel == "linear":
            weights, own = pull, 2 * grad_d[rows]
        elif self.kernel == "polynomial":
            slope = self.degree * self.scale[a]
            weights = pull * slope * (self.scale[a] * dots + self.coef0) ** (self.degree - 1)
            own = 2 * grad_d[rows] * slope * (self.scale[a] * self.q[a][rows] + self.coef0) ** (self.degree - 1)
        elif self.kernel == "cosine":
            inverse = self._inverse_norm(a)
            weights = pull * inverse[rows, None] * inverse
            own = -(pull * kernel).sum(1) * inverse[rows] ** 2
        else:
            if self.kernel == "rbf":
                weights = pull * kernel / self.scale[a] ** 2
            else:
                distance = self._distance(a, dots, rows).sqrt_()
                weights = torch.where(distance > 0, pull * kernel / (self.scale[a] * distance), 0)
            own = -weights.sum(1)
        weights.diagonal(rows.start).copy_(own)  # Σ_j w_ij x_j + v_i x_i in one product
        return apply_op(weights, x, self.centre)

    def _finish(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        grad = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.kernel == "linear":
            grad -= grad.mean(0)
        return grad.to(x.dtype)


def _row_norms(x: Tensor, centre: bool) -> Tensor:
    x = x.double()
    if centre:
        x = x - x.mean(0)
    return x.square().sum(1)


def gram_stats(
    xs: Sequence[Tensor],
    mask: Tensor | None,
    scale: Tensor,
    kernel: str,
    degree: int = 1,
    coef0: float = 0.0,
    split: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S, R, D and shift (see ``gram.py``), differentiable in every layer by S, R and D.

    Args:
        xs: M layers, [n, d_l] each, of one floating dtype and device.
        mask: [n] bool, the rows that count; R and D are 0 elsewhere. ``None`` counts all.
        scale: [M] float64; σ of rbf and laplacian, γ of polynomial, unused otherwise.
        kernel: one of :data:`KERNELS`; ``degree`` and ``coef0`` belong to ``"polynomial"``.
        split: if positive, only S of (a < split, b ≥ split) and (a, a) is wanted; others may be NaN.
    """
    n = xs[0].shape[0]
    widths = [x.shape[1] for x in xs]
    gram, features = route_costs(n, widths, split)
    by_features = kernel == "linear" and features < gram
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
        return stats_op(list(xs), mask, scale, kernel, degree, coef0, by_features, split, False)[:4]
    # The inner products save the backward a recomputation; kept where they are no larger than the inputs.
    keep_dots = not by_features and mask is None and len(xs) * n <= sum(widths)
    s, r, d, shift, _ = _GramStats.apply(mask, scale, kernel, degree, coef0, by_features, split, keep_dots, *xs)
    return s, r, d, shift
