"""One contrastive term among others: the same loss again, with a temperature that is learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._row import Chart, Finding, Paper
from pyrepr.papers.p14_align import clip, kept

from pyrepr.functional import info_nce

PAPER = Paper(
    60,
    "",
    "(CE(rows) + CE(columns))/2 of cosines · scale",
    "of the paper only its contrastive term: loss and gradients, the scale's too, equal the definition's to 1e-5 for "
    "three scales",
)
SCALES = (1.0, 20.0, 100.0)


def run() -> Finding:
    errors = []
    for seed, scale in enumerate(SCALES):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(256, 32, generator=generator) for _ in range(2))
        x, y = F.normalize(x, dim=1), F.normalize(x + y, dim=1)
        factor = torch.tensor(scale)
        ours = kept(info_nce, x, y, factor)
        theirs = kept(lambda a, b, s: clip(s * a @ b.T), *(z.double() for z in (x, y, factor)))
        pairs = zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    names = [f"{scale:.0f}" for scale in SCALES]
    text = f"relative error at most {max(errors):.1e}"
    chart = Chart({"largest relative error": errors}, names, "scale", "largest relative error", bound=1e-5, log=True)
    return Finding(text, max(errors) < 1e-5, dict(zip(names, errors, strict=True)), chart)
