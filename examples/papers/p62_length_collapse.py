"""Do embeddings of long texts point one way, and does a lower temperature of attention help?"""

from __future__ import annotations

import copy

import torch
from pyrepr.papers._minilm import docstrings, encode, minilm
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.stats import mean_cosine

PAPER = Paper(
    62,
    "probably Zhou et al., Length-Induced Embedding Collapse in Transformer-based Models, 2024",
    "softmax(QKᵀ/(τ√d)), τ < 1; mean cosine of embeddings by length",
    "the mean cosine of MiniLM's embeddings rises with the length of texts by more than that of the words' without "
    "attention, and τ = .6 lowers it where texts are longest",
    fails="the cosine of the words alone, averaged without attention, rises more, and τ = .6 raises it",
)
LENGTHS, TAU, TEXTS = (8, 32, 96), 0.6, 40


@torch.no_grad()
def run() -> Finding:
    texts = docstrings()[0]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [order[i::TEXTS] for i in range(TEXTS)]
    long = [". ".join(texts[i] for i in group) for group in groups]
    cosines: dict[str, list[float]] = {"words alone": [], "τ = 1": [], f"τ = {TAU}": []}
    sharper = copy.deepcopy(minilm()[0])
    for layer in sharper.encoder.layer:
        layer.attention.self.query.weight /= TAU
        layer.attention.self.query.bias /= TAU
    for length in LENGTHS:
        found = encode(long, length).means
        cosines["words alone"].append(float(mean_cosine(found[0])))
        cosines["τ = 1"].append(float(mean_cosine(found[-1])))
        cosines[f"τ = {TAU}"].append(float(mean_cosine(encode(long, length, sharper).means[-1])))
    rises = [values[-1] - values[0] for values in (cosines["τ = 1"], cosines["words alone"])]
    lower = cosines["τ = 1"][-1] - cosines[f"τ = {TAU}"][-1]
    text = "; ".join(f"{name} {', '.join(f'{v:.2f}' for v in values)}" for name, values in cosines.items())
    text = f"mean cosine at {', '.join(map(str, LENGTHS))} tokens: {text}"
    numbers = {"rise": rises[0], "rise of words": rises[1], "lowered": lower}
    chart = Chart(cosines, LENGTHS, "tokens", "mean cosine of embeddings", "lines")
    return Finding(text, rises[0] > rises[1] and lower > 0, numbers, chart)
