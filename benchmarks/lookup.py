"""Cases of family `lookup`, τ = 8. Peers: `F.linear` in float32 and bfloat16, what else makes a linear layer smaller
(torch.ao's dynamic int8 with a scale a channel, by the engines x86 and oneDNN, PyTorch's int4 weights in groups of 32),
and bags of ready-made codes: `F.embedding_bag`, and FBGEMM's of bytes.

Cold means that neither tables nor dense weights stay in cache between calls: every call takes the next of several dense
weights (together 128 MiB or more) and the next tokens, which read other rows of the tables. Of a single token eight
calls are timed in a row, as a decoder makes them layer after layer: what the peers read between two calls would
otherwise drive the interpreter out of the caches too, and fetching that again takes longer than the lookup.

Bags get their codes and weights ready-made: hashing is not in their time, nor in a gradient. A dense peer computes
another function: its error is that to the exact product of its own weight. A bound of "L2 bandwidth"
counts every token's rows once out of L2, where a tile of the tables is at best.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pyrepr.benchmarks.activations import minilm_linear
from pyrepr.benchmarks.harness import Case, Workload, relative_error
from torch import Tensor

import pyrepr
from pyrepr.functional import sign_linear
from pyrepr.nn import LookupLinear, SignLinear
from pyrepr.ops.lookup import ROUTES, linear_op, to_huge_pages
from pyrepr.reference import lookup as reference

BITS = 8
COLD_BYTES = 128 << 20
PACKED_FROM = 512  # tokens, from which on packed tables are timed too
CHECKED = 4  # tokens whose result is compared with float64
CONVERTED = "encoder.layer.3.intermediate.dense"
CALIBRATION, UNSEEN = 8192, 2048  # rows


class _Layer:
    """A layer's tables in one storage type, tokens to rotate over, and dense weights of the same shape."""

    def __init__(self, count: int, d: int, h: int, *, stored: str = "fp32", cold: bool, codes: str = "random") -> None:
        generator = torch.Generator().manual_seed(0)
        k, n = d // BITS, 1 << BITS
        batches = max(1, min(64, 4096 // count)) if cold else 1
        self.inputs = [_tokens(codes, count, d, generator) for _ in range(batches)]
        self.tables, self.scales = torch.randn(k, n, h, generator=generator), None
        self.truth = _exact(self.inputs[0][:CHECKED], self.tables)
        if stored == "bf16":
            self.tables = self.tables.bfloat16()
        if stored == "int8":
            self.scales = self.tables.abs().amax(-1) / 127
            self.tables = (self.tables / self.scales[..., None]).round().to(torch.int8)
        to_huge_pages(self.tables)
        self.dense = [torch.randn(h, d, generator=generator) for _ in range(COLD_BYTES // (4 * d * h) if cold else 1)]
        flat = n * torch.arange(k)
        self.bags = [(reference.hash_codes(x, BITS).long() + flat, reference.weights(x, BITS)) for x in self.inputs]


def _exact(x: Tensor, tables: Tensor) -> Tensor:
    """The layer in float64; only the rows that are read are widened."""
    rows = tables[torch.arange(len(tables)), reference.hash_codes(x, BITS).long()].double()  # [T, K, h]
    return (reference.weights(x.double(), BITS)[..., None] * rows).sum(1)


def _tokens(codes: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    """Random signs and sizes; or every chunk the same signs; or its first signs positive with a Zipf-like skew."""
    x = torch.randn(count, d, generator=generator)
    if codes == "one bucket":
        return x.abs()
    if codes == "zipf":
        bits = torch.arange(BITS).repeat(d // BITS)
        return torch.where(torch.rand(count, d, generator=generator) < 1 / (bits + 2), -x.abs(), x.abs())
    return x


@dataclass
class Other:
    """The result of a peer that computes another function, and the truth of that, where it is looked at."""

    result: Any
    truth: Callable[[], Tensor] | None = None


def _error(result: object, truth: Tensor) -> float:
    if isinstance(result, Other):
        return relative_error(result.result[:CHECKED], result.truth()) if result.truth else math.nan
    return relative_error(result, truth)


Dense = Callable[[Tensor], Tensor]


ENGINES = {"dynamic int8": "x86", "dynamic int8 oneDNN": "onednn"}  # of PyTorch's quantized products


def _engines() -> dict[str, str]:
    return {name: engine for name, engine in ENGINES.items() if engine in torch.backends.quantized.supported_engines}


def _dynamic_int8(weight: Tensor, engine: str) -> Dense:
    """torch.ao's layer for this weight: int8 with a scale a channel, activations rounded as they come, to eight bits
    where there is VNNI (its own forward asks for seven, as other processors need). The engine that packs the weight is
    the one that multiplies."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    linear.qconfig = per_channel_dynamic_qconfig
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # it is to move to another package
        stack.callback(setattr, torch.backends.quantized, "engine", torch.backends.quantized.engine)
        torch.backends.quantized.engine = engine
        packed = Linear.from_float(linear)._packed_params._packed_params
    seven = not torch.cpu._is_vnni_supported()
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, seven)


def _int4(weight: Tensor, copies: int, group: int = 32) -> list[Dense]:
    """PyTorch's product with 4-bit weights, asymmetric in groups, in bfloat16; with as many copies of the weights."""
    h, d = weight.shape
    grouped = weight.view(h, -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / 15
    codes = ((grouped - low) / step).round().clamp(0, 15).int().view(h, d)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.stack([step[..., 0], (low + 8 * step)[..., 0]], -1).transpose(0, 1).contiguous().bfloat16()

    def layer(own: Tensor) -> Dense:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), own, group, scales)

    return [layer(packed.clone()) for _ in range(copies)]


def _rotating(function: Callable[[int], Tensor]) -> Callable[[], Tensor]:
    """Calls function(0), then function(1), ...; the first call is the one that is checked."""
    numbers: Iterator[int] = itertools.count()
    return lambda: function(next(numbers))


def _bag(layer: _Layer, tables: Tensor, i: int) -> Tensor:
    codes, weights = layer.bags[i % len(layer.bags)]
    return F.embedding_bag(codes, tables.flatten(0, 1), per_sample_weights=weights.to(tables.dtype), mode="sum")


def _byte_bag(layer: _Layer) -> Callable[[int], Tensor]:
    """FBGEMM's bag of int8 rows, each with a scale and a zero point of its own, over ready-made codes."""
    rows = (layer.tables.float() * layer.scales[..., None]).flatten(0, 1)
    packed = torch.ops.quantized.embedding_bag_byte_prepack(rows)
    bags = [
        (codes.flatten().int(), torch.arange(0, codes.numel(), codes.shape[1], dtype=torch.int32), weights.flatten())
        for codes, weights in layer.bags
    ]

    def run(i: int) -> Tensor:
        codes, offsets, weights = bags[i % len(bags)]
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            packed, codes, offsets, False, 0, False, weights, None, False
        )

    return run


def _forward(count: int, d: int, h: int, tables: str, *, cold: bool = True, codes: str = "random") -> Workload:
    layer = _Layer(count, d, h, stored=tables, cold=cold, codes=codes)
    stored, scales, inputs, dense = layer.tables, layer.scales, layer.inputs, layer.dense
    inputs_bf16, dense_bf16 = [x.bfloat16() for x in inputs], [w.bfloat16() for w in dense * 2]

    def take(items: list, i: int):
        return items[i % len(items)]

    def product() -> Tensor:
        return inputs[0][:CHECKED].double() @ dense[0].double().T

    def quantized(layers: list[Dense]) -> Callable[[int], Other]:
        return lambda i: Other(take(layers, i)(take(inputs, i)), product)

    # Smaller weights need more of them to leave the caches.
    int8 = {name: [_dynamic_int8(w, engine) for w in dense * (4 if cold else 1)] for name, engine in _engines().items()}
    int4 = [layer for w in dense for layer in _int4(w, 8 if cold else 1)]
    implementations = {
        "pyrepr": lambda i: pyrepr.lookup_linear(take(inputs, i), stored, scales=scales),
        "F.linear fp32": lambda i: Other(F.linear(take(inputs, i), take(dense, i)), product),
        "F.linear bf16": lambda i: Other(F.linear(take(inputs_bf16, i), take(dense_bf16, i)), product),
        **{name: quantized(layers) for name, layers in int8.items()},
        "int4 weights": lambda i: Other(take(int4, i)(take(inputs, i)), product),
    }
    if count >= PACKED_FROM:
        packed = pyrepr.pack_tables(stored)
        implementations = {
            "pyrepr packed": lambda i: pyrepr.lookup_linear(take(inputs, i), packed, scales=scales),
            **implementations,
        }
    if scales is None:
        implementations["F.embedding_bag"] = lambda i: _bag(layer, stored, i)
    elif scales is not None and tables == "int8":
        implementations["FBGEMM byte bag"] = _byte_bag(layer)
    occupied = min(count, (1 << BITS) * (1 - (1 - 2.0**-BITS) ** count)) if codes == "random" else 1
    return Workload(
        {name: _rotating(function) for name, function in implementations.items()},
        truth=lambda: layer.truth,
        result=lambda out: out if isinstance(out, Other) else out[:CHECKED],
        error=_error,
        tolerance={"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2}[tables],
        flops=2 * count * (d // BITS) * h,
        bytes=occupied * (d // BITS) * h * stored.element_size(),
        cached_bytes=0 if codes == "one bucket" else count * (d // BITS) * h * stored.element_size(),
        calls=8 if count == 1 else 1,
        data=f"{'cold' if cold else 'hot'}, {codes} codes, tables in huge pages",
    )


def _training(count: int, d: int, h: int) -> Workload:
    layer = _Layer(count, d, h, cold=False)
    x, tables, dense = (t.requires_grad_() for t in (layer.inputs[0], layer.tables, layer.dense[0]))
    grad = torch.randn(count, h, generator=torch.Generator().manual_seed(1))
    codes, weights = (t.detach() for t in layer.bags[0])
    weights.requires_grad_()

    def lookup() -> tuple[Tensor, ...]:
        return torch.autograd.grad(pyrepr.lookup_linear(x, tables), (x, tables), grad)

    def linear() -> Other:
        return Other(torch.autograd.grad(F.linear(x, dense), (x, dense), grad))

    def bag() -> tuple[Tensor, ...]:
        out = F.embedding_bag(codes, tables.flatten(0, 1), per_sample_weights=weights, mode="sum")
        return torch.autograd.grad(out, (weights, tables), grad)

    def truth() -> Tensor:
        first = tables.detach()[:2].double().requires_grad_()
        out = reference.lookup_linear(x.detach()[:, : 2 * BITS].double(), first)
        return torch.autograd.grad(out, first, grad.double())[0]

    return Workload(
        {"pyrepr": lookup, "F.linear fp32": linear, "F.embedding_bag": bag},
        truth=truth,
        result=lambda grads: grads if isinstance(grads, Other) else grads[1][:2],
        error=_error,
        tolerance=1e-5,
        flops=6 * count * (d // BITS) * h,
        bytes=3 * tables.numel() * 4,
        data="hot",
    )


def _crossover(count: int, d: int, h: int) -> Workload:
    """The forward kernels on the same fp32 tables: which one is faster from how many tokens on."""
    layer = _Layer(count, d, h, cold=True)
    packed = pyrepr.pack_tables(layer.tables)

    def kernel(tables: Tensor, route: str) -> Callable[[int], Tensor]:
        inputs = layer.inputs
        return lambda i: linear_op(inputs[i % len(inputs)], tables, None, None, "probability", 1.0, ROUTES[route])

    kernels = {
        "pyrepr rows": kernel(layer.tables, "rows"),
        "pyrepr stream": kernel(layer.tables, "stream"),
        "pyrepr packed rows": kernel(packed, "rows"),
        "pyrepr packed stream": kernel(packed, "stream"),
    }
    return Workload(
        {name: _rotating(function) for name, function in kernels.items()},
        truth=lambda: layer.truth,
        result=lambda out: out[:CHECKED],
        tolerance=1e-5,
        flops=2 * count * (d // BITS) * h,
        bytes=(1 << BITS) * (1 - (1 - 2.0**-BITS) ** count) * (d // BITS) * h * 4,
        cached_bytes=count * (d // BITS) * h * 4,
        data="cold, random codes, tables in huge pages",
    )


class Called(NamedTuple):
    """What a layer gave for the tokens that were timed, and the layer."""

    out: Tensor
    layer: Dense


@functools.cache
def _conversion(rank: int) -> tuple[str, dict[str, Dense], Tensor, Callable[[], Tensor]]:
    """What is converted; the layer and what one could put in its place; unseen rows, and the true outputs of these."""
    found, data = minilm_linear(CALIBRATION + UNSEEN, CONVERTED), "a layer of MiniLM on docstrings"
    if found is None:
        data = "random (no [demo] extra)"
        generator = torch.Generator().manual_seed(0)
        spread = torch.randn(384, 384, generator=generator) / torch.arange(1, 385)
        found = torch.nn.Linear(384, 1536), torch.randn(CALIBRATION + UNSEEN, 384, generator=generator) @ spread
    linear, rows = found
    rows, unseen = rows.split([CALIBRATION, UNSEEN])
    weight, bias = linear.weight.detach(), linear.bias.detach()
    layers: dict[str, Dense] = {}
    for name, hash in (("two bits", "two_bit"), ("one bit", "one_bit")):
        layers[f"pyrepr {name}"] = LookupLinear.from_linear(linear, rows, hash=hash, rank=rank).quantize_("int8")
    layers["pyrepr two bits, as signs"] = SignLinear.from_linear(linear, rows, rank=rank).quantize_("int8")
    layers["nn.Linear fp32"] = linear
    for name, engine in _engines().items():
        int8 = _dynamic_int8(weight, engine)
        layers[name] = lambda x, int8=int8: int8(x).add_(bias)
    int4 = _int4(weight, 1)[0]
    layers["int4 weights"] = lambda x: int4(x).float().add_(bias)
    return data, layers, unseen, lambda: F.linear(unseen.double(), weight.double(), bias.double())


def _converted(count: int, rank: int) -> Workload:
    """A layer of MiniLM, 384 -> 1536, converted to int8 tables with a low-rank part, beside what else makes it smaller.
    The error is the squared one over the outputs' variance, on unseen rows."""
    data, layers, unseen, truth = _conversion(rank)
    inputs = unseen.split(count)[: UNSEEN // count]

    def call(layer: Dense) -> Callable[[int], Called]:
        return lambda i: Called(layer(inputs[i % len(inputs)]), layer)

    def error(called: Called, exact: Tensor) -> float:
        off, centred = called.layer(unseen).double() - exact, exact - exact.mean(0)
        return float(off.square().sum() / centred.square().sum())

    return Workload(
        {name: torch.no_grad()(_rotating(call(layer))) for name, layer in layers.items()},
        truth=torch.no_grad()(truth),
        error=torch.no_grad()(error),
        tolerance=0.1,
        flops=2 * count * (384 // 4 * 1536 + rank * (2 * 384 + 1536)),
        cached_bytes=count * 384 // 4 * 1536,
        calls=8 if count == 1 else 1,
        data=f"{data}, hot",
    )


def _signs(count: int, d: int, h: int) -> Workload:
    """A random linear layer of white inputs as a product of signs: two bits an input, the levels that lose least (Max
    1960), and one. Cold: every call takes another weight. The error is the squared one over the outputs' variance."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(count, d, generator=generator) for _ in range(max(1, min(64, 4096 // count)))]
    dense = [torch.randn(h, d, generator=generator) for _ in range(COLD_BYTES // (4 * d * h))]
    unseen = torch.randn(64, d, generator=generator)

    def take(items: list, i: int):
        return items[i % len(items)]

    def rotating(layers: list[Dense], inputs: list[Tensor] = inputs) -> Callable[[int], Called]:
        return lambda i: Called(take(layers, i)(take(inputs, i)), layers[0])

    def signs(weight: Tensor, hash: str) -> Dense:
        levels = {"one_bit": (math.sqrt(2 / math.pi),), "two_bit": ((1.510 + 0.453) / 2, (1.510 - 0.453) / 2)}[hash]
        features = torch.stack([level * weight for level in levels], 2).flatten(1)
        scales = features.abs().amax(1) / 127
        stored = (features / scales[:, None]).round().to(torch.int8)
        to_huge_pages(stored)
        return lambda x: sign_linear(x, stored, hash=hash, scales=scales)

    def bf16(weight: Tensor) -> Dense:
        stored = weight.bfloat16()
        return lambda x: F.linear(x.bfloat16(), stored)

    copies = dense * 4  # smaller weights need more of them to leave the caches
    layers = {
        "pyrepr two bits": [signs(w, "two_bit") for w in dense * 2],
        "pyrepr one bit": [signs(w, "one_bit") for w in copies],
        "F.linear fp32": [lambda x, w=w: F.linear(x, w) for w in dense],
        "F.linear bf16": [bf16(w) for w in dense * 2],
        **{name: [_dynamic_int8(w, engine) for w in copies] for name, engine in _engines().items()},
        "int4 weights": [layer for w in dense for layer in _int4(w, 8)],
    }

    def error(called: Called, exact: Tensor) -> float:
        off, centred = called.layer(unseen).double() - exact, exact - exact.mean(0)
        return float(off.square().sum() / centred.square().sum())

    return Workload(
        {name: torch.no_grad()(_rotating(rotating(layer))) for name, layer in layers.items()},
        truth=lambda: unseen.double() @ dense[0].double().T,
        error=torch.no_grad()(error),
        tolerance=0.4,
        flops=4 * count * d * h,
        bytes=2 * d * h,
        calls=8 if count == 1 else 1,
        data="cold, weights of signs in huge pages",
    )


def _overhead() -> Workload:
    """A layer so small that only the way to the kernel takes time, beside the cheapest operation there is."""
    generator = torch.Generator().manual_seed(0)
    x, tables = torch.randn(1, 64, generator=generator), torch.randn(8, 1 << BITS, 64, generator=generator)
    scales = tables.abs().amax(-1) / 127
    stored = (tables / scales[..., None]).round().to(torch.int8)
    dense = torch.randn(64, 64, generator=generator)
    return Workload(
        {
            "pyrepr": lambda: pyrepr.lookup_linear(x, tables),
            "pyrepr int8": lambda: pyrepr.lookup_linear(x, stored, scales=scales),
            "F.linear fp32": lambda: Other(F.linear(x, dense)),
            "torch.neg": lambda: Other(torch.neg(x)),
        },
        truth=lambda: _exact(x, tables),
        error=_error,
        tolerance=2e-2,
        data="hot",
    )


def cases() -> list[Case]:
    """All cases of the family, small ones first."""
    forward = [
        Case("lookup forward", f"T={count} d=h={d} {tables}{'' if cold else ' hot'}", make, quick)
        for count, d, tables, cold, quick in (
            (1, 512, "fp32", True, True),
            (1, 1024, "fp32", True, True),
            (4096, 512, "fp32", False, True),
            *((count, 2048, tables, True, False) for count in (1, 64, 1024) for tables in ("fp32", "bf16", "int8")),
        )
        for make in [lambda c=count, d=d, t=tables, cold=cold: _forward(c, d, d, t, cold=cold)]
    ]
    skewed = [
        Case(
            "lookup forward",
            f"T=1024 d=h=1024 fp32, {codes}",
            lambda c=codes: _forward(1024, 1024, 1024, "fp32", codes=c),
        )
        for codes in ("random", "zipf", "one bucket")
    ]
    crossover = [
        Case("lookup kernels", f"T={count} d=h=1024 fp32", lambda c=count: _crossover(c, 1024, 1024))
        for count in (64, 128, 256, 512, 1024, 2048)
    ]
    return [
        Case("lookup overhead", "T=1 d=h=64", _overhead, quick=True),
        *forward,
        *crossover,
        *skewed,
        *(
            Case("lookup converted", f"T={count} 384 to 1536 int8, rank 48", lambda c=count: _converted(c, 48))
            for count in (1, 8, 64, 1024)
        ),
        *(
            Case("lookup signs", f"T={count} d=h=2048 int8", lambda c=count: _signs(c, 2048, 2048))
            for count in (1, 8, 64, 1024)
        ),
        Case("lookup forward+backward", "T=1024 d=h=1024", lambda: _training(1024, 1024, 1024)),
    ]
