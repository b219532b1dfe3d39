"""Every GPU kernel, in every configuration it may be launched with, compiles for every architecture; without a GPU.

Compiling all Triton variants takes many minutes. So what came out of it is kept in tests/compiled.json, by version of
Triton and architecture, and under a fingerprint of source, options, architecture and compiler: a variant that is on
record is not compiled again. PYREPR_COMPILE_ALL=1 compiles everything that is not, and adds each as it is done, so that
a run that is cut short is gone on with by the next. With a version of Triton that has no complete record, the variants
that a family names to stand for the rest are compiled, and what is left out is counted and shown as skipped.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import spills

ROOT = Path(__file__).parents[1]
FAMILIES = [
    name
    for name in ("gram", "delta_rule", "causal_conv1d", "lookup", "pairs")
    if importlib.util.find_spec(f"pyrepr.kernels.{name}")
]
ARCHITECTURES = (80, 90, 100)
HAS_TRITON = importlib.util.find_spec("triton") is not None
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# Spilled bytes that stand, with their reason: (source, architecture, kernel) → reason.
SPILLS: dict[tuple[str, str, str], str] = {}


RECORD = ROOT / "tests/compiled.json"
# The version of Triton that the index's torch brings, and whose spills are held to exact bytes.
TRITON = "3.7.1"
EVERYTHING = os.environ.get("PYREPR_COMPILE_ALL") == "1"


@functools.cache
def variants(family, architecture):
    module = importlib.import_module(f"pyrepr.kernels.{family}")
    return {v.name: v for v in module.variants(architecture)}


def representatives(family, architecture):
    module = importlib.import_module(f"pyrepr.kernels.{family}")
    return {v.name for v in getattr(module, "representative_variants", module.variants)(architecture)}


@functools.cache
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


VERSION = importlib.metadata.version("triton") if HAS_TRITON else ""
EVERY_RECORD = json.loads(RECORD.read_text()) if RECORD.exists() else {}
RECORDED = {key: use for a in ARCHITECTURES for key, use in EVERY_RECORD.get(f"{VERSION} sm_{a}", {}).items()}
CASES, LEFT_OUT = cases()


def compiled(case):
    """In a worker process: the resources of a variant, or what went wrong."""
    from pyrepr.kernels import _launch

    family, architecture, name = case
    try:
        return dataclasses.astuple(_launch.compile_ahead(variants(family, architecture)[name], architecture))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def keep(record):
    """Writes the record of this version of Triton, the others as they were: all of the file or nothing."""
    architecture_of = {fingerprint(case): case[1] for case in CASES}
    every = {**EVERY_RECORD, **{f"{VERSION} sm_{a}": {} for a in ARCHITECTURES}}
    for key, use in record.items():
        every[f"{VERSION} sm_{architecture_of[key]}"][key] = use
    texts = []
    for version in sorted(every):
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(use)}" for key, use in sorted(every[version].items()))
        texts.append(f"{json.dumps(version)}: {{\n{lines}\n}}")
    partial = RECORD.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(texts) + "\n}\n")
    partial.replace(RECORD)


@pytest.fixture(scope="module")
def compilation(request):
    """Compiles what was asked for and is not on record, as many at a time as there are processors."""
    wanted = [item.callspec.params["case"] for item in request.session.items if "compilation" in item.fixturenames]
    missing = [case for case in wanted if fingerprint(case) not in RECORDED]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        running = {case: pool.submit(compiled, case) for case in missing}
        if EVERYTHING:
            current = set(map(fingerprint, CASES))
            record = {key: use for key, use in RECORDED.items() if key in current}
            case_of = {future: case for case, future in running.items()}
            for future in concurrent.futures.as_completed(case_of):
                if not isinstance(future.result(), str):
                    record[fingerprint(case_of[future])] = future.result()
                    keep(record)
        yield lambda case: running[case].result() if case in running else RECORDED[fingerprint(case)]


def test_every_variant_was_compiled():
    """A changed kernel has to be compiled again, in all its variants: PYREPR_COMPILE_ALL=1."""
    names = [f"{family} sm_{architecture} {name}" for family, architecture, name in LEFT_OUT]
    if names and VERSION != TRITON:
        pytest.skip(f"{len(names)} variants are not on record for triton {VERSION}, and others stand for them")
    assert not names, f"{len(names)} variants are not on record: {names[:9]}"


def test_what_is_on_record_for_other_versions_is_complete():
    """As far as this version can tell: nothing is missing, and what spills is what tests/spills.py says."""
    if LEFT_OUT or VERSION != TRITON:
        pytest.skip(f"the variants are known as those of triton {TRITON}")
    here = {f"sm_{a}": len({fingerprint(case) for case in CASES if case[1] == a}) for a in ARCHITECTURES}
    assert all(len(record) >= here[place.split()[1]] for place, record in EVERY_RECORD.items())
    others = {place: record.values() for place, record in EVERY_RECORD.items() if place.split()[0] != TRITON}
    found = {v: (len(r), sum(use[2] > 0 for use in r), max(use[2] for use in r)) for v, r in others.items()}
    assert found == spills.ELSEWHERE


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
    if VERSION == TRITON:
        assert use.spilled <= spills.allowed(family, name, architecture), f"{use.spilled} bytes of registers spilled"


def test_spills_that_stand_are_no_larger_than_they_are():
    """What is allowed is what the worst variant of its place needs."""
    if LEFT_OUT or VERSION != TRITON:
        pytest.skip(f"what may spill was measured with triton {TRITON}, in every variant")
    worst = {}
    for case in CASES:
        family, architecture, name = case
        if spilled := RECORDED.get(fingerprint(case), [0, 0, 0])[2]:
            place = worst.setdefault((family, *spills.place(name)), {})
            place[architecture] = max(spilled, place.get(architecture, 0))
    assert worst == spills.ALLOWED
    assert {(family, kernel) for family, kernel, _, _ in worst} == set(spills.REASONS)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: nothing launched")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_launched_is_what_was_compiled(family):
    command = [sys.executable, "-W", "ignore", ROOT / "tests/launched_process.py", family]
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
