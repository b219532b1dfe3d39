"""Markdown of a benchmark run: ``python -m pyrepr.benchmarks.report FILE.json``, for the README."""

from __future__ import annotations

import json
import sys
from typing import Any


def markdown(run: dict[str, Any]) -> str:
    """A table with one line per case and implementation, time, speed-up and error side by side."""
    facts = run["machine"]
    bounds = (
        f"{facts['fma_peak_gflops']:.0f} GFLOP/s fp32 (micro-kernel {facts['micro_kernel_gflops']:.0f}), "
        f"{facts['read_bandwidth_gbs']:.0f} GB/s"
    )
    lines = [
        f"{facts['processor']}, {facts['threads']} threads, SIMD level {facts['simd']}, torch {facts['torch']}"
        + (f", commit {facts['commit']}" if facts.get("commit") else "")
        + f"; measured in the same run: {bounds}.",
        "",
        "| op | shape | implementation | ms | × | error | extra MiB | of bound |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    last = None
    for row in run["rows"]:
        case = (row["op"], row["shape"])
        op, shape = case if case != last else ("", "")
        last = case
        if row["milliseconds"] is None:
            lines.append(f"| {op} | {shape} | {row['implementation']} | fails | | | | |")
            continue
        bound = row["fraction_of_bound"]
        cells = [
            op,
            shape,
            f"**{row['implementation']}**" if row["implementation"].startswith("pyrepr") else row["implementation"],
            f"{row['milliseconds']:.3g}" if row["milliseconds"] < 1000 else f"{row['milliseconds']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['error']:.0e}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{100 * bound:.0f} %" if bound else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(markdown(json.load(file)))
