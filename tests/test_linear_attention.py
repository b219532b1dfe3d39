"""The rule without an erase, with one along a vector of its own, with several steps a token, and Mamba-2's scan, each
against its formula in float64."""

from __future__ import annotations

import functools
import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyrepr
from pyrepr import functional as F

B, H, HV, K, V = 2, 2, 4, 20, 19


def inputs(T, *gates):
    torch.manual_seed(3)
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, HV, V), "initial_state": (B, HV, K, V)}
    x = {name: torch.randn(shape) for name, shape in shapes.items()}
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
    gates_of = {"g": (B, T, HV), "gk": (B, T, HV, K), "gv": (B, T, HV, V), "g_gamma": (HV,)}
    return x | {name: -torch.rand(gates_of[name]) for name in gates}


def formula(q, k, v, initial_state, g=None, gk=None, gv=None, g_gamma=None, reverse=False, state_v_first=False):
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    decay = torch.zeros(*v.shape[:3], K, V, dtype=v.dtype)
    for x, axis in ((g, -1), (gk, -1), (gv, -2)):
        if x is not None:
            decay = decay + (x if x.dim() == 4 else x[..., None]).unsqueeze(axis)
    if g_gamma is not None:
        decay = decay + g_gamma[:, None, None]
    s = initial_state.mT if state_v_first else initial_state
    out = {}
    for t in reversed(range(v.shape[1])) if reverse else range(v.shape[1]):
        s = s * decay[:, t].exp() + k[:, t, ..., None] * v[:, t, :, None]
        out[t] = (s * q[:, t, ..., None]).sum(2) * K**-0.5
    return torch.stack([out[t] for t in sorted(out)], 1), s.mT if state_v_first else s


def with_gradients(function, x, dtype):
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in x.items()}
    o, state = function(**leaves)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape) for y in (o, state)]
    (o * weights[0]).sum().add((state * weights[1]).sum()).backward()
    return {"o": o.detach(), "state": state.detach()} | {f"d{name}": t.grad for name, t in leaves.items()}


def worst(got, expected):
    return max(
        (got[name].double() - expected[name]).abs().max().item() / expected[name].abs().max().clamp_min(1e-3).item()
        for name in expected
    )


def check(got, expected, dtype):
    for shared, tolerance in ((False, TOLERANCE[dtype]), (True, SHARED_TOLERANCE[dtype])):
        for name in expected:
            if (name in SHARED) == shared:
                error = worst({name: got[name]}, {name: expected[name]})
                assert error < tolerance, (name, dtype, error)


CASES = {
    "linear attention": (F.chunk_simple_gla, (), {}),
    "simple": (F.chunk_simple_gla, ("g",), {}),
    "simple, recurrent": (F.fused_recurrent_simple_gla, ("g",), {}),
    "one decay": (F.chunk_simple_gla, ("g_gamma",), {}),
    "simple, v first": (F.chunk_simple_gla, ("g",), {"state_v_first": True}),
    "simple, reversed": (F.fused_recurrent_simple_gla, ("g",), {"reverse": True}),
    "per key": (F.chunk_gla, ("gk",), {}),
    "per key, recurrent": (F.fused_recurrent_gla, ("gk",), {"state_v_first": True}),
    "per key, reversed": (F.fused_recurrent_gla, ("gk",), {"reverse": True}),
    "per value": (F.fused_recurrent_gla, ("gv",), {}),
    "per key and value": (F.fused_recurrent_gla, ("gk", "gv"), {"reverse": True}),
}
# The worst error seen in all of them, relative to the largest value of a result or gradient, is 1.4e-6 in float32 (dt;
# elsewhere 6e-7) and 1.3e-15 in float64; three times that.
TOLERANCE = {torch.float32: 4.2e-6, torch.float64: 4e-15}
# Gradients of what all tokens share add up differences that cancel: seen 4.6e-5, of A.
SHARED = ("dg_gamma", "dA", "ddt_bias")
SHARED_TOLERANCE = {torch.float32: 1.4e-4, torch.float64: 4e-15}


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("name", CASES)
def test_the_formula_and_its_gradients(name, T):
    function, gates, flags = CASES[name]
    x = inputs(T, *gates)
    if flags.get("state_v_first"):
        x["initial_state"] = x["initial_state"].mT.contiguous()
    expected = with_gradients(
        lambda **given: formula(**given, **flags), {n: t.double() for n, t in x.items()}, torch.float64
    )

    def ours(**given):
        if function is F.chunk_gla:
            given["g"] = given.pop("gk")
        return function(**given, **flags, output_final_state=True)

    for dtype in TOLERANCE:
        check(with_gradients(ours, x, dtype), expected, dtype)
    with torch.no_grad():  # the way without a gradient
        o, state = ours(**x)
    assert worst({"o": o, "state": state}, {n: expected[n] for n in ("o", "state")}) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("gate", ["g", "gk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(gate, dtype):
    x = {n: t if n == "initial_state" else t.to(dtype) for n, t in inputs(40, gate).items()}
    function = F.fused_recurrent_simple_gla if gate == "g" else F.fused_recurrent_gla
    o, state = function(**x, output_final_state=True)
    expected = formula(**{n: t.double() for n, t in x.items()})
    assert worst({"o": o}, {"o": expected[0]}) < {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert worst({"s": state}, {"s": expected[1]}) < TOLERANCE[torch.float32]


@pytest.mark.levels
@pytest.mark.parametrize("gate", ["g", "gk"])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate_ones(gate, reverse):
    x = inputs(35, gate)
    states = torch.randn(4, HV, K, V)
    cu = torch.tensor([0, 1, 20, 20, 35])
    function = F.fused_recurrent_simple_gla if gate == "g" else F.fused_recurrent_gla
    row = {n: t[:1] for n, t in x.items() if n != "initial_state"}
    o, last = function(**row, initial_state=states, cu_seqlens=cu, output_final_state=True, reverse=reverse)
    for i, (a, b) in enumerate(itertools.pairwise(cu)):
        part = {n: t[:, a:b].double() for n, t in row.items()}
        own = states[i : i + 1].double()
        expected = formula(**part, initial_state=own, reverse=reverse) if a < b else (o[:, a:b].double(), own)
        assert worst({"s": last[i : i + 1]}, {"s": expected[1]}) < TOLERANCE[torch.float32]
        if a < b:
            assert worst({"o": o[:, a:b]}, {"o": expected[0]}) < TOLERANCE[torch.float32]


@pytest.mark.levels
@pytest.mark.parametrize("gate", ["g", "gk"])
def test_steps_in_place_are_the_whole(gate):
    x = inputs(9, gate)
    expected = formula(**{n: t.double() for n, t in x.items()})
    function = F.fused_recurrent_simple_gla if gate == "g" else F.fused_recurrent_gla
    state = x.pop("initial_state").clone()
    parts = []
    for t in range(9):
        o, last = function(**{n: y[:, t : t + 1] for n, y in x.items()}, initial_state=state, out_state=state)
        assert last is state
        parts.append(o)
    assert worst({"o": torch.cat(parts, 1), "s": state}, dict(zip("os", expected, strict=True))) < 1.8e-6


def test_states_of_a_pool_and_after_every_token():
    x = inputs(6, "g")
    pool = torch.randn(5, HV, K, V)
    rows = torch.tensor([3, -1])
    before = pool.clone()
    o, after, every = F.fused_recurrent_simple_gla(
        **x | {"initial_state": pool}, state_indices=rows, output_states="every token"
    )
    one = {n: t[:1].double() for n, t in x.items()} | {"initial_state": before[3:4].double()}
    expected = formula(**one)
    assert after is pool and torch.equal(pool[[0, 1, 2, 4]], before[[0, 1, 2, 4]])
    assert worst({"o": o[:1], "s": pool[3:4]}, dict(zip("os", expected, strict=True))) < TOLERANCE[torch.float32]
    assert not o[1].any() and every.shape == (B, 6, HV, K, V)
    torch.testing.assert_close(every[0, -1], pool[3], rtol=1e-6, atol=1e-6)


BAD = {
    "two gates": (F.chunk_simple_gla, {"g_gamma": torch.zeros(HV)}, ValueError, "g and g_gamma both say"),
    "gamma": (
        F.chunk_simple_gla,
        {"g": None, "g_gamma": torch.zeros(3)},
        ValueError,
        r"g_gamma must have shape \[HV\]",
    ),
    "per key": (F.chunk_gla, {}, ValueError, r"g must have shape \[B, T, HV, K\]"),
    "no gate": (F.chunk_gla, {"g": None}, TypeError, "g must be a torch.Tensor, got NoneType"),
    "v": (F.chunk_simple_gla, {"v": torch.zeros(B, 5, 3, V)}, ValueError, "value heads HV of v must be a multiple"),
    "dtype": (F.chunk_simple_gla, {"k": torch.zeros(B, 5, H, K).bfloat16()}, TypeError, "k must have the dtype of v"),
    "state": (
        F.chunk_simple_gla,
        {"initial_state": torch.zeros(B, HV, V, K)},
        ValueError,
        "initial_state must have shape",
    ),
    "in place": (
        F.fused_recurrent_simple_gla,
        {"reverse": True, "out_state": torch.zeros(B, HV, K, V)},
        ValueError,
        "out_state is for tokens in their order",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name):
    function, changes, kind, message = BAD[name]
    x = inputs(5, "g")
    with pytest.raises(kind, match=message):
        function(**x | changes)


def test_the_rule_with_an_erase_still_needs_its_step_size():
    x = inputs(5)
    with pytest.raises(TypeError, match=r"beta must be a torch\.Tensor, got NoneType"):
        pyrepr.chunk_delta_rule(**x, beta=None)
    with pytest.raises(TypeError, match=r"beta must be a torch\.Tensor, got NoneType"):
        pyrepr.chunk_gated_delta_rule(**x, g=None, beta=None)
    with pytest.raises(TypeError, match=r"v must be a torch\.Tensor, got NoneType"):
        pyrepr.fused_recurrent_delta_rule(**x | {"v": None})


# Several steps a token


def product(q, k, v, beta, initial_state, g=None, n=1, normalize=False):
    q, k = (x.repeat_interleave(HV // H, 2) for x in (q, k))
    if normalize:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    s, out = initial_state, []
    for t in range(q.shape[1]):
        if g is not None:
            s = s * g[:, t, :, None, None].exp()
        for i in range(t * n, t * n + n):
            error = beta[:, i, :, None] * (v[:, i] - (s * k[:, i, ..., None]).sum(2))
            s = s + k[:, i, ..., None] * error[:, :, None]
        out.append((s * q[:, t, ..., None]).sum(2) * K**-0.5)
    return torch.stack(out, 1), s


def product_inputs(T, n, gated=True):
    x = inputs(T, *["g"] * gated)
    torch.manual_seed(4)
    x["k"] = torch.nn.functional.normalize(torch.randn(B, T * n, H, K), dim=-1)
    return x | {"v": torch.randn(B, T * n, HV, V), "beta": 2 * torch.rand(B, T * n, HV)}


@pytest.mark.parametrize(("n", "gated", "normalize"), [(1, True, True), (2, False, False), (3, True, True)])
@pytest.mark.parametrize("T", [1, 25])
def test_products_are_the_formula(T, n, gated, normalize):
    x = product_inputs(T, n, gated)
    options = {"num_householder": n, "use_qk_l2norm_in_kernel": normalize, "output_final_state": True}
    wide = {name: t.double() for name, t in x.items()}
    expected = with_gradients(lambda **given: product(**given, n=n, normalize=normalize), wide, torch.float64)

    def ours(**given):
        return F.chunk_gated_delta_product(**{"g": None} | given, **options)

    for dtype in TOLERANCE:
        check(with_gradients(ours, x, dtype), expected, dtype)


def test_products_packed_in_place_and_with_their_states():
    n, x = 2, product_inputs(11, 2)
    states = torch.randn(2, HV, K, V)
    cu = torch.tensor([0, 4, 11])
    row = {name: t[:1] for name, t in x.items() if name != "initial_state"}
    out = torch.zeros_like(states)
    o, last = F.chunk_gated_delta_product(
        **row, num_householder=n, initial_state=states, out_state=out, cu_seqlens=cu, cu_seqlens_cpu=cu.clone()
    )
    assert last is out
    for i, (a, b) in enumerate(((0, 4), (4, 11))):
        steps = {name: t[:, a * n : b * n] if name in ("k", "v", "beta") else t[:, a:b] for name, t in row.items()}
        expected = product(**{m: t.double() for m, t in steps.items()}, initial_state=states[i : i + 1].double(), n=n)
        assert worst({"o": o[:, a:b], "s": out[i : i + 1]}, dict(zip("os", expected, strict=True))) < 4e-6
    _, last, every = F.chunk_gated_delta_product(**x, num_householder=n, output_final_state=True, output_states=3)
    assert every.shape == (B, 3, HV, K, V)
    torch.testing.assert_close(every[:, -1], last)
    shorter = {m: t[:, : 10 * n] if m in ("k", "v", "beta") else t[:, :10] for m, t in x.items() if m[0] != "i"}
    again = F.chunk_gated_delta_product(
        **shorter, initial_state=x["initial_state"], num_householder=n, output_final_state=True
    )[1]
    torch.testing.assert_close(every[:, -2], again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_householder": 0}, "num_householder must be a positive integer, got 0"),
        ({"num_householder": 3}, r"k must have shape \[B, T · 3, H, K\]"),
        ({"v": torch.zeros(B, 5, HV, V)}, r"v must have shape \[B, T · 2, HV, V\] with B = 2 and T = 5 of q"),
        ({"g": torch.zeros(B, 10, HV)}, r"g must have shape \[B, T, HV\]"),
        ({"beta": torch.zeros(B, 5, HV)}, r"beta must have shape \[B, T · 2, HV\]"),
        ({"cp_context": object()}, "cp_context must be None"),
    ],
)
def test_what_is_wrong_with_a_product_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        F.chunk_gated_delta_product(**{"num_householder": 2} | product_inputs(5, 2) | changes)


# An erase along a vector of its own


def apart_inputs(T, rule):
    x = inputs(T, "g" if rule == "comba" else "gk")
    torch.manual_seed(5)
    if rule == "comba":
        return x | {"p": 0.7 * x["k"] + 0.1 * torch.randn_like(x["k"]), "beta": torch.rand(B, T, HV)}
    return x | {"g": x.pop("gk"), "b": torch.rand(B, T, HV, K), "w": torch.rand(B, T, HV, V)}


def apart(q, k, v, g, initial_state, p=None, beta=None, b=None, w=None, normalize=False):
    if normalize:
        q, k, p = (x if x is None else x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k, p))
    q, k, p = (None if x is None else x.repeat_interleave(HV // H, 2) for x in (q, k, p))
    s, out = initial_state, []
    for t in range(v.shape[1]):
        if b is None:
            error = beta[:, t, :, None] * (v[:, t] - (s * p[:, t, ..., None]).sum(2))
            s = s * g[:, t, :, None, None].exp()
        else:
            s = s * g[:, t, ..., None].exp()
            error = w[:, t] * v[:, t] - (s * (b * k)[:, t, ..., None]).sum(2)
        s = s + k[:, t, ..., None] * error[:, :, None]
        out.append((s * q[:, t, ..., None]).sum(2) * K**-0.5)
    return torch.stack(out, 1), s


APART = {"comba": (F.chunk_comba, F.fused_recurrent_comba), "gdn2": (F.chunk_gdn2, F.fused_recurrent_gdn2)}


@pytest.mark.parametrize("rule", APART)
@pytest.mark.parametrize(("T", "which", "normalize"), [(1, 1, False), (5, 0, True), (70, 0, False)])
def test_an_erase_apart_is_the_formula(rule, T, which, normalize):
    x = apart_inputs(T, rule)
    options = {"use_qk_l2norm_in_kernel": normalize, "output_final_state": True}
    wide = {name: t.double() for name, t in x.items()}
    expected = with_gradients(lambda **given: apart(**given, normalize=normalize), wide, torch.float64)
    for dtype in TOLERANCE:
        check(with_gradients(lambda **given: APART[rule][which](**given, **options), x, dtype), expected, dtype)


@pytest.mark.parametrize("rule", APART)
@pytest.mark.parametrize("decay", [0.0, 8.0, 60.0])
def test_an_erase_apart_of_long_sequences_and_any_decay(rule, decay):
    x = apart_inputs(330, rule)  # eleven chunks, of which the forward keeps every third state
    x["g"] = x["g"] * decay
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    wide = {name: t.double() for name, t in x.items()}
    expected = with_gradients(lambda **given: apart(**given, normalize=True), wide, torch.float64)
    for dtype in (torch.float32, torch.float64):
        check(with_gradients(lambda **given: APART[rule][0](**given, **options), x, dtype), expected, dtype)


@pytest.mark.parametrize("rule", APART)
def test_an_erase_apart_lets_nothing_reach_earlier_tokens(rule):
    x = apart_inputs(40, rule)
    calm = APART[rule][0](**x)[0]
    for name in ("k", "v", "p" if rule == "comba" else "b"):
        spoilt = x | {name: x[name].clone()}
        spoilt[name][:, 21] = torch.nan
        for backend in ("cpu", "reference"):
            with pyrepr.use_backend(backend):
                o = APART[rule][0](**spoilt)[0]
            torch.testing.assert_close(o[:, :21], calm[:, :21], rtol=1e-5, atol=1e-5)
            assert o[:, 22:].isnan().all()


def test_an_erase_apart_has_the_same_bits_on_any_number_of_threads_and_leaves_its_inputs():
    for rule in APART:
        x = apart_inputs(70, rule)
        run = functools.partial(APART[rule][0], output_final_state=True)
        before, found, threads = {name: t.clone() for name, t in x.items()}, [], torch.get_num_threads()
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(with_gradients(run, x, torch.float32))
        torch.set_num_threads(threads)
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert all(torch.equal(x[name], before[name]) for name in x)


@pytest.mark.parametrize("rule", APART)
def test_an_erase_apart_of_packed_sequences(rule):
    x, states, cu = apart_inputs(11, rule), torch.randn(2, HV, K, V), torch.tensor([0, 4, 11])
    row = {name: t[:1] for name, t in x.items() if name != "initial_state"}
    o, last = APART[rule][0](**row, initial_state=states, cu_seqlens=cu, output_final_state=True)
    for i, (a, b) in enumerate(((0, 4), (4, 11))):
        own = {name: t[:, a:b].double() for name, t in row.items()}
        expected = apart(**own, initial_state=states[i : i + 1].double())
        assert worst({"o": o[:, a:b], "s": last[i : i + 1]}, dict(zip("os", expected, strict=True))) < 4e-6


def test_an_erase_along_the_key_is_the_rule():
    x = apart_inputs(9, "gdn2")
    x["b"], x["w"] = (t[..., :1].expand_as(t) for t in (x["b"], x["b"].new_zeros(B, 9, HV, V) + x["b"][..., :1]))
    raw = {"use_gate_in_kernel": True, "A_log": torch.randn(HV), "dt_bias": torch.randn(HV * K)}
    state = {"initial_state": x.pop("initial_state").mT.contiguous(), "state_v_first": True, "output_final_state": True}
    got = F.chunk_gdn2(**x, **raw, **state)
    beta = x["b"][..., 0]
    expected = pyrepr.chunk_kda(**{n: x[n] for n in "qkvg"}, beta=beta, **raw, **state)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [
        ("comba", {"p": torch.zeros(B, 5, HV, K)}, r"p must have shape \[B, T, H, K\]"),
        ("comba", {"g": torch.zeros(B, 5, HV, K)}, r"g must have shape \[B, T, HV\]"),
        ("comba", {"cu_seqlens_cpu": torch.zeros(3).int()}, "cu_seqlens_cpu is a copy of cu_seqlens"),
        ("gdn2", {"b": torch.zeros(B, 5, HV)}, r"b must have shape \[B, T, HV, K\]"),
        ("gdn2", {"w": torch.zeros(B, 5, HV, K)}, r"w must have shape \[B, T, HV, V\]"),
        ("gdn2", {"initial_state": torch.zeros(B, HV, V, K)}, r"initial_state must have shape \[N, HV, K, V\]"),
        ("gdn2", {"use_gate_in_kernel": True}, "A_log must be given with use_gate_in_kernel=True"),
        ("gdn2", {"return_intermediate_states": True}, "return_intermediate_states must be False"),
    ],
)
def test_what_is_wrong_with_an_erase_apart_is_said(rule, changes, message):
    with pytest.raises(ValueError, match=message):
        APART[rule][0](**apart_inputs(5, rule) | changes)


# Mamba-2's scan

G, N, P = 2, 16, 24


def scan_inputs(T):
    torch.manual_seed(5)
    x = {"x": torch.randn(B, T, HV, P), "dt": torch.randn(B, T, HV), "A": -torch.rand(HV) * 4}
    x |= {"B": torch.randn(B, T, G, N), "C": torch.randn(B, T, G, N), "D": torch.randn(HV), "dt_bias": torch.randn(HV)}
    return x | {"z": torch.randn(B, T, HV, P), "initial_states": torch.randn(B, HV, P, N)}


def scan(x, dt, A, B, C, D, dt_bias, z, initial_states, limit=(0.0, float("inf"))):
    B, C = (y.repeat_interleave(HV // G, 2) for y in (B, C))
    dt = torch.log1p(torch.exp(dt + dt_bias)).clamp(*limit)
    s, out = initial_states, []
    for t in range(x.shape[1]):
        s = s * (A * dt[:, t]).exp()[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((s * C[:, t, :, None]).sum(-1) + (D[:, None] if D.dim() == 1 else D) * x[:, t])
    return torch.stack(out, 1) * z * z.sigmoid(), s


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 2.0)])
def test_the_scan_and_its_gradients(T, limit):
    x = scan_inputs(T)
    wide = {name: t.double() for name, t in x.items()}
    expected = with_gradients(lambda **given: scan(**given, limit=limit), wide, torch.float64)
    options = {"chunk_size": 64, "dt_softplus": True, "dt_limit": limit, "return_final_states": True}
    for dtype in TOLERANCE:
        check(
            with_gradients(lambda **given: F.mamba_chunk_scan_combined(**given, **options), x, dtype), expected, dtype
        )


@pytest.mark.parametrize("first", ["P", "N"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_the_scan_token_by_token(first, dtype):
    x = {n: t if n == "initial_states" else t.to(dtype) for n, t in scan_inputs(5).items()}
    expected = scan(**{n: t.double() for n, t in x.items()})
    state = x["initial_states"].clone()
    state = state.mT.contiguous().mT if first == "P" else state

    def wide(y):
        return y[..., None].expand(*y.shape, P)

    fixed = {"A": x["A"][:, None, None].expand(HV, P, N), "D": wide(x["D"]), "dt_bias": wide(x["dt_bias"])}
    parts = []
    for t in range(5):
        own = {n: x[n][:, t] for n in ("x", "B", "C", "z")} | {"dt": wide(x["dt"][:, t])}
        parts.append(F.selective_state_update(state, **own, **fixed, dt_softplus=True))
    got = {"o": torch.stack(parts, 1), "s": state}
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    assert worst(got, dict(zip("os", expected, strict=True))) < tolerance
    states = [x["initial_states"].clone() for _ in range(2)]  # numbers of their own for every channel: the other way
    own["dt"] = own["dt"].contiguous()
    a = F.selective_state_update(states[0], **own, **fixed, dt_softplus=True)
    own["dt"] = wide(x["dt"][:, 4])
    b = F.selective_state_update(states[1], **own, **fixed, dt_softplus=True)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_an_update_without_heads_is_mamba():
    torch.manual_seed(6)
    state, x, dt = torch.randn(B, P, N), torch.randn(B, P), torch.rand(B, P)
    A, b, c, D = -torch.rand(P, N), torch.randn(B, N), torch.randn(B, N), torch.randn(P)
    expected = state * (dt[..., None] * A).exp() + (dt * x)[..., None] * b[:, None]
    o = F.selective_state_update(state, x, dt, A, b, c, D)
    torch.testing.assert_close(state, expected)
    torch.testing.assert_close(o, (expected * c[:, None]).sum(-1) + D * x)


def test_a_scan_of_packed_sequences():
    x = scan_inputs(11)
    row = {n: t[:1] if n in ("x", "dt", "B", "C", "z") else t for n, t in x.items()}
    numbers = torch.tensor([[7] * 4 + [2] * 7])
    options = {"dt_softplus": True, "return_final_states": True}
    o, last = F.mamba_chunk_scan_combined(**row, seq_idx=numbers, **options)
    again = F.mamba_chunk_scan_combined(**row, cu_seqlens=torch.tensor([0, 4, 11]), **options)
    assert torch.equal(o, again[0]) and torch.equal(last, again[1])
    for i, (a, b) in enumerate(((0, 4), (4, 11))):
        own = {n: t[:, a:b] if n in ("x", "dt", "B", "C", "z") else t for n, t in row.items()}
        own["initial_states"] = x["initial_states"][i : i + 1]
        expected = scan(**{n: t.double() for n, t in own.items()})
        assert worst({"o": o[:, a:b], "s": last[i : i + 1]}, dict(zip("os", expected, strict=True))) < 3e-6


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dt": torch.zeros(B, 5, 3)}, ValueError, r"dt must have shape \[B, T, H\]"),
        ({"A": torch.zeros(HV, N)}, ValueError, r"A must have shape \[H\]"),
        (
            {"B": torch.zeros(B, 5, 3, N)},
            ValueError,
            r"B must have shape \[B, T, G, N\] with H = 4 of x a multiple of G",
        ),
        ({"C": torch.zeros(B, 5, G, 3)}, ValueError, r"C must have shape \[B, T, G, N\]"),
        ({"dt_limit": (2.0, 1.0)}, ValueError, "dt_limit must be two numbers, the smaller one first"),
        ({"seq_idx": torch.zeros(1, 5).int()}, ValueError, "x must have B = 1 with seq_idx"),
        ({"initial_states": torch.zeros(B, HV, N, P)}, ValueError, "initial_states must have shape"),
        ({"x": None}, TypeError, "x must be a torch.Tensor"),
    ],
)
def test_what_is_wrong_with_a_scan_is_said(changes, kind, message):
    with pytest.raises(kind, match=message):
        F.mamba_chunk_scan_combined(**scan_inputs(5) | changes)


def test_an_update_that_is_refused_leaves_the_state():
    x = scan_inputs(1)
    state = x["initial_states"].clone()
    given = {n: x[n][:, 0] for n in ("x", "B", "C")} | {"dt": x["dt"][:, 0, :, None].expand(B, HV, P)}
    fixed = {"A": x["A"][:, None, None].expand(HV, P, N)}
    with pytest.raises(ValueError, match=r"D must have shape \[H, P\]"):
        F.selective_state_update(state, **given, **fixed, D=x["D"])
    with pytest.raises(RuntimeError, match="state is written in place and cannot be differentiated"):
        F.selective_state_update(state, **given | {"x": given["x"].clone().requires_grad_()}, **fixed)
    assert torch.equal(state, x["initial_states"])


# flash-linear-attention itself


def run(code):
    pytest.importorskip("fla", minversion="0.6")  # has no kernels for other machines than Linux on x86-64
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_naive_functions_and_positions_of_flash_linear_attention():
    """Its naive functions compute in float32; here what they call so is float64."""
    run("""
import inspect
import itertools
import types
import torch
import test_linear_attention as t
from fla.ops import comba, gated_delta_product, gdn2, gla, simple_gla
from fla.ops.comba import naive as control
from fla.ops.gdn2 import naive as gates
from fla.ops.gated_delta_product import naive as product
from fla.ops.gla import naive as per_key
from fla.ops.simple_gla import naive as simple
torch.Tensor.float = torch.Tensor.double
wide = types.ModuleType("torch")
wide.__dict__.update(torch.__dict__ | {"float32": torch.float64, "float": torch.float64})
for module in (product, per_key, simple, control, gates):
    module.torch = wide

def heads(x, names):
    return {n: y.double().repeat_interleave(t.HV // t.H, 2) if n in names else y.double() for n, y in x.items()}

def check(ours, theirs, x):
    expected = t.with_gradients(theirs, x, torch.float64)
    got = t.with_gradients(ours, x, torch.float64)
    assert t.worst(got, expected) < 6e-15, t.worst(got, expected)

final = {"output_final_state": True}
check(
    lambda **x: t.F.chunk_simple_gla(**x, **final),
    lambda **x: simple.naive_recurrent_simple_gla(**x, **final),
    heads(t.inputs(37, "g"), "qk"),
)
check(
    lambda **x: t.F.fused_recurrent_gla(**x, **final),
    lambda **x: per_key.naive_recurrent_gla(**x, **final),
    heads(t.inputs(37, "gk"), "qk"),
)
steps = {"num_householder": 3, "scale": 0.4} | final
check(
    lambda **x: t.F.chunk_gated_delta_product(**x, **steps),
    lambda **x: product.naive_recurrent_gated_delta_product(**x, **steps),
    heads(t.product_inputs(13, 3), "qk"),
)
check(
    lambda **x: t.F.chunk_comba(**x, **final),
    lambda **x: control.naive_chunk_comba(**x, **final),
    heads(t.apart_inputs(37, "comba"), ("q", "k", "p")),
)
check(
    lambda **x: t.F.chunk_gdn2(**x, **final),
    lambda **x: gates.naive_recurrent_gdn2(**x, **final),
    heads(t.apart_inputs(37, "gdn2"), ("q", "k")),
)
for module in (simple_gla, gla, gated_delta_product, comba, gdn2):
    for name in ("chunk_simple_gla", "fused_recurrent_simple_gla", "chunk_gla", "fused_recurrent_gla",
                 "chunk_gated_delta_product", "chunk_comba", "fused_recurrent_comba", "chunk_gdn2",
                 "fused_recurrent_gdn2"):
        if hasattr(module, name):
            theirs = inspect.signature(inspect.unwrap(getattr(module, name))).parameters.values()
            ours = inspect.signature(getattr(t.F, name)).parameters.values()
            positional = [p.name for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
            assert positional == [p.name for p in theirs if p.kind == p.POSITIONAL_OR_KEYWORD], name
""")


def test_positions_as_written_down():
    """The same where flash-linear-attention is not installed; and mamba_ssm's."""
    names = list(inspect.signature(F.chunk_simple_gla).parameters)
    assert names[3:8] == ["g", "g_gamma", "scale", "initial_state", "output_final_state"]
    names = list(inspect.signature(F.mamba_chunk_scan_combined).parameters)
    assert names[:9] == ["x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias"]
    names = list(inspect.signature(F.selective_state_update).parameters)
    assert names == ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus"]


@pytest.mark.parametrize("rate", [1.0, 10.0, 100.0])
def test_the_gradient_in_A_of_a_fast_scan_is_as_small_as_it_is(rate):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(1, 200, 4, 16, generator=generator) for _ in range(2))
    dt = 0.1 + torch.rand(1, 200, 4, generator=generator)
    B, C = (torch.randn(1, 200, 1, 16, generator=generator) for _ in range(2))
    A = -rate * (0.5 + torch.rand(4, generator=generator))

    def gradient(dtype):
        given = [t.to(dtype) for t in (x, dt, A, B, C)]
        given[2].requires_grad_()
        return torch.autograd.grad((F.mamba_chunk_scan_combined(*given, 64) * weight.to(dtype)).sum(), given[2])[0]

    true = gradient(torch.float64)
    assert (gradient(torch.float32) - true).abs().max() < 1e-5 * true.abs().max() + 1e-7
