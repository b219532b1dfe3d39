"""Drop-in modules."""

from pyrepr.nn.gram import CKALoss
from pyrepr.nn.lookup import LookupLinear, LookupQKV, MemoryFormerBlock, MemoryFormerMLP

__all__ = ["CKALoss", "LookupLinear", "LookupQKV", "MemoryFormerBlock", "MemoryFormerMLP"]
