"""The dtype that all families compute in."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products and sums are accumulated in, and states are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
