"""Family `pairs` in Triton; see ``_hosts``."""

from pyrepr.kernels.pairs._hosts import logsumexp, logsumexp_backward, topk
from pyrepr.kernels.pairs._variants import variants

__all__ = ["logsumexp", "logsumexp_backward", "topk", "variants"]
