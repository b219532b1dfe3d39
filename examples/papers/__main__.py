"""``python -m pyrepr.papers [numbers] [--json FILE]``: runs the proofs and prints a row a paper."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from pyrepr.papers._row import proofs, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the proofs; returns 0 if claims hold, but for those known not to (which must not), else 1."""
    parser = argparse.ArgumentParser(prog="python -m pyrepr.papers", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="of papers (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the table")
    args = parser.parse_args(argv)
    found = list(proofs(set(args.numbers) or None))
    missing = set(args.numbers) - {proof.PAPER.number for proof in found}
    if missing:
        parser.error(f"no proof of paper {', '.join(map(str, sorted(missing)))}")
    torch.manual_seed(0)
    rows = []
    for proof in found:
        row = run(proof)
        rows.append(row)
        verdict = "holds" if row.finding.holds else "DOES NOT HOLD"
        print(f"{row.paper.number:>3}  {verdict}  ({row.seconds:.1f} s)  {row.paper.citation}")
        print(f"     claim     {row.paper.claim}\n     computed  {row.finding.computed}")
        if row.paper.fails:
            print(f"     known     {row.paper.fails}")
        sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n")
    return 0 if all(row.expected for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
