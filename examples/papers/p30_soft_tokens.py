"""Soft tokens: the expectation of a code under its probabilities instead of the likeliest code."""

from __future__ import annotations

from pyrepr.papers._data import k_means, patches, photograph
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr.functional import soft_lookup

PAPER = Paper(
    30,
    "Ning et al., All in Tokens: Unifying Output Space of Visual Tasks via Soft Token, 2023",
    "softmax(logits) E; here logits = −|x − e|²/T",
    "with codes from a third of a photograph's patches and the temperature chosen on another, soft tokens rebuild the "
    "last third with at most .95 of the hard tokens' error; eight times that temperature is worse than hard tokens",
)
CODES, WIDTH, GRID = 128, 4, (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)


def run() -> Finding:
    image = photograph(2 * WIDTH).mean(2, keepdim=True)
    tokens = patches(image, WIDTH).flatten(0, 1)
    first, second, third = tokens[0::3], tokens[1::3], tokens[2::3]
    codes, nearest = k_means(first, CODES)
    unit = float((first - codes[nearest]).square().sum(1).mean())

    def error(x: Tensor, temperature: float) -> float:
        return float((soft_lookup(x, codes, temperature * unit) - x).square().mean())

    best = min(GRID, key=lambda temperature: error(second, temperature))
    hard = error(third, 1e-4)
    soft, hot = error(third, best) / hard, error(third, 8 * best) / hard
    text = f"error {soft:.2f} of the hard tokens' at T = {best} mean squared distances, {hot:.2f} at {8 * best}"
    curve = [error(third, temperature) / hard for temperature in GRID]
    chart = Chart(
        {"soft tokens": curve},
        GRID,
        "temperature / mean squared distance",
        "error / hard tokens'",
        "lines",
        1.0,
        log_x=True,
    )
    return Finding(text, soft <= 0.95 and hot > 1, {"soft": soft, "hot": hot, "temperature": best}, chart)
