"""What the forward of the delta rule keeps for its backward on a CPU: some states, and V' of every token."""

from __future__ import annotations

import pytest
import torch

import pyrepr
from pyrepr.ops import delta_rule as op

RULES = {
    "plain": (pyrepr.chunk_delta_rule, None),
    "gated": (pyrepr.chunk_gated_delta_rule, ()),
    "kda": (pyrepr.chunk_kda, (16,)),
}


def inputs(rule, B, T, dtype=torch.float32, H=2, HV=4, K=16, V=24):
    generator = torch.Generator().manual_seed(T)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    x = {"q": numbers(B, T, H, K), "k": numbers(B, T, H, K), "v": numbers(B, T, HV, V)}
    x = {name: y.to(dtype) for name, y in x.items()} | {"beta": numbers(B, T, HV).sigmoid()}
    axis = RULES[rule][1]
    return x if axis is None else x | {"g": -numbers(B, T, HV, *axis).abs()}


def gradients(rule, x, grad, **options):
    leaves = {name: y.detach().requires_grad_() for name, y in x.items()}
    o, _ = RULES[rule][0](**leaves, use_qk_l2norm_in_kernel=True, **options)
    return torch.autograd.grad(o, list(leaves.values()), grad)


@pytest.mark.levels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [16, 33, 200])
@pytest.mark.parametrize("rule", RULES)
def test_values_that_were_kept_are_those_computed_again(rule, T, packed, monkeypatch):
    x = inputs(rule, 1 if packed else 3, T)
    options = {"cu_seqlens": torch.tensor([0, 5, 5, 6, T])} if packed else {}
    grad = torch.randn(x["v"].shape, generator=torch.Generator().manual_seed(1))
    kept = gradients(rule, x, grad, **options)
    monkeypatch.setattr(op, "kept_slots", lambda *sizes: op.kept_states(*sizes[:3]))
    for a, b in zip(kept, gradients(rule, x, grad, **options), strict=True):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()  # twice the worst seen, of gradients in g


def test_every_row_keeps_its_own():
    """Whatever becomes of the rows under vmap: all entries of a Jacobian's rows share what one forward kept."""
    x, grads = inputs("gated", 2, 40), torch.randn(3, 2, 40, 4, 24)
    o, back = torch.func.vjp(lambda q, v: pyrepr.chunk_gated_delta_rule(**x | {"q": q, "v": v})[0], x["q"], x["v"])
    together = torch.func.vmap(back)(grads)
    for i, grad in enumerate(grads):
        for a, b in zip(together, back(grad), strict=True):
            torch.testing.assert_close(a[i], b, rtol=0, atol=0)
    assert o.shape == (2, 40, 4, 24)


def test_memory_that_is_kept():
    """As many slots of a state's size as docs say: √n states of n chunks, and V' as large as v."""
    for B, T, K in ((1, 2048, 128), (3, 200, 16), (2, 15, 16)):
        states = op.kept_states(B, T, B)
        slots = op.kept_slots(B, T, B, K)
        assert (slots - states) * K >= B * T or (T < K and slots == states)
        assert (slots - states) * K < B * (T + K)
