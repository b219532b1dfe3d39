"""Sentences as a few codes: with every further code more of them are found again."""

from __future__ import annotations

from itertools import pairwise

import torch
from pyrepr.papers._data import residual_codes
from pyrepr.papers._minilm import encoded_docstrings
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import lookup_sum
from pyrepr.functional import pairwise_topk

PAPER = Paper(
    55,
    "",
    "residual codes of MiniLM's sentence vectors (the language model is not ours)",
    "of unseen docstrings more are nearest to their own codes' sum with each of four codes, and twice as many with "
    "four as with one",
)
CODES, LEVELS = 32, 4


def run() -> Finding:
    z = encoded_docstrings().means[-1]
    z = z / z.norm(dim=1, keepdim=True)
    seen, held = z[0::2], z[1::2]
    tables, codes = residual_codes(seen, held, CODES, LEVELS)
    rates = []
    for level in range(1, LEVELS + 1):
        back = lookup_sum(codes[:, :level], torch.ones(len(held), level), tables[:level])
        nearest = pairwise_topk(back, held, 1, metric="cosine")[1][:, 0]
        rates.append(float((nearest == torch.arange(len(held))).float().mean()))
    names = [str(level) for level in range(1, LEVELS + 1)]
    holds = all(a < b for a, b in pairwise(rates)) and rates[-1] >= 2 * rates[0]
    text = f"found by 1 to {LEVELS} codes {', '.join(f'{r:.2f}' for r in rates)} of {len(held)}"
    chart = Chart({"found again": rates}, names, "codes", "share of sentences found again")
    return Finding(text, holds, dict(zip(names, rates, strict=True)), chart)
