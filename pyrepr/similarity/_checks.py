"""Checks of the tensors that measures take. Each failure is one sentence: argument, expectation, what came."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr._checks import check_layer, check_layers, check_shape, shown

__all__ = [
    "ESTIMATORS",
    "check_count",
    "check_estimator",
    "check_groups_alone",
    "check_layer",
    "check_layers",
    "check_mask",
]

ESTIMATORS = ("unbiased", "biased")


def check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be 'unbiased' or 'biased', got {shown(estimator)}")


def check_groups_alone(groups: object, return_stderr: bool) -> None:
    if groups is not None and not return_stderr:
        raise ValueError("groups must come with return_stderr=True, which alone reads them, got groups without it")


def check_mask(mask: object, n: int, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout is not torch.strided:
        came = f"{mask.dtype}, {mask.layout}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor of shape [n], got {came}")
    check_shape("mask", mask, "[n]", (n,))
    if mask.device != device:
        raise ValueError(f"mask must be on the device of x, {device}, got {mask.device}")
    return mask


def check_count(n: int, estimator: str, where: str = "x") -> None:
    """The unbiased estimator divides by n − 3, the biased one by n − 1."""
    least = 4 if estimator == "unbiased" else 2
    if n < least:
        raise ValueError(f"{where} must have at least {least} samples for the {estimator} estimator, got {n}")
