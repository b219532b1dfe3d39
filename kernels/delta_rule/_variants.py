"""Launch configurations of the family's kernels, and what each is compiled to.

The values are estimates from registers and shared memory, to be replaced by what
``PYREPR_AUTOTUNE=1`` finds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import triton
from pyrepr.kernels._launch import ARCHITECTURES, DTYPE_NAMES, VERSION, Config, Table, Variant
from pyrepr.kernels.delta_rule._gradient import gradient_kernel, norm_gradient_kernel
from pyrepr.kernels.delta_rule._index import index_kernel
from pyrepr.kernels.delta_rule._kda import (
    invert_kernel,
    kda_gate_kernel,
    kda_gradient_kernel,
    kda_pairs_kernel,
    kda_prepare_kernel,
)
from pyrepr.kernels.delta_rule._prepare import prepare_kernel
from pyrepr.kernels.delta_rule._recurrent import recurrent_kernel
from pyrepr.kernels.delta_rule._scan import MAPS, OUT, STATES, merge_kernel, reverse_kernel, scan_kernel

# Tokens per chunk. float32 tiles are twice as large and take twice the shared memory.
CHUNK = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
# The compiler of Triton 3.7 fails on some kernels that 3.9's takes, and keeps more in shared memory.
OLD_COMPILER = VERSION < (3, 9)
GATES = (0, 1, 2)  # of the scans: nothing, factors per token, a gate per key
MODES = (OUT.value, STATES.value, MAPS.value)
WIDTHS = (64, 128, 256)  # K is padded to one of these
_FLOAT32 = {
    *("g", "beta", "factors", "last", "initial", "starts", "offsets", "mapped", "final"),
    *("grad_final", "grad_initial", "grad_beta", "grad_g", "a"),
}
_INT64 = {"cu_seqlens", "sequences", "segments", "chunks"}
_DATA = {
    *("q", "k", "k_tail", "v", "x", "x_beta", "p", "o", "states", "values"),
    *("q_decayed", "k_decayed", "d", "m"),
    *("grad_o", "grad_states", "residuals", "grad_v", "grad_q", "grad_k", "grad"),
}
# Divisible by 16, as all addresses are (see ``_shared``). What Triton must not look at, the kernels name.
_ALIGNED = {"K", "V", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "xb", "xt", "xh"}


def width_of(K: int) -> int:
    return next(width for width in WIDTHS if width >= K)


def _make(name: str, kernel: Any, dtype: torch.dtype, constexprs: Mapping[str, Any], config: Config) -> Variant:
    values = tuple({**config.blocks, **constexprs}.items())
    return _made(name, kernel, dtype, values, config.num_warps, config.num_stages, config.registers)


@functools.cache
def _made(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    values: tuple,
    num_warps: int,
    num_stages: int,
    registers: int | None,
) -> Variant:
    """The types of the arguments follow from their names, which mean the same in every kernel of the family."""
    types = {
        **dict.fromkeys(_FLOAT32, "*fp32"),
        **dict.fromkeys(_INT64, "*i64"),
        **dict.fromkeys(_DATA, "*" + DTYPE_NAMES[dtype]),
        "valid": "*i1",
        "scale": "fp32",
    }
    arguments = [a for a in kernel.arg_names if a not in dict(values)]
    signature = {a: types.get(a, "i32") for a in arguments}
    aligned = tuple(a for a in arguments if a in _ALIGNED or signature[a][0] == "*")
    label = " ".join([name, DTYPE_NAMES[dtype], *(f"{a}={b}" for a, b in values)])
    return Variant(label, kernel, signature, dict(values), num_warps, num_stages, aligned, registers)


def _table(
    name: str, *rows: tuple[int, int, int], block: str = "BV", candidates: Sequence[tuple[int, int, int]] = ()
) -> Table:
    """Rows (block, warps, stages) for sm_80, sm_90, sm_100."""

    def configs(triples: Sequence[tuple[int, int, int]]) -> list[Config]:
        return [Config({block: size}, warps, stages) for size, warps, stages in triples]

    return Table(name, dict(zip(ARCHITECTURES, configs(rows), strict=True)), configs(candidates))


_SEARCH = [(size, warps, stages) for size in (32, 64, 128) for warps in (4, 8) for stages in (1, 2, 3)]
# With 128 columns older compilers spill 32 bytes a thread (3.7) and 208 (3.6); so they do not, and two blocks fit.
_scan_128 = (64, 4, 1) if OLD_COMPILER else (128, 8, 3)
# Three stages or one: with two, Triton asks for the next chunk after the work on this one, and then waits for it.
# (bytes per element, padded K, whether there is a gate per key, which takes another tile) → table
SCAN = {
    (2, 64, False): _table("SCAN 2 64", (128, 8, 1), (128, 8, 3), (128, 8, 3), candidates=_SEARCH),
    (2, 128, False): _table("SCAN 2 128", (128, 8, 1), _scan_128, (128, 8, 3), candidates=_SEARCH),
    (2, 256, False): _table("SCAN 2 256", (32, 8, 1), (64, 8, 1), (64, 8, 1), candidates=_SEARCH),
    (2, 64, True): _table("SCAN 2 64 per key", (128, 8, 1), (128, 8, 3), (128, 8, 3), candidates=_SEARCH),
    (2, 128, True): _table("SCAN 2 128 per key", (64, 8, 1), (64, 8, 2), (64, 8, 2), candidates=_SEARCH),
    (2, 256, True): _table("SCAN 2 256 per key", (32, 8, 1), (32, 8, 1), (32, 8, 1), candidates=_SEARCH),
    (4, 64, False): _table("SCAN 4 64", *[(32, 8, 1)] * 3, candidates=_SEARCH),
    (4, 128, False): _table("SCAN 4 128", *[(16, 8, 1)] * 3, candidates=_SEARCH),
    (4, 256, False): _table("SCAN 4 256", *[(16, 8, 1)] * 3, candidates=_SEARCH),
    (4, 64, True): _table("SCAN 4 64 per key", *[(32, 8, 1)] * 3, candidates=_SEARCH),
    (4, 128, True): _table("SCAN 4 128 per key", *[(16, 8, 1)] * 3, candidates=_SEARCH),
    (4, 256, True): _table("SCAN 4 256 per key", *[(16, 8, 1)] * 3, candidates=_SEARCH),
}
_narrow = (16, 4, 1) if OLD_COMPILER else (32, 8, 1)
# Triton 3.6 spills 96 bytes a thread of 128 columns, and 32 of 64 in three stages; so none, and two blocks fit.
_reverse_128 = (64, 4, 1) if VERSION < (3, 7) else (128, 8, 3)
REVERSE = {
    (2, 64, False): _table("REVERSE 2 64", (128, 8, 1), (128, 8, 3), (128, 8, 3), candidates=_SEARCH),
    (2, 128, False): _table("REVERSE 2 128", (64, 8, 1), _reverse_128, (128, 8, 3), candidates=_SEARCH),
    (2, 256, False): _table("REVERSE 2 256", _narrow, (32, 8, 1), (64, 8, 1), candidates=_SEARCH),
    (2, 64, True): _table("REVERSE 2 64 per key", (128, 8, 1), (128, 8, 3), (128, 8, 3), candidates=_SEARCH),
    (2, 128, True): _table("REVERSE 2 128 per key", (64, 8, 1), (128, 8, 2), (128, 8, 2), candidates=_SEARCH),
    (2, 256, True): _table("REVERSE 2 256 per key", _narrow, (32, 8, 1), (32, 8, 1), candidates=_SEARCH),
    (4, 64, False): _table("REVERSE 4 64", *[(32, 8, 1)] * 3, candidates=_SEARCH),
    (4, 128, False): _table("REVERSE 4 128", *[(16, 8, 1)] * 3, candidates=_SEARCH),
    (4, 256, False): _table("REVERSE 4 256", *[(16, 8, 1)] * 3, candidates=_SEARCH),
    (4, 64, True): _table("REVERSE 4 64 per key", *[(32, 8, 1)] * 3, candidates=_SEARCH),
    (4, 128, True): _table("REVERSE 4 128 per key", *[(16, 8, 1)] * 3, candidates=_SEARCH),
    (4, 256, True): _table("REVERSE 4 256 per key", *[(16, 8, 1)] * 3, candidates=_SEARCH),
}
# With 128 registers a thread, which is what it needs, four programs fill a multiprocessor; unasked it takes up to 250.
_prepare = [Config({"BLOCK": size}, 4, stages, 128) for size in (16, 32, 64) for stages in (1, 2, 3)]
PREPARE = {
    2: Table("PREPARE 2", {80: _prepare[3], 90: _prepare[3], 100: _prepare[6]}, _prepare),
    4: Table("PREPARE 4", dict.fromkeys(ARCHITECTURES, _prepare[0]), _prepare),
}
# BK: key columns of a program. Without wgmma both operands of a product are in registers.
_gradient = Config({"BV": 64, "BK": 64}, 8, 2)
GRADIENT = {
    2: Table("GRADIENT 2", {80: Config({"BV": 32, "BK": 32}, 8, 1), 90: _gradient, 100: _gradient}),
    4: Table("GRADIENT 4", dict.fromkeys(ARCHITECTURES, Config({"BV": 32, "BK": 64}, 8, 1))),
}
KDA_PREPARE = {
    2: _table("KDA_PREPARE 2", (64, 4, 1), (64, 4, 2), (64, 4, 2), block="BLOCK"),
    4: _table("KDA_PREPARE 4", (32, 4, 1), (32, 4, 1), (32, 4, 1), block="BLOCK"),
}
KDA_GRADIENT = {
    2: _table("KDA_GRADIENT 2", (64, 4, 1), (64, 4, 2), (64, 4, 2)),
    4: _table("KDA_GRADIENT 4", (32, 4, 1), (32, 4, 1), (32, 4, 1)),
}
KDA_WIDTH = 32  # key columns of a program of the gradients
INVERT = {2: Config({}, 4, 1, 128), 4: Config({}, 4, 1)}
# One stage: the kernel reads back what it wrote.
_merge = Config({"BV": 16, "BK": 128}, 8, 1)
MERGE = Table("MERGE", dict.fromkeys(ARCHITECTURES, _merge), [Config({"BV": 16, "BK": 64}, 4, 1)])
RECURRENT = {
    width: _table(f"RECURRENT {width}", *[(32, width // 32, 1)] * 3, candidates=[(8, 1, 1), (16, 2, 1), (32, 8, 1)])
    for width in WIDTHS
}
INDEX = Config({"BLOCK": 128}, 1, 1)
NORM = Config({"R": 8}, 4, 1)


def narrowed(config: Config, V: int) -> Config:
    """Half of a scan's value columns where no more are there to be filled."""
    if config.blocks["BV"] < 128 or V > 64:
        return config
    return Config({"BV": 64}, config.num_warps, config.num_stages)


def index_variant(dtype: torch.dtype) -> Variant:
    return _make("index", index_kernel, torch.int64, {"C": CHUNK[dtype]}, INDEX)


def prepare_variant(config: Config, dtype: torch.dtype, gated: bool, with_x: bool) -> Variant:
    values = {"C": CHUNK[dtype], "GATED": gated, "WITH_X": with_x}
    return _make("prepare", prepare_kernel, dtype, values, config)


def scan_variant(config: Config, dtype: torch.dtype, width: int, gate: int, mode: int) -> Variant:
    values = {"C": CHUNK[dtype], "BK": width, "GATE": gate, "MODE": mode}
    return _make("scan", scan_kernel, dtype, values, config)


def reverse_variant(config: Config, dtype: torch.dtype, width: int, gate: int, offsets: bool) -> Variant:
    values = {"C": CHUNK[dtype], "BK": width, "GATE": gate, "OFFSETS": offsets}
    return _make("reverse", reverse_kernel, dtype, values, config)


def merge_variant(config: Config, chunk: int, reverse: bool) -> Variant:
    return _make("merge", merge_kernel, torch.float32, {"C": chunk, "REVERSE": reverse}, config)


def gradient_variant(config: Config, dtype: torch.dtype, gated: bool) -> Variant:
    return _make("gradient", gradient_kernel, dtype, {"C": CHUNK[dtype], "GATED": gated}, config)


def kda_prepare_variant(config: Config, dtype: torch.dtype) -> Variant:
    return _make("kda prepare", kda_prepare_kernel, dtype, {"C": CHUNK[dtype]}, config)


def invert_variant(dtype: torch.dtype, with_x: bool) -> Variant:
    return _make("invert", invert_kernel, dtype, {"C": CHUNK[dtype], "WITH_X": with_x}, INVERT[dtype.itemsize])


def kda_pairs_variant(config: Config, dtype: torch.dtype) -> Variant:
    return _make("kda pairs", kda_pairs_kernel, dtype, {"C": CHUNK[dtype]}, config)


def uncompilable(architecture: int, dtype: torch.dtype, gate: int) -> str | None:
    """Why the backward with this kind of gate cannot be run there, or ``None``."""
    if OLD_COMPILER and architecture == 100 and dtype.itemsize == 2 and gate == 1:
        return f"triton {triton.__version__} fails to compile its 16-bit gated gradient for sm_100; 3.9 does not"
    return None


def kda_gradient_variant(config: Config, dtype: torch.dtype) -> Variant:
    return _make("kda gradient", kda_gradient_kernel, dtype, {"C": CHUNK[dtype], "BK": KDA_WIDTH}, config)


def kda_gate_variant(config: Config, dtype: torch.dtype) -> Variant:
    return _make("kda gate", kda_gate_kernel, dtype, {"C": CHUNK[dtype], "BK": KDA_WIDTH}, config)


def norm_gradient_variant(dtype: torch.dtype, width: int) -> Variant:
    return _make("norm gradient", norm_gradient_kernel, dtype, {"BK": width}, NORM)


def recurrent_variant(config: Config, dtype: torch.dtype, width: int) -> Variant:
    return _make("recurrent", recurrent_kernel, dtype, {"BK": width}, config)


def variants(
    architecture: int,
    dtypes: Iterable[torch.dtype] = tuple(CHUNK),
    widths: Iterable[int] = WIDTHS,
    gates: Iterable[int] = GATES,
    values: Iterable[int] = (64, 128),
) -> list[Variant]:
    """Everything the family launches on that architecture, for these dtypes, padded K, kinds of gate and V."""
    found = []
    for dtype in dtypes:
        tables = (PREPARE, GRADIENT, KDA_PREPARE, KDA_GRADIENT)
        prepare, gradient, kda_prepare, kda = (t[dtype.itemsize].rows[architecture] for t in tables)
        for gated in (False, True):
            found += [prepare_variant(prepare, dtype, gated, with_x) for with_x in (False, True)]
            if not uncompilable(architecture, dtype, int(gated)):
                found.append(gradient_variant(gradient, dtype, gated))
        found += [kda_prepare_variant(kda_prepare, dtype)]
        found += [invert_variant(dtype, with_x) for with_x in (False, True)]
        found += [kda_pairs_variant(kda, dtype), kda_gradient_variant(kda, dtype), kda_gate_variant(kda, dtype)]
        for width in widths:
            for gate, V in itertools.product(gates, values):
                tables = (t[dtype.itemsize, width, gate == 2] for t in (SCAN, REVERSE))
                scan, reverse = (narrowed(t.rows[architecture], V) for t in tables)
                found += [scan_variant(scan, dtype, width, gate, mode) for mode in MODES]
                found += [reverse_variant(reverse, dtype, width, gate, offsets) for offsets in (False, True)]
            found.append(recurrent_variant(RECURRENT[width].rows[architecture], dtype, width))
            found.append(norm_gradient_variant(dtype, width))
        found.append(index_variant(dtype))
        merge = MERGE.rows[architecture]
        found += [merge_variant(merge, CHUNK[dtype], backwards) for backwards in (False, True)]
    return list({v.key: v for v in found}.values())  # what does not depend on the dtype is there once


def representative_variants(architecture: int) -> list[Variant]:
    """bfloat16, K = V = 128: every kernel in every mode for sm_90, the large kernels in one mode elsewhere."""
    gates = GATES if architecture == 90 else (1,)
    found = variants(architecture, (torch.bfloat16,), (128,), gates, (128,))
    if architecture == 90:
        return found
    large = (scan_kernel, reverse_kernel, prepare_kernel, gradient_kernel, kda_prepare_kernel, kda_gradient_kernel)
    plain = {"GATED": True, "MODE": OUT.value, "OFFSETS": False, "WITH_X": False}
    return [v for v in found if v.kernel in large and all(v.constexprs.get(a, b) == b for a, b in plain.items())]
