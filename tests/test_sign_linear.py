"""sign_linear and SignLinear: the formula, the theory, the tables they stand for, int8, state and refusals."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import pyrepr
from pyrepr.functional import sign_linear
from pyrepr.nn import LookupLinear, SignLinear
from pyrepr.reference.signs import sign_features

HASHES = {"one_bit": 1, "two_bit": 2}


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


def plain(x, weight, bias=None, *, hash="two_bit", centre=0.0, scale=1.0, scales=1.0, down=None, up=None):
    """The formula in float64, an element at a time."""
    x, weight = x.double(), weight.double()
    rows, out = x.reshape(-1, x.shape[-1]), []
    for row in rows:
        inner = None if down is None else down.double() @ row
        rest = row if inner is None else row - inner @ down.double()
        z = ((rest - centre) * scale).tolist()
        per = HASHES[hash]
        total = torch.zeros(len(weight), dtype=torch.float64)
        for i, element in enumerate(z):
            sign = 1.0 if element >= 0 else -1.0
            total += sign * weight[:, per * i]
            if per == 2:
                total += sign * (1.0 if abs(element) >= 1 else -1.0) * weight[:, 2 * i + 1]
        total = total * scales
        total = total if bias is None else total + bias.double()
        out.append(total if inner is None else total + inner @ up.double())
    return torch.stack(out).reshape(*x.shape[:-1], len(weight))


def given(d=7, h=5, hash="two_bit", dtype=torch.float32, rank=2):
    """Arguments of a converted layer."""
    return {
        "weight": torch.randn(h, d * HASHES[hash], dtype=dtype),
        "bias": torch.randn(h, dtype=dtype),
        "hash": hash,
        "centre": torch.randn(d, dtype=dtype),
        "scale": torch.rand(d, dtype=dtype) + 0.5,
        "down": torch.randn(rank, d, dtype=dtype) / 3,
        "up": torch.randn(rank, h, dtype=dtype),
    }


def fitted(d=32, h=24, rank=3, hash="two_bit", dtype=torch.float32) -> SignLinear:
    torch.manual_seed(0)
    return SignLinear.from_linear(nn.Linear(d, h).to(dtype), torch.randn(300, d).to(dtype), rank=rank, hash=hash)


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_formula(hash, shape, dtype, backend):
    arguments, x = given(hash=hash, dtype=dtype), torch.randn(shape, dtype=dtype)
    out = sign_linear(x, **arguments)
    assert out.shape == (*shape[:-1], 5) and out.dtype == dtype
    if x.numel() and dtype != torch.bfloat16:
        assert relative(out, plain(x, **arguments)) < {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    bare = {name: arguments[name] for name in ("weight", "hash")}
    x = torch.randn(shape).to(dtype)
    if x.numel():
        assert relative(sign_linear(x, **bare), plain(x, **bare)) < 4 * torch.finfo(dtype).eps


def test_levels_are_cut_at_zero_and_one(backend):
    x = torch.tensor([[-torch.inf], [-1.0], [-0.5], [-0.0], [0.0], [0.5], [1.0], [torch.inf]])
    for weight, expected in (([1.0, 0.0], [-1, -1, -1, 1, 1, 1, 1, 1]), ([0.0, 1.0], [-1, -1, 1, -1, -1, -1, 1, 1])):
        assert sign_linear(x, torch.tensor([weight])).flatten().tolist() == expected
    assert sign_linear(x, torch.ones(1, 1), hash="one_bit").flatten().tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("quantize", [None, "int8", "bf16"])
def test_nan_stays_in_its_row(quantize, backend):
    layer = fitted()
    layer = layer.quantize_(quantize) if quantize else layer
    x = torch.randn(2, 3, 32)
    x[0, 1, 5] = torch.nan
    assert layer(x).isnan().any(-1).nonzero().tolist() == [[0, 1]]
    clean = x.nan_to_num()
    assert torch.equal(layer(x)[1], layer(clean)[1])
    assert_close(layer(x)[1, 2], layer(x[1, 2]))
    assert layer(x[:0]).shape == (0, 3, 24)


@pytest.mark.parametrize(("hash", "theory"), [("one_bit", 1 - 2 / math.pi), ("two_bit", 0.1176)])
def test_from_linear_meets_the_theory_on_white_input(hash, theory):
    linear = nn.Linear(32, 64)
    layer = SignLinear.from_linear(linear, torch.randn(40000, 32) * 3 + 1, hash=hash)
    x = torch.randn(40000, 32) * 3 + 1
    with torch.no_grad():
        truth = linear(x)
        error = (layer(x) - truth).square().sum() / (truth - truth.mean(0)).square().sum()
    assert error.item() == pytest.approx(theory, rel=0.01)
    report = layer.conversion
    assert report.relative_mse == pytest.approx(theory, rel=0.01) and report.held_out_mse is None
    assert (report.dense_bytes, report.table_bytes) == (4 * 32 * 64, 4 * 32 * 64 * HASHES[hash])
    assert report.dead_rows == 0 and math.isnan(report.break_even_tokens)


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_converted_layer_of_tables(hash, rank, dtype):
    linear, x = nn.Linear(32, 24).to(dtype), (torch.randn(600, 32) @ torch.randn(32, 32) + 2).to(dtype)
    signs = SignLinear.from_linear(linear, x, rank=rank, hash=hash)
    tables = LookupLinear.from_linear(linear, x, rank=rank, hash=hash, weighting="none")
    small = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert signs.conversion.relative_mse == pytest.approx(tables.conversion.relative_mse, rel=1e-12)
    for bits in (2, 8):
        again = signs.to_lookup(bits=bits)
        assert again.bits == bits and again.tables.dtype == dtype
        for other in (tables, again):
            assert relative(signs(x), other(x)) < small
    assert relative(signs.to_lookup().tables, tables.tables) < small
    assert 16 * signs.weight.numel() * 2 == tables.tables.numel()


def test_tables_of_other_weights():
    x = torch.randn(50, 32)
    layer = SignLinear(32, 24, bias=False).eval()
    tables = layer.to_lookup()
    assert tables.bias is None and not tables.training and relative(tables(x), layer(x)) < 1e-6
    tables.tables.data.zero_()
    assert layer.weight.any()
    small = fitted().quantize_("int8")
    again = small.to_lookup()
    assert again.tables.dtype == torch.float32 and relative(again(x), small(x)) < 1e-6
    assert again.up is not small.up and again.up.requires_grad
    with pytest.raises(ValueError, match="in_features must be a multiple of bits / 2 = 4, got 30"):
        SignLinear(30, 4).to_lookup()
    assert SignLinear(30, 4).to_lookup(bits=4).tables.shape == (15, 16, 4)


def test_a_low_rank_part_and_few_rows():
    """Exact at full rank, and better the higher the rank, on correlated input with a mean."""
    linear, x = nn.Linear(48, 40), torch.randn(3000, 48) @ torch.randn(48, 48) + 3
    errors = [relative(SignLinear.from_linear(linear, x, rank=rank)(x), linear(x)) for rank in (0, 6, 24, 40)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    with pytest.warns(UserWarning, match="calibration has 10 rows for 48 features") as caught:
        layer = SignLinear.from_linear(linear, x[:10])
    assert caught[0].filename == __file__ and layer(x).isfinite().all()


@pytest.mark.parametrize("scale", [2.0**-116, 2.0**70, 2.0**123])
def test_fits_of_any_magnitude(scale):
    linear, x = nn.Linear(16, 3, bias=False), torch.randn(40, 16)
    for rank in (0, 1):
        expected, layer = (SignLinear.from_linear(linear, x * s, rank=rank) for s in (1.0, scale))
        assert layer.conversion.relative_mse == pytest.approx(expected.conversion.relative_mse, rel=1e-5)
        assert_close(layer(x * scale) / scale, expected(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hash", HASHES)
def test_a_new_layer_keeps_the_variance_and_trains(hash):
    layer, x = SignLinear(50, 400, hash=hash), torch.randn(2000, 50)
    assert layer(x).std().item() == pytest.approx(1, abs=0.05)
    layer.weight.data.zero_()
    layer.reset_parameters()
    target, optimizer, losses = x.roll(1, 1).repeat(1, 8), torch.optim.Adam(layer.parameters(), 1e-2), []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bytes(backend):
    """Each weight is off by half a step of its row at most, and a sum of F of them by F halves."""
    layer, x = fitted(), torch.randn(40, 32)
    layer.weight.data[3] = 0.0
    exact = layer(x)
    assert layer.quantize_("int8") is layer
    assert layer.weight.dtype == torch.int8 and layer.scales.dtype == torch.float32 and layer.scales[3] == 0
    assert not layer.weight.requires_grad and layer.weight.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 20
    assert bool(((layer(x) - exact).abs() <= 64 * 0.501 * layer.scales + 1e-5).all())
    assert 0 < relative(layer(x), exact) < 0.02
    arguments = {name: t for name, t in layer.state_dict().items() if t is not None}
    assert relative(layer(x), plain(x, **arguments)) < 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        moved = copy.deepcopy(layer).to(dtype)
        assert moved.scales.dtype == torch.float32 and moved(x.to(dtype)).dtype == dtype
    half = fitted()
    assert relative(half.quantize_("bf16")(x), fitted()(x)) < 2**-8 and half.weight.dtype == torch.bfloat16
    for other in (layer, half.quantize_("int8")):
        with pytest.raises(ValueError, match="weight must be floating-point to be quantized, got int8 already"):
            other.quantize_("bf16")
    with pytest.raises(ValueError, match="kind must be 'int8' or 'bf16', got 'int4'"):
        fitted().quantize_("int4")


SIZES = [(1, 1, 1), (3, 5, 7), (8, 16, 16), (30, 33, 17), (64, 31, 65), (200, 70, 33), (1100, 40, 3), (32, 5, 8200)]


@pytest.mark.levels
@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize(("d", "h", "count"), SIZES)
def test_sums_of_bytes_are_exact(d, h, count, hash):
    """At every level, for any number of tokens and threads: sums of whole numbers, NaN in its row."""
    x, weight = torch.randn(count, d), torch.randint(-128, 128, (h, d * HASHES[hash]), dtype=torch.int8)
    scales = 2.0 ** torch.randint(-3, 3, (h,))
    truth = (sign_features(x.double(), hash) @ weight.double().T * scales.double()).float()
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            assert torch.equal(sign_linear(x, weight, hash=hash, scales=scales), truth)
    finally:
        torch.set_num_threads(threads)
    for few in range(1, min(count, 9)):
        assert torch.equal(sign_linear(x[-few:], weight, hash=hash, scales=scales), truth[-few:])
    x[count // 2, -1], truth[count // 2] = math.nan, math.nan
    assert_close(sign_linear(x, weight, hash=hash, scales=scales), truth, rtol=0, atol=0, equal_nan=True)


def curved(layer, x):
    return layer(x).sin().sum()


def along(gradient, v, x):
    return (gradient(x) * v).sum()


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_beside_bytes_are_those_of_the_same_weights(rank, backend):
    layer = fitted(rank=rank)
    with torch.no_grad():
        layer.weight.copy_((layer.weight / layer.weight.abs().amax(1, True) * 127).round_())
    bytes_ = copy.deepcopy(layer).quantize_("int8")
    x, v = torch.randn(6, 32), torch.randn(6, 32)
    leaves = []
    for each in (layer, bytes_):
        names = [name for name, p in each.named_parameters() if name != "weight"]
        leaf = x.clone().requires_grad_()
        out = each(leaf)
        of = [leaf, *(getattr(each, name) for name in names)]
        grads = torch.autograd.grad(out.sin().sum(), of, allow_unused=True, materialize_grads=True)
        first = torch.func.grad(functools.partial(curved, each))
        jvp = torch.func.jvp(each, (x,), (v,))[1]
        _, twice = torch.func.jvp(first, (x,), (v,))
        again = torch.func.grad(functools.partial(along, first, v))(x)
        leaves.append([out.detach(), *grads, jvp, twice, again, torch.func.vmap(first)(torch.stack([x, v]))])
    for ours, theirs in zip(*leaves, strict=True):
        assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    assert bool(leaves[0][1].any()) == bool(rank)


def test_scales_have_no_derivative():
    x, weight, scales = torch.randn(3, 4), torch.ones(2, 8, dtype=torch.int8), torch.rand(2)
    with pytest.raises(RuntimeError, match="scales counts as a constant in sign_linear"):
        sign_linear(x, weight, scales=scales.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="scales counts as a constant in sign_linear"):
        torch.func.jvp(lambda s: sign_linear(x, weight, scales=s), (scales,), (scales,))


@pytest.mark.parametrize("kind", ["plain", "converted", "int8"])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
def test_traces_and_graphs_serve_any_number_of_tokens(kind, shape):
    layer = SignLinear(32, 24) if kind == "plain" else fitted()
    layer = layer.quantize_("int8") if kind == "int8" else layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and says which sizes a trace holds fixed
        traced = torch.jit.trace(layer, torch.randn(shape))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens = torch.export.Dim("tokens", min=2)
    dims = ({len(shape) - 2: tokens},)
    exported = torch.export.export(layer, (torch.randn(shape),), dynamic_shapes=dims).module()
    x = torch.randn(*shape[:-2], 11, 32)
    for each in (traced, again, compiled, exported):
        assert_close(each(x), layer(x), rtol=1e-6, atol=1e-6)


def test_operations_are_counted():
    formulas = pyrepr.functional.flop_formulas()
    for rank in (0, 3):
        layer, x = fitted(rank=rank), torch.randn(2, 5, 32)
        for _ in range(2):
            with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
                layer(x)
            assert counter.get_total_flops() == 2 * 10 * (64 * 24 + rank * (2 * 32 + 24))
            layer = copy.deepcopy(layer).quantize_("int8") if layer.scales is None else layer


@pytest.mark.parametrize("quantize", [None, "int8", "bf16"])
@pytest.mark.parametrize("rank", [0, 3])
def test_state_and_specification(quantize, rank):
    layer, x = fitted(rank=rank), torch.randn(9, 32)
    layer = layer.quantize_(quantize) if quantize else layer
    layer.bias.requires_grad_(False)
    names = ["weight", "bias"] + ["scales"] * (quantize == "int8") + ["centre", "scale"] + ["down", "up"] * (rank > 0)
    state = layer.state_dict()
    assert set(state) == set(names) and all(value.is_contiguous() for value in state.values())
    loaded = nn.Sequential(SignLinear(32, 24, dtype=layer.weight.dtype))
    loaded.load_state_dict(nn.Sequential(layer).state_dict())
    assert torch.equal(loaded(x), layer(x))
    made = SignLinear.specified(json.loads(json.dumps(layer.specification())))
    made.load_state_dict(dict(state))
    assert torch.equal(made(x), layer(x)) and made.specification() == layer.specification()
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in layer.parameters()]
    assert repr(made) == repr(layer) and "hash='two_bit'" in repr(layer)
    again = copy.deepcopy(layer)
    assert torch.equal(again(x), layer(x)) and again.conversion.table_bytes == layer.conversion.table_bytes


def test_bytes_never_load_into_floats_or_the_other_way():
    floats, bytes_ = SignLinear(16, 8), SignLinear(16, 8).quantize_("int8")
    for target, source in ((floats, bytes_), (bytes_, floats)):
        before = target.weight.clone()
        with pytest.raises(RuntimeError, match=r"weight must be torch\.\w+ as this layer's, got torch\.\w+; make the"):
            target.load_state_dict(source.state_dict(), strict=False)
        assert torch.equal(target.weight, before)
    layer = SignLinear(16, 8, dtype=torch.int8)
    layer.load_state_dict(bytes_.state_dict())
    assert torch.equal(layer.weight, bytes_.weight) and torch.equal(layer.scales, bytes_.scales)


def test_the_weight_of_a_linear_layer_is_none_of_signs():
    layer = SignLinear(8, 4, hash="one_bit")
    with pytest.raises(RuntimeError, match="hash must be None as of the saved weight, got 'one_bit'"):
        layer.load_state_dict(nn.Linear(8, 4).state_dict())
    layer.load_state_dict(dict(SignLinear(8, 4, hash="one_bit").state_dict()))  # without metadata, as of a file


def test_another_hash_is_an_error_when_loading():
    one, two = SignLinear(32, 8, hash="one_bit"), SignLinear(16, 8)  # weights of one shape
    with pytest.raises(RuntimeError, match="hash must be 'two_bit' as of the saved weight, got 'one_bit'"):
        one.load_state_dict(two.state_dict())


X, WEIGHT, BYTES = torch.zeros(2, 4), torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.int8)
LINEAR = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sign_linear(None, WEIGHT), TypeError, "x must be a torch.Tensor, got NoneType"),
        (lambda: sign_linear(X.int(), WEIGHT), TypeError, "x must be float32, .* got int32"),
        (lambda: sign_linear(X[0, 0], WEIGHT), ValueError, r"x must have shape \[\.\.\., d\], got \[\]"),
        (lambda: sign_linear(X, WEIGHT[:, 1:]), ValueError, r"weight must have shape .* F = 8 .*, got \[3, 7\]"),
        (lambda: sign_linear(X, WEIGHT[0]), ValueError, r"weight must have shape \[h, F\]"),
        (lambda: sign_linear(X, WEIGHT, hash="one_bit"), ValueError, "F = 4"),
        (lambda: sign_linear(X, WEIGHT, hash="x"), ValueError, "hash must be one of one_bit, two_bit, got 'x'"),
        (lambda: sign_linear(X, BYTES), ValueError, r"need scales of shape \[h\], got no scales"),
        (lambda: sign_linear(X, WEIGHT, scales=X[0, :3]), ValueError, "got scales with float32 weights"),
        (lambda: sign_linear(X, BYTES, scales=X[0]), ValueError, r"scales must have shape \[h\] = \[3\], got \[4\]"),
        (lambda: sign_linear(X, BYTES, scales=X[0, :3].half()), TypeError, "scales must be float32, got float16"),
        (lambda: sign_linear(X.double(), WEIGHT), TypeError, "both be float64 or neither, got float64 and float32"),
        (lambda: sign_linear(X, WEIGHT.double()), TypeError, "both be float64 or neither, got float32 and float64"),
        (lambda: sign_linear(X, WEIGHT, X[0]), ValueError, r"bias must have shape \[h\] = \[3\], got \[4\]"),
        (lambda: sign_linear(X, WEIGHT, X[0, :3].double()), TypeError, "bias must be float64 only where x is"),
        (lambda: sign_linear(X, WEIGHT.to("meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
        (lambda: sign_linear(X, WEIGHT, centre=X[0]), ValueError, "centre and scale go together, got centre alone"),
        (lambda: sign_linear(X, WEIGHT, down=X), ValueError, "down and up go together, got down alone"),
        (lambda: SignLinear(4, 3)(X[:, 1:]), ValueError, r"x must have a last axis of in_features = 4, got shape"),
        (lambda: SignLinear(4, 3)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: SignLinear(4, 3)(X.double()), TypeError, "both be float64 or neither"),
        (lambda: SignLinear(4.0, 3), TypeError, "in_features must be an int, got float"),
        (lambda: SignLinear(0, 3), ValueError, "in_features must be positive, got 0"),
        (lambda: SignLinear(4, -3), ValueError, "out_features must be positive, got -3"),
        (lambda: SignLinear(4, 3, hash="x"), ValueError, "hash must be one of one_bit, two_bit, got 'x'"),
        (lambda: SignLinear(4, 3, dtype=torch.int32), TypeError, "dtype must be float32, .* or int8, got torch.int32"),
        (lambda: SignLinear.from_linear(LINEAR, X[:0]), ValueError, "calibration must have at least one row"),
        (lambda: SignLinear.from_linear(LINEAR, X * torch.nan), ValueError, "calibration must be finite, got NaN"),
        (lambda: SignLinear.from_linear(LINEAR, X[:, 1:]), ValueError, r"in_features\] = \[\.\.\., 4\], got \[2, 3\]"),
        (lambda: SignLinear.from_linear(LINEAR, X.int()), TypeError, "calibration must be a floating-point tensor"),
        (lambda: SignLinear.from_linear(LINEAR, X.repeat(5, 1), rank=4), ValueError, "rank must be from 0 to .* = 3"),
        (lambda: SignLinear.from_linear(LINEAR, X.repeat(5, 1), hash="x"), ValueError, "hash must be one of"),
        (lambda: SignLinear.specified({"class": "SignLinear"}), ValueError, "must come from SignLinear.specification"),
    ],
)
def test_refusals_are_one_sentence(call, error, message, backend):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
