"""`pyrepr bench`: runs the cases of all families, or of one, and reports time, speed-up, error, memory and bound."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from pyrepr.benchmarks.harness import Case, Row, machine, run_case, table, write_json

FAMILIES = ("gram", "delta_rule", "causal_conv1d", "lookup", "pairs", "probe")

QUICK_SECONDS, FULL_SECONDS = 1.5, 8.0  # of timing, a case
QUICK_BUDGET = 90.0  # seconds for all of --quick on two cores


def cases_of(family: str) -> list[Case]:
    """The cases of one family, from the module of its name."""
    return importlib.import_module(f"pyrepr.benchmarks.{family}").cases()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("family", nargs="*", help=f"which families ({', '.join(FAMILIES)}); all without")
    parser.add_argument("--quick", action="store_true", help=f"small cases only, within {QUICK_BUDGET:.0f} s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number to FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw one bar chart per family into DIR")


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    families = args.family or list(FAMILIES)
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if args.json:
        _check_folder("--json", args.json.parent)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print(
        f"pyrepr {facts['pyrepr']}, torch {facts['torch']}, {facts['processor']}, {facts['threads']} threads, "
        f"SIMD {facts['simd']}, threads pinned: {facts['pinned']}"
    )
    if "fma_peak_gflops" in facts:
        print(
            f"measured bounds: {facts['fma_peak_gflops']:.0f} GFLOP/s fp32 (micro-kernel "
            f"{facts['micro_kernel_gflops']:.0f}), {facts['read_bandwidth_gbs']:.1f} GB/s read"
        )
    print("times are medians of interleaved rounds; x is how many times faster pyrepr is; errors are against float64")
    results = _run([(f, case) for f in families for case in cases_of(f) if case.quick or not args.quick], args.quick)
    if args.json:
        write_json([row for rows in results.values() for row in rows], args.json)
    if args.plot:
        from pyrepr.benchmarks.chart import draw

        for family, rows in results.items():
            print(draw(family, rows, args.plot / f"{family}.png"), file=sys.stderr)
    return 0


def _run(cases: list[tuple[str, Case]], quick: bool) -> dict[str, list[Row]]:
    """Family → rows. With `quick`, no case is begun when the budget is used up, and what was left out is said."""
    print(f"{len(cases)} cases" + (f" in at most {QUICK_BUDGET:.0f} s" if quick else ""))
    results: dict[str, list[Row]] = {}
    start = time.monotonic()
    for i, (family, case) in enumerate(cases):
        left = QUICK_BUDGET - (time.monotonic() - start)
        if quick and left <= 0:
            names = ", ".join(case.name for _, case in cases[i:])
            print(f"\nleft out, since {QUICK_BUDGET:.0f} s are used up: {names}")
            break
        # Making a case and its truth takes about as long as timing it.
        seconds = min(QUICK_SECONDS, left / (len(cases) - i) / 2) if quick else FULL_SECONDS
        rows = run_case(case, seconds)
        results.setdefault(family, []).extend(rows)
        heading = f"{case.op}   {case.shape}   ({rows[0].data} data)   {i + 1} of {len(cases)}"
        print(f"\n{heading}\n{table(rows)}", flush=True)
    return results


def _check_folder(option: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{option} must name a file in an existing folder, got folder {str(folder)!r}")
