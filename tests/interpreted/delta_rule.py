"""Triton kernels of family `delta_rule` against the float64 recurrence, interpreted on the CPU on small shapes."""

from __future__ import annotations

import pytest
import torch
from pyrepr.kernels import delta_rule as kernels
from torch.nn.functional import normalize

from pyrepr.ops.delta_rule import backward_op, forward_op, kept_states, update_op_
from pyrepr.reference import delta_rule as reference

RULES = ("plain", "gated", "kda")
CU = torch.tensor([0, 0, 33, 33, 34, 70, 70])
SEGMENT = 64  # tokens between kept states: more than one segment in the shapes below
# Worst error seen against float64, relative to the largest value of the result, times two to four.
FORWARD = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 1.5e-3}
GRADIENT = {torch.float32: 1.5e-6, torch.bfloat16: 3e-2, torch.float16: 2e-3}


def inputs(rule, T, *, B=1, H=1, HV=2, K=20, V=12, N=None, dtype=torch.float32):
    """q, k (unit), v, g, beta, initial_state."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = randn(B, T, H, K), normalize(randn(B, T, H, K), dim=-1), randn(B, T, HV, V)
    beta = torch.rand(B, T, HV, generator=generator)
    shape = {"plain": None, "gated": (B, T, HV), "kda": (B, T, HV, K)}[rule]
    g = None if shape is None else -torch.rand(shape, generator=generator)
    return [q.to(dtype), k.to(dtype), v.to(dtype), g, beta, randn(N or B, HV, K, V)]


def error(got, expected, floor=1e-3):
    assert got.shape == expected.shape and not got.isnan().any()
    if not expected.numel():
        return 0.0
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(floor)).item()


def truth(x, cu=None, scale=0.3, l2norm=False):
    q, k, v, g, beta, state = (None if t is None else t.double() for t in x)
    return reference.delta_rule(q, k, v, g, beta, scale, state, l2norm, cu)


def slots_of(x, cu=None):
    return 1 + kept_states(x[2].shape[0], x[2].shape[1], x[5].shape[0] if x[5] is not None else 1)


def check_forward(x, cu=None, l2norm=False, split=False, slots=0, tolerance=None):
    dtype = x[2].dtype
    o, state, kept = kernels.forward(*x, cu, 0.3, l2norm, slots, SEGMENT, split)
    expected = truth(x, cu, l2norm=l2norm)
    assert o.dtype == dtype and state.dtype == torch.float32
    assert error(o, expected[0]) < (tolerance or FORWARD[dtype])
    assert error(state, expected[1]) < (tolerance or FORWARD[dtype])
    return kept


def check_backward(x, cu=None, l2norm=False, split=False, slots=8, floor=1e-3, tolerance=None):
    dtype = x[2].dtype
    kept = check_forward(x, cu, l2norm, split, slots, tolerance)
    o, state = truth(x, cu, l2norm=l2norm)
    grads = torch.randn(o.shape).to(dtype), torch.randn(state.shape)
    got = kernels.backward(*x, cu, kept, *grads, 0.3, l2norm, SEGMENT, split)
    wide = [None if t is None else t.double() for t in x]
    expected = reference.delta_rule_backward(*wide, cu, kept, *(g.double() for g in grads), 0.3, l2norm)
    for name, a, b in zip(("q", "k", "v", "g", "beta", "state"), got, expected, strict=True):
        assert error(a, b, floor) < (tolerance or GRADIENT[dtype]), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("T", [0, 1, 17, 65])
def test_lengths(rule, T):
    check_backward(inputs(rule, T, HV=1 + (T < 65)), slots=2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "split"),
    [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_dtypes_whole_and_in_segments(rule, dtype, split):
    check_backward(inputs(rule, 70, HV=1, dtype=dtype), split=split)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", [False, True])
def test_packed_with_empty_sequences(rule, split):
    check_backward(inputs(rule, 70, HV=1, N=6), CU, split=split)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", [False, True])
def test_without_kept_states_or_initial_state(rule, split):
    x = inputs(rule, 70, HV=1)
    check_backward(x, split=split, slots=0)
    x[5] = None
    o, state, _ = kernels.forward(*x, None, 0.3, False, 0, SEGMENT, split)
    expected = truth(x)
    assert max(error(o, expected[0]), error(state, expected[1])) < FORWARD[torch.float32]


@pytest.mark.parametrize("rule", RULES)
def test_normalisation_batches_strides_and_two_blocks(rule):
    x = inputs(rule, 10, B=2, HV=1, K=70, V=70)
    fused = torch.cat([3 * x[0], 2 * x[1], x[2]], -1)
    x[:3] = fused.split(70, -1)
    check_backward(x, l2norm=True)


@pytest.mark.parametrize("rule", RULES)
def test_views_that_start_oddly(rule):
    """What the kernels are compiled for is aligned: the rest is copied."""
    x = inputs(rule, 20, HV=1, K=32, V=16)
    fused = torch.cat([torch.zeros(1, 20, 1, 1), *x[:3]], -1)
    x[:3] = fused[..., 1:].split([32, 32, 16], -1)
    for i in (4, 5):
        x[i] = torch.cat([torch.zeros(1), x[i].flatten()])[1:].view_as(x[i])
    check_backward(x, slots=2)


def test_the_widest_keys_in_segments():
    check_backward(inputs("plain", 70, HV=1, K=200, V=8), split=True)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_repeated_keys(beta):
    """Keys at cosine ≈ 1: the inverse by repeated squaring is off by 10⁹ here."""
    x = inputs("plain", 70, HV=1, dtype=torch.float32)
    x[1] = normalize(x[1][:, :1] + 1e-3 * torch.randn(x[1].shape), dim=-1)
    x[4] = torch.full_like(x[4], beta)
    check_backward(x, split=True, tolerance=1e-4)


@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_long_decays(rule):
    x = inputs(rule, 40, HV=1)
    some = torch.rand(x[3].shape) < 0.3
    for g in (torch.full_like(x[3], -50.0), torch.where(some, -50.0, -0.01), torch.where(some, -torch.inf, -0.01)):
        check_forward([*x[:3], g, *x[4:]])
    check_backward([*x[:3], torch.where(some, -50.0, -0.01), *x[4:]], floor=1)


@pytest.mark.parametrize("T", [33, 70])
@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_gradients_of_fast_decays_are_as_small_as_they_are(rule, T):
    x = inputs(rule, T)
    x[3] = x[3] - 30
    _, _, kept = kernels.forward(*x, None, 0.3, False, 8, SEGMENT)
    grad_o, grad_state = torch.randn(x[2].shape), torch.randn(x[5].shape)
    *_, dg, _, _ = kernels.backward(*x, None, kept, grad_o, grad_state, 0.3, False, SEGMENT)
    assert dg.abs().max() < 1e-10  # e^-30 is 1e-13; without care their rounding is 1e-6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", list(FORWARD))
def test_decoding_in_place(rule, dtype):
    x = inputs(rule, 3, B=2, dtype=dtype)
    state = x[5].clone()
    steps = ([None if t is None else t[:, i : i + 1] for t in x[:5]] for i in range(3))
    outputs = [update_op_(state, *step, state, None, 0.3, True) for step in steps]
    expected = truth(x, l2norm=True)
    assert error(torch.cat(outputs, 1), expected[0]) < FORWARD[dtype]
    assert error(state, expected[1]) < FORWARD[torch.float32]


@pytest.mark.parametrize("K", [32, 24])
def test_decoding_from_another_state(K):
    """It is read where it lies, and stays as it is."""
    x = inputs("gated", 3, B=2, K=K)
    initial, out = x[5].clone(), torch.full_like(x[5], torch.nan)
    o = update_op_(out, *x[:5], initial, None, 0.3, True)
    expected = truth(x, l2norm=True)
    assert error(o, expected[0]) < FORWARD[torch.float32] and error(out, expected[1]) < FORWARD[torch.float32]
    assert torch.equal(initial, x[5])
    both = torch.cat([x[5].flatten(), torch.zeros(16)])  # the final state begins 16 entries behind the initial one
    initial, out = both[:-16].view_as(x[5]), both[16:].view_as(x[5])
    update_op_(out, *x[:5], initial, None, 0.3, True)
    assert error(out, expected[1]) < FORWARD[torch.float32]
    update_op_(out, *x[:5], None, None, 0.3, True)
    assert error(out, truth([*x[:5], 0 * x[5]], l2norm=True)[1]) < FORWARD[torch.float32]


def test_decoding_packed_and_many_tokens():
    x = inputs("gated", 12, N=4)
    cu = torch.tensor([0, 3, 3, 4, 12], dtype=torch.int32)
    for tokens, bounds in ((12, cu), (12, None)):
        y = [t if t is None else t[:, :tokens] for t in x[:5]]
        state = x[5].clone() if bounds is not None else x[5][:1].repeat(1, 1, 1, 1)
        expected = truth([*y, state], bounds)
        o = update_op_(state, *y, state, bounds, 0.3, False)
        assert max(error(o, expected[0]), error(state, expected[1])) < FORWARD[torch.float32]
    y = inputs("gated", 40)
    strided = y[5].mT.contiguous().mT
    expected = truth(y)
    o = update_op_(strided, *y[:5], strided, None, 0.3, False)
    assert max(error(o, expected[0]), error(strided, expected[1])) < FORWARD[torch.float32]


def test_through_the_ops():
    x = inputs("gated", 70)
    o, state, kept = forward_op(*x, None, 0.3, False, slots_of(x))
    assert error(o, truth(x)[0]) < FORWARD[torch.float32]
    grads = backward_op(*x, None, kept, o, state, 0.3, False)
    wide = [t.double() for t in x]
    expected = reference.delta_rule_backward(*wide, None, kept, o.double(), state.double(), 0.3, False)
    assert all(error(a, b) < GRADIENT[torch.float32] for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("bounds", [[1, 30], [0, 20], [0, 25, 20, 30]])
def test_bad_bounds_are_refused(bounds):
    x, cu = inputs("plain", 30, N=len(bounds) - 1), torch.tensor(bounds)
    words = "cu_seqlens must start at 0, never decrease, and end at T = 30"
    with pytest.raises(ValueError, match=words):
        kernels.forward(*x, cu, 0.3, False, 0, SEGMENT)
    with pytest.raises(ValueError, match=words):
        update_op_(x[5], *x, cu, 0.3, False)


@pytest.mark.parametrize(
    ("change", "words"), [({"dtype": torch.float64}, "v is torch.float64"), ({"K": 257}, "K up to 256, got 257")]
)
def test_what_the_kernels_were_not_made_for_is_refused(change, words):
    with pytest.raises(RuntimeError, match=words):
        forward_op(*inputs("plain", 4, **change), None, 0.3, False, 0)
