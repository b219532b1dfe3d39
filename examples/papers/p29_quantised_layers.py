"""Where do rounded weights change a transformer's representation?"""

from __future__ import annotations

import copy
import functools
from itertools import pairwise

import torch
from pyrepr.papers._minilm import docstrings, encode, minilm
from pyrepr.papers._row import Chart, Finding, Paper
from torch import Tensor, nn

from pyrepr import cka

PAPER = Paper(
    29,
    "",
    "CKA of a layer with itself after all weights of blocks were rounded, a scale a row",
    "a measurement, not the paper's claim: with weights of 8 bits every layer of MiniLM keeps a CKA of .999 with its "
    "own, and with 4 bits the last layers keep less than the first",
)
BITS = (8, 4)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To 2^bits − 1 levels, symmetric, the largest of a row the last level."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


@torch.no_grad()
def quantised(bits: int) -> nn.Module:
    model = copy.deepcopy(minilm()[0])
    for layer in model.encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(rounded(layer.weight, bits))
    return model


@functools.lru_cache(8)
def layers(bits: int | None = None) -> Tensor:
    """Mean tokens of every layer of MiniLM, or of it rounded."""
    return encode(docstrings()[0][::4], model=quantised(bits) if bits else None).means


def kept(bits: int) -> list[float]:
    """CKA of every layer, the embedding first, with itself rounded."""
    return [float(cka(a.double(), b.double())) for a, b in zip(layers(), layers(bits), strict=True)]


def run() -> Finding:
    curves = {f"{bits} bits": kept(bits) for bits in BITS}
    fine, coarse = curves.values()
    text = "; ".join(f"{name} {', '.join(f'{v:.4f}' for v in curve)}" for name, curve in curves.items())
    falls = sum(a > b for a, b in pairwise(coarse))
    holds = min(fine) > 0.999 and max(coarse[-2:]) < min(coarse[:2])
    chart = Chart(curves, list(range(len(fine))), "layer", "CKA with itself, rounded", "lines")
    return Finding(text, holds, {"8 bits": min(fine), "4 bits": min(coarse), "falls": falls}, chart)
