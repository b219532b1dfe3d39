"""Every proof of a paper's claim holds, or does not where that is known, and the command that runs them says so."""

from __future__ import annotations

import json

import pytest
from pyrepr.papers import __main__ as command
from pyrepr.papers._row import proofs, run

PROOFS = {proof.PAPER.number: proof for proof in proofs()}


@pytest.mark.parametrize("number", PROOFS)
def test_the_claim_holds(number):
    row = run(PROOFS[number])
    assert row.expected, row.finding.computed
    assert row.paper.claim and row.paper.operation and row.paper.citation
    assert PROOFS[number].__name__.rsplit(".", 1)[-1].startswith(f"p{number:02d}_")


def test_the_command(tmp_path, capsys):
    assert command.main(["10", "64", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["paper"]["number"] for row in rows] == [10, 64] and rows[0]["finding"]["holds"]
    assert "Elhage" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["999"])
    assert "no proof of paper 999" in capsys.readouterr().err
