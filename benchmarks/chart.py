"""The bar chart of a benchmark run."""

from __future__ import annotations

from pathlib import Path

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
