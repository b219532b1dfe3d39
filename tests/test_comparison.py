"""pyrepr.compare: values against activations collected by hand, and what it must leave as it was."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import pyrepr
from pyrepr.models import _collecting as collecting
from pyrepr.models import comparison as comparison_module
from pyrepr.models._layers import choose_modules, default_layers


def perceptron(seed: int, width: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 4)).double()


def batches(count: int = 3, n: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.fixture(scope="module")
def berts():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).double().eval(), transformers.BertModel(config).double().eval()


def token_batches(lengths=(9, 6)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    result = []
    for length in lengths:
        ids = torch.randint(1, 50, (4, length), generator=generator)
        mask = (torch.arange(length) < torch.randint(2, length + 1, (4, 1), generator=generator)).long()
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


def hook_count(*models: nn.Module) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_values_are_cka_of_the_activations(estimator):
    a, b, data = perceptron(0), perceptron(1, 9), batches()
    result = pyrepr.compare(a, b, data, layers_a=["0", "3"], layers_b=["0", "1", "3"], estimator=estimator)
    a.eval(), b.eval()
    x = torch.cat(data)
    rows = [a[:1](x), a(x)]
    columns = [b[:1](x), b[:2](x), b(x)]
    expected = [[pyrepr.cka(r, c, estimator=estimator) for c in columns] for r in rows]
    exact = torch.stack([torch.stack(line) for line in expected]).detach()
    torch.testing.assert_close(result.values, exact, rtol=1e-10, atol=1e-12)
    assert (result.layers_a, result.layers_b) == (("0", "3"), ("0", "1", "3"))
    assert (result.count, result.mode, result.estimator, result.samples) == (18, "exact", estimator, "batch")


def test_minibatch_is_a_ratio_of_sums():
    a, b, data = perceptron(0), perceptron(1), batches()
    result = pyrepr.compare(a, b, data, layers_a="3", layers_b="3", mode="minibatch", kernel="rbf")
    a.eval(), b.eval()
    with torch.no_grad():
        xs, ys = ([f(x).double() for x in data] for f in (a, b))
        stream = pyrepr.StreamingCKA(mode="minibatch", kernel="rbf")
        for x, y in zip(xs, ys, strict=True):
            stream.update([x], [y])
    assert result.values.item() == pytest.approx(stream.compute().item(), rel=1e-6)
    assert (result.mode, result.kernel) == ("minibatch", "rbf")
    sigmas = [x for side in ("sigma_a", "sigma_b") for x in result.kernel_options[side]]
    assert sigmas == pytest.approx(stream.scales.tolist(), rel=1e-6)  # the first batch's median, of every layer
    assert result.kernel_options["bandwidth"] == 1.0 and "rbf kernel (bandwidth 1)" in result.describe()


def test_transformer_tokens_leave_out_padding(berts):
    data = token_batches()
    result = pyrepr.compare(*berts, data, samples="tokens")
    blocks = ("embeddings", "encoder.layer.0", "encoder.layer.1")
    assert result.layers_a == result.layers_b == blocks  # the pooler has a row a sequence, not a token
    sides = []
    for model in berts:
        rows = []
        for batch in data:
            with torch.no_grad():
                states = model(**batch, output_hidden_states=True).hidden_states
            rows.append([state[batch["attention_mask"].bool()] for state in states])
        sides.append([torch.cat(layer) for layer in zip(*rows, strict=True)])
    assert result.count == sum(int(batch["attention_mask"].sum()) for batch in data) == len(sides[0][0])
    torch.testing.assert_close(result.values, pyrepr.cka_matrix(*sides), rtol=1e-9, atol=1e-12)


def test_two_transformer_families_take_the_keys_they_know(berts):
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_embd=12, n_layer=2, n_head=2, n_positions=16)
    gpt = transformers.GPT2Model(config).double()
    data = [{**batch, "next_sentence": torch.zeros(4)} for batch in token_batches()]
    result = pyrepr.compare(gpt, berts[0], data, samples="tokens", layers_b="encoder.layer.*")
    assert result.layers_a == ("wte", "h.0", "h.1", "ln_f")  # wpe has one row of positions for the whole batch
    assert result.layers_b == ("encoder.layer.0", "encoder.layer.1")
    assert result.values.isfinite().all()


def test_conv_positions_are_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 1)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = pyrepr.compare(model, model, [x], samples="tokens")
    first = model[0](x).detach()  # before ReLU works on it in place
    second = model[2](first.relu()).detach()
    xs = [y.permute(0, 2, 3, 1).reshape(2 * 16, -1) for y in (first, second)]
    torch.testing.assert_close(result.values, pyrepr.cka_matrix(xs), rtol=1e-10, atol=1e-12)
    assert result.count == 32


def test_outputs_are_taken_before_the_next_module_works_in_place():
    model = perceptron(0)
    inplace = nn.Sequential(model[0], nn.ReLU(inplace=True), model[3])
    data = batches()
    values = pyrepr.compare(inplace, inplace, data).values
    torch.testing.assert_close(values, pyrepr.compare(model, model, data).values, rtol=0, atol=0)


@dataclasses.dataclass
class Output:
    index: torch.Tensor
    hidden: torch.Tensor


class Wrap(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return self.wrap(self.linear(x))


class Several(nn.Module):
    """Layers that put out a dataclass, a dict and a nested tuple."""

    def __init__(self):
        super().__init__()
        self.a = Wrap(lambda y: Output(torch.arange(len(y)), y))
        self.b = Wrap(lambda y: {"index": torch.arange(len(y)), "hidden": y})
        self.c = Wrap(lambda y: (None, [torch.arange(len(y)), y]))

    def forward(self, x):
        return self.c(self.b(self.a(x).hidden)["hidden"])


def test_outputs_of_every_form():
    torch.manual_seed(0)
    model = Several().double()
    result = pyrepr.compare(model, model, batches(), layers_a=["a", "b", "c"])
    same = pyrepr.compare(model, model, batches(), layers_a=["a.linear", "b.linear", "c.linear"])
    torch.testing.assert_close(result.values, same.values, rtol=0, atol=0)


def test_data_parallel_and_compiled_names_are_plain():
    plain, data = perceptron(0), batches()
    wrapped = nn.DataParallel(perceptron(0))
    nested = nn.Sequential(nn.DataParallel(perceptron(0)))
    expected = pyrepr.compare(plain, plain, data, layers_a=["0", "3"])
    result = pyrepr.compare(wrapped, torch.compile(plain), data, layers_a=["module.0", "3"], layers_b=["0", "3"])
    assert result.layers_a == result.layers_b == ("0", "3")
    torch.testing.assert_close(result.values, expected.values, rtol=1e-10, atol=1e-12)
    assert pyrepr.compare(nested, plain, data).layers_a == ("0.0", "0.3")


def test_the_same_batch_goes_to_both_models():
    dataset = torch.utils.data.TensorDataset(torch.randn(24, 5, dtype=torch.float64))
    loader = torch.utils.data.DataLoader(dataset, batch_size=6, shuffle=True)
    result = pyrepr.compare(perceptron(0), perceptron(0), loader, layers_a="3", layers_b="3")
    assert result.values.item() == pytest.approx(1, abs=1e-12)


def test_a_model_and_itself_run_once():
    model, calls = perceptron(0), []
    model.register_forward_hook(lambda *_: calls.append(1))
    values = pyrepr.compare(model, model, batches()).values
    assert len(calls) == 3 + 2  # the experiment takes two
    torch.testing.assert_close(values, values.T, rtol=1e-12, atol=0)
    torch.testing.assert_close(values.diagonal(), torch.ones(2).double(), rtol=1e-12, atol=0)


def test_training_flags_and_hooks_are_restored():
    a, b = perceptron(0).train(), perceptron(1).train()
    a[2].eval()
    flags = [m.training for m in (*a.modules(), *b.modules())]
    pyrepr.compare(a, b, batches())
    assert [m.training for m in (*a.modules(), *b.modules())] == flags
    assert hook_count(a, b) == 0


def test_everything_is_restored_when_a_forward_fails():
    a, b = perceptron(0).train(), perceptron(1).train()
    seen = []

    def fail(module, args):
        seen.append(hook_count(a, b))
        raise RuntimeError("out of luck")

    handle = b[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        pyrepr.compare(a, b, batches())
    handle.remove()
    assert len(seen) == 1 and seen[0] > 0  # the hooks were there
    assert hook_count(a, b) == 0
    assert all(m.training for m in (*a.modules(), *b.modules()))


def test_no_gradients_and_eval_mode_during_the_run():
    seen = []

    class Probe(nn.Linear):
        def forward(self, x):
            seen.append((torch.is_grad_enabled(), self.training))
            return super().forward(x)

    pyrepr.compare(Probe(5, 5).double(), perceptron(0), batches(1))
    assert set(seen) == {(False, False)}


def test_activations_of_past_batches_are_freed(monkeypatch):
    """When a batch is in the first model's hands, nothing recorded for an earlier batch is alive."""
    recorded: list[weakref.ref] = []
    update = pyrepr.StreamingCKA.update

    def watched(self, xs, ys=None):
        recorded.extend(weakref.ref(x) for x in [*xs, *(ys or ())])
        return update(self, xs, ys)

    def check(*_):
        gc.collect()
        assert not [ref for ref in recorded if ref() is not None]

    monkeypatch.setattr(pyrepr.StreamingCKA, "update", watched)
    model = perceptron(0)
    model.register_forward_pre_hook(check)
    pyrepr.compare(model, perceptron(1), batches())
    assert len(recorded) == 3 * 4


def test_default_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
            self.stage = nn.Sequential(self.block(), self.block())
            self.stages = nn.ModuleList([nn.Sequential(self.block(), nn.Identity())])
            self.drop = nn.Dropout()
            self.head = nn.Linear(2, 2)

        def block(self):
            return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    assert default_layers(Net()) == ["stem", "stage.0", "stage.1", "stages.0", "head"]
    assert default_layers(perceptron(0)) == ["0", "3"]
    assert default_layers(nn.Linear(2, 2)) == ["(model)"]


def test_patterns_stay_within_one_part_of_a_name(berts):
    model = berts[0]
    assert choose_modules(model, "encoder.layer.*", "layers_a") == ["encoder.layer.0", "encoder.layer.1"]
    assert choose_modules(model, ["pooler", "**.query"], "layers_a") == [
        "pooler",
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.attention.self.query",
    ]
    assert len(choose_modules(model, lambda name, module: isinstance(module, nn.LayerNorm), "layers_a")) == 5


def test_unknown_layer_lists_near_matches(berts):
    with pytest.raises(ValueError, match=r"layers_a: .*no layer 'encoder.layers.1'; near matches: .*encoder\.layer\.1"):
        pyrepr.compare(*berts, token_batches(), layers_a=["encoder.layers.1"])
    with pytest.raises(ValueError, match=r"layers_b: .*'self.query'; near matches: encoder.layer.0.att"):
        pyrepr.compare(*berts, token_batches(), layers_b="self.query")


def test_stored_activations_stand_for_a_model():
    model, data = perceptron(0).eval(), batches()
    stored = {"brain": torch.cat([model[:1](x) for x in data]).detach()}
    expected = pyrepr.compare(model, model, data, layers_b=["0"])
    result = pyrepr.compare(model, stored, data)
    torch.testing.assert_close(result.values, expected.values, rtol=1e-10, atol=1e-12)
    assert result.layers_b == ("brain",)
    alone = pyrepr.compare(stored, stored)
    assert (alone.values.item(), alone.mode, alone.count) == (pytest.approx(1), "exact", 18)
    with pytest.raises(ValueError, match="model_b has 17 stored rows, but the data gives more"):
        pyrepr.compare(model, {"brain": stored["brain"][:-1]}, data)
    with pytest.raises(ValueError, match="model_b has 36 stored rows, but the data gives 18"):
        pyrepr.compare(model, {"brain": torch.cat([stored["brain"]] * 2)}, data)
    with pytest.raises(ValueError, match="model_a must have at least 4 rows for the unbiased estimator, got 3"):
        pyrepr.compare({"brain": stored["brain"][:3]}, {"brain": stored["brain"][:3]})
    with pytest.raises(ValueError, match="data must be None where both sides"):
        pyrepr.compare(stored, stored, data)


def test_auto_mode_goes_by_the_size_of_the_moments(monkeypatch):
    args = (perceptron(0), perceptron(1), batches())
    need = 2 * 8 * ((7 * 7 + 4 * 4) * 2 + 11 * 11) + 3 * 8 * 7 * 7
    monkeypatch.setattr(comparison_module, "EXACT_BYTES", need)
    assert pyrepr.compare(*args).mode == "exact"
    monkeypatch.setattr(comparison_module, "EXACT_BYTES", need - 1)
    assert pyrepr.compare(*args).mode == "minibatch"
    monkeypatch.setattr(collecting, "memory", lambda: need - 1)
    with pytest.raises(ValueError, match=r"mode='exact' would keep .* use mode='minibatch'"):
        pyrepr.compare(*args, mode="exact")


def test_the_size_of_the_moments_is_what_the_stream_keeps():
    x, y = torch.randn(9, 5), torch.randn(9, 3)
    for ys, split in ((None, 0), ([y, x], 2)):
        stream = pyrepr.StreamingCKA().update([x, y], ys)
        widths = [5, 3] if ys is None else [5, 3, 3, 5]
        kept = sum(block.numel() * block.element_size() for block in stream.state_dict()["state"]["blocks"])
        assert collecting.exact_bytes(widths, split) == 2 * kept + 3 * 8 * 5 * 5


PEAK = """
import sys, threading, torch, pyrepr
from torch import nn
from pyrepr.models._collecting import exact_bytes
mode, width, count = sys.argv[1], int(sys.argv[2]), 6
torch.set_num_threads(1)

class Turned(nn.Module):
    def forward(self, x):
        return 1.01 * x.roll(1, 1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def watch():
    while not done.wait(0.002):
        peaks.append(resident())

model = nn.Sequential(*[Turned() for _ in range(count)])
layers = [str(i) for i in range(count)]
data = (torch.randn(64, width, generator=torch.Generator().manual_seed(i)) for i in range(6))
small = [torch.randn(16, 8)]
pyrepr.compare(model, model, small, mode=mode, progress=False, layers_a=layers)
before, peaks, done = resident(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
pyrepr.compare(model, model, data, mode=mode, progress=False, layers_a=layers)
done.set()
thread.join()
print((max(peaks) - before) / 2**20, exact_bytes([width] * count, 0) / 2**20, 64 * width * 4 * count / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident memory is read from /proc")
def test_the_stated_memory_is_the_real_peak():
    def run(mode: str, width: int) -> list[float]:
        argv = [sys.executable, "-c", PEAK, mode, str(width)]
        # With glibc's own, moving threshold blocks go to its heap, whose holes count too: 246 to 298 MiB seen.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
        result = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
        return [float(x) for x in result.stdout.split()]

    peak, stated, batch = run("exact", 1024)
    assert 0.8 * stated < peak < 1.1 * stated + 4 * batch  # 243 of 256 MiB seen
    peak, stated, batch = run("minibatch", 16384)
    assert peak < 2 * batch and peak < stated / 100  # 32 MiB of 42 GiB seen; a batch of activations is 24


def test_models_of_two_dtypes():
    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.float())

    result = pyrepr.compare(perceptron(0), Cast(perceptron(0).float()), batches(), layers_a="3", layers_b="inner.3")
    assert result.values.item() == pytest.approx(1, abs=1e-6)


def test_constant_layer_is_named_in_the_warning():
    x = torch.cat(batches())
    with pytest.warns(pyrepr.DegenerateInputWarning, match="model_b 3: all samples"):
        result = pyrepr.compare(perceptron(0), {"0": x, "3": torch.ones_like(x)}, batches())
    assert result.values[:, 1].isnan().all() and result.values[:, 0].isfinite().all()
    assert "CKA" in repr(result)
    b = perceptron(1)
    nn.init.zeros_(b[3].weight)
    with pytest.warns(UserWarning, match=r"1 layer left out \(see result.skipped\): model_b 3 is the same for every"):
        assert pyrepr.compare(perceptron(0), b, batches()).layers_b == ("0",)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": "rows"}, ValueError, "samples must be 'batch' or 'tokens', got 'rows'"),
        ({"mode": "fast"}, ValueError, "mode must be 'auto', 'exact' or 'minibatch'"),
        ({"estimator": "best"}, ValueError, "estimator must be"),
        ({"kernel": "cubic"}, ValueError, "kernel must be one of"),
        ({"mode": "exact", "kernel": "rbf"}, ValueError, "kernel must be 'linear' in mode 'exact'"),
        ({"data": []}, ValueError, "data must give at least one batch, got none"),
        ({"data": None}, ValueError, "data must be an iterable of batches, got None"),
        ({"data": 3}, TypeError, "data must be an iterable of batches, got int"),
        ({"data": batches(1, n=3)}, ValueError, "data must give at least 4 samples"),
        (
            {"data": batches(1, n=3), "mode": "minibatch"},
            ValueError,
            "at least 4 samples in mode 'minibatch'",
        ),
        ({"data": [(torch.ones(6, 5),) * 3]}, ValueError, r"a batch of 3 parts is neither \(x,\) nor \(x, labels\)"),
        ({"data": [((torch.ones(6, 5),) * 2,)]}, ValueError, "2 inputs of a batch do not fit model_a, Sequential"),
        ({"data": torch.ones(6, 5)}, TypeError, r"data must be an iterable of batches, got one tensor; \[x\] is one"),
        ({"data": torch.ones(6, 5).numpy()}, TypeError, r"got ndarray; \[x\] is one batch, .*split\(32\) several"),
        ({"data": {"x": torch.ones(6, 5)}}, TypeError, r"got dict; \[batch\] is one batch"),
        ({"data": "text.txt"}, TypeError, "got str; read the file, tokenize"),
        ({"data": torch.utils.data.TensorDataset(torch.ones(6, 5))}, TypeError, "got TensorDataset; .*DataLoader"),
        ({"data": 3}, TypeError, "data must be an iterable of batches, got int; a list or a DataLoader"),
        ({"data": [["a text", "another"]]}, ValueError, "model_a cannot take str; tokenize, or say how with inputs="),
        ({"data": batches(1, n=1)}, ValueError, "the first batch must have at least two samples, got 1"),
        ({"tokens": "some"}, ValueError, "tokens must be 'all', 'no_special' or a function"),
        ({"pool": "median"}, ValueError, "pool must be None or one of 'mean', 'last'"),
        ({"pool": "mean", "samples": "tokens"}, ValueError, "pool='mean' makes one row a sample, so samples must be"),
        ({"inputs": "x"}, TypeError, "inputs must be a function of a batch or a pair of them"),
        ({"data": [{"pixels": torch.ones(6, 5)}]}, ValueError, "model_a takes none of the batch's keys pixels"),
        ({"model_a": "resnet"}, TypeError, "model_a must be a torch.nn.Module or a dict"),
        ({"layers_a": []}, ValueError, "layers_a must name at least one layer"),
        ({"layers_a": lambda name, module: False}, ValueError, "layers_a: the function chose none"),
        ({"layers_a": [3]}, TypeError, "layers_a must hold names of layers as strings, or Layer, got int"),
        ({"layers_a": 3}, TypeError, "layers_a must be names, patterns or a function, got int"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"model_a": perceptron(0), "model_b": perceptron(1), "data": batches(), **change}
    with pytest.raises(error, match=message):
        pyrepr.compare(**arguments)


def test_layers_the_forward_does_not_call():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            return self.used(x)

    model = Spare().double()
    assert pyrepr.compare(model, model, batches()).layers_a == ("used",)
    with pytest.raises(ValueError, match="layers_a: spare is not called in the model's forward"):
        pyrepr.compare(model, model, batches(), layers_a=["used", "spare"])


def test_different_lengths_need_tokens(berts):
    with pytest.raises(ValueError, match=r"144 features a row of the first batch, got 96; .*samples='tokens'"):
        pyrepr.compare(*berts, token_batches())


def test_models_that_cut_differently_are_refused(berts):
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 4).double()

        def forward(self, input_ids):
            return self.embed(input_ids[:, ::2])

    data = [{"input_ids": batch["input_ids"]} for batch in token_batches()]
    with pytest.raises(ValueError, match="must give the same tokens for a batch, got 36 and 20"):
        pyrepr.compare(berts[0], Halved(), data, samples="tokens")


@pytest.fixture
def result():
    return pyrepr.compare(perceptron(0), perceptron(1), batches(), names=("first", "</script><b>second"))


def test_save_and_load(result, tmp_path):
    loaded = pyrepr.Comparison.load(result.save(tmp_path / "result.npz"))
    assert torch.equal(loaded.values, result.values)
    assert loaded.metadata() == result.metadata()
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]
    with pytest.raises(ValueError, match=r"path must end in \.npz"):
        result.save(tmp_path / "result.bin")
    with pytest.raises(FileNotFoundError, match=r"none/result\.npz cannot be written: there is no folder .*none$"):
        result.save(tmp_path / "none" / "result.npz")
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"written by Comparison\.save"):
        pyrepr.Comparison.load(tmp_path / "other.npz")


def test_a_failed_save_leaves_what_was_there(result, tmp_path, monkeypatch):
    import numpy as np

    path = result.save(tmp_path / "result.npz")
    before = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(OSError, match="disk full"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plot(result, tmp_path, suffix, start):
    path = tmp_path / f"heatmap{suffix}"
    result.plot(path=path, dpi=50)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_plot_refuses_other_suffixes(result, tmp_path):
    with pytest.raises(ValueError, match=r"path must end in one of \.png, \.svg, \.pdf"):
        result.plot(tmp_path / "heatmap.txt")


def test_missing_matplotlib_names_the_extra(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "pyrepr-kernels\[plot\]"'):
        result.plot(tmp_path / "heatmap.png")


def test_page_is_self_contained(result, tmp_path):
    values = result.values.clone()
    values[0, 0] = torch.nan
    result = dataclasses.replace(result, values=values)
    page = result.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "__DATA__" not in page and "__TITLE__" not in page
    assert "src=" not in page and "<link" not in page and page.count("</script>") == 1
    assert [part for part in page.split('"') if part.startswith("http")] == ["http://www.w3.org/2000/svg"]
    line = next(line for line in page.splitlines() if line.startswith("const data = "))
    data = json.loads(line.removeprefix("const data = ").removesuffix(";"))
    assert data["model_b"] == "</script><b>second"
    (measure,) = data["measures"]
    assert measure["values"][0][0] is None and measure["stderr"] is None
    assert measure["values"][1][1] == pytest.approx(result.values[1, 1].item())


def test_wrong_shape_of_values_is_refused(result):
    with pytest.raises(ValueError, match=r"values must have shape \[La, Lb\] = \[2, 2\], got \[1, 2\]"):
        dataclasses.replace(result, values=result.values[:1])
