"""Statistics of one representation: moments over a stream, and what follows from them."""

from pyrepr.stats._layer_moments import LayerMoments

__all__ = ["LayerMoments"]
