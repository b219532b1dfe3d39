"""Every proof of a paper's claim holds, or does not where that is known, and the command that runs them says so."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import pytest
import torch
from pyrepr.papers import __main__ as command
from pyrepr.papers import p39_hyperbolic
from pyrepr.papers._nothing import NOTHING
from pyrepr.papers._pages import escaped
from pyrepr.papers._row import Finding, Paper, proofs, run, title

PROOFS = {proof.PAPER.number: proof for proof in proofs()}
DOCS = Path(__file__).parents[1] / "docs" / "papers"


def test_all_sixty_seven_papers_have_one_row():
    assert sorted([*PROOFS, *NOTHING]) == list(range(1, 68))


@pytest.mark.parametrize("number", PROOFS)
def test_the_page_says_what_the_proof_does(number):
    """The pages are written by the command: only its numbers may be of another run."""
    proof = PROOFS[number]
    page = (DOCS / f"p{number:02d}.md").read_text(encoding="utf-8")
    paper = proof.PAPER
    for text in (title(proof), paper.citation, paper.operation, paper.claim, paper.fails, paper.stronger):
        assert escaped(text) in page
    assert f"(p{number:02d}.md)" in (DOCS / "index.md").read_text(encoding="utf-8")
    assert (DOCS / f"p{number:02d}.svg").stat().st_size < 100_000


def test_moebius_addition_is_that_of_geoopt():
    oracle = pytest.importorskip("geoopt.manifolds.stereographic.math")
    generator = torch.Generator().manual_seed(0)
    x, y = (0.4 * torch.rand(64, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for c in (0.1, 1.0, 2.0):
        inputs = [x.clone().requires_grad_(), y.clone().requires_grad_(), torch.tensor(c).double().requires_grad_()]
        ours = p39_hyperbolic.Addition.apply(*inputs)
        theirs = oracle.mobius_add(inputs[0], inputs[1], k=-inputs[2])
        assert (ours - theirs).abs().max() < 1e-12
        for a, b in zip(*(torch.autograd.grad(z.sum(), inputs) for z in (ours, theirs)), strict=True):
            assert (a - b).norm() < 1e-9 * b.norm()


@pytest.mark.parametrize("number", PROOFS)
def test_the_claim_holds(number):
    row = run(PROOFS[number])
    assert row.expected, row.finding.computed
    assert row.paper.claim and row.paper.operation and row.finding.chart
    assert PROOFS[number].__name__.rsplit(".", 1)[-1].startswith(f"p{number:02d}_")


def test_the_command(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert command.main(["10", "16", "64", "--json", str(tmp_path / "rows.json"), "--html", str(page)]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["paper"]["number"] for row in rows] == [10, 64] and rows[0]["finding"]["holds"]
    printed = capsys.readouterr().out
    assert "Elhage" in printed and " 16  nothing honest: it needs a vision" in printed
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/svg+xml") == 2 and "nothing honest" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # needs no other file
    with pytest.raises(SystemExit):
        command.main(["999"])
    assert "no paper 999" in capsys.readouterr().err


def test_where_a_claim_is_known_not_to_hold_the_command_says_why_and_is_content(monkeypatch, capsys):
    proof = types.ModuleType("pyrepr.papers.p99_made_up", "Made up.")
    proof.PAPER = Paper(99, "Nobody, Nothing, 2000", "0", "nothing is something", fails="nothing is nothing")
    monkeypatch.setattr(command, "proofs", lambda numbers: [proof])
    proof.run = lambda: Finding("0", False)
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT HOLD" in printed and "known     nothing is nothing" in printed
    proof.run = lambda: Finding("1", True)
    assert command.main([]) == 1  # what is said to fail must fail
    proof.PAPER = Paper(99, "Nobody, Nothing, 2000", "0", "one is one", stronger="one is two")
    assert command.main([]) == 0 and "does not hold  one is two" in capsys.readouterr().out
    proof.run = lambda: Finding("1", True, stronger=True)
    assert command.main([]) == 1
    proof.PAPER = Paper(99, "Nobody, Nothing, 2000", "0", "something is nothing")
    proof.run = lambda: Finding("1", False)
    assert command.main([]) == 1
