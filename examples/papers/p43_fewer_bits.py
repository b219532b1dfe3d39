"""How few bits can a transformer's weights have before its sentences are others?"""

from __future__ import annotations

from itertools import pairwise

from pyrepr.papers._row import Chart, Finding, Paper
from pyrepr.papers.p29_quantised_layers import kept

PAPER = Paper(
    43,
    "",
    "CKA of the last layer with itself after all weights of blocks were rounded, a scale a row",
    "a measurement, not the paper's claim: CKA of MiniLM's last layer with itself falls with every bit from 6 to 3, "
    "and is below .9 with 3",
)
BITS = (6, 5, 4, 3)


def run() -> Finding:
    last = [kept(bits)[-1] for bits in BITS]
    text = ", ".join(f"{bits} bits {value:.4f}" for bits, value in zip(BITS, last, strict=True))
    names = [str(bits) for bits in BITS]
    holds = all(a > b for a, b in pairwise(last)) and last[-1] < 0.9
    chart = Chart({"last layer": last}, names, "bits", "CKA with itself, rounded", bound=0.9)
    return Finding(text, holds, dict(zip(names, last, strict=True)), chart)
