"""Linear maps of signs: the leaf op of int8 weights. Those of floating point are plain PyTorch.

Tokens are flattened to T rows here: x [T, d], weight [h, F], out [T, h]. The maths is in ``csrc/cpu/lookup_signs.h``
and ``pyrepr/reference/signs.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr.ops._differentiable import SHARED, Derivative, Fold
from pyrepr.ops._leaf import leaf_op
from pyrepr.ops._native import DTYPE_CODES, direct, matrix, module, optional
from pyrepr.ops.lookup import rows_contiguous, wide
from pyrepr.reference import signs as reference
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.reference.lookup import HASHES, without_low_rank


def _fake(x, weight, *_):
    return x.new_empty(x.shape[0], weight.shape[0])


def _cpu(x, weight, scales, bias, centre, scale, down, up, hash):
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    x, weight, scales = rows_contiguous(x), weight.contiguous(), scales.contiguous()
    bias, centre, scale, down, up = (wide(t, torch.float32) for t in (bias, centre, scale, down, up))
    module().sign_linear(
        matrix(x),
        DTYPE_CODES[x.dtype],
        weight.data_ptr(),
        weight.shape[0],
        optional("scales", scales),
        optional("bias", bias),
        HASHES[hash],
        optional("centre", centre),
        optional("scale", scale),
        optional("down", down),
        optional("up", up),
        0 if down is None else down.shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(x.dtype)


def _backward(args, kept, grads, wanted):
    """The signs have no derivative: x reaches the result through the dense part, inner · up."""
    x, _, _, bias, _, _, down, up, _ = args
    (grad,), (want_x, _, _, want_bias, _, _, want_down, want_up) = grads, wanted
    dtype = compute_dtype(x.dtype)
    grad = grad.to(dtype)
    grad_x = grad_down = grad_up = None
    if down is not None:
        grad_inner = grad @ up.to(dtype).T
        if want_x:
            grad_x = (grad_inner @ down.to(dtype)).to(x.dtype)
        if want_down:
            grad_down = (grad_inner.T @ x.to(dtype)).to(down.dtype)
        if want_up:
            _, inner = without_low_rank(x, down)
            grad_up = (inner.T @ grad).to(up.dtype)
    elif want_x:
        grad_x = torch.zeros_like(x)
    return grad_x, None, None, grad.sum(0).to(bias.dtype) if want_bias else None, None, None, grad_down, grad_up


sign_op = leaf_op(
    "sign_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, Tensor? centre, Tensor? scale, Tensor? down, "
    "Tensor? up, str hash) -> Tensor",
    fake=_fake,
    derivative=Derivative(
        reference=lambda args, kept: (reference.sign_op(*args),),
        backward=_backward,
        fixed=("scales", "centre", "scale"),
        fold=Fold((0, *[SHARED] * 7), (0,)),
    ),
    reference=reference.sign_op,
    cpu=_cpu,
)


def sign_linear_direct(
    x: Tensor,  # [..., d]
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    converted: tuple[Tensor | None, ...],
    hash: str,
) -> Tensor | None:
    """[..., h] of unchecked arguments in one native call, or ``None``: see `direct`."""
    native = direct()
    if native is None or scales is None or type(hash) is not str:
        return None
    kind, grad, threads = HASHES.get(hash, 0), torch.is_grad_enabled(), torch.get_num_threads()
    out = native.sign_linear_direct(x, weight, scales, bias, converted, kind, grad, threads)
    return out if out is None or out.dtype is x.dtype else out.to(x.dtype)


def sign_linear(
    x: Tensor,  # [T, d]
    weight: Tensor,  # [h, F]
    scales: Tensor | None,  # [h] float32, for int8 weights
    bias: Tensor | None,  # [h]
    converted: tuple[Tensor | None, ...],  # centre, scale [d], down [r, d], up [r, h]
    hash: str,
) -> Tensor:
    """Checked arguments to [T, h] in the dtype of x; differentiable in weight, bias, down and up, in x by those two."""
    run = sign_op if weight.dtype == torch.int8 else reference.sign_op
    return run(x, weight, scales, bias, *converted, hash)
