"""Moments: however samples are cut, merged or taken away, those of float64 over all of them; updates are transactions."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

import pyrepr
from pyrepr.stats import LayerMoments
from pyrepr.stats import _blocks as blocks_module


def interrupted(function, is_ours):
    """Calls function() again and again, raising at its first, second, … line in our files until it gets through.

    Yields after every call that was cut short."""
    line = 0
    while True:
        left = line

        def trace(frame, event, arg):
            nonlocal left
            if not is_ours(frame.f_code.co_filename):
                return None
            if event == "line":
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            function()
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        yield
        line += 1


def same_state(one, two):
    for key, value in one.items():
        other = two[key]
        if isinstance(value, dict):
            same_state(value, other)
        elif isinstance(value, (list, tuple)) and value and torch.is_tensor(value[0]):
            assert all(torch.equal(a, b) for a, b in zip(value, other, strict=True)), key
        elif torch.is_tensor(value):
            assert torch.equal(value, other), key
        else:
            assert value == other, key


@pytest.mark.parametrize("kind", ["layers", "cka"])
def test_an_update_cut_short_at_any_line_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr(blocks_module, "WAITING_ROWS", 10)  # so that waiting batches are added in, too
    make = {"layers": LayerMoments, "cka": pyrepr.StreamingCKA}[kind]
    batches = [[torch.randn(12, 3), torch.randn(12, 5)] for _ in range(3)]
    stream = make().update(batches[0]).update(batches[1])
    before = copy.deepcopy(stream).state_dict()
    cuts = 0
    for _ in interrupted(lambda: stream.update(batches[2]), lambda name: "pyrepr" in name and "stats" in name):
        cuts += 1
        same_state(copy.deepcopy(stream).state_dict(), before)
    assert cuts > 30
    whole = make().update(batches[0]).update(batches[1]).update(batches[2])
    same_state(stream.state_dict(), whole.state_dict())


def test_blocks_in_several_groups_are_those_in_one(monkeypatch):
    xs = [torch.randn(50, d) for d in (3, 20, 7)]
    one = LayerMoments().update(xs).update(xs)
    monkeypatch.setattr(blocks_module, "GROUP_BYTES", 200)
    monkeypatch.setattr(blocks_module, "WAITING_ROWS", 1)
    many = LayerMoments().update(xs).update(xs)
    same_state(one.state_dict(), many.state_dict())
