"""The delta-rule layers: flash-linear-attention's parameters, the forward in plain torch, and a cache step by step."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

import pyrepr
from pyrepr.nn import GLA, DeltaCache, DeltaNet, GatedDeltaNet, GatedDeltaProduct, KimiDeltaAttention

THEIRS = {"GLA": "GatedLinearAttention"}  # what flash-linear-attention calls it
# Arguments, and the state_dict that flash-linear-attention 0.6.0 makes of them.
CONVOLUTIONS = {"q_conv1d.weight": [32, 1, 4], "k_conv1d.weight": [32, 1, 4]}
BIASES = {"q_conv1d.bias": [32], "k_conv1d.bias": [32]}
LAYERS = {
    "delta": (
        DeltaNet,
        {"hidden_size": 64, "num_heads": 4, "expand_k": 0.5, "expand_v": 1.5, "use_gate": True, "conv_bias": True},
        {"q_proj.weight": [32, 64], "k_proj.weight": [32, 64], "v_proj.weight": [96, 64], "b_proj.weight": [4, 64]}
        | CONVOLUTIONS
        | BIASES
        | {"v_conv1d.weight": [96, 1, 4], "v_conv1d.bias": [96], "g_proj.weight": [96, 64]}
        | {"o_norm.weight": [24], "o_proj.weight": [64, 96]},
    ),
    "delta, default": (
        DeltaNet,
        {"d_model": 32, "allow_neg_eigval": True},
        {"q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [32, 32], "b_proj.weight": [4, 32]}
        | CONVOLUTIONS
        | {"v_conv1d.weight": [32, 1, 4], "o_norm.weight": [8], "o_proj.weight": [32, 32]},
    ),
    "delta, bare": (
        DeltaNet,
        {"hidden_size": 32, "use_beta": False, "use_short_conv": False, "qk_activation": "elu", "qk_norm": "sum"},
        {"q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [32, 32]}
        | {"o_norm.weight": [8], "o_proj.weight": [32, 32]},
    ),
    "delta, relu": (
        DeltaNet,
        {"hidden_size": 32, "conv_size": 3, "qk_activation": "relu"},
        {"q_proj.weight": [32, 32], "k_proj.weight": [32, 32], "v_proj.weight": [32, 32], "b_proj.weight": [4, 32]}
        | {"q_conv1d.weight": [32, 1, 3], "k_conv1d.weight": [32, 1, 3], "v_conv1d.weight": [32, 1, 3]}
        | {"o_norm.weight": [8], "o_proj.weight": [32, 32]},
    ),
    "gated": (
        GatedDeltaNet,
        {"hidden_size": 64, "num_heads": 2, "num_v_heads": 4, "head_dim": 16, "expand_v": 1.5},
        {"A_log": [4], "dt_bias": [4], "q_proj.weight": [32, 64], "k_proj.weight": [32, 64], "v_proj.weight": [96, 64]}
        | {"a_proj.weight": [4, 64], "b_proj.weight": [4, 64]}
        | CONVOLUTIONS
        | {"v_conv1d.weight": [96, 1, 4], "g_proj.weight": [96, 64], "o_norm.weight": [24], "o_proj.weight": [64, 96]},
    ),
    "gated, no gate": (
        GatedDeltaNet,
        {"hidden_size": 64, "num_heads": 2, "head_dim": 16, "use_gate": False, "conv_bias": True, "expand_v": 2},
        {"A_log": [2], "dt_bias": [2], "q_proj.weight": [32, 64], "k_proj.weight": [32, 64], "v_proj.weight": [64, 64]}
        | {"a_proj.weight": [2, 64], "b_proj.weight": [2, 64]}
        | CONVOLUTIONS
        | BIASES
        | {"v_conv1d.weight": [64, 1, 4], "v_conv1d.bias": [64], "o_norm.weight": [32], "o_proj.weight": [64, 64]},
    ),
    "kimi": (
        KimiDeltaAttention,
        {"hidden_size": 64, "num_heads": 2, "num_v_heads": 4, "head_dim": 16, "expand_v": 1.5},
        {"A_log": [4], "dt_bias": [64], "q_proj.weight": [32, 64], "k_proj.weight": [32, 64], "v_proj.weight": [96, 64]}
        | CONVOLUTIONS
        | {"v_conv1d.weight": [96, 1, 4], "f_proj.0.weight": [24, 64], "f_proj.1.weight": [64, 24]}
        | {"b_proj.weight": [4, 64], "g_proj.0.weight": [24, 64], "g_proj.1.weight": [96, 24], "g_proj.1.bias": [96]}
        | {"o_norm.weight": [24], "o_proj.weight": [64, 96]},
    ),
    "kimi, bounded": (
        KimiDeltaAttention,
        {"hidden_size": 64, "num_heads": 2, "head_dim": 16, "safe_gate": True, "lower_bound": -5.0},
        {"A_log": [2], "dt_bias": [32], "q_proj.weight": [32, 64], "k_proj.weight": [32, 64], "v_proj.weight": [32, 64]}
        | CONVOLUTIONS
        | {"v_conv1d.weight": [32, 1, 4], "f_proj.0.weight": [16, 64], "f_proj.1.weight": [32, 16]}
        | {"b_proj.weight": [2, 64], "g_proj.0.weight": [16, 64], "g_proj.1.weight": [32, 16], "g_proj.1.bias": [32]}
        | {"o_norm.weight": [16], "o_proj.weight": [64, 32]},
    ),
    "product": (
        GatedDeltaProduct,
        {"hidden_size": 64, "num_heads": 2, "num_v_heads": 4, "head_dim": 16, "expand_v": 1.5, "num_householder": 3},
        {"A_log": [4], "dt_bias": [4], "q_proj.weight": [32, 64], "k_proj.weight": [96, 64]}
        | {"v_proj.weight": [288, 64], "b_proj.weight": [12, 64], "a_proj.weight": [4, 64], "g_proj.weight": [96, 64]}
        | {"q_conv1d.weight": [32, 1, 4], "k_conv1d.weight": [96, 1, 4], "v_conv1d.weight": [288, 1, 4]}
        | {"o_norm.weight": [24], "o_proj.weight": [64, 96]},
    ),
    "product, bare": (
        GatedDeltaProduct,
        {"hidden_size": 32, "num_heads": 2, "head_dim": 8, "use_output_gate": False, "use_forget_gate": False}
        | {"allow_neg_eigval": False, "use_short_conv": False},
        {"q_proj.weight": [16, 32], "k_proj.weight": [32, 32], "v_proj.weight": [64, 32], "b_proj.weight": [4, 32]}
        | {"o_norm.weight": [16], "o_proj.weight": [32, 32]},
    ),
    "gla": (
        GLA,
        {"hidden_size": 64},
        {"q_proj.weight": [32, 64], "k_proj.weight": [32, 64], "v_proj.weight": [64, 64], "g_proj.weight": [64, 64]}
        | {"gk_proj.0.weight": [16, 64], "gk_proj.1.weight": [32, 16], "gk_proj.1.bias": [32]}
        | {"o_proj.weight": [64, 64], "g_norm_swish_gate.weight": [16]},
    ),
    "gla, shared heads": (
        GLA,
        {"hidden_size": 64, "num_kv_heads": 2, "feature_map": "relu", "use_short_conv": True, "gate_fn": "sigmoid"}
        | {"clamp_min": -0.04},
        {"q_proj.weight": [32, 64], "k_proj.weight": [16, 64], "v_proj.weight": [32, 64], "g_proj.weight": [64, 64]}
        | {"q_conv1d.weight": [32, 1, 4], "k_conv1d.weight": [16, 1, 4], "v_conv1d.weight": [32, 1, 4]}
        | {"gk_proj.0.weight": [16, 64], "gk_proj.1.weight": [16, 16], "gk_proj.1.bias": [16]}
        | {"o_proj.weight": [64, 64], "g_norm.weight": [16]},
    ),
}


# Tolerances on `error` are twice the worst seen, relative to the largest value.


def build(name, **options):
    torch.manual_seed(0)
    kind, arguments, _ = LAYERS[name]
    layer = kind(**arguments, layer_idx=0, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():  # norms and biases start at one and zero, where mistakes do not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def hidden(layer, B, T, seed=1):
    return torch.randn(B, T, layer.q_proj.in_features, generator=torch.Generator().manual_seed(seed))


# A computation of its own, from the papers, in float64: nothing of pyrepr but the arguments.


def plain_rule(q, k, v, g, beta):
    """q, k: [T, H, K], v: [T, HV, V], g: [T, HV, K or 1], beta: [T, HV] -> [T, HV, V]."""
    q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1) for x in (q, k))
    state, out = torch.zeros(v.shape[1], q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(len(q)):
        state = g[t].exp()[..., None] * state
        error = v[t] - (state * k[t][..., None]).sum(1)
        state = state + (beta[t][:, None] * k[t])[..., None] * error[:, None]
        out.append((state * q[t][..., None]).sum(1) * q.shape[2] ** -0.5)
    return torch.stack(out)


def plain_product(q, k, v, g, beta, n):
    """q: [T, H, K], k: [T, n, H, K], v: [T, n, HV, V], g: [T, HV], beta: [T, n, HV] -> [T, HV, V]."""
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[-2], -2) for x in (q, k))
    state, out = torch.zeros(v.shape[2], q.shape[2], v.shape[3], dtype=q.dtype), []
    for t in range(len(q)):
        state = g[t].exp()[:, None, None] * state
        for i in range(n):
            error = v[t, i] - (state * k[t, i][..., None]).sum(1)
            state = state + (beta[t, i][:, None] * k[t, i])[..., None] * error[:, None]
        out.append((state * q[t][..., None]).sum(1) * q.shape[2] ** -0.5)
    return torch.stack(out)


def plain_gla(arguments, weights, linear, x, q, k, v):
    """The layer without an erase; q, k, v: [T, D] -> [T, hidden]."""
    heads, shared = 4, arguments.get("num_kv_heads", 4)
    g = functional.logsigmoid(x @ linear["gk_proj.0"].T @ linear["gk_proj.1"].T + weights["gk_proj.1.bias"]) / 16
    g = g.clamp_min(arguments.get("clamp_min", -torch.inf))
    q = q.unflatten(1, (heads, -1))
    k, v, g = (y.unflatten(1, (shared, -1)).repeat_interleave(heads // shared, 1) for y in (k, v, g))
    if arguments.get("feature_map"):
        q, k = q.relu(), k.relu()
    state, out = torch.zeros(heads, q.shape[2], v.shape[2], dtype=q.dtype), []
    for t in range(len(q)):
        state = g[t].exp()[..., None] * state + k[t][..., None] * v[t][:, None]
        out.append((state * q[t][..., None]).sum(1) * q.shape[2] ** -0.5)
    o = torch.stack(out)
    norm = weights["g_norm.weight"] if "g_norm.weight" in weights else weights["g_norm_swish_gate.weight"]
    gate = (x @ linear["g_proj"].T).view(o.shape)
    gate = gate.sigmoid() if arguments.get("gate_fn") == "sigmoid" else functional.silu(gate)
    return (o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm * gate).flatten(1) @ linear["o_proj"].T


def plain_forward(name, weights, x):
    """One row of the batch, [T, hidden] -> [T, hidden]; weights: the state_dict in float64."""
    kind, arguments, _ = LAYERS[name]
    heads = arguments.get("num_heads", 4)
    linear = {n.removesuffix(".weight"): w for n, w in weights.items() if n.endswith("weight") and w.dim() == 2}
    activation = "none" if name == "gla" else arguments.get("qk_activation", "silu")

    def mixed(part):
        y = x @ linear[f"{part}_proj"].T
        if f"{part}_conv1d.weight" in weights:
            w = weights[f"{part}_conv1d.weight"]
            padded = functional.pad(y.T[None], (w.shape[2] - 1, 0))
            y = functional.conv1d(padded, w, weights.get(f"{part}_conv1d.bias"), groups=len(w))[0].T
        return functional.silu(y) if (part == "v" and kind is not GLA) or activation == "silu" else y

    if kind is GLA:
        return plain_gla(arguments, weights, linear, x, *map(mixed, "qkv"))
    steps = arguments.get("num_householder", 2) if kind is GatedDeltaProduct else 1
    q, k = (mixed(p).unflatten(1, (n, -1)) for p, n in (("q", heads), ("k", steps * heads)))
    if activation == "relu":
        q, k = q.relu(), k.relu()
    if activation == "elu":
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
    if arguments.get("qk_norm") == "sum":
        q, k = (y / y.abs().sum(-1, keepdim=True) for y in (q, k))
    else:
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = mixed("v").unflatten(1, (steps * arguments.get("num_v_heads", heads), -1))
    beta = (x @ linear["b_proj"].T).sigmoid() if "b_proj" in linear else x.new_ones(v.shape[:2])
    beta = beta * (2 if arguments.get("allow_neg_eigval", kind is GatedDeltaProduct) else 1)
    g = torch.zeros_like(beta)[..., None]
    if kind is GatedDeltaNet:
        g = (-weights["A_log"].exp() * functional.softplus(x @ linear["a_proj"].T + weights["dt_bias"]))[..., None]
    if kind is KimiDeltaAttention:
        raw = (x @ linear["f_proj.0"].T @ linear["f_proj.1"].T + weights["dt_bias"]).unflatten(1, (v.shape[1], -1))
        rate, bound = weights["A_log"].exp()[:, None], arguments.get("lower_bound")
        g = bound * (rate * raw).sigmoid() if bound else -rate * functional.softplus(raw)
    if kind is GatedDeltaProduct:
        k, v, beta = (y.unflatten(1, (steps, -1)) for y in (k, v, beta))
        g = torch.zeros_like(beta[:, 0])
        if "a_proj" in linear:
            g = -weights["A_log"].exp() * functional.softplus(x @ linear["a_proj"].T + weights["dt_bias"])
        o = plain_product(q, k, v, g, beta, steps)
    else:
        o = plain_rule(q, k, v, g, beta)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["o_norm.weight"]
    if "g_proj" in linear:
        o = o * functional.silu((x @ linear["g_proj"].T).view(o.shape))
    if "g_proj.0" in linear:
        o = o * (x @ linear["g_proj.0"].T @ linear["g_proj.1"].T + weights["g_proj.1.bias"]).view(o.shape).sigmoid()
    return o.flatten(1) @ linear["o_proj"].T


def error(got, expected):
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_those_of_flash_linear_attention(name):
    state = build(name).state_dict()
    assert {n: list(p.shape) for n, p in state.items()} == LAYERS[name][2]
    assert all(p.dtype == torch.float32 for p in state.values())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("T", [1, 3, 70])
def test_forward_is_the_plain_computation(name, T):
    layer = build(name)
    x = hidden(layer, 2, T)
    weights = {n: p.double() for n, p in layer.state_dict().items()}
    o, attentions, cache = layer(x)
    assert attentions is None and cache is None
    for row in range(2):
        assert error(o[row], plain_forward(name, weights, x[row].double())) < 4e-6  # 2.2e-6 seen, with MKL's products


@pytest.mark.parametrize("name", LAYERS)
def test_float64_is_float64_throughout(name):
    layer = build(name).double()
    x = hidden(layer, 1, 20).double()
    assert error(layer(x)[0][0], plain_forward(name, layer.state_dict(), x[0])) < 1e-13


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_flow_to_every_parameter(name):
    layer = build(name).train()
    x = hidden(layer, 2, 33).requires_grad_()
    outer = torch.randn(2, 33, layer.hidden_size)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    got = torch.autograd.grad((layer(x)[0] * outer).sum(), (x, *parameters))
    leaves = [p.detach().double().requires_grad_() for p in (x, *parameters)]
    weights = dict(zip(names, leaves[1:], strict=True))
    rows = torch.stack([plain_forward(name, weights, row) for row in leaves[0]])
    expected = torch.autograd.grad((rows * outer).sum(), leaves)
    for parameter, a, b in zip(("x", *names), got, expected, strict=True):
        assert error(a, b) < 1e-5, parameter


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gradients", [False, True])
def test_step_by_step_with_a_cache_is_the_whole(name, gradients):
    """Without gradients the cache is written in place, with them it is not."""
    layer = build(name)
    x = hidden(layer, 2, 60)
    cache = DeltaCache()
    with torch.set_grad_enabled(gradients):
        whole = layer(x)[0]
        parts = [layer(part, past_key_values=cache, use_cache=True)[0] for part in x.split([2, 40, 1, 1, 9, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=2e-5)
    assert len(cache) == 1 and cache.get_seq_length() == 60


def test_a_cache_that_is_only_read_does_not_change():
    layer = build("gated")
    x = hidden(layer, 2, 20)
    with torch.no_grad():
        _, _, cache = layer(x[:, :19], use_cache=True)
        first, again = (layer(x[:, 19:], past_key_values=cache)[0] for _ in range(2))
    assert torch.equal(first, again) and cache.get_seq_length() == 19
    torch.testing.assert_close(first, layer(x)[0][:, 19:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["delta", "gated", "kimi", "delta, bare", "product", "gla"])
def test_padding_on_either_side_with_a_cache(name):
    layer = build(name)
    x = hidden(layer, 3, 40)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :17], mask[1, :40] = 0, 0
    with torch.no_grad():
        o, _, cache = layer(x, attention_mask=mask, use_cache=True)
        assert not o[0, :17].any() and not o[1].any()
        torch.testing.assert_close(o[0, 17:], layer(x[:1, 17:])[0][0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(o[2], layer(x[2:])[0][0], atol=2e-5, rtol=2e-5)
        right, _, _ = layer(x, attention_mask=mask.flip(1))
        torch.testing.assert_close(right[0, :23], layer(x[:1, :23])[0][0], atol=2e-5, rtol=2e-5)
        # One token more for every row, and one more for two of them.
        new = hidden(layer, 3, 2, seed=2)
        longer = torch.cat([mask, torch.tensor([[1, 1], [1, 0], [1, 1]])], 1)
        first = layer(new[:, :1], attention_mask=longer[:, :41], past_key_values=cache, use_cache=True)[0]
        second = layer(new[:, 1:], attention_mask=longer, past_key_values=cache, use_cache=True)[0]
    whole = layer(torch.cat([x[2:], new[2:]], 1))[0][0]
    torch.testing.assert_close(torch.cat([first[2], second[2]]), whole[40:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(first[1], layer(new[1:2, :1])[0][0], atol=2e-5, rtol=2e-5)
    assert not second[1].any()


@pytest.mark.parametrize("name", ["delta", "gated", "kimi", "product", "gla, shared heads"])
def test_packed_sequences_are_independent(name):
    layer = build(name)
    x, bounds = hidden(layer, 1, 50), torch.tensor([0, 2, 2, 33, 50])
    o, _, cache = layer(x, cu_seqlens=bounds, use_cache=True)
    parts = [layer(x[:, a:b])[0] for a, b in itertools.pairwise(bounds.tolist()) if b > a]
    torch.testing.assert_close(o, torch.cat(parts, 1), atol=2e-5, rtol=2e-5)
    assert cache[0]["recurrent_state"].shape[0] == 4


def test_beams_can_be_reordered():
    layer = build("kimi")
    x = hidden(layer, 3, 20)
    order = torch.tensor([2, 0, 2])
    with torch.no_grad():
        _, _, cache = layer(x[:, :19], use_cache=True)
        cache.reorder_cache(order)
        got = layer(x[order][:, 19:], past_key_values=cache, use_cache=True)[0]
    torch.testing.assert_close(got, layer(x[order])[0][:, 19:], atol=2e-5, rtol=2e-5)
    cache.reset()
    assert len(cache) == 0 and cache.get_seq_length() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16(name):
    layer = build(name)
    x = hidden(layer, 2, 40)
    expected = layer(x)[0]
    layer = layer.bfloat16()
    with torch.no_grad():
        o, _, cache = layer(x.bfloat16()[:, :39], use_cache=True)
        last = layer(x.bfloat16()[:, 39:], past_key_values=cache, use_cache=True)[0]
    assert o.dtype == torch.bfloat16 and cache[0]["recurrent_state"].dtype == torch.float32
    assert error(torch.cat([o, last], 1), expected.double()) < 4e-2


def test_compile_in_one_graph():
    layer = build("gated")
    x = hidden(layer, 2, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("T", [0, 5])
def test_no_rows_or_no_tokens(T):
    layer = build("gated")
    assert layer(torch.zeros(2 if T == 0 else 0, T, 64))[0].shape == (2 if T == 0 else 0, T, 64)


def test_real_flash_linear_attention():
    """Its own layer definition makes the state_dict, its naive functions the rule; in a process of its own, since
    importing it changes what transformers does."""
    pytest.importorskip("fla", minversion="0.6")  # has no kernels for other machines than Linux on x86-64
    code = f"""
import sys
sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
import torch, fla.layers
import test_delta_layers as t
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.kda.naive import naive_recurrent_kda

def rule(q, k, v, g, beta):
    q, k, v, g, beta = (x[None].float() for x in (q, k, v, g, beta))
    groups = v.shape[2] // q.shape[2]
    if g.shape[-1] > 1:
        o, _ = naive_recurrent_kda(q, k, v, g, beta)
        return o[0].double()
    q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    if g.any():
        o, _ = naive_recurrent_gated_delta_rule(q, k, v, beta, g[..., 0])
        return o[0].double()
    o, _ = delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)))
    return o[0].transpose(0, 1).double()

t.plain_rule = rule
for name, (kind, arguments, _) in t.LAYERS.items():
    torch.manual_seed(1)
    theirs = getattr(fla.layers, t.THEIRS.get(kind.__name__, kind.__name__))(**arguments, layer_idx=0)
    layer = kind(**arguments, layer_idx=0)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    x = t.hidden(layer, 1, 40)
    weights = {{n: p.double() for n, p in theirs.state_dict().items()}}
    assert t.error(layer(x)[0][0], t.plain_forward(name, weights, x[0].double())) < 1e-5, name
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DeltaNet(mode="fused_chunk"), "mode must be one of chunk, fused_recurrent, got 'fused_chunk'"),
        (lambda: DeltaNet(hidden_size=30), r"hidden_size · expand_k must be a multiple of num_heads = 4, got 30"),
        (lambda: DeltaNet(hidden_size=32, expand_v=0.51), "hidden_size · expand_v must be an integer, got 16.32"),
        (lambda: DeltaNet(qk_activation="gelu"), "qk_activation must be silu, relu, elu or identity, got 'gelu'"),
        (lambda: DeltaNet(qk_norm="l1"), "qk_norm must be l2 or sum, got 'l1'"),
        (lambda: GatedDeltaNet(num_heads=4, num_v_heads=6), "num_v_heads must be a multiple of num_heads = 4, got 6"),
        (lambda: GatedDeltaNet(output_gate_activation="relu"), "output_gate_activation must be swish, silu or sigmoid"),
        (
            lambda: GatedDeltaProduct(num_heads=4, num_v_heads=6),
            "num_v_heads must be a multiple of num_heads = 4, got 6",
        ),
        (lambda: GatedDeltaProduct(num_householder=0), "num_householder must be a positive integer, got 0"),
        (lambda: GLA(hidden_size=64, num_kv_heads=3), "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        (lambda: GLA(feature_map="elu"), "feature_map must be one of relu, sigmoid, silu, swish, got 'elu'"),
        (lambda: GLA(gate_fn=None), "gate_fn must be one of relu, sigmoid, silu, swish, got None"),
        (lambda: KimiDeltaAttention(safe_gate=True), "safe_gate needs a lower_bound"),
        (lambda: KimiDeltaAttention(lower_bound=1.0), "lower_bound must be negative, got 1.0"),
        (lambda: DeltaNet(hidden_size=32)(torch.zeros(2, 5, 16)), r"hidden_states must have shape \[B, T, 32\]"),
        (
            lambda: DeltaNet(hidden_size=32)(torch.zeros(2, 5, 32), torch.ones(2, 4)),
            r"attention_mask must have shape \[B, S\] = \[2, S\] with S of at least T = 5, got \[2, 4\]",
        ),
        (
            lambda: DeltaNet(hidden_size=32)(torch.zeros(2, 5, 32), use_cache=True),
            "DeltaNet needs a layer_idx to use past_key_values",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: DeltaNet(hidden_size=0), ValueError, "hidden_size must be a positive integer, got 0"),
        (lambda: DeltaNet(hidden_size="4"), ValueError, "hidden_size must be a positive integer, got '4'"),
        (lambda: GatedDeltaNet(hidden_size=7.5), ValueError, "hidden_size must be a positive integer, got 7.5"),
        (lambda: KimiDeltaAttention(conv_size=0), ValueError, "conv_size must be a positive integer, got 0"),
        (lambda: GatedDeltaNet(num_v_heads=-2), ValueError, "num_v_heads must be a positive integer, got -2"),
        (lambda: GatedDeltaNet(expand_v="2"), TypeError, "expand_v must be a number, got '2'"),
        (lambda: pyrepr.nn.ShortConvolution(4, 0), ValueError, "kernel_size must be a positive integer, got 0"),
        (lambda: DeltaNet(hidden_size=32)(None), TypeError, "hidden_states must be a torch.Tensor, got NoneType"),
        (lambda: DeltaNet(hidden_size=32)("x"), TypeError, "hidden_states must be a torch.Tensor, got str"),
        (
            lambda: DeltaNet(hidden_size=32)(torch.zeros(2, 5, 32).to_sparse()),
            TypeError,
            "hidden_states must be a dense tensor, got layout sparse_coo",
        ),
        (
            lambda: DeltaNet(hidden_size=32)(torch.zeros(2, 5, 32, dtype=torch.float64)),
            TypeError,
            "hidden_states must have the dtype of the layer, float32, got float64",
        ),
        (
            lambda: DeltaNet(hidden_size=32)(torch.zeros(2, 5, 32), [[1]]),
            TypeError,
            "attention_mask must be a torch.Tensor, got list",
        ),
    ],
)
def test_sizes_and_inputs_of_another_kind_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"past_key_values must be a pyrepr.nn.DeltaCache, got list"):
        DeltaNet(hidden_size=32, layer_idx=0)(torch.zeros(2, 5, 32), past_key_values=[])


def test_backends_agree():
    layer = build("gated")
    x = hidden(layer, 1, 20)
    expected = layer(x)[0]
    with pyrepr.use_backend("reference"):
        torch.testing.assert_close(layer(x)[0], expected, atol=2e-5, rtol=2e-5)
