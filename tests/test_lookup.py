"""Family `lookup`: the functions against a float64 oracle with an explicit softmax over all corners."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import pyrepr
from pyrepr.ops import lookup as ops
from pyrepr.reference import lookup as reference

BACKENDS = ("reference", "cpu")
LEVELS = pyrepr.backend.native()[0].simd_levels()

# Largest relative error of a float32 result (norm of the error over norm of the truth) over every case of this file was
# 2.4e-7 for the sums and 4e-7 for gradients; a bound of 1e-6 holds for all.
FLOAT32 = 1e-6
# For int8 tables and many tokens weights are rounded to 16 bits of the token's largest: 2.4e-5 was the worst seen.
BYTES = 5e-5
# Half a unit in the last place of the result's dtype, relative to the norm.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def corners(bits: int) -> torch.Tensor:
    """[2^bits, bits] of ±1; row c holds the signs that code c stands for."""
    c = torch.arange(1 << bits)
    return torch.stack([((c >> i) & 1) * 2.0 - 1 for i in range(bits)], 1).double()


def oracle(x: torch.Tensor, tables: torch.Tensor, weighting: str, temperature: float) -> torch.Tensor:
    """The layer in float64, its probability as a softmax over all corners, its code as that softmax's argmax."""
    k, n, _ = tables.shape
    bits = n.bit_length() - 1
    z = x.double().reshape(len(x), k, bits)
    logits = z @ corners(bits).T / temperature
    p, code = logits.softmax(-1).max(-1)
    size = z.abs().sum(-1)
    w = {"probability": p, "scaled": p * size, "l1": size / bits, "none": torch.ones_like(p)}[weighting]
    return (w[..., None] * tables.double()[torch.arange(k), code]).sum(1)


def away_from_zero(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return (x + 0.05 * x.sign()).to(dtype)


@pytest.mark.levels
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("bits", [1, 3, 4, 6])
def test_every_route_equals_the_softmax_over_corners(bits, weighting):
    for (count, h, k), temperature in itertools.product([(1, 5, 3), (63, 64, 8), (65, 131, 17)], [1.0, 0.4]):
        x, tables = away_from_zero(count, k * bits), torch.randn(k, 1 << bits, h)
        truth = oracle(x, tables, weighting, temperature)
        options = {"weighting": weighting, "temperature": temperature}
        assert relative(reference.lookup_linear(x.double(), tables.double(), **options), truth) < 1e-14
        for route in ops.ROUTES.values():
            out = ops.linear_op(x, tables, None, None, weighting, temperature, route)
            assert relative(out, truth) < FLOAT32, (count, h, k, temperature, route)


@pytest.mark.levels
@pytest.mark.parametrize("bits", range(1, 17))
def test_all_bits_forward_and_backward(bits):
    k, h, count = 3, 10, 40
    x, tables, grad = away_from_zero(count, k * bits), torch.randn(k, 1 << bits, h), torch.randn(count, h)
    leaves = [x.clone().requires_grad_(), tables.clone().requires_grad_()]
    out = pyrepr.lookup_linear(*leaves)
    out.backward(grad)
    truth = [x.double().requires_grad_(), tables.double().requires_grad_()]
    expected = reference.lookup_linear(*truth)
    expected.backward(grad.double())
    assert relative(out, expected) < FLOAT32
    for leaf, true in zip(leaves, truth, strict=True):
        assert relative(leaf.grad, true.grad) < FLOAT32


def two_bit_oracle(x: torch.Tensor, tables: torch.Tensor, weighting: str) -> torch.Tensor:
    """The layer in float64: its code is that of z and |z| − 1, in turn, with twice the elements and one bit each."""
    k, n, _ = tables.shape
    z = x.double().reshape(len(x), k, -1)
    code = reference.hash_codes(torch.stack([z, z.abs() - 1], -1).reshape(len(x), -1), n.bit_length() - 1).long()
    p, size = torch.sigmoid(2 * z.abs()).prod(-1), z.abs().sum(-1)
    w = {"probability": p, "scaled": p * size, "l1": size / z.shape[-1], "none": torch.ones_like(p)}[weighting]
    return (w[..., None] * tables.double()[torch.arange(k), code]).sum(1)


@pytest.mark.levels
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_two_bits_on_every_route(bits, weighting):
    for count, h, k in [(1, 5, 3), (63, 64, 8), (65, 131, 17)]:
        x, tables, bias = torch.randn(count, k * bits // 2), torch.randn(k, 1 << bits, h), torch.randn(h)
        truth = two_bit_oracle(x, tables, weighting) + bias
        options = {"weighting": weighting, "hash": "two_bit"}
        exact = reference.lookup_linear(x.double(), tables.double(), bias.double(), **options)
        assert relative(exact, truth) < 1e-14
        for route in ops.ROUTES.values():
            out = ops.linear_op(x, tables, None, bias, weighting, 1.0, route, False, "two_bit")
            assert relative(out, truth) < FLOAT32, (count, h, k, route)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_of_two_bits_equal_the_reference_bit_for_bit(dtype):
    """Of standardised input too, also where z is on the edge of a code: nobody rounds in another way."""
    x = torch.randn(40, 240, dtype=torch.float64)
    centre, scale = torch.randn(240, dtype=torch.float64), torch.rand(240, dtype=torch.float64) + 0.5
    x[:20] = centre + x[:20].sign() / scale
    x[0, :5] = torch.tensor([1.0, -1.0, torch.nan, torch.inf, -torch.inf])
    x, (centre, scale) = x.to(dtype), (t if dtype == torch.float64 else t.float() for t in (centre, scale))
    for bits in (2, 4, 6, 8, 10, 16):
        assert torch.equal(pyrepr.hash_codes(x, bits, hash="two_bit"), reference.hash_codes(x, bits, "two_bit"))
        for hash in reference.HASHES:
            options = (x, bits, "none", 1.0, hash, centre, scale)
            assert torch.equal(ops.hash_op(*options)[0], reference.hash_op(*options)[0])
    with pytest.raises(ValueError, match="bits must be even with the two_bit hash, got 3"):
        pyrepr.hash_codes(x, 3, hash="two_bit")


def converted_problem(count: int, bits: int, h: int, rank: int, hash: str, dtype: torch.dtype = torch.float32):
    """x [count, d] and what a converted layer has, with every z away from where its code changes."""
    d = 9 * bits // reference.HASHES[hash]
    centre, scale = torch.randn(d), torch.rand(d) + 0.5
    down, up = (torch.randn(rank, d) / d, torch.randn(rank, h)) if rank else (None, None)
    x = torch.randn(4 * count + 40, d).to(dtype)
    rest, _ = reference.without_low_rank(x.double(), None if down is None else down.double())
    z = reference.standardised(rest, centre.double(), scale.double())
    clear = ((z.abs() > 1e-5) & ((z.abs() - 1).abs() > 1e-5)).all(1)
    return x[clear][:count], {"centre": centre, "scale": scale, "down": down, "up": up}


@pytest.mark.levels
@pytest.mark.parametrize("hash", reference.HASHES)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_converted_layers_in_one_call(table_dtype, hash):
    """Every kernel with and without a low-rank part, for sizes that are no multiples of anything, and packed tables."""
    for count, bits, h, rank in [
        (1, 4, 70, 3),
        (1, 8, 64, 0),
        (7, 6, 33, 5),
        (35, 8, 131, 17),
        (70, 4, 64, 9),
        (700, 8, 128, 6),
    ]:
        for x_dtype in (torch.float32, torch.bfloat16):
            x, given = converted_problem(count, bits, h, rank, hash, x_dtype)
            tables, scales, bias = torch.randn(9, 1 << bits, h).to(table_dtype), None, torch.randn(h)
            if table_dtype == torch.int8:
                tables, scales = int8_tables(9, 1 << bits, h)
            wide = tables.double() if scales is None else tables.double() * scales.double()[..., None]
            exact = {name: None if t is None else t.double() for name, t in given.items()}
            options = {"weighting": "l1", "hash": hash}
            truth = reference.lookup_linear(x.double(), wide, bias.double(), **options, **exact)
            tolerance = (BYTES if table_dtype == torch.int8 else FLOAT32) + ROUNDING.get(x_dtype, 0)
            for route in ops.ROUTES.values():
                arguments = (x, tables, scales, bias, *given.values(), "l1", 1.0, route, False, hash)
                assert relative(ops.converted_op(*arguments), truth) < tolerance, (count, route)
            out = pyrepr.lookup_linear(x, tables, bias, scales=scales, **options, **given)
            assert relative(out, truth) < tolerance
            if h % 64 == 0:
                packed = pyrepr.lookup_linear(x, pyrepr.pack_tables(tables), bias, scales=scales, **options, **given)
                assert relative(packed, truth) < tolerance


@pytest.mark.levels
def test_a_converted_layer_has_the_same_bits_on_any_number_of_threads():
    x, given = converted_problem(300, 8, 300, 20, "two_bit")
    tables, scales = int8_tables(9, 256, 300)
    outs = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        outs.append(pyrepr.lookup_linear(x, tables, scales=scales, hash="two_bit", **given))
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_converted_layer_in_float64_and_its_first_derivatives():
    for hash in reference.HASHES:
        x, given = converted_problem(40, 6, 13, 4, hash)
        tables, bias, grad = torch.randn(9, 64, 13), torch.randn(13), torch.randn(40, 13)
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, FLOAT32)):
            constants = {name: given[name].to(dtype) for name in ("centre", "scale")}
            given_leaves = (x, tables, bias, given["down"], given["up"])
            leaves = [t.detach().clone().to(dtype).requires_grad_() for t in given_leaves]
            true = [t.detach().double().requires_grad_() for t in given_leaves]
            options = {"weighting": "scaled", "hash": hash}
            out = pyrepr.lookup_linear(*leaves[:3], down=leaves[3], up=leaves[4], **constants, **options)
            out.backward(grad.to(dtype))
            wide = {name: given[name].double() for name in ("centre", "scale")}
            expected = reference.lookup_linear(*true[:3], down=true[3], up=true[4], **wide, **options)
            expected.backward(grad.double())
            assert relative(out, expected) < tolerance
            for leaf, truth in zip(leaves, true, strict=True):
                assert relative(leaf.grad, truth.grad) < 3 * tolerance


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hash": "three_bit"}, ValueError, "hash must be one of one_bit, two_bit, got 'three_bit'"),
        ({"hash": None}, ValueError, "hash must be one of one_bit, two_bit, got None"),
        ({"hash": "two_bit"}, ValueError, r"bits must be even with the two_bit hash, got 3"),
        ({"centre": torch.zeros(6)}, ValueError, "centre and scale go together, got centre alone"),
        ({"up": torch.zeros(2, 5)}, ValueError, "up and down go together, got up alone"),
        ({"centre": torch.zeros(6), "scale": torch.ones(5)}, ValueError, r"scale must have shape \[d\]"),
        ({"down": torch.ones(2, 6), "up": torch.ones(3, 5)}, ValueError, r"up must have shape \[rank, h\]"),
        ({"down": torch.ones(2, 5), "up": torch.ones(2, 5)}, ValueError, r"down must have shape \[rank, d\]"),
        (
            {"centre": torch.zeros(6).double(), "scale": torch.ones(6)},
            TypeError,
            "centre must be float64 only where x is",
        ),
        ({"centre": 0.0, "scale": torch.ones(6)}, TypeError, "centre must be a torch.Tensor"),
        ({"centre": torch.zeros(6), "scale": torch.ones(6, device="meta")}, ValueError, "scale"),
    ],
)
def test_what_converted_layers_cannot_have_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        pyrepr.lookup_linear(torch.randn(3, 6), torch.randn(2, 8, 5), **options)


@pytest.mark.parametrize("count", [0, 1, 2, 64, 300, 8193])
def test_sizes_of_a_batch(count):
    """Both forward kernels, their crossover, and more tokens than are hashed at a time."""
    x, tables, bias = away_from_zero(count, 24), torch.randn(6, 16, 70), torch.randn(70)
    out = pyrepr.lookup_linear(x, tables, bias, weighting="scaled")
    assert out.shape == (count, 70)
    truth = reference.lookup_linear(x.double(), tables.double(), bias.double(), weighting="scaled")
    assert relative(out, truth) < FLOAT32


def int8_tables(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[:2]) + 0.5


@pytest.mark.levels
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_dtypes(x_dtype, table_dtype):
    """Sums in float32 whatever is stored: only the result's own rounding is seen, also over 512 tables."""
    x = away_from_zero(33, 512 * 4, dtype=x_dtype)
    tables, scales = int8_tables(512, 16, 77)
    if table_dtype != torch.int8:
        tables, scales = torch.randn(512, 16, 77).to(table_dtype), None
    wide = tables.double() if scales is None else tables.double() * scales.double()[..., None]
    truth = reference.lookup_linear(x.double(), wide, weighting="l1")
    for route in ops.ROUTES.values():
        out = ops.linear_op(x, tables, scales, None, "l1", 1.0, route)
        assert out.dtype == x_dtype
        exact = BYTES if table_dtype == torch.int8 and route != ops.ROUTES["rows"] else FLOAT32
        assert relative(out, truth) < exact + ROUNDING.get(x_dtype, 0)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("k", "h"), [(3, 130), (37, 333), (64, 512)])
def test_many_gathered_tokens_give_the_bits_of_one(k, h, dtype):
    """Many tokens are added slab by slab of columns, one token row by row: the same sums in the same order."""
    x = torch.randn(21, k * 4)
    tables, scales = torch.randn(k, 16, h).to(dtype), None
    if dtype == torch.int8:
        tables, scales = int8_tables(k, 16, h)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_op(x, tables, scales, None, "probability", 1.0, ops.ROUTES["rows"])

    assert torch.equal(rows(x), torch.cat([rows(token[None]) for token in x]))


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8])
def test_packed_tables_give_the_same_bits(dtype):
    """Every kernel adds in the order of the tables, whatever order they stand in."""
    for bits, k, h in [(8, 5, 192), (3, 20, 64)]:
        tables, scales = torch.randn(k, 1 << bits, h).to(dtype), None
        if dtype == torch.int8:
            tables, scales = int8_tables(k, 1 << bits, h)
        bias = torch.randn(h, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        packed = pyrepr.pack_tables(tables)
        assert packed.shape == (h // 64, k, 1 << bits, 64)
        for count in (1, 40, 300):
            x = away_from_zero(count, k * bits, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            plain = ops.linear_op(x, tables, scales, bias, "scaled", 1.0, ops.ROUTES["rows"])
            for route in (ops.ROUTES["rows"], ops.ROUTES["stream"]):
                outs = [ops.linear_op(x, t, scales, bias, "scaled", 1.0, route) for t in (packed, tables)]
                assert torch.equal(*outs)
                if dtype == torch.int8 and route == ops.ROUTES["stream"]:
                    assert relative(outs[0], plain) < BYTES
                else:
                    assert torch.equal(outs[0], plain)
            with pyrepr.use_backend("reference"):
                assert (
                    relative(pyrepr.lookup_linear(x, packed, bias, weighting="scaled", scales=scales), plain) < FLOAT32
                )


def test_packed_tables_in_the_other_functions():
    """The sum takes them; the gradient to x goes through them; they have none themselves."""
    x, tables, grad = away_from_zero(20, 24).requires_grad_(), torch.randn(3, 256, 64), torch.randn(20, 64)
    packed, codes, weights = pyrepr.pack_tables(tables), torch.randint(0, 256, (20, 3)), torch.rand(20, 3)
    assert torch.equal(pyrepr.lookup_sum(codes, weights, packed), pyrepr.lookup_sum(codes, weights, tables))
    gradients = [torch.autograd.grad(pyrepr.lookup_linear(x, t), x, grad)[0] for t in (tables, packed)]
    assert torch.equal(*gradients)
    with pytest.raises(ValueError, match="must not require a gradient"):
        pyrepr.lookup_linear(x, packed.requires_grad_())
    with pytest.raises(ValueError, match="h a multiple of 64, got"):
        pyrepr.pack_tables(tables[:, :, :63])


@pytest.mark.levels
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lookup_in_registers(bits, weighting):
    """Against float64, for sizes that are no multiples of anything; special tokens take the other kernel."""
    for count, k, h in [(64, 1, 5), (65, 37, 64), (300, 9, 131)]:
        x, bias = away_from_zero(count, k * bits), torch.randn(h)
        tables, scales = int8_tables(k, 1 << bits, h)
        x[7, 0], x[9], x[11, -1] = float("nan"), 0, 1e30
        out = ops.linear_op(x, tables, scales, bias, weighting, 1.0, ops.ROUTES["registers"])
        wide = tables.double() * scales.double()[..., None]
        truth = reference.lookup_linear(x.double(), wide, bias.double(), weighting=weighting)
        assert out[7].isnan().all()
        for token in (9, 11):
            assert_close(out[token].double(), truth[token], rtol=1e-4, atol=1e-4 * truth[token].abs().max().item())
        ordinary = torch.ones(count, dtype=torch.bool).index_fill_(0, torch.tensor([7, 9, 11]), False)
        assert relative(out[ordinary], truth[ordinary]) < BYTES
        assert (
            relative(
                ops.linear_op(x[ordinary], tables, -scales, bias, weighting, 1.0, 3) - bias, bias - truth[ordinary]
            )
            < BYTES
        )


@pytest.mark.levels
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_rows_gathered_as_bytes(weighting):
    """More tables than a visit takes, rows that end within a tile, packed or not; the same bits for any threads."""
    for count, k, h in [(9, 1, 200), (8, 300, 131), (17, 37, 2304), (12, 270, 192)]:
        x, bias = away_from_zero(count, k * 8), torch.randn(h)
        tables, scales = int8_tables(k, 256, h)
        x[7, 0] = float("nan")
        wide = tables.double() * scales.double()[..., None]
        truth = reference.lookup_linear(x.double(), wide, bias.double(), weighting=weighting)
        for stored in (tables, pyrepr.pack_tables(tables)) if h % 64 == 0 else (tables,):
            before, outs = torch.get_num_threads(), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                outs.append(ops.linear_op(x, stored, scales, bias, weighting, 1.0, ops.ROUTES["bytes"]))
            torch.set_num_threads(before)
            out = outs[0]
            assert out[7].isnan().all()
            assert relative(out[:7], truth[:7]) < BYTES
            assert all(torch.equal(out.nan_to_num(), other.nan_to_num()) for other in outs)


def test_gradient_written_past_the_caches():
    """A gradient above 32 MiB takes the streaming stores, zero rows included."""
    x, grad = away_from_zero(30, 80), torch.randn(30, 4096)
    tables = torch.zeros(10, 256, 4096, requires_grad=True)
    pyrepr.lookup_linear(x, tables, weighting="l1").backward(grad)
    assert tables.grad.numel() * 4 > 32 << 20
    truth = reference.segment_sum(
        grad.double(), reference.hash_codes(x, 8), 256, reference.weights(x.double(), 8, "l1")
    )
    assert relative(tables.grad, truth) < FLOAT32
    assert torch.equal(tables.grad == 0, truth == 0)


def test_memory_of_a_large_gradient_is_used_again_once_it_is_free():
    x, tables = away_from_zero(30, 80), torch.zeros(10, 256, 4096, requires_grad=True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(pyrepr.lookup_linear(x, tables), tables, torch.randn(30, 4096))[0]

    first = gradient()
    copy, second = first.clone(), gradient()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, copy)
    address, part = second.data_ptr(), first[1]
    del second, first
    if sys.platform == "linux":
        assert gradient().data_ptr() == address
    assert gradient().data_ptr() != part.data_ptr() - 256 * 4096 * 4  # a view keeps its memory
    assert torch.equal(part, copy[1])


def test_float64_stays_float64():
    x, tables, bias = (t.double() for t in (away_from_zero(50, 40), torch.randn(5, 256, 31), torch.randn(31)))
    for route in ops.ROUTES.values():
        out = ops.linear_op(x, tables, None, bias, "scaled", 0.7, route)
        assert relative(out, oracle(x, tables, "scaled", 0.7) + bias) < 1e-14


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_gradcheck(weighting):
    x = away_from_zero(5, 8, dtype=torch.float64).requires_grad_()
    tables = torch.randn(2, 16, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def layer(x, tables, bias):
        return pyrepr.lookup_linear(x, tables, bias, weighting=weighting, temperature=0.8)

    assert torch.autograd.gradcheck(layer, (x, tables, bias))


def test_gradcheck_of_the_two_sums():
    codes = torch.randint(0, 7, (5, 3))
    weights = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    tables = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, t: pyrepr.lookup_sum(codes, w, t), (weights, tables))
    assert torch.autograd.gradcheck(lambda v, w: pyrepr.segment_sum(v, codes, 7, weights=w), (values, weights))


@pytest.mark.parametrize("wanted", ["x", "tables", "bias"])
def test_gradient_of_one_argument_alone(wanted):
    arguments = {"x": away_from_zero(70, 24), "tables": torch.randn(3, 256, 65), "bias": torch.randn(65)}
    arguments[wanted].requires_grad_()
    grad = torch.randn(65, 70).T  # not contiguous
    pyrepr.lookup_linear(*arguments.values()).backward(grad)
    true = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in arguments.items()}
    reference.lookup_linear(*true.values()).backward(grad.double())
    assert relative(arguments[wanted].grad, true[wanted].grad) < FLOAT32
    assert all(t.grad is None for name, t in arguments.items() if name != wanted)


def test_sum_and_segments_are_adjoint():
    codes, weights = torch.randint(0, 100, (80, 9)), torch.randn(80, 9, dtype=torch.float64)
    tables, values = torch.randn(9, 100, 33, dtype=torch.float64), torch.randn(80, 33, dtype=torch.float64)
    left = (pyrepr.lookup_sum(codes, weights, tables) * values).sum()
    right = (pyrepr.segment_sum(values, codes, 100, weights=weights) * tables).sum()
    assert_close(left, right, rtol=1e-13, atol=0)


def test_segment_sum_is_class_sums():
    values, labels = torch.randn(4, 25, 130), torch.randint(0, 10, (4, 25), dtype=torch.uint8)
    sums = pyrepr.segment_sum(values, labels, 12)
    truth = torch.stack([values[labels == c].double().sum(0) for c in range(12)])
    assert sums.shape == (12, 130)
    assert_close(sums.double(), truth, rtol=1e-5, atol=1e-6)


def test_sign_linear_tables_reproduce_the_sign_layer_exactly():
    """Tables of W·s over the corners s give W·sign(z), without rounding where W holds small integers."""
    bits, k, h = 6, 8, 40
    w = torch.randint(-9, 10, (h, k * bits)).float()
    tables = torch.einsum("ci,hki->kch", corners(bits).float(), w.unflatten(1, (k, bits)))
    for count in (1, 100):
        x = away_from_zero(count, k * bits)
        assert torch.equal(pyrepr.lookup_linear(x, tables.contiguous(), weighting="none"), x.sign() @ w.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_of_special_values(backend):
    inf, nan, tiny = float("inf"), float("nan"), 1e-44
    x = torch.tensor([[0.0, -0.0, tiny, -tiny], [inf, -inf, nan, 1.0], [0.0, 0.0, 0.0, 0.0]])
    with pyrepr.use_backend(backend):
        assert pyrepr.hash_codes(x, 4)[:, 0].tolist() == [0b0111, 0b1001, 0b1111]
        assert pyrepr.hash_codes(x, 2).tolist() == [[0b11, 0b01], [0b01, 0b10], [0b11, 0b11]]


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_equal_the_reference_bit_for_bit(dtype):
    x = torch.randn(5, 7, 240).to(dtype)
    x[:, 0] = 0
    for bits in (1, 2, 3, 5, 8, 12, 15, 16):
        codes = pyrepr.hash_codes(x, bits)
        assert codes.dtype == torch.int32
        assert torch.equal(codes, reference.hash_codes(x, bits))


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spoils_its_token_and_no_other(backend, weighting):
    x, tables = away_from_zero(70, 32), torch.randn(4, 256, 20)
    x[3, 9] = float("nan")
    with pyrepr.use_backend(backend):
        out = pyrepr.lookup_linear(x, tables, weighting=weighting)
    assert out[3].isnan().all()
    assert out.isnan().sum() == 20


def test_infinity_is_a_certain_bit():
    x = away_from_zero(3, 16)
    big = x.clone()
    big[0] = x[0] * float("inf")
    tables = torch.randn(2, 256, 20)
    expected = tables[torch.arange(2), reference.hash_codes(x[0], 8).long()].sum(0)
    assert_close(pyrepr.lookup_linear(big, tables)[0], expected)  # p = 1


def test_all_zero_token_takes_the_last_row():
    tables = torch.randn(3, 16, 5)
    out = pyrepr.lookup_linear(torch.zeros(2, 12), tables)
    assert_close(out, (tables[:, 15].sum(0) / 16).expand(2, 5))
    assert torch.equal(pyrepr.lookup_linear(torch.zeros(2, 12), tables, weighting="l1"), torch.zeros(2, 5))


def test_any_layout_gives_the_same_bits():
    x, tables = torch.randn(2, 48, 30, 3), torch.randn(16, 8, 11)
    moved = x.permute(0, 3, 2, 1)  # [2, 3, 30, 48], last axis strided
    strided = torch.randn(11, 8, 16).permute(2, 1, 0).copy_(tables)
    expected = pyrepr.lookup_linear(moved.contiguous(), tables)
    assert torch.equal(pyrepr.lookup_linear(moved, strided), expected)
    expanded = torch.randn(1, 48).expand(40, 48)
    assert torch.equal(pyrepr.lookup_linear(expanded, tables), pyrepr.lookup_linear(expanded.contiguous(), tables))
    negative = torch._neg_view(x)  # lazily negated
    assert torch.equal(pyrepr.hash_codes(negative.permute(0, 3, 2, 1), 3), reference.hash_codes(-moved, 3))


@pytest.mark.parametrize("case", ["uniform", "one bucket", "zipf"])
def test_skewed_codes(case):
    n, count = 256, 700
    if case == "one bucket":
        codes = torch.full((count, 5), 77)
    elif case == "zipf":
        codes = torch.multinomial(1 / torch.arange(1.0, n + 1), count * 5, replacement=True).view(count, 5)
    else:
        codes = torch.randint(0, n, (count, 5))
    weights, tables = torch.randn(count, 5, requires_grad=True), torch.randn(5, n, 90, requires_grad=True)
    out, grad = pyrepr.lookup_sum(codes, weights, tables), torch.randn(count, 90)
    out.backward(grad)
    true_weights, true_tables = (t.detach().double().requires_grad_() for t in (weights, tables))
    truth = reference.lookup_sum(codes, true_weights, true_tables)
    truth.backward(grad.double())
    assert relative(out, truth) < FLOAT32
    assert relative(weights.grad, true_weights.grad) < FLOAT32
    assert relative(tables.grad, true_tables.grad) < FLOAT32


def test_same_bits_on_any_number_of_threads():
    def everything(count):
        x, tables = torch.randn(count, 80), torch.randn(10, 256, 200)
        leaves = x.requires_grad_(), tables.requires_grad_()
        out = pyrepr.lookup_linear(*leaves)
        out.backward(torch.randn(count, 200))
        return out, leaves[0].grad, leaves[1].grad

    before = torch.get_num_threads()
    try:
        for count in (1, 5, 400):
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                torch.manual_seed(1)
                results.append(everything(count))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_sparse_gradient_equals_the_dense_one_and_trains():
    x, grad = torch.randn(20, 32), 1 + torch.rand(20, 12)  # far above Adam's epsilon, which the two place differently
    dense, sparse = (torch.nn.Parameter(torch.zeros(4, 256, 12)) for _ in range(2))
    optimizers = torch.optim.Adam([dense], 0.1), torch.optim.SparseAdam([sparse], 0.1)
    for table, is_sparse, optimizer in zip((dense, sparse), (False, True), optimizers, strict=True):
        pyrepr.lookup_linear(x, table, weighting="none", sparse=is_sparse).backward(grad)
        assert table.grad.is_sparse == is_sparse
        optimizer.step()
    assert torch.equal(sparse.grad.to_dense(), dense.grad)
    occurring = reference.hash_codes(x, 8).add(256 * torch.arange(4)).unique()
    assert sparse.grad.coalesce().values().shape == (occurring.numel(), 12)
    assert_close(sparse, dense)  # Adam's first step
    assert sparse.detach().abs().sum() > 0


def test_last_row_of_more_than_2_31_table_elements():
    """int8, and zeros nobody touches: the tables take address space, not memory."""
    k, n, h = 2, 1 << 16, 16400
    tables = torch.from_numpy(np.zeros((k, n, h), np.int8))  # numpy leaves the pages to be zeroed when first touched
    assert tables.numel() > 2**31
    tables[1, n - 1] = torch.arange(h).to(torch.int8)
    codes = torch.full((1, k), n - 1)
    out = ops.sum_op(codes.int(), torch.ones(1, k), tables, torch.ones(k, n), ops.ROUTES["rows"])
    assert torch.equal(out[0], tables[1, n - 1].float())
    dots = ops.backward_op(out, codes.int(), torch.ones(1, k), tables, torch.ones(k, n), n, None, False)[1]
    assert_close(dots[0, 1].double(), tables[1, n - 1].double().square().sum(), rtol=1e-6, atol=0)
