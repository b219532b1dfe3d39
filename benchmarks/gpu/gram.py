"""GPU cases of family `gram`."""

from __future__ import annotations

import torch
from pyrepr.benchmarks.gpu import GpuCase, Problem

import pyrepr
from pyrepr.reference import gram as reference


def _layers(device: torch.device, dtype: torch.dtype, seed: int, n: int, widths: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    shared = torch.randn(n, max(widths), generator=generator, device=device)
    own = (torch.randn(n, d, generator=generator, device=device) for d in widths)
    return [(shared[:, : x.shape[1]] + x).to(dtype) for x in own]


def _cka(n: int, p: int, q: int, kernel: str = "linear"):
    def make(device, dtype, seed):
        x, y = _layers(device, dtype, seed, n, (p, q))
        sigma = (p + q) ** 0.5
        return Problem(
            lambda: pyrepr.cka(x, y, kernel=kernel, sigma=sigma),
            lambda: reference.cka(x.double() - x.double().mean(0), y.double() - y.double().mean(0), kernel, sigma),
            flops=n * n * (p + q),
            bytes=x.element_size() * n * (p + q),
        )

    return make


def cases() -> list[GpuCase]:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-5, torch.float16: 3e-5}
    return [
        GpuCase("cka", "n=300 p=40 q=70", _cka(300, 40, 70), tolerance, sanitize=True),
        GpuCase("cka", "n=4096 p=q=1024", _cka(4096, 1024, 1024), tolerance, timed=True),
    ]
