"""man is to woman as king is to …: analogies in a table of words."""

from __future__ import annotations

from itertools import permutations

import torch
from pyrepr.papers._minilm import minilm
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.functional import pairwise_topk

PAPER = Paper(
    56,
    "",
    "the word nearest to b − a + c, by cosine, other than the three",
    "in MiniLM's word table the analogy's word is the nearest at least twice as often as without the offset b − a",
)
FAMILIES = {
    "he : she": "man woman king queen father mother son daughter brother sister boy girl uncle aunt husband wife",
    "capitals": "france paris italy rome spain madrid russia moscow japan tokyo germany berlin greece athens",
    "plurals": "car cars tree trees house houses river rivers book books hand hands king kings door doors",
    "past": "walk walked call called play played want wanted look looked turn turned open opened",
}


@torch.no_grad()
def run() -> Finding:
    model, tokenizer = minilm()
    table = model.embeddings.word_embeddings.weight
    unit = table / table.norm(dim=1, keepdim=True)
    rates: dict[str, list[float]] = {"with the offset": [], "without": []}
    for words in FAMILIES.values():
        ids = tokenizer.convert_tokens_to_ids(words.split())
        pairs = list(zip(ids[0::2], ids[1::2], strict=True))
        a, b, c, d = torch.tensor([(*one, *other) for one, other in permutations(pairs, 2)]).T
        for name, query in (("with the offset", unit[b] - unit[a] + unit[c]), ("without", unit[c])):
            found = pairwise_topk(query, table, 4, metric="cosine")[1]
            given = (found[:, :, None] == torch.stack([a, b, c], 1)[:, None]).any(2)
            first = found.gather(1, given.int().argmin(1, keepdim=True))[:, 0]
            rates[name].append(float((first == d).float().mean()))
    means = {name: sum(values) / len(values) for name, values in rates.items()}
    text = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    chart = Chart(rates, list(FAMILIES), "", "share right")
    return Finding(f"right {text}", means["with the offset"] >= 2 * means["without"], means, chart)
