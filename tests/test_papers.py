"""Every proof of a paper's claim holds, or does not where that is known, and the command that runs them says so."""

from __future__ import annotations

import json
import types

import pytest
from pyrepr.papers import __main__ as command
from pyrepr.papers._row import Finding, Paper, proofs, run

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


def test_where_a_claim_is_known_not_to_hold_the_command_says_why_and_is_content(monkeypatch, capsys):
    proof = types.ModuleType("pyrepr.papers.p99_made_up")
    proof.PAPER = Paper(99, "Nobody, Nothing, 2000", "0", "nothing is something", fails="nothing is nothing")
    monkeypatch.setattr(command, "proofs", lambda numbers: [proof])
    proof.run = lambda: Finding("0", False)
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT HOLD" in printed and "known     nothing is nothing" in printed
    proof.run = lambda: Finding("1", True)
    assert command.main([]) == 1  # what is said to fail must fail
    proof.PAPER = Paper(99, "Nobody, Nothing, 2000", "0", "something is nothing")
    proof.run = lambda: Finding("1", False)
    assert command.main([]) == 1
