"""Tables of similarities as figures: drawn with matplotlib on any axes, readable from 2 to some hundred layers.

Takes plain data and knows no report class.
"""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from torch import Tensor

from pyrepr._optional import PLOT, require
from pyrepr._reporting import fixed, printable, replacing

SUFFIXES = (".png", ".svg", ".pdf")
SHOWN_VALUES = 400  # with more cells than this, numbers in them would be too small to read
LONGEST = 32  # letters of a label
MOST_PIXELS = 20_000  # of a side: 1.6 GB while it is drawn
SIDE = 7.2  # inches, of the longer side of the cells


def labels_of(names: Sequence[str]) -> tuple[list[str], str]:
    """Names as labels that fit, and what was cut from them: the prefix most of them share, as "…"; long ones lose
    their middle."""
    prefix = shared_prefix(names) if len(names) > 20 or max(map(len, names)) > LONGEST else ""
    labels = ["…" + name.removeprefix(prefix) if prefix and name.startswith(prefix) else name for name in names]
    half = (LONGEST - 1) // 2
    return [x if len(x) <= LONGEST else f"{x[:half]}…{x[-half:]}" for x in map(printable, labels)], prefix


def shared_prefix(names: Sequence[str]) -> str:
    """The longest dotted prefix that at least two in three names share."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    common = [prefix for prefix, count in counts.items() if 3 * count >= 2 * len(names) and count > 1]
    return max(common, key=len, default="")


def ticks_of(count: int, room: float) -> list[int]:
    """Which of `count` labels are shown where `room` of them fit: every, every second, fifth, tenth, …"""
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if count <= room * s * 10**e)
    return list(range(0, count, step))


def axes_for(ax: Any, rows: int, columns: int, path: Path | None) -> Any:
    """The axes that are given, or those of a new figure: pyplot's where it is in use and no file is asked for, so that
    notebooks show it."""
    if ax is not None and not hasattr(ax, "imshow"):
        raise TypeError(f"ax must be axes of matplotlib or a path, got {type(ax).__name__}")
    if ax is not None:
        return ax
    require("matplotlib", PLOT)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cell = min(0.5, SIDE / max(rows, columns))
    size = (max(3.4, cell * columns) + 2.4, max(2.4, cell * rows) + 1.7)
    pyplot = sys.modules.get("matplotlib.pyplot")
    if path is None and pyplot is not None:
        return pyplot.figure(figsize=size, layout="constrained").add_subplot()
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def draw_table(
    axes: Any,
    values: Tensor,  # [rows, columns]
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_title: str,
    column_title: str,
    measure: str,
    low: float,
    high: float,
    origin: str,
    annotate: bool | None,
    unsure: Tensor | None,  # [rows, columns] bool, cells to hatch
    title: str,
    how: str,
) -> None:
    """Draws cells, labels, numbers where they fit (or as `annotate` says), hatching and a colour bar."""
    from matplotlib.ticker import FuncFormatter

    height, width = values.shape
    figure = axes.figure
    # Inches that the cells will have, near enough for choosing letters and ticks.
    box = axes.get_position()
    room_x, room_y = figure.get_figwidth() * box.width, figure.get_figheight() * box.height
    cell = min(room_x / width, room_y / height)
    axes.set_facecolor("0.85")  # where a value is undefined
    image = axes.imshow(
        values.double().cpu().numpy(),
        cmap="viridis",
        vmin=low,
        vmax=high,
        aspect="auto",
        origin=origin,
        rasterized=True,
    )
    size = max(5.5, min(9.0, 72 * cell * 0.6))
    _label(axes, columns, rows, column_title, row_title, size, room_x, room_y)
    doubtful = unsure if unsure is not None else values.isnan() & False
    if annotate is None:  # four digits of five points
        annotate = height * width <= SHOWN_VALUES and room_x / width > 0.19 and room_y / height > 0.1
    if annotate:
        _annotate(
            axes, values, doubtful, low, high, max(4.0, min(8.0, 72 * min(room_x / width * 0.34, room_y / height)))
        )
    if bool(doubtful.any()):
        _hatch(axes, doubtful)
    inside = values[values.isfinite()]
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    rounding = 1e-6 * (high - low)  # a layer with itself may have a CKA of 1 + 1e-7
    extend = beyond[bool((inside < low - rounding).any()), bool((inside > high + rounding).any())]
    bar = figure.colorbar(
        image, ax=axes, label=measure, shrink=0.9, extend=extend, format=FuncFormatter(lambda v, _: fixed(v, 2))
    )
    bar.outline.set_visible(False)
    _entitle(axes, title, how + (", grey: undefined" if bool(values.isnan().any()) else ""))


def _entitle(axes: Any, title: str, how: str) -> None:
    """A title over the figure, unless it is empty, and one over the axes, in lines that end within the figure."""
    figure = axes.figure
    width = figure.get_figwidth()
    if title:
        figure.suptitle(_wrapped(title, int(width * 72 / 11 * 1.7)), fontsize=11, parse_math=False)
    figure.draw_without_rendering()  # lays out: then it is known where the axes are
    box = axes.get_position()
    middle = (box.x0 + box.x1) / 2
    letters = int(2 * min(middle, 1 - middle) * width * 72 / 8 * 1.7)
    axes.set_title(_wrapped(how, letters), fontsize=8, color="0.35", parse_math=False)


def _wrapped(text: str, letters: int) -> str:
    """In lines of so many letters, broken at spaces or after the dots and slashes of names; in a word where it must."""
    letters, lines = max(12, letters), [""]
    for piece in re.split(r"(?<=[\s./_:-])", printable(text)):
        if len(lines[-1]) + len(piece.rstrip()) > letters:
            lines.append("")
        cut = textwrap.wrap(piece, letters, drop_whitespace=False) or [""]
        lines[-1] += cut[0]
        lines += cut[1:]
    return "\n".join(line.strip() for line in lines if line.strip())


def _label(
    axes: Any,
    columns: Sequence[str],
    rows: Sequence[str],
    column_title: str,
    row_title: str,
    size: float,
    x: float,
    y: float,
) -> None:
    for names, axis, name, room in ((columns, axes.xaxis, column_title, x), (rows, axes.yaxis, row_title, y)):
        labels, prefix = labels_of(names)
        space = (1.3 if axis is axes.yaxis else 1.9) * size / 72  # slanted labels need more
        shown = ticks_of(len(names), max(2.0, room / space))
        axis.set_ticks(shown, [labels[i] for i in shown], fontsize=size, parse_math=False)
        every = f"{len(names)} layers" if len(shown) < len(names) else ""
        cut = f"… = {prefix.rstrip('.')}" if prefix else ""
        notes = ", ".join(note for note in (every, cut) if note)
        letters = int(0.85 * room * 72 / 9)  # of the widest
        text = _wrapped(name, letters) + (f"\n{_wrapped(f'({notes})', letters)}" if notes else "")
        axis.set_label_text(text, fontsize=9, parse_math=False)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _annotate(axes: Any, values: Tensor, doubtful: Tensor, low: float, high: float, size: float) -> None:
    from matplotlib.patheffects import withStroke

    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            dark = not math.isnan(value) and (value - low) / (high - low) < 0.65
            text = "–" if math.isnan(value) else fixed(value, 2)
            ink, paper = ("white", "black") if dark else ("black", "white")
            letters = axes.text(j, i, text, ha="center", va="center", fontsize=size, color=ink, zorder=4)
            if doubtful[i, j]:  # readable on the hatching
                letters.set_path_effects([withStroke(linewidth=2.5, foreground=paper)])


def _hatch(axes: Any, cells: Tensor) -> None:
    import numpy as np

    height, width = cells.shape
    shown = np.ma.masked_where(~cells.cpu().numpy(), np.zeros((height, width)))
    mesh = axes.pcolor(
        np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5, shown, hatch="////", facecolor="none", edgecolor="0.75"
    )
    mesh.set(alpha=None, facecolor="none", linewidth=0)


def draw_bars(axes: Any, names: Sequence[str], values: Sequence[float], *, label: str, title: str, how: str) -> None:
    """Horizontal bars, first name on top."""
    figure = axes.figure
    labels, prefix = labels_of(names)
    room = figure.get_figheight() * axes.get_position().height
    size = max(5.5, min(9.0, 72 * room / len(names) * 0.6))
    shown = ticks_of(len(names), max(2.0, room / (1.15 * size / 72)))
    axes.barh(range(len(names)), [0 if math.isnan(v) else v for v in values], color="#2c728e")
    axes.set_yticks(shown, [labels[i] for i in shown], fontsize=size, parse_math=False)
    for i, value in enumerate(values):
        if math.isnan(value):
            axes.text(0, i, " undefined", va="center", fontsize=size)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    if prefix:
        axes.set_ylabel(f"(… = {prefix.rstrip('.')})", fontsize=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    _entitle(axes, title, how)


def check_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, got {path.name!r}")
    return path


def save_figure(axes: Any, path: Path, dpi: float) -> None:
    """Writes the figure that the axes are in; nothing is left behind if that fails."""
    side = max(axes.figure.get_size_inches())
    if not isinstance(dpi, SupportsFloat) or not 0 < dpi <= MOST_PIXELS / side:
        raise ValueError(f"dpi must be positive and at most {MOST_PIXELS / side:.0f} for this figure, got {dpi!r}")
    with replacing(path) as temporary:
        axes.figure.savefig(temporary, dpi=dpi)
