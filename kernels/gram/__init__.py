"""Family `gram` in Triton; see ``_hosts``."""

from pyrepr.kernels.gram._cka import cka
from pyrepr.kernels.gram._hosts import apply, matrix, median, moments_, stats
from pyrepr.kernels.gram._variants import variants

__all__ = ["apply", "cka", "matrix", "median", "moments_", "stats", "variants"]
