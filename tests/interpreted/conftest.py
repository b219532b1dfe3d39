"""For the suites that tests/test_triton_interpreter.py runs, one file a family, named like its module of kernels, or
with the names in FAMILIES: every launch must be one that the families' `variants` list."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import pytest
import triton.language as tl
from pyrepr.kernels import _launch
from triton.runtime import interpreter

import pyrepr


@pytest.fixture(autouse=True, scope="session")
def interpreter_without_idle_work():
    """Two thirds of its time: at every call within a kernel it patches triton.language as it did at the launch, and
    looks for overflows at every sum and product of integers only to drop what it found, unless it debugs."""
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()
    options = interpreter.interpreter_builder.options

    @functools.cache
    def languages(function):
        return {found.__name__ for found in function.__globals__.values() if found is tl or found is tl.core}

    def patch_what_is_not(function):
        if languages(function) <= patched:
            return None
        patched.update(languages(function))
        return patch(function)

    def launch_anew(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(interpreter, "_patch_lang", patch_what_is_not)
        changed.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        checked = dataclasses.replace(options, sanitize_overflow=options.debug)
        changed.setattr(interpreter.interpreter_builder, "options", checked)
        yield


@pytest.fixture(autouse=True)
def only_listed_variants(request):
    with pyrepr.use_backend("triton"), _launch.recorded() as seen:
        yield seen
    families = getattr(request.module, "FAMILIES", (request.path.stem,))
    modules = (importlib.import_module(f"pyrepr.kernels.{family}") for family in families)
    listed = {v.key for module in modules for v in module.variants(90)}
    unlisted = sorted({v.name for v in seen if v.key not in listed})
    assert not unlisted, f"launched, but not listed by variants(90), so never compiled ahead: {unlisted}"
