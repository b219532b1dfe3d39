"""One vector for a sentence: the mean of its tokens or the last one?"""

from __future__ import annotations

import torch
from pyrepr.papers._data import nearest_right
from pyrepr.papers._minilm import docstrings, encoded_docstrings
from pyrepr.papers._row import Chart, Finding, Paper

PAPER = Paper(
    12,
    "",
    "nearest neighbour by the mean or by the last token of the last layer; its loss is 14's",
    "MiniLM, which learned with the mean, names a docstring's package by its neighbour more often by the mean token "
    "than by the last, by .02 in the mean of ten draws",
)
KNOWN, DRAWS = 120, 10


def run() -> Finding:
    origin = docstrings()[1]
    encoded = encoded_docstrings()
    kinds = {"mean token": encoded.means[-1], "last token": encoded.last[-1]}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for draw in range(DRAWS):
        order = torch.randperm(len(origin), generator=torch.Generator().manual_seed(draw))
        known, asked = order[:KNOWN], order[KNOWN:]
        for name, z in kinds.items():
            rates[name].append(nearest_right(z[asked], origin[asked], z[known], origin[known]))
    means = {name: sum(values) / DRAWS for name, values in rates.items()}
    text = ", ".join(f"{name} {rate:.3f}" for name, rate in means.items())
    chart = Chart(rates, list(range(1, DRAWS + 1)), "draw", "neighbour is right")
    return Finding(text, means["mean token"] - means["last token"] >= 0.02, means, chart)
