"""A token of a gated-delta layer in one native call: its truth in float64, the calls it stands for, pools, refusals,
and the layers that make it."""

from __future__ import annotations

import pytest
import torch

import pyrepr
from pyrepr.functional import delta_decode as functions
from pyrepr.functional import rms_norm_gated
from pyrepr.functional.delta_decode import gated_delta_decode
from pyrepr.nn import DeltaCache, GatedDeltaNet
from pyrepr.ops import delta_rule as op
from pyrepr.reference.delta_decode import gated_delta_decode as reference

SHAPES = {  # B, H, HV, K, V, W, S
    "eight heads": (1, 8, 8, 128, 128, 4, 4),
    "heads that share keys": (2, 2, 6, 32, 48, 4, 3),
    "odd sizes": (3, 3, 3, 7, 21, 3, 5),
    "one tap": (2, 1, 2, 16, 16, 1, 1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def given(B=2, H=2, HV=4, K=16, V=32, W=4, S=4, dtype=torch.float32, rows=None, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    D, P = 2 * H * K + HV * V, B if rows is None else rows
    return {
        "x": numbers(B, D),
        "g": numbers(B, HV),
        "beta": numbers(B, HV),
        "conv_state": numbers(P, D, S),
        "initial_state": numbers(P, HV, K, V, dtype=torch.float32),
        "weight": numbers(D, W),
        "A_log": numbers(HV, dtype=torch.float32),
        "dt_bias": numbers(HV, dtype=torch.float32),
        "norm_weight": numbers(V),
        "gate": numbers(B, HV, V),
        "bias": numbers(D) if bias else None,
    }


def clones(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def natively(arguments, **options):
    """The native call, which must have been possible."""
    calls = []
    decode = op.decode

    def counted(*args):
        calls.append(decode(*args))
        return calls[-1]

    functions.decode = counted
    try:
        o = gated_delta_decode(**arguments, **options)
    finally:
        functions.decode = decode
    assert calls[0] is o
    return o


def apart(arguments, activation="swish", eps=1e-5, allow_neg_eigval=False):
    """The calls that it stands for, on the same states."""
    x, state = arguments["x"], arguments["initial_state"]
    HV, K, V = state.shape[1:]
    keys = (x.shape[1] - HV * V) // 2
    y = pyrepr.causal_conv1d_update(x, arguments["conv_state"], arguments["weight"], arguments["bias"], "silu")
    q, k, v = y[:, None].split([keys, keys, HV * V], -1)
    o, _ = pyrepr.fused_recurrent_gated_delta_rule(
        *(y.unflatten(-1, (-1, width)) for y, width in ((q, K), (k, K), (v, V))),
        g=arguments["g"][:, None],
        beta=arguments["beta"][:, None],
        initial_state=state,
        out_state=state,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=allow_neg_eigval,
        A_log=arguments["A_log"],
        dt_bias=arguments["dt_bias"],
    )
    gate = arguments["gate"]
    gate = None if gate is None else gate[:, None]
    return rms_norm_gated(o, gate, arguments["norm_weight"], activation=activation, eps=eps).flatten(1)


def exactly(arguments, **options):
    """The truth in float64: output and states after."""
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    wide["state"] = wide.pop("initial_state")
    return reference(**wide, **options)


def same(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_has_the_bits_of_those_it_stands_for(shape, dtype):
    ours = given(*SHAPES[shape], dtype=dtype)
    theirs = clones(ours)
    same(natively(ours), apart(theirs))
    for name in ours:
        if ours[name] is not None:
            same(ours[name], theirs[name])


@pytest.mark.levels
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_against_float64(shape, activation):
    arguments = given(*SHAPES[shape])
    twice = activation == "sigmoid"
    o, conv, state = exactly(arguments, swish=not twice, twice=twice, eps=1e-6)
    got = natively(arguments, activation=activation, allow_neg_eigval=twice, eps=1e-6)
    # Twice the worst seen, relative to the largest value.
    for x, truth, worst in ((got.view(o.shape), o, 2e-6), (arguments["initial_state"], state, 1e-6)):
        assert (x - truth).abs().max() <= worst * truth.abs().max()
    torch.testing.assert_close(arguments["conv_state"].double(), conv, rtol=0, atol=0)


def test_bfloat16_against_float64():
    arguments = given(*SHAPES["eight heads"], dtype=torch.bfloat16)
    o, _, state = exactly(arguments)
    got = natively(arguments).view(o.shape)
    assert (got - o).abs().max() <= 1.2e-2 * o.abs().max()
    assert (arguments["initial_state"] - state).abs().max() <= 1e-2 * state.abs().max()


@pytest.mark.parametrize("missing", ["gate", "norm_weight", "bias"])
def test_what_may_be_left_out(missing):
    ours = given() | {missing: None}
    theirs = clones(ours)
    same(natively(ours), apart(theirs))


def test_three_convolutions_are_one_cut_in_three():
    one = given()
    three, cut = clones(one), (2 * 16, 2 * 16, 4 * 32)
    for name, axis in (("x", 1), ("conv_state", 1), ("weight", 0), ("bias", 0)):
        three[name] = tuple(y.clone() for y in three[name].split(cut, axis))
    same(natively(one), natively(three))
    same(one["conv_state"], torch.cat(three["conv_state"], 1))
    same(one["initial_state"], three["initial_state"])


def test_tokens_and_filters_with_an_axis_more():
    flat = given()
    more = clones(flat)
    for name in ("x", "g", "beta"):
        more[name] = more[name][:, None]
    more["weight"], more["gate"] = more["weight"][:, None], more["gate"].flatten(1)[:, None]
    same(natively(flat)[:, None], natively(more))


@pytest.mark.parametrize("forced", [False, True], ids=["native", "apart"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "elsewhere"])
def test_states_in_pools(elsewhere, forced):
    arguments = given(B=4, rows=6)
    rows = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
    before = clones(arguments)
    options = {"state_indices": rows}
    if elsewhere:
        options |= {
            "out_conv_state": torch.full_like(before["conv_state"], 7),
            "out_state": torch.full_like(before["initial_state"], 7),
        }
    with pyrepr.use_backend("reference" if forced else "cpu"):
        o = gated_delta_decode(**arguments, **options)
    used = rows >= 0
    alone = {name: x[used] if name in ("x", "g", "beta", "gate") else x for name, x in before.items()}
    for name in ("conv_state", "initial_state"):
        alone[name] = before[name][rows[used].long()]
    truth, conv, state = exactly(alone)
    torch.testing.assert_close(o[used].double().view(truth.shape), truth, rtol=1e-4, atol=1e-5)
    assert not o[~used].any()
    for name, out, after in (("conv_state", "out_conv_state", conv), ("initial_state", "out_state", state)):
        expected = options.get(out, before[name]).clone()
        expected[rows[used].long()] = after.float()
        torch.testing.assert_close(options.get(out, arguments[name]), expected, rtol=1e-5, atol=1e-5)
        untouched = [i for i in range(6) if elsewhere or i not in rows]
        same(arguments[name][untouched], before[name][untouched])


def test_nobody_in_the_pools():
    arguments = given(B=2, rows=3)
    before = clones(arguments)
    o = gated_delta_decode(**arguments, state_indices=torch.tensor([-1, -1]))
    assert not o.any()
    same(arguments["conv_state"], before["conv_state"])
    same(arguments["initial_state"], before["initial_state"])


def test_a_row_that_is_nan_stays_where_it_is():
    arguments = given(B=3)
    clean = clones(arguments)
    arguments["x"][1] = torch.nan
    o, expected = natively(arguments), natively(clean)
    for x, y in ((o, expected), *((arguments[name], clean[name]) for name in ("conv_state", "initial_state"))):
        same(x[[0, 2]], y[[0, 2]])
        assert x[1].isnan().any()


@pytest.mark.parametrize("H", [1, 8])
def test_bits_do_not_depend_on_threads(H):
    arguments, threads, results = given(1, H, 8, 64, 128), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            own = clones(arguments)
            results.append((natively(own), own["initial_state"], own["conv_state"]))
        finally:
            torch.set_num_threads(threads)
    for x, y in zip(*results, strict=True):
        same(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_calls_go_part_by_part(dtype):
    arguments = {name: x.to(dtype) for name, x in given().items()}
    arguments["x"] = arguments["x"].mT.contiguous().mT  # no dense rows
    o, conv, state = exactly(arguments)
    got = gated_delta_decode(**arguments)
    assert got.dtype == dtype
    exact = dtype == torch.float64
    bounds = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.view(o.shape), o.to(dtype), **bounds)
    torch.testing.assert_close(arguments["initial_state"], state.to(dtype), **bounds)
    torch.testing.assert_close(arguments["conv_state"], conv.to(dtype), **bounds)


BAD = {
    "x": ({"x": torch.randn(2, 190)}, ValueError, "x must have D = 2 H K \\+ HV V channels"),
    "x of two tokens": ({"x": torch.randn(2, 2, 192)}, ValueError, "x must have shape \\[B, D\\] or \\[B, 1, D\\]"),
    "g": ({"g": torch.randn(2, 3)}, ValueError, "g must have shape \\[B, HV\\]"),
    "beta": ({"beta": torch.randn(2, 3)}, ValueError, "beta must have shape \\[B, HV\\]"),
    "state": ({"initial_state": torch.randn(3, 4, 16, 32)}, ValueError, "must have shape \\[N, HV, K, V\\]"),
    "state's dtype": ({"initial_state": torch.randn(2, 4, 16, 32).half()}, TypeError, "must be float32"),
    "conv_state": ({"conv_state": torch.randn(2, 192, 2)}, ValueError, "conv_state must have shape \\[B, D, S\\]"),
    "conv_state's dtype": ({"conv_state": torch.randn(2, 192, 4).half()}, TypeError, "conv_state must be float32"),
    "expanded": (
        {"conv_state": torch.randn(1, 192, 4).expand(2, -1, -1)},
        ValueError,
        "conv_state is written in place",
    ),
    "A_log": ({"A_log": torch.randn(3)}, ValueError, "A_log must have shape"),
    "dt_bias": ({"dt_bias": torch.randn(3)}, ValueError, "dt_bias must have shape"),
    "norm_weight": ({"norm_weight": torch.randn(31)}, ValueError, "norm_weight must have shape \\[V\\]"),
    "gate": ({"gate": torch.randn(2, 4, 31)}, ValueError, "gate must have shape \\[B, HV V\\]"),
    "weight": ({"weight": torch.randn(191, 4)}, ValueError, "weight must have shape"),
    "tuple": ({"x": tuple(torch.randn(2, 64) for _ in range(3))}, ValueError, "conv_state must be a tuple of three"),
    "one": ({"weight": tuple(torch.randn(64, 4) for _ in range(3))}, ValueError, "weight must be one tensor, as x is"),
    "rows": ({"state_indices": torch.tensor([0, 2])}, ValueError, "must be from -1 to 1"),
    "twice": ({"state_indices": torch.tensor([1, 1])}, ValueError, "once at most"),
    "out_state": ({"out_state": torch.randn(2, 4, 16, 31)}, ValueError, "out_state must have shape"),
    "out_conv_state": ({"out_conv_state": torch.randn(2, 192, 5)}, ValueError, "out_conv_state must have shape"),
    "activation": ({"activation": "relu"}, ValueError, "activation must be one of swish, silu, sigmoid"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be a number of at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence_and_moves_nothing(name):
    changes, error, words = BAD[name]
    arguments = given() | changes
    before = clones(arguments)
    with pytest.raises(error, match=words):
        gated_delta_decode(**arguments)
    for state in ("conv_state", "initial_state"):
        same(arguments[state], before[state])


def test_states_are_not_differentiated():
    arguments = given()
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="written in place and cannot be differentiated"):
        gated_delta_decode(**arguments)
    with torch.no_grad():
        natively(arguments)


def test_memory_in_common_is_never_mixed_up():
    arguments, whole = given(), torch.randn(2 * 4 * 16 * 32 + 8)
    arguments["initial_state"] = whole[:4096].view(2, 4, 16, 32)
    truth = exactly(clones(arguments))
    out = whole[8:].view(2, 4, 16, 32)
    o = gated_delta_decode(**arguments, out_state=out)
    torch.testing.assert_close(o.double().view(truth[0].shape), truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.double(), truth[2], rtol=1e-5, atol=1e-5)


# Layers


def token_by_token(layer, tokens):
    cache, outputs = DeltaCache(), []
    with torch.no_grad():
        for token in tokens.split(1, 1):
            o, _, cache = layer(token, past_key_values=cache, use_cache=True)
            outputs.append(o)
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"use_gate": False, "conv_bias": True}, {"num_v_heads": 4, "output_gate_activation": "sigmoid"}]
)
def test_a_layer_decodes_with_the_bits_of_separate_calls(options, dtype):
    torch.manual_seed(0)
    layer = GatedDeltaNet(64, head_dim=16, num_heads=2, layer_idx=0, allow_neg_eigval=True, **options).to(dtype)
    tokens = torch.randn(2, 5, 64).to(dtype)
    o, cache = token_by_token(layer, tokens)
    layer.o_norm.register_forward_hook(lambda *_: None)  # what looks at the norm gets to see it
    expected, other = token_by_token(layer, tokens)
    same(o, expected)
    for x, y in zip(cache[0]["conv_state"], other[0]["conv_state"], strict=True):
        same(x, y)
    same(cache[0]["recurrent_state"], other[0]["recurrent_state"])


def test_a_layer_decodes_natively(monkeypatch):
    results = []
    module = pyrepr.nn.delta_rule
    monkeypatch.setattr(module, "decode", lambda *args: results.append(op.decode(*args)) or results[-1])
    layer = GatedDeltaNet(64, head_dim=16, num_heads=2, layer_idx=0)
    token_by_token(layer, torch.randn(1, 4, 64))
    assert len(results) == 3 and all(x is not None for x in results)
    layer.v_conv1d.register_forward_pre_hook(lambda *_: None)
    token_by_token(layer, torch.randn(1, 4, 64))
    assert len(results) == 3


def test_an_interrupted_layer_leaves_its_cache():
    layer = GatedDeltaNet(64, head_dim=16, num_heads=2, layer_idx=0)
    tokens = torch.randn(1, 6, 64)
    _, cache = token_by_token(layer, tokens[:, :4])
    expected, _ = token_by_token(layer, tokens)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = layer.o_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        layer(tokens[:, 4:5], past_key_values=cache, use_cache=True)
    handle.remove()
    for i in (4, 5):
        with torch.no_grad():
            o, *_ = layer(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
        same(o, expected[:, i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_models_of_transformers_decode_natively(name, dtype, monkeypatch):
    pytest.importorskip("transformers")
    from test_transformers_delta import accelerated, build, fallback

    model = build(name).to(dtype)
    prompt = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(1))

    def logits():
        with torch.no_grad():
            out, every = model(prompt, use_cache=True), []
            for token in prompt[:, :4].split(1, 1):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                every.append(out.logits.float())
        return torch.cat(every, 1)

    with fallback():
        expected = logits()
    results, decode = [], op.decode
    monkeypatch.setattr(op, "decode", lambda *args: results.append(decode(*args)) or results[-1])
    with accelerated.enabled():
        got = logits()
        calls = 4 * sum(kind == "linear_attention" for kind in model.config.layer_types)
        assert len(results) == calls and all(x is not None for x in results)
        for path, module in model.named_modules():
            if path.endswith("linear_attn.norm"):
                module.register_forward_hook(lambda *_: None)  # what looks at the norm gets to see it
        separate = logits()
        assert len(results) == calls
    worst = 1e-5 if dtype == torch.float32 else 2e-2
    for other in (expected, separate):
        assert (got - other).abs().max() <= worst * other.abs().max()
    with fallback():
        same(logits(), expected)
