"""Triton kernels of family `lookup` against the reference in float64, interpreted on the CPU.

Sums in float32 were wrong by at most 3e-7 of their norm here, hence FLOAT32. A 16-bit result adds its own rounding, and
so do weights that the tensor cores take in 16 bits; the interpreter cuts bfloat16 off instead of rounding it, which
doubles that.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from pyrepr.kernels.lookup import _forward as kernels

import pyrepr
from pyrepr.ops import lookup as ops
from pyrepr.reference import lookup as reference

FLOAT32 = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-11}
F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    assert x.shape == truth.shape
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def problem(tokens: int, k: int, bits: int, h: int, x_dtype=F32, table_dtype=F32):
    """x, tables, scales (None but for int8) and the tables in float64."""
    x = torch.randn(tokens, k * bits)
    x = (x + 0.05 * x.sign()).to(x_dtype)
    if table_dtype != I8:
        tables = torch.randn(k, 1 << bits, h).to(table_dtype)
        return x, tables, None, tables.double()
    tables, scales = torch.randint(-127, 128, (k, 1 << bits, h), dtype=I8), torch.rand(k, 1 << bits) + 0.5
    return x, tables, scales, tables.double() * scales.double()[..., None]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_codes_are_the_cpus_bit_for_bit(dtype):
    x = torch.randn(9, 240).to(dtype)
    x[0] = 0
    x[1, ::2] = -0.0
    tiny = 1e-30 if dtype == BF16 else 1e-40  # the interpreter makes 0 of bfloat16's subnormal numbers
    x[2, :6] = torch.tensor([float("inf"), -float("inf"), float("nan"), tiny, -tiny, 1.0]).to(dtype)
    for bits in (1, 2, 3, 5, 8, 12, 15, 16):
        codes = pyrepr.hash_codes(x, bits)
        assert torch.equal(codes, reference.hash_codes(x, bits))
        with pyrepr.use_backend("cpu"):
            assert torch.equal(codes, pyrepr.hash_codes(x, bits))
    x[3, :5] = torch.tensor([1.0, -1.0, 0.999, -0.999, 0.0]).to(dtype)
    for bits in (2, 4, 6, 8, 10, 16):
        codes = pyrepr.hash_codes(x, bits, hash="two_bit")
        assert torch.equal(codes, reference.hash_codes(x, bits, "two_bit"))


def test_standardised_codes_are_the_cpus_bit_for_bit():
    """Also where z is close to where a code changes: no backend rounds in another way."""
    centre, scale = torch.randn(240), torch.rand(240) + 0.5
    x = centre + torch.randn(300, 240).sign() / scale  # z is ±1 up to its rounding
    x[::3] = centre
    options = (8, "none", 1.0, "two_bit", centre, scale)
    codes, _ = ops.hash_op(x, *options)
    assert 0.1 < (codes & 2 > 0).float().mean() < 0.9
    assert torch.equal(codes, reference.hash_op(x, *options)[0])
    with pyrepr.use_backend("cpu"):
        assert torch.equal(codes, ops.hash_op(x, *options)[0])


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_weights_and_their_gradient(weighting):
    for bits, temperature in itertools.product((1, 4, 7, 16), (1.0, 0.4)):
        x, grad = problem(5, 3, bits, 1)[0], torch.randn(5, 3)
        _, weights = ops.hash_op(x, bits, weighting, temperature)
        assert relative(weights, reference.weights(x.double(), bits, weighting, temperature)) < FLOAT32
        slope = ops.hash_backward_op(x, grad, bits, weighting, temperature)
        truth = reference.hash_backward_op(x.double(), grad.double(), bits, weighting, temperature)
        assert relative(slope, truth) < FLOAT32
    for dtype in (BF16, F16):
        x = x.to(dtype)
        slope = ops.hash_backward_op(x, grad, bits, weighting, 1.0)
        truth = reference.hash_backward_op(x.double(), grad.double(), bits, weighting, 1.0)
        assert slope.dtype == dtype and relative(slope, truth) < FLOAT32 + ROUNDING[dtype]


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_two_bits_and_their_gradient(weighting):
    for bits in (2, 6, 16):
        x, grad = problem(5, 3, bits // 2, 1)[0], torch.randn(5, 3)
        centre, scale = torch.randn(x.shape[1]), torch.rand(x.shape[1]) + 0.5
        options = (bits, weighting, 0.8, "two_bit")
        _, weights = ops.hash_op(x, *options, centre, scale)
        wide = (x.double(), *options, centre.double(), scale.double())
        assert relative(weights, reference.hash_op(*wide)[1]) < FLOAT32
        slope = ops.hash_backward_op(x, grad, *options, centre, scale)
        assert relative(slope, reference.hash_backward_op(wide[0], grad.double(), *wide[1:])) < FLOAT32


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("table_dtype", [F32, BF16, I8])
def test_converted_layers(x_dtype, table_dtype):
    """Few tokens with the hash in the rows kernel, many, and tables for the tensor cores; elements away from jumps."""
    for tokens, k, bits, h, rank in [(2, 33, 6, 131, 0), (2, 33, 6, 131, 3), (65, 3, 4, 64, 2), (260, 3, 6, 24, 2)]:
        x, tables, scales, wide = problem(tokens, k, bits // 2, h, x_dtype, table_dtype)
        tables, scales, wide = (
            None if t is None else t.repeat_interleave(1 << bits // 2, 1) for t in (tables, scales, wide)
        )
        d = x.shape[1]
        centre, scale = torch.randn(d), torch.rand(d) + 0.5
        down, up = (torch.randn(rank, d) / d, torch.randn(rank, h)) if rank else (None, None)
        given = {"centre": centre, "scale": scale, "down": down, "up": up}
        exact = {name: None if t is None else t.double() for name, t in given.items()}
        options = {"weighting": "l1", "hash": "two_bit"}
        z = reference.standardised(
            reference.without_low_rank(x.double(), exact["down"])[0], *map(exact.get, ("centre", "scale"))
        )
        clear = ((z.abs() > 1e-5) & ((z.abs() - 1).abs() > 1e-5)).all(1)
        out = pyrepr.lookup_linear(x, tables, scales=scales, **options, **given)
        truth = reference.lookup_linear(x.double(), wide, **options, **exact)
        assert out.dtype == x_dtype and clear.sum() > 0.9 * tokens
        assert relative(out[clear], truth[clear]) < FLOAT32 + ROUNDING[x_dtype], (tokens, rank)


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("table_dtype", [F32, BF16, F16, I8])
def test_every_forward_kernel(x_dtype, table_dtype):
    """The rows kernel with and without the hash, the stream kernel for odd and even rows, the tensor cores."""
    for tokens, k, bits, h, route in [(2, 33, 5, 131, 1), (2, 33, 5, 131, 2), (65, 3, 4, 64, 0), (65, 3, 4, 64, 2)]:
        x, tables, scales, wide = problem(tokens, k, bits, h, x_dtype, table_dtype)
        bias = torch.randn(h)
        out = ops.linear_op(x, tables, scales, bias, "scaled", 1.0, route)
        truth = reference.lookup_linear(x.double(), wide, bias.double(), weighting="scaled")
        assert out.dtype == x_dtype
        assert relative(out, truth) < FLOAT32 + ROUNDING[x_dtype], (tokens, route)


@pytest.mark.parametrize(("tokens", "weighting"), [(0, "l1"), (1, "scaled"), (63, "none"), (65, "probability")])
def test_forward_and_backward_of_a_batch(tokens, weighting):
    x, tables, _, _ = problem(tokens, 2, 5, 20)
    leaves = [x.requires_grad_(), tables.requires_grad_(), torch.randn(20, requires_grad=True)]
    grad = torch.randn(20, tokens).T
    pyrepr.lookup_linear(*leaves, weighting=weighting, temperature=0.7).backward(grad)
    true = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference.lookup_linear(*true, weighting=weighting, temperature=0.7).backward(grad.double())
    for leaf, expected in zip(leaves, true, strict=True):
        assert relative(leaf.grad, torch.zeros_like(leaf) if expected.grad is None else expected.grad) < FLOAT32


@pytest.mark.parametrize("bits", range(1, 17))
def test_all_bits(bits):
    x, tables, _, wide = problem(2, 2, bits, 3)
    assert relative(pyrepr.lookup_linear(x, tables), reference.lookup_linear(x.double(), wide)) < FLOAT32


@pytest.mark.parametrize("n", [16, 11, 40])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_backward_kernels(n, dtype):
    """Sorted and one-hot segments, dots in both ways, with the gradient in its own dtype; int8 tables."""
    for tokens, k, h in [(65, 9 if n <= 16 else 3, 70), (5, 3, 33)]:
        codes, weights = torch.randint(0, n, (tokens, k), dtype=torch.int32), torch.randn(tokens, k)
        grad = torch.randn(h, tokens).to(dtype).T
        tables = torch.randn(k, n, h).to(dtype)
        segments, dots = ops.backward_op(grad, codes, weights, tables, None, n, None, True)
        truth = reference.backward_op(grad.double(), codes, weights.double(), tables.double(), None, n, None, True)
        rounded = ROUNDING[dtype] if n <= 16 and dtype == BF16 and tokens >= 64 else 0
        assert segments.dtype == dots.dtype == F32
        assert relative(segments, truth[0]) < FLOAT32 + rounded
        assert relative(dots, truth[1]) < FLOAT32
    quantized, scales = torch.randint(-127, 128, (k, n, h), dtype=I8), torch.rand(k, n) + 0.5
    dots = ops.backward_op(grad, codes, weights, quantized, scales, n, None, False)[1]
    truth = reference.backward_op(grad.double(), codes, weights.double(), quantized.double(), scales, n, None, False)
    assert relative(dots, truth[1]) < FLOAT32


def test_sparse_gradient_is_the_dense_ones_rows():
    x, tables, _, _ = problem(20, 4, 5, 12)
    grads = []
    for sparse in (False, True):
        leaf = tables.clone().requires_grad_()
        pyrepr.lookup_linear(x, leaf, weighting="none", sparse=sparse).sum().backward()
        grads.append(leaf.grad)
    assert grads[1].is_sparse and torch.equal(grads[0], grads[1].to_dense())


def test_long_segments_are_shared_out():
    """All tokens have one code of one table: several programs add them up, in a fixed order."""
    values, codes = torch.randn(700, 20), torch.full((700,), 3)
    sums = [pyrepr.segment_sum(values, codes, 5) for _ in range(2)]
    assert torch.equal(*sums)
    assert relative(sums[0][3], values.double().sum(0)) < FLOAT32
    assert sums[0][[0, 1, 2, 4]].eq(0).all()


@pytest.mark.parametrize(("tokens", "bits"), [(5, 5), (65, 4), (65, 5)])
def test_nan_and_infinity_as_the_reference(tokens, bits):
    x, tables, _, _ = problem(tokens, 3, bits, 20, BF16, BF16)
    x[3, 2], x[4, 1] = float("nan"), float("inf")
    grad = torch.randn(tokens, 20).to(BF16)
    grad[2, 7], grad[1, 3] = float("nan"), float("inf")
    tables[1, 3, 5], tables[2, 2, 6] = float("nan"), -float("inf")
    for route in ops.ROUTES.values():
        out = ops.linear_op(x, tables, None, None, "l1", 1.0, route)
        truth = reference.linear_op(x, tables, None, None, "l1", 1.0, route)
        torch.testing.assert_close(out, truth, equal_nan=True, rtol=0.02, atol=0.1)
    codes, weights = reference.hash_op(x, bits, "l1", 1.0)
    results = ops.backward_op(grad, codes, weights, tables, None, 1 << bits, None, True)
    truths = reference.backward_op(grad.float(), codes, weights, tables, None, 1 << bits, None, True)
    for result, truth in zip(results, truths, strict=True):
        torch.testing.assert_close(result, truth, equal_nan=True, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("tokens", "n"), [(5, 30), (66, 16), (66, 30)])
def test_codes_out_of_range_give_nan(tokens, n):
    codes = torch.randint(0, n, (tokens, 3), dtype=torch.int32)
    codes[1, 0], codes[4, 2] = n, -1
    weights, tables, grad = torch.ones(tokens, 3), torch.randn(3, n, 20).to(BF16), torch.randn(tokens, 20).to(BF16)
    for route in ops.ROUTES.values():
        spoilt = ops.sum_op(codes, weights, tables, None, route).isnan()
        assert spoilt.any(1).nonzero().flatten().tolist() == [1, 4] and spoilt[[1, 4]].all()
    segments, dots = ops.backward_op(grad, codes, weights, tables, None, n, None, True)
    assert dots.isnan().nonzero().tolist() == [[1, 0], [4, 2]]
    assert segments.isnan().all(1).nonzero().flatten().tolist() == [n - 1, 2 * n]


def test_layouts_of_x():
    x, tables, _, wide = problem(6, 4, 5, 7)
    truth = reference.lookup_linear(x.double(), wide)
    strided = torch.zeros(6, 50)[:, :20].copy_(x)
    assert relative(pyrepr.lookup_linear(strided, tables), truth) < FLOAT32
    assert relative(pyrepr.lookup_linear(x.T.contiguous().T, tables), truth) < FLOAT32
    expanded = pyrepr.lookup_linear(x[:1].expand(6, -1), tables)
    assert relative(expanded, truth[:1].expand(6, -1)) < FLOAT32


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="refuses float64"):
        pyrepr.lookup_linear(torch.randn(2, 10).double(), torch.randn(2, 32, 3).double())


def test_last_row_of_more_than_2_31_table_elements():
    """Zeros nobody touches take address space, not memory."""
    k, n, h = 32, 1 << 16, 1040
    tables = torch.zeros(k, n, h, dtype=I8)
    assert tables.numel() > 2**31
    tables[-1, n - 1] = torch.arange(h).to(I8)
    codes, ones = torch.full((1, k), n - 1, dtype=torch.int32), torch.ones(1, k)
    for route in (1, 2):
        out = ops.sum_op(codes, ones, tables, torch.ones(k, n), route)
        assert torch.equal(out[0], tables[-1, n - 1].float())
    dots = ops.backward_op(out, codes, ones, tables, torch.ones(k, n), n, None, False)[1]
    assert relative(dots[0, -1], tables[-1, n - 1].double().square().sum()) < FLOAT32


def test_few_tokens_are_split_over_tables_and_every_split_is_listed(only_listed_variants):
    x, tables, _, wide = problem(1, 100, 2, 8)
    assert relative(pyrepr.lookup_linear(x, tables), reference.lookup_linear(x.double(), wide)) < FLOAT32
    assert [v.kernel for v in only_listed_variants] == [kernels.rows_kernel.odd, kernels.finish_kernel.odd]


def test_compiles_without_a_graph_break():
    x, tables, _, _ = problem(3, 3, 5, 16)
    results = []
    for function in (pyrepr.lookup_linear, torch.compile(pyrepr.lookup_linear, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), tables.clone().requires_grad_()]
        out = function(*leaves)
        out.sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
