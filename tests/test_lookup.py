"""Family `lookup`: the functions against a float64 oracle with an explicit softmax over all corners; contracts."""

from __future__ import annotations

import itertools
import os
import subprocess
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


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["hash", "linear", "sum", "backward", "hash_backward"])
def test_opcheck(name):
    x, tables, bias = torch.randn(6, 12).bfloat16(), torch.randn(3, 16, 5), torch.randn(5)
    codes, weights = ops.hash_op(x, 4, "scaled", 1.0)
    quantized, scales = int8_tables(3, 16, 5)
    grad, rows = torch.randn(6, 5), (codes.long() + 16 * torch.arange(3)).unique()
    cases = {
        "hash": [(x, 4, "scaled", 1.0)],
        "linear": [(x, tables, None, bias, "l1", 1.0, 0), (x, quantized, scales, None, "l1", 1.0, 0)],
        "sum": [(codes, weights, tables, None, 0)],
        "backward": [
            (grad, codes, weights, tables, None, 16, None, True),
            (grad, codes, weights, quantized, scales, 16, None, False),
            (grad, codes, weights, None, None, 16, None, True),
            (grad, codes, weights, None, None, 16, rows, True),
        ],
        "hash_backward": [(x, weights, 4, "scaled", 1.0)],
    }
    for arguments in cases[name]:
        torch.library.opcheck(getattr(torch.ops.pyrepr, f"lookup_{name}").default, arguments, test_utils=OPCHECK)


def test_compiles_without_a_graph_break():
    def loss(x, tables, bias):
        return pyrepr.lookup_linear(x, tables, bias).square().sum()

    arguments = [torch.randn(9, 12), torch.randn(3, 16, 5), torch.randn(5)]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [a.clone().requires_grad_() for a in arguments]
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*results, strict=True):
        assert_close(eager, compiled)


def test_functional_gradient_export_and_autocast():
    x, tables = torch.randn(9, 12), torch.randn(3, 16, 5)
    grad = torch.func.grad(lambda t: pyrepr.lookup_linear(x, t).square().sum())(tables)
    leaf = tables.clone().requires_grad_()
    pyrepr.lookup_linear(x, leaf).square().sum().backward()
    assert torch.equal(grad, leaf.grad)

    class Layer(torch.nn.Module):
        def forward(self, x, tables):
            return pyrepr.lookup_linear(x, tables)

    exported = torch.export.export(Layer(), (x, tables)).module()
    assert torch.equal(exported(x, tables), pyrepr.lookup_linear(x, tables))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pyrepr.lookup_linear(torch.nn.functional.linear(x, x), tables[:, :8]).dtype == torch.bfloat16


def test_second_derivative_and_bare_leaf_op_are_refused():
    x, tables = torch.randn(4, 12, requires_grad=True), torch.randn(3, 16, 5)
    (grad,) = torch.autograd.grad(pyrepr.lookup_linear(x, tables).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="leaf op"):
        ops.linear_op(x, tables, None, None, "l1", 1.0, 0)


X, TABLES = torch.zeros(2, 12), torch.zeros(3, 16, 5)
CODES = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyrepr.hash_codes(X, 5), ValueError, "multiple of bits = 5, got 12"),
        (lambda: pyrepr.hash_codes(X, 0), ValueError, "from 1 to 16, got 0"),
        (lambda: pyrepr.hash_codes(X, 17), ValueError, "from 1 to 16, got 17"),
        (lambda: pyrepr.hash_codes(X.int(), 4), TypeError, "x must be float32"),
        (lambda: pyrepr.lookup_linear(X, TABLES[:2]), ValueError, r"K · bits = 2 · 4 = 8"),
        (lambda: pyrepr.lookup_linear(X, TABLES[:, :15]), ValueError, "2\\^bits rows"),
        (lambda: pyrepr.lookup_linear(X, TABLES[0]), ValueError, r"\[K, n, h\]"),
        (lambda: pyrepr.lookup_linear(X, TABLES.char()), ValueError, "need scales"),
        (lambda: pyrepr.lookup_linear(X, TABLES, scales=TABLES[:, :, 0]), ValueError, "only they"),
        (lambda: pyrepr.lookup_linear(X, TABLES.char(), scales=TABLES[:, :3, 0]), ValueError, r"\[3, 16\]"),
        (lambda: pyrepr.lookup_linear(X, TABLES, X[0]), ValueError, r"bias must have shape \[h\] = \[5\]"),
        (lambda: pyrepr.lookup_linear(X, TABLES, weighting="p"), ValueError, "weighting must be one of"),
        (lambda: pyrepr.lookup_linear(X, TABLES, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: pyrepr.lookup_linear(X.double(), TABLES), TypeError, "both be float64"),
        (lambda: pyrepr.lookup_linear(X, TABLES.to("meta")), ValueError, "device"),
        (lambda: pyrepr.lookup_sum(CODES, X[:, :2], TABLES), ValueError, "shape of codes"),
        (lambda: pyrepr.lookup_sum(CODES.float(), X[:, :3], TABLES), TypeError, "integer dtype"),
        (lambda: pyrepr.lookup_sum(CODES + 16, X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15"),
        (lambda: pyrepr.lookup_sum(CODES - 1, X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15"),
        (lambda: pyrepr.lookup_sum(CODES + 2**32, X[:, :3], TABLES), IndexError, "from 0 to n - 1 = 15"),
        (lambda: pyrepr.segment_sum(X, CODES, 0), ValueError, "n must be a positive int"),
        (lambda: pyrepr.segment_sum(X, CODES[:1], 4), ValueError, "codes must have shape"),
        (lambda: pyrepr.segment_sum(X, CODES + 4, 4), IndexError, "from 0 to n - 1 = 3"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_refused_in_one_sentence(backend, call, error, message):
    with pyrepr.use_backend(backend), pytest.raises(error, match=message):
        call()


PROBE = """
import torch, pyrepr
from pyrepr.ops import lookup as ops
from pyrepr.reference import lookup as reference
def relative(a, b): return ((a.double() - b.double()).norm() / b.double().norm()).item()
torch.manual_seed(0)
for bits, k, h, count in [(8, 5, 131, 9), (3, 9, 64, 70), (5, 20, 37, 33)]:
    x, tables, grad = torch.randn(count, k * bits), torch.randn(k, 2**bits, h), torch.randn(count, h)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        xs, stored = x.to(dtype), tables.to(dtype)
        truth = [t.detach().double().clone().requires_grad_() for t in (xs, stored)]
        expected = reference.lookup_linear(*truth)
        expected.backward(grad.double())
        bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        for route in (1, 2):
            assert relative(ops.linear_op(xs, stored, None, None, "probability", 1.0, route), expected) < bound
        leaves = [xs.clone().requires_grad_(), stored.clone().requires_grad_()]
        pyrepr.lookup_linear(*leaves).backward(grad.to(dtype))
        for leaf, true in zip(leaves, truth):
            assert relative(leaf.grad, true.grad) < max(2 * bound, 1e-14), (dtype, bits)
    small = (tables * 40).clamp(-127, 127).to(torch.int8)
    expected = reference.lookup_linear(x.double(), small.double())
    for route in (0, 1, 2, 3):
        out = ops.linear_op(x, small, torch.ones(k, 2**bits), None, "probability", 1.0, route)
        assert relative(out, expected) < (1e-6 if route == 1 else 5e-5)
print(pyrepr.backends()["cpu"].detail.split()[2])
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_of_this_machine(level):
    environment = {**os.environ, "PYREPR_SIMD": level}
    run = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == level


def test_initial_tables_keep_the_variance():
    """Root mean square of the weights as published, and output of variance 1 for standard normal input."""
    from pyrepr.nn.lookup import rms_weight

    for bits, p, scaled in [(4, 0.392, 1.64), (6, 0.246, 1.53), (8, 0.154, 1.26), (10, 0.097, 0.98)]:
        z = torch.randn(200000, bits)
        for weighting, published in (("probability", p), ("scaled", scaled)):
            sampled = reference.weights(z, bits, weighting).square().mean().sqrt().item()
            assert rms_weight(bits, weighting) == pytest.approx(sampled, rel=0.01)
            assert rms_weight(bits, weighting) == pytest.approx(published, rel=0.01)
    for weighting in reference.WEIGHTINGS:
        layer = pyrepr.nn.LookupLinear(64, 128, bits=4, weighting=weighting)
        assert layer(torch.randn(2000, 64)).std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("weighting", "bits", "theory"), [("none", 4, 0.363), ("none", 8, 0.363), ("l1", 4, 0.273), ("l1", 8, 0.318)]
)
def test_from_linear_meets_the_theory_on_white_input(weighting, bits, theory):
    linear = torch.nn.Linear(32, 64)
    layer = pyrepr.nn.LookupLinear.from_linear(linear, torch.randn(40000, 32), bits=bits, weighting=weighting)
    x = torch.randn(40000, 32)
    with torch.no_grad():
        truth = linear(x)
        error = (layer(x) - truth).square().sum() / (truth - truth.mean(0)).square().sum()
    assert error.item() == pytest.approx(theory, rel=0.01)
    assert layer.conversion.relative_mse == pytest.approx(theory, rel=0.01)


def test_from_linear_with_a_low_rank_part():
    """Exact at full rank, and better the higher the rank, on correlated input with a mean."""
    linear = torch.nn.Linear(48, 40)
    x = torch.randn(3000, 48) @ torch.randn(48, 48) + 3
    errors = []
    for rank in (0, 6, 24, 40):
        layer = pyrepr.nn.LookupLinear.from_linear(linear, x, rank=rank)
        errors.append(relative(layer(x), linear(x)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    with pytest.warns(UserWarning, match="10 rows for 48 features"):
        layer = pyrepr.nn.LookupLinear.from_linear(linear, x[:10])
    assert layer(x).isfinite().all()
    with pytest.raises(ValueError, match="rank must be from 0"):
        pyrepr.nn.LookupLinear.from_linear(linear, x, rank=41)


def error_of(layer, function, x) -> float:
    with torch.no_grad():
        truth = function(x)
        return ((layer(x) - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


def test_from_mlp_finds_tables_that_no_linear_layer_has():
    """A lookup layer with random tables is the target: its signs' linear part explains 5 of 16 corners."""
    target = pyrepr.nn.LookupLinear(32, 24, bits=4, weighting="l1")
    layer = pyrepr.nn.LookupLinear.from_mlp(target, torch.randn(8000, 32), bits=4)
    # Shift and scale are estimates, so that signs differ for elements within about 1 % of zero.
    assert error_of(layer, target, torch.randn(5000, 32)) < 0.06
    assert layer.conversion.held_out_mse == pytest.approx(error_of(layer, target, torch.randn(5000, 32)), rel=0.3)


def test_from_mlp_beats_the_linear_approximation_of_a_network():
    mlp = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 24))
    for part in (mlp[0], mlp[3]):
        part.weight.data.mul_(4)
    mlp[2].train()
    mixing = torch.randn(6, 32)  # a chunk's signs say much about the other chunks
    x, unseen = torch.randn(12000, 6) @ mixing, torch.randn(4000, 6) @ mixing
    layer = pyrepr.nn.LookupLinear.from_mlp(mlp, x)
    assert mlp.training and mlp[2].training
    report = layer.conversion
    mlp.eval()
    assert report.held_out_mse == pytest.approx(error_of(layer, mlp, unseen), rel=0.05)
    best = torch.linalg.lstsq(x - x.mean(0), (mlp(x) - mlp(x).mean(0)).detach(), driver="gelsd").solution
    linear = error_of(lambda t: (t - x.mean(0)) @ best + mlp(x).mean(0), mlp, unseen)
    assert report.relative_mse < report.held_out_mse < 0.6 * linear
    assert report.dense_bytes == 4 * (32 * 64 + 64 + 64 * 24 + 24)
    assert report.table_bytes == 4 * 4 * 256 * 24
    assert report.break_even_tokens == report.dense_bytes / (4 * 4 * 24)


def test_from_mlp_does_not_fit_noise():
    layer = pyrepr.nn.LookupLinear.from_mlp(lambda x: torch.randn(len(x), 8), torch.randn(4000, 32), bits=4)
    assert 0.99 < layer.conversion.held_out_mse < 1.1
    assert layer.conversion.relative_mse > 0.9


def test_from_mlp_in_other_dtypes_and_of_few_rows():
    mlp = torch.nn.Linear(16, 8).double()
    layer = pyrepr.nn.LookupLinear.from_mlp(mlp, torch.randn(500, 5, 16).double(), bits=4, rank=8, ridge=1e-12)
    assert layer.tables.dtype == torch.float64
    assert layer.conversion.held_out_mse < 1e-10
    with pytest.warns(UserWarning, match="16 rows for 24 features"):
        layer = pyrepr.nn.LookupLinear.from_mlp(torch.tanh, torch.randn(16, 24))
    assert layer(torch.randn(3, 24)).isfinite().all()


@pytest.mark.parametrize(
    ("mlp", "calibration", "options", "error", "message"),
    [
        (torch.tanh, torch.ones(15, 8), {}, ValueError, "at least 16 rows, an eighth of which is held out, got 15"),
        (torch.tanh, torch.ones(20, 9), {}, ValueError, "multiple of bits = 8, got 9"),
        (torch.tanh, torch.ones(20, 8), {"rank": 9}, ValueError, r"rank must be from 0 to .* = 8, got 9"),
        (torch.tanh, torch.ones(20, 8).int(), {}, TypeError, "calibration must be a floating-point tensor, got int32"),
        (torch.tanh, [1.0], {}, TypeError, "calibration must be a floating-point tensor, got list"),
        (torch.tanh, torch.full((20, 8), torch.inf), {}, ValueError, "calibration must be finite"),
        (torch.sum, torch.ones(20, 8), {}, ValueError, r"mlp must give \[N, h\] for N = 20 rows, got \[\]"),
        (lambda x: x[:3], torch.ones(20, 8), {}, ValueError, r"mlp must give \[N, h\] for N = 20 rows, got \[3, 8\]"),
        (lambda x: (x, x), torch.ones(20, 8), {}, TypeError, "mlp must give a floating-point tensor, got tuple"),
        (torch.argsort, torch.ones(20, 8), {}, TypeError, "mlp must give a floating-point tensor, got int64"),
    ],
)
def test_from_mlp_refuses_in_one_sentence(mlp, calibration, options, error, message):
    with pytest.raises(error, match=message):
        pyrepr.nn.LookupLinear.from_mlp(mlp, calibration, **options)


def test_quantized_layer_and_its_state():
    layer = pyrepr.nn.LookupLinear(64, 48)
    x = torch.randn(30, 64)
    exact = layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert set(state) == {"tables", "bias"}
    layer.quantize_("int8")
    assert layer.tables.dtype == torch.int8
    assert relative(layer(x), exact) < 0.01  # 0.7 % expected
    loaded = pyrepr.nn.LookupLinear(64, 48, table_dtype=torch.int8)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x), layer(x))
    other = pyrepr.nn.LookupLinear(64, 48)
    other.load_state_dict(state)
    assert torch.equal(other(x), exact)
    assert relative(other.quantize_("bf16")(x), exact) < 2**-8
    with pytest.raises(ValueError, match="already"):
        layer.quantize_("int8")


def test_a_converted_layer_takes_any_shape_and_passes_nan_on():
    layer = pyrepr.nn.LookupLinear.from_linear(torch.nn.Linear(24, 10), torch.randn(200, 24), rank=3)
    x = torch.randn(2, 3, 24)
    assert_close(layer(x)[1, 2], layer(x[1, 2]))
    assert layer(x[:0]).shape == (0, 3, 10)
    x[0, 1, 5] = torch.nan
    assert layer(x).isnan().any(-1).nonzero().tolist() == [[0, 1]]
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    sum(layer(x.bfloat16())[1]).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_state_of_a_converted_layer_fits_a_new_one():
    linear, x = torch.nn.Linear(64, 48), torch.randn(300, 64)
    converted = pyrepr.nn.LookupLinear.from_linear(linear, x, rank=8)
    assert set(converted.state_dict()) == {"tables", "bias", "shift", "scale", "down", "up"}
    loaded = pyrepr.nn.LookupLinear(64, 48, weighting="l1")
    loaded.load_state_dict(converted.state_dict())
    assert torch.equal(loaded(x), converted(x))
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in converted.named_parameters()]
    with pytest.raises(ValueError, match="x must have a last axis of in_features = 64, got 63"):
        loaded(x[:, 1:])


def test_packed_layer_and_its_state():
    layer = pyrepr.nn.LookupLinear(64, 128)
    x = torch.randn(300, 64)
    with torch.no_grad():
        exact, state = layer(x), {name: value.clone() for name, value in layer.state_dict().items()}
        assert layer.pack_() is layer.pack_()
        assert layer.packed
        assert torch.equal(layer(x), exact)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    other = pyrepr.nn.LookupLinear(64, 128).pack_()
    other.load_state_dict(state)
    assert torch.equal(other(x), exact)
    with pytest.raises(ValueError, match="quantize first"):
        layer.quantize_("int8")
    assert relative(layer.to(torch.bfloat16)(x), exact) < 2**-8
    small = pyrepr.nn.LookupLinear(64, 128).quantize_("int8").pack_()
    assert set(small.state_dict()) == {"tables", "scales", "bias"}
    assert small.state_dict()["tables"].shape == (8, 256, 128)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**state, "tables": state["tables"][:4]})


def test_usage_counts_every_token_once_a_table():
    layer = pyrepr.nn.LookupLinear(24, 5, bits=4)
    usage = layer.usage(torch.randn(2, 50, 24))
    assert usage.counts.shape == (6, 16)
    assert (usage.counts.sum(1) == 100).all()
    assert usage.dead_rows == int((usage.counts == 0).sum())
    assert ((usage.entropy > 3) & (usage.entropy <= 4)).all()
    one = layer.usage(torch.ones(7, 24))
    assert (one.entropy == 0).all()
    assert one.dead_rows == 6 * 15


@pytest.mark.parametrize(("expand", "megabytes"), [(0, 33.6), (1, 52.4), (2, 88.1), (3, 157.3)])
def test_sizes_of_the_papers_mlp(expand, megabytes):
    mlp = pyrepr.nn.MemoryFormerMLP(512, expand=expand, table_dtype=torch.float16, device="meta")
    size = sum(layer.tables.numel() * 2 for layer in (mlp.up, mlp.down))
    assert size / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_size_and_cost_of_the_papers_layer_and_block():
    for bits, megabytes in ((4, 2.1), (8, 16.8)):
        layer = pyrepr.nn.LookupLinear(512, 512, bits=bits, table_dtype=torch.float16, device="meta")
        assert layer.tables.numel() * 2 / 1e6 == pytest.approx(megabytes, abs=0.03)
    d = s = 2048
    qkv = pyrepr.nn.LookupQKV(512, table_dtype=torch.float16, device="meta")
    assert qkv.lookup.tables.numel() * 2 / 1e6 == pytest.approx(3 * 16.8, abs=0.1)
    block = pyrepr.nn.MemoryFormerBlock(d, 16, device="meta")
    published = 2 * s * s * d + 6 * s * d * d // 8
    assert published / (2 * s * s * d + 12 * s * d * d) == pytest.approx(0.196, abs=5e-4)
    # The paper rounds the feed-forward network's 1 + 2/8 + 1 reads a table up to 3: ours is the exact count.
    assert 0.96 * published < block.multiply_adds(s) <= published
    assert block.multiply_adds(s) == 2 * s * s * d + s * (3 * d * d // 8 + (d // 8) * (10 * d // 8) + d * d // 8)
    assert all(part.device.type == "meta" for part in block.parameters() if part.dim() == 3)


def test_memoryformer_block_trains_and_is_causal():
    block = pyrepr.nn.MemoryFormerBlock(32, 4, bits=4)
    x = torch.randn(2, 10, 32)
    changed = x.clone()
    changed[:, 6:] = torch.randn(2, 4, 32)
    assert torch.equal(block(x)[:, :6], block(changed)[:, :6])
    target = torch.randn(2, 10, 32)
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in block.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_rotary_attention_sees_distances():
    """Products of rotated vectors depend on the distance of their places, and the block on the order of its input."""
    from pyrepr.nn.lookup import rotated

    q, k = (torch.randn(8, dtype=torch.float64).expand(20, 8) for _ in range(2))
    products = rotated(q) @ rotated(k).T
    for distance in (0, 3):
        diagonal = products.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert_close(rotated(q).norm(dim=-1), q.norm(dim=-1))
    assert_close(products[0, 0], q[0] @ k[0])
    assert not torch.allclose(products[0, 0], products[0, 3])
    x = torch.randn(1, 6, 32)
    for rotary in (False, True):
        block = pyrepr.nn.MemoryFormerBlock(32, 4, bits=4, causal=False, rotary=rotary)
        assert torch.allclose(block(x).flip(1), block(x.flip(1)), atol=1e-5) != rotary


def test_module_refusals():
    with pytest.raises(ValueError, match="even multiple of heads = 4 with rotary, got 12"):
        pyrepr.nn.MemoryFormerBlock(12, 4, bits=4, rotary=True)
    with pytest.raises(ValueError, match="multiple of bits = 8, got 12"):
        pyrepr.nn.LookupLinear(12, 4)
    with pytest.raises(MemoryError, match=r"take 1024\.0 GiB"):
        pyrepr.nn.LookupLinear(1 << 14, 1 << 12, bits=16)
    with pytest.raises(TypeError, match="table_dtype"):
        pyrepr.nn.LookupLinear(8, 4, table_dtype=torch.int32)
