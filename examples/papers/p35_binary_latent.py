"""Images as bits: a sum of code vectors, straight through, and one table row for eight bits."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import hash_codes, lookup_sum

PAPER = Paper(
    35,
    "Wang et al., Binary Latent Diffusion, 2023",
    "b ~ Bernoulli(σ(z)), Σ_c b_c e_c, straight through",
    "tables of sums of eight code vectors give b·E to the bit; the mean over all codes is σ(z)·E and the gradient that "
    "goes straight through is that of the mean (to 1e-12)",
)
BITS, GROUPS, WIDTH, SAMPLES = 8, 4, 16, 256


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-64, 65, (GROUPS * BITS, WIDTH), generator=generator).double() / 64  # sums are exact
    z = torch.randn(SAMPLES, GROUPS * BITS, generator=generator, dtype=torch.float64, requires_grad=True)
    p = z.sigmoid()
    drawn = torch.bernoulli(p.detach(), generator=generator)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * BITS)
    order = hash_codes(every - 0.5, BITS)[:, 0].long()
    bits = torch.empty_like(every)
    bits[order] = every
    tables = bits @ vectors.view(GROUPS, BITS, WIDTH)
    found = lookup_sum(hash_codes(drawn - 0.5, BITS), torch.ones(SAMPLES, GROUPS, dtype=torch.float64), tables)
    exact = bool((found == drawn @ vectors).all())

    groups = p.detach().view(SAMPLES, GROUPS, 1, BITS)
    chances = torch.where(bits.bool(), groups, 1 - groups).prod(-1)
    mean = torch.einsum("sgc,gcw->sw", chances, tables)
    off = float((mean - p.detach() @ vectors).abs().max())
    cotangent = torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    through = drawn + p - p.detach()
    slopes = [torch.autograd.grad(out @ vectors, z, cotangent, retain_graph=True)[0] for out in (through, p)]
    slope = float((slopes[0] - slopes[1]).abs().max())
    text = f"tables equal to the bit: {exact}; mean off by {off:.0e}, gradient by {slope:.0e}"
    truth = (p.detach() @ vectors).flatten()[:200].tolist()
    chart = Chart({"a feature": mean.flatten()[:200].tolist()}, truth, "σ(z)·E", "mean over all codes", "points")
    numbers = {"exact": exact, "mean": off, "gradient": slope}
    return Finding(text, exact and off < 1e-12 and slope < 1e-12, numbers, chart)
