"""Features of a network trained for something else, and a nearest neighbour."""

from __future__ import annotations

import torch
from pyrepr.papers._data import nearest_right
from pyrepr.papers._minilm import docstrings, encoded_docstrings
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr._optional import require

PAPER = Paper(
    18,
    "probably Sharif Razavian et al., CNN Features off-the-shelf: an Astounding Baseline for Recognition, 2014",
    "features of the last layer, of unit length, under a nearest neighbour",
    "with 30 and 120 labelled docstrings, MiniLM's nearest neighbour names the package of another more often than that "
    "by counts of words (tf-idf), by .03 in the mean of ten draws",
)
COUNTS, DRAWS = (30, 120), 10


def run() -> Finding:
    texts, origin = docstrings()
    words = require("sklearn.feature_extraction.text", "scikit-learn").TfidfVectorizer().fit_transform(texts)
    features = {"MiniLM": encoded_docstrings().means[-1], "tf-idf": torch.tensor(words.toarray(), dtype=torch.float32)}
    rates = {f"{name} {count}": 0.0 for name in features for count in COUNTS}
    for draw in range(DRAWS):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(draw))
        for count in COUNTS:
            known, asked = order[:count], order[max(COUNTS) :]
            for name, z in features.items():
                rate = nearest_right(z[asked], origin[asked], z[known], origin[known])
                rates[f"{name} {count}"] += rate / DRAWS
    holds = all(rates[f"MiniLM {count}"] - rates[f"tf-idf {count}"] >= 0.03 for count in COUNTS)
    series = {name: [rates[f"{name} {count}"] for count in COUNTS] for name in features}
    chart = Chart(series, [f"{count} labels" for count in COUNTS], "", "neighbour is right")
    return Finding(", ".join(f"{name} labels {rate:.2f}" for name, rate in rates.items()), holds, rates, chart)
