"""`pyrepr bench`: runs the cases of all families, or of one, and reports time, speed-up, error, memory and bound."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from pyrepr.benchmarks.harness import Case, Row, as_json, machine, run_case, table

FAMILIES = ("gram", "delta_rule", "causal_conv1d", "lookup")
QUICK_SECONDS, FULL_SECONDS = 1.5, 8.0


def cases_of(family: str) -> list[Case]:
    """The cases of one family, from the module of its name."""
    return importlib.import_module(f"pyrepr.benchmarks.{family}").cases()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command to `parser`."""
    parser.add_argument("family", nargs="*", help=f"which families ({', '.join(FAMILIES)}); all without")
    parser.add_argument("--quick", action="store_true", help="small cases only, within a minute")
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
        f"SIMD {facts['simd']}"
    )
    if "fma_peak_gflops" in facts:
        print(
            f"measured bounds: {facts['fma_peak_gflops']:.0f} GFLOP/s fp32 (micro-kernel "
            f"{facts['micro_kernel_gflops']:.0f}), {facts['read_bandwidth_gbs']:.1f} GB/s read"
        )
    print("times are medians of interleaved rounds; x is how many times faster pyrepr is; errors are against float64")
    results: dict[str, list[Row]] = {}
    for family in families:
        for case in cases_of(family):
            if args.quick and not case.quick:
                continue
            rows = run_case(case, QUICK_SECONDS if args.quick else FULL_SECONDS)
            results.setdefault(family, []).extend(rows)
            print(f"\n{case.op}   {case.shape}   ({rows[0].data} data)\n{table(rows)}", flush=True)
    if args.json:
        temporary = args.json.with_name(args.json.name + ".partial")
        temporary.write_text(json.dumps(as_json([row for rows in results.values() for row in rows]), indent=1) + "\n")
        temporary.replace(args.json)
    if args.plot:
        from pyrepr.benchmarks.chart import draw

        for family, rows in results.items():
            print(draw(family, rows, args.plot / f"{family}.png"), file=sys.stderr)
    return 0


def _check_folder(option: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{option} must name a file in an existing folder, got folder {str(folder)!r}")
