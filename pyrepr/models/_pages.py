"""A :class:`pyrepr.Comparison` as a heatmap, in a file or on a page to look around in, and the page of a conversion."""

from __future__ import annotations

import html
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrepr._optional import PLOT, require
from pyrepr._reporting import replacing

if TYPE_CHECKING:
    from pyrepr.models.comparison import Comparison
    from pyrepr.models.conversion import Conversion

SUFFIXES = (".png", ".svg", ".pdf")
SHOWN_VALUES = 400  # with more cells than this, numbers in them would be too small to read


def value_range(comparison: Comparison) -> tuple[float, float]:
    """0 to 1, so that pictures can be compared, or wider where unbiased estimates leave that range."""
    finite = comparison.values[comparison.values.isfinite()]
    if not finite.numel():
        return 0.0, 1.0
    return min(0.0, finite.min().item()), max(1.0, finite.max().item())


def _title(comparison: Comparison, title: str | None) -> str:
    return title or f"CKA: {comparison.model_a} × {comparison.model_b}"


def save_heatmap(comparison: Comparison, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Draws the heatmap to a PNG, SVG or PDF file; see :meth:`pyrepr.Comparison.plot`."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, got {path.name!r}")
    require("matplotlib", PLOT)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = comparison.values.shape
    cell = min(0.5, max(0.12, 24 / max(rows, columns)))  # inches
    width, height = max(3.2, cell * columns), max(2.4, cell * rows)
    figure = Figure(figsize=(width + 2.6, height + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, high = value_range(comparison)
    axes.set_facecolor("0.85")  # where a value is undefined
    image = axes.imshow(comparison.values.numpy(), cmap="viridis", vmin=low, vmax=high, aspect="auto")
    size = min(9.0, 72 * cell * 0.7)
    axes.set_xticks(range(columns), comparison.layers_b, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(range(rows), comparison.layers_a, fontsize=size)
    axes.set_xlabel(comparison.model_b)
    axes.set_ylabel(comparison.model_a)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if rows * columns <= SHOWN_VALUES:
        for i, line in enumerate(comparison.values.tolist()):
            for j, value in enumerate(line):
                dark = not math.isnan(value) and (value - low) / (high - low) < 0.65
                text = "–" if math.isnan(value) else f"{value:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=0.8 * size, color="white" if dark else "black")
    figure.colorbar(image, ax=axes, label="CKA", shrink=0.9).outline.set_visible(False)
    figure.suptitle(_title(comparison, title), fontsize=11, wrap=True)
    axes.set_title(comparison.describe(), fontsize=8, color="0.35")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def save_page(comparison: Comparison, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Writes the self-contained page; see :meth:`pyrepr.Comparison.to_html`."""
    path = Path(path)
    low, high = value_range(comparison)
    title = _title(comparison, title)
    data = {
        "title": title,
        "how": comparison.describe(),
        "model_a": comparison.model_a,
        "model_b": comparison.model_b,
        "rows": comparison.layers_a,
        "columns": comparison.layers_b,
        "low": low,
        "high": high,
        "values": [[v if math.isfinite(v) else None for v in line] for line in comparison.values.tolist()],
    }
    return _write_page(path, "heatmap.html", title, data)


def save_conversion_page(conversion: Conversion, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """Writes the self-contained page; see :meth:`pyrepr.Conversion.to_html`."""
    title = title or f"Lookup tables in {conversion.model}"
    *lines, total = conversion.table() or [[]]
    data = {
        "title": title,
        "how": conversion.describe(),
        "columns": conversion.columns(),
        "lines": lines,
        "total": total,
        "errors": [x.relative_mse if math.isfinite(x.relative_mse) else None for x in conversion.layers],
        "skipped": list(conversion.skipped.items()),
    }
    return _write_page(Path(path), "conversion.html", title, data)


def _write_page(path: Path, template: str, title: str, data: dict[str, Any]) -> Path:
    # Inside a script only "<" could end it early.
    script = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_name(template).read_text(encoding="utf-8")
    page = page.replace("__TITLE__", html.escape(title)).replace("__DATA__", script)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
