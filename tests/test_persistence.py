"""Converted models survive a file: save_converted and load_converted, save_pretrained and from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pyrepr
import pyrepr.integrations.transformers
from pyrepr.nn import LookupLinear, SignLinear

transformers = pytest.importorskip("transformers", minversion="5.20")
SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "BertModel": transformers.BertConfig(**SMALL, max_position_embeddings=32),
    "GPT2LMHeadModel": transformers.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2),
    "T5ForConditionalGeneration": transformers.T5Config(**T5, decoder_start_token_id=0),
    "LlamaForCausalLM": transformers.LlamaConfig(**SMALL, num_key_value_heads=1),
    "MixtralForCausalLM": transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4),
}


def pretrained(name, seed=0):
    torch.manual_seed(seed)
    return getattr(transformers, name)(CONFIGS[name]).eval()


def tokens(name, seed=1):
    ids = torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if name.startswith("T5") else {})}


def output(model, name):
    with torch.no_grad():
        return model(**tokens(name))[0]


def network(seed=0, wide=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, 64)).eval()


def converted(**options):
    model = network()
    options = {"bits": 4, "rank": 2, **options}
    pyrepr.convert(model, [torch.randn(200, 16)], batch_sizes=(), progress=False, **options)
    return model


@pytest.mark.parametrize("form", ["tables", "signs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_come_back_bit_for_bit_in_a_fresh_process(name, form, tmp_path):
    model = pretrained(name)
    data = [tokens(name, seed) for seed in range(2, 10)]
    hash = "one_bit" if name.startswith(("T5", "Llama")) else "two_bit"
    options = {"batch_sizes": (), "progress": False, "form": form}
    report = pyrepr.convert(model, data, bits=8, hash=hash, rank=4, quantize="int8", **options)
    kind = {"tables": "LookupLinear", "signs": "SignLinear"}[form]
    assert len(report.layers) >= 8 and not hasattr(CONFIGS[name], "quantization_config")
    model.save_pretrained(tmp_path / "folder")
    pyrepr.save_converted(model, tmp_path / "model.safetensors")
    torch.save({"out": output(model, name), "tokens": tokens(name)}, tmp_path / "expected.pt")
    again = pyrepr.load_converted(pretrained(name, seed=5), tmp_path / "model.safetensors")
    assert torch.equal(output(again, name), output(model, name))
    code = f"""
import torch, transformers, pyrepr.integrations.transformers
expected = torch.load("expected.pt")
model = transformers.{name}.from_pretrained("folder").eval()
assert sum(type(m) is pyrepr.nn.{kind} for m in model.modules()) == {len(report.layers)}
with torch.no_grad():
    assert torch.equal(model(**expected["tokens"])[0], expected["out"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


class Block(nn.Module):
    """A feed-forward network beside a norm, as users write them."""

    def __init__(self, activation, width=16, out=64):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 32), activation, nn.Linear(32, out))

    def forward(self, x):
        return self.mlp(self.norm(x))


class Unusual(nn.Module):
    def forward(self, x):
        return x.clamp(-1, 2)


@pytest.mark.parametrize("kind", ["remainder", "tables", "linear+neurons"])
@pytest.mark.parametrize("activation", [nn.ReLU(), transformers.activations.GELUActivation()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_networks(kind, activation, dtype, tmp_path):
    torch.manual_seed(0)
    model = Block(activation).to(dtype)
    layer = LookupLinear.from_mlp(model.mlp, torch.randn(400, 16).to(dtype), kind=kind, bits=4, neurons=5)
    if kind == "tables":
        layer.rest.quantize_("int8").pack_()
    model.mlp = layer
    path, x = pyrepr.save_converted(model, tmp_path / "a.safetensors"), torch.randn(7, 16).to(dtype)
    other = Block(nn.Tanh())
    again = pyrepr.load_converted(other, path)
    assert type(again.mlp) is type(layer) and torch.equal(again(x), model(x))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(pyrepr.load_converted(again, path)(x), model(x))
    what = "linear layer" if kind == "remainder" else "network"
    for wrong in (Block(nn.ReLU(), out=32), Block(nn.ReLU(), width=8)):
        with pytest.raises(ValueError, match=f"model must have a {what} mlp, which path holds converted"):
            pyrepr.load_converted(wrong, path)
        assert isinstance(wrong.mlp, nn.Sequential)


def test_an_activation_that_no_file_can_name(tmp_path):
    model = Block(Unusual())
    model.mlp = LookupLinear.from_mlp(model.mlp, torch.randn(400, 16), kind="linear+neurons", neurons=5)
    with pytest.raises(ValueError, match="that a file can describe, got a Unusual"):
        pyrepr.save_converted(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantize", [None, "bf16", "int8"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hash", ["one_bit", "two_bit"])
def test_every_kind_of_table(quantize, packed, hash, tmp_path):
    model = converted(quantize=quantize, hash=hash)
    if packed:
        model[3].pack_()
    model[1].running_mean.normal_()
    x = torch.randn(5, 16)
    other = network(seed=3).train()
    other[1].eval()
    again = pyrepr.load_converted(other, pyrepr.save_converted(model, tmp_path / "a.safetensors"))
    assert again is other and again[0].training and not again[1].training
    assert again[3].packed == packed and again[3].tables.dtype == model[3].tables.dtype
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(again.eval()(x), model(x))
    assert torch.equal(pyrepr.load_converted(again, tmp_path / "a.safetensors")(x), model(x))


@pytest.mark.parametrize("quantize", [None, "bf16", "int8"])
@pytest.mark.parametrize("hash", ["one_bit", "two_bit"])
def test_every_kind_of_signs(quantize, hash, tmp_path):
    model = converted(form="signs", quantize=quantize, hash=hash)
    path, x = pyrepr.save_converted(model, tmp_path / "a.safetensors"), torch.randn(5, 16)
    again = pyrepr.load_converted(network(seed=3), path)
    assert type(again[3]) is SignLinear and again[3].hash == hash and again[3].weight.dtype == model[3].weight.dtype
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    tables = pyrepr.load_converted(converted(), path)  # in the place of other converted layers
    for each in (again, tables, pyrepr.load_converted(again, path)):
        assert torch.equal(each(x), model(x))
    for wrong in (wrong_class, wrong_width, wrong_layer, one_layer_more):
        with pytest.raises(ValueError, match=r"path (holds|has)"):
            pyrepr.load_converted(wrong(), path)


def test_signs_in_whole_networks(tmp_path):
    model, x = Block(nn.ReLU()), torch.randn(7, 16)
    model.mlp = nn.Sequential(SignLinear(16, 64), nn.ReLU(), SignLinear(64, 64).quantize_("int8"))
    other = Block(nn.ReLU())
    other.mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
    path = pyrepr.save_converted(model, tmp_path / "a.safetensors")
    assert torch.equal(pyrepr.load_converted(other, path)(x), model(x))
    plus = Block(nn.ReLU())
    plus.mlp = pyrepr.nn.LinearPlus(nn.Linear(16, 64), SignLinear(16, 64, dtype=torch.bfloat16))
    path = pyrepr.save_converted(plus, tmp_path / "b.safetensors")
    assert torch.equal(pyrepr.load_converted(Block(nn.ReLU()), path)(x), plus(x))


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    def tied():
        model = nn.ModuleDict({"a": nn.Embedding(400, 16), "b": nn.Linear(16, 400, bias=False), "c": nn.Linear(16, 16)})
        model["b"].weight = model["a"].weight
        return model

    model = tied()
    model["c"] = LookupLinear.from_linear(model["c"], torch.randn(99, 16), bits=4)
    path = pyrepr.save_converted(model, tmp_path / "a.safetensors")
    assert path.stat().st_size < 400 * 16 * 4 + 4 * 16 * 16 * 4 + 5000
    again = pyrepr.load_converted(tied(), path)
    assert again["a"].weight is again["b"].weight and torch.equal(again["b"].weight, model["b"].weight)
    loose = tied()
    loose["b"].weight = nn.Parameter(torch.zeros(400, 16))
    again = pyrepr.load_converted(loose, path)
    again["a"].weight.data.zero_()
    assert torch.equal(again["b"].weight, model["b"].weight)
    loose["c"] = model["c"]
    pyrepr.save_converted(loose, path)
    with pytest.raises(ValueError, match=r"model ties a\.weight to b\.weight, which path has apart"):
        pyrepr.load_converted(tied(), path)


def wrong_class():
    return nn.ModuleList(network())


def wrong_width():
    return network(wide=32)


def wrong_layer():
    model = network()
    model[3] = nn.Identity()
    return model


def one_layer_more():
    return network().append(nn.Linear(64, 2))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (wrong_class, "path holds a converted Sequential, but model is a ModuleList"),
        (wrong_width, r"model must have 16 → 16 features in 0, which path holds converted, got 16 → 32"),
        (wrong_layer, "model must have a linear layer 3, which path holds converted, got a Identity"),
        (one_layer_more, r"must hold the same tensors, got 4\.weight, which model has, but path has not, and 1 more"),
    ],
)
def test_other_models_are_refused_and_stay_as_they_were(other, said, tmp_path):
    path = pyrepr.save_converted(converted(), tmp_path / "a.safetensors")
    model = other()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    with pytest.raises(ValueError, match=said):
        pyrepr.load_converted(model, path)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_an_interrupt_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    saved = converted()
    saved[3].pack_()
    path = pyrepr.save_converted(saved, tmp_path / "a.safetensors")
    model = network(seed=9)
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(LookupLinear, "pack_", interrupted)  # the last step
    with pytest.raises(KeyboardInterrupt):
        pyrepr.load_converted(model, path)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_files_of_something_else(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError):
        pyrepr.load_converted(network(), tmp_path / "nothing.safetensors")
    path = tmp_path / "a.safetensors"
    content = {"format": "pyrepr.converted", "model": "Sequential", "layers": {"0": {"bits": 4}}, "aliases": {}}
    for write in (
        lambda: path.write_bytes(b"no safetensors"),
        lambda: save_file({"a": torch.ones(2)}, path),
        lambda: save_file({"a": torch.ones(2)}, path, {"pyrepr": "[]"}),
        lambda: save_file({"a": torch.ones(2)}, path, {"pyrepr": json.dumps({**content, "aliases": {"b": "c"}})}),
    ):
        write()
        with pytest.raises(ValueError, match="path must be a file written by pyrepr"):
            pyrepr.load_converted(network(), path)
    save_file({"a": torch.ones(2)}, path, {"pyrepr": json.dumps(content)})
    with pytest.raises(ValueError, match="path is damaged: layer 0, specification must come from"):
        pyrepr.load_converted(network(), path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got 'a\.pt'"):
        pyrepr.save_converted(converted(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="model must hold at least one LookupLinear or SignLinear, got none in"):
        pyrepr.save_converted(network(), tmp_path / "a.safetensors")
    model = converted()
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"plain tensors with values, got 1\.weight on the meta device"):
        pyrepr.save_converted(model, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        pyrepr.save_converted({}, tmp_path / "a.safetensors")
    assert not list(Path(tmp_path).iterdir())


def test_int8_tables_never_load_into_float_ones_or_the_other_way():
    floats, bytes_ = LookupLinear(16, 8, bits=4), LookupLinear(16, 8, bits=4).quantize_("int8")
    for target, source in ((floats, bytes_), (bytes_, floats)):
        before = target.tables.clone()
        with pytest.raises(RuntimeError, match=r"tables must be torch\.\w+ as this layer's, got torch\.\w+; make"):
            target.load_state_dict(source.state_dict(), strict=False)
        assert torch.equal(target.tables, before)
    layer = LookupLinear(16, 8, bits=4, table_dtype=torch.int8)
    layer.load_state_dict(bytes_.state_dict())
    assert torch.equal(layer.tables, bytes_.tables)


def test_a_conversion_that_fails_leaves_no_mark(monkeypatch):
    import pyrepr.models.conversion as conversion

    model = pretrained("BertModel")

    def full(**_):
        raise MemoryError("full")

    monkeypatch.setattr(conversion, "Conversion", full)
    with pytest.raises(MemoryError):
        pyrepr.convert(model, [tokens("BertModel")], progress=False, batch_sizes=())
    assert getattr(model, "hf_quantizer", None) is None and getattr(model.config, "quantization_config", None) is None
