"""Mixed labels and neural collapse: where the features of mixed images end."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Finding, Paper

from pyrepr.stats import neural_collapse

PAPER = Paper(
    17,
    "Fisher et al., Pushing Boundaries: Mixup's Influence on Neural Collapse, 2024",
    "min over h of CE(W h, t e_a + (1 − t) e_b) + λ/2 |h|², W a simplex",
    "the best features of mixed classes a and b lie in the span of w_a and w_b (to 1e-6), and class means weighted by "
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
    h = torch.randn(len(labels), 8, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [h], max_iter=500, history_size=30, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = h @ weight.T
        value = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + DECAY / 2 * h.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = h.detach()
    left = 0.0
    for row, feature in enumerate(found):
        a, b = pairs[row // len(mixes)]
        span = torch.linalg.qr(weight[[a, b]].T)[0]
        left = max(left, float((feature - span @ (span.T @ feature)).norm() / feature.norm()))
    shape = float(neural_collapse(found, labels, weight).nc2)
    text = f"at most {left:.0e} of a feature outside the span; class means off a simplex by {shape:.0e}"
    return Finding(text, left < 1e-6 and shape < 1e-6, {"outside": left, "nc2": shape})
