"""Layers side by side say nearly the same, by the angle of tokens and by CKA."""

from __future__ import annotations

import torch
from pyrepr.papers._minilm import encoded_docstrings
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import cka_matrix
from pyrepr.functional import paired_cosine

PAPER = Paper(
    59,
    "",
    "mean cosine of a token in two layers; CKA of the layers",
    "a measurement, not the paper's claim: by both, neighbouring layers of MiniLM are more alike than layers two "
    "apart, and those than layers three apart",
)
APART = (1, 2, 3)


def run() -> Finding:
    encoded = encoded_docstrings()
    states = encoded.states[:, encoded.mask.bool()]
    table = cka_matrix(list(encoded.means)).double()
    curves: dict[str, list[float]] = {"cosine of tokens": [], "CKA": []}
    for step in APART:
        pairs = [float(paired_cosine(a, b)) for a, b in zip(states[:-step], states[step:], strict=True)]
        curves["cosine of tokens"].append(sum(pairs) / len(pairs))
        curves["CKA"].append(float(table.diagonal(step).mean()))
    text = "; ".join(f"{name} {', '.join(f'{v:.2f}' for v in values)}" for name, values in curves.items())
    holds = all(bool((torch.tensor(values).diff() < 0).all()) for values in curves.values())
    chart = Chart(curves, [str(step) for step in APART], "layers apart", "similarity")
    return Finding(f"1, 2, 3 layers apart: {text}", holds, {"CKA 1": curves["CKA"][0]}, chart)
