"""Drop-in modules."""

from pyrepr.nn.delta_rule import DeltaCache, DeltaNet, GatedDeltaNet, KimiDeltaAttention, ShortConvolution
from pyrepr.nn.gram import CKALoss
from pyrepr.nn.lookup import LookupLinear
from pyrepr.nn.memoryformer import LookupQKV, MemoryFormerBlock, MemoryFormerMLP

__all__ = [
    "CKALoss",
    "DeltaCache",
    "DeltaNet",
    "GatedDeltaNet",
    "KimiDeltaAttention",
    "LookupLinear",
    "LookupQKV",
    "MemoryFormerBlock",
    "MemoryFormerMLP",
    "ShortConvolution",
]
