"""Drop-in modules."""

from pyrepr.nn.contrastive import ClipLoss, MatryoshkaLoss
from pyrepr.nn.delta_cache import DeltaCache
from pyrepr.nn.delta_product import GatedDeltaProduct
from pyrepr.nn.delta_rule import DeltaNet, GatedDeltaNet, KimiDeltaAttention, ShortConvolution
from pyrepr.nn.gla import GLA
from pyrepr.nn.gram import CKALoss
from pyrepr.nn.linear_plus import LinearPlus
from pyrepr.nn.lookup import LookupLinear
from pyrepr.nn.memory import ProductKeyMemory
from pyrepr.nn.memoryformer import LookupQKV, MemoryFormerBlock, MemoryFormerMLP
from pyrepr.nn.norm import FusedRMSNormGated
from pyrepr.nn.sign_linear import SignLinear

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
    "LinearPlus",
    "LookupLinear",
    "LookupQKV",
    "MatryoshkaLoss",
    "MemoryFormerBlock",
    "MemoryFormerMLP",
    "ProductKeyMemory",
    "ShortConvolution",
    "SignLinear",
]
