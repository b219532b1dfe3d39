"""The delta rule: contracts with torch and with the caller."""

from __future__ import annotations

import pytest
import torch
from delta_inputs import (
    CHUNKED,
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    RULES,
    call,
    error,
    gradients,
    inputs,
    truth,
    weights_of,
)

import pyrepr
from pyrepr.ops.delta_rule import backward_op, forward_op, kept_states, update_op_

# Bad input


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"q": torch.zeros(1, 5, 2)}, ValueError, r"q must have shape \[B, T, H, K\]"),
        ({"q": [1.0]}, TypeError, "q must be a torch.Tensor"),
        (
            {"k": torch.zeros(1, 5, 2, 7)},
            ValueError,
            r"k must have shape \[B, T, H, K\] = \[1, 5, 2, 6\], got \[1, 5, 2, 7\]",
        ),
        ({"v": torch.zeros(1, 4, 4, 3)}, ValueError, r"v must have shape \[B, T, HV, V\]"),
        ({"v": torch.zeros(1, 5, 3, 3)}, ValueError, "multiple of the heads H = 2 of q and k, got 3"),
        ({"v": torch.zeros(1, 5, 4, 0)}, ValueError, "V of at least 1"),
        ({"v": torch.zeros(1, 5, 4, 3, dtype=torch.int64)}, TypeError, "v must be float32"),
        ({"v": torch.zeros(1, 5, 4, 3, dtype=torch.float16)}, TypeError, "q must have the dtype of v"),
        ({"v": torch.zeros(1, 5, 4, 3, device="meta")}, ValueError, "v must be on the device of q"),
        ({"beta": torch.zeros(1, 5, 2)}, ValueError, r"beta must have shape \[B, T, HV\]"),
        ({"g": torch.zeros(1, 5, 4, 6)}, ValueError, r"g must have shape \[B, T, HV\]"),
        ({"initial_state": torch.zeros(1, 4, 3, 6)}, ValueError, r"initial_state must have shape \[N, HV, K, V\]"),
        ({"initial_state": torch.zeros(1, 4, 6, 3).half()}, TypeError, "initial_state must be float32"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or int64, got float32"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens must end at T = 5, got 4"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens must not decrease"),
        ({"scale": "large"}, TypeError, "scale must be a number or None, got str"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"cu_seqlens must have shape \[N \+ 1\]"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, kind, words):
    x = inputs("gated", 5, H=2, HV=4, K=6, V=3) | {"initial_state": None}
    options = {name: change.get(name) for name in ("cu_seqlens", "scale")}
    with pytest.raises(kind, match=words):
        call(pyrepr.chunk_gated_delta_rule, x | change, **options)


def test_a_gate_per_key_has_its_own_shape():
    x = inputs("kda", 5, H=2, HV=4, K=6, V=3)
    with pytest.raises(ValueError, match=r"g must have shape \[B, T, HV, K\] = \[1, 5, 4, 6\], got \[1, 5, 4\]"):
        call(pyrepr.chunk_kda, x | {"g": x["g"][..., 0]})


@pytest.mark.parametrize("name", ["initial_state", "out_state"])
def test_states_are_checked_alike(name):
    x = inputs("gated", 1, H=2, HV=4, K=6, V=3)
    states = {"initial_state": x["initial_state"], "out_state": torch.empty(1, 4, 6, 3)}
    states[name] = states[name].double()
    with pytest.raises(TypeError, match=f"{name} must be float32"):
        call(pyrepr.fused_recurrent_gated_delta_rule, x | {"initial_state": states.pop("initial_state")}, **states)


def test_an_out_state_that_overlaps_the_initial_one():
    x = inputs("gated", 1, B=2, H=2, HV=2, K=24, V=20)
    memory = torch.zeros(3, 2, 24, 20)
    memory[:2] = x["initial_state"]
    expected = truth(x)
    out = memory[1:]
    o, _ = call(pyrepr.fused_recurrent_gated_delta_rule, x | {"initial_state": memory[:2]}, out_state=out)
    assert error(o, expected[0]) < FORWARD_TOLERANCE[torch.float32]
    assert error(out, expected[1]) < FORWARD_TOLERANCE[torch.float32]


def test_packing_needs_one_row():
    x = inputs("plain", 4, B=2) | {"initial_state": None}
    with pytest.raises(ValueError, match="q must have B = 1"):
        call(pyrepr.chunk_delta_rule, x, cu_seqlens=torch.tensor([0, 4]))


def test_what_cannot_be_differentiated_says_so():
    x = inputs("plain", 4)
    x["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="out_state is written in place"):
        call(pyrepr.fused_recurrent_delta_rule, x, out_state=x["initial_state"].clone())


# What torch does with the ops


def op_arguments(rule, cu):
    x = inputs(rule, 40, N=3)
    return x["q"], x["k"], x["v"], x["g"], x["beta"], x["initial_state"], cu


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule):
    arguments = op_arguments(rule, torch.tensor([0, 10, 10, 40]))
    slots = kept_states(1, 40, 3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op.overload, (*arguments, 0.5, True, slots), test_utils=tests)
    o, state, kept = forward_op(*arguments, 0.5, True, slots)
    torch.library.opcheck(backward_op.overload, (*arguments, kept, o, state, 0.5, True), test_utils=tests)
    *rest, initial, cu = arguments
    torch.library.opcheck(update_op_.overload, (initial.clone(), *rest, initial, cu, 0.5, True), test_utils=tests)


@pytest.mark.parametrize("rule", RULES)
def test_compile_in_one_graph(rule):
    x = inputs(rule, 40)
    weights = weights_of(*truth(x))
    eager = gradients(CHUNKED[rule], x, weights)
    compiled = gradients(torch.compile(CHUNKED[rule], fullgraph=True, backend="aot_eager"), x, weights)
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)
    cu = torch.tensor([0, 15, 40])
    packed = x | {"initial_state": None}
    compiled = torch.compile(CHUNKED[rule], fullgraph=True, backend="aot_eager")
    assert torch.equal(call(compiled, packed, cu_seqlens=cu)[0], call(CHUNKED[rule], packed, cu_seqlens=cu)[0])


def test_func_grad_agrees_with_autograd():
    x = inputs("gated", 40)
    g, beta = x["g"], x["beta"]

    def loss(q, k, v):
        return pyrepr.chunk_gated_delta_rule(q, k, v, g, beta)[0].square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(x["q"], x["k"], x["v"])
    leaves = [x[name].clone().requires_grad_() for name in "qkv"]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, beta):
            return pyrepr.chunk_delta_rule(q, k, v, beta, output_final_state=True)

    x = inputs("plain", 40)
    arguments = (x["q"], x["k"], x["v"], x["beta"])
    exported = torch.export.export(Layer(), arguments)
    assert torch.equal(exported.module()(*arguments)[0], Layer()(*arguments)[0])


def test_autocast_takes_the_dtype_of_v():
    x = inputs("gated", 10)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = call(pyrepr.chunk_gated_delta_rule, x | {"v": x["v"].bfloat16()})
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_autocast_does_not_reach_into_the_reference():
    """Its products would be rounded to bfloat16, silently."""
    x = inputs("gated", 40)
    with pyrepr.use_backend("reference"):
        expected = call(pyrepr.chunk_gated_delta_rule, x)
        with torch.autocast("cpu", torch.bfloat16):
            got = call(pyrepr.chunk_gated_delta_rule, x)
            alike = pyrepr.cka(x["v"][0].flatten(1), x["q"][0].flatten(1))
        assert alike == pyrepr.cka(x["v"][0].flatten(1), x["q"][0].flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_backends_can_be_forced():
    x = inputs("gated", 40)
    with pyrepr.use_backend("reference"):
        expected = call(pyrepr.chunk_gated_delta_rule, x)[0]
        grads = gradients(pyrepr.chunk_gated_delta_rule, x, weights_of(*truth(x)))
    assert error(call(pyrepr.chunk_gated_delta_rule, x)[0], expected.double()) < FORWARD_TOLERANCE[torch.float32]
    again = gradients(pyrepr.chunk_gated_delta_rule, x, weights_of(*truth(x)))
    assert all(error(again[name], grads[name].double()) < GRADIENT_TOLERANCE[torch.float32] for name in grads)


def test_training_keeps_few_states():
    """√n of the n chunk states at most, and V', as large as v."""
    assert kept_states(1, 16384, 1) <= 24
    x = inputs("plain", 2048, H=1, HV=1, K=64, V=64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(pyrepr.chunk_delta_rule, {name: t if t is None else t.requires_grad_() for name, t in x.items()})
    own = {x[name].untyped_storage().data_ptr() for name in x if x[name] is not None}
    extra = [t for t in saved if t is not None and t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() for t in extra) <= 8 * 64 * 64 + x["v"].numel()


def test_trains_compiled_for_any_length():
    def loss(q, k, v, beta):
        return pyrepr.chunk_delta_rule(q, k, v, beta.sigmoid(), use_qk_l2norm_in_kernel=True)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (3, 200):
        inputs = [torch.randn(1, length, 2, *width, requires_grad=True) for width in ((8,), (8,), (4,), ())]
        for value, expected in zip(
            torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True
        ):
            torch.testing.assert_close(value, expected)
