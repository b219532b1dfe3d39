"""For the suites that tests/test_triton_interpreter.py runs: every launch must be one that `variants` lists."""

from __future__ import annotations

import importlib

import pytest
from pyrepr.kernels import _launch

import pyrepr


@pytest.fixture(autouse=True)
def only_listed_variants():
    with pyrepr.use_backend("triton"), _launch.recorded() as seen:
        yield seen
    modules = {importlib.import_module(".".join(v.kernel.fn.__module__.split(".")[:3])) for v in seen}
    listed = {v.key for module in modules for v in module.variants(90)}
    unlisted = sorted({v.name for v in seen if v.key not in listed})
    assert not unlisted, f"launched, but not listed by variants(90), so never compiled ahead: {unlisted}"
