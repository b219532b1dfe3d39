"""What a neuron of a transformer listens for, in words."""

from __future__ import annotations

import torch
from pyrepr.papers._minilm import minilm
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr.functional import pairwise_topk

PAPER = Paper(
    57,
    "probably Dar et al., Analyzing Transformers in Embedding Space, 2023",
    "the largest of W_U w over words, w the rows of the up-projection",
    "in MiniLM's last two layers two of a neuron's five tokens share their first four letters at least 1.2 times as "
    "often as after a rotation of the rows",
)


@torch.no_grad()
def run() -> Finding:
    model, tokenizer = minilm()
    words = [token.lstrip("#") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    table = model.embeddings.word_embeddings.weight
    rows = torch.cat([layer.intermediate.dense.weight for layer in model.encoder.layer[-2:]])
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1], generator=generator))[0]

    def shared(neurons: Tensor) -> float:
        _, found = pairwise_topk(neurons, table, 5)
        stems = [[words[i][:4] for i in five if len(words[i]) >= 4] for five in found.tolist()]
        return sum(len(set(five)) < len(five) for five in stems) / len(stems)

    ours, rotated = shared(rows), shared(rows @ turn)
    text = f"{ours:.3f} of {len(rows)} neurons over {len(words)} tokens, {rotated:.3f} rotated"
    chart = Chart({"share": [ours, rotated]}, ["neurons", "rotated"], "", "two of five words share a stem")
    return Finding(text, ours >= 1.2 * rotated and rotated > 0, {"neurons": ours, "rotated": rotated}, chart)
