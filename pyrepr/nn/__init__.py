"""Drop-in modules."""

from pyrepr.nn.gram import CKALoss

__all__ = ["CKALoss"]
