"""Family `delta_rule` in Triton; see ``_hosts``."""

from pyrepr.kernels.delta_rule._hosts import backward, forward, update_
from pyrepr.kernels.delta_rule._variants import representative_variants, variants

__all__ = ["backward", "forward", "representative_variants", "update_", "variants"]
