"""Tensors without memory – meta, fake, freed, lazily zero, empty – at every argument of every op: right or refused."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyrepr
from pyrepr import functional

JARGON = ("incompatible function arguments", "pybind", "std::", "INTERNAL ASSERT")


def numbers(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel()).sin().view(shape)


def rule(tokens):
    q, k = numbers(1, tokens, 2, 8), numbers(1, tokens, 2, 8).cos()
    return {"q": q, "k": k, "v": q * 2, "g": -numbers(1, tokens, 2).abs(), "beta": numbers(1, tokens, 2).abs()}


def step(q, k, v, g, beta, state):
    return pyrepr.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state, out_state=state)[0]


CALLS = {
    "delta rule of a token": (step, {**rule(1), "state": numbers(1, 2, 8, 8)}),
    "delta rule": (lambda **a: pyrepr.chunk_gated_delta_rule(**a)[0], rule(5)),
    "plain delta rule of a token": (
        lambda q, k, v, beta: pyrepr.fused_recurrent_delta_rule(q, k, v, beta)[0],
        {key: x for key, x in rule(1).items() if key != "g"},
    ),
    "convolution of a token": (
        pyrepr.causal_conv1d_update,
        {"x": numbers(2, 5), "conv_state": numbers(2, 5, 3), "weight": numbers(5, 4), "bias": numbers(5)},
    ),
    "convolution": (
        pyrepr.causal_conv1d_fn,
        {"x": numbers(2, 5, 9), "weight": numbers(5, 4), "bias": numbers(5), "initial_states": numbers(2, 5, 3)},
    ),
    "lookup": (
        pyrepr.lookup_linear,
        {"x": numbers(3, 8), "tables": numbers(2, 16, 6), "bias": numbers(6)},
    ),
    "lookup of bytes": (
        pyrepr.lookup_linear,
        {"x": numbers(3, 8), "tables": (numbers(2, 16, 6) * 99).to(torch.int8), "scales": numbers(2, 16).abs()},
    ),
    "signs": (
        functional.sign_linear,
        {"x": numbers(3, 8), "weight": numbers(6, 16), "bias": numbers(6)},
    ),
    "signs of bytes": (
        functional.sign_linear,
        {"x": numbers(3, 8), "weight": (numbers(6, 16) * 99).to(torch.int8), "scales": numbers(6).abs()},
    ),
    "lookup_sum": (
        pyrepr.lookup_sum,
        {"codes": torch.arange(6).view(3, 2), "weights": numbers(3, 2), "tables": numbers(2, 16, 6)},
    ),
    "segment_sum": (
        lambda values, codes: pyrepr.segment_sum(values, codes, 4),
        {"values": numbers(3, 5), "codes": torch.arange(6).view(3, 2) % 4},
    ),
    "hash_codes": (lambda x: pyrepr.hash_codes(x, bits=4), {"x": numbers(3, 8)}),
    "gram": (pyrepr.gram, {"x": numbers(6, 3), "y": numbers(5, 3)}),
    "cka": (pyrepr.cka, {"x": numbers(6, 3), "y": numbers(6, 4).cos()}),
    "topk": (lambda x, y: pyrepr.functional.pairwise_topk(x, y, 2)[0], {"x": numbers(6, 3), "y": numbers(5, 3)}),
    "logsumexp": (pyrepr.functional.pairwise_logsumexp, {"x": numbers(6, 3), "y": numbers(5, 3)}),
    "info_nce": (pyrepr.functional.info_nce, {"x": numbers(6, 3), "y": numbers(6, 3).cos()}),
}


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake(x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(x)


WITHOUT = {
    "meta": lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"),
    "freed": freed,
    "fake": fake,
    "lazily zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "no elements": lambda x: x[..., :0],
    "no rows": lambda x: x[:0],
}


def outcome(call, arguments):
    """The result, or the sentence."""
    try:
        return call(**arguments)
    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.filterwarnings("ignore::pyrepr.DegenerateInputWarning")
@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_right_or_refused(name, kind, grad):
    call, arguments = CALLS[name]
    for argument, x in arguments.items():
        given = {key: value.clone() for key, value in arguments.items()}
        given[argument] = WITHOUT[kind](x)
        with torch.set_grad_enabled(grad):
            found = outcome(call, given)
        if isinstance(found, str):
            assert not any(word in found for word in JARGON), (argument, found)
            assert "\n" not in found and len(found) < 500, (argument, found)
        elif kind == "lazily zero":
            zero = outcome(
                call, {**{key: value.clone() for key, value in arguments.items()}, argument: torch.zeros_like(x)}
            )
            torch.testing.assert_close(found, zero, equal_nan=True)
        else:  # a result without numbers, or one of no elements
            hollow = found.is_meta or type(found) is not torch.Tensor
            assert hollow or kind.startswith("no "), (argument, found)


def test_all_of_them_at_once_on_the_short_way():
    """In a process of its own, since what this is about is a crash."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, test_memoryless as t\n"
        "for call, arguments in t.CALLS.values():\n"
        "    for kind, without in t.WITHOUT.items():\n"
        "        with torch.no_grad():\n"
        "            t.outcome(call, {key: without(x) for key, x in arguments.items()})\n"
    )
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


FUNCTIONS = {
    pyrepr.fused_recurrent_gated_delta_rule: rule(1),
    pyrepr.chunk_gated_delta_rule: rule(5),
    pyrepr.fused_recurrent_kda: rule(3) | {"g": numbers(1, 3, 2, 8)},
    pyrepr.functional.chunk_simple_gla: {n: x for n, x in rule(5).items() if n != "beta"},
    pyrepr.functional.fused_recurrent_gla: {n: x for n, x in rule(1).items() if n in "qkv"}
    | {"gk": -rule(1)["q"].abs()},
    pyrepr.functional.chunk_gated_delta_product: rule(4) | {"num_householder": 1},
    pyrepr.functional.mamba_chunk_scan_combined: {"x": numbers(1, 5, 2, 8), "dt": numbers(1, 5, 2), "A": numbers(2)}
    | {"B": numbers(1, 5, 1, 3), "C": numbers(1, 5, 1, 3)},
    pyrepr.functional.selective_state_update: {
        "state": numbers(1, 2, 8, 3),
        "x": numbers(1, 2, 8),
        "dt": numbers(1, 2, 8),
    }
    | {"A": numbers(2, 8, 3), "B": numbers(1, 1, 3), "C": numbers(1, 1, 3)},
    pyrepr.functional.rms_norm_gated: {"x": numbers(2, 5), "g": numbers(2, 5), "weight": numbers(5)},
    pyrepr.functional.gated_delta_decode: {"x": numbers(1, 24), "g": numbers(1, 2), "beta": numbers(1, 2)}
    | {"conv_state": numbers(1, 24, 3), "initial_state": numbers(1, 2, 4, 4), "weight": numbers(24, 4)}
    | {"A_log": numbers(2), "dt_bias": numbers(2)},
    pyrepr.causal_conv1d_update: CALLS["convolution of a token"][1],
    pyrepr.causal_conv1d_fn: CALLS["convolution"][1],
    pyrepr.lookup_linear: CALLS["lookup"][1],
    functional.sign_linear: CALLS["signs"][1],
    pyrepr.lookup_sum: CALLS["lookup_sum"][1],
    pyrepr.segment_sum: {**CALLS["segment_sum"][1], "num_segments": 4},
    pyrepr.hash_codes: {**CALLS["hash_codes"][1], "bits": 4},
    pyrepr.gram: CALLS["gram"][1],
    pyrepr.hsic: CALLS["cka"][1],
    pyrepr.cka: CALLS["cka"][1],
    pyrepr.functional.pairwise_topk: CALLS["topk"][1] | {"k": 2},
    pyrepr.functional.pairwise_logsumexp: CALLS["logsumexp"][1],
    pyrepr.functional.info_nce: CALLS["info_nce"][1],
}
WRONG = ("x", b"x", 1.5, -1, 1 << 70, float("nan"), [], {}, (1, "x"), object(), torch.float32, numbers(2, 2, 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_no_wrong_argument_shows_what_is_behind(function):
    """Every argument, given what it never is: one sentence, and none of the language behind."""
    tried = 0
    for name in inspect.signature(function).parameters:
        for wrong in WRONG:
            given = {key: x.clone() if torch.is_tensor(x) else x for key, x in FUNCTIONS[function].items()}
            with torch.no_grad():
                found = outcome(function, {**given, name: wrong})
            tried += 1
            if isinstance(found, str):
                assert not any(word in found for word in JARGON), (name, wrong, found)
                assert "\n" not in found and len(found) < 500, (name, wrong, found)
    assert tried >= 2 * len(WRONG)
