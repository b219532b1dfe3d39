"""What a layer or a network could become: kinds of `from_mlp`, budgets of `convert`, and the curve in its report."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import pyrepr
from pyrepr.nn import LinearPlus, LookupLinear, SignLinear


def error_of(layer, function, x) -> float:
    with torch.no_grad():
        truth = function(x).double()
        return float((layer(x) - truth).square().sum() / (truth - truth.mean(0)).square().sum())


def mlp(d=16, n=64, h=12, activation=nn.GELU):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(d, n), activation(), nn.Dropout(0.3), nn.Linear(n, h))
    network[0].weight.data.mul_(3 * torch.rand(n, 1))  # some neurons bend more than others
    return network


def fitted(network, x, **options) -> LinearPlus:
    return LookupLinear.from_mlp(network, x, **options)


def test_the_strongest_neurons_beside_a_map():
    network, x, unseen = mlp(), torch.randn(4000, 16), torch.randn(2000, 16)
    network.train()
    layers = [fitted(network, x, kind="linear+neurons", neurons=n) for n in (1, 8, 24, 64)]
    assert network.training and network[2].training
    network.eval()
    errors = [error_of(layer, network, unseen) for layer in layers]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.4 * errors[0] and errors[3] < 1e-10
    assert layers[1].conversion.held_out_mse == pytest.approx(errors[1], rel=0.2)
    kept = layers[1].rest[0].weight
    assert kept.shape == (8, 16) and all(bool((row == network[0].weight).all(1).any()) for row in kept)
    assert type(layers[1].rest[1]) is nn.GELU and layers[1].rest[1] is not network[1]
    # Eight others, refitted alike, serve less: the strongest are chosen.
    strengths = torch.randperm(64)[:8]
    thinned = copy.deepcopy(network)
    thinned[0] = nn.Linear(16, 8)
    thinned[0].weight.data, thinned[0].bias.data = network[0].weight[strengths].data, network[0].bias[strengths].data
    with torch.no_grad():
        features = [torch.cat([t, nn.functional.gelu(thinned[0](t))], 1) for t in (x, unseen)]
        features = [torch.cat([f, torch.ones(len(f), 1)], 1) for f in features]
        random = features[1] @ torch.linalg.lstsq(features[0], network(x)).solution
    assert errors[1] < 0.9 * error_of(lambda t: random, network, unseen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neurons_and_tables_in_other_dtypes(dtype):
    network, x = mlp().eval().to(dtype), torch.randn(600, 16).to(dtype)
    small = {torch.float32: 1e-10, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
    layer = fitted(network, x, kind="linear+neurons", neurons=64)
    assert error_of(layer, network, x) < small and layer(x).dtype == dtype
    layer = fitted(network, x, kind="tables", bits=4)
    assert layer.rest.tables.dtype == dtype and layer(x).isfinite().all()


def test_tables_beside_a_map_hash_x_itself():
    network, x, unseen = mlp().eval(), torch.randn(12000, 16), torch.randn(2000, 16)
    layer = fitted(network, x, kind="tables")
    ones = torch.ones(len(x), 1)
    solution = torch.linalg.lstsq(torch.cat([x, ones], 1), network(x).detach()).solution
    linear = error_of(lambda t: torch.cat([t, ones[: len(t)]], 1) @ solution, network, unseen)
    assert error_of(layer, network, unseen) < 0.9 * linear
    assert layer.rest.down is None and layer.conversion.table_bytes == 2 * 256 * 12 * 4
    again = LinearPlus(nn.Linear(16, 12), LookupLinear(16, 12, weighting="l1"))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(unseen), layer(unseen))
    layer(unseen).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("hash", ["one_bit", "two_bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e2])
def test_full_rank_is_exact(hash, dtype, scale):
    """What a full rank leaves of x is roundings: no table may magnify them, seen or unseen, at any size."""
    linear = nn.Linear(16, 24, bias=False).to(dtype)
    x, unseen = (torch.randn(400, 16).mul(scale).to(dtype) for _ in range(2))
    small = {torch.float32: 1e-10, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
    for make in (LookupLinear.from_linear, LookupLinear.from_mlp):
        layer = make(linear, x, rank=16, hash=hash, ridge=1e-9)
        assert error_of(layer, linear, unseen) < small
    model = nn.Sequential(copy.deepcopy(linear), nn.Identity())
    report = pyrepr.convert(model, [x], rank=16, hash=hash, batch_sizes=(), progress=False)
    assert report.layers[0].relative_mse < small and report.output_mse < small


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x).sin())


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (torch.tanh, {"kind": "x"}, "kind must be one of remainder, tables, linear.neurons, got 'x'"),
        (torch.tanh, {"kind": "tables", "rank": 2}, "rank must be 0 for kind 'tables', .* got 2"),
        (torch.tanh, {"kind": "linear+neurons"}, "mlp must be a module of two linear layers .*, got a builtin"),
        (nn.Linear(8, 8), {"kind": "linear+neurons"}, "two linear layers .*, got 1 linear layers"),
        (Odd(), {"kind": "linear+neurons"}, "two linear layers .*, got one whose activation is neither"),
        (nn.Sequential(nn.LayerNorm(8), mlp(8, 9, 8)), {"kind": "linear+neurons"}, "does more before or after"),
        (mlp(8, 9, 8), {"kind": "linear+neurons", "neurons": 10}, "neurons must be an int from 1 to .* 9, got 10"),
        (mlp(8, 9, 8), {"kind": "linear+neurons", "neurons": True}, "neurons must be an int from 1 to .*, got True"),
    ],
)
def test_kinds_refuse_in_one_sentence(network, options, message):
    with pytest.raises(ValueError, match=message):
        LookupLinear.from_mlp(network, torch.randn(50, 8), **options)
    with pytest.raises(TypeError, match=r"rest must be a torch\.nn\.Module, got int"):
        LinearPlus(nn.Identity(), 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))


def convert(model, **options):
    return pyrepr.convert(model, [torch.randn(800, 32)], progress=False, **options)


def test_a_budget_of_bytes_takes_the_most_accurate_tables_within_it(tmp_path):
    model, smaller = network(), network()
    report = convert(model, bits=4, budget={"bytes": 9.0}, batch_sizes=())
    for layer in report.layers:
        tables = [each for each in layer.candidates if each.tables]
        assert {each.name for each in tables} == {
            f"{form}{hash}, rank {rank}"
            for form in ("", "signs, ")
            for hash in ("one bit", "two bits")
            for rank in ("0", "d/16", "d/8", "d/4")
        }
        allowed = [each for each in tables if each.bytes <= 9 * layer.bytes_before]
        best = min(allowed, key=lambda each: each.relative_mse)
        assert [each for each in layer.candidates if each.chosen] == [best]
        assert (layer.relative_mse, layer.bytes_after) == (best.relative_mse, best.bytes)
        assert {"dense, rank d/8", "dynamic int8"} < {each.name for each in layer.candidates}
    assert model[0].hash == "two_bit" and "two bits" in str(report)
    tight = convert(smaller, bits=4, budget={"bytes": 1.5}, batch_sizes=())
    assert isinstance(smaller[0], SignLinear) and smaller[0].hash == "one_bit"
    assert [a.relative_mse > b.relative_mse for a, b in zip(tight.layers, report.layers, strict=True)] == [True, True]
    assert "each the most accurate tables or signs within 9 times its bytes" in report.describe()
    assert pyrepr.Conversion.load(report.save(tmp_path / "a.json")) == report
    report.to_html(tmp_path / "a.html")
    assert "two bits, rank d/8" in (tmp_path / "a.html").read_text()


def test_a_budget_serves_layers_that_no_chunk_divides():
    model = nn.Sequential(nn.Linear(32, 30), nn.Linear(30, 16))
    report = convert(model, bits=8, quantize="int8", budget={"bytes": 0.8}, batch_sizes=())
    assert not report.skipped and "int8 tables and weights" in repr(report)
    assert all(isinstance(module, SignLinear) and module.weight.dtype == torch.int8 for module in model)
    names = [{each.name for each in layer.candidates if each.tables} for layer in report.layers]
    assert "two bits, rank 0" in names[0] and all(name.startswith("signs") for name in names[1])
    wide = nn.Sequential(nn.Linear(32, 32))
    report = convert(wide, bits=4, form="signs", rank=3, hash="one_bit", budget={"bytes": 99}, batch_sizes=())
    assert "signs, one bit, rank 3" in {each.name for each in report.layers[0].candidates}


def test_a_budget_of_time_and_the_curve():
    report = convert(network(), bits=4, budget={"time": 1e3}, batch_sizes=(1, 8))
    for layer in report.layers:
        chosen = next(each for each in layer.candidates if each.chosen)
        assert chosen.relative_mse == min(each.relative_mse for each in layer.candidates if each.tables)
        assert all(len(each.ms) == 2 and min(each.ms) > 0 for each in layer.candidates)
        head, *lines = report.curve(layer.name)
        assert head == ["could be", "rel. sq. error", "MB", "ms at 1", "ms at 8", "chosen"]
        assert len(lines) == len(layer.candidates) and sum(line[-1] == "1" for line in lines) == 1
        low = [float(each.relative_mse) for each in layer.candidates if each.name.startswith("dense")]
        assert low == sorted(low, reverse=True)  # of a sixteenth, an eighth, a quarter
        int8 = next(each for each in layer.candidates if each.name == "dynamic int8")
        assert not int8.tables and 0 < int8.relative_mse < 1e-3
    with pytest.raises(ValueError, match="name must be that of a converted layer, got 'x'"):
        report.curve("x")
    plain = convert(network(), bits=4, batch_sizes=(1,))
    assert {each.name for each in plain.layers[0].candidates if each.tables} == {"one bit, rank 0"}
    assert not convert(network(), bits=4, batch_sizes=()).curve()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.5}, TypeError, r'budget must be a dict as {"time": 0.8} or {"bytes": 2.0}, got float'),
        ({"budget": {}}, ValueError, "budget must have the keys 'time', 'bytes' or both, got 'none'"),
        ({"budget": {"ms": 1}}, ValueError, "budget must have the keys 'time', 'bytes' or both, got 'ms'"),
        ({"budget": {"time": 0}}, ValueError, "budget must be positive finite multiples .*, got 0 for time"),
        ({"budget": {"time": 1.0}}, ValueError, "budget of time needs batch_sizes, .*, got none"),
        (
            {"budget": {"bytes": 0.5}},
            ValueError,
            "budget must be met by some tables or signs for every layer, got bytes 0.5 for 0",
        ),
    ],
)
def test_budgets_that_cannot_be(options, error, message):
    model = network()
    before = dict(model.named_modules())
    with pytest.raises(error, match=message) as caught:
        convert(model, bits=4, batch_sizes=(), **options)
    if "nearest" in str(caught.value):
        assert re.search(r"nearest: signs, one bit, rank 0 \(bytes 1\.\d+, error 0\.\d+\); signs", str(caught.value))
    assert dict(model.named_modules()) == before
