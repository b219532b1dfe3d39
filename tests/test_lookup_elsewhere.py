"""Lookup layers in other people's machinery: counters, traces, processes, adapters, offloading, mixed precision."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import pyrepr
from pyrepr.nn import LookupLinear

PROCESS = Path(__file__).with_name("lookup_process.py")


def convert(model, data, **options):
    options = {"bits": 4, "batch_sizes": (), "progress": False, **options}
    return pyrepr.convert(model, data, **options)


def fitted(**options) -> LookupLinear:
    torch.manual_seed(0)
    return LookupLinear.from_linear(nn.Linear(32, 64), torch.randn(300, 32), **options)


def test_operations_are_counted():
    formulas = pyrepr.functional.flop_formulas()

    def count(function) -> int:
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            function()
        return counter.get_total_flops()

    plain, x, low = LookupLinear(32, 64), torch.randn(2, 5, 32), fitted(rank=3, hash="two_bit")
    assert count(lambda: plain(x)) == (read := 2 * 10 * 4 * 64)
    assert count(lambda: plain(x).sum().backward()) == 2 * read  # tables alone
    assert count(lambda: plain(x.requires_grad_()).sum().backward()) == 3 * read
    with torch.no_grad():
        assert count(lambda: low(x)) == 2 * 10 * (8 * 64 + 3 * (2 * 32 + 64))
        plain.pack_()
        assert count(lambda: plain(x)) == read
    codes, weights, tables = torch.zeros(10, 4, dtype=torch.int32), torch.ones(10, 4), torch.ones(4, 3, 64)
    assert count(lambda: pyrepr.lookup_sum(codes, weights, tables)) == read
    assert count(lambda: pyrepr.segment_sum(torch.ones(10, 64), codes, 3)) == read


@pytest.mark.parametrize("kind", ["plain", "converted", "int8", "packed"])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
def test_traces_serve_any_number_of_tokens(kind, shape):
    layer = LookupLinear(32, 64) if kind == "plain" else fitted(rank=3, hash="two_bit")
    layer = layer.quantize_("int8") if kind in ("int8", "packed") else layer
    layer = layer.pack_() if kind == "packed" else layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and says which sizes a trace holds fixed
        traced = torch.jit.trace(layer, torch.randn(shape))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
    x = torch.randn(*shape[:-2], 11, 32)
    assert torch.equal(traced(x), layer(x)) and torch.equal(again(x), layer(x))
    if kind == "plain":
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), layer.tables)[0] for f in (traced, layer))
        assert torch.equal(ours, theirs)


def test_gradients_of_several_processes_dense_and_sparse(tmp_path):
    commands = [[sys.executable, str(PROCESS), str(rank), "2", str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    failed = [text for text, rank in zip(errors, ranks, strict=True) if rank.returncode]
    assert not failed, failed[0]


@pytest.mark.parametrize(("form", "stored"), [("tables", "tables"), ("signs", "weight")])
def test_bfloat16_students_take_steps_smaller_than_their_rounding(form, stored):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
    data = [torch.randn(100, 32) for _ in range(8)]
    student = copy.deepcopy(teacher)
    convert(student, data, form=form, rank=4)  # of which signs let gradients through
    rounded, halves = copy.deepcopy(student).bfloat16(), [x.bfloat16() for x in data]
    trained = getattr(rounded[0], stored)
    start = trained.detach().float().clone()
    options = {"epochs": (0, 4), "lr": 1e-3, "progress": False}  # a bfloat16's step is 4e-3 to 8e-3 of it
    pyrepr.distill(student, teacher, data, **options)
    pyrepr.distill(rounded, copy.deepcopy(teacher).bfloat16(), halves, **options)
    moved, wanted = trained.detach().float() - start, getattr(student[0], stored).detach() - start
    assert trained.dtype == torch.bfloat16 and trained.grad is None
    # Steps that were rounded away one by one would leave the tables where they are.
    assert torch.corrcoef(torch.stack([moved.flatten(), wanted.flatten()]))[0, 1] > 0.8
    with pytest.raises(ValueError, match="student must be float32, float64 or bfloat16 to be trained, got float16"):
        pyrepr.distill(rounded.half(), teacher, data, **options)


class Adapted(nn.Module):
    """What PEFT makes of a linear layer: the layer as ``base_layer``, and two more."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merged(self) -> nn.Linear:
        self.base_layer.weight.data += self.lora_B["default"].weight @ self.lora_A["default"].weight
        return self.base_layer


def test_adapters_are_left_alone_and_can_be_merged():
    model, x = nn.Sequential(Adapted(nn.Linear(16, 16)), nn.Linear(16, 16)), torch.randn(200, 16)
    truth = model[0](x)
    report = convert(model, [x])
    assert [layer.name for layer in report.layers] == ["1"]
    reason = "belongs to an adapter, Adapted; merge it into the model first, or name the base_layer in select"
    names = ("0.base_layer", "0.lora_A.default", "0.lora_B.default")
    assert report.skipped == dict.fromkeys(names, reason)
    assert convert(model, [x], select=["0.base*", "0.lora_?.default"]).skipped == dict.fromkeys(names, reason)
    assert convert(model, [x], select="0.lora_A.default").skipped == {names[1]: reason}
    model[0] = model[0].merged()
    assert_close(model[0](x), truth)
    assert [layer.name for layer in convert(model, [x]).layers] == ["0"]


def test_what_an_adapter_wraps_is_converted_by_its_name_and_cannot_be_merged_then():
    model, x = nn.Sequential(Adapted(nn.Linear(16, 16))), torch.randn(400, 16)
    truth, added = model(x), model[0].lora_B["default"](model[0].lora_A["default"](x))
    report = convert(model, [x], select=["0.base_layer"], rank=16)
    assert not report.skipped and isinstance(model[0].base_layer, pyrepr.nn.LookupLinear)
    assert_close(model(x), truth, rtol=0, atol=1e-4)
    assert_close(model(x) - model[0].base_layer(x), added, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="a lookup layer has no dense weight to compute with"):
        model[0].merged()
    assert_close(model(x), truth, rtol=0, atol=1e-4)


def test_what_an_adapter_wraps_never_becomes_signs():
    model, x = nn.Sequential(Adapted(nn.Linear(16, 16))), torch.randn(400, 16)
    report = convert(model, [x], select=["0.base_layer"], form="signs")
    reason = "is wrapped by an adapter, whose merge would spoil signs unseen; tables refuse it"
    assert report.skipped == {"0.base_layer": reason}
    report = convert(model, [x], select=["0.base_layer"], budget={"bytes": 99.0})
    assert {each.name[:5] for each in report.layers[0].candidates if each.tables} == {"one b", "two b"}


class Weight(torch.Tensor):
    """A tensor of another class, as quantized weights are."""


class Experts(nn.Module):
    """Tokens go to the expert of their first element's sign; a third expert sees none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        at = torch.where(x[:, 0] > 0, 0, 1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[at == i] = expert(x[at == i])
        return out


def test_experts_without_tokens_offloaded_layers_and_weights_of_another_class():
    model = nn.Sequential(Experts(), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1]._hf_hook = object()
    model[2].weight = nn.Parameter(model[2].weight.detach().as_subclass(Weight))
    report = convert(model, [torch.randn(200, 16)])
    assert [layer.name for layer in report.layers] == ["0.experts.0", "0.experts.1", "3"]
    assert report.skipped == {
        "0.experts.2": "saw no row of the data",
        "1": "is offloaded: its weights are moved in and out by hooks",
        "2": "has a weight of class Weight, whose values are not what is stored",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_t5_in_16_bits_keeps_its_wo_in_float32(dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval().to(dtype)
    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo.float()
    ids = torch.randint(0, 40, (16, 12))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    before = model(**batch).logits
    report = convert(model, [batch], select=["**.wo", "**.wi"], rank=16)  # exact
    assert name in [layer.name for layer in report.layers] and not report.skipped
    assert model.get_submodule(name).tables.dtype == wo.weight.dtype == torch.float32
    assert report.output_mse < 1e-3 and model(**batch).logits.dtype == before.dtype


def test_a_transformer_encoder_runs_as_before_and_says_why():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 16)).eval()
    x = torch.randn(8, 5, 16)
    before = model[0](x)
    report = convert(model, [x])
    assert [layer.name for layer in report.layers] == ["1"]
    assert all(
        "TransformerEncoderLayer without being called" in report.skipped[f"0.layers.{i}.linear1"] for i in (0, 1)
    )
    assert torch.equal(model[0](x), before)
