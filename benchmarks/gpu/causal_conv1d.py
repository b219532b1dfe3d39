"""GPU cases of family `causal_conv1d`. Peers: torch's grouped convolution followed by SiLU, and where importable the
package causal-conv1d and the Triton convolution of flash-linear-attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from pyrepr.benchmarks.causal_conv1d import grouped
from pyrepr.benchmarks.gpu import GpuCase, Problem
from torch import Tensor

import pyrepr
from pyrepr.reference import causal_conv1d as reference

# The interpreter's worst errors times 4.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 2e-3}
BF16 = {torch.bfloat16: TOLERANCE[torch.bfloat16]}
# (B, T, D) of the models' layers: q, k and v of 16, 32 and 64 heads of 128.
SHAPES = ((1, 8192, 6144), (8, 2048, 6144), (4, 4096, 12288))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of x [B, T, D]
    "channels": lambda x: x,
    "tokens": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: torch.cat([x[..., :3], x], 2)[..., 3:],
}


def _peer(module: str, name: str) -> Callable | None:
    """Whatever keeps it from being imported here, there is then no peer."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:
        return None


def _peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """x [B, D, T], weight [D, W] -> [B, D, T], with SiLU."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch conv1d + silu": lambda x, w: grouped(x, w, None)}
    package = _peer("causal_conv1d", "causal_conv1d_fn")
    if package:
        found["causal-conv1d"] = lambda x, w: package(x, w, None, activation="silu")
    linear = _peer("fla.modules.causal_conv1d", "causal_conv1d")
    if linear:
        found["flash-linear-attention"] = lambda x, w: linear(x.mT, w, activation="silu")[0].mT
    return found


def _inputs(device: torch.device, dtype: torch.dtype, seed: int, B: int, T: int, D: int, W: int) -> list[Tensor]:
    """x [B, T, D], weight [D, W], bias [D], initial states [B, D, W − 1], and a gradient [B, T, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((B, T, D), (D, W), (D,), (B, D, W - 1), (B, T, D))
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def _with_gradient(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    return run


def _problem(function: Callable, truth: Callable, inputs: list[Tensor], grad: Tensor | None) -> Problem:
    wide = [x.double() for x in inputs]
    if grad is None:
        return Problem(lambda: function(*inputs), lambda: truth(*wide))
    return Problem(_with_gradient(function, inputs, grad), _with_gradient(truth, wide, grad.double()))


def filled(layout: str, W: int, gradient: bool, weight: torch.dtype | None = None) -> Callable:
    """Awkward sizes: a row of channels that is no multiple of a block's, a part of a span; with states and a bias."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, *filters, initial, grad = _inputs(device, dtype, seed, 2, 72, 328, W)
        x, filters = LAYOUTS[layout](x), [f.to(weight or dtype) for f in filters]

        def ours(x: Tensor, w: Tensor, b: Tensor, initial: Tensor) -> Tensor:
            return pyrepr.causal_conv1d_fn(x.mT, w, b, initial_states=initial, activation="silu").mT

        def truth(x: Tensor, w: Tensor, b: Tensor, initial: Tensor) -> Tensor:
            return reference.causal_conv1d(x, w, b, initial, silu=True)

        return _problem(ours, truth, [x, *filters, initial], grad if gradient else None)

    return make


def packed(layout: str, W: int, gradient: bool, by: torch.dtype | None = None) -> Callable:
    """Sequences of no, one, two and many tokens, by cu_seqlens, and from states; or by seq_idx of a dtype."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, weight, bias, _, grad = _inputs(device, dtype, seed, 1, 144, 136, W)
        bounds = torch.tensor([0, 0, 64, 65, 67, 67, 144], device=device)
        states = torch.randn(6, 136, W - 1, generator=torch.Generator(device).manual_seed(seed), device=device)
        number = torch.bucketize(torch.arange(144, device=device), bounds[1:], right=True)[None]
        options = {"cu_seqlens": bounds} if by is None else {"seq_idx": number.to(by)}
        inputs = [LAYOUTS[layout](x), weight, bias, *([states.to(dtype)] if by is None else [])]

        def ours(x: Tensor, w: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
            return pyrepr.causal_conv1d_fn(x.mT, w, b, initial_states=initial, activation="silu", **options).mT

        def truth(x: Tensor, w: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
            return reference.causal_conv1d(x, w, b, initial, None, bounds, silu=True)

        return _problem(ours, truth, inputs, grad if gradient else None)

    return make


def layer(B: int, T: int, D: int, layout: str, gradient: bool) -> Callable:
    """What a layer does: four taps, no bias, SiLU."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, weight, _, _, grad = _inputs(device, dtype, seed, B, T, D, 4)
        inputs = [LAYOUTS[layout](x).mT, weight]

        def call(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
            return _with_gradient(function, tensors, grad.mT) if gradient else lambda: function(*tensors)

        def ours(x: Tensor, w: Tensor) -> Tensor:
            return pyrepr.causal_conv1d_fn(x, w, activation="silu")

        def truth(x: Tensor, w: Tensor) -> Tensor:
            return reference.causal_conv1d(x.mT, w, silu=True).mT

        return Problem(
            call(ours, inputs),
            lambda: call(truth, [t.double() for t in inputs])(),
            {name: call(peer, inputs) for name, peer in _peers().items()},
            flops=(25.0 + 45.0 * gradient) * B * T * D,
            bytes=float((2 + 3 * gradient) * B * T * D * dtype.itemsize),
        )

    return make


def decode(B: int, D: int, S: int, W: int = 4, T: int = 1, weight: torch.dtype | None = None) -> Callable:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, *filters, _, _ = _inputs(device, dtype, seed, B, T, D, W)
        taps, bias = (f.to(weight or dtype) for f in filters)
        generator = torch.Generator(device).manual_seed(seed + 100)
        state = torch.randn(B, D, S, generator=generator, device=device).to(dtype)

        def step(function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
            def run() -> list[Tensor]:
                moved = state.clone()  # inputs stay as they are
                with torch.no_grad():
                    out = function(x.mT, moved, taps, bias, "silu")
                return [out, moved]

            return run

        def truth() -> list[Tensor]:
            moved = state.double()
            out = reference.causal_conv1d_update_(moved, x.double(), taps.double(), bias.double(), True)
            return [out.mT, moved]

        package = _peer("causal_conv1d", "causal_conv1d_update")
        peers = {"causal-conv1d": step(package)} if package else {}
        size = float(B * D * dtype.itemsize * (4 * S + 2 * T))
        return Problem(step(pyrepr.causal_conv1d_update), truth, peers, flops=25.0 * B * T * D, bytes=size)

    return make


def _small() -> list[GpuCase]:
    """Every kernel, in every variant that the three dtypes reach."""
    found = []
    for op, gradient in (("convolution", False), ("convolution forward+backward", True)):
        for layout in LAYOUTS:
            shape = f"T=72 {layout}"
            found.append(GpuCase(op, shape, filled(layout, 4, gradient), TOLERANCE, graph=not gradient, sanitize=True))
            found.append(GpuCase(op, f"packed T=144 {layout}", packed(layout, 4, gradient), TOLERANCE, sanitize=True))
            mixed = filled(layout, 4, gradient, torch.float32)
            found.append(GpuCase(op, f"{shape} float32 weight", mixed, TOLERANCE))
        for W in (1, 3, 9):
            found.append(GpuCase(op, f"T=72 W={W}", filled("channels", W, gradient), TOLERANCE, sanitize=W == 3))
            found.append(GpuCase(op, f"packed T=144 W={W}", packed("tokens", W, gradient), TOLERANCE))
        for by, layout in ((torch.int32, "channels"), (torch.int64, "tokens"), (torch.int64, "slice")):
            name = f"seq_idx {str(by).removeprefix('torch.')} T=144 {layout}"
            found.append(GpuCase(op, name, packed(layout, 4, gradient, by), TOLERANCE, graph=not gradient))
        found.append(GpuCase(op, "T=1 D=1", single(gradient), TOLERANCE))
    found.append(
        GpuCase("decode, convolution", "B=2 D=200 S=4", decode(2, 200, 4), TOLERANCE, graph=True, sanitize=True)
    )
    mixed = decode(3, 200, 9, T=12, weight=torch.float32)
    found.append(GpuCase("decode, convolution", "B=3 D=200 S=9 T=12 float32 weight", mixed, TOLERANCE, sanitize=True))
    found.append(GpuCase("decode, convolution", "B=2 D=1 S=6 W=7", decode(2, 1, 6, 7), TOLERANCE))
    return found


def single(gradient: bool) -> Callable:
    """One token of one channel in a place of no alignment; every stride and size is one."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        wide = [x.flatten() for x in _inputs(device, dtype, seed, 1, 2, 2, 4)]
        inputs = [wide[0][1:2].view(1, 1, 1), wide[1][1:5].view(1, 4), wide[2][1:], wide[3][1:4].view(1, 1, 3)]

        def ours(x: Tensor, w: Tensor, b: Tensor, initial: Tensor) -> Tensor:
            return pyrepr.causal_conv1d_fn(x, w, b, initial_states=initial)

        def truth(x: Tensor, w: Tensor, b: Tensor, initial: Tensor) -> Tensor:
            return reference.causal_conv1d(x, w, b, initial)

        return _problem(ours, truth, inputs, wide[4][1:2].view(1, 1, 1) if gradient else None)

    return make


def cases() -> list[GpuCase]:
    found = _small()
    for op, gradient in (("convolution + SiLU", False), ("convolution + SiLU forward+backward", True)):
        for B, T, D in SHAPES:
            name = f"B={B} T={T} D={D} W=4"
            found.append(GpuCase(op, name, layer(B, T, D, "channels", gradient), BF16, timed=True))
        turned = layer(1, 8192, 6144, "tokens", gradient)
        found.append(GpuCase(op, "B=1 T=8192 D=6144 W=4 [B, D, T]", turned, BF16, timed=True))
    for B in (1, 64, 256):
        case = decode(B, 6144, 4)
        found.append(GpuCase("decode, convolution", f"B={B} D=6144 S=W=4", case, BF16, timed=True, graph=True))
    return found
