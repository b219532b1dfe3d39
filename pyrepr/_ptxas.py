"""Which assembler Triton turns PTX into machine code with, and where its word is doubted.

The ptxas 12.8 that Triton 3.6 brings is known to make wrong code of kernels like the delta rule's backward for sm_90,
where an operand of an asynchronous product comes out of registers; 13.0 and 13.1 each mend a part of that. Until a run
of `python -m pyrepr.gpu_check` has shown that kernel right under such an assembler, it is not run there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from pathlib import Path

Version = tuple[int, ...]

TRUSTED = (13, 1)
# Older ones that a run in benchmarks/results/ has found right on sm_90 (tests/test_gpu_check.py looks for them there).
PROVEN: tuple[Version, ...] = ()


def version_of(path: str) -> Version:
    """Of a ptxas, (12, 8, 93); () if it does not say."""
    try:
        result = subprocess.run([path, "--version"], text=True, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", result.stdout)
    return tuple(int(number) for number in found.groups()) if found else ()


def bundled() -> str | None:
    """Where the ptxas is that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends/nvidia/bin/ptxas"
    return str(path) if path.exists() else None


@functools.cache
def in_use() -> Version:
    """The version of the assembler that Triton takes: ``TRITON_PTXAS_PATH``, or its own."""
    path = os.environ.get("TRITON_PTXAS_PATH") or bundled()
    return version_of(path) if path else ()


def doubted(major: int) -> str | None:
    """Why the delta rule's backward is not run on a GPU of compute capability `major`.x, or ``None``."""
    if major != 9 or os.environ.get("PYREPR_ANY_PTXAS") == "1":
        return None
    version = in_use()
    if version >= TRUSTED or version in PROVEN:
        return None
    name = ".".join(map(str, version)) or "of unknown version"
    return f"ptxas {name} is known for wrong code on sm_90; set TRITON_PTXAS_PATH to one from CUDA 13.1 or newer"
