"""CUDA kernels compiled as C++ and run on the CPU, a fiber for every thread: right answers need no GPU.

The threads of a block run one after the other as far as the next barrier, in three orders (tests/emulated/cuda.h), and
give the same bits in all of them; that this notices a missing barrier is tested by leaving out each. Access that is not
aligned as its type asks ends the run. What this cannot show is what only the hardware has: memory ordering inside a
warp, and speed.
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
from pyrepr.ops.lookup import TABLE_CODES
from pyrepr.reference import delta_rule as reference
from pyrepr.reference import lookup as lookup_reference

ROOT = Path(__file__).parents[1]
# Worst error seen against float64, relative to the largest value of the result, doubled.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++: no CUDA kernel was emulated")


def emulated(folder, family, *functions):
    """Functions of csrc/cuda/<family>.cu, whose CUDA headers and launches are replaced."""
    source = (ROOT / f"csrc/cuda/{family}.cu").read_text()
    source, headers = re.subn(r"#include <cuda_\w+\.h>", '#include "cuda.h"', source)
    launch = r"(\w+(?:<[\w ,/]+>)?)<<<(\w+), (\w+), 0, stream>>>\("
    source, launches = re.subn(launch, r"launch_on_cpu(\1, \2, \3, ", source)
    assert headers and launches and "<<<" not in source
    (folder / f"{family}.inc").write_text(source)
    library = folder / "emulated.so"
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # as on the GPU, a wrong address ends it
    command += [f"-I{ROOT / 'tests/emulated'}", str(ROOT / f"tests/emulated/{family}.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    loaded = ctypes.CDLL(str(library))
    found = [getattr(loaded, function) for function in functions]
    found[0].restype = ctypes.c_char_p
    found[0].set_order = loaded.set_order
    found[0].barriers = [line for line, text in enumerate(source.splitlines(), 1) if "__syncthreads()" in text]
    return found if len(found) > 1 else found[0]


def in_every_order(kernel, run, skipped=0):
    """What `run` returns with the threads of a block in each order; `skipped` is the line of a barrier to leave out."""
    results = []
    for order in range(3):
        kernel.set_order(order, skipped)
        results.append(run())
    kernel.set_order(0, 0)
    return results


def same_bits(results):
    """One of these, which are the same; tensors or tuples of them."""
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)
    return results[0]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    return emulated(tmp_path_factory.mktemp("emulated"), "delta_rule", "step")


def run(step, x, state, cu_seqlens, l2norm, scale=0.3, offset=0):
    q, k, v, g, beta = x
    o, memory = torch.full_like(v, torch.nan), torch.empty(offset + state.numel())
    state = memory[offset:].view_as(state).copy_(state)
    tensors = (q, k, v, g, beta, state, state, o, cu_seqlens)
    problem = step(
        (ctypes.c_void_p * 9)(*(None if t is None else t.data_ptr() for t in tensors)),
        (ctypes.c_int64 * 9)(*(s for t in (q, k, v) for s in t.stride()[:3])),
        (ctypes.c_int64 * 6)(*k.shape, *v.shape[2:]),
        ctypes.c_int64(state.shape[0]),
        DTYPE_CODES[v.dtype],
        0 if g is None else g.dim() - 2,
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
    got = same_bits(in_every_order(step, lambda: run(step, x, state, cu_seqlens, rule == "gated")))
    wide = [None if t is None else t.double() for t in (*x, state)]
    expected = reference.delta_rule(*wide[:5], 0.3, wide[5], rule == "gated", cu_seqlens)
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).abs().max() < TOLERANCE[a.dtype] * b.abs().max()


def decode_case(T=3, K=130, V=36):
    q, k, v = torch.randn(1, T, 1, K), normalize(torch.randn(1, T, 1, K), dim=-1), torch.randn(1, T, 1, V)
    return [q, k, v, -torch.rand(1, T, 1, K), torch.rand(1, T, 1)], torch.randn(1, 1, K, V)


def test_delta_rule_step_takes_a_state_that_starts_anywhere(step):
    x, state = decode_case()
    for a, b in zip(run(step, x, state, None, False), run(step, x, state, None, False, offset=1), strict=True):
        assert torch.equal(a, b)


def test_delta_rule_step_stays_inside_whatever_the_bounds_are(step):
    """Bounds are checked on the device, later; until then no token is read that is not there."""
    x, state = decode_case(T=3)
    states = state.repeat(4, 1, 1, 1)
    o, final = run(step, x, states, torch.tensor([-(2**62), 2, 1, 1, 2**62]), False)
    for n, (first, last) in enumerate([(0, 2), (2, 1), (1, 1), (1, 3)]):
        part = [a[:, first:last] for a in x]
        alone = run(step, part, state, None, False)[1] if last > first else state
        assert torch.equal(final[n : n + 1], alone)
    assert o.isfinite().all()


def test_a_missing_barrier_of_delta_rule_step_is_noticed(step):
    x, state = decode_case()
    right = run(step, x, state, None, False)
    assert len(step.barriers) == 2
    for line in step.barriers:
        results = in_every_order(step, lambda: run(step, x, state, None, False), line)
        assert not all(torch.equal(o, right[0]) for o, _ in results)


@pytest.fixture(scope="module")
def lookup_linear(tmp_path_factory):
    linear, parts = emulated(tmp_path_factory.mktemp("emulated"), "lookup", "linear", "parts")
    parts.restype = ctypes.c_int64
    return linear, parts


def emulated_lookup(lookup_linear, x, tables, scales, bias, weighting, parts):
    linear, parts_of = lookup_linear
    (K, n, h), T = tables.shape, len(x)
    out, partial = torch.full((T, h), torch.nan, dtype=x.dtype), torch.full((parts, T, h), torch.nan)
    assert parts_of(*(ctypes.c_int64(size) for size in (T, K, h)), TABLE_CODES[tables.dtype]) == parts
    tensors = (x, tables, scales, bias, out, partial)
    problem = linear(
        (ctypes.c_void_p * 6)(*(None if t is None else t.data_ptr() for t in tensors)),
        (ctypes.c_int * 3)(TABLE_CODES[x.dtype], TABLE_CODES[tables.dtype], TABLE_CODES[x.dtype]),
        (ctypes.c_int64 * 5)(x.stride(0), parts, T, K, h),
        n.bit_length() - 1,
        lookup_reference.WEIGHTINGS.index(weighting),
        ctypes.c_float(2 / 0.8),
    )
    assert problem is None, problem
    return out


@pytest.mark.parametrize(
    ("T", "K", "bits", "h", "x_dtype", "table_dtype", "weighting", "parts"),
    [
        (1, 0, 8, 24, torch.float32, torch.float32, "none", 1),
        (1, 200, 4, 131, torch.float32, torch.float16, "l1", 4),
        (1, 150, 3, 37, torch.float16, torch.int8, "scaled", 3),
        (40, 9, 8, 520, torch.bfloat16, torch.bfloat16, "probability", 1),  # rows in whole lines
        (1, 300, 2, 40, torch.float32, torch.float32, "probability", 5),
        (1, 70, 8, 64, torch.float16, torch.float16, "l1", 2),
        (2, 13, 8, 33, torch.bfloat16, torch.bfloat16, "scaled", 1),
        (3, 30, 5, 96, torch.bfloat16, torch.float32, "probability", 1),
        (1, 5, 16, 48, torch.float32, torch.int8, "none", 1),
        (1, 520, 1, 1060, torch.float32, torch.float32, "scaled", 1),  # more chunks than are hashed at a time
    ],
)
def test_lookup_linear(lookup_linear, T, K, bits, h, x_dtype, table_dtype, weighting, parts):
    x, bias = torch.randn(T, K * bits).to(x_dtype), torch.randn(h).to(x_dtype) if T != 3 else None
    x[-1:, 3:4] = torch.nan if T > 1 else 0.0
    tables, scales = torch.randn(K, 1 << bits, h).to(table_dtype), None
    if table_dtype == torch.int8:
        tables, scales = torch.randint(-127, 128, tables.shape, dtype=torch.int8), torch.rand(K, 1 << bits)
    out = emulated_lookup(lookup_linear, x, tables, scales, bias, weighting, parts)
    wide = tables.double() if scales is None else tables.double() * scales.double()[..., None]
    added = None if bias is None else bias.double()
    truth = lookup_reference.lookup_linear(x.double(), wide, added, weighting=weighting, temperature=0.8)
    assert torch.equal(out.isnan(), truth.isnan())
    error = (out.double() - truth).nan_to_num().norm() / truth.nan_to_num().norm()
    # Worst seen: 1.4e-7 in float32; in 16 bits the result's own rounding.
    assert error < {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[x_dtype]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_lookup_linear_of_views(lookup_linear, x_dtype, table_dtype):
    """Tables, x and bias that begin one element behind a multiple of 16 bytes, rows of x an odd number apart: the same
    bits as of their copies, but for the order in which rows that are not whole are added up."""
    base = torch.randn(2, 2 * 16 + 5).to(x_dtype)
    x, bias = base[:, 1:33], torch.randn(33).to(x_dtype)[1:]
    memory = (
        torch.randint(-127, 128, (1 + 4 * 256 * 32,), dtype=torch.int8)
        if table_dtype == torch.int8
        else torch.randn(1 + 4 * 256 * 32).to(table_dtype)
    )
    tables = memory[1:].view(4, 256, 32)
    scales = torch.rand(4, 256) if table_dtype == torch.int8 else None
    assert all(t.data_ptr() % 16 for t in (x, tables, bias))
    out = emulated_lookup(lookup_linear, x, tables, scales, bias, "l1", 1)
    copies = emulated_lookup(lookup_linear, x.clone(), tables.clone(), scales, bias.clone(), "l1", 1)
    difference = (out.double() - copies.double()).norm() / copies.double().norm()
    assert difference < {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}[x_dtype]
