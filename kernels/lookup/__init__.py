"""Family `lookup` in Triton; see ``_hosts``."""

from pyrepr.kernels.lookup._hosts import backward, converted, hash_backward, hashed, linear, sum
from pyrepr.kernels.lookup._variants import variants

__all__ = ["backward", "converted", "hash_backward", "hashed", "linear", "sum", "variants"]
