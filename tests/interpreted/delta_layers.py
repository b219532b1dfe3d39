"""Whole layers with every op of theirs in Triton, against the same layers on the reference, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import pyrepr
from pyrepr import nn

FAMILIES = ("causal_conv1d", "delta_rule")
SIZES = {"hidden_size": 8, "num_heads": 1, "layer_idx": 0}
LAYERS = {
    "DeltaNet": SIZES | {"conv_bias": True},
    "GatedDeltaNet": SIZES | {"head_dim": 8, "num_v_heads": 2, "expand_v": 1},
    "KimiDeltaAttention": SIZES | {"head_dim": 8, "conv_size": 3},
}
TOLERANCE = 2e-5  # the worst seen was 5e-6


def error(got, expected):
    assert got.shape == expected.shape
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def trained(layer, x, outer, cu_seqlens):
    """Output and every gradient."""
    leaf = x.clone().requires_grad_()
    out = layer(leaf, cu_seqlens=cu_seqlens)[0]
    return [out, *torch.autograd.grad((out * outer).sum(), [leaf, *layer.parameters()])]


def decoded(layer, x):
    """What comes out of a prompt of some tokens and the rest one by one, in a cache."""
    with torch.no_grad():
        first, _, cache = layer(x[:, :6], use_cache=True)
        steps = [layer(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0] for t in range(6, x.shape[1])]
    return torch.cat([first, *steps], 1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_forward_backward_and_decoding(name):
    torch.manual_seed(0)
    layer = getattr(nn, name)(**LAYERS[name])
    wide = copy.deepcopy(layer).double()
    x, outer = torch.randn(1, 12, 8), torch.randn(1, 12, 8)
    bounds = torch.tensor([0, 5, 5, 12])
    results = trained(layer, x, outer, None), trained(layer, x, outer, bounds), [decoded(layer, x)]
    with pyrepr.use_backend("reference"):
        inputs = x.double(), outer.double()
        expected = trained(wide, *inputs, None), trained(wide, *inputs, bounds), [trained(wide, *inputs, None)[0]]
    for got, want in zip(results, expected, strict=True):
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < TOLERANCE
