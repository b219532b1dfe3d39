"""Cases of family `delta_rule`. Peers: ONNX Runtime, the chunk form in plain torch, transformers' PyTorch fallback."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyrepr.benchmarks.harness import Case, Workload, module_error
from pyrepr.benchmarks.onnx_peer import onnx_runtime
from pyrepr.benchmarks.vllm_peer import vllm_decoding, vllm_prefill
from torch import Tensor
from torch.nn.functional import normalize

import pyrepr
from pyrepr.reference import delta_decode
from pyrepr.reference import delta_rule as reference


def plain_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, size: int = 32, p: Tensor | None = None
) -> Tensor:
    """The chunk form of the delta rule as one writes it in torch: all chunks at once, then the state through them.

    q, k: [B, T, H, K], v: [B, T, H, V], g, beta: [B, T, H] -> [B, T, H, V]; T is a multiple of the chunk size. With p,
    as k, it is Comba's: what is erased is read along p, before the decay.
    """

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, n, C, ...]
        return x.transpose(1, 2).unflatten(2, (-1, size))

    out_dtype = v.dtype
    q, k, v, beta = (chunked(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (q, k, v, beta))
    q = q * q.shape[-1] ** -0.5
    total = torch.zeros_like(beta) if g is None else chunked(g.to(beta.dtype)).cumsum(-1)
    after = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    gamma = (total[..., :, None] - total[..., None, :]).masked_fill(~after, -torch.inf).exp()
    weighted, seen, before = k * beta[..., None], gamma, total
    if p is not None:
        weighted, before = chunked(p) * beta[..., None], torch.nn.functional.pad(total[..., :-1], (1, 0))
        seen = (before[..., :, None] - total[..., None, :]).masked_fill(~after.tril(-1), -torch.inf).exp()
    a = ((weighted @ k.mT) * seen).tril(-1)
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    inverse = torch.linalg.solve_triangular(a + eye, eye.expand_as(a), upper=False, unitriangular=True)
    u, w = inverse @ (v * beta[..., None]), inverse @ (weighted * before.exp()[..., None])
    pairs, decayed = (q @ k.mT) * gamma, q * total.exp()[..., None]
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outputs = []
    for i in range(q.shape[2]):
        values = u[:, :, i] - w[:, :, i] @ state
        outputs.append(decayed[:, :, i] @ state + pairs[:, :, i] @ values)
        end = total[:, :, i, -1:, None]
        state = state * end.exp() + (k[:, :, i] * (end - total[:, :, i, :, None]).exp()).mT @ values
    return torch.cat(outputs, 2).transpose(1, 2).to(out_dtype)


def _transformers(model: str, name: str) -> Callable | None:
    """A fallback function of a model of transformers, if there is one, without what transformers puts before it."""
    if module_error("transformers", "transformers"):
        return None
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        return None
    function = getattr(module, name, None)
    return function and inspect.unwrap(function)


def _inputs(T: int, H: int, K: int, rule: str, dtype: torch.dtype = torch.float32, B: int = 1) -> list[Tensor]:
    """q, k (unit), v, then g unless the rule is plain, then beta."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, K, generator=generator) for _ in range(3))
    beta = torch.rand(B, T, H, generator=generator)
    gate = [] if rule == "plain" else [-0.2 * torch.rand(B, T, H, *([K] if rule == "kda" else []), generator=generator)]
    return [q.to(dtype), normalize(k, dim=-1).to(dtype), v.to(dtype), *gate, beta]


def _peers(rule: str) -> dict[str, Callable[..., Tensor]]:
    """Name → function of q, k, v, (g,) beta."""
    if rule == "kda":
        fallback = _transformers("kimi_linear", "chunk_kimi_delta_attention")
        return {"transformers fallback": lambda *x: fallback(*x)[0]} if fallback else {}

    def plain(size: int) -> Callable[..., Tensor]:
        return lambda q, k, v, *rest: plain_chunks(q, k, v, rest[0] if len(rest) == 2 else None, rest[-1], size)

    peers: dict[str, Callable[..., Tensor]] = {"plain torch, C=32": plain(32), "plain torch, C=64": plain(64)}
    fallback = _transformers("qwen3_next", "torch_chunk_gated_delta_rule")
    if fallback and rule == "gated":
        peers["transformers fallback"] = lambda q, k, v, g, beta: fallback(q, k, v, g=g, beta=beta)[0]
    return peers


OURS = {"plain": pyrepr.chunk_delta_rule, "gated": pyrepr.chunk_gated_delta_rule, "kda": pyrepr.chunk_kda}


def _operations(rule: str, T: int, H: int, K: int) -> float:
    """Of the forward, two per multiply-add: three for every element of a state and token, four with a gate per key."""
    return 2.0 * T * H * K * K * (4 if rule == "kda" else 3)


def _truth(inputs: Sequence[Tensor]) -> Tensor:
    q, k, v, *gate, beta = (x.double() for x in inputs)
    return reference.delta_rule(q, k, v, gate[0] if gate else None, beta)[0]


def _forward(rule: str, T: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> Workload:
    inputs = _inputs(T, H, K, rule, dtype)
    functions = {"pyrepr": lambda *x: OURS[rule](*x)[0]}
    if dtype != torch.float32:
        wide = [x.float() for x in inputs]
        functions["pyrepr in float32"] = lambda *_: OURS[rule](*wide)[0]
        if rule == "gated" and (kernels := vllm_prefill(*inputs)):
            functions["vLLM"] = lambda *_: kernels()
    elif engine := onnx_runtime(rule, T, H, K):
        functions["ONNX Runtime"] = lambda *x: engine(*x)[0]
    functions |= _peers(rule) if T % 64 == 0 else {}
    return Workload(
        {name: lambda f=f: f(*inputs) for name, f in functions.items()},
        truth=lambda: _truth(inputs),
        tolerance=2e-6 if dtype == torch.float32 else 8e-3,
        flops=_operations(rule, T, H, K),
        bytes=4 * T * H * K * inputs[0].element_size(),
    )


def _training(rule: str, T: int, H: int, K: int, dtype: torch.dtype = torch.float32) -> Workload:
    inputs = _inputs(T, H, K, rule, dtype)
    weights = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def step(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = function(*leaves)
        return o.detach(), *torch.autograd.grad(o, leaves, weights.to(o.dtype))

    functions: dict[str, Callable[..., Tensor]] = {"pyrepr": lambda *x: OURS[rule](*x)[0]}
    # In float64 the op is the reference; KDA in plain torch would keep a [C, C, K] tensor for every chunk.
    exact = functions["pyrepr"] if rule == "kda" else _peers("plain")["plain torch, C=32"]
    return Workload(
        {name: lambda f=f: step(f, inputs) for name, f in (functions | _peers(rule)).items()},
        truth=lambda: step(exact, [x.double() for x in inputs]),
        tolerance=1e-5 if dtype == torch.float32 else 8e-3,
        flops=_operations(rule, T, H, K) + 2.0 * T * H * (8 * K * K + 11 * 32 * K / 2),
        bytes=11 * T * H * K * inputs[0].element_size(),
    )


def _alike(
    functions: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor], truth: Callable, work: float
) -> Workload:
    """Implementations of the same arguments."""
    o = truth(*(x.double() for x in inputs))
    return Workload(
        {name: lambda f=f: f(*inputs) for name, f in functions.items()},
        truth=lambda: o,
        tolerance=2e-6,
        flops=work,
        bytes=sum(x.nbytes for x in inputs) + o.numel() * 4,
    )


def _linear(rule: str, T: int, H: int, K: int) -> Workload:
    """GLA, simple or not: nothing is erased."""
    q, k, v, g, _ = _inputs(T, H, K, "kda" if rule == "GLA" else "gated")
    ours = pyrepr.functional.chunk_gla if rule == "GLA" else pyrepr.functional.chunk_simple_gla
    functions: dict[str, Callable[..., Tensor]] = {"pyrepr": lambda *x: ours(*x)[0]}
    if engine := onnx_runtime(rule, T, H, K):
        functions["ONNX Runtime"] = lambda *x: engine(*x)[0]
    functions["plain torch, C=32"] = lambda *x: plain_linear_chunks(*x)
    work = _operations("kda" if rule == "GLA" else "plain", T, H, K)
    return _alike(functions, (q, k, v, g), lambda *x: reference.delta_rule(*x, None)[0], work)


def _erase_apart(rule: str, T: int, H: int, K: int, training: bool = False) -> Workload:
    """Comba and Gated DeltaNet-2, whose erase reads along a vector of its own. Nobody else has a kernel of them for a
    CPU: the peers are plain torch: Comba's chunk form, pyrepr's reference, flash-linear-attention's naive functions."""
    q, k, v, g, beta = _inputs(T, H, K, "gated" if rule == "Comba" else "kda")
    generator = torch.Generator().manual_seed(1)
    gates = [torch.rand(1, T, H, K, generator=generator) for _ in range(2)]
    inputs = [q, k, v, 0.5 * k, g, beta] if rule == "Comba" else [q, k, v, g, *gates]
    ours = pyrepr.functional.chunk_comba if rule == "Comba" else pyrepr.functional.chunk_gdn2
    weights = torch.randn(v.shape, generator=generator)

    def run(function: Callable[..., Tensor], backend: str | None, *x: Tensor) -> Any:
        with pyrepr.use_backend(backend) if backend else contextlib.nullcontext():
            if not training:
                return function(*x)
            leaves = [y.detach().requires_grad_() for y in x]
            o = function(*leaves)
            return o.detach(), *torch.autograd.grad(o, leaves, weights.to(o.dtype))

    peers = _naive("comba.naive_chunk_comba" if rule == "Comba" else "gdn2.naive_recurrent_gdn2")
    if rule == "Comba":
        for size in (32, 64):
            peers[f"plain torch, C={size}"] = lambda q, k, v, p, g, beta, C=size: plain_chunks(q, k, v, g, beta, C, p)
    functions: dict[str, Callable[..., Any]] = {"pyrepr": functools.partial(run, lambda *x: ours(*x)[0], None)}
    functions["plain torch, the reference"] = functools.partial(run, lambda *x: ours(*x)[0], "reference")
    functions |= {name: functools.partial(run, peer, None) for name, peer in peers.items()}
    work = _operations("gated" if rule == "Comba" else "kda", T, H, K)
    return Workload(
        {name: functools.partial(function, *inputs) for name, function in functions.items()},
        truth=lambda: functions["plain torch, the reference"](*(x.double() for x in inputs)),
        tolerance=1e-5,
        flops=work + (2.0 * T * H * (8 * K * K + 11 * 32 * K / 2) if training else 0),
    )


def _naive(name: str) -> dict[str, Callable[..., Tensor]]:
    """A function of flash-linear-attention in plain torch, where it can be imported; its arguments stand as ours do."""
    rule, function = name.split(".")
    if module_error("fla.ops", "flash-linear-attention"):
        return {}
    naive = getattr(importlib.import_module(f"fla.ops.{rule}.naive"), function)
    return {"flash-linear-attention, naive": lambda *x: naive(*x)[0]}


def plain_linear_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, size: int = 32) -> Tensor:
    """GLA in chunks as one writes it in torch; g [B, T, H], or [B, T, H, K], whose pairs take [C, C, K] numbers.

    q, k: [B, T, H, K], v: [B, T, H, V] -> [B, T, H, V]; T is a multiple of the chunk size.
    """

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, n, C, ...]
        return x.transpose(1, 2).unflatten(2, (-1, size))

    q, k, v, total = chunked(q) * q.shape[-1] ** -0.5, chunked(k), chunked(v), chunked(g).cumsum(3)
    after = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if g.dim() == 3:
        gamma = (total[..., :, None] - total[..., None, :]).masked_fill(~after, -torch.inf).exp()
        pairs, total = (q @ k.mT) * gamma, total[..., None]
    else:
        rows = [
            (q * k[..., j, None, :] * (total - total[..., j, None, :]).clamp_max(0).exp()).sum(-1) for j in range(size)
        ]
        pairs = torch.stack(rows, -1) * after
    end = total[..., -1:, :]
    keys, decayed = (k * (end - total).exp()).mT, q * total.exp()
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for i in range(q.shape[2]):
        outputs.append(decayed[:, :, i] @ state + pairs[:, :, i] @ v[:, :, i])
        state = state * end[:, :, i].mT.exp() + keys[:, :, i] @ v[:, :, i]
    return torch.cat(outputs, 2).transpose(1, 2)


def _product(T: int, H: int, K: int, steps: int) -> Workload:
    """Gated DeltaProduct; peers are those of the gated rule, given every step as a token."""
    q, k, v, g, beta = _inputs(T * steps, H, K, "gated")
    q, g, last = q[:, ::steps], g[:, ::steps], slice(steps - 1, None, steps)

    def tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        every_q, every_g = k.new_zeros(k.shape), beta.new_zeros(beta.shape)
        every_q[:, last], every_g[:, ::steps] = q, g
        return every_q, k, v, every_g, beta

    functions: dict[str, Callable[..., Tensor]] = {
        "pyrepr": lambda *x: pyrepr.functional.chunk_gated_delta_product(*x, steps)[0]
    }
    if engine := onnx_runtime("gated", T * steps, H, K):
        functions["ONNX Runtime, a token a step"] = lambda *x: engine(*tokens(*x))[0][:, last]
    for name, peer in _peers("gated").items():
        functions[f"{name}, a token a step"] = lambda *x, peer=peer: peer(*tokens(*x))[:, last]  # type: ignore[misc]
    exact = lambda *x: reference.delta_rule(*tokens(*x))[0][:, last]  # noqa: E731
    return _alike(functions, (q, k, v, g, beta), exact, _operations("gated", T * steps, H, K))


def _scan(T: int, H: int, P: int, N: int) -> Workload:
    """Mamba-2's scan with one group, as its models call it."""
    generator = torch.Generator().manual_seed(0)
    x, steps = torch.randn(1, T, H, P, generator=generator), torch.rand(1, T, H, generator=generator)
    B, C = (torch.randn(1, T, 1, N, generator=generator) for _ in range(2))
    A = -0.2 * torch.rand(H, generator=generator)
    ours, fallback = pyrepr.functional.mamba_chunk_scan_combined, _transformers("mamba2", "mamba2_chunk_scan")

    def rule(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        q, k = (y.expand(-1, -1, H, -1).contiguous() for y in (C, B))
        return q, k, x * dt[..., None], A * dt

    functions: dict[str, Callable[..., Tensor]] = {"pyrepr": lambda *x: ours(*x)}
    if engine := onnx_runtime("simple GLA", T, H, N, scale=1.0, V=P):
        functions["ONNX Runtime"] = lambda *x: engine(*rule(*x))[0]
    if fallback:
        functions["transformers fallback"] = lambda *x: fallback(*x, 256)
    exact = lambda *x: reference.delta_rule(*rule(*x), None, 1.0)[0]  # noqa: E731
    return _alike(functions, (x, steps, A, B, C), exact, 6.0 * T * H * P * N)


def _decoding(H: int, K: int) -> Workload:
    """One token with a state. The state does not change between rounds, so that all see the same."""
    inputs = _inputs(1, H, K, "gated")
    q, k, v, g, beta = inputs
    start = torch.randn(1, H, K, K, generator=torch.Generator().manual_seed(2))
    out = torch.empty_like(start)
    ours = pyrepr.fused_recurrent_gated_delta_rule
    functions = {
        "pyrepr": lambda: ours(q, k, v, g, beta=beta, initial_state=start, output_final_state=True),
        "pyrepr, out_state": lambda: ours(q, k, v, g, beta=beta, initial_state=start, out_state=out),
    }
    if engine := onnx_runtime("gated", 1, H, K, state=True):
        functions["ONNX Runtime"] = lambda: engine(*inputs, start)
    fallback = _transformers("qwen3_next", "torch_recurrent_gated_delta_rule")
    if fallback:
        functions["transformers fallback"] = lambda: fallback(
            q, k, v, g=g, beta=beta, initial_state=start, output_final_state=True
        )

    def truth() -> tuple[Tensor, Tensor]:
        return reference.delta_rule(*(x.double() for x in inputs), None, start.double())

    return Workload(functions, truth, tolerance=2e-6, flops=6.0 * H * K * K, bytes=8 * H * K * K)


def _decoding_layer(H: int, HV: int, dtype: torch.dtype, K: int = 128) -> Workload:
    """A token of a layer between its projections: convolution, gates, rule and gated norm. Every implementation has
    states of its own, which move on; results are those of the first token."""
    generator = torch.Generator().manual_seed(0)
    keys, values = H * K, HV * K
    shapes = {
        "x": (1, 2 * keys + values),
        "g": (1, HV),
        "beta": (1, HV),
        "conv_state": (1, 2 * keys + values, 3),
        "state": (1, HV, K, K),
        "weight": (2 * keys + values, 4),
        "A_log": (HV,),
        "dt_bias": (HV,),
        "norm_weight": (K,),
        "gate": (1, HV, K),
    }
    wide = ("state", "A_log", "dt_bias")
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given = {name: x if name in wide else x.to(dtype) for name, x in given.items()}
    x, g, beta, conv_state, state, weight, A_log, dt_bias, norm_weight, gate = given.values()

    def one_call(conv_state: Tensor, state: Tensor) -> Tensor:
        return pyrepr.functional.gated_delta_decode(
            x, g, beta, conv_state, state, weight, A_log, dt_bias, norm_weight, gate
        )

    def normed(o: Tensor) -> Tensor:
        return pyrepr.functional.rms_norm_gated(o.view(1, HV, K), gate, norm_weight, eps=1e-5).flatten(1)

    def apart(conv_state: Tensor, state: Tensor) -> Tensor:
        y = pyrepr.causal_conv1d_update(x, conv_state, weight, None, "silu")
        q, k, v = (part.unflatten(-1, (-1, K)) for part in y[:, None].split([keys, keys, values], -1))
        options = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
        o, _ = pyrepr.fused_recurrent_gated_delta_rule(
            *(q, k, v, g[:, None]),
            beta=beta[:, None],
            A_log=A_log,
            dt_bias=dt_bias,
            initial_state=state,
            out_state=state,
            **options,
        )
        return normed(o)

    functions: dict[str, Callable[..., Tensor]] = {
        name: functools.partial(f, conv_state.clone(), state.clone())
        for name, f in {"pyrepr": one_call, "pyrepr, call by call": apart}.items()
    }
    if core := vllm_decoding(x, g, beta, conv_state, state, weight, A_log, dt_bias, keys):
        functions["vLLM, pyrepr's norm"] = lambda: normed(core())
    truth = delta_decode.gated_delta_decode(**{name: x.double() for name, x in given.items()})[0]
    return Workload(
        functions,
        truth=lambda: truth.flatten(1),
        result=lambda o: o.reshape(1, -1),
        tolerance=3e-6 if dtype == torch.float32 else 2e-2,
        flops=8.0 * values * K,
        bytes=8 * values * K,
        calls=20,
    )


def cases() -> list[Case]:
    """All cases of the family, small ones first."""
    shape = "B=1 T=2048 H=8 K=V=128"
    return [
        Case("decode, gated", "B=1 H=8 K=V=128", lambda: _decoding(8, 128), quick=True),
        *(
            Case(f"decoding layer{name}", f"B=1 H={H} HV={HV} K=V=128", lambda s=(H, HV, dtype): _decoding_layer(*s))
            for name, dtype in (("", torch.float32), (", bf16", torch.bfloat16))
            for H, HV in ((8, 8), (16, 32))
        ),
        Case("delta rule forward", "B=1 T=512 H=8 K=V=64", lambda: _forward("plain", 512, 8, 64), quick=True),
        Case("delta rule forward", shape, lambda: _forward("plain", 2048, 8, 128), quick=True),
        Case("gated forward", shape, lambda: _forward("gated", 2048, 8, 128), quick=True),
        *(
            Case("gated forward", f"B=1 T={T} H=8 K=V=128", lambda T=T: _forward("gated", T, 8, 128))
            for T in (2, 8, 16, 32, 128)
        ),
        Case("KDA forward", "B=1 T=512 H=4 K=V=128", lambda: _forward("kda", 512, 4, 128), quick=True),
        Case("KDA forward", shape, lambda: _forward("kda", 2048, 8, 128)),
        Case("gated forward, bf16", shape, lambda: _forward("gated", 2048, 8, 128, torch.bfloat16)),
        Case("delta rule forward, bf16", shape, lambda: _forward("plain", 2048, 8, 128, torch.bfloat16)),
        Case("delta rule forward+backward", shape, lambda: _training("plain", 2048, 8, 128)),
        Case("gated forward+backward", shape, lambda: _training("gated", 2048, 8, 128)),
        Case("gated forward+backward, bf16", shape, lambda: _training("gated", 2048, 8, 128, torch.bfloat16)),
        Case("KDA forward+backward", "B=1 T=512 H=4 K=V=128", lambda: _training("kda", 512, 4, 128)),
        Case("simple GLA forward", shape, lambda: _linear("simple GLA", 2048, 8, 128)),
        Case("GLA forward", "B=1 T=512 H=4 K=V=128", lambda: _linear("GLA", 512, 4, 128)),
        Case("gated DeltaProduct forward", "B=1 T=1024 n=2 H=8 K=V=128", lambda: _product(1024, 8, 128, 2)),
        Case("Mamba-2 scan", "B=1 T=2048 H=24 P=64 N=128", lambda: _scan(2048, 24, 64, 128)),
        Case("Comba forward", shape, lambda: _erase_apart("Comba", 2048, 8, 128)),
        Case("Comba forward+backward", shape, lambda: _erase_apart("Comba", 2048, 8, 128, training=True)),
        Case("Gated DeltaNet-2 forward", "B=1 T=512 H=4 K=V=128", lambda: _erase_apart("GDN-2", 512, 4, 128)),
        Case(
            "Gated DeltaNet-2 forward+backward",
            "B=1 T=512 H=4 K=V=128",
            lambda: _erase_apart("GDN-2", 512, 4, 128, training=True),
        ),
        Case("gated forward+backward", "B=1 T=16384 H=2 K=V=128", lambda: _training("gated", 16384, 2, 128)),
    ]
