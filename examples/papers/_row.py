"""What a proof is and what it gives."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType


@dataclass(frozen=True)
class Paper:
    """A paper, and the part of it that is put to the test here.

    Attributes:
        number: in the table of papers.
        citation: authors, title, year.
        operation: what the released code computes, in a formula.
        claim: what is tested, in a sentence that can be false.
        fails: why it is known not to hold on data of this size; empty where it is expected to hold.
    """

    number: int
    citation: str
    operation: str
    claim: str
    fails: str = ""


@dataclass(frozen=True)
class Finding:
    """What a proof found.

    Attributes:
        computed: the numbers, in words.
        holds: whether the claim does, with its margin.
        numbers: name → value, for the JSON.
    """

    computed: str
    holds: bool
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    paper: Paper
    finding: Finding
    seconds: float

    @property
    def expected(self) -> bool:
        """Whether the claim holds where it is known to, and does not where it is known not to."""
        return self.finding.holds == (not self.paper.fails)


def proofs(numbers: set[int] | None = None) -> Iterator[ModuleType]:
    """The modules of proofs in order of their numbers, or those of some."""
    package = importlib.import_module(__package__)
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if re.match(r"p\d+_", info.name)]
    for name in sorted(names):
        if numbers is None or int(name[1:].split("_")[0]) in numbers:
            yield importlib.import_module(f"{__package__}.{name}")


def run(proof: ModuleType) -> Row:
    start = time.perf_counter()
    finding = proof.run()
    return Row(proof.PAPER, finding, time.perf_counter() - start)
