"""Measures of similarity between representations."""

from pyrepr.similarity._cka import CKA
from pyrepr.similarity._protocol import MEASURES, Measure, as_measure
from pyrepr.similarity.alignment import CCA, LinearRegression, Procrustes, UnitMatch, match_units
from pyrepr.similarity.geometry import (
    RSA,
    DistanceCorrelation,
    RelativeCosine,
    geotopological,
    rdm,
    relative_representation,
    rsa,
)
from pyrepr.similarity.kernels import Kernel
from pyrepr.similarity.measures import DegenerateInputWarning, choose_route, cka, cka_matrix, gram, hsic
from pyrepr.similarity.neighbours import CKNNA, JaccardKNN, MutualKNN, cknna, mutual_knn
from pyrepr.similarity.streaming import StreamingCKA

__all__ = [
    "CCA",
    "CKA",
    "CKNNA",
    "MEASURES",
    "RSA",
    "DegenerateInputWarning",
    "DistanceCorrelation",
    "JaccardKNN",
    "Kernel",
    "LinearRegression",
    "Measure",
    "MutualKNN",
    "Procrustes",
    "RelativeCosine",
    "StreamingCKA",
    "UnitMatch",
    "as_measure",
    "choose_route",
    "cka",
    "cka_matrix",
    "cknna",
    "geotopological",
    "gram",
    "hsic",
    "match_units",
    "mutual_knn",
    "rdm",
    "relative_representation",
    "rsa",
]
