"""CUDA kernels compiled as C++ and run on the CPU, a thread for every thread: right answers need no GPU.

What this cannot show is what only the hardware has: memory ordering between threads that do not meet at a barrier,
and speed.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from pyrepr.ops._native import DTYPE_CODES
from pyrepr.reference import delta_rule as reference

ROOT = Path(__file__).parents[1]
# Worst error seen against float64, relative to the largest value of the result, doubled.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++: no CUDA kernel was emulated")


def emulated(folder, family, function):
    """A function of csrc/cuda/<family>.cu, whose CUDA headers and launches are replaced."""
    source = (ROOT / f"csrc/cuda/{family}.cu").read_text()
    source, headers = re.subn(r"#include <cuda_\w+\.h>", '#include "cuda.h"', source)
    launch = r"(\w+(?:<[\w ,/]+>)?)<<<(\w+), (\w+), 0, stream>>>\("
    source, launches = re.subn(launch, r"launch_on_cpu(\1, \2, \3, ", source)
    assert headers and launches and "<<<" not in source
    (folder / f"{family}.inc").write_text(source)
    library = folder / "emulated.so"
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{ROOT / 'tests/emulated'}", str(ROOT / f"tests/emulated/{family}.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    function = getattr(ctypes.CDLL(str(library)), function)
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    return emulated(tmp_path_factory.mktemp("emulated"), "delta_rule", "step")


def run(step, x, state, cu_seqlens, l2norm, scale=0.3):
    q, k, v, g, beta = x
    o, state = torch.full_like(v, torch.nan), state.clone()
    tensors = (q, k, v, g, beta, state, state, o, cu_seqlens)
    problem = step(
        (ctypes.c_void_p * 9)(*(None if t is None else t.data_ptr() for t in tensors)),
        (ctypes.c_int64 * 9)(*(s for t in (q, k, v) for s in t.stride()[:3])),
        (ctypes.c_int64 * 6)(*k.shape, *v.shape[2:]),
        ctypes.c_int64(state.shape[0]),
        DTYPE_CODES[v.dtype],
        int(g is not None and g.dim() == 4),
        int(l2norm),
        ctypes.c_float(scale),
    )
    assert problem is None, problem
    return o, state


@pytest.mark.parametrize(
    ("rule", "T", "K", "V", "dtype", "bounds"),
    [
        ("plain", 3, 20, 13, torch.float32, None),
        ("gated", 2, 130, 36, torch.bfloat16, None),
        ("kda", 2, 100, 33, torch.float16, None),
        ("kda", 7, 20, 12, torch.float32, [0, 0, 3, 3, 7]),
    ],
)
def test_delta_rule_step(step, rule, T, K, V, dtype, bounds):
    batch = 1 if bounds else 2
    q, k, v = torch.randn(batch, T, 1, K), normalize(torch.randn(batch, T, 1, K), dim=-1), torch.randn(batch, T, 2, V)
    shape = {"plain": None, "gated": (batch, T, 2), "kda": (batch, T, 2, K)}[rule]
    g = None if shape is None else -torch.rand(shape)
    x = [q.to(dtype), k.to(dtype), v.to(dtype), g, 2 * torch.rand(batch, T, 2)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    state = torch.randn(batch if bounds is None else len(bounds) - 1, 2, K, V)
    got = run(step, x, state, cu_seqlens, rule == "gated")
    wide = [None if t is None else t.double() for t in (*x, state)]
    expected = reference.delta_rule(*wide[:5], 0.3, wide[5], rule == "gated", cu_seqlens)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() < TOLERANCE[a.dtype] * b.abs().max()


@pytest.fixture(scope="module")
def pair_stats(tmp_path_factory):
    return emulated(tmp_path_factory.mktemp("emulated"), "gram", "pair_stats")


@pytest.mark.parametrize(("n", "p", "q"), [(70, 20, 9), (64, 20, 9), (64, 1, 16), (3, 2, 40)])
def test_gram_pair_stats(pair_stats, n, p, q):
    x, y = torch.randn(n, p), torch.randn(n, q)
    tiles = 3 if n > 64 else 1
    partial = torch.full((tiles, 3), torch.nan, dtype=torch.float64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y, partial)]
    sizes = [ctypes.c_int64(size) for size in (n, p, q, tiles)]
    problem = pair_stats(pointers[0], pointers[1], *sizes[:3], pointers[2], sizes[3])
    assert problem is None, problem
    k, l = (torch.triu(a.double() @ a.double().T, 1) for a in (x, y))
    expected = torch.stack([(k * k).sum(), (k * l).sum(), (l * l).sum()])
    assert (partial.sum(0) - expected).abs().max() < 1e-6 * expected.max()
