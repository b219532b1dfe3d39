"""Measures of similarity between representations."""

from pyrepr.similarity.kernels import Kernel
from pyrepr.similarity.measures import DegenerateInputWarning, choose_route, cka, cka_matrix, gram, hsic
from pyrepr.similarity.streaming import StreamingCKA

__all__ = ["DegenerateInputWarning", "Kernel", "StreamingCKA", "choose_route", "cka", "cka_matrix", "gram", "hsic"]
