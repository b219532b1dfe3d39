"""Cases of family `causal_conv1d`. Peers: torch's grouped convolution, and transformers' fallback, which calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyrepr.benchmarks.harness import Case, Workload, module_error
from torch import Tensor
from torch.nn import functional

import pyrepr
from pyrepr.reference import causal_conv1d as reference


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [B, D, T], weight: [D, W], bias: [D] -> [B, D, T], as one writes it in torch."""
    y = functional.conv1d(x, weight[:, None].to(x.dtype), bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return functional.silu(y[..., : x.shape[2]])


def _fallback(name: str) -> Callable | None:
    """A function of transformers' Qwen3-Next, where there is one."""
    if module_error("transformers", "transformers"):
        return None
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as module
    except ImportError:
        return None
    return getattr(module, name, None)


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return pyrepr.causal_conv1d_fn(x, weight, bias, activation="silu")


def _functions() -> dict[str, Callable[..., Tensor]]:
    functions = {"pyrepr": _ours, "torch conv1d + silu": grouped}
    fallback = _fallback("causal_conv1d_fn")
    if fallback:
        functions["transformers fallback"] = lambda x, w, b: fallback(x, w, b, activation="silu")
    return functions


def _inputs(B: int, D: int, T: int, dtype: torch.dtype, tokens_first: bool) -> tuple[Tensor, Tensor, None]:
    """x [B, D, T], which models give as a transposed [B, T, D], and weight [D, 4]; models have no bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator).mT
    weight = torch.randn(D, 4, generator=generator)
    return (x if tokens_first else x.contiguous()).to(dtype), weight.to(dtype), None


def _truth(x: Tensor, weight: Tensor, bias: None) -> Tensor:
    return reference.causal_conv1d(x.mT.double(), weight.double(), silu=True).mT


def _forward(B: int, D: int, T: int, dtype: torch.dtype = torch.float32, tokens_first: bool = True) -> Workload:
    inputs = _inputs(B, D, T, dtype, tokens_first)
    return Workload(
        {name: lambda f=f: f(*inputs) for name, f in _functions().items()},
        truth=lambda: _truth(*inputs),
        tolerance=1e-6 if dtype == torch.float32 else 8e-3,
        flops=25.0 * B * D * T,
        bytes=2 * B * D * T * dtype.itemsize,
    )


def _training(B: int, D: int, T: int) -> Workload:
    x, weight, _ = _inputs(B, D, T, torch.float32, True)
    outer = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).mT

    def step(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves, None)
        return out.detach(), *torch.autograd.grad(out, leaves, outer.to(out.dtype))

    return Workload(
        {name: lambda f=f: step(f, (x, weight)) for name, f in _functions().items()},
        truth=lambda: step(grouped, (x.double(), weight.double())),
        tolerance=2e-6,
        flops=70.0 * B * D * T,
        bytes=5 * B * D * T * 4,
    )


def _decoding(B: int, D: int) -> Workload:
    """One token. Every round starts from the same state."""
    x, weight, _ = _inputs(B, D, 1, torch.float32, True)
    start = torch.randn(B, D, 4, generator=torch.Generator().manual_seed(2))
    state = start.clone()
    functions = {"pyrepr": pyrepr.causal_conv1d_update}
    fallback = _fallback("causal_conv1d_update")
    if fallback:
        functions["transformers fallback"] = fallback

    def step(function: Callable[..., Tensor]) -> Tensor:
        state.copy_(start)
        with torch.no_grad():
            return function(x, state, weight, None, "silu")

    def truth() -> Tensor:
        return _truth(torch.cat([start[..., 1:], x], -1), weight, None)[..., 3:]

    return Workload({n: lambda f=f: step(f) for n, f in functions.items()}, truth, 1e-6, bytes=8 * B * D * 4)


def cases() -> list[Case]:
    """All cases of the family, small ones first."""
    shape = "B=1 D=6144 T=2048 W=4"
    return [
        Case("decode, convolution", "B=1 D=6144 W=4", lambda: _decoding(1, 6144), quick=True),
        Case("convolution + SiLU", shape, lambda: _forward(1, 6144, 2048), quick=True),
        Case("convolution + SiLU", f"{shape} contiguous", lambda: _forward(1, 6144, 2048, tokens_first=False)),
        Case("convolution + SiLU, bf16", shape, lambda: _forward(1, 6144, 2048, torch.bfloat16)),
        Case("convolution + SiLU", "B=8 D=1024 T=512 W=4", lambda: _forward(8, 1024, 512)),
        Case("convolution + SiLU forward+backward", "B=1 D=2048 T=2048 W=4", lambda: _training(1, 2048, 2048)),
    ]
