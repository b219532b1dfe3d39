"""What needs a GPU and is no case of `pyrepr.gpu_check` (which runs this too): how the ops behave inside torch."""

from __future__ import annotations

import pytest
from pyrepr.benchmarks.gpu import behaviour


@pytest.mark.gpu
@pytest.mark.parametrize("name", behaviour.ALL)
def test_behaviour(name):
    try:
        behaviour.ALL[name]()
    except behaviour.NotHere as reason:
        pytest.skip(str(reason))
