"""Facts in one matrix: how many triples can be read back?"""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.functional import pairwise_topk, soft_lookup

PAPER = Paper(
    36,
    "",
    "M = Σ (s ∘ r) oᵀ over triples; o is the code nearest to the soft lookup of (s ∘ r) M",
    "a toy, not the paper's model: a matrix of 128 × 128 gives back the objects of 128 triples, 99 % of them, and of "
    "4096 less than half, for each of three seeds",
)
WIDTH, ENTITIES, RELATIONS, COUNTS, SEEDS = 128, 512, 16, (32, 128, 512, 1024, 2048, 4096), 3


def run() -> Finding:
    rates = torch.zeros(SEEDS, len(COUNTS))
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        entities = torch.randn(ENTITIES, WIDTH, generator=generator)
        entities = entities / entities.norm(dim=1, keepdim=True)
        relations = torch.randint(0, 2, (RELATIONS, WIDTH), generator=generator) * 2.0 - 1
        facts = torch.randperm(ENTITIES * RELATIONS, generator=generator)
        objects = torch.randint(0, ENTITIES, (len(facts),), generator=generator)
        for column, count in enumerate(COUNTS):
            keys = entities[facts[:count] // RELATIONS] * relations[facts[:count] % RELATIONS]
            memory = keys.T @ entities[objects[:count]]
            read = soft_lookup(keys @ memory, entities, 0.2)
            found = pairwise_topk(read, entities, 1, metric="cosine")[1][:, 0]
            rates[seed, column] = (found == objects[:count]).float().mean()
    curve = rates.mean(0).tolist()
    text = ", ".join(f"{count}: {rate:.2f}" for count, rate in zip(COUNTS, curve, strict=True))
    holds = bool((rates[:, COUNTS.index(128)] >= 0.99).all() and (rates[:, -1] < 0.5).all())
    chart = Chart(
        {"objects read back": curve}, COUNTS, "triples stored", "share of objects read back", "lines", log_x=True
    )
    return Finding(f"share read back of {text}", holds, {str(c): r for c, r in zip(COUNTS, curve, strict=True)}, chart)
