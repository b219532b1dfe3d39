"""The table with its figures: one self-contained page, or a page a paper for the documentation."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from pyrepr.papers._figures import svg
from pyrepr.papers._nothing import NOTHING
from pyrepr.papers._row import Row

from pyrepr._reporting import replacing

STYLE = """:root { color-scheme: light dark; --line: #ddd; --holds: #26734d; --fails: #b3283d; --soft: #666 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --holds: #6fcf97; --fails: #ff8a98; --soft: #aaa } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .6rem; vertical-align: top }
td:nth-child(-n+2) { white-space: nowrap } tr { border-bottom: 1px solid var(--line) }
.holds { color: var(--holds) } .fails { color: var(--fails) } .nothing { color: var(--soft) }
section { margin-top: 2.5rem; border-top: 1px solid var(--line) }
dt { font-weight: 600 } dd { margin: 0 0 .5rem; overflow-wrap: anywhere }
img { max-width: 100%; background: white; border-radius: 4px }
@media print { tr, section { break-inside: avoid } }"""
VERSUS = (
    "Numbers are of one run on two cores. A claim that does not hold here, on small data, may well hold elsewhere. A "
    "paper that is “probably” the one meant was told by what it computes, since only its number is on record."
)


def facts(row: Row) -> list[tuple[str, str]]:
    """What is said of a paper, name and text."""
    paper, finding = row.paper, row.finding
    found = [("Paper", paper.citation or "context: touched on, not put to the test")]
    found += [("Computed as", paper.operation), ("Claim", paper.claim), ("Found", finding.computed)]
    found.append(("Verdict", row.verdict + (f": {paper.fails}" if paper.fails else "")))
    if paper.stronger:
        found.append(("Does not hold" if not finding.stronger else "Holds, too", paper.stronger))
    return found


def counts(rows: Sequence[Row]) -> str:
    held = sum(row.finding.holds for row in rows)
    return f"{held} claims hold, {len(rows) - held} do not, of {len(NOTHING)} papers nothing honest can be shown"


def write_html(path: Path, rows: Sequence[Row], numbers: set[int] | None = None) -> None:
    """One page that needs no other file: the table, and for each paper what was found and its figure."""
    lines, sections = [], []
    for row in rows:
        number, kind = row.paper.number, "holds" if row.finding.holds else "fails"
        lines.append(
            (number, f'<td class="{kind}">{row.verdict}</td><td><a href="#p{number}">{html.escape(row.title)}</a></td>')
        )
        picture = ""
        if row.finding.chart:
            data = base64.b64encode(svg(row.finding.chart).encode()).decode()
            picture = f'<img alt="{html.escape(row.title)}" src="data:image/svg+xml;base64,{data}">'
        items = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts(row))
        heading = f"<h2>{number} · {html.escape(row.title)}</h2>"
        sections.append(f'<section id="p{number}">{heading}<dl>{items}</dl>{picture}</section>')
    for number, why in NOTHING.items():
        if numbers is None or number in numbers:
            lines.append((number, f'<td class="nothing">nothing honest</td><td>{html.escape(why)}</td>'))
    table = "".join(f"<tr><td>{number}</td>{line}</tr>" for number, line in sorted(lines))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Papers, put to the test</title><style>{STYLE}</style><h1>Papers, put to the test</h1><p>{VERSUS}</p>"
        f"<table><tr><th></th><th>verdict</th><th></th></tr>{table}</table>{''.join(sections)}</html>\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def escaped(text: str) -> str:
    """For Markdown: formulas keep their signs."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text)


def write_docs(folder: Path, rows: Sequence[Row]) -> None:
    """A page a paper with its figure, and the table that leads to them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        name = f"p{row.paper.number:02d}"
        text = f"# {row.paper.number} · {escaped(row.title)}\n\n"
        text += "".join(f"**{title}.** {escaped(value)}\n\n" for title, value in facts(row))
        if row.finding.chart:
            (folder / f"{name}.svg").write_text(svg(row.finding.chart), encoding="utf-8")
            text += f"![{escaped(row.paper.claim)}]({name}.svg)\n\n"
        text += f"Run it: `python -m pyrepr.papers {row.paper.number}`. [All papers](index.md)\n"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        lines.append((row.paper.number, f"[{escaped(row.title)}]({name}.md)", row.verdict))
    lines += [(number, why, "nothing honest") for number, why in NOTHING.items()]
    text = "# Papers, put to the test\n\n"
    text += f"`python -m pyrepr.papers --docs docs/papers` wrote these pages: {counts(rows)}. {VERSUS}\n\n"
    text += "| | | verdict |\n|---:|---|---|\n"
    text += "".join(f"| {number} | {what} | {verdict} |\n" for number, what, verdict in sorted(lines))
    (folder / "index.md").write_text(text, encoding="utf-8")
