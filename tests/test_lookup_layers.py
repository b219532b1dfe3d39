"""Family `lookup`: the layers, their conversion from trained ones, their sizes and their state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import pyrepr
from pyrepr.reference import lookup as reference


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm()).item()


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
    ("hash", "weighting", "bits", "theory"),
    [
        ("one_bit", "none", 4, 0.363),
        ("one_bit", "none", 8, 0.363),
        ("one_bit", "l1", 4, 0.273),
        ("one_bit", None, 8, 0.318),
        ("two_bit", None, 4, 0.1175),  # of the levels of Max and Lloyd
        ("two_bit", "none", 8, 0.1175),
    ],
)
def test_from_linear_meets_the_theory_on_white_input(hash, weighting, bits, theory):
    linear, options = torch.nn.Linear(32, 64), {"hash": hash, "weighting": weighting}
    layer = pyrepr.nn.LookupLinear.from_linear(linear, torch.randn(40000, 32), bits=bits, **options)
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


@pytest.mark.parametrize("hash", reference.HASHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_full_rank_is_exact_in_every_dtype(hash, dtype):
    """What it leaves of x is roundings, which no table magnifies."""
    for d, h in ((16, 40), (24, 16)):
        linear, x = torch.nn.Linear(d, h).to(dtype), (torch.randn(500, d) * 3 + 1).to(dtype)
        layer = pyrepr.nn.LookupLinear.from_linear(linear, x, rank=min(d, h), hash=hash)
        error = relative(layer(x), linear(x))
        assert error < {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 0.02}[dtype]
        assert layer.conversion.relative_mse < 1e-10


def test_two_bits_serve_a_network_better():
    mlp = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 16))
    x, unseen = torch.randn(6000, 24), torch.randn(2000, 24)
    layers = [pyrepr.nn.LookupLinear.from_mlp(mlp, x, bits=4, hash=hash) for hash in reference.HASHES]
    one, two = (error_of(layer, mlp, unseen) for layer in layers)
    assert two < 0.8 * one
    assert layers[1].conversion.held_out_mse == pytest.approx(two, rel=0.1)


@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
def test_layers_of_two_bits_train(weighting):
    """Tables start with output of variance 1, and x has a gradient but where the weight is constant."""
    layer = pyrepr.nn.LookupLinear(64, 128, hash="two_bit", weighting=weighting)
    assert layer.tables.shape == (16, 256, 128)
    x = torch.randn(2000, 64, requires_grad=True)
    assert layer(x).std().item() == pytest.approx(1, abs=0.1)
    layer(x).square().sum().backward()
    assert bool(x.grad.any()) == (weighting != "none") and layer.tables.grad.any()


def error_of(layer, function, x) -> float:
    with torch.no_grad():
        truth = function(x)
        return ((layer(x) - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


def test_from_mlp_finds_tables_that_no_linear_layer_has():
    """A lookup layer with random tables is the target: its signs' linear part explains 5 of 16 corners."""
    target = pyrepr.nn.LookupLinear(32, 24, bits=4, weighting="l1")
    layer = pyrepr.nn.LookupLinear.from_mlp(target, torch.randn(8000, 32), bits=4)
    # Centre and scale are estimates, so that signs differ for elements within about 1 % of zero.
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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("hash", ["one_bit", "two_bit"])
def test_fits_of_any_magnitude(hash, rank):
    """The same errors at 1e-35 and 1e37, whose squares float32 does not hold; nearly three times as large without."""
    linear, x = torch.nn.Linear(16, 3, bias=False), torch.randn(40, 16)
    options = {"bits": 4, "hash": hash, "rank": rank}
    for make in (pyrepr.nn.LookupLinear.from_linear, pyrepr.nn.LookupLinear.from_mlp):
        expected = make(linear, x, **options).conversion
        for scale in (2.0**-116, 2.0**70, 2.0**123):
            layer = make(linear, x * scale, **options)
            for name in ("relative_mse", "held_out_mse"):
                ours, theirs = getattr(layer.conversion, name), getattr(expected, name)
                assert ours == theirs or abs(ours - theirs) < 1e-5 * theirs
            assert_close(layer(x * scale) / scale, make(linear, x, **options)(x), rtol=1e-4, atol=1e-5)


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
    assert set(converted.state_dict()) == {"tables", "bias", "centre", "scale", "down", "up"}
    loaded = pyrepr.nn.LookupLinear(64, 48, weighting="l1")
    loaded.load_state_dict(converted.state_dict())
    assert torch.equal(loaded(x), converted(x))
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in converted.named_parameters()]
    with pytest.raises(ValueError, match="x must have a last axis of in_features = 64, got shape"):
        loaded(x[:, 1:])


def test_tables_of_two_bits_do_not_load_into_one():
    linear, x = torch.nn.Linear(16, 64), torch.randn(300, 16)
    two = pyrepr.nn.LookupLinear.from_linear(linear, x, bits=4, hash="two_bit", rank=4)
    assert two.up.shape == (4, 64) and two.down.shape == (4, 16)
    again = pyrepr.nn.LookupLinear(16, 64, bits=4, hash="two_bit", weighting="none")
    again.load_state_dict(two.state_dict())
    assert torch.equal(again(x), two(x))
    other = pyrepr.nn.LookupLinear(32, 64, bits=4, weighting="none")  # as many tables
    with pytest.raises(RuntimeError, match="hash must be 'two_bit' as of the saved tables, got 'one_bit'"):
        other.load_state_dict(two.state_dict())
    specified = pyrepr.nn.LookupLinear.specified(two.quantize_("int8").pack_().specification())
    specified.load_state_dict(two.state_dict())
    assert torch.equal(specified(x), pyrepr.nn.LookupLinear.forward(two, x)) or relative(specified(x), two(x)) < 1e-4
    assert two.usage(x).counts.shape == (8, 16)
    with pytest.raises(ValueError, match="bits must be even with the two_bit hash, got 3"):
        pyrepr.nn.LookupLinear(12, 4, bits=3, hash="two_bit")
    with pytest.raises(ValueError, match="multiple of bits / 2 = 4, got 10"):
        pyrepr.nn.LookupLinear(10, 4, hash="two_bit")


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
    from pyrepr.nn.memoryformer import rotated

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


def test_int8_layers_of_another_dtype():
    layer = pyrepr.nn.LookupLinear(16, 8, bits=4).quantize_("int8")
    x = torch.randn(5, 16)
    for dtype in (torch.bfloat16, torch.float16):
        moved = copy.deepcopy(layer).to(dtype)
        assert moved.scales.dtype == torch.float32
        assert torch.equal(moved(x.to(dtype)), layer(x.to(dtype)))


def test_options_that_tables_were_made_for():
    layer = pyrepr.nn.LookupLinear.from_linear(torch.nn.Linear(16, 8), torch.randn(99, 16), bits=4, rank=2)
    with pytest.raises(RuntimeError, match="weighting must be 'l1' as of the saved tables, got 'probability'"):
        pyrepr.nn.LookupLinear(16, 8, bits=4).load_state_dict(layer.state_dict())
    same = torch.nn.Sequential(pyrepr.nn.LookupLinear(16, 8, bits=4, weighting="l1"))
    same.load_state_dict(torch.nn.Sequential(layer).state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(same(x), layer(x))
    bare = dict(layer.state_dict())  # as a safetensors file has it
    assert all(value.is_contiguous() for value in bare.values())
    pyrepr.nn.LookupLinear(16, 8, bits=4).load_state_dict(bare)


def test_compiled_for_any_number_of_tokens():
    layer = pyrepr.nn.LookupLinear(16, 8, bits=4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 40):
        x = torch.randn(tokens, 16, requires_grad=True)
        assert torch.equal(compiled(x), layer(x))
        compiled(x).sum().backward()


def test_no_tokens_with_any_strides():
    x = torch.empty(16, 0).T.requires_grad_()
    pyrepr.nn.LookupLinear(16, 8, bits=4)(x).sum().backward()
    assert x.grad.shape == (0, 16)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: pyrepr.nn.LookupLinear(8, -1), ValueError, "out_features must be positive, got -1"),
        (lambda: pyrepr.nn.LookupLinear(8.0, 4), TypeError, "in_features must be an int, got float"),
        (lambda: pyrepr.nn.LookupLinear(8, "a"), TypeError, "out_features must be an int, got str"),
        (lambda: pyrepr.nn.LookupLinear(8, 4)(None), TypeError, "x must be a torch.Tensor, got NoneType"),
        (lambda: pyrepr.nn.LookupLinear(8, 4)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda: pyrepr.nn.LookupLinear(8, 4)(torch.zeros(())),
            ValueError,
            r"x must have a last axis of in_features = 8, .* \[\]",
        ),
        (
            lambda: pyrepr.nn.LookupLinear.from_mlp(torch.nn.Identity(), torch.zeros(20, 0)),
            ValueError,
            r"calibration must have shape \[\.\.\., d\]",
        ),
    ],
)
def test_sizes_and_inputs_of_another_kind_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
