"""Mixed labels and neural collapse: where the features of mixed images end."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.stats import neural_collapse

PAPER = Paper(
    17,
    "probably Fisher et al., Pushing Boundaries: Mixup's Influence on Neural Collapse, 2024",
    "min over h of CE(W h, t e_a + (1 − t) e_b) + λ/2 |h|², W a simplex",
    "the best features of mixed classes a and b lie in the span of w_a and w_b (to 1e-9), and class means weighted by "
    "soft labels are a simplex",
)
CLASSES, DECAY = 6, 0.01


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0][:, :CLASSES]
    weight = 2 * (torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES) @ turn.T
    pairs = [(a, b) for a in range(CLASSES) for b in range(CLASSES) if a != b]
    mixes = torch.tensor([0.05, 0.25, 0.4, 0.5], dtype=torch.float64)
    eye = torch.eye(CLASSES, dtype=torch.float64)
    labels = torch.stack([t * eye[a] + (1 - t) * eye[b] for a, b in pairs for t in mixes])
    found = torch.zeros(len(labels), 8, dtype=torch.float64)
    for _ in range(30):  # Newton's steps
        p = (found @ weight.T).softmax(1)
        slope = (p - labels) @ weight + DECAY * found
        spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        bend = weight.T @ spread @ weight + DECAY * torch.eye(8, dtype=torch.float64)
        found -= torch.linalg.solve(bend, slope)
    left = torch.zeros(len(found), dtype=torch.float64)
    for row, feature in enumerate(found):
        a, b = pairs[row // len(mixes)]
        span = torch.linalg.qr(weight[[a, b]].T)[0]
        left[row] = (feature - span @ (span.T @ feature)).norm() / feature.norm()
    by_mix = left.view(-1, len(mixes)).amax(0).clamp_min(torch.finfo(left.dtype).eps)
    left = float(left.max())
    shape = float(neural_collapse(found, labels, weight).nc2)
    text = f"at most {left:.0e} of a feature outside the span; class means off a simplex by {shape:.0e}"
    names = [f"{t:.2f}" for t in mixes.tolist()]
    chart = Chart(
        {"outside": by_mix.tolist()}, names, "share of class a", "part outside the span", bound=1e-9, log=True
    )
    return Finding(text, left < 1e-9 and shape < 1e-9, {"outside": left, "nc2": shape}, chart)
