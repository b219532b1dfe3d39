"""Which block can a transformer do without? The one whose output is its input, nearly."""

from __future__ import annotations

import copy
from itertools import pairwise

from pyrepr.papers._minilm import docstrings, encode, minilm
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr._optional import require
from pyrepr.functional import paired_cosine

PAPER = Paper(
    46,
    "He et al., What Matters in Transformers? Not All Attention is Needed, 2024",
    "importance of a block = 1 − mean cosine of its input and output",
    "of MiniLM's six blocks, importance ranks how far the sentence moves without the block (Spearman at least .7)",
)


def embedding(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def run() -> Finding:
    stats = require("scipy.stats", "scipy")
    texts = docstrings()[0][::8]
    states, mask = encode(texts)
    there = mask.bool()
    importance = [1 - float(paired_cosine(a[there], b[there])) for a, b in pairwise(states)]
    whole = embedding(states[-1], mask)
    harm = []
    for number in range(len(importance)):
        shorter = copy.deepcopy(minilm()[0])
        del shorter.encoder.layer[number]
        harm.append(1 - float(paired_cosine(embedding(encode(texts, model=shorter).states[-1], mask), whole)))
    rank = float(stats.spearmanr(importance, harm).statistic)
    text = f"importance {', '.join(f'{v:.2f}' for v in importance)}; harm {', '.join(f'{v:.2f}' for v in harm)}; "
    chart = Chart({"a block": harm}, importance, "importance, 1 − cosine(in, out)", "the sentence moves by", "points")
    return Finding(f"{text}Spearman {rank:.2f}", rank >= 0.7, {"spearman": rank}, chart)
