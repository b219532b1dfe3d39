"""State that survives an interrupt: an exception before any line leaves every state as it was before the call."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import pyrepr
from pyrepr.nn import DeltaCache, GatedDeltaNet, KimiDeltaAttention

SOURCES = os.path.dirname(pyrepr.__file__)


class Interrupt(BaseException):
    pass


def copied(state):
    """State, deeply, with tensors cloned."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [copied(value) for value in state]
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def traced(call, on_line):
    """Runs `call`; on_line((file, line)) comes before every line of the package."""

    def line(frame, event, argument):
        if event == "line":
            on_line((frame.f_code.co_filename, frame.f_lineno))
        return line

    def enter(frame, event, argument):
        return line if frame.f_code.co_filename.startswith(SOURCES) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)


def check_every_line(make):
    """make() -> (call, state): call() changes what state() reads; stopped before any line, it does not.

    Lines that are passed again and again are tried when they are met first and last.
    """
    make()[0]()  # what is looked up once has been looked up
    call, state = make()
    before, passed = copied(state()), []
    traced(call, passed.append)
    assert not same(before, copied(state())), "the call changes nothing"
    places = {place: i for i, place in reversed(list(enumerate(passed)))}.values()
    places = sorted({*places, *{place: i for i, place in enumerate(passed)}.values()})
    for stop in places:
        call, state = make()
        before, left = copied(state()), iter(range(stop + 1))

        def count(place, left=left, stop=stop):
            if next(left) == stop:
                raise Interrupt

        with pytest.raises(Interrupt):
            traced(call, count)
        assert same(before, copied(state())), f"stopped before {passed[stop]}, the state had moved"
    return len(places)


def convolution(x=(2, 37, 3), layout=lambda state: state, **options):
    def make():
        torch.manual_seed(0)
        tokens, state, weight = torch.randn(x), layout(torch.randn(4 if options else 2, 37, 5)), torch.randn(37, 4)
        return lambda: pyrepr.causal_conv1d_update(tokens, state, weight, None, "silu", **options), lambda: state

    return make


def rule(tokens=3, layout=lambda state: state, dtype=torch.float32, apart=False, **options):
    def make():
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, tokens, 2, 8, dtype=dtype) for _ in range(3))
        g, beta = -torch.rand(1, tokens, 2), torch.rand(1, tokens, 2)
        state = layout(torch.randn(options.get("count", 1), 2, 8, 8, dtype=torch.promote_types(dtype, torch.float32)))
        initial = state.clone() if apart else state
        more = {"cu_seqlens": options["cu"]} if "cu" in options else {}
        return lambda: pyrepr.fused_recurrent_gated_delta_rule(
            q, k, v, g, beta=beta, initial_state=initial, out_state=state, **more
        ), lambda: state

    return make


def layer(kind, tokens=1, padded=False, **options):
    def make():
        torch.manual_seed(0)
        module = kind(16, head_dim=4, num_heads=2, layer_idx=0, **options).eval()
        cache, x = DeltaCache(), torch.randn(2, 5, 16)
        mask = torch.tensor([[1] * (5 + tokens), [0] * (5 + tokens - 1) + [1]]) if padded else None
        with torch.no_grad():
            module(x, past_key_values=cache, use_cache=True)
            module(x[:, :1], past_key_values=cache, use_cache=True)

        def call():
            with torch.no_grad():
                module(x[:, :tokens], attention_mask=mask, past_key_values=cache, use_cache=True)

        return call, lambda: [cache[0], cache.get_seq_length(0)]

    return make


def reordered():
    cache = DeltaCache()
    for i in range(3):
        cache.update(i, torch.randn(2, 3), (torch.randn(2, 4),), 5)
    return lambda: cache.reorder_cache(torch.tensor([1, 0])), lambda: cache.states


CALLS = {
    "convolution of a token": convolution((2, 37)),
    "convolution": convolution(),
    "convolution of a strided state": convolution(layout=lambda state: state.mT.contiguous().mT),
    "convolution at indices": convolution(conv_state_indices=torch.tensor([3, 1])),
    "convolution in a ring": convolution(
        conv_state_indices=torch.tensor([3, -1]), cache_seqlens=torch.tensor([2, 5], dtype=torch.int32)
    ),
    "delta rule of a token": rule(1),
    "delta rule": rule(),
    "delta rule from elsewhere": rule(apart=True),
    "delta rule of a strided state": rule(layout=lambda state: state.mT.contiguous().mT),
    "delta rule in float64": rule(dtype=torch.float64),
    "delta rule, packed": rule(count=2, cu=torch.tensor([0, 1, 3])),
    "layer": layer(GatedDeltaNet),
    "layer with a gate per key": layer(KimiDeltaAttention),
    "layer without convolutions": layer(GatedDeltaNet, use_short_conv=False),
    "layer, padded": layer(GatedDeltaNet, padded=True),
    "layer, several tokens": layer(GatedDeltaNet, tokens=3),
    "cache, reordered": reordered,
}


LAYERS = [name for name in CALLS if name.startswith("layer")]


@pytest.mark.parametrize("name", [name for name in CALLS if name not in LAYERS])
def test_interrupted_at_every_line(backend, name, record_property):
    stopped = check_every_line(CALLS[name])
    assert stopped > 2
    record_property("faults", stopped)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_interrupted_at_every_line(name, record_property):
    with pyrepr.use_backend("cpu"):
        stopped = check_every_line(CALLS[name])
    assert stopped > 2
    record_property("faults", stopped)


def test_interrupted_at_every_line_of_the_short_way():
    """Without a forced backend and with nobody watching, small calls go to native code at once."""
    for name in ("convolution of a token", "delta rule of a token", "layer"):
        assert check_every_line(CALLS[name]) > 2


def test_a_cache_of_many_layers_holds_one_more():
    """All layers write in turn to one free set of tensors; those of another size to one of their own."""
    kinds = [GatedDeltaNet(16, head_dim=4 + 4 * (i % 2), num_heads=2, layer_idx=i).eval() for i in range(6)]
    cache, seen = DeltaCache(), set()
    values, states = [], [DeltaCache() for _ in kinds]
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(2, 1, 16)
            for module, alone in zip(kinds, states, strict=True):
                y, *_ = module(x, past_key_values=cache, use_cache=True)
                values.append((y, module(x, past_key_values=alone, use_cache=True)[0]))
                x = y
            seen |= {state["recurrent_state"].data_ptr() for state in cache.states.values()}
            held = [state["recurrent_state"].data_ptr() for state in cache.states.values()]
            assert len(set(held)) == len(kinds)
    assert all(torch.equal(a, b) for a, b in values)
    assert len(seen) == len(kinds) + 2


def test_a_cache_takes_turns_between_two_sets_of_tensors():
    cache = DeltaCache()
    module = GatedDeltaNet(16, head_dim=4, num_heads=2, layer_idx=0).eval()
    seen = []
    with torch.no_grad():
        for _ in range(6):
            module(torch.randn(2, 1, 16), past_key_values=cache, use_cache=True)
            state = cache[0]
            seen.append([x.data_ptr() for x in (state["recurrent_state"], *state["conv_state"])])
    assert seen[2] == seen[4] != seen[3] == seen[5]
