"""Statistics of one representation: moments over a stream, and what follows from them."""

from pyrepr.stats.collapse import NeuralCollapse, neural_collapse
from pyrepr.stats.moments import PCA, LayerMoments, Moments, Ridge
from pyrepr.stats.probes import ConceptDepth, Probe, concept_depth, linear_probe, v_information
from pyrepr.stats.spectra import effective_rank, mean_cosine

__all__ = [
    "PCA",
    "ConceptDepth",
    "LayerMoments",
    "Moments",
    "NeuralCollapse",
    "Probe",
    "Ridge",
    "concept_depth",
    "effective_rank",
    "linear_probe",
    "mean_cosine",
    "neural_collapse",
    "v_information",
]
