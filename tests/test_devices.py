"""Tensors are made where the arguments are, whatever the default device is."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

import pyrepr
from pyrepr.nn import CKALoss, DeltaCache, GatedDeltaNet, LookupLinear, SignLinear

ROOMS = ("ops", "reference", "functional", "similarity", "stats", "kernels")
MADE = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def test_every_allocation_names_its_device():
    """In the rooms that know no module: `torch.empty(…)` without `device=` goes to the default device."""
    found = []
    for room in ROOMS:
        folder = Path(importlib.util.find_spec(f"pyrepr.{room}").origin).parent
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                named = any(keyword.arg in (None, "device") for keyword in node.keywords)
                if of_torch and node.func.attr in MADE and not named:
                    found.append(f"{path.name}:{node.lineno} torch.{node.func.attr}")
    assert not found


def numbers(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device="cpu").sin().view(shape)


X, Y = numbers(20, 6), numbers(20, 5) ** 2
MASK = torch.arange(20) < 15
CODES = torch.arange(40).view(20, 2) % 4
RULE = {name: numbers(2, 5, 2, 4) for name in "qkv"} | {"beta": numbers(2, 5, 2).abs()}
LENGTHS = torch.tensor([0, 2, 5])
PACKED = {name: x[:1] for name, x in RULE.items()}


def streamed(mode, kernel="linear"):
    def call(x, y):
        stream = pyrepr.StreamingCKA(mode=mode, kernel=kernel)
        stream.update([x[:9]], [y[:9]]).update([x[9:]], [y[9:]])
        other = pyrepr.StreamingCKA(mode=mode, kernel=kernel).update([x[:9]], [y[:9]])
        return stream.merge(other).compute()

    return call


def updated(**options):
    def call(x):
        state = numbers(2, 6, 5).clone()
        return pyrepr.causal_conv1d_update(x, state, numbers(6, 4), None, "silu", **options), state

    return call


def decoded(x):
    torch.manual_seed(0)
    layer, cache = LAYER, DeltaCache()
    return torch.cat([layer(part, past_key_values=cache, use_cache=True)[0] for part in x.split(2, 1)], 1)


torch.manual_seed(0)
LAYER = GatedDeltaNet(16, head_dim=4, num_heads=2, layer_idx=0)
LOOKUP = LookupLinear(6, 5, bits=2)
SIGNS, BYTES = SignLinear(6, 5), SignLinear(6, 5).quantize_("int8")
CALLS = {
    **{
        f"{f.__name__} {kernel}": ((lambda x, y, f=f, kernel=kernel: f(x, y, kernel=kernel)), (X, Y))
        for f in (pyrepr.cka, pyrepr.hsic)
        for kernel in ("linear", "rbf", "laplacian", "polynomial", "cosine")
    },
    "cka tiny": (lambda x, y: pyrepr.cka(x * 1e-12, y * 1e12), (X, Y)),
    "cka masked": (lambda x, y: pyrepr.cka(x, y, mask=MASK), (X, Y)),
    "cka_matrix": (lambda x, y: pyrepr.cka_matrix([x, y], [y, x], kernel="rbf"), (X, Y)),
    "gram": (lambda x: pyrepr.gram(x, center=True), (X,)),
    "gram rbf": (lambda x: pyrepr.gram(x.detach(), kernel="rbf", center=True), (X,)),
    "loss": (lambda x, y: CKALoss(reduction="none")([x, x], [y, x], MASK), (X, Y)),
    "exact stream": (streamed("exact"), (X, Y)),
    "minibatch stream": (streamed("minibatch", "rbf"), (X, Y)),
    "hash_codes": (lambda x: pyrepr.hash_codes(x, 2), (X,)),
    "lookup_linear": (pyrepr.lookup_linear, (X, numbers(3, 4, 70), numbers(70))),
    "lookup_linear in float16": (lambda x, t: pyrepr.lookup_linear(x.half(), t.half()), (X, numbers(3, 4, 70))),
    "lookup_linear sparse": (lambda x, t: pyrepr.lookup_linear(x, t, sparse=True), (X, numbers(3, 4, 7))),
    "lookup_linear packed": (lambda x: pyrepr.lookup_linear(x, pyrepr.pack_tables(numbers(3, 4, 64))), (X,)),
    "sign_linear": (pyrepr.functional.sign_linear, (X, numbers(7, 12), numbers(7))),
    "lookup_sum": (lambda w, t: pyrepr.lookup_sum(CODES, w, t), (numbers(20, 2), numbers(2, 4, 7))),
    "segment_sum": (lambda v: pyrepr.segment_sum(v, CODES, 4), (X,)),
    "convolution": (lambda x, w: pyrepr.causal_conv1d_fn(x, w, activation="silu"), (numbers(2, 6, 5), numbers(6, 4))),
    "convolution, numbered": (
        lambda x, w: pyrepr.causal_conv1d_fn(x, w, None, torch.tensor([[0, 0, -1, 1, 1]], device="cpu").expand(2, 5)),
        (numbers(2, 6, 5), numbers(6, 4)),
    ),
    "convolution, packed": (
        lambda x, w: pyrepr.causal_conv1d_fn(x, w, cu_seqlens=LENGTHS, return_final_states=True),
        (numbers(1, 6, 5), numbers(6, 4)),
    ),
    "convolution of a token": (updated(), (numbers(2, 6),)),
    "convolution at indices": (updated(conv_state_indices=torch.tensor([1, -1])), (numbers(2, 6),)),
    "convolution in a ring": (updated(cache_seqlens=torch.tensor([3, 1])), (numbers(2, 6, 2),)),
    "delta rule": (lambda **x: pyrepr.chunk_delta_rule(**x, output_final_state=True), RULE),
    "gated delta rule": (lambda g, **x: pyrepr.chunk_gated_delta_rule(g=-g.abs(), **x), RULE | {"g": numbers(2, 5, 2)}),
    "delta rule, packed": (lambda **x: pyrepr.chunk_delta_rule(**x, cu_seqlens=LENGTHS), PACKED),
    "kda": (lambda g, **x: pyrepr.chunk_kda(g=-g.abs(), **x), RULE | {"g": numbers(2, 5, 2, 4)}),
    "gla": (
        lambda g, beta, **x: pyrepr.functional.chunk_gla(g=-g.abs(), **x),
        RULE | {"g": numbers(2, 5, 2, 4)},
    ),
    "mamba": (
        lambda x, dt, A, B, C: pyrepr.functional.mamba_chunk_scan_combined(x, dt.abs(), -A.abs(), B, C),
        {"x": numbers(2, 5, 2, 4), "dt": numbers(2, 5, 2), "A": numbers(2)}
        | {"B": numbers(2, 5, 1, 3), "C": numbers(2, 5, 1, 3)},
    ),
    "delta rule, recurrent": (
        lambda **x: pyrepr.fused_recurrent_delta_rule(**x, output_final_state=True),
        {name: x[:, :1] for name, x in RULE.items()},
    ),
    "delta rule, in place": (
        lambda **x: pyrepr.fused_recurrent_delta_rule(
            **{name: t.detach() for name, t in x.items()}, out_state=numbers(2, 2, 4, 4).clone()
        ),
        RULE,
    ),
    "layer": (lambda x: LAYER(x)[0], (numbers(2, 5, 16),)),
    "layer with a cache": (lambda x: decoded(x.detach()), (numbers(2, 6, 16),)),
    "lookup layer": (LOOKUP, (X,)),
    "layer of signs": (SIGNS, (X,)),
    "layer of signs in bytes": (BYTES, (X,)),
}


def results(call, given, dtype, device):
    """What comes out, and the gradients of its sum."""
    named = given if isinstance(given, dict) else dict(enumerate(given))
    leaves = {key: x.to(dtype).clone().requires_grad_(x.is_floating_point()) for key, x in named.items()}
    with torch.device(device):
        out = call(**leaves) if isinstance(given, dict) else call(*leaves.values())
        out = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
        if out[0].requires_grad:
            torch.autograd.backward(sum(x.double().sum() for x in out if x.requires_grad))
    return [x.detach() for x in (*out, *(x.grad for x in leaves.values() if x.grad is not None))]


@pytest.mark.parametrize("name", CALLS)
def test_another_default_device_changes_nothing(backend, name):
    call, given = CALLS[name]
    float32_only = any(word in name for word in ("layer", "place", "lookup", "token", "indices", "ring"))
    dtypes = [torch.float32] if float32_only else [torch.float32, torch.float64]
    for dtype in dtypes:
        with torch.set_grad_enabled(
            not any(word in name for word in ("token", "indices", "ring", "in place", "cache"))
        ):
            there, here = (results(call, given, dtype, device) for device in ("meta", "cpu"))
        for a, b in zip(there, here, strict=True):
            assert a.device.type == "cpu"
            torch.testing.assert_close(
                a.to_dense() if a.is_sparse else a, b.to_dense() if b.is_sparse else b, rtol=0, atol=0
            )


def test_another_default_device_on_the_short_way():
    for name in ("convolution of a token", "delta rule, recurrent", "lookup_linear", "delta rule, in place"):
        test_another_default_device_changes_nothing(None, name)


def test_layers_can_be_made_on_another_device():
    with torch.device("meta"):
        layers = [LookupLinear(6, 5, bits=2), SignLinear(6, 5), GatedDeltaNet(16, head_dim=4, num_heads=2), CKALoss()]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())
