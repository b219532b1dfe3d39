"""Checks of the tensors that measures take. Each failure is one sentence: argument, expectation, what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrepr._checks import check_device, check_shape, check_tensor, shape_of

ESTIMATORS = ("unbiased", "biased")


def check_layer(name: str, x: object) -> Tensor:
    """x as a [n, d] tensor of a dtype the kernels take."""
    x = check_tensor(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [n, d], got {shape_of(x)}; flatten samples and features first")
    return x


def check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be 'unbiased' or 'biased', got {estimator!r}")


def check_layers(names: Sequence[str], xs: Sequence[object]) -> list[Tensor]:
    """All layers [n, d_l] with one n, dtype and device. Under autocast, mixed dtypes become the widest of them."""
    layers = [check_layer(name, x) for name, x in zip(names, xs, strict=True)]
    first = layers[0]
    for name, x in zip(names, layers, strict=True):
        check_device(name, x, names[0], first)
        if x.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name} must have the n of {names[0]}, {first.shape[0]} samples, got {x.shape[0]}; row i of every "
                "layer belongs to the same sample"
            )
    if any(x.dtype != first.dtype for x in layers):
        if not torch.is_autocast_enabled(first.device.type):
            name, x = next((name, x) for name, x in zip(names, layers, strict=True) if x.dtype != first.dtype)
            raise TypeError(f"{name} must have the dtype of {names[0]}, {first.dtype}, got {x.dtype}")
        widest = first.dtype
        for x in layers:
            widest = torch.promote_types(widest, x.dtype)
        layers = [x.to(widest) for x in layers]
    return layers


def check_mask(mask: object, n: int, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
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
