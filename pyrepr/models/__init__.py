"""Whole models: comparing two of them, probing and converting their layers, distilling."""

from pyrepr.models._layers import Layer
from pyrepr.models.callback import ComparisonCallback
from pyrepr.models.comparison import Comparison, compare
from pyrepr.models.conversion import Conversion, convert
from pyrepr.models.distillation import Distillation, distill
from pyrepr.models.persistence import load_converted, save_converted
from pyrepr.models.probing import probe

__all__ = [
    "Comparison",
    "ComparisonCallback",
    "Conversion",
    "Distillation",
    "Layer",
    "compare",
    "convert",
    "distill",
    "load_converted",
    "probe",
    "save_converted",
]
