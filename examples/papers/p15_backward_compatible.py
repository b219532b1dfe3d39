"""A new embedding that an old index can still be searched with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits, nearest_right, trained
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

from pyrepr.functional import householder, paired_cosine

PAPER = Paper(
    15,
    "Zhou et al., BT²: Backward-compatible Training with Basis Transformation, 2023",
    "first features of an orthogonal map of the new embedding ≈ the old embedding; here eight Householder reflections",
    "queries of a new network on an index of the old one are right as often as the old one's (at most .02 less), below "
    ".3 where nothing aligns them, and new queries on a new index above .95",
)
OLD, NEW, REFLECTIONS = 24, 48, 8


class Compatible(nn.Module):
    """Embedding, reflections, head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, NEW))
        self.v = nn.Parameter(torch.randn(REFLECTIONS, NEW))
        self.head = nn.Linear(NEW, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return self.head(z), householder(z, self.v)


def run() -> Finding:
    x, y, seen, labels = digits()
    few = y < 5
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, OLD), nn.Linear(OLD, 5))
    old = trained(old, x[few], y[few], seed=0, epochs=20)[:-1]
    with torch.no_grad():
        index, queries = old(x), old(seen)
    rates = {"old on old": nearest_right(queries, labels, index, y)}
    for name, pull in (("new on old", 3.0), ("without", 0.0)):
        torch.manual_seed(1)

        def loss(out: tuple[Tensor, Tensor], rows: Tensor, pull: float = pull) -> Tensor:
            logits, turned = out
            kept = 1 - paired_cosine(turned[:, :OLD], index[rows])
            return F.cross_entropy(logits, y[rows]) + pull * kept

        model = trained(Compatible(), x, torch.arange(len(x)), seed=1, epochs=20, loss=loss)
        with torch.no_grad():
            fresh, asked = model(x)[1], model(seen)[1]
        rates[name] = nearest_right(asked[:, :OLD], labels, index, y)
        if pull:
            rates["new on new"] = nearest_right(asked, labels, fresh, y)
    text = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
    holds = rates["new on old"] >= rates["old on old"] - 0.02 and rates["without"] < 0.3 and rates["new on new"] > 0.95
    chart = Chart({"right": list(rates.values())}, list(rates), "queries on index", "neighbour is right")
    return Finding(text, holds, rates, chart)
