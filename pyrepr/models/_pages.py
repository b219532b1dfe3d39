"""Pages to look around in, and tables for notebooks. Takes plain data and knows no report class."""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pyrepr._reporting import fixed, printable, replacing

SHOWN_VALUES = 400  # cells of a table in a notebook; with more it is a picture
# Of the page, too.
COLOURS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")


def write_page(path: Path, template: str, title: str, data: dict[str, Any]) -> Path:
    """A template of this folder, with a title and data."""
    # Inside a script only "<" could end it early.
    script = json.dumps(_printable(data), allow_nan=False).replace("<", "\\u003c")
    page = Path(__file__).with_name(template).read_text(encoding="utf-8")
    page = page.replace("__TITLE__", html.escape(printable(title))).replace("__DATA__", script)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _printable(data: Any) -> Any:
    if isinstance(data, str):
        return printable(data)
    if isinstance(data, dict):
        return {key: _printable(value) for key, value in data.items()}
    return [_printable(value) for value in data] if isinstance(data, (list, tuple)) else data


def colour(value: float, low: float, high: float) -> tuple[int, ...]:
    """Piecewise linear in :data:`COLOURS`; grey for NaN."""
    if not math.isfinite(value) or high <= low:
        return (153, 153, 153)
    place = min(1.0, max(0.0, (value - low) / (high - low))) * (len(COLOURS) - 1)
    i = min(len(COLOURS) - 2, int(place))
    one, two = ([int(code[k : k + 2], 16) for k in (0, 2, 4)] for code in COLOURS[i : i + 2])
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(one, two, strict=True))


def _picture(values: Tensor, low: float, high: float) -> str:
    """A PNG of one pixel a cell, as a data URL."""
    height, width = values.shape
    rows = [bytes([0, *(c for v in line for c in colour(v, low, high))]) for line in values.tolist()]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def table_for_notebooks(
    caption: str,
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    skipped: Mapping[str, str],
) -> str:
    """A table of coloured cells with their values, or one picture of many cells; below it what was left out."""
    text = f"<p>{html.escape(caption)}</p>"
    if values.numel() > SHOWN_VALUES:
        width = min(640, max(320, 4 * values.shape[1]))
        text += f'<img src="{_picture(values, low, high)}" style="width: {width}px; image-rendering: pixelated" alt="">'
    else:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        text += f"<table><tr><th></th>{head}</tr>"
        for name, line in zip(rows, values.tolist(), strict=True):
            text += f"<tr><th>{html.escape(name)}</th>" + "".join(_cell(v, low, high) for v in line) + "</tr>"
        text += "</table>"
    left = "".join(f"<li>{html.escape(name)} {html.escape(why)}</li>" for name, why in skipped.items())
    return text + (
        f"<details><summary>{len(skipped)} layers left out</summary><ul>{left}</ul></details>" if left else ""
    )


def _cell(value: float, low: float, high: float) -> str:
    rgb = colour(value, low, high)
    ink = "#000" if 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140 else "#fff"
    text = fixed(value, 2) if math.isfinite(value) else "–"
    return f'<td style="background: rgb{rgb}; color: {ink}; text-align: center">{text}</td>'
