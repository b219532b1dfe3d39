"""How many directions do attention maps have, layer by layer?"""

from __future__ import annotations

import torch
from pyrepr.papers._minilm import docstrings, minilm
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.stats import effective_rank

PAPER = Paper(
    19,
    "",
    "exp of the entropy of a map's singular values",
    "a measurement, not the paper's claim: in every layer of MiniLM the effective rank of attention maps is, in the "
    "mean, below half the number of tokens",
)
LENGTH, TEXTS = 24, 24


@torch.no_grad()
def run() -> Finding:
    model, tokenizer = minilm()
    texts = [text for text in docstrings()[0] if len(tokenizer.tokenize(text)) >= LENGTH - 2][:TEXTS]
    batch = tokenizer(texts, truncation=True, max_length=LENGTH, return_tensors="pt", verbose=False)
    maps = model(**batch, output_attentions=True).attentions
    ranks = [
        float(torch.stack([effective_rank(m.double(), center=False) for m in layer.flatten(0, 1)]).mean())
        for layer in maps
    ]
    text = f"{', '.join(f'{r:.1f}' for r in ranks)} of {LENGTH}, in {len(texts)} texts"
    names = [str(i + 1) for i in range(len(ranks))]
    chart = Chart({"effective rank": ranks}, names, "block", "effective rank", bound=LENGTH / 2)
    return Finding(text, max(ranks) < LENGTH / 2, dict(zip(names, ranks, strict=True)), chart)
