"""The delta rule against its float64 recurrence: values, gradients, packing, and hard inputs."""

from __future__ import annotations

import inspect

import pytest
import torch
from delta_inputs import (
    CHUNKED,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    RECURRENT,
    RULES,
    STATE_TOLERANCE,
    call,
    check_gradients,
    double,
    error,
    gradients,
    inputs,
    reference_function,
    truth,
    weights_of,
)
from pyrepr.benchmarks.harness import peak_memory
from torch.nn.functional import normalize

import pyrepr
from pyrepr.reference import delta_rule as reference

# The reference


@pytest.mark.parametrize("rule", RULES)
def test_reference_passes_gradcheck(rule):
    x = double(inputs(rule, 4, H=1, HV=2, K=3, V=2, unit=False))
    names = [name for name, t in x.items() if t is not None]
    cu = torch.tensor([0, 0, 3, 4])
    x["initial_state"] = torch.randn(3, 2, 3, 2, dtype=torch.float64)

    def run(*tensors):
        return call(
            reference_function,
            {**x, **dict(zip(names, tensors, strict=True))},
            cu_seqlens=cu,
            use_qk_l2norm_in_kernel=True,
        )

    assert torch.autograd.gradcheck(run, [x[name].requires_grad_() for name in names])


CUTS = {"nothing": (0, None), "few": (7, None), "a part": (9, None), "a chunk": (64, None), "chunks": (150, None)}
CUTS |= {"packed": (150, [0, 0, 3, 90, 150])}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rule", RULES)
def test_chunks_of_the_reference_and_their_derivative_are_the_recurrences(rule, cut, monkeypatch):
    """In float64 both the chunk form in plain PyTorch and the kernel are the recurrence, gradients too."""
    monkeypatch.setattr(reference, "SEGMENT", 70)
    T, cu = CUTS[cut]
    x = double(inputs(rule, T, B=1 if cu else 2, N=4 if cu else 2))
    options = {"cu_seqlens": None if cu is None else torch.tensor(cu), "use_qk_l2norm_in_kernel": True}
    expected = call(reference_function, x, **options)
    weights = weights_of(*expected)
    gradient = gradients(reference_function, x, weights, **options)
    for backend in ("reference", "cpu"):
        with pyrepr.use_backend(backend):
            assert all(error(a, b) < 1e-13 for a, b in zip(call(CHUNKED[rule], x, **options), expected, strict=True))
            got = gradients(CHUNKED[rule], x, weights, **options)
        for name, grad in gradient.items():
            assert error(got[name], grad) < 1e-13, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_no_output_before_it(backend, rule, dtype, value):
    """Chunks that hold such a number are taken token by token: the same up to the rounding of either form."""
    x = {name: None if t is None else t.detach() for name, t in inputs(rule, 100).items()}
    x = {name: t if t is None or name not in "qkv" else t.to(dtype) for name, t in x.items()}
    x["initial_state"] = None
    for name in ("q", "k", "v", "beta", "g"):
        for t in (3, 40, 61):
            if x[name] is None:
                continue
            changed = x | {name: x[name].clone()}
            changed[name][0, t].view(-1)[0] = value
            for grad in (False, True):
                q = {"q": changed["q"].clone().requires_grad_(grad)}
                before = call(CHUNKED[rule], x)[0][0, :t].double()
                after = call(CHUNKED[rule], changed | q)[0].detach()[0, :t].double()
                # Worst seen: 3.4e-7, 3.3e-3 (a rounding of the output) and 0; times 1.5.
                limit = {torch.float32: 6e-7, torch.bfloat16: 5e-3, torch.float64: 1e-14}[dtype]
                assert after.isfinite().all() and (before - after).abs().max() <= limit * before.abs().max(), (name, t)


@pytest.mark.parametrize("rule", RULES)
def test_float64_has_the_same_bits_for_any_number_of_threads(rule):
    x = double(inputs(rule, 150, B=3, N=3))
    weights = weights_of(*call(CHUNKED[rule], x))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((*call(CHUNKED[rule], x), *gradients(CHUNKED[rule], x, weights).values()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for row in results[1:] for a, b in zip(results[0], row, strict=True))


@pytest.mark.parametrize("rule", ["gated", "kda"])
@pytest.mark.parametrize("decay", [-torch.inf, -1e4, 3.0])
def test_reference_takes_any_decay(rule, decay):
    """A total decay neither makes NaN nor takes precision from the weak ones around it."""
    x = inputs(rule, 100)
    x["g"] = x["g"] / 8
    x["g"][:, 20] = decay
    with pyrepr.use_backend("reference"):
        got = call(CHUNKED[rule], x)
        grads = gradients(CHUNKED[rule], x, weights_of(*truth(x)))
    assert all(error(a, b) < FORWARD_TOLERANCE[torch.float32] for a, b in zip(got, truth(x), strict=True))
    expected = gradients(reference_function, double(x), weights_of(*truth(x)))
    assert all(error(grads[name], expected[name]) < GRADIENT_TOLERANCE[torch.float32] for name in grads)


def test_reference_needs_no_state_a_token():
    """One state a chunk: a state a token would be 128 MiB."""
    x = inputs("gated", 2048, H=1, HV=1, K=128, V=128)
    weights = weights_of(*truth(x))
    with pyrepr.use_backend("reference"):
        _, rise = peak_memory(lambda: gradients(CHUNKED["gated"], x, weights))
    assert rise is None or rise < 64


def test_reference_is_the_recurrence_of_the_paper():
    x = double(inputs("gated", 5, H=1, HV=1, K=3, V=2))
    s = x["initial_state"][0, 0]
    o, state = truth(x, scale=0.5)
    for t in range(5):
        k, v = x["k"][0, t, 0], x["v"][0, t, 0]
        s = x["g"][0, t, 0].exp() * (s - x["beta"][0, t, 0] * torch.outer(k, k) @ s) + x["beta"][0, t, 0] * torch.outer(
            k, v
        )
        torch.testing.assert_close(o[0, t, 0], 0.5 * s.T @ x["q"][0, t, 0])
    torch.testing.assert_close(state[0, 0], s)


def test_unit_keys_and_beta_2_without_values_are_reflections():
    x = double(inputs("plain", 6, H=1, HV=1, K=5, V=5))
    x["beta"], x["v"], x["k"] = torch.full_like(x["beta"], 2), torch.zeros_like(x["v"]), normalize(x["k"], dim=-1)
    x["initial_state"] = torch.eye(5, dtype=torch.float64)[None, None]
    s = truth(x)[1][0, 0]
    torch.testing.assert_close(s @ s.T, torch.eye(5, dtype=torch.float64))


# The kernels


@pytest.mark.levels
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [0, 1, 5, 31, 32, 63, 65, 200])
def test_forward(rule, T):
    x = inputs(rule, T, B=2, K=60, V=36)
    for function in (CHUNKED[rule], RECURRENT[rule]):
        o, state = call(function, x)
        expected = truth(x)
        assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.float32]
        assert error(state, expected[1]) < FORWARD_TOLERANCE[torch.float32]
        assert state.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_forward_in_every_dtype(rule, dtype):
    x = inputs(rule, 1000, H=1, HV=2, K=60, V=36, dtype=dtype)
    o, state = call(CHUNKED[rule], x)
    expected = truth(x)
    assert o.dtype == dtype
    assert error(o, expected[0]) < FORWARD_TOLERANCE[dtype]
    assert error(state, expected[1]) < STATE_TOLERANCE


@pytest.mark.levels
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_a_16_bit_forward_over_a_few_chunks(rule, dtype, tolerance):
    x = inputs(rule, 70, dtype=dtype)
    assert error(call(CHUNKED[rule], x)[0], truth(x)[0]) < tolerance


@pytest.mark.parametrize("rule", RULES)
def test_wide_heads_and_options(rule):
    x = inputs(rule, 70, H=1, HV=1, K=160, V=200, unit=False)
    o, _ = call(CHUNKED[rule], x, scale=0.3, use_qk_l2norm_in_kernel=True)
    assert error(o, truth(x, l2norm=True, scale=0.3)[0]) < FORWARD_TOLERANCE[torch.float32]


@pytest.mark.levels
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [0, 1, 33, 63, 65])
def test_gradients(rule, T):
    check_gradients(CHUNKED[rule], inputs(rule, T, B=2, K=60, V=36), GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_long_sequences_in_every_dtype(rule, dtype):
    x = inputs(rule, 1000, H=1, HV=1, K=60, V=36, dtype=dtype)
    check_gradients(CHUNKED[rule], x, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_through_the_normalisation_and_scale(rule):
    x = inputs(rule, 40, unit=False)
    check_gradients(RECURRENT[rule], x, GRADIENT_TOLERANCE[torch.float32], use_qk_l2norm_in_kernel=True, scale=0.7)


@pytest.mark.levels
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_of_any_size_are_normalised(backend, dtype):
    """Their squares may be beyond float32."""
    x = inputs("gated", 70, dtype=dtype)
    big = {**x, "q": x["q"] * 2.0**70, "k": x["k"] * 2.0**80}
    with pyrepr.use_backend(backend):
        o, small = (CHUNKED["gated"](**y, use_qk_l2norm_in_kernel=True)[0] for y in (big, x))
    torch.testing.assert_close(o, small, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.levels
@pytest.mark.parametrize("rule", RULES)
def test_packed_sequences_with_empty_ones(rule):
    cu = torch.tensor([0, 0, 40, 40, 41, 110, 110], dtype=torch.int32)
    x = inputs(rule, 110, N=6)
    o, state = call(CHUNKED[rule], x, cu_seqlens=cu)
    expected = truth(x, cu)
    assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.float32]
    assert error(state, expected[1]) < FORWARD_TOLERANCE[torch.float32]
    assert torch.equal(state[0], x["initial_state"][0])
    check_gradients(CHUNKED[rule], x, GRADIENT_TOLERANCE[torch.float32], cu_seqlens=cu)


@pytest.mark.levels
def test_packed_and_odd_shapes_in_bf16():
    """K, V and T that are multiples of nothing, grouped heads."""
    cu = torch.tensor([0, 0, 40, 40, 41, 110, 110], dtype=torch.int32)
    x = inputs("gated", 110, N=6, K=61, V=35, dtype=torch.bfloat16, unit=False)
    options = {"cu_seqlens": cu, "use_qk_l2norm_in_kernel": True, "scale": 0.3}
    o, state = call(pyrepr.chunk_gated_delta_rule, x, **options)
    expected = truth(x, cu, l2norm=True, scale=0.3)
    assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.bfloat16]
    assert error(state, expected[1]) < STATE_TOLERANCE
    x = {**x, "q": x["q"] * 0, "v": x["v"] * 0, "initial_state": None}
    assert not any(t.any() for t in call(pyrepr.chunk_gated_delta_rule, x, **options))


def test_many_short_packed_sequences():
    cu = torch.arange(0, 121, 3)
    x = inputs("gated", 120, N=40)
    check_gradients(pyrepr.chunk_gated_delta_rule, x, GRADIENT_TOLERANCE[torch.float32], cu_seqlens=cu)


@pytest.mark.parametrize("rule", RULES)
def test_without_state_and_with_strided_inputs(rule):
    x = inputs(rule, 50, B=2, H=2, HV=2, K=24, V=24)
    fused = torch.cat([x["q"], x["k"], x["v"]], -1)
    strided = dict(zip("qkv", fused.split(24, -1), strict=True))
    x |= {"initial_state": None, **strided, "beta": x["beta"].transpose(1, 2).contiguous().transpose(1, 2)}
    o, state = call(CHUNKED[rule], x)
    expected = truth(x)
    assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.float32]
    assert error(state, expected[1]) < FORWARD_TOLERANCE[torch.float32]
    transposed = {**x, "q": x["q"].mT.contiguous().mT}
    assert torch.equal(call(CHUNKED[rule], transposed)[0], o)


@pytest.mark.parametrize("rule", RULES)
def test_decoding_token_by_token_is_the_whole_sequence(rule):
    x = inputs(rule, 12, B=2, K=40, V=70)
    expected = truth(x)
    state = x["initial_state"].clone()
    outputs = []
    for t in range(12):
        step = {name: v if v is None else v[:, t : t + 1] for name, v in x.items()} | {"initial_state": state}
        o, returned = call(RECURRENT[rule], step, out_state=state)
        assert returned is state
        outputs.append(o)
    assert error(torch.cat(outputs, 1), expected[0]) < FORWARD_TOLERANCE[torch.float32]
    assert error(state, expected[1]) < FORWARD_TOLERANCE[torch.float32]


def test_out_state_of_another_tensor_leaves_the_initial_state_alone():
    x = inputs("gated", 3)
    before = x["initial_state"].clone()
    out = torch.full_like(before.mT.contiguous().mT, float("nan"))
    call(pyrepr.fused_recurrent_gated_delta_rule, x, out_state=out)
    assert torch.equal(x["initial_state"], before)
    assert error(out, truth(x)[1]) < FORWARD_TOLERANCE[torch.float32]
    fresh = {**x, "initial_state": None}
    call(pyrepr.fused_recurrent_gated_delta_rule, fresh, out_state=out)
    assert error(out, truth(fresh)[1]) < FORWARD_TOLERANCE[torch.float32]


# Hard inputs


@pytest.mark.parametrize("rule", ["plain", "kda"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_repeated_keys(rule, beta):
    """Keys at cosine ≈ 1: the inverse by repeated squaring is off by 10⁹ here."""
    x = inputs(rule, 200, H=1, HV=1, K=32, V=32)
    x["k"] = normalize(x["k"][:, :1] + 1e-3 * torch.randn(1, 200, 1, 32), dim=-1)
    x["beta"] = torch.full((1, 200, 1), beta)
    if rule == "kda":
        x["g"] = 1e-3 * x["g"]
    assert error(call(CHUNKED[rule], x)[0], truth(x)[0]) < 1e-4
    check_gradients(CHUNKED[rule], x, 1e-3)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_repeated_keys_in_bf16(beta):
    """With β = 2 nothing damps an error in the state; a state rounded to bf16 would be off by 10 % here."""
    x = inputs("plain", 1000, H=1, HV=2, K=64, V=64)
    x["k"] = normalize(x["k"][:, :1] + 1e-2 * torch.randn(1, 1000, 1, 64), dim=-1)
    x |= {name: x[name].bfloat16() for name in "qkv"} | {"beta": torch.full((1, 1000, 2), beta)}
    o, state = call(pyrepr.chunk_delta_rule, x)
    expected = truth(x)
    assert error(o, expected[0]) < 1e-2
    assert error(state, expected[1]) < 1e-2


@pytest.mark.levels
def test_one_channel_holds_every_key_in_bf16():
    """What the tokens of a chunk add to one row of the state is a sum of equal signs, all of it in one integer."""
    x = inputs("plain", 200, dtype=torch.bfloat16)
    x["k"] = torch.zeros_like(x["k"])
    x["k"][..., 3] = 1
    x |= {"v": torch.ones_like(x["v"]), "beta": torch.full_like(x["beta"], 0.1)}
    o, state = call(pyrepr.chunk_delta_rule, x)
    expected = truth(x)
    assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.bfloat16]
    assert error(state, expected[1]) < STATE_TOLERANCE


def test_long_decays_in_bf16():
    x = inputs("gated", 100, dtype=torch.bfloat16)
    for g in (torch.full_like(x["g"], -50.0), torch.where(torch.rand_like(x["g"]) < 0.3, -50.0, -0.01)):
        o, state = call(pyrepr.chunk_gated_delta_rule, {**x, "g": g})
        expected = truth({**x, "g": g})
        assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.bfloat16]
        assert error(state, expected[1]) < STATE_TOLERANCE


@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_growth_is_computed_too(rule):
    x = inputs(rule, 70)
    x["g"] = -0.1 * x["g"]
    o, state = call(CHUNKED[rule], x)
    expected = truth(x)
    assert expected[1].abs().max() > 10
    assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.float32]
    assert error(state, expected[1]) < FORWARD_TOLERANCE[torch.float32]


@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_long_decays(rule):
    """−50 a step, alone and among slow ones: no exponent of its own may overflow or lose the small ones."""
    x = inputs(rule, 100)
    for g in (torch.full_like(x["g"], -50.0), torch.where(torch.rand_like(x["g"]) < 0.3, -50.0, -0.01), x["g"] * -0.05):
        hard = {**x, "g": g}
        o, state = call(CHUNKED[rule], hard)
        expected = truth(hard)
        assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.float32]
        assert error(state, expected[1]) < FORWARD_TOLERANCE[torch.float32]
        # The gradient in g is a difference of sums of order 1, and 1e-23 here: its error is absolute.
        check_gradients(CHUNKED[rule], hard, GRADIENT_TOLERANCE[torch.float32], floor=1)


def test_no_decay_and_full_reset_are_the_limits():
    x = inputs("gated", 80)
    zero = call(pyrepr.chunk_gated_delta_rule, {**x, "g": torch.zeros_like(x["g"])})
    plain = call(pyrepr.chunk_delta_rule, {**x, "g": None})
    assert torch.equal(zero[0], plain[0])
    reset = x["g"].clone()
    reset[:, 40] = float("-inf")
    o, _ = call(pyrepr.chunk_gated_delta_rule, {**x, "g": reset})
    assert error(o, truth({**x, "g": reset})[0]) < FORWARD_TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "initial_state"])
def test_nan_stays_in_its_sequence_and_head(name, rule, dtype):
    x = inputs(rule, 70, B=2, H=2, HV=4, dtype=dtype)
    if x[name] is None:
        return
    clean, _ = call(CHUNKED[rule], x)
    dirty = {**x, name: x[name].clone()}
    first = 0 if name == "initial_state" else 32  # the start of the chunk that meets it
    at = (1, 0) if name == "initial_state" else (1, 50, 0)
    dirty[name][at] = float("nan")
    o, state = call(CHUNKED[rule], dirty)
    heads = 2 if name in ("q", "k") else 1
    assert o[1, 50, :heads].isnan().any(-1).all()
    assert name == "q" or state[1, :heads].isnan().flatten(1).any(1).all()
    assert torch.equal(o[0], clean[0])
    assert torch.equal(o[1, :, heads:], clean[1, :, heads:])
    assert torch.equal(o[1, :first, :heads], clean[1, :first, :heads])


@pytest.mark.parametrize("rule", RULES)
def test_a_very_long_sequence_stays_finite(rule):
    x = inputs(rule, 100_000, H=1, HV=1, K=8, V=8)
    x["beta"] = torch.full_like(x["beta"], 2.0)
    o, state = call(CHUNKED[rule], x)
    assert o.isfinite().all()
    names = [name for name in ("q", "k", "v", "g", "beta") if x[name] is not None]
    half = {**x, **{name: x[name][:, 50_000:] for name in names}}
    first = {**x, **{name: x[name][:, :50_000] for name in names}}
    half["initial_state"] = call(CHUNKED[rule], first)[1]
    assert error(call(CHUNKED[rule], half)[1], state.double()) < 1e-3
    narrow = {**x, **{name: x[name].bfloat16() for name in "qkv"}}
    assert call(CHUNKED[rule], narrow)[0].isfinite().all()


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            row = []
            for rule, heads in (("plain", 1), ("gated", 3), ("kda", 1)):
                x = inputs(rule, 100, H=heads, HV=heads, K=40, V=130)
                row += call(CHUNKED[rule], {**x, **{name: x[name].bfloat16() for name in "qkv"}})
                row += call(CHUNKED[rule], x)
                row += gradients(CHUNKED[rule], x, weights_of(*row[-2:])).values()
            results.append(row)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for row in results[1:] for a, b in zip(results[0], row, strict=True))


# Beside transformers' PyTorch fallback


def fallback():
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    return inspect.unwrap(module.torch_chunk_gated_delta_rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_not_larger_than_the_fallbacks(dtype):
    """Where o is rounded to 16 bits both have the error of that rounding; the worst element decides by a little."""
    x = inputs("gated", 512, HV=2, K=64, V=64, dtype=dtype) | {"initial_state": None}
    expected, _ = truth(x)
    ours = error(call(pyrepr.chunk_gated_delta_rule, x)[0], expected)
    theirs = error(fallback()(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])[0], expected)
    assert ours <= 1.05 * theirs


def test_a_training_step_takes_a_quarter_of_the_fallbacks_memory():
    x = inputs("gated", 16384, H=1, HV=1, K=32, V=32)

    def step(function):
        leaves = {name: x[name].clone().requires_grad_() for name in ("q", "k", "v", "g", "beta")}
        function(leaves.pop("q"), leaves.pop("k"), leaves.pop("v"), **leaves)[0].sum().backward()

    step(pyrepr.chunk_gated_delta_rule)
    _, ours = peak_memory(lambda: step(pyrepr.chunk_gated_delta_rule))
    _, theirs = peak_memory(lambda: step(fallback()))
    assert ours is None or ours <= theirs / 4
