"""An encoder and a copy that lost layers: CKA pairs the layers that belong together."""

from __future__ import annotations

import copy

import torch
from pyrepr.papers._minilm import docstrings, encode, minilm
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import cka_matrix

PAPER = Paper(
    1,
    "",
    "CKA of all layers of one network with all of the other",
    "a measurement, not the paper's claim: of a MiniLM without its third and fifth block, every layer resembles most "
    "the one of the whole network that it was, or one beside it",
)
LOST = (2, 4)


def run() -> Finding:
    texts = docstrings()[0][::4]
    shorter = copy.deepcopy(minilm()[0])
    kept = [i for i in range(len(shorter.encoder.layer)) if i not in LOST]
    shorter.encoder.layer = torch.nn.ModuleList(shorter.encoder.layer[i] for i in kept)
    whole, short = (list(encode(texts, model=model).means) for model in (None, shorter))
    table = cka_matrix(short, whole)
    was = torch.tensor([0, *(i + 1 for i in kept)])
    found = table.argmax(1)
    off = (found - was).abs()
    text = ", ".join(f"{a} → {b}" for a, b in zip(was.tolist(), found.tolist(), strict=True))
    chart = Chart(
        {f"was {i}": row for i, row in zip(was.tolist(), table.tolist(), strict=True)},
        [str(i) for i in range(len(whole))],
        "layer of the whole network",
        "layer of the shorter one",
        "heat",
    )
    return Finding(f"layers {text}", int(off.max()) <= 1, {"exact": float((off == 0).double().mean())}, chart)
