"""Drop-in modules."""

from pyrepr.nn.contrastive import ClipLoss, MatryoshkaLoss
from pyrepr.nn.delta_cache import DeltaCache
from pyrepr.nn.delta_product import GatedDeltaProduct
from pyrepr.nn.delta_rule import DeltaNet, GatedDeltaNet, KimiDeltaAttention, ShortConvolution
from pyrepr.nn.gla import GLA
from pyrepr.nn.gram import CKALoss
from pyrepr.nn.lookup import LookupLinear
from pyrepr.nn.memoryformer import LookupQKV, MemoryFormerBlock, MemoryFormerMLP
from pyrepr.nn.norm import FusedRMSNormGated

__all__ = [
    "GLA",
    "CKALoss",
    "ClipLoss",
    "DeltaCache",
    "DeltaNet",
    "FusedRMSNormGated",
    "GatedDeltaNet",
    "GatedDeltaProduct",
    "KimiDeltaAttention",
    "LookupLinear",
    "LookupQKV",
    "MatryoshkaLoss",
    "MemoryFormerBlock",
    "MemoryFormerMLP",
    "ShortConvolution",
]
