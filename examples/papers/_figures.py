"""Draws what a proof found."""

from __future__ import annotations

import io
from typing import Any

from pyrepr.papers._row import Chart

from pyrepr._optional import PLOT, require

COLOURS = ("#2c728e", "#d1495b", "#7fb069", "#8d6a9f", "#666666")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pyrepr",
    "font.size": 9.0,
    "font.family": ["DejaVu Sans", "sans-serif"],
}


def svg(chart: Chart) -> str:
    """The figure as text, the same for the same numbers."""
    matplotlib = require("matplotlib", PLOT)
    figures = require("matplotlib.figure", PLOT)
    backend = require("matplotlib.backends.backend_svg", PLOT)
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(4.6, 2.9), layout="constrained")
        backend.FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        DRAW[chart.kind](axes, chart)
        axes.set(xlabel=chart.xlabel, ylabel=chart.ylabel if chart.kind != "heat" else "")
        if chart.bound is not None:
            axes.axhline(chart.bound, color="black", linewidth=0.8, linestyle=":")
        if chart.kind != "heat":
            axes.spines[["top", "right"]].set_visible(False)
            if len(chart.series) > 1:
                figure.legend(
                    loc="outside upper center",
                    ncols=3 if sum(map(len, chart.series)) < 50 else 2,
                    frameon=False,
                    fontsize=8,
                )
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def bars(axes: Any, chart: Chart) -> None:
    count = len(chart.series)
    width = 0.8 / count
    for i, (name, values) in enumerate(chart.series.items()):
        at = [x + (i - (count - 1) / 2) * width for x in range(len(values))]
        drawn = axes.bar(at, values, width * 0.92, color=COLOURS[i], label=name)
        if count * len(values) <= (6 if chart.log else 10):
            axes.bar_label(drawn, fmt="%.1e" if chart.log else "%.3g", fontsize=7, padding=1)
    turned = max(map(len, map(str, chart.x))) * len(chart.x) > 50
    axes.set_xticks(range(len(chart.x)), chart.x, **({"rotation": 30, "ha": "right"} if turned else {}))
    if chart.log:
        axes.set_yscale("log")
    axes.margins(y=0.12)


def lines(axes: Any, chart: Chart) -> None:
    marker = "o" if len(chart.x) <= 12 else None
    for i, (name, values) in enumerate(chart.series.items()):
        axes.plot(chart.x, values, marker=marker, markersize=4, color=COLOURS[i], label=name)
    if chart.log:
        axes.set_yscale("log")
    if chart.log_x:
        axes.set_xscale("log")
    if len(chart.x) <= 8:
        axes.set_xticks(chart.x, [f"{x:g}" for x in chart.x])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def points(axes: Any, chart: Chart) -> None:
    for i, (name, values) in enumerate(chart.series.items()):
        axes.scatter(chart.x, values, s=16, alpha=0.7, color=COLOURS[i], label=name)


def heat(axes: Any, chart: Chart) -> None:
    table = list(chart.series.values())
    image = axes.imshow(table, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(chart.x)), chart.x)
    axes.set_yticks(range(len(table)), list(chart.series))
    low, high = image.get_clim()
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            dark = value < (low + high) / 2
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_title(chart.ylabel, fontsize=9)


DRAW = {"bars": bars, "lines": lines, "points": points, "heat": heat}
