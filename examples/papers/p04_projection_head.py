"""A linear projection head under a contrastive loss: before it, the spectrum is flatter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._data import digits
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr.stats import Moments, effective_rank

PAPER = Paper(
    4,
    "probably Xue et al., Investigating the Benefits of Projection Head for Representation Learning, 2024",
    "f = W₂W₁x, −2 E f(x)ᵀf(x⁺) + E (f(x)ᵀf(x′))² + λ(‖W₁‖² + ‖W₂‖²)",
    "singular values of the features before the head are the roots of those behind it (to 1e-3 of the largest), so "
    "that they have the larger effective rank",
)
WIDTH, DECAY = 12, 0.02


def run() -> Finding:
    x, *_ = digits()
    images = F.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    moved = images[:, 1:9, 2:10].flatten(1)
    pca = Moments().update(x).pca(WIDTH)
    white, other = (
        ((part.double() - pca.mean) @ pca.components.T) / pca.explained_variance.sqrt() for part in (x, moved)
    )
    white, other = white - white.mean(0), other - other.mean(0)
    pairs = white.T @ other / len(x)
    pairs = (pairs + pairs.T) / 2
    generator = torch.Generator().manual_seed(0)
    first, head = (
        (0.3 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    optimizer = torch.optim.LBFGS(
        [first, head], max_iter=600, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        w = head @ first
        value = -2 * (w @ pairs * w).sum() + (w @ w.T).square().sum()
        value = value + DECAY * (first.square().sum() + head.square().sum())
        value.backward()
        return value

    optimizer.step(loss)
    before = white @ first.detach().T
    behind = before @ head.detach().T
    pre, post = (torch.linalg.svdvals(z) / len(x) ** 0.5 for z in (before, behind))
    off = float((pre - post.sqrt()).abs().max() / pre[0])
    live = int((post > 0.05 * post[0]).sum())
    ranks = [float(effective_rank(z)) for z in (before, behind)]
    text = f"{live} directions, off by {off:.1e}; effective rank {ranks[0]:.2f} before, {ranks[1]:.2f} behind the head"
    holds = off < 1e-3 and live >= 3 and ranks[0] > ranks[1]
    spectra = {"before the head": pre, "root of behind": post.sqrt(), "behind the head": post}
    series = {name: values.tolist() for name, values in spectra.items()}
    chart = Chart(series, list(range(1, WIDTH + 1)), "direction", "singular value", "lines")
    numbers = {"off": off, "directions": live, "before": ranks[0], "behind": ranks[1]}
    return Finding(text, holds, numbers, chart)
