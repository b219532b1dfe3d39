"""Linear maps of signs: the functions. The layer made of them is :class:`pyrepr.nn.SignLinear`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrepr._checks import DTYPES, check_device, check_shape, check_tensor, name_of, shape_of
from pyrepr.functional.lookup import check_converted, check_hash
from pyrepr.ops import signs as ops
from pyrepr.reference.lookup import HASHES

__all__ = ["sign_linear"]


def sign_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    hash: str = "two_bit",
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    scales: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """A linear map of the signs of x, in place of a linear map of x: bias + (f · weightᵀ) · scales.

    f are the signs of z, ±1, and with two bits also sign(z) · sign(|z| − 1), so that four levels cut at 0 and ±1 stand
    for every element. z is x, or (x − centre) · scale where these are given. With `down` and `up` a dense map of low
    rank stands beside: inner = x · downᵀ, z = (x − inner · down − centre) · scale, and inner · up is added.

    It is what :func:`pyrepr.lookup_linear` computes (with weighting ``"none"``) where every table row is the sum of the
    weights of its code's features; as a product it takes a thirty-second of the memory with tables of 256 rows, and is
    faster than gathering from a few tokens on. int8 weights on the CPU are one native call, sums exact in 32 bits, by
    the processor's products of bytes where it has them; everything else is plain PyTorch.

    Args:
        x: [..., d], float32, float64, bfloat16 or float16. 0 counts as positive, ±inf as large; NaN anywhere in a row
            makes the row's result NaN.
        weight: [h, F], F = d with one bit and 2 d with two: of element i columns 2 i (its sign) and 2 i + 1. float32,
            bfloat16, float16, or int8 with `scales`; float64 for float64 x.
        bias: [h], optional.
        hash: ``"two_bit"`` (default) or ``"one_bit"``.
        centre, scale: [d], together: what standardises x.
        scales: [h] float32, what the rows of int8 weights are multiplied with. No derivative: to ask for one is an
            error. int8 weights have none either.
        down, up: [rank, d] and [rank, h], together: the dense part.

    Returns:
        [..., h] in the dtype of x. Differentiable in weight, bias, down and up, any number of times and in every mode;
        in x through the dense part alone, for a sign has no derivative.

    Raises:
        ValueError: for shapes that do not fit together, an unknown hash, or scales without int8 weights.
        TypeError: for dtypes that do not.

    Source: the start that :meth:`pyrepr.nn.LookupLinear.from_linear` fits; the levels of two bits are those of Max
    1960, "Quantizing for minimum distortion".

    Example:
        >>> pyrepr.functional.sign_linear(torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
        tensor([[-13.]])
    """
    out = ops.sign_linear_direct(x, weight, scales, bias, (centre, scale, down, up), hash)
    return _checked(x, weight, bias, hash, centre, scale, scales, down, up) if out is None else out


def _checked(x, weight, bias, hash, centre, scale, scales, down, up) -> Tensor:
    """What :func:`sign_linear` does where arguments have to be looked at, converted or differentiated."""
    x = check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., d], got {shape_of(x)}")
    check_hash(hash, 2)
    weight = check_tensor("weight", weight, (*DTYPES, torch.int8))
    features = x.shape[-1] * HASHES[hash]
    if weight.dim() != 2 or weight.shape[1] != features:
        raise ValueError(f"weight must have shape [h, F] with F = {features} for this x, got {shape_of(weight)}")
    check_device("weight", weight, "x", x)
    h = weight.shape[0]
    if (weight.dtype == torch.int8) != (scales is not None):
        came = "no scales" if scales is None else f"scales with {name_of(weight.dtype)} weights"
        raise ValueError(f"int8 weights, and only they, need scales of shape [h], got {came}")
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        came = f"{name_of(x.dtype)} and {name_of(weight.dtype)}"
        raise TypeError(f"x and weight must both be float64 or neither, got {came}")
    if scales is not None:
        check_shape("scales", check_tensor("scales", scales, (torch.float32,)), "[h]", (h,))
        check_device("scales", scales, "x", x)
    if bias is not None:
        check_shape("bias", check_tensor("bias", bias), "[h]", (h,))
        check_device("bias", bias, "x", x)
        if bias.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(f"bias must be float64 only where x is, got {name_of(x.dtype)} x")
    converted = check_converted(x, h, centre, scale, down, up)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return ops.sign_linear(rows, weight, scales, bias, converted, hash).reshape(*x.shape[:-1], h)
