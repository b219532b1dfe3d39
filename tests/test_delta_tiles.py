"""The delta rule of bfloat16 in shapes that are made of whole tiles, which has kernels of its own where the processor
multiplies tiles; at every other level the same is asked of the kernel for all shapes."""

from __future__ import annotations

import pytest
import torch
from delta_inputs import FORWARD_TOLERANCE, error, truth

import pyrepr
from pyrepr.functional import chunk_simple_gla
from pyrepr.reference import delta_rule as reference

pytestmark = pytest.mark.levels

BF16 = torch.bfloat16
TOLERANCE = FORWARD_TOLERANCE[BF16]
# Worst error seen of a state, relative to its largest value, doubled: computed numbers enter products as the sum of two
# bfloat16, 2^-17 off each.
STATE_TOLERANCE = 2e-5


def inputs(T, *, B=1, H=2, HV=4, K=64, V=32, N=None, gated=True, unit=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = numbers(B, T, H, K), numbers(B, T, H, K), numbers(B, T, HV, V)
    if unit:
        k = torch.nn.functional.normalize(k, dim=-1)
    g = -torch.rand(B, T, HV, generator=generator) if gated else None
    beta = torch.rand(B, T, HV, generator=generator)
    return {
        "q": q.to(BF16),
        "k": k.to(BF16),
        "v": v.to(BF16),
        "g": g,
        "beta": beta,
        "initial_state": numbers(N or B, HV, K, V),
    }


def run(x, **options):
    function = pyrepr.chunk_delta_rule if x["g"] is None else pyrepr.chunk_gated_delta_rule
    arguments = {name: tensor for name, tensor in x.items() if tensor is not None}
    return function(**arguments, output_final_state=True, **options)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("K", "V"), [(32, 32), (64, 96), (128, 128), (160, 64)])
@pytest.mark.parametrize("T", [16, 17, 48, 63, 64, 65, 130, 200])
def test_forward(T, K, V, gated):
    x = inputs(T, K=K, V=V, gated=gated, unit=False)
    (o, state), expected = run(x, use_qk_l2norm_in_kernel=True), truth(x, l2norm=True)
    assert error(o, expected[0]) < TOLERANCE
    assert error(state, expected[1]) < STATE_TOLERANCE


@pytest.mark.parametrize("T", [20, 150])
def test_without_the_erase_and_without_normalisation(T):
    x = inputs(T, K=64, V=64)
    q, k, v, g, state = (x[name] for name in ("q", "k", "v", "g", "initial_state"))
    o, final = chunk_simple_gla(q, k, v, g, initial_state=state, output_final_state=True)
    wide = [t.double() for t in (q, k, v, g)]
    expected = reference.delta_rule(*wide, None, None, state.double())
    assert error(o, expected[0]) < TOLERANCE
    assert error(final, expected[1]) < STATE_TOLERANCE


@pytest.mark.parametrize("g", [0.0, -8.0, -60.0, -torch.inf, 0.5])
def test_any_decay(g):
    x = inputs(150)
    x["g"][:, 20:90] = g
    (o, state), expected = run(x), truth(x)
    assert error(o, expected[0]) < TOLERANCE
    assert error(state, expected[1]) < STATE_TOLERANCE


@pytest.mark.parametrize(("beta", "tolerance"), [(1.0, STATE_TOLERANCE), (2.0, 1e-3)])
def test_repeated_keys(beta, tolerance):
    """With a step of 2 nothing is forgotten, errors neither: twice the 4e-4 that were seen."""
    x = inputs(200, gated=False)
    x["k"][:] = x["k"][:, :1] + 0.03 * x["k"]
    x["beta"][:] = beta
    (o, state), expected = run(x, use_qk_l2norm_in_kernel=True), truth(x, l2norm=True)
    assert error(o, expected[0]) < TOLERANCE
    assert error(state, expected[1]) < tolerance


@pytest.mark.parametrize("size", [1e-18, 1e18, 3e37])
def test_keys_of_any_size_are_normalised(size):
    x = inputs(70)
    x["q"], x["k"] = x["q"] * size, x["k"] * size
    wide = {name: tensor.double() for name, tensor in x.items()}
    if size < 1:
        wide["k"] *= 0  # beside 1e-6 below the root, they vanish
        wide["q"] *= 0
    o, _ = run(x, use_qk_l2norm_in_kernel=True)
    assert error(o, truth(wide, l2norm=True)[0], floor=1) < TOLERANCE


@pytest.mark.parametrize("size", [1e-38, 1e-36, 1e-34, 1e-25, 1e25])
def test_values_of_any_size(size):
    x = inputs(70)
    x["v"], x["initial_state"] = x["v"] * size, x["initial_state"] * size
    (o, state), expected = run(x), truth(x)
    assert error(o, expected[0], floor=0) < TOLERANCE
    assert error(state, expected[1], floor=0) < STATE_TOLERANCE


def test_a_faint_column_among_others_and_faint_keys():
    """Tiles take subnormal numbers as zero: each is as right as it would be alone."""
    x = inputs(70)
    x["v"][..., 5] *= 1e-36
    x["initial_state"][..., 5] *= 1e-36
    (o, state), expected = run(x), truth(x)
    assert error(o[..., 5], expected[0][..., 5], floor=0) < TOLERANCE
    assert error(state[..., 5], expected[1][..., 5], floor=0) < STATE_TOLERANCE
    x = inputs(70) | {"initial_state": torch.zeros(1, 4, 64, 32)}
    x["k"] *= 1e-34
    (o, state), expected = run(x), truth(x)
    assert error(o, expected[0], floor=0) < TOLERANCE
    assert error(state, expected[1], floor=0) < STATE_TOLERANCE


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("t", [0, 37, 100])
def test_what_is_not_finite_reaches_no_output_before_it(name, t, value):
    x = inputs(130, V=64)
    clean, _ = run(x)
    head = 1
    x[name][0, t, head] = value
    o, _ = run(x)
    assert torch.equal(o[:, :t], clean[:, :t])
    others = torch.arange(4) // (1 if x[name].shape[2] == 4 else 2) != head
    assert torch.equal(o[:, :, others], clean[:, :, others])
    if name == "v":
        x = inputs(130, V=64)
        x["v"][0, t, head, 40] = value
        columns = torch.arange(64) != 40
        assert torch.equal(run(x)[0][..., columns], clean[..., columns])
        assert not run(x)[0][0, t, head, 40].isfinite()


def test_the_same_bits_for_any_number_of_threads_and_beside_others():
    x = inputs(150, H=1, HV=1, V=128)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(x)
        torch.set_num_threads(3)
        several = run(x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_packed_sequences_are_those_alone():
    lengths = [70, 0, 16, 3, 64]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x = inputs(sum(lengths), N=len(lengths))
    o, state = run(x, cu_seqlens=bounds)
    for i, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        own = {name: t[i : i + 1] if name == "initial_state" else t[:, first:last] for name, t in x.items()}
        alone = run(own)
        assert torch.equal(o[:, first:last], alone[0])
        assert torch.equal(state[i : i + 1], alone[1])


@pytest.mark.parametrize("T", [40, 200, 700])
def test_training_gives_the_same_outputs_and_right_gradients(T):
    """States are kept where their chunks begin, which need not be where those of tiles do."""
    x = inputs(T, K=32)
    plain = run(x)
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    o, state = run(leaves)
    assert error(o, plain[0].double()) < TOLERANCE
    assert error(state, plain[1].double()) < STATE_TOLERANCE
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((o * weights).sum() + state.sum(), list(leaves.values()))
    wide = {name: t.double().requires_grad_() for name, t in x.items()}
    arguments = (wide[name] for name in ("q", "k", "v", "g", "beta"))
    expected = reference.delta_rule(*arguments, None, wide["initial_state"])
    right = torch.autograd.grad((expected[0] * weights).sum() + expected[1].sum(), list(wide.values()))
    for got, want in zip(found, right, strict=True):
        assert error(got, want) < TOLERANCE
