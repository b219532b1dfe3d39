"""Registers that Triton kernels spill, and why that stands; tests/test_gpu_compile.py holds them to it."""

from __future__ import annotations

_STATE = "the state, what it is multiplied with and two results take all 255 registers: addresses wait in local memory"
_SUMS = "five sums of a block are carried through the value columns, and with a gate both gradients: addresses wait"
_MAP = "a segment's map is read whole, 64 registers a thread, while the state and N arrive"
_KEPT = "two words where the logits of several prefixes are kept, which are few"
_HELD = "two words a thread: with the 128 registers that it may have, four programs fill a multiprocessor"
_FEW = "a few words a thread, with this compiler: Triton 3.9 spills none of them; which they are was not looked into"

# (family, kernel) → why.
REASONS: dict[tuple[str, str], str] = {
    ("delta_rule", "gradient"): _SUMS,
    ("delta_rule", "kda pairs"): _FEW,
    ("delta_rule", "merge"): _MAP,
    ("delta_rule", "prepare"): _HELD,
    ("delta_rule", "reverse"): _STATE,
    ("delta_rule", "scan"): _STATE,
    ("gram", "matrix"): _FEW,
    ("lookup", "dots"): _FEW,
    ("pairs", "exact"): _FEW,
    ("pairs", "logsumexp"): _KEPT,
    ("pairs", "screen"): _FEW,
    ("pairs", "weights"): _FEW,
}

# With the version that the index's torch brings (tests/test_gpu_compile.py names it):
# (family, kernel, dtype, padded K of the scans, else 0) → architecture → bytes a thread of the worst variant.
ALLOWED: dict[tuple[str, str, str, int], dict[int, int]] = {
    ("delta_rule", "gradient", "bf16", 0): {80: 200, 90: 48},
    ("delta_rule", "gradient", "fp16", 0): {80: 200, 90: 40},
    ("delta_rule", "gradient", "fp32", 0): {80: 64, 90: 128, 100: 176},
    ("delta_rule", "kda pairs", "fp32", 0): {100: 8},
    ("delta_rule", "merge", "fp32", 0): {80: 56, 90: 80, 100: 88},
    ("delta_rule", "prepare", "bf16", 0): {100: 8},
    ("delta_rule", "prepare", "fp16", 0): {100: 8},
    ("delta_rule", "reverse", "bf16", 64): {80: 8, 100: 376},
    ("delta_rule", "reverse", "bf16", 128): {90: 56, 100: 16},
    ("delta_rule", "reverse", "bf16", 256): {80: 56, 100: 96},
    ("delta_rule", "reverse", "fp16", 64): {80: 16, 100: 376},
    ("delta_rule", "reverse", "fp16", 128): {90: 56, 100: 16},
    ("delta_rule", "reverse", "fp16", 256): {80: 56, 100: 96},
    ("delta_rule", "reverse", "fp32", 64): {80: 16, 90: 40, 100: 40},
    ("delta_rule", "reverse", "fp32", 256): {80: 520, 90: 480, 100: 496},
    ("delta_rule", "scan", "bf16", 64): {80: 48, 100: 64},
    ("delta_rule", "scan", "bf16", 128): {80: 40, 90: 16, 100: 96},
    ("delta_rule", "scan", "bf16", 256): {90: 24, 100: 24},
    ("delta_rule", "scan", "fp16", 64): {80: 48, 100: 64},
    ("delta_rule", "scan", "fp16", 128): {80: 40, 90: 16, 100: 96},
    ("delta_rule", "scan", "fp16", 256): {90: 24, 100: 24},
    ("delta_rule", "scan", "fp32", 64): {80: 8, 90: 16, 100: 24},
    ("delta_rule", "scan", "fp32", 128): {80: 8},
    ("delta_rule", "scan", "fp32", 256): {80: 544, 90: 496, 100: 568},
    ("gram", "matrix", "", 0): {90: 64},
    ("lookup", "dots", "fp32", 0): {100: 8},
    ("pairs", "exact", "bf16", 0): {90: 8, 100: 24},
    ("pairs", "exact", "fp16", 0): {90: 8, 100: 24},
    ("pairs", "exact", "fp32", 0): {90: 8, 100: 24},
    ("pairs", "logsumexp", "bf16", 0): {100: 8},
    ("pairs", "logsumexp", "fp16", 0): {100: 8},
    ("pairs", "logsumexp", "fp32", 0): {80: 16},
    ("pairs", "screen", "bf16", 0): {80: 8},
    ("pairs", "screen", "fp16", 0): {80: 8},
    ("pairs", "weights", "bf16", 0): {100: 80},
    ("pairs", "weights", "fp16", 0): {100: 80},
}

# Other versions of Triton with a record, by architecture → (variants, those that spill, bytes a thread of the worst).
ELSEWHERE: dict[str, tuple[int, int, int]] = {
    "3.6.0 sm_90": (526, 42, 520),
    "3.9.0 sm_80": (528, 71, 504),
    "3.9.0 sm_90": (546, 46, 536),
    "3.9.0 sm_100": (536, 47, 528),
}

DTYPES = ("fp32", "bf16", "fp16", "i8", "i64", "odd")


def place(name: str) -> tuple[str, str, int]:
    """The kernel, the dtype and the width that a variant's name gives: "scan bf16 BV=64 BK=128 …", "hash-bf16-odd"."""
    words = name.split() if " " in name else name.split("-")
    kernel = " ".join(word for word in words if "=" not in word and word not in DTYPES)
    dtype = next((word for word in words if word in DTYPES), "")
    widths = [int(word[3:]) for word in words if word.startswith("BK=")]
    return kernel, dtype, widths[0] if kernel in ("scan", "reverse") else 0


def allowed(family: str, name: str, architecture: int) -> int:
    """Bytes a thread that a variant may spill."""
    return ALLOWED.get((family, *place(name)), {}).get(architecture, 0)
