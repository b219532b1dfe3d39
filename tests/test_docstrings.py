"""The example in every public docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import pyrepr
import pyrepr.models
import pyrepr.similarity
import pyrepr.stats

ROOMS = (pyrepr, pyrepr.functional, pyrepr.models, pyrepr.nn, pyrepr.similarity, pyrepr.stats)
PUBLIC = {
    f"{room.__name__}.{name}": getattr(room, name)
    for room in ROOMS
    for name in room.__all__
    if inspect.isclass(getattr(room, name)) or inspect.isfunction(getattr(room, name))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    found = PUBLIC[name]
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(found) or "", {"torch": torch, "pyrepr": pyrepr}, name, None, 0
    )
    assert example.examples, f"{name} has no example in its docstring"
    printed: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert not result.failed, "".join(printed)
