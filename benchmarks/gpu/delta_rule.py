"""GPU cases of family `delta_rule`. Peer: flash-linear-attention, where it is importable."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from pyrepr.benchmarks.delta_rule import plain_chunks
from pyrepr.benchmarks.gpu import GpuCase, Problem
from torch import Tensor
from torch.nn.functional import normalize

import pyrepr
from pyrepr.reference import delta_rule as reference

RULES = {"plain": "delta_rule", "gated": "gated_delta_rule", "kda": "kda"}
# The interpreter's worst errors times 4.
FORWARD = {torch.float32: 4e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 8e-3}
# (B, T, H), K = V = 128.
SHAPES = ((1, 8192, 8), (1, 32768, 8), (8, 2048, 16), (4, 4096, 64))


def _inputs(
    device: torch.device, dtype: torch.dtype, seed: int, rule: str, B: int, T: int, H: int, HV: int, K: int, V: int
):
    """q, k (unit), v, g unless the rule is plain, beta."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v = randn(B, T, H, K), normalize(randn(B, T, H, K), dim=-1), randn(B, T, HV, V)
    beta = torch.rand(B, T, HV, generator=generator, device=device)
    shape = (B, T, HV, K) if rule == "kda" else (B, T, HV)
    gate = [] if rule == "plain" else [-0.2 * torch.rand(shape, generator=generator, device=device)]
    return [q.to(dtype), k.to(dtype), v.to(dtype), *gate, beta]


def _peer(rule: str, kind: str) -> Callable | None:
    """flash-linear-attention's function of the same name."""
    try:
        module = importlib.import_module(f"fla.ops.{RULES[rule]}")
    except Exception:  # whatever keeps it from being imported here, there is no peer
        return None
    return getattr(module, f"{kind}_{RULES[rule]}", None)


def _with_gradient(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = function(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, grad.to(o.dtype))]

    return run


def _float64(rule: str) -> Callable[..., Tensor]:
    """o in float64: the chunk form where there is one, as the recurrence keeps a state per token for its gradient."""

    def plain(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        g, beta = rest if len(rest) == 2 else (None, rest[0])
        if rule != "kda" and q.shape[2] == v.shape[2] and q.shape[1] % 32 == 0:
            return plain_chunks(q, k, v, g, beta, 32)
        return reference.delta_rule(q, k, v, g, beta)[0]

    return plain


def _cost(rule: str, B: int, T: int, H: int, D: int, size: int, gradient: bool) -> dict[str, float]:
    """Operations of the chunk form with C = 64, and the bytes of inputs and outputs."""
    forward, tokens = 5 * 64 * D + 3 * D * D, B * T * H
    backward = 7 * 64 * D + 8 * D * D
    return {
        "flops": 2.0 * tokens * (forward + backward * gradient),
        "bytes": float(tokens * D * size * (4 + 7 * gradient + (rule == "kda") * (1 + gradient) * 4 // size)),
    }


def chunked(rule: str, B: int, T: int, H: int, D: int = 128, gradient: bool = False) -> Callable:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        inputs = _inputs(device, dtype, seed, rule, B, T, H, H, D, D)
        grad = torch.randn(B, T, H, D, generator=torch.Generator(device).manual_seed(seed + 100), device=device)
        ours = getattr(pyrepr, f"chunk_{RULES[rule]}")
        theirs = _peer(rule, "chunk")
        peers: dict[str, Callable[..., Tensor]] = {}
        if theirs:
            peers["flash-linear-attention"] = lambda *x: theirs(*x)[0]

        def call(function: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
            return _with_gradient(function, tensors, grad) if gradient else lambda: function(*tensors)

        return Problem(
            call(lambda *x: ours(*x)[0], inputs),
            lambda: call(_float64(rule), [x.double() for x in inputs])(),
            {name: call(peer, inputs) for name, peer in peers.items()},
            **_cost(rule, B, T, H, D, inputs[0].element_size(), gradient),
        )

    return make


def packed(rule: str, gradient: bool) -> Callable:
    """Awkward sizes: grouped heads, odd K and V, sequences of no, one and many tokens, normalisation, both states."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        bounds = torch.tensor([0, 0, 100, 101, 101, 330], device=device)
        inputs = _inputs(device, dtype, seed, rule, 1, 330, 2, 4, 44, 36)
        generator = torch.Generator(device).manual_seed(seed + 100)
        state = torch.randn(5, 4, 44, 36, generator=generator, device=device)
        ours = getattr(pyrepr, f"chunk_{RULES[rule]}")

        def pyrepr_call(*x: Tensor) -> Tensor:
            o, last = ours(
                *x[:-1], initial_state=x[-1], output_final_state=True, use_qk_l2norm_in_kernel=True, cu_seqlens=bounds
            )
            return torch.cat([o.float().flatten(), last.flatten()])

        def reference_call(*x: Tensor) -> Tensor:
            q, k, v, *rest = x[:-1]
            g, beta = rest if len(rest) == 2 else (None, rest[0])
            o, last = reference.delta_rule(q, k, v, g, beta, None, x[-1], True, bounds)
            return torch.cat([o.flatten(), last.flatten()])

        tensors = [*inputs, state]
        wide = [x.double() for x in tensors]
        if not gradient:
            return Problem(lambda: pyrepr_call(*tensors), lambda: reference_call(*wide))
        grad = torch.randn(330 * 4 * 36 + state.numel(), generator=generator, device=device)
        return Problem(_with_gradient(pyrepr_call, tensors, grad), _with_gradient(reference_call, wide, grad.double()))

    return make


def views(rule: str, B: int, T: int, H: int, K: int, V: int) -> Callable:
    """Both ways, with q, k and v views of one tensor, past its first column: addresses and strides as they come."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        q, k, v, *rest = _inputs(device, dtype, seed, rule, B, T, H, H, K, V)
        fused = torch.cat([x.flatten(2) for x in (q[..., :1, :1], q, k, v)], 2)
        grad = torch.randn(B, T, H, V, generator=torch.Generator(device).manual_seed(seed + 100), device=device)
        ours = getattr(pyrepr, f"chunk_{RULES[rule]}")

        def of_views(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(x: Tensor, *rest: Tensor) -> Tensor:
                parts = x[..., 1:].split([H * K, H * K, H * V], 2)
                return function(*(part.unflatten(2, (H, -1)) for part in parts), *rest)

            return call

        tensors = [fused, *rest]
        wide = [x.double() for x in tensors]
        return Problem(
            _with_gradient(of_views(lambda *x: ours(*x)[0]), tensors, grad),
            _with_gradient(of_views(_float64(rule)), wide, grad.double()),
        )

    return make


def decode(rule: str, B: int, H: int, HV: int, D: int, tokens: int = 1) -> Callable:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        inputs = _inputs(device, dtype, seed, rule, B, tokens, H, HV, D, D)
        generator = torch.Generator(device).manual_seed(seed + 100)
        state = torch.randn(B, HV, D, D, generator=generator, device=device)
        out = torch.empty_like(state)
        ours = getattr(pyrepr, f"fused_recurrent_{RULES[rule]}")
        theirs = _peer(rule, "fused_recurrent") if H == HV else None
        q, k, v, *rest = (x.double() for x in inputs)
        g, beta = rest if len(rest) == 2 else (None, rest[0])
        named = dict(
            zip(("q", "k", "v", "g", "beta") if len(rest) == 2 else ("q", "k", "v", "beta"), inputs, strict=True)
        )

        def run() -> list[Tensor]:
            with torch.no_grad():
                return list(ours(**named, initial_state=state, output_final_state=True, out_state=out))

        def truth() -> list[Tensor]:
            return list(reference.delta_rule(q, k, v, g, beta, None, state.double()))

        def peer() -> list[Tensor]:
            with torch.no_grad():
                return list(theirs(**named, initial_state=state, output_final_state=True))  # type: ignore[misc]

        read = 8.0 * B * HV * D * D + inputs[0].element_size() * B * tokens * D * (2 * H + 2 * HV)
        peers = {"flash-linear-attention": peer} if theirs else {}
        return Problem(run, truth, peers, flops=6.0 * B * HV * tokens * D * D, bytes=read)

    return make


def _shapes(rule: str, gradient: bool) -> tuple[tuple[int, int, int], ...]:
    if rule == "kda" and gradient:
        return ((1, 2048, 8),)  # the float64 truth keeps a state per token
    return SHAPES[::2] if rule == "kda" else SHAPES


def cases() -> list[GpuCase]:
    found = []
    for rule in RULES:
        for gradient in (False, True):
            op = f"{rule} forward{' + backward' * gradient}"
            tolerance = GRADIENT if gradient else FORWARD
            found.append(GpuCase(op, "packed T=330", packed(rule, gradient), tolerance, sanitize=True))
            for shape in _shapes(rule, gradient):
                make = chunked(rule, *shape, gradient=gradient)
                name = "B={} T={} H={} K=V=128".format(*shape)
                found.append(GpuCase(op, name, make, {torch.bfloat16: tolerance[torch.bfloat16]}, timed=True))
        short = 1 if rule == "plain" else 2  # from no state, the first token's decay has no gradient to compare
        for shape in ((1, short, 1, 100, 24), (2, 200, 3, 64, 64), (1, 200, 2, 128, 128), (1, 70, 1, 200, 144)):
            name = "views B={} T={} H={} K={} V={}".format(*shape)
            found.append(GpuCase(f"{rule} forward + backward", name, views(rule, *shape), GRADIENT))
        both = ("triton", "cuda")
        small, large = decode(rule, 2, 1, 2, 44, 3), decode(rule, 64, 16, 16, 128)
        found.append(GpuCase(f"{rule} decode", "B=2 T=3", small, FORWARD, both, sanitize=True))
        wanted = {torch.bfloat16: FORWARD[torch.bfloat16]}
        for name, make in (("B=1 H=8", decode(rule, 1, 8, 8, 128)), ("B=64 H=16", large)):
            found.append(GpuCase(f"{rule} decode", name, make, wanted, both, timed=True))
    return found
