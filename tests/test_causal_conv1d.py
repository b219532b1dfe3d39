"""The causal convolution against torch's own in float64: values, gradients, packing, layouts, and torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch

import pyrepr
from pyrepr.ops.causal_conv1d import backward_op, forward_op, update_op_

# Worst error seen against float64, relative to the largest value of the result (avx512, this file's shapes), doubled.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}
GRADIENT_TOLERANCE = {torch.float32: 1.2e-6, torch.bfloat16: 1.3e-2, torch.float16: 1.6e-3}
LAYOUTS = {
    "tokens": lambda x: x.contiguous(),
    "channels": lambda x: x.mT.contiguous().mT,
    "slices": lambda x: torch.cat([x, x], 1).mT.contiguous().mT[:, x.shape[1] :],
    "neither": lambda x: torch.stack([x, x], -1).mT.contiguous().mT[..., 1],
}


def inputs(B, D, T, W=4, dtype=torch.float32, states=None):
    """x, weight, bias, and `states` initial states or None."""
    x, weight, bias = torch.randn(B, D, T, dtype=dtype), torch.randn(D, W), torch.randn(D)
    return x, weight, bias, torch.randn(states, D, W - 1, dtype=dtype) if states else None


def truth(x, weight, bias, initial, activation="silu", cu=None):
    """In float64 by torch's grouped convolution, one sequence at a time."""
    x, weight, bias, initial = (None if t is None else t.double() for t in (x, weight, bias, initial))
    D, W = weight.shape
    x = [x[..., a:b] for a, b in itertools.pairwise(cu.tolist())] if cu is not None else x.split(1)
    out = []
    for i, row in enumerate(x):
        before = row.new_zeros(1, D, W - 1) if initial is None else initial[i : i + 1]
        if row.shape[-1] == 0:
            continue
        y = torch.nn.functional.conv1d(torch.cat([before, row], -1), weight[:, None], bias, groups=D)
        out.append(torch.nn.functional.silu(y) if activation else y)
    if not out:
        return sum(t.sum() for t in (*x, weight, bias, initial) if t is not None) * torch.zeros(len(x), D, 0).double()
    return torch.cat(out, 0 if cu is None else -1)


def error(got, expected):
    assert got.shape == expected.shape
    return (
        ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
        if expected.numel()
        else 0.0
    )


def gradients(function, tensors, weights):
    leaves = [None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    given = [t.requires_grad_() for t in leaves if t is not None]
    return torch.autograd.grad((function(*leaves).double() * weights).sum(), given)


def fn(x, weight, bias, initial, **options):
    return pyrepr.causal_conv1d_fn(x, weight, bias, initial_states=initial, **{"activation": "silu"} | options)


@pytest.mark.parametrize("T", [0, 1, 2, 3, 5, 64, 65, 200])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_is_torchs_grouped_convolution(backend, T, activation):
    for states in (None, 2):
        tensors = inputs(2, 37, T, states=states)
        assert error(fn(*tensors, activation=activation), truth(*tensors, activation)) < TOLERANCE[torch.float32]


@pytest.mark.levels
@pytest.mark.parametrize("W", [1, 2, 3, 7, 70])
def test_every_width(W):
    tensors = inputs(2, 37, 90, W, states=2)
    expected = truth(*tensors)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    assert error(fn(*tensors), expected) < TOLERANCE[torch.float32] * max(1, W / 8)
    for got, want in zip(gradients(fn, tensors, weights), gradients(truth, tensors, weights), strict=True):
        assert error(got, want) < GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.levels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layouts_and_dtypes(layout, dtype):
    x, weight, *rest = inputs(2, 150, 131, dtype=dtype, states=2)
    rest = (weight.to(dtype), *rest)
    tensors = (LAYOUTS[layout](x), *rest)
    out = fn(*tensors)
    assert out.dtype == dtype and out.mT.is_contiguous()
    assert error(out, truth(x, *rest)) < TOLERANCE[dtype]
    assert torch.equal(out, fn(x, *rest))
    weights = torch.randn(out.shape, dtype=torch.float64)
    expected = gradients(truth, tensors, weights)
    for got, want, given in zip(gradients(fn, tensors, weights), expected, tensors, strict=True):
        assert got.dtype == given.dtype
        assert error(got, want) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [37, 64])
@pytest.mark.parametrize("W", [1, 3, 4, 5])
def test_a_16_bit_filter_gives_the_bits_of_the_same_numbers_in_float32(W, D, dtype):
    x, weight, bias, initial = inputs(2, D, 20, W, dtype, states=2)
    for given in (bias.to(dtype), None):
        narrow = (weight.to(dtype), given)
        wide = (weight.to(dtype).float(), None if given is None else given.float())
        assert torch.equal(fn(x, *narrow, initial), fn(x, *wide, initial))
        dx = [gradients(fn, (x, *filters, initial), torch.ones(2, D, 20))[0] for filters in (narrow, wide)]
        assert torch.equal(*dx)
        for tokens in (x, x[..., :1], x[..., 0]):
            states = x[..., 5:10].clone(), x[..., 5:10].clone()
            out = [
                pyrepr.causal_conv1d_update(tokens, state, *filters, "silu")
                for state, filters in zip(states, (narrow, wide), strict=True)
            ]
            assert torch.equal(*out) and torch.equal(*states)


@pytest.mark.levels
@pytest.mark.parametrize("T", [0, 1, 2, 63, 67, 300])
def test_gradients(T):
    for states in (None, 3):
        tensors = inputs(3, 20, T, states=states)
        weights = torch.randn(3, 20, T, dtype=torch.float64)
        for got, want in zip(gradients(fn, tensors, weights), gradients(truth, tensors, weights), strict=True):
            assert error(got, want) < GRADIENT_TOLERANCE[torch.float32]


def test_gradients_over_many_tokens():
    """More than one slice of tiles, over which the weights' gradients are summed."""
    tensors = inputs(2, 5, 3000)
    weights = torch.randn(2, 5, 3000, dtype=torch.float64)
    for got, want in zip(gradients(fn, tensors, weights), gradients(truth, tensors, weights), strict=True):
        assert error(got, want) < GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("cu", [[0, 40, 40, 41, 43, 140, 140], [0, 140], [0, 0, 1, 2, 3, 140]])
def test_packed_sequences_are_independent(backend, cu):
    cu = torch.tensor(cu, dtype=torch.int32)
    tensors = inputs(1, 21, 140, states=len(cu) - 1)
    out, states = fn(*tensors, cu_seqlens=cu, return_final_states=True)
    expected = truth(*tensors, cu=cu)
    assert error(out, expected) < TOLERANCE[torch.float32]
    x, _, _, initial = tensors
    for i, (a, b) in enumerate(itertools.pairwise(cu.tolist())):
        assert torch.equal(states[i], torch.cat([initial[i], x[0, :, a:b]], -1)[:, -3:])
    weights = torch.randn(expected.shape, dtype=torch.float64)
    got = gradients(lambda *t: fn(*t, cu_seqlens=cu), tensors, weights)
    want = gradients(lambda *t: truth(*t, cu=cu), tensors, weights)
    assert all(error(a, b) < GRADIENT_TOLERANCE[torch.float32] for a, b in zip(got, want, strict=True))
    x, weight, bias, _ = tensors
    lengths = cu.diff()
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    without = truth(x, weight, bias, None, cu=cu)
    assert error(fn(x, weight, bias, None, seq_idx=seq_idx), without) < TOLERANCE[torch.float32]


def test_seq_idx_of_a_batch():
    x, weight, bias, _ = inputs(3, 20, 50)
    seq_idx = torch.randint(0, 2, (3, 50)).cumsum(1)
    rows = []
    for i in range(3):
        starts = (seq_idx[i].diff().nonzero().flatten() + 1).tolist()
        rows.append(truth(x[i : i + 1], weight, bias, None, cu=torch.tensor([0, *starts, 50])))
    assert error(fn(x, weight, bias, None, seq_idx=seq_idx), torch.cat(rows)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("T", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("states", [None, 2])
def test_two_calls_with_states_are_one(T, states):
    x, weight, bias, initial = inputs(2, 20, 30, states=states)
    whole = fn(x, weight, bias, initial)
    first, between = fn(x[..., :T], weight, bias, initial, return_final_states=True)
    kept = torch.full_like(between, float("nan"))
    second, last = fn(x[..., T:], weight, bias, between, return_final_states=True, final_states_out=kept)
    torch.testing.assert_close(torch.cat([first, second], -1), whole)
    assert last is kept and torch.equal(last, x[..., -3:])


def test_final_states_are_differentiable():
    x, weight, bias, initial = inputs(2, 5, 2, states=2)
    for t in (x, initial):
        t.requires_grad_()
    fn(x, weight, bias, initial, return_final_states=True)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(initial.grad, torch.tensor([0.0, 0.0, 1.0]).expand(2, 5, 3))


# Decoding


@pytest.mark.levels
@pytest.mark.parametrize("S", [3, 4, 9])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", [[1] * 7, [2, 1, 4], [7]])
def test_update_is_the_whole_sequence(backend, S, dtype, steps):
    x, weight, bias, _ = inputs(2, 85, 20, dtype=dtype)
    state = x[..., 13 - S : 13].clone()
    out = [pyrepr.causal_conv1d_update(step, state, weight, bias, "silu") for step in x[..., 13:].split(steps, -1)]
    assert error(torch.cat(out, -1), truth(x, weight, bias, None)[..., 13:]) < TOLERANCE[dtype]
    assert torch.equal(state, x[..., -S:])


def test_update_of_one_token_without_its_axis():
    x, weight, bias, _ = inputs(2, 20, 5)
    state = x[..., :4].clone()
    out = pyrepr.causal_conv1d_update(x[..., 4], state, weight, bias)
    assert out.shape == (2, 20)
    assert error(out, truth(x, weight, bias, None, None)[..., 4]) < TOLERANCE[torch.float32]


def test_update_in_a_ring_and_at_indices():
    x, weight, bias, _ = inputs(2, 20, 20)
    indices, lengths = torch.tensor([3, 1]), torch.tensor([0, 2], dtype=torch.int32)
    ring = torch.zeros(5, 20, 6)
    expected = truth(x, weight, bias, None)
    for t, steps in ((0, 1), (1, 4), (5, 1), (6, 9), (15, 5)):
        out = pyrepr.causal_conv1d_update(x[..., t : t + steps], ring, weight, bias, "silu", lengths + t, indices)
        assert error(out, expected[..., t : t + steps]) < TOLERANCE[torch.float32]
    for row, (index, start) in enumerate(zip(indices.tolist(), lengths.tolist(), strict=True)):
        for t in range(14, 20):
            assert torch.equal(ring[index, :, (start + t) % 6], x[row, :, t])
    assert not ring[[0, 2, 4]].any()


def test_update_of_a_strided_state():
    x, weight, bias, _ = inputs(2, 40, 5)
    wide = torch.zeros(2, 4, 80)
    state = wide.mT[:, ::2]
    state.copy_(x[..., :4])
    out = pyrepr.causal_conv1d_update(x[..., 4:], state, weight, bias)
    assert error(out, truth(x, weight, bias, None, None)[..., 4:]) < TOLERANCE[torch.float32]
    assert torch.equal(state, x[..., 1:]) and not wide[..., 1::2].any()


# What every kernel here promises


def test_reference_passes_gradcheck():
    x, weight, bias, initial = (t.double().requires_grad_() for t in inputs(1, 3, 6, states=3))
    cu = torch.tensor([0, 2, 2, 6])
    assert torch.autograd.gradcheck(lambda *t: fn(*t, cu_seqlens=cu), (x, weight, bias, initial))
    assert torch.autograd.gradcheck(lambda *t: fn(*t, None, activation=None), (x, weight, bias))


def test_extreme_values():
    x = torch.tensor([[[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, float("inf"), float("nan"), 1.0, 2.0, 3.0, 4.0]]])
    out = fn(x, torch.tensor([[1.0]]), None, None)
    torch.testing.assert_close(out[..., :7], torch.nn.functional.silu(x[..., :7]), atol=1e-36, rtol=1e-6)
    assert out[..., 7].isnan().all() and out[..., 8:].isfinite().all()


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    tensors = inputs(2, 150, 1100, states=2)
    weights = torch.randn(2, 150, 1100, dtype=torch.float64)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((fn(*tensors), *gradients(fn, tensors, weights)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for row in results[1:] for a, b in zip(results[0], row, strict=True))


@pytest.mark.parametrize("cu", [None, torch.tensor([0, 10, 10, 40])])
def test_opcheck(cu):
    x, weight, bias, initial = inputs(1 if cu is not None else 3, 20, 40, states=3)
    arguments = (x.mT, weight, bias, initial, None, cu)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op.overload, (*arguments, True), test_utils=tests)
    torch.library.opcheck(backward_op.overload, (*arguments, torch.randn(x.mT.shape), True), test_utils=tests)
    torch.library.opcheck(update_op_.overload, (x[..., :4].clone(), x.mT, weight, bias, True), test_utils=tests)


def test_compile_in_one_graph():
    tensors = inputs(2, 20, 40, states=2)
    weights = torch.randn(2, 20, 40, dtype=torch.float64)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled, tensors, weights), gradients(fn, tensors, weights), strict=True):
        assert torch.equal(got, want)
    x, weight, bias, _ = tensors
    packed = {"cu_seqlens": torch.tensor([0, 15, 40]), "return_final_states": True}
    assert torch.equal(compiled(x[:1], weight, bias, None, **packed)[1], fn(x[:1], weight, bias, None, **packed)[1])
    state, other = x[..., :4].clone(), x[..., :4].clone()
    step = torch.compile(pyrepr.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x, state, weight), pyrepr.causal_conv1d_update(x, other, weight))
    assert torch.equal(state, other)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        (
            {"x": torch.zeros(2, 3, 4, dtype=torch.int64)},
            TypeError,
            "x must be float32, float64, bfloat16 or float16",
        ),
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must have shape \[B, D, T\], got \[2, 3\]"),
        (
            {"weight": torch.zeros(3, 1, 4)},
            ValueError,
            r"weight must have shape \[D, W\] with D = 3 .* got \[3, 1, 4\]",
        ),
        ({"weight": torch.zeros(3, 0)}, ValueError, "W of at least 1"),
        ({"weight": torch.zeros(3, 4, device="meta")}, ValueError, "weight must be on the device of x, cpu, got meta"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[D\] = \[3\], got \[4\]"),
        ({"activation": "gelu"}, ValueError, "activation must be None, 'silu' or 'swish', got 'gelu'"),
        ({"seq_idx": torch.zeros(2, 5)}, TypeError, "seq_idx must be int32 or int64, got float32"),
        ({"seq_idx": torch.zeros(2, 4).int()}, ValueError, r"seq_idx must have shape \[B, T\] = \[2, 5\]"),
        (
            {"seq_idx": torch.zeros(2, 5).int(), "return_final_states": True},
            ValueError,
            "seq_idx must be None where there are initial or final states",
        ),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "x must have B = 1 when cu_seqlens packs"),
        ({"x": torch.zeros(1, 3, 5), "cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens must end at T = 5"),
        (
            {"initial_states": torch.zeros(2, 3, 4)},
            ValueError,
            r"initial_states must have shape \[N, D, W - 1\] = \[2, 3, 3\]",
        ),
    ],
)
def test_bad_input_is_one_clear_sentence(change, kind, words):
    arguments = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(3, 4), "bias": None} | change
    with pytest.raises(kind, match=words):
        pyrepr.causal_conv1d_fn(**arguments)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"conv_state": torch.zeros(2, 3, 2)}, ValueError, "S of at least W - 1 = 3, got"),
        ({"conv_state": torch.zeros(1, 3, 4)}, ValueError, r"conv_state must have shape \[B, D, S\] = \[2, 3, S\]"),
        ({"conv_state": torch.zeros(2, 3, 4).half()}, TypeError, "conv_state must be float32, got float16"),
        ({"cache_seqlens": torch.zeros(3).int()}, ValueError, r"cache_seqlens must have shape \[B\] = \[2\]"),
        ({"weight": torch.zeros(3, 4).requires_grad_()}, RuntimeError, "conv_state is written in place"),
    ],
)
def test_bad_updates_are_one_clear_sentence(change, kind, words):
    arguments = {"x": torch.zeros(2, 3), "conv_state": torch.zeros(2, 3, 4), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(kind, match=words):
        pyrepr.causal_conv1d_update(**arguments)


def test_null_pointers_and_rows_that_run_over_are_refused_by_the_native_code():
    from pyrepr import _C

    with pytest.raises(ValueError, match="x has no memory"):
        _C.CausalConv([0, 64, 0, 0], [1, 1, 1], [1, 2, 3, 4], 0, 0, [0, 2], True, 1)
    with pytest.raises(ValueError, match="spans two rows"):
        _C.CausalConv([64, 64, 0, 0], [1, 1, 1], [2, 2, 3, 4], 0, 0, [0, 3, 4], True, 1)
    with pytest.raises(ValueError, match="weight and bias must be float32 or of x's dtype"):
        _C.CausalConv([64, 64, 0, 0], [1, 1, 1], [1, 2, 3, 4], 0, 2, [0, 2], True, 1)


def test_an_update_skips_the_index_minus_one(backend):
    x, weight, bias, _ = inputs(4, 37, 2)
    for tokens in (x, x[..., 0]):
        cache = torch.randn(6, 37, 5)
        before, index = cache.clone(), torch.tensor([-1, 4, -1, 0])
        expected = pyrepr.causal_conv1d_update(tokens[[1, 3]], cache[[4, 0]], weight, bias, "silu")
        out = pyrepr.causal_conv1d_update(tokens, cache, weight, bias, "silu", conv_state_indices=index)
        assert not out[[0, 2]].any()
        torch.testing.assert_close(out[[1, 3]], expected)
        assert torch.equal(cache[[1, 2, 3, 5]], before[[1, 2, 3, 5]]) and not torch.equal(cache[[4, 0]], before[[4, 0]])
        cache, lengths = before.clone(), torch.tensor([3, 1, 0, 7])
        out = pyrepr.causal_conv1d_update(tokens, cache, weight, bias, "silu", lengths, index.int())
        alone = before.clone()
        expected = pyrepr.causal_conv1d_update(
            tokens[[1, 3]], alone, weight, bias, "silu", lengths[[1, 3]], torch.tensor([4, 0])
        )
        torch.testing.assert_close(out[[1, 3]], expected)
        assert torch.equal(cache, alone) and not out[[0, 2]].any()
        cache = before.clone()
        skipped = torch.full((4,), -1)
        assert not pyrepr.causal_conv1d_update(tokens, cache, weight, bias, conv_state_indices=skipped).any()
        assert torch.equal(cache, before)
        assert not pyrepr.causal_conv1d_update(tokens, cache[:0], weight, conv_state_indices=skipped).any()


@pytest.mark.parametrize("tokens", [(3,), (3, 1), (3, 2)])
def test_a_state_that_shares_memory_is_refused_or_kept_apart(backend, tokens):
    x, weight = torch.randn(2, *tokens), torch.randn(3, 4)
    for state in (torch.zeros(1, 3, 4).expand(2, 3, 4), torch.zeros(30).as_strided((2, 3, 4), (3, 3, 1))):
        with pytest.raises(ValueError, match="conv_state is written in place, so its elements must not share memory"):
            pyrepr.causal_conv1d_update(x, state, weight)
    # x within the state: read before the state is written.
    memory = torch.randn(2, 3, 6)
    state, inside = memory[..., :4], memory[..., 2 : 2 + (tokens[1] if len(tokens) > 1 else 1)]
    inside = inside if len(tokens) > 1 else inside[..., 0]
    alone = state.clone()
    expected = pyrepr.causal_conv1d_update(inside.clone(), alone, weight)
    assert torch.equal(pyrepr.causal_conv1d_update(inside, state, weight), expected)
    assert torch.equal(state, alone)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_state_indices": torch.tensor([0, 0])}, "conv_state_indices must name a row of conv_state once at most"),
        ({"conv_state_indices": torch.tensor([0, -2])}, "conv_state_indices must be from -1 to 4, the rows"),
        ({"conv_state_indices": torch.tensor([5, 0])}, "conv_state_indices must be from -1 to 4, the rows"),
        (
            {"conv_state_indices": torch.tensor([3, 0]), "cache_seqlens": torch.tensor([0, -1])},
            "cache_seqlens must not be negative",
        ),
    ],
)
def test_places_of_an_update_are_checked_before_anything_is_written(backend, change, words):
    state = torch.randn(5, 3, 4)
    before = state.clone()
    with pytest.raises(ValueError, match=words):
        pyrepr.causal_conv1d_update(torch.randn(2, 3), state, torch.randn(3, 4), **change)
    assert torch.equal(state, before)
    compiled = torch.compile(pyrepr.causal_conv1d_update, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=words):
        compiled(torch.randn(2, 3), state, torch.randn(3, 4), **change)
    assert torch.equal(state, before)


def test_tokens_of_no_sequence_yield_zero_and_get_no_gradient(backend):
    x, weight, bias, _ = inputs(2, 37, 9)
    seq_idx = torch.tensor([[0, 0, -1, 1, 1, 1, -1, -2, 2], [-1, -1, 0, 0, 0, -1, 0, 0, -3]])
    x[:, :, 2][0] = float("nan")  # what stands in padding is not read
    kept = (seq_idx >= 0)[:, None].expand_as(x)
    weights = torch.randn(x.shape, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = pyrepr.causal_conv1d_fn(*leaves, seq_idx, activation="silu")
    assert not out[~kept].any()
    grads = torch.autograd.grad((out.double() * weights).sum(), leaves)
    assert not grads[0][~kept].any()
    # Each run alone.
    alone = [t.clone().requires_grad_() for t in (x, weight, bias)]
    total = 0
    for row, start, stop in ((0, 0, 2), (0, 3, 6), (0, 8, 9), (1, 2, 5), (1, 6, 8)):
        part = pyrepr.causal_conv1d_fn(alone[0][row : row + 1, :, start:stop], *alone[1:], activation="silu")
        torch.testing.assert_close(out[row : row + 1, :, start:stop], part)
        total = total + (part.double() * weights[row : row + 1, :, start:stop]).sum()
    for a, b in zip(grads, torch.autograd.grad(total, alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(pyrepr.causal_conv1d_fn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias, seq_idx, activation="silu"), out)


@pytest.mark.parametrize("which", ["x", "conv_state", "weight", "bias"])
@pytest.mark.parametrize("tokens", [(3,), (3, 2)])
def test_tensors_without_memory(which, tokens):
    """Zeros that torch keeps without memory are zeros, and a freed storage is refused, both the short way and long."""
    given = {
        "x": torch.randn(2, *tokens),
        "conv_state": torch.randn(2, 3, 4),
        "weight": torch.randn(3, 4),
        "bias": torch.randn(3),
    }
    zeros = given | {which: torch.zeros_like(given[which])}
    expected = pyrepr.causal_conv1d_update(**{name: t.clone() for name, t in zeros.items()})
    if which != "conv_state":
        assert torch.equal(
            pyrepr.causal_conv1d_update(**given | {which: torch._efficientzerotensor(given[which].shape)}), expected
        )
    size = given[which].untyped_storage().nbytes()
    given[which].untyped_storage().resize_(0)
    try:
        with pytest.raises((ValueError, RuntimeError), match=r"has no memory|out of bounds for storage"):
            pyrepr.causal_conv1d_update(**given)
    finally:
        given[which].untyped_storage().resize_(size)  # a failing test prints it
