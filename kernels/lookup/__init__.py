"""Family `lookup` in Triton; see ``_hosts``."""

from pyrepr.kernels.lookup._hosts import backward, hash, hash_backward, linear, sum
from pyrepr.kernels.lookup._variants import variants

__all__ = ["backward", "hash", "hash_backward", "linear", "sum", "variants"]
