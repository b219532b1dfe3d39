"""The leaf op that sums products of features over samples: X_aᵀX_b of pairs of layers, added to float64 blocks.

All that streams stands on it (``pyrepr.stats.moments``, ``pyrepr.StreamingCKA``).
"""

from __future__ import annotations

from torch import Tensor

from pyrepr.backend import forced_backend
from pyrepr.ops._leaf import leaf_op
from pyrepr.ops.gram import matrix_op, native_problem
from pyrepr.reference import moments as reference


def _moments_fake(blocks, xs, pairs):
    return None


def _moments_cpu(blocks, xs, pairs):
    native_problem(xs, centre=False).moments(list(pairs), [block.data_ptr() for block in blocks])


def _moments_triton(blocks, xs, pairs):
    from pyrepr.kernels import gram as kernels

    kernels.moments_(blocks, xs, pairs)


moments_op_ = leaf_op(
    "gram_moments_(Tensor(a!)[] blocks, Tensor[] xs, int[] pairs) -> ()",
    fake=_moments_fake,
    reference=reference.gram_moments_,
    cpu=_moments_cpu,
    triton=_moments_triton,
)


def products_of(x: Tensor, y: Tensor) -> Tensor:
    """x yᵀ of x [m, k] and y [n, k], float64: the same bits for any number of threads, as torch's product has not.

    GPU kernels do not compute in float64: where they are asked for, and on GPUs, it is torch's product.
    """
    if not x.is_cpu or forced_backend() not in (None, "cpu", "reference"):
        return x @ y.T
    return matrix_op(x, y, x.new_ones(1), "linear", 1, 0.0, False)
