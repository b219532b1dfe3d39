"""Masks as a few codes: every further code tells what the last ones left."""

from __future__ import annotations

from itertools import pairwise

import torch
from pyrepr.papers._data import digits, residual_codes
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import lookup_sum

PAPER = Paper(
    32,
    "",
    "c_l = nearest code of x − Σ_{m<l} E_m[c_m]; x ≈ Σ_l E_l[c_l]",
    "of unseen masks of digits the error falls with each of four codes, to at most .7 of that with one",
)
CODES, LEVELS = 64, 4


def run() -> Finding:
    x, _, seen, _ = digits()
    masks, held = (x > 0.5).float(), (seen > 0.5).float()
    tables, codes = residual_codes(masks, held, CODES, LEVELS)
    errors = []
    for level in range(1, LEVELS + 1):
        back = lookup_sum(codes[:, :level], torch.ones(len(held), level), tables[:level])
        errors.append(float((back - held).square().mean()))
    text = ", ".join(f"{error:.4f}" for error in errors)
    holds = all(a > b for a, b in pairwise(errors)) and errors[-1] <= 0.7 * errors[0]
    names = [str(level) for level in range(1, LEVELS + 1)]
    chart = Chart({"unseen masks": errors}, names, "codes", "squared error of a pixel")
    return Finding(f"error with 1 to {LEVELS} codes {text}", holds, dict(zip(names, errors, strict=True)), chart)
