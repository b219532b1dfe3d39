"""What a proof is and what it gives."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch


@dataclass(frozen=True)
class Paper:
    """A paper, and the part of it that is put to the test here.

    Attributes:
        number: in the table of papers.
        citation: authors, title, year; "probably" where the table has a number only, and the work was told by what it
            computes; empty for a paper that is context and only touched on.
        operation: what the released code computes, in a formula.
        claim: what is tested, in a sentence that can be false.
        fails: why it is known not to hold on data of this size; empty where it is expected to hold.
        stronger: a further claim that is known not to hold here; empty where there is none.
    """

    number: int
    citation: str
    operation: str
    claim: str
    fails: str = ""
    stronger: str = ""


@dataclass(frozen=True)
class Chart:
    """What a figure shows, in plain numbers.

    Attributes:
        series: name → its values, one for each of `x`.
        x: names of bars and columns, numbers of lines.
        kind: "bars", "lines", "points" (the only series against x) or "heat" (series are rows).
        bound: where a line is drawn across, at the value that the claim asks for.
        log: the vertical axis; `log_x` the horizontal one.
    """

    series: dict[str, Sequence[float]]
    x: Sequence[float] | Sequence[str]
    xlabel: str
    ylabel: str
    kind: str = "bars"
    bound: float | None = None
    log: bool = False
    log_x: bool = False


@dataclass(frozen=True)
class Finding:
    """What a proof found.

    Attributes:
        computed: the numbers, in words.
        holds: whether the claim does, with its margin.
        numbers: name → value, for the JSON.
        chart: the figure that makes the point.
        stronger: whether the further claim of the paper's row holds.
    """

    computed: str
    holds: bool
    numbers: dict[str, float] = field(default_factory=dict)
    chart: Chart | None = None
    stronger: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    paper: Paper
    title: str
    finding: Finding
    seconds: float

    @property
    def expected(self) -> bool:
        """Whether the claim holds where it is known to, and claims do not that are known not to."""
        return self.finding.holds == (not self.paper.fails) and not self.finding.stronger

    @property
    def verdict(self) -> str:
        return "holds" if self.finding.holds else "does not hold"


def proofs(numbers: set[int] | None = None) -> Iterator[ModuleType]:
    """The modules of proofs in order of their numbers, or those of some."""
    package = importlib.import_module(__package__)
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if re.match(r"p\d+_", info.name)]
    for name in sorted(names):
        if numbers is None or int(name[1:].split("_")[0]) in numbers:
            yield importlib.import_module(f"{__package__}.{name}")


def title(proof: ModuleType) -> str:
    return (proof.__doc__ or "").strip().splitlines()[0].rstrip(".")


def run(proof: ModuleType) -> Row:
    """Runs a proof on one thread: these networks are too small for two, and so the numbers are the same everywhere."""
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        finding = proof.run()
    finally:
        torch.set_num_threads(threads)
    return Row(proof.PAPER, title(proof), finding, time.perf_counter() - start)
