"""Family `causal_conv1d` in Triton; see ``_hosts``."""

from pyrepr.kernels.causal_conv1d._hosts import backward, forward, update_
from pyrepr.kernels.causal_conv1d._variants import variants

__all__ = ["backward", "forward", "update_", "variants"]
