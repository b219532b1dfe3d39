"""Triton kernels of family `causal_conv1d` against the reference in float64, interpreted on the CPU on small shapes."""

from __future__ import annotations

import inspect
import itertools
import re
import struct

import pytest
import torch
from pyrepr.kernels.causal_conv1d import _shared
from pyrepr.kernels.causal_conv1d._hosts import Problem

import pyrepr
from pyrepr.ops.causal_conv1d import backward_op, forward_op, update_op_
from pyrepr.reference import causal_conv1d as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Worst error seen against float64, relative to the largest value of the result, times two. The interpreter cuts
# bfloat16 off instead of rounding it.
TOLERANCE = {F32: 8e-7, BF16: 1.4e-2, F16: 8e-4}
CU = torch.tensor([0, 0, 33, 33, 34, 36, 48, 48])  # the first edge is right behind a span of tokens
LAYOUTS = {
    "channels side by side": lambda x: x.contiguous(),
    "tokens side by side": lambda x: x.mT.contiguous().mT,
    "channels of a slice": lambda x: torch.cat([x[..., :3], x], 2)[..., 3:],
    "tokens of a slice": lambda x: torch.cat([x[:, :3], x], 1).mT.contiguous().mT[:, 3:],
    "neither": lambda x: torch.stack([x, x], -1)[..., 1],
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(B, T, D, W=4, dtype=F32, *, states=0, weight_dtype=F32):
    """x, weight, bias, and `states` initial states or None."""
    x, weight, bias = torch.randn(B, T, D), torch.randn(D, W), torch.randn(D)
    initial = torch.randn(states, D, W - 1).to(dtype) if states else None
    return x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype), initial


def error(got, expected):
    assert got.shape == expected.shape
    if not expected.numel():
        return 0.0
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def check(tensors, seq_idx=None, cu=None, silu=True, gradient=True):
    """Forward and backward; the gradients have their inputs' dtypes."""
    x = tensors[0]
    wide = [None if t is None else t.double() for t in tensors]
    rest = seq_idx, cu
    out = forward_op(*tensors, *rest, silu)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert error(out, reference.causal_conv1d(*wide, *rest, silu)) < TOLERANCE[x.dtype]
    if not gradient:
        return
    grad = torch.randn(x.shape).to(x.dtype)
    got = backward_op(*tensors, *rest, grad, silu)
    expected = reference.causal_conv1d_backward(*wide, *rest, grad.double(), silu)
    for name, a, b, given in zip(("x", "weight", "bias", "initial"), got, expected, tensors, strict=True):
        assert given is None or a.dtype == given.dtype
        assert error(a, b) < TOLERANCE[x.dtype], name


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((name, F32) for name in LAYOUTS), *itertools.product(list(LAYOUTS)[:3], (BF16, F16))]
)
def test_layouts_and_dtypes(layout, dtype, only_listed_variants):
    """More than one span of tokens; whole blocks of channels and parts of them."""
    x, *rest = inputs(2, 40, 40, dtype=dtype, states=2, weight_dtype=dtype)
    check((LAYOUTS[layout](x), *rest))
    walked = {v.name.split()[0]: v for v in only_listed_variants if "TURNED" in v.constexprs}
    turned, dense = layout == "tokens side by side", layout in ("channels side by side", "neither")
    for name in ("forward", "backward"):
        assert walked[name].constexprs["TURNED"] == turned
        assert (walked[name].constexprs["UNIT"] > 1) == (turned or dense or layout == "tokens of a slice")


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 33])
@pytest.mark.parametrize("states", [0, 2])
def test_lengths(T, states):
    check(inputs(2, T, 5, states=states), silu=T % 2 == 1)


@pytest.mark.parametrize("T", [0, 4, 36])
def test_lengths_of_tokens_side_by_side(T):
    x, *rest = inputs(2, T, 33, states=2)
    check((LAYOUTS["tokens side by side"](x), *rest), silu=T == 4)


@pytest.mark.parametrize("W", [1, 2, 3, 5, 6, 7, 8])
def test_widths(W):
    check(inputs(2, 9, 5, W, states=2))
    cu = torch.tensor([0, 0, 6, 6, 7, 9, 20, 20])
    check(inputs(1, 20, 5, W, states=7), cu=cu, silu=False)


def test_widths_in_more_than_one_tile():
    x, *rest = inputs(1, 35, 66, 3, BF16)
    check((LAYOUTS["tokens side by side"](x), *rest))
    check(inputs(2, 18, 5, 9, F16))
    check(inputs(1, 24, 5, 21))


@pytest.mark.parametrize(("layout", "dtype"), zip(list(LAYOUTS)[:4], (BF16, F16, F32, BF16), strict=True))
def test_packed_sequences(layout, dtype):
    """Of no, one, two and many tokens."""
    x, *rest = inputs(1, 48, 16, dtype=dtype, states=7)
    check((LAYOUTS[layout](x), *rest), cu=CU.int())


def test_packed_without_states_and_with_an_edge_between_spans():
    x, *rest = inputs(1, 48, 5)
    check((x, *rest), cu=CU)
    check(inputs(1, 36, 5, states=3), cu=torch.tensor([0, 32, 34, 36]))


@pytest.mark.parametrize(("W", "kind"), [(3, torch.int32), (4, torch.int64)])
def test_seq_idx_of_a_batch(W, kind):
    seq_idx = torch.randint(0, 4, (2, 34)).cumsum(1).clamp_max(30) % 3
    check(inputs(2, 34, 6, W), seq_idx=seq_idx.to(kind).mT.contiguous().mT)


def test_sequences_do_not_see_each_other():
    x, weight, bias, _ = inputs(1, 40, 8)
    x[0, 18:20] = float("nan")
    cu = torch.tensor([0, 18, 20, 40])
    out = forward_op(x, weight, bias, None, None, cu, True)
    assert out.isnan().all(2)[0].nonzero().flatten().tolist() == [18, 19]
    dx, *_ = backward_op(x, weight, bias, None, None, cu, torch.ones_like(x), True)
    assert dx.isnan().all(2)[0].nonzero().flatten().tolist() == [18, 19]


def test_weights_that_are_not_of_the_inputs_dtype():
    x, weight, bias, initial = inputs(2, 9, 8, dtype=BF16, states=2)
    for kinds in ((BF16, F32), (F32, BF16), (F16, F16), (torch.float64, torch.float64)):
        tensors = x, weight.to(kinds[0]), bias.to(kinds[1]), initial.float()
        check(tensors)
        state, expected = (initial.clone() for _ in range(2))
        wide = (t.double() for t in (expected, x, *tensors[1:3]))
        out = update_op_(state, *tensors[:3], True)
        assert error(out, reference.causal_conv1d_update_(*wide, True)) < TOLERANCE[BF16]
    check((x, weight.mT.contiguous().mT, None, None))


def test_the_same_bits_every_time_and_in_every_layout():
    x, *rest = inputs(1, 36, 33, states=1)
    grad = torch.randn(x.shape)
    first = forward_op(x, *rest, None, None, True), *backward_op(x, *rest, None, None, grad, True)
    for lay_out in LAYOUTS.values():
        y = lay_out(x)
        again = forward_op(y, *rest, None, None, True), *backward_op(y, *rest, None, None, grad, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("W", "S"), [(4, 3), (4, 4), (4, 9), (1, 0), (2, 5), (7, 6)])
def test_update(dtype, W, S):
    x, weight, bias, _ = inputs(2, 20, 7, W, dtype)
    for lay_out, turned in itertools.product((LAYOUTS["channels side by side"], LAYOUTS["neither"]), (False, True)):
        state = x[:, 10 - S : 10].mT
        state = state.contiguous() if turned else state.mT.contiguous().mT
        steps = lay_out(x)[:, 10:].split((1, 1, 2, 6), 1)
        out = torch.cat([update_op_(state, step, weight, bias, True) for step in steps], 1)
        expected = reference.causal_conv1d(x.double(), weight.double(), bias.double(), silu=True)[:, 10:]
        assert error(out, expected) < TOLERANCE[dtype]
        assert torch.equal(state, x[:, 20 - S :].mT)


def test_update_in_a_ring_and_at_indices():
    x, weight, bias, _ = inputs(2, 20, 6)
    x = x.mT
    ring, indices, lengths = torch.zeros(5, 6, 6), torch.tensor([3, 1]), torch.tensor([0, 2], dtype=torch.int32)
    expected = reference.causal_conv1d(x.mT.double(), weight.double(), bias.double(), silu=True).mT
    for t, steps in ((0, 1), (1, 4), (5, 1), (6, 9), (15, 5)):
        out = pyrepr.causal_conv1d_update(x[..., t : t + steps], ring, weight, bias, "silu", lengths + t, indices)
        assert error(out, expected[..., t : t + steps]) < TOLERANCE[F32]
    assert not ring[[0, 2, 4]].any()


def test_final_states():
    x, weight, bias, initial = inputs(1, 48, 6, states=7)
    out, last = pyrepr.causal_conv1d_fn(x.mT, weight, bias, None, initial, True, None, "silu", CU)
    assert (
        error(out.mT, reference.causal_conv1d(*(t.double() for t in (x, weight, bias, initial)), None, CU, True)) < 1e-6
    )
    for i, (a, b) in enumerate(itertools.pairwise(CU.tolist())):
        assert torch.equal(last[i], torch.cat([initial[i], x[0, a:b].mT], -1)[:, -3:])


@pytest.mark.parametrize("bounds", [[1, 30], [0, 20], [0, 25, 20, 30], [0]])
@pytest.mark.parametrize("W", [3, 4])
def test_bad_bounds_are_refused(bounds, W):
    tensors = inputs(1, 30, 3, W, states=len(bounds) - 1)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never decrease, and end at T = 30"):
        forward_op(*tensors, None, torch.tensor(bounds), True)
    with pytest.raises(ValueError, match="and end at T = 0"):
        forward_op(tensors[0][:, :0], *tensors[1:], None, torch.tensor([0, *bounds, 30]), True)


def test_what_the_kernels_were_not_made_for_is_refused():
    tensors = [None if t is None else t.double() for t in inputs(1, 4, 3)]
    with pytest.raises(RuntimeError, match=r"refuses torch\.float64 tensors"):
        forward_op(*tensors, None, None, True)
    with pytest.raises(RuntimeError, match=r"refuses torch\.float64 tensors"):
        update_op_(torch.zeros(1, 3, 3).double(), *tensors[:3], True)
    far = torch.empty_strided((2, 1, 3), (2**31, 3, 1), device="meta")
    with pytest.raises(RuntimeError, match="sizes and strides of causal_conv1d up to"):
        Problem(far, *inputs(1, 1, 3)[1:], None, None, True)


def test_compiles_without_a_graph_break():
    x, weight, bias, initial = inputs(2, 9, 8, states=2)
    results = []
    for function in (
        pyrepr.causal_conv1d_fn,
        torch.compile(pyrepr.causal_conv1d_fn, fullgraph=True, backend="aot_eager"),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, initial)]
        out, last = function(leaves[0].mT, *leaves[1:3], None, leaves[3], True, None, "silu")
        (out.square().sum() + last.sum()).backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def assembled(y):
    """What the assembly in `sigmoid`, which the interpreter cannot run, makes of y: instruction by instruction in
    float32, with what is below 2⁻¹²⁶ flushed."""
    steps = {"mul": torch.mul, "add": torch.add, "ex2.approx": torch.exp2, "rcp.approx": torch.reciprocal}
    values = {"$1": y}
    text = re.search(r'"""{(.*?)}"""', inspect.getsource(_shared.sigmoid.fn), re.S)[1]
    declared, *lines = (line.strip() for line in text.split(";") if line.strip())
    assert declared == ".reg .f32 power"
    for line in lines:
        name, rest = line.split(".ftz.f32 ")
        to, *of = rest.split(", ")
        of = [values[a] if a in values else torch.tensor(struct.unpack(">f", bytes.fromhex(a[2:]))[0]) for a in of]
        found = steps[name](*of)
        values[to] = torch.where(found.abs() < 2.0**-126, found * 0, found)
    return values["$0"]


def test_assembly_of_the_sigmoid():
    """To as many bits as are left where y's power is: an exponent of |y| log₂ e is rounded to 2⁻²⁴ of itself. A device
    adds two units in the last place of its power, and one of its reciprocal."""
    y = torch.cat([torch.linspace(-87, 100, 100003), torch.tensor([0.0, 1e-30, -1e-30])])
    expected = torch.sigmoid(y.double())
    assert (((assembled(y) - expected) / expected).abs() < 2.0**-23 * (1 + y.abs())).all()
    ends = torch.tensor([-3e38, -1e4, -104.0, 104.0, 3e38])
    assert (ends * assembled(ends)).tolist() == [0.0, 0.0, 0.0, 104.0, ends[-1]]
    assert assembled(torch.tensor(float("nan"))).isnan()
