"""``python -m pyrepr.papers [numbers] [--json FILE] [--html FILE] [--docs FOLDER]``: a row a paper, each proof run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pyrepr.papers._nothing import NOTHING
from pyrepr.papers._pages import counts, write_docs, write_html
from pyrepr.papers._row import Row, proofs, run


def show(row: Row, place: str) -> None:
    paper = row.paper
    verdict = "holds" if row.finding.holds else "DOES NOT HOLD"
    print(f"{paper.number:>3}  {verdict}  ({place}, {row.seconds:.1f} s)  {paper.citation or row.title}")
    print(f"     claim     {paper.claim}\n     computed  {row.finding.computed}")
    if paper.fails:
        print(f"     known     {paper.fails}")
    if paper.stronger:
        print(f"     {'ALSO HOLDS' if row.finding.stronger else 'does not hold'}  {paper.stronger}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the proofs; returns 0 if claims hold, but for those known not to (which must not), else 1."""
    parser = argparse.ArgumentParser(prog="python -m pyrepr.papers", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="of papers (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="writes one page with every figure")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="writes a page a paper for the documentation")
    args = parser.parse_args(argv)
    numbers = set(args.numbers) or None
    found = list(proofs(numbers))
    missing = set(args.numbers) - {proof.PAPER.number for proof in found} - set(NOTHING)
    if missing:
        parser.error(f"no paper {', '.join(map(str, sorted(missing)))}")
    if args.docs and numbers:
        parser.error("--docs writes the pages of all papers, and takes no numbers")
    rows = []
    for proof in found:
        rows.append(run(proof))
        show(rows[-1], f"{len(rows)} of {len(found)}")
    for number, why in NOTHING.items():
        if numbers is None or number in numbers:
            print(f"{number:>3}  nothing honest: {why}")
    if numbers is None:
        print(counts(rows))
    if args.json:
        table = [{**asdict(row), "verdict": row.verdict} for row in rows]
        args.json.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.html:
        write_html(args.html, rows, numbers)
    if args.docs:
        write_docs(args.docs, rows)
    return 0 if all(row.expected for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
