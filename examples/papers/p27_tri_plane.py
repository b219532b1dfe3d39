"""Three planes instead of a cube of features: twelve rows of tables, added up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor

from pyrepr import lookup_sum

PAPER = Paper(
    27,
    "probably Chan et al., Efficient Geometry-aware 3D Generative Adversarial Networks, 2022",
    "F(x) = F_xy(x) + F_xz(x) + F_yz(x), each bilinear",
    "a weighted sum of 3 × 4 table rows equals bilinear sampling of the planes, its gradient too (to 1e-12), with a "
    "tenth of the numbers of a cube",
)
SIDE, WIDTH, POINTS = 32, 16, 500
AXES = ((0, 1), (0, 2), (1, 2))


def corners(points: Tensor) -> tuple[Tensor, Tensor]:
    """Table rows and weights [N, 12] of points [N, 3] in [−1, 1]."""
    at = (points + 1) / 2 * (SIDE - 1)
    low = at.floor().clamp(0, SIDE - 2)
    part = at - low
    rows, weights = [], []
    for a, b in AXES:
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows.append((low[:, b] + j) * SIDE + low[:, a] + i)
            weights.append((part[:, a] if i else 1 - part[:, a]) * (part[:, b] if j else 1 - part[:, b]))
    return torch.stack(rows, 1).long(), torch.stack(weights, 1)


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(3, SIDE * SIDE, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    points = 2 * torch.rand(POINTS, 3, generator=generator, dtype=torch.float64) - 1
    cotangent = torch.randn(POINTS, WIDTH, generator=generator, dtype=torch.float64)
    looked_up = lookup_sum(*corners(points), planes.repeat_interleave(4, 0))
    images = planes.mT.reshape(3, WIDTH, SIDE, SIDE)
    grids = torch.stack([points[:, axes] for axes in AXES])[:, :, None]
    sampled = F.grid_sample(images, grids, align_corners=True)[..., 0].sum(0).T
    gradients = [torch.autograd.grad(out, planes, cotangent)[0] for out in (looked_up, sampled)]
    error, slope = float((looked_up - sampled).detach().abs().max()), float((gradients[0] - gradients[1]).abs().max())
    share = planes.numel() / (SIDE**3 * WIDTH)
    text = f"off by {error:.0e}, gradient {slope:.0e}; {share:.3f} of a cube's numbers"
    values, truth = looked_up.detach().flatten()[:200].tolist(), sampled.detach().flatten()[:200].tolist()
    chart = Chart({"a feature": values}, truth, "bilinear sampling", "sum of table rows", "points")
    return Finding(text, error < 1e-12 and slope < 1e-12 and share < 0.1, {"off": error, "gradient": slope}, chart)
