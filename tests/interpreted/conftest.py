"""For the suites that tests/test_triton_interpreter.py runs, one file a family, named like its module of kernels, or
with the names in FAMILIES: every launch must be one that the families' `variants` list."""

from __future__ import annotations

import importlib

import pytest
from pyrepr.kernels import _launch

import pyrepr


@pytest.fixture(autouse=True)
def only_listed_variants(request):
    with pyrepr.use_backend("triton"), _launch.recorded() as seen:
        yield seen
    families = getattr(request.module, "FAMILIES", (request.path.stem,))
    modules = (importlib.import_module(f"pyrepr.kernels.{family}") for family in families)
    listed = {v.key for module in modules for v in module.variants(90)}
    unlisted = sorted({v.name for v in seen if v.key not in listed})
    assert not unlisted, f"launched, but not listed by variants(90), so never compiled ahead: {unlisted}"
