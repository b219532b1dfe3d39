"""The delta rule's less common arguments against a formula in float64, and flash-linear-attention's own layers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import pyrepr
from pyrepr.functional import _delta_rule_extras, norm, rms_norm_gated
from pyrepr.nn import FusedRMSNormGated

RULES = {
    "plain": (pyrepr.chunk_delta_rule, pyrepr.fused_recurrent_delta_rule),
    "gated": (pyrepr.chunk_gated_delta_rule, pyrepr.fused_recurrent_gated_delta_rule),
    "kda": (pyrepr.chunk_kda, pyrepr.fused_recurrent_kda),
}
FUNCTIONS = [(rule, which) for rule in RULES for which in (0, 1)]
B, H, HV, K, V = 2, 2, 4, 6, 5

GATE = {"use_gate_in_kernel": True}
SIGMOID = {"use_beta_sigmoid_in_kernel": True}
# Name: rules, flags, tensors beside q, k, v, g, beta and initial_state that the call gets.
CASES = {
    "sigmoid": (("plain", "gated", "kda"), SIGMOID, ()),
    "twice the sigmoid": (("plain", "gated", "kda"), SIGMOID | {"allow_neg_eigval": True}, ()),
    "beta per value channel": (("plain", "gated", "kda"), SIGMOID, ("wide_beta",)),
    "v first": (("plain", "gated", "kda"), {"state_v_first": True}, ()),
    "v first, per value channel": (("plain", "gated", "kda"), {"state_v_first": True}, ("wide_beta",)),
    "chunk size": (("plain", "gated", "kda"), {"chunk_size": 16}, ()),
    "gate": (("gated", "kda"), GATE, ("A_log",)),
    "gate with a bias": (("gated", "kda"), GATE | SIGMOID | {"state_v_first": True}, ("A_log", "dt_bias")),
    "bounded gate": (("kda",), GATE | {"lower_bound": -4.0, "safe_gate": True}, ("A_log", "dt_bias")),
    "bounded gate alone": (("kda",), GATE | {"lower_bound": -0.5}, ()),
    "safe gate that is made": (("kda",), {"safe_gate": True, "lower_bound": -5.0}, ()),
    "gate per key": (("gated",), {}, ("gk",)),
    "gate per value": (("gated",), {}, ("gv",)),
    "gates per key and value": (("gated",), {"state_v_first": True}, ("gk", "gv")),
}
ROWS = [
    (name, rule, which)
    for name, (rules, _, tensors) in CASES.items()
    for rule in rules
    for which in (0, 1)
    if not ("gv" in tensors and which == 0)
]


def inputs(rule, T, flags, more):
    torch.manual_seed(3)
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "beta": (B, T, HV)}
    shapes["initial_state"] = (B, HV, V, K) if flags.get("state_v_first") else (B, HV, K, V)
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    gates = {"g": (B, T, HV, K) if rule == "kda" else (B, T, HV), "gk": (B, T, HV, K), "gv": (B, T, HV, V)}
    if rule == "plain" or "gk" in more:
        del gates["g"]
    for name, shape in gates.items():
        if name == "g" or name in more:
            x[name] = torch.randn(shape) if flags.get("use_gate_in_kernel") else -torch.rand(shape)
    if "wide_beta" in more:
        x["beta"] = torch.randn(B, T, HV, V)
    if not flags.get("use_beta_sigmoid_in_kernel"):
        x["beta"] = x["beta"].sigmoid()
    if "A_log" in more:
        x["A_log"] = torch.randn(HV)
    if "dt_bias" in more:
        x["dt_bias"] = torch.randn(HV * K if rule == "kda" else HV)
    return x


def formula(q, k, v, beta, initial_state, g=None, gk=None, gv=None, A_log=None, dt_bias=None, **flags):
    """Everything written out, token by token, with a decay for every element of the state."""
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    if flags.get("use_gate_in_kernel"):
        wide = g if g.dim() == 4 else g[..., None]
        if dt_bias is not None:
            wide = wide + dt_bias.view(HV, -1)
        rate = 1 if A_log is None else torch.exp(A_log)[:, None]
        bound = flags.get("lower_bound")
        g = -rate * torch.log1p(torch.exp(wide)) if bound is None else bound / (1 + torch.exp(-rate * wide))
    decay = torch.zeros(*v.shape[:3], K, V, dtype=v.dtype)
    for x, axis in ((g, -1), (gk, -1), (gv, -2)):
        if x is not None:
            decay = decay + (x if x.dim() == 4 else x[..., None]).unsqueeze(axis)
    if flags.get("use_beta_sigmoid_in_kernel"):
        beta = (2 if flags.get("allow_neg_eigval") else 1) / (1 + torch.exp(-beta))
    beta = beta if beta.dim() == 4 else beta[..., None]
    v_first = flags.get("state_v_first")
    s = initial_state.mT if v_first else initial_state
    out = []
    for t in range(v.shape[1]):
        s = s * decay[:, t].exp()
        error = beta[:, t] * (v[:, t] - (s * k[:, t, ..., None]).sum(2))
        s = s + k[:, t, ..., None] * error[:, :, None]
        out.append((s * q[:, t, ..., None]).sum(2) * K**-0.5)
    return torch.stack(out, 1), s.mT if v_first else s


def with_gradients(function, x, flags, dtype):
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in x.items()}
    o, state = function(**leaves, **flags)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape) for y in (o, state)]
    (o * weights[0]).sum().add((state * weights[1]).sum()).backward()
    return {"o": o.detach(), "state": state.detach()} | {f"d{name}": t.grad for name, t in leaves.items()}


def worst(got, expected):
    return max(
        (got[name].double() - expected[name]).abs().max().item() / expected[name].abs().max().clamp_min(1e-3).item()
        for name in expected
    )


# The worst error seen, relative to the largest value of a result or gradient, is 7.3e-6 (of A_log, whose gradient sums
# 140 terms of either sign) and 1.1e-15; three times that.
TOLERANCE = {torch.float32: 2.2e-5, torch.float64: 3.3e-15}


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize(("name", "rule", "which"), ROWS)
def test_the_formula_and_its_gradients(name, rule, which, T):
    _, flags, more = CASES[name]
    x = inputs(rule, T, flags, more)
    expected = with_gradients(formula, {n: t.double() for n, t in x.items()}, flags, torch.float64)

    def ours(**given):
        if "gk" in given:
            given.setdefault("g", None)
        return RULES[rule][which](**given, output_final_state=True)

    for dtype, tolerance in TOLERANCE.items():
        got = with_gradients(ours, x, flags, dtype)
        assert worst(got, expected) < tolerance, (dtype, worst(got, expected))


@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_half_precision_gates_are_computed_in_float32(rule):
    flags = GATE | SIGMOID
    x = {n: t.bfloat16() for n, t in inputs(rule, 40, flags, ("A_log", "dt_bias")).items()}
    x["initial_state"] = x["initial_state"].float()
    o, state = RULES[rule][0](**x, **flags, output_final_state=True)
    expected = formula(**{n: t.double() for n, t in x.items()}, **flags)
    assert worst({"o": o, "state": state}, {"o": expected[0], "state": expected[1]}) < 1e-2  # seen 3.9e-3, o in bf16


@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_gates_in_place_and_packed(rule):
    flags = GATE | SIGMOID
    x = inputs(rule, 7, flags, ("A_log", "dt_bias"))
    tokens = ("q", "k", "v", "g", "beta")
    packed = {n: t.flatten(0, 1)[None] if n in tokens else t for n, t in x.items()}
    cu = torch.tensor([0, 7, 14])
    expected_o, expected = formula(**{n: t.double() for n, t in x.items()}, **flags)
    state = x["initial_state"].clone()
    packed["initial_state"] = state
    o, final = RULES[rule][1](**packed, **flags, cu_seqlens=cu, cu_seqlens_cpu=cu.clone(), out_state=state)
    assert final is state
    assert worst({"o": o[0], "s": state}, {"o": expected_o.flatten(0, 1), "s": expected}) < TOLERANCE[torch.float32]


def test_v_first_states_can_be_updated_in_place():
    flags = {"state_v_first": True}
    x = inputs("gated", 3, flags, ())
    expected = formula(**{n: t.double() for n, t in x.items()}, **flags)[1]
    state = x["initial_state"]
    _, final = pyrepr.fused_recurrent_gated_delta_rule(**x, **flags, out_state=state)
    assert final is state and worst({"s": state}, {"s": expected}) < TOLERANCE[torch.float32]


def test_what_is_not_given_is_one_or_nothing():
    x = inputs("plain", 5, {}, ())
    ones = torch.ones(B, 5, HV)
    for function in (pyrepr.fused_recurrent_delta_rule, pyrepr.fused_recurrent_gated_delta_rule):
        o, _ = function(x["q"], x["k"], x["v"])
        torch.testing.assert_close(o, pyrepr.chunk_delta_rule(x["q"], x["k"], x["v"], ones)[0], rtol=0, atol=0)


def test_arguments_compile_in_one_graph():
    flags = GATE | SIGMOID | {"allow_neg_eigval": True, "state_v_first": True}
    x = inputs("gated", 9, flags, ("A_log", "dt_bias"))
    compiled = torch.compile(pyrepr.chunk_gated_delta_rule, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x, **flags)[0], pyrepr.chunk_gated_delta_rule(**x, **flags)[0])


BAD = {
    "g and gk": ("gated", {"gk": torch.zeros(B, 5, HV, K)}, ValueError, "g and gk both say how the state decays"),
    "gk of another shape": (
        "gated",
        {"g": None, "gk": torch.zeros(B, 5, HV)},
        ValueError,
        r"gk must have shape \[B, T, HV, K\] = \[2, 5, 4, 6\], got \[2, 5, 4\]",
    ),
    "gk with a gate": (
        "gated",
        GATE | {"g": None, "gk": torch.zeros(B, 5, HV, K), "A_log": torch.zeros(HV)},
        ValueError,
        "gk is the decay itself, so use_gate_in_kernel must be False",
    ),
    "A_log alone": ("gated", {"A_log": torch.zeros(HV)}, ValueError, "A_log .* needs use_gate_in_kernel=True, got Fal"),
    "dt_bias alone": ("kda", {"dt_bias": torch.zeros(HV)}, ValueError, "dt_bias .* needs use_gate_in_kernel=True"),
    "lower_bound alone": ("kda", {"lower_bound": -1.0}, ValueError, "lower_bound .* needs use_gate_in_kernel=True"),
    "no A_log": ("gated", GATE, ValueError, "A_log must be given with use_gate_in_kernel=True, got None"),
    "A_log of another shape": (
        "gated",
        GATE | {"A_log": torch.zeros(HV + 1)},
        ValueError,
        r"A_log must have shape \[HV\] = \[4\], got \[5\]",
    ),
    "A_log of integers": (
        "gated",
        GATE | {"A_log": torch.zeros(HV, dtype=torch.int64)},
        TypeError,
        "A_log must be float32, .* got int64",
    ),
    "dt_bias of another shape": (
        "kda",
        GATE | {"A_log": torch.zeros(HV), "dt_bias": torch.zeros(HV)},
        ValueError,
        r"dt_bias must have shape \[HV · K\] = \[24\], got \[4\]",
    ),
    "a bound above 0": (
        "kda",
        GATE | {"lower_bound": 1.0},
        ValueError,
        "lower_bound must be a negative number or None",
    ),
    "safe without a bound": (
        "kda",
        GATE | {"A_log": torch.zeros(HV), "safe_gate": True},
        ValueError,
        "safe_gate needs a lower_bound from -5 to below 0, got None",
    ),
    "safe with a low bound": (
        "kda",
        GATE | {"lower_bound": -6.0, "safe_gate": True},
        ValueError,
        "safe_gate needs a lower_bound from -5 to below 0, got -6.0",
    ),
    "twice nothing": (
        "plain",
        {"allow_neg_eigval": True},
        ValueError,
        "allow_neg_eigval doubles the sigmoid, so it needs use_beta_sigmoid_in_kernel=True, got False",
    ),
    "chunk size": ("plain", {"chunk_size": 24}, ValueError, "chunk_size must be one of 16, 32, 64, got 24"),
    "a copy of nothing": (
        "plain",
        {"cu_seqlens_cpu": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens_cpu is a copy of cu_seqlens, which must be given with it, got None",
    ),
    "v first the other way": (
        "plain",
        {"state_v_first": True},
        ValueError,
        r"initial_state must have shape \[N, HV, V, K\] = \[2, 4, 5, 6\], got \[2, 4, 6, 5\]",
    ),
    "beta of another width": (
        "plain",
        {"beta": torch.zeros(B, 5, HV, V + 1)},
        ValueError,
        r"beta must have shape \[B, T, HV\] or \[B, T, HV, V\] = \[2, 5, 4, 5\], got \[2, 5, 4, 6\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(name):
    rule, change, error, words = BAD[name]
    x = inputs(rule, 5, {}, ())
    before = x["initial_state"].clone()
    for function in RULES[rule]:
        with pytest.raises(error, match=words):
            function(**(x | change))
    assert torch.equal(x["initial_state"], before)


def test_more_bad_input():
    x = inputs("gated", 5, {}, ())
    del x["initial_state"]
    one = {name: t[:1] for name, t in x.items()}
    with pytest.raises(ValueError, match="cu_seqlens_cpu must hold the numbers of cu_seqlens, got others"):
        pyrepr.chunk_gated_delta_rule(
            **one, cu_seqlens=torch.tensor([0, 5]), cu_seqlens_cpu=torch.tensor([0, 4], dtype=torch.int32)
        )
    with pytest.raises(ValueError, match=r"gv must have shape \[B, T, HV, V\]"):
        pyrepr.fused_recurrent_gated_delta_rule(**x, gv=torch.zeros(B, 5, HV))
    with pytest.raises(ValueError, match="cp_context must be None, sequences are not split over processes"):
        pyrepr.chunk_gated_delta_rule(**x, cp_context=1)
    kda = {name: t for name, t in inputs("kda", 5, {}, ()).items() if name != "initial_state"}
    with pytest.raises(ValueError, match="return_intermediate_states must be False"):
        pyrepr.chunk_kda(**kda, return_intermediate_states=True)
    with pytest.raises(ValueError, match="g, the gate before its activation, must be given with use_gate_in_kernel"):
        pyrepr.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], A_log=torch.zeros(HV), use_gate_in_kernel=True)
    with pytest.raises(ValueError, match="beta must be given with use_beta_sigmoid_in_kernel=True, got None"):
        pyrepr.fused_recurrent_delta_rule(x["q"], x["k"], x["v"], use_beta_sigmoid_in_kernel=True)


# The normalisation with a gate


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gated_norm_and_its_gradients(activation, dtype):
    torch.manual_seed(0)
    norm = FusedRMSNormGated(12, activation=activation, eps=1e-4).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(12))
    x, g, residual = (torch.randn(3, 5, 12).to(dtype).requires_grad_() for _ in range(3))
    y, total = norm(x, g, residual, prenorm=True)
    assert y.dtype == total.dtype == dtype
    got = [
        y,
        total,
        *torch.autograd.grad(y.double().square().sum() + total.double().sum(), (x, g, residual, norm.weight)),
    ]
    wide = [t.detach().double().requires_grad_() for t in (x, g, residual, norm.weight)]
    s = wide[0] + wide[2]
    gate = 1 / (1 + torch.exp(-wide[1])) * (1 if activation == "sigmoid" else wide[1])
    z = s / (s.square().mean(-1, keepdim=True) + 1e-4).sqrt() * wide[3] * gate
    expected = [z, s, *torch.autograd.grad(z.square().sum() + s.sum(), wide)]
    # Seen 1e-15, 2.1e-7 and 6.9e-3: y is rounded to bf16, and the gradient taken there.
    tolerance = {torch.float64: 4e-15, torch.float32: 8e-7, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert ((a.double() - b).abs().max() / b.abs().max()).item() < tolerance


def test_gated_norm_says_what_is_wrong():
    x = torch.randn(2, 12)
    with pytest.raises(ValueError, match=r"g must have shape \[\..., D\] of x = \[2, 12\], got \[2, 11\]"):
        rms_norm_gated(x, x[:, :11])
    with pytest.raises(ValueError, match=r"weight must have shape \[D\] = \[12\], got \[3\]"):
        rms_norm_gated(x, x, torch.ones(3))
    with pytest.raises(ValueError, match="activation must be one of swish, silu, sigmoid, got 'gelu'"):
        FusedRMSNormGated(12, activation="gelu")
    with pytest.raises(ValueError, match="hidden_size must be a positive integer, got 0"):
        FusedRMSNormGated(0)


# flash-linear-attention itself, in processes of their own: importing it changes what transformers does


def run(code):
    pytest.importorskip("fla", minversion="0.6")  # has no kernels for other machines than Linux on x86-64
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_naive_functions_of_flash_linear_attention_in_float64():
    """They compute in float32; here what they call so is float64."""
    run("""
import types
import torch
import test_delta_rule_arguments as t
from fla.ops.delta_rule import naive as plain
from fla.ops.gated_delta_rule import gate as gated_gate, naive as gated
from fla.ops.kda import gate as kda_gate, naive as kda
torch.Tensor.float = torch.Tensor.double
wide = types.ModuleType("torch")
wide.__dict__.update(torch.__dict__ | {"float32": torch.float64, "float": torch.float64})
for module in (plain, gated, kda, gated_gate, kda_gate):
    module.torch = wide

def naive(q, k, v, beta, initial_state, g=None, gk=None, A_log=None, dt_bias=None, **flags):
    groups = v.shape[2] // q.shape[2]
    if flags.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if flags.get("allow_neg_eigval") else 1)
    if flags.get("use_gate_in_kernel"):
        bound = flags.get("lower_bound")
        if bound is not None:
            g = kda_gate.naive_kda_lowerbound_gate(g, A_log, dt_bias, bound, torch.float64)
        elif g.dim() == 4:
            g = kda_gate.naive_kda_gate(g, A_log, dt_bias, torch.float64)
        else:
            g = gated_gate.naive_gdn_gate(g, A_log, dt_bias, torch.float64)
    g = gk if gk is not None else g
    state = initial_state.mT if flags.get("state_v_first") else initial_state
    if g is not None and g.dim() == 4:
        o, state = kda.naive_recurrent_kda(q, k, v, g, beta, None, state, True)
    else:
        q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
        if g is not None:
            o, state = gated.naive_recurrent_gated_delta_rule(q, k, v, beta, g, None, state, True)
        else:
            x = [y.transpose(1, 2) for y in (q, k, v, beta)]
            o, state = plain.delta_rule_recurrence(*x, state, True)
            o = o.transpose(1, 2)
    return o, state.mT if flags.get("state_v_first") else state

for name, rule, which in t.ROWS:
    _, flags, more = t.CASES[name]
    if "gv" in more or ("wide_beta" in more and rule != "plain"):
        continue  # not in its naive functions
    x = {n: y.double() for n, y in t.inputs(rule, 37, flags, more).items()}
    expected = t.with_gradients(naive, x, flags, torch.float64)
    if "gk" in x:
        flags = flags | {"g": None}
    got = t.with_gradients(
        lambda **given: t.RULES[rule][which](**given, output_final_state=True), x, flags, torch.float64
    )
    assert t.worst(got, expected) < t.TOLERANCE[torch.float64], (name, rule, which, t.worst(got, expected))
""")


def test_its_layers_run_on_a_cpu_with_these_functions():
    run("""
import torch
import pyrepr
import test_delta_layers as t
from fla.layers import comba, delta_net, gated_deltanet, gated_deltaproduct, gdn2, gla, kda
from fla.models.utils import Cache

def convolution(x, weight, bias=None, activation=None, backend=None):
    return pyrepr.causal_conv1d_fn(x.mT, weight, bias, activation=activation).mT, None

ours = {
    n: getattr(pyrepr.functional, n)
    for n in dir(pyrepr.functional)
    if n.endswith(("delta_rule", "kda", "_gla", "delta_product", "comba", "gdn2"))
}
ours |= {"ShortConvolution": pyrepr.nn.ShortConvolution, "FusedRMSNormGated": pyrepr.nn.FusedRMSNormGated}
ours |= {"RMSNorm": pyrepr.nn.FusedRMSNormGated, "causal_conv1d": convolution}
ours |= {"ACT2FN": {"relu": torch.relu, "sigmoid": torch.sigmoid}}
for module in (comba, delta_net, gated_deltanet, gated_deltaproduct, gdn2, gla, kda):
    for name in ours.keys() & vars(module).keys():
        setattr(module, name, ours[name])
kinds = {c.__name__: c for c in (delta_net.DeltaNet, gated_deltanet.GatedDeltaNet, kda.KimiDeltaAttention)}
kinds |= {"GLA": gla.GatedLinearAttention, "GatedDeltaProduct": gated_deltaproduct.GatedDeltaProduct}

def close(a, b, name):
    assert (a - b).abs().max() < 2e-6 * b.abs().max().clamp_min(1), (name, (a - b).abs().max())

def in_parts(layer, x, whole, name):
    cache, parts = Cache(), []
    with torch.no_grad():
        for part in x.split([66, 1, 3], 1):
            o, _, cache = layer.eval()(part, past_key_values=cache, use_cache=True)
            parts.append(o)
    close(torch.cat(parts, 1), whole, name + ", with a cache")

for kind in (comba.Comba, gdn2.GatedDeltaNet2):
    torch.manual_seed(1)
    layer = kind(hidden_size=32, head_dim=8, num_heads=2, num_v_heads=4, expand_v=2.0, layer_idx=0)
    x = torch.randn(2, 70, 32)
    whole = layer.train()(x)[0]
    whole.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters()), kind
    in_parts(layer, x, whole.detach(), kind.__name__)

for name, (kind, arguments, _) in t.LAYERS.items():
    torch.manual_seed(1)
    theirs = kinds[kind.__name__](**arguments, layer_idx=0)
    layer = kind(**arguments, layer_idx=0)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    x = t.hidden(layer, 2, 70)
    found = []
    for module in (theirs, layer):
        module.train()
        leaf = x.clone().requires_grad_()
        y = module(leaf)[0]
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        close(a, b, name)
    in_parts(theirs, x, found[1][0], name)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        close(theirs(x, attention_mask=mask)[0][0, 9:], layer(x, attention_mask=mask)[0][0, 9:], name + ", padded")
""")


def test_positions_are_those_of_flash_linear_attention():
    run("""
import inspect
import pyrepr
from fla.ops import delta_rule, gated_delta_rule, kda
for module, names in (
    (delta_rule, ("chunk_delta_rule", "fused_recurrent_delta_rule")),
    (gated_delta_rule, ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")),
    (kda, ("chunk_kda", "fused_recurrent_kda")),
):
    for name in names:
        theirs = inspect.signature(inspect.unwrap(getattr(module, name))).parameters.values()
        ours = inspect.signature(getattr(pyrepr, name)).parameters.values()
        positional = [p.name for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert positional == [p.name for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD], name
""")


def test_positions_as_written_down():
    """The same where flash-linear-attention is not installed."""
    names = list(inspect.signature(pyrepr.fused_recurrent_gated_delta_rule).parameters)
    assert names[3:9] == ["g", "gk", "gv", "beta", "scale", "initial_state"]
    names = list(inspect.signature(pyrepr.chunk_kda).parameters)
    assert names[8:14] == [
        "use_qk_l2norm_in_kernel",
        "use_gate_in_kernel",
        "use_beta_sigmoid_in_kernel",
        "allow_neg_eigval",
        "safe_gate",
        "lower_bound",
    ]


# Native code that takes the arguments of a step as they come


def unreached(*_):
    raise AssertionError("the long way was taken")


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 3, 16, 37])
@pytest.mark.parametrize(("rule", "bound"), [("gated_delta_rule", None), ("kda", None), ("kda", -5.0)])
def test_gates_of_a_native_step_are_the_formula(monkeypatch, dtype, heads, bound, rule):
    monkeypatch.setattr(_delta_rule_extras, "activated", unreached)
    generator = torch.Generator().manual_seed(heads)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    per_token = (heads, 5) if rule == "kda" else (heads,)
    g = (draw(2, 3, *per_token) * 8).to(dtype)
    g[0, 0], g[1, 1] = 60, -90
    beta = (draw(2, 3, heads) * 4).to(dtype)
    A_log, dt_bias = (x.bfloat16() if dtype == torch.bfloat16 else x for x in (draw(heads), draw(*per_token)))
    x = {"q": draw(2, 3, heads, 5), "k": draw(2, 3, heads, 5) / 3, "v": draw(2, 3, heads, 4)}
    function = getattr(pyrepr, f"fused_recurrent_{rule}")
    options = {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias.flatten()}
    options |= {"lower_bound": bound} if rule == "kda" else {}
    more = {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True, "output_final_state": True}
    got = function(**x, g=g, beta=beta, **options, **more)
    raw = g.double() + dt_bias.double()
    rate = A_log.double().exp().view(-1, *(1,) * (len(per_token) - 1))
    decay = (
        -rate * torch.nn.functional.softplus(raw, threshold=100) if bound is None else bound * (rate * raw).sigmoid()
    )
    expected = function(**x, g=decay.float(), beta=(2 * beta.double().sigmoid()).float(), output_final_state=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_native_step_knows_what_is_not_a_number():
    x = {name: torch.ones(1, 2, 2, 3) for name in "qkv"}
    g, beta = torch.tensor([[[0.0, float("nan")], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [float("inf"), 0.0]]])
    o, _ = pyrepr.fused_recurrent_gated_delta_rule(
        **x, g=g, beta=beta, use_gate_in_kernel=True, A_log=torch.zeros(2), use_beta_sigmoid_in_kernel=True
    )
    assert o[:, :, 0].isfinite().all() and o[:, :, 1].isnan().all()


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 16, 67, 128])
@pytest.mark.parametrize("activation", ["swish", "sigmoid", None])
def test_native_norm_is_the_formula(monkeypatch, dtype, width, activation):
    monkeypatch.setattr(norm, "check_tensor", unreached)
    torch.manual_seed(width)
    x, g = (torch.randn(3, 5, width).mul(4).to(dtype) for _ in range(2))
    g[0, 0], g[0, 1] = 95, -95
    weight = torch.randn(width).to(dtype if dtype != torch.float16 else torch.float32)
    got = rms_norm_gated(x, None if activation is None else g, weight, activation=activation or "swish", eps=1e-5)
    wide, gate = x.double(), g.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    if activation is not None:
        expected = expected * gate.sigmoid() * (gate if activation == "swish" else 1)
    assert got.dtype == dtype and got.shape == x.shape
    exact = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=exact, atol=1e-6)
    if dtype == torch.float32:
        assert torch.equal(
            rms_norm_gated(x, weight=weight, g=None, eps=1e-5), rms_norm_gated(x, None, weight, eps=1e-5)
        )


def test_native_norm_of_many_rows_and_of_none():
    x = torch.randn(600, 64)
    torch.testing.assert_close(
        rms_norm_gated(x, x), torch.cat([rms_norm_gated(y, y) for y in x.split(7)]), rtol=0, atol=0
    )
    assert rms_norm_gated(x[:0], x[:0]).shape == (0, 64)
    torch.testing.assert_close(rms_norm_gated(x.T.contiguous().T, x), rms_norm_gated(x, x))


@pytest.mark.levels
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_the_gradient_of_a_fast_decay_is_as_small_as_it_is(rule, backend):
    """What no decay stands in enters dg with both signs; its rounding, 2e-4 of it once, hides what is left: 1e-4."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (torch.randn(1, 330, 2, 32, generator=generator) for _ in range(4))
    raw = torch.randn(1, 330, 2, *([32] if rule == "kda" else []), generator=generator)
    beta, A_log = torch.rand(1, 330, 2, generator=generator), torch.full((2,), 4.6)
    function = pyrepr.chunk_kda if rule == "kda" else pyrepr.chunk_gated_delta_rule

    def gradients(dtype):
        x = [t.to(dtype) for t in (q, k, v, raw, beta, A_log, weight)]
        leaves = x[3].requires_grad_(), x[5].requires_grad_()
        options = {"use_gate_in_kernel": True, "A_log": x[5], "use_qk_l2norm_in_kernel": True}
        with pyrepr.use_backend(backend):
            o, _ = function(*x[:3], g=x[3], beta=x[4], **options)
            return torch.autograd.grad((o * x[6]).sum(), leaves)

    for got, true in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert true.abs().max() < 0.2
        assert (got - true).abs().max() < 2e-6


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 70, 70, 330])])
def test_a_backward_outside_the_block_of_the_reference_is_right(cu_seqlens):
    """The kernel's backward starts from states that its own forward keeps and the reference's does not."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 330, 2, 16, generator=generator) for _ in range(3))
    g, beta = -0.01 * torch.rand(1, 330, 2, generator=generator), torch.rand(1, 330, 2, generator=generator)

    def gradients(block):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, g, beta)]
        with block:
            options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": cu_seqlens}
            o, _ = pyrepr.chunk_gated_delta_rule(*leaves[:3], g=leaves[3], beta=leaves[4], **options)
        return torch.autograd.grad(o.square().sum(), leaves)

    for got, expected in zip(gradients(pyrepr.use_backend("reference")), gradients(nullcontext()), strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
