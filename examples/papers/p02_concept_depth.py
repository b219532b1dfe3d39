"""At which depth can a concept be read?"""

from __future__ import annotations

import re

import torch
from pyrepr.papers._minilm import docstrings, encoded_docstrings
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.stats import concept_depth, linear_probe

PAPER = Paper(
    2,
    "Jin et al., Exploring Concept Depth: How Large Language Models Acquire Knowledge and Concept at Different "
    "Layers?, 2024",
    "accuracy of a linear probe of the last token in every layer; here ridge regression",
    "of docstrings, whether one says 'the' is read worse in MiniLM's last layer than in its best by .05, which package "
    "it is from better in the best layer than in the embedding by .03, and deeper",
)


def run() -> Finding:
    texts, origin = docstrings()
    layers = dict(enumerate(encoded_docstrings().last))
    says = torch.tensor([int(bool(re.search(r"\bthe\b", text.lower()))) for text in texts])
    word, package = (
        linear_probe({f"{i}": z for i, z in layers.items()}, y, alphas=(1.0, 10.0)) for y in (says, origin)
    )
    depths = [concept_depth(probe).layer for probe in (word, package)]
    curves = [", ".join(f"{a:.2f}" for a in probe.best) for probe in (word, package)]
    text = f"'the' {curves[0]} (layer {depths[0]}); package {curves[1]} (layer {depths[1]})"
    falls, rises = float(word.best.max() - word.best[-1]), float(package.best.max() - package.best[0])
    holds = falls >= 0.05 and rises >= 0.03 and depths[0] < depths[1]
    curves = {"says 'the'": word.best.tolist(), "package of origin": package.best.tolist()}
    chart = Chart(curves, list(layers), "layer", "accuracy", "lines")
    return Finding(text, holds, {"falls": falls, "rises": rises}, chart)
