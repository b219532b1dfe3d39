"""The compiled module: every instruction set computes the same, and none leaks into code common to all."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from levels import other_levels, run_at

from pyrepr import _C

HERE = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("level", other_levels())
def test_core_of_the_suite_at_every_level(level):
    """The families' numerical tests, at each other level this machine can run."""
    run_at(level)


def test_code_common_to_all_levels_holds_no_avx():
    """Disassembles the module: AVX instructions stand only in functions of a namespace named after an AVX level."""
    assert shutil.which("objdump"), "this test needs binutils (apt install binutils)"
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    avx = re.compile(r"%[yzt]mm|%k[0-7]|\tv[a-z0-9]+ ")
    level = re.compile(r"(4avx2|6avx512|11avx512_bf16|3amx)(?:12_GLOBAL|\d)")  # as the compiler spells namespaces
    function, leaked, seen = "", [], set()
    for line in listing.splitlines():
        if head := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            function = head.group(1)
        elif avx.search(line):
            if name := level.search(function):
                seen.add(name.group(1))
            else:
                leaked.append(f"{function}: {line.strip()}")
    assert not leaked, "\n".join(leaked[:20])
    expected = {"4avx2", "6avx512", "11avx512_bf16", "3amx"} if X86 else set()
    assert seen == expected, f"AVX code of only these levels is in this build: {seen}"
