"""Family `causal_conv1d`: the leaf ops, their implementations, and the differentiable function on top.

Layout in this room: tokens before channels, x [B, T, D] with any strides; results are contiguous, so that a row of
channels can be cut into heads without a copy. Maths in ``csrc/cpu/causal_conv1d.h``.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from pyrepr.ops._differentiable import SHARED, Derivative, Fold
from pyrepr.ops._leaf import leaf_op
from pyrepr.ops._native import DTYPE_CODES, apart, direct, module, optional
from pyrepr.reference import causal_conv1d as reference
from pyrepr.reference._dtypes import compute_dtype


class _Problem:
    """What every native function takes, and the tensors that must live while it runs."""

    def __init__(self, x, weight, bias, initial_states, bounds, silu):
        narrow = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
        filter_dtype = x.dtype if narrow else torch.float32
        weight = weight.to(filter_dtype).contiguous()
        bias = None if bias is None else bias.to(filter_dtype).contiguous()
        if initial_states is not None:
            initial_states = initial_states.to(x.dtype).contiguous()
        self.tensors = (x, weight, bias, initial_states)
        self.native = module().CausalConv(
            [
                x.data_ptr(),
                weight.data_ptr(),
                optional("bias", bias),
                optional("initial_states", initial_states),
            ],
            x.stride(),
            (*x.shape, weight.shape[1]),
            DTYPE_CODES[x.dtype],
            DTYPE_CODES[filter_dtype],
            bounds,
            silu,
            torch.get_num_threads(),
        )


def _triton(function: str):
    """A Triton implementation by name, imported when it is first called."""

    def run(*args):
        return getattr(importlib.import_module("pyrepr.kernels.causal_conv1d"), function)(*args)

    return run


def _forward_fake(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu):
    return x.new_empty(x.shape)


def _forward_reference(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu):
    return reference.causal_conv1d(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu)


def _forward_cpu(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu):
    if x.dtype == torch.float64:
        return _forward_reference(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu)
    out = x.new_empty(x.shape)
    problem = _Problem(x, weight, bias, initial_states, reference.bounds_of(x, seq_idx, cu_seqlens), silu)
    problem.native.forward(out.data_ptr())
    return out


def _backward(args, kept, grads, wanted):
    found = backward_op(*args[:-1], *grads, args[-1])
    return (*(x if want else None for x, want in zip(found, wanted, strict=False)), None, None)


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, "

forward_op = leaf_op(
    f"causal_conv1d_forward({_INPUTS}bool silu) -> Tensor",
    fake=_forward_fake,
    derivative=Derivative(
        reference=lambda args, kept: (_forward_reference(*args),),
        backward=_backward,
        fold=Fold((-1, 0, 0, 1, SHARED, SHARED), (-1,)),
    ),
    reference=_forward_reference,
    cpu=_forward_cpu,
    triton=_triton("forward"),
)


def _backward_fake(x, weight, bias, initial_states, seq_idx, cu_seqlens, grad, silu):
    empty = x.new_empty(0, dtype=compute_dtype(x.dtype))
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        empty if bias is None else bias.new_empty(bias.shape),
        torch.empty_like(empty) if initial_states is None else initial_states.new_empty(initial_states.shape),
    )


def _backward_cpu(x, weight, bias, initial_states, seq_idx, cu_seqlens, grad, silu):
    if x.dtype == torch.float64:
        return reference.causal_conv1d_backward(x, weight, bias, initial_states, seq_idx, cu_seqlens, grad, silu)
    dx, dweight, dbias, dinitial = _backward_fake(x, weight, bias, initial_states, seq_idx, cu_seqlens, grad, silu)
    bounds = reference.bounds_of(x, seq_idx, cu_seqlens)
    problem = _Problem(x, weight, bias, initial_states, bounds, silu)
    grad = grad.to(x.dtype).contiguous()
    sums = [dweight, dbias, dinitial]
    wide = [t.new_zeros(t.shape, dtype=torch.float32) for t in sums]
    addresses = [0 if t.numel() == 0 else t.data_ptr() for t in wide]
    problem.native.backward(grad.data_ptr(), dx.data_ptr(), *addresses)
    return (dx, *(t.to(narrow.dtype) for t, narrow in zip(wide, sums, strict=True)))


backward_op = leaf_op(
    f"causal_conv1d_backward({_INPUTS}Tensor grad, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    reference=reference.causal_conv1d_backward,
    cpu=_backward_cpu,
    triton=_triton("backward"),
)


def _update_fake(conv_state, x, weight, bias, silu):
    return x.new_empty(x.shape)


def _update_cpu(conv_state, x, weight, bias, silu):
    if x.dtype == torch.float64:
        return reference.causal_conv1d_update_(conv_state, x, weight, bias, silu)
    out = x.new_empty(x.shape)
    x, weight, bias = apart(conv_state, x, weight, bias)
    problem = _Problem(x, weight, bias, None, reference.bounds_of(x, None, None), silu)
    layout = (*conv_state.stride(), conv_state.shape[2])
    return (out, problem.native.update(conv_state.data_ptr(), layout, out.data_ptr()))[0]


update_op_ = leaf_op(
    "causal_conv1d_update_(Tensor(a!) conv_state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    fake=_update_fake,
    reference=reference.causal_conv1d_update_,
    cpu=_update_cpu,
    triton=_triton("update_"),
)


def step(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor | None:
    """Unchecked arguments, x [B, D] or [B, D, T], in one native call, or ``None``: see `direct`."""
    native = direct()
    if native is None:
        return None
    return native.causal_conv1d_step(
        x, conv_state, weight, bias, silu, torch.is_grad_enabled(), torch.get_num_threads()
    )


def causal_conv1d(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D, W]
    bias: Tensor | None,  # [D]
    initial_states: Tensor | None,  # [N, D, W - 1]
    seq_idx: Tensor | None,  # [B, T]
    cu_seqlens: Tensor | None,  # [N + 1]
    silu: bool,
) -> Tensor:  # [B, T, D]
    """The convolution, differentiable in every floating input; the public function checks the arguments."""
    return forward_op(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu)
