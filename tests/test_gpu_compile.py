"""Every GPU kernel, in every configuration it may be launched with, compiles for every architecture; without a GPU.

Compiling all Triton variants takes many minutes. So what came out of it is kept in tests/compiled.json, by version of
Triton, architecture and name: a fingerprint of source, options, architecture and compiler, then what `Resources` has. A
variant that is on record with its fingerprint is not compiled again. PYREPR_COMPILE_ALL=1 compiles everything that is
not, and adds each as it is done, so that a run that is cut short is gone on with by the next. With a version of Triton
that has no complete record, the variants that a family names to stand for the rest are compiled, and what is left out
is counted and shown as skipped.

What is compiled again is held to what is on record under its name: registers to within 8, in which they are allotted,
instructions to within 2 %, spilled bytes to the same. A variant that got worse fails and stays as it is on record;
PYREPR_COMPILE_ALL=worse, where that is meant, records it. Instructions of a variant that was recorded before they were
counted are null, until it changes or PYREPR_COMPILE_ALL=count compiles it for them.

What nvcc says of the few CUDA sources is on record in the same way, in tests/compiled_cuda.json; all that is not is
compiled, with PYREPR_COMPILE_ALL=1 or without.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
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
CUDA_RECORD = ROOT / "tests/compiled_cuda.json"
# The version of Triton that the index's torch brings, and whose spills are held to exact bytes.
TRITON = "3.7.1"
# "1", "worse", "count" or nothing
EVERYTHING = os.environ.get("PYREPR_COMPILE_ALL", "")


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
    return _launch.fingerprint(variants(family, architecture)[name], architecture)[:12]


def before(case):
    """What is on record under a case's name, of these sources or others: (fingerprint, resources), or None."""
    from pyrepr.kernels import _launch

    family, architecture, name = case
    row = EVERY_RECORD.get(f"{VERSION} sm_{architecture}", {}).get(f"{family} {name}")
    return row and (row[0], _launch.Resources(*row[1:]))


def on_record(case):
    old = before(case)
    return (
        old is not None and old[0] == fingerprint(case) and (EVERYTHING != "count" or old[1].instructions is not None)
    )


def worse(use, old):
    """What of a variant is worse than on record, by more than the compiler's whims."""
    return [
        f"{now} {name}, {then} on record"
        for name, now, then, limit in (
            ("registers", use.registers, old.registers, old.registers + 8),
            ("bytes spilled", use.spilled, old.spilled, old.spilled),
            ("instructions", use.instructions, old.instructions, 1.02 * (old.instructions or use.instructions)),
        )
        if now > limit
    ]


def cases():
    """(family, architecture, variant) of all that can be tested without taking long, and what was left out."""
    chosen, others = [], []
    for family in FAMILIES if HAS_TRITON else ():
        for architecture in ARCHITECTURES:
            some = representatives(family, architecture)
            for name in variants(family, architecture):
                case = family, architecture, name
                taken = EVERYTHING or name in some or on_record(case)
                (chosen if taken else others).append(case)
    return chosen, others


VERSION = importlib.metadata.version("triton") if HAS_TRITON else ""
EVERY_RECORD = json.loads(RECORD.read_text()) if RECORD.exists() else {}
CASES, LEFT_OUT = cases()


def compiled(case):
    """In a worker process: the resources of a variant, or what went wrong."""
    from pyrepr.kernels import _launch

    family, architecture, name = case
    try:
        return _launch.compile_ahead(variants(family, architecture)[name], architecture)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def keep(record):
    """Writes the record of this version of Triton, the others as they were: all of the file or nothing."""
    every = {**EVERY_RECORD, **{f"{VERSION} sm_{architecture}": {} for _, architecture, _ in record}}
    for (family, architecture, name), (key, use) in record.items():
        every[f"{VERSION} sm_{architecture}"][f"{family} {name}"] = [key, *dataclasses.astuple(use)]
    texts = []
    for version in sorted(every):
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(every[version].items()))
        texts.append(f"{json.dumps(version)}: {{\n{lines}\n}}")
    partial = RECORD.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(texts) + "\n}\n")
    partial.replace(RECORD)


@pytest.fixture(scope="module")
def compilation(request):
    """Compiles what was asked for and is not on record, as many at a time as there are processors."""
    wanted = [item.callspec.params["case"] for item in request.session.items if "compilation" in item.fixturenames]
    missing = [case for case in wanted if not on_record(case)]
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {case: pool.submit(compiled, case) for case in missing}
        if EVERYTHING:
            record = {case: row for case in CASES if (row := before(case))}
            case_of = {future: case for case, future in running.items()}
            for future in concurrent.futures.as_completed(case_of):
                case, use = case_of[future], future.result()
                if isinstance(use, str) or (case in record and EVERYTHING != "worse" and worse(use, record[case][1])):
                    continue
                record[case] = fingerprint(case), use
                keep(record)
        yield lambda case: running[case].result() if case in running else before(case)[1]


def test_what_got_worse_is_said():
    from pyrepr.kernels._launch import Resources

    old = Resources(shared=0, registers=100, spilled=8, threads=128, instructions=1000)
    assert not worse(old, old)
    assert not worse(Resources(9, 108, 8, 128, 1020), old)
    assert not worse(Resources(0, 50, 0, 128, 1020), dataclasses.replace(old, instructions=None))
    assert worse(Resources(0, 109, 9, 128, 1021), old) == [
        "109 registers, 100 on record",
        "9 bytes spilled, 8 on record",
        "1021 instructions, 1000 on record",
    ]


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
    # Rows and columns are chosen by version.
    kinds = {place: {re.sub(r" B[VMN]=\d+", "", name) for name in record} for place, record in EVERY_RECORD.items()}
    for place, found in kinds.items():
        assert not kinds[f"{TRITON} {place.split()[1]}"] - found
    others = {
        place: [row[3] for row in record.values()]
        for place, record in EVERY_RECORD.items()
        if place.split()[0] != TRITON
    }
    assert {v: (len(r), sum(spilled > 0 for spilled in r), max(r)) for v, r in others.items()} == spills.ELSEWHERE


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
    for key in ("shared", "registers", "spilled", "instructions"):
        record_property(key, getattr(use, key))
    print(f"{family} sm_{architecture} {name}: {use}")
    assert use.shared <= _launch.SHARED_LIMIT[architecture]
    assert use.registers * use.threads <= 65536
    if VERSION == TRITON:
        assert use.spilled <= spills.allowed(family, name, architecture), f"{use.spilled} bytes of registers spilled"
    old = before(case)
    if old and not on_record(case) and EVERYTHING != "worse":
        assert not worse(use, old[1]), "; ".join(worse(use, old[1]))


@pytest.mark.parametrize("family", FAMILIES if HAS_TRITON else ())
def test_the_record_is_what_compiling_gives(family, tmp_path):
    """Of the kernel that takes the fewest registers; and its instructions are as many as the disassembler lists."""
    from pyrepr.kernels import _launch

    registers = {case: before(case)[1].registers for case in CASES if case[:2] == (family, 90) and on_record(case)}
    if not registers and VERSION != TRITON:
        pytest.skip(f"nothing is on record for triton {VERSION}")
    case = min(registers, key=lambda case: (registers[case], case))
    variant = variants(family, 90)[case[2]]
    use = _launch.compile_ahead(variant, 90)
    assert use == dataclasses.replace(before(case)[1], instructions=before(case)[1].instructions or use.instructions)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(_launch.machine_code(variant, 90).asm["cubin"])
    listed = re.findall(r"^ +/\*[0-9a-f]{4,}\*/ +(.*?);", _launch._dump(str(path), "-sass"), re.M)
    while listed[-1].strip() == "NOP":
        listed.pop()
    assert use.instructions == len(listed)


def test_spills_that_stand_are_no_larger_than_they_are():
    """What is allowed is what the worst variant of its place needs."""
    if LEFT_OUT or VERSION != TRITON:
        pytest.skip(f"what may spill was measured with triton {TRITON}, in every variant")
    worst = {}
    for case in CASES:
        family, architecture, name = case
        if spilled := before(case)[1].spilled:
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


TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_100,code=sm_100")
NVCC = ["nvcc", "-std=c++17", "-O3", "--threads", "0", "-Xptxas", "-v", "-o", os.devnull]
NVCC += [part for target in TARGETS for part in ("-gencode", target)]


def source_texts(path):
    """Of a file and of all it includes of ours."""
    text = path.read_text()
    included = (ROOT / "csrc" / name for name in re.findall(r'#include "(.+)"', text))
    return [text, *(part for file in included for part in source_texts(file))]


def ptxas_report(source):
    """What ptxas says about every kernel of one file: "architecture mangled name" → registers and spilled bytes.

    Taken from the record where compiler, options and source are what they were; PYREPR_COMPILE_ALL=1 adds to it.
    """
    version = subprocess.run(["nvcc", "--version"], text=True, capture_output=True, check=True).stdout
    key = hashlib.sha256(" ".join([version, *NVCC, *source_texts(source)]).encode()).hexdigest()[:20]
    record = json.loads(CUDA_RECORD.read_text())
    if key in record:
        return record[key]["kernels"]
    command = [*NVCC, f"-I{ROOT / 'csrc'}", "-c", str(source)]
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    found, current = {}, None
    for line in result.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            current = f"{entry[2]} {entry[1]}"
        elif current and (spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            found[current] = [0, int(spilled[1]) + int(spilled[2])]
        elif current in found and (used := re.search(r"Used (\d+) registers", line)):
            found[current][0] = int(used[1])
    if EVERYTHING:
        others = {k: use for k, use in record.items() if use["source"] != source.name}
        kept = {**others, key: {"source": source.name, "kernels": found}}
        CUDA_RECORD.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
    return found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: no CUDA kernel was compiled")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_cuda_kernels(source, record_property):
    report = ptxas_report(source)
    assert {name.split()[0] for name in report} == {"sm_80", "sm_90a", "sm_100"}
    for name, (registers, spilled) in report.items():
        architecture, kernel = name.split()
        print(f"{source.stem} {architecture} {kernel}: {registers} registers, {spilled} bytes spilled")
        record_property(f"{architecture} {kernel}", (registers, spilled))
        allowed = any(
            source.name == file and architecture == target and part in kernel for file, target, part in SPILLS
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
