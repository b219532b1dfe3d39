"""Triton kernels of family `gram` against float64, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from pyrepr.kernels import gram as kernels


@pytest.mark.parametrize("dtype", kernels.PARTS)
def test_pair_sums(dtype):
    x, y = torch.randn(150, 70).to(dtype), torch.randn(150, 33).to(dtype)
    packed = kernels.Packed([x, y], None, True)
    sums = kernels._pair_sums(packed, 0, 1)
    k, l = ((a @ a.T).fill_diagonal_(0) for a in ((z.double() - z.double().mean(0)) for z in (x, y)))
    kk, kl, ll = ((p * q).sum() for p, q in ((k, k), (k, l), (l, l)))
    a, b = packed.scale**2
    ours = sums / torch.stack([a * a, a * b, b * b]) / torch.stack([kk, (kk * ll).sqrt(), ll])
    # Worst seen: 3e-8 in float32; rounding the centred 16-bit features costs 6e-6.
    expected = torch.stack([kk / kk, kl / (kk * ll).sqrt(), ll / ll])
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-7 if dtype == torch.float32 else 3e-5)
