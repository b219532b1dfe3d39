"""Statistics of one representation: moments over a stream, and what follows from them."""

from pyrepr.stats.moments import PCA, LayerMoments, Moments, Ridge

__all__ = ["PCA", "LayerMoments", "Moments", "Ridge"]
