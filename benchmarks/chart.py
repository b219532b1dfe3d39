"""The bar chart of a run; README's: ``python -m pyrepr.benchmarks.chart docs/speed.png RESULTS.json …``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pyrepr.benchmarks.harness import Row


def draw(family: str, rows: list[Row], path: Path) -> Path:
    """One group of bars per case: time relative to pyrepr, with the relative error written at each bar."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError('--plot needs matplotlib: pip install "pyrepr-kernels[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.speedup is not None]
    names = [f"{row.op} {row.shape}" for row in shown]
    labels = [name if name not in names[:i] else "" for i, name in enumerate(names)]
    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(shown) + 1.2), layout="constrained")
    colours = ["#1f6f8b" if row.implementation.startswith("pyrepr") else "#b8b8b8" for row in shown]
    bars = axes.barh(range(len(shown)), [row.speedup for row in shown], color=colours)
    axes.bar_label(
        bars, [f"{r.implementation}, {r.speedup:.2g}×, error {r.error:.0e}" for r in shown], padding=4, fontsize=8
    )
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.3, 8 * max(row.speedup or 1 for row in shown))
    axes.set_xlabel("time, in units of pyrepr's")
    axes.set_title(f"pyrepr {family}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


# One case of each kind of work: what a reader compares first.
OVERVIEW = (
    ("cka_matrix", "L=24 n=4096 d=768"),
    ("cka_matrix rbf", "L=6 n=2048 d=384"),
    ("cka forward+backward", "n=1024 d=4096"),
    ("gated forward", "B=1 T=2048 H=8 K=V=128"),
    ("gated forward", "B=1 T=16 H=8 K=V=128"),
    ("gated forward+backward", "B=1 T=2048 H=8 K=V=128"),
    ("decode, gated", "B=1 H=8 K=V=128"),
    ("convolution + SiLU", "B=1 D=6144 T=2048 W=4"),
    ("top-k", "n=m=20000 d=384 k=10"),
    ("InfoNCE forward+backward", "n=m=8192 d=512"),
    ("lookup forward", "T=1 d=h=2048 int8"),
    ("lookup forward", "T=64 d=h=2048 bf16"),
)


def overview(rows: list[dict[str, Any]], path: Path) -> Path:
    """How many times pyrepr's time the fastest peer takes in the cases of :data:`OVERVIEW`, with both errors."""
    from matplotlib import pyplot

    lines = []
    for op, shape in OVERVIEW:
        case = [r for r in rows if (r["op"], r["shape"]) == (op, shape) and r["milliseconds"] is not None]
        own = min((r for r in case if r["implementation"].startswith("pyrepr")), key=lambda r: r["milliseconds"])
        peer = min((r for r in case if not r["implementation"].startswith("pyrepr")), key=lambda r: r["milliseconds"])
        theirs = "another result" if peer["error"] != peer["error"] else f"error {peer['error']:.0e}"
        text = f"{peer['implementation']}, {theirs}; ours {own['error']:.0e}"
        lines.append((f"{op}  {shape}", peer["milliseconds"] / own["milliseconds"], text))
    names, ratios, texts = zip(*lines, strict=True)
    figure, axes = pyplot.subplots(figsize=(11, 0.42 * len(lines) + 1), layout="constrained")
    bars = axes.barh(range(len(lines)), ratios, color=["#1f6f8b" if r >= 1 else "#c0504d" for r in ratios])
    axes.bar_label(bars, [f"{r:.2g}×  {t}" for r, t in zip(ratios, texts, strict=True)], padding=4, fontsize=8)
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_xlim(0, 1.75 * max(ratios))
    axes.set_xlabel("time of the fastest peer, in units of pyrepr's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    target, *files = map(Path, sys.argv[1:])
    print(overview([row for file in files for row in json.loads(file.read_text())["rows"]], target))
