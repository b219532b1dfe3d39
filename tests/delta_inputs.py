"""Inputs, truth and errors of the delta rule's tests."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

import pyrepr
from pyrepr.reference import delta_rule as reference

RULES = ("plain", "gated", "kda")
CHUNKED = {"plain": pyrepr.chunk_delta_rule, "gated": pyrepr.chunk_gated_delta_rule, "kda": pyrepr.chunk_kda}
RECURRENT = {
    "plain": pyrepr.fused_recurrent_delta_rule,
    "gated": pyrepr.fused_recurrent_gated_delta_rule,
    "kda": pyrepr.fused_recurrent_kda,
}
# Worst error seen against float64, relative to the largest value of the result (avx512, this file's shapes), doubled.
FORWARD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
STATE_TOLERANCE = 2e-6  # float32 whatever the inputs are
GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(rule, T, *, B=1, H=2, HV=4, K=24, V=20, N=None, dtype=torch.float32, unit=True, seed=0):
    """A dict of tensors: q, k, v, g (or None), beta, initial_state; g and beta float32, the state float32."""
    torch.manual_seed(seed)
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, HV, V)
    beta = torch.rand(B, T, HV)
    g = {"plain": None, "gated": -torch.rand(B, T, HV), "kda": -torch.rand(B, T, HV, K)}[rule]
    if unit:
        k = normalize(k, dim=-1)
    state = torch.randn(N or B, HV, K, V)
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "g": g, "beta": beta, "initial_state": state}


def call(function, x, **options):
    arguments = {name: x[name] for name in ("q", "k", "v", "g", "beta") if x[name] is not None}
    return function(**arguments, initial_state=x["initial_state"], output_final_state=True, **options)


def double(x):
    return {name: None if t is None else t.detach().double() for name, t in x.items()}


def truth(x, cu_seqlens=None, l2norm=False, scale=None):
    x = double(x)
    arguments = (x["q"], x["k"], x["v"], x["g"], x["beta"], scale, x["initial_state"])
    return reference.delta_rule(*arguments, use_qk_l2norm=l2norm, cu_seqlens=cu_seqlens)


def error(got, expected, floor=1e-3):
    """Largest difference, relative to the largest expected value (or to `floor`)."""
    assert got.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(floor)).item()


def gradients(function, x, weights, **options):
    """Gradients of a fixed linear function of (o, final state) in every tensor of x."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in x.items()}
    o, state = call(function, leaves, **options)
    loss = (o.double() * weights[0]).sum() + (state.double() * weights[1]).sum()
    names = [name for name, t in leaves.items() if t is not None]
    grads = torch.autograd.grad(loss, [leaves[name] for name in names], materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def reference_function(q, k, v, beta, g=None, **options):
    options.pop("output_final_state")
    l2norm = options.pop("use_qk_l2norm_in_kernel", False)
    return reference.delta_rule(q, k, v, g, beta, options.pop("scale", None), use_qk_l2norm=l2norm, **options)


def weights_of(o, state):
    torch.manual_seed(1)
    return torch.randn_like(o, dtype=torch.float64), torch.randn_like(state, dtype=torch.float64)


def check_gradients(function, x, tolerance, floor=1e-3, **options):
    weights = weights_of(*truth(x, options.get("cu_seqlens")))
    got = gradients(function, x, weights, **options)
    expected = gradients(reference_function, double(x), weights, **options)
    for name, grad in got.items():
        assert grad.dtype == x[name].dtype
        assert error(grad, expected[name], floor) < tolerance, name
