"""Every function with every one of its sizes zero on the Triton kernels: the cases of tests/test_empty.py, float32."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path

import pytest

from pyrepr.backend import Unsupported

FAMILIES = ("gram", "delta_rule", "lookup", "causal_conv1d")
WITHOUT_ERASE = ("chunk_gla", "mamba_chunk_scan_combined")  # which no Triton kernel computes yet

_spec = importlib.util.spec_from_file_location("empty_cases", Path(__file__).parents[1] / "test_empty.py")
cases = sys.modules["empty_cases"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


@pytest.mark.parametrize("name", cases.CASES)
def test_zero_sizes(name):
    refuse = pytest.raises(Unsupported, match="no rule without") if name in WITHOUT_ERASE else contextlib.nullcontext()
    with refuse, cases.memory_that_holds_nan():
        cases.check(cases.CASES[name], cases.torch.float32)
