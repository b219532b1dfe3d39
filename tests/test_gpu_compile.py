"""Every GPU kernel, in every configuration it may be launched with, compiles for every architecture; without a GPU.

Compiling all Triton variants takes many minutes. So a family with many names those that stand for the rest, and what
came out of earlier compilations is kept in tests/compiled.json under a fingerprint of source, options, architecture and
compiler: a variant that is on record is not compiled again, one that is neither on record nor stands for others is
counted and shown as skipped. PYREPR_COMPILE_ALL=1 compiles everything that is not on record, and adds it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = [name for name in ("gram", "delta_rule", "lookup") if importlib.util.find_spec(f"pyrepr.kernels.{name}")]
ARCHITECTURES = (80, 90, 100)
HAS_TRITON = importlib.util.find_spec("triton") is not None
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# Spilled bytes that stand, with their reason: (source, architecture, kernel) → reason.
SPILLS: dict[tuple[str, str, str], str] = {}


RECORD = ROOT / "tests/compiled.json"
EVERYTHING = os.environ.get("PYREPR_COMPILE_ALL") == "1"


@functools.cache
def variants(family, architecture):
    module = importlib.import_module(f"pyrepr.kernels.{family}")
    return {v.name: v for v in module.variants(architecture)}


def representatives(family, architecture):
    module = importlib.import_module(f"pyrepr.kernels.{family}")
    return {v.name for v in getattr(module, "representative_variants", module.variants)(architecture)}


def fingerprint(case):
    from pyrepr.kernels import _launch

    family, architecture, name = case
    return _launch.fingerprint(variants(family, architecture)[name], architecture)


def cases():
    """(family, architecture, variant) of all that can be tested without taking long, and what was left out."""
    chosen, others = [], []
    for family in FAMILIES if HAS_TRITON else ():
        for architecture in ARCHITECTURES:
            some = representatives(family, architecture)
            for name in variants(family, architecture):
                case = family, architecture, name
                taken = EVERYTHING or name in some or fingerprint(case) in RECORDED
                (chosen if taken else others).append(case)
    return chosen, others


RECORDED = json.loads(RECORD.read_text()) if RECORD.exists() else {}
CASES, LEFT_OUT = cases()


def compiled(case):
    """In a worker process: the resources of a variant, or what went wrong."""
    from pyrepr.kernels import _launch

    family, architecture, name = case
    try:
        return dataclasses.astuple(_launch.compile_ahead(variants(family, architecture)[name], architecture))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def compilation(request):
    """Compiles what was asked for and is not on record, as many at a time as there are processors."""
    wanted = [item.callspec.params["case"] for item in request.session.items if "compilation" in item.fixturenames]
    missing = [case for case in wanted if fingerprint(case) not in RECORDED]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        running = {case: pool.submit(compiled, case) for case in missing}
        yield lambda case: running[case].result() if case in running else RECORDED[fingerprint(case)]
    if EVERYTHING:
        new = {fingerprint(case): future.result() for case, future in running.items()}
        record = {key: use for key, use in (RECORDED | new).items() if not isinstance(use, str)}
        keys = sorted(set(map(fingerprint, CASES)) & set(record))
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(record[key])}" for key in keys)
        RECORD.write_text("{\n" + lines + "\n}\n")


def test_variants_that_were_left_out():
    if LEFT_OUT:
        pytest.skip(f"{len(LEFT_OUT)} variants are not on record and others stand for them: PYREPR_COMPILE_ALL=1")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: no Triton kernel was compiled")
def test_triton_is_here():
    from pyrepr.kernels import _launch

    assert FAMILIES and _launch.ARCHITECTURES == ARCHITECTURES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-sm{case[1]}-{case[2]}")
def test_triton_kernel(case, compilation, record_property):
    from pyrepr.kernels import _launch

    family, architecture, name = case
    use = compilation(case)
    assert not isinstance(use, str), use
    use = _launch.Resources(*use)
    for key in ("shared", "registers", "spilled"):
        record_property(key, getattr(use, key))
    print(f"{family} sm_{architecture} {name}: {use}")
    assert use.shared <= _launch.SHARED_LIMIT[architecture]
    assert use.registers * use.threads <= 65536
    assert use.spilled == 0 or variants(family, architecture)[name].spills, f"{use.spilled} bytes of registers spilled"


# family → options of launched_process.py. A family whose variants list `aligned` exactly is compared in everything.
LAUNCHED: dict[str, list[str]] = {"gram": [], "delta_rule": ["--but-alignment"], "lookup": ["--but-alignment"]}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: nothing launched")
@pytest.mark.parametrize("family", LAUNCHED)
def test_what_is_launched_is_what_was_compiled(family):
    command = [sys.executable, "-W", "ignore", ROOT / "tests/launched_process.py", family, *LAUNCHED[family]]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout[:4000] + result.stderr[-3000:]
    print(result.stdout)


@functools.cache
def ptxas_report(source):
    """What ptxas says about every kernel of one file: (architecture, mangled name) → (registers, spilled bytes)."""
    targets = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_100,code=sm_100")
    command = ["nvcc", "-std=c++17", "-O3", "--threads", "0", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-c", str(source)]
    command += ["-o", os.devnull, *(part for target in targets for part in ("-gencode", target))]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    found, current = {}, None
    for line in result.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = entry[2], entry[1]
        elif current and (spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            found[current] = [0, int(spilled[1]) + int(spilled[2])]
        elif current in found and (used := re.search(r"Used (\d+) registers", line)):
            found[current][0] = int(used[1])
    return found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: no CUDA kernel was compiled")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_cuda_kernels(source, record_property):
    report = ptxas_report(source)
    assert {architecture for architecture, _ in report} == {"sm_80", "sm_90a", "sm_100"}
    for (architecture, kernel), (registers, spilled) in report.items():
        print(f"{source.stem} {architecture} {kernel}: {registers} registers, {spilled} bytes spilled")
        record_property(f"{architecture} {kernel}", (registers, spilled))
        allowed = any(
            source.name == file and architecture == target and name in kernel for file, target, name in SPILLS
        )
        assert spilled == 0 or allowed, f"{kernel} for {architecture} spills {spilled} bytes"


def test_importing_pyrepr_imports_neither_triton_nor_the_kernels():
    code = """
import sys, torch
before = "triton" in sys.modules
import pyrepr
pyrepr.backends()
assert ("triton" in sys.modules) == before
assert not any(name.startswith("pyrepr.kernels.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
importlib.util.find_spec = lambda name, package=None, found=importlib.util.find_spec: (
    None if name == "triton" else found(name, package))
import pyrepr
assert pyrepr.backends()["triton"].detail == "triton is not installed", pyrepr.backends()
pyrepr.cka(torch.randn(9, 2), torch.randn(9, 3))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
