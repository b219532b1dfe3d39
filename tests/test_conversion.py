"""pyrepr.convert and pyrepr.distill: errors against what they say, and what they must leave as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import pyrepr
from pyrepr.nn import LookupLinear, SignLinear
from pyrepr.nn._lookup_fit import hold_out


class Residual(nn.Module):
    def __init__(self, d: int, h: int):
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(d, h), nn.GELU(), nn.Dropout(0.5), nn.Linear(h, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x):
        return self.norm(x + self.down(self.drop(self.act(self.up(x)))))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), Residual(32, 48), Residual(32, 48), nn.Linear(32, 10))


def batches(count: int = 8, n: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 20, generator=generator) for _ in range(count)]


def convert(model, data=None, **options):
    data = batches() if data is None else [data] if isinstance(data, (torch.Tensor, dict)) else data
    return pyrepr.convert(model, data, progress=False, batch_sizes=(), **options)


def layers(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


def test_default_selection_replaces_what_it_can_and_names_the_rest():
    model = network()
    report = convert(model, rank=4)
    assert layers(model, LookupLinear) == ["1.up", "1.down", "2.up", "2.down", "3"]
    assert [layer.name for layer in report.layers] == layers(model, LookupLinear)
    assert report.skipped == {"0": "has in_features = 20, no multiple of a chunk's 8 elements"}
    assert isinstance(model[0], nn.Linear) and model[3].down.shape == (4, 32)
    assert all(0 < layer.relative_mse < 0.5 for layer in report.layers)


def test_a_layer_is_fitted_to_what_the_layers_replaced_before_it_put_out(monkeypatch):
    model, fit, given = network().eval(), LookupLinear.from_linear, []

    def watched(linear, calibration, **options):
        given.append(calibration)
        return fit(linear, calibration, **options)

    monkeypatch.setattr(LookupLinear, "from_linear", watched)
    convert(model, select=["1.up", "2.up"])
    x = torch.cat(batches())
    with torch.no_grad():
        torch.testing.assert_close(given[1], model[:2](x)[~hold_out(len(x))])
        assert relative(given[1], network().eval()[:2](x)[~hold_out(len(x))]) > 0.003  # as the original has it


def test_errors_are_those_of_unseen_rows():
    model, original = network().eval(), network().eval()
    report = convert(model, batches(8, 1000), select=["1.up", "2.up"])
    x, data = torch.randn(20000, 20), torch.cat(batches(8, 1000))
    with torch.no_grad():
        for name, layer in zip(("1", "2"), report.layers, strict=True):
            given = model[: int(name)](x)
            error = relative(model.get_submodule(name).up(given), original.get_submodule(name).up(given))
            assert layer.relative_mse == pytest.approx(error, rel=0.05)  # 2 % seen: a thousand rows are held out
        assert report.output_mse == pytest.approx(relative(model(data), original(data)), rel=1e-4)


def test_report_counts_bytes_buckets_and_times():
    model = network()
    report = pyrepr.convert(model, batches(), select="3", rank=2, batch_sizes=(1, 33), progress=False)
    (layer,) = report.layers
    assert layer.bytes_before == 4 * (32 * 10 + 10)
    assert layer.bytes_after == 4 * (4 * 256 * 10 + 10 + 2 * 32 + 2 * 32 + 2 * 10)  # tables, bias, centre, scale, V, U
    assert (layer.rows, report.calibration_rows, report.batch_sizes) == (1024, 1600, (1, 33))
    assert 0 <= layer.dead_rows < 1024 and 4 < layer.entropy <= 8
    assert len(layer.ms_before) == len(layer.ms_after) == 2
    assert all(ms > 0 for ms in (*layer.ms_before, *layer.ms_after))


def test_quantized_tables():
    model, plain = network(), network()
    smaller = convert(model, select="3", quantize="int8").layers[0]
    layer = convert(plain, select="3").layers[0]
    assert model[3].tables.dtype == torch.int8
    assert smaller.bytes_after < 0.45 * layer.bytes_after
    assert smaller.relative_mse == pytest.approx(layer.relative_mse, rel=0.02)


def test_signs_take_every_layer_and_the_report_says_so(tmp_path):
    model, original = network().eval(), network().eval()
    report = pyrepr.convert(model, batches(8, 1000), form="signs", rank=4, batch_sizes=(1,), progress=False)
    assert [layer.name for layer in report.layers] == layers(model, SignLinear) and not report.skipped
    assert len(report.layers) == 6 and all(module.hash == "two_bit" for module in model.modules() if is_signs(module))
    assert (report.form, report.hash, report.weighting) == ("signs", "two_bit", "none")
    layer, x = report.layers[0], torch.randn(20000, 20)
    assert layer.bytes_after == 4 * (32 * 40 + 32 + 2 * 20 + 4 * 20 + 4 * 32) and (layer.rows, layer.dead_rows) == (
        0,
        0,
    )
    assert math.isnan(layer.entropy) and report.table()[0][-2:] == report.table()[-1][-2:] == ["", ""]
    with torch.no_grad():
        assert layer.relative_mse == pytest.approx(relative(model[0](x), original[0](x)), rel=0.05)
    assert pyrepr.Conversion.load(report.save(tmp_path / "a.json")) == report
    assert "form='signs', hash='two_bit', rank=4;" in str(report)
    assert "Signs in Sequential" in report.to_html(tmp_path / "a.html").read_text()
    old = json.loads((tmp_path / "a.json").read_text())
    del old["form"]  # as files had none
    (tmp_path / "b.json").write_text(json.dumps(old))
    assert pyrepr.Conversion.load(tmp_path / "b.json").form == "tables"


def is_signs(module):
    return isinstance(module, SignLinear)


def test_signs_are_the_tables_without_them():
    signs, tables = network().eval(), network().eval()
    convert(signs, select=["1.*", "2.*"], form="signs", rank=4)
    convert(tables, select=["1.*", "2.*"], hash="two_bit", rank=4)
    x = torch.randn(50, 20)
    torch.testing.assert_close(signs(x), tables(x), rtol=1e-4, atol=1e-4)
    small = network()
    assert "int8 weights" in repr(convert(small, select="3", form="signs", hash="one_bit", quantize="int8"))
    assert small[3].weight.dtype == torch.int8 and small[3].hash == "one_bit"
    assert isinstance(small[2].down, nn.Linear)


@pytest.mark.parametrize("hash", ["one_bit", "two_bit"])
def test_a_weight_that_the_model_reads_itself_does_not_become_signs(hash):
    model = Obstacles()
    report = convert(model, torch.randint(11, (64, 9)), form="signs", hash=hash)
    assert [layer.name for layer in report.layers] == ["fine", "asked"] == layers(model, SignLinear)
    assert "a lookup layer has no dense weight to compute with (linear)" in report.skipped["read"]


def test_flags_and_hooks_are_as_before():
    model = network().train()
    model[1].eval()
    model[2].up.weight.requires_grad_(False)
    flags = {name: module.training for name, module in model.named_modules()}
    convert(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert hook_count(model) == 0
    assert not any(p.requires_grad for p in model[2].up.parameters())
    assert all(p.requires_grad for p in model[2].down.parameters())


def test_nothing_is_half_replaced_when_it_fails(monkeypatch):
    model = network().train()
    before = dict(model.named_modules())
    fit, calls = LookupLinear.from_linear, []

    def failing(*args, **options):
        calls.append(hook_count(model))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(LookupLinear, "from_linear", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(model)
    assert dict(model.named_modules()) == before
    assert all(module.training for module in model.modules())
    assert hook_count(model) == 0


class Obstacles(nn.Module):
    """A linear layer for every reason not to replace one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.fine, self.spare, self.hooked, self.normed = (nn.Linear(16, 16) for _ in range(4))
        self.own, self.asked, self.read = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head, self.free_head = self.heads()
        self.subclass = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        nn.utils.parametrizations.weight_norm(self.normed)
        self.own.forward = self.own.forward
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

    def heads(self):
        tied, free = nn.Linear(16, 11, bias=False), nn.Linear(16, 11)
        tied.weight = self.embedding.weight
        return tied, free

    def forward(self, ids):
        x = self.encoder(self.embedding(ids))
        x = self.subclass(self.own(self.normed(self.hooked(self.fine(x)))))
        x = self.asked(x.to(self.asked.weight.device, self.asked.weight.dtype))
        x = self.read(x) + nn.functional.linear(x, self.read.weight)
        return self.head(x), self.free_head(x)


def test_what_cannot_be_replaced_is_left_alone_and_named():
    model = Obstacles()
    report = convert(model, torch.randint(11, (64, 9)))
    assert [layer.name for layer in report.layers] == ["fine", "asked"]
    reasons = {
        "spare": "is not called",
        "hooked": "has hooks",
        "normed": "has parametrized tensors",
        "own": "a forward of its own",
        "read": "a lookup layer has no dense weight to compute with (linear)",
        "head": "is tied to embedding.weight",
        "free_head": "is the language-model head",
        "subclass": "NonDynamicallyQuantizableLinear",
        "encoder.linear1": "is read by TransformerEncoderLayer",
        "encoder.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
    }
    for name, reason in reasons.items():
        assert reason in report.skipped[name]
        assert f"left alone: {name} " in str(report)
    assert isinstance(model.read, nn.Linear) and isinstance(model.asked, LookupLinear)
    assert model.asked.weight.shape == (16, 16)
    model(torch.randint(11, (2, 9)))
    asked_for = convert(Obstacles(), torch.randint(11, (64, 9)), select=["free_head", "embedding"], rank=12)
    assert asked_for.skipped == {
        "free_head": "has no rank 12: it maps 16 to 11 features",
        "embedding": "is no nn.Linear but a Embedding",
    }


def test_a_module_under_two_names_is_tied_and_any_name_will_do():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.a = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(self.module(x)))

    report = convert(Net(), torch.randn(100, 16))
    assert [layer.name for layer in report.layers] == ["module"]
    assert report.skipped == {"a": "is tied to b.weight", "b": "is tied to a.weight"}


def test_a_layer_called_twice_and_layers_of_one_input():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.twice = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.twice(self.twice(self.q(x) * self.k(x)))

    model, seen = Net(), []
    model.register_forward_pre_hook(lambda *args: seen.append(1))
    report = convert(model, [torch.randn(100, 16) for _ in range(3)])
    assert [layer.name for layer in report.layers] == ["q", "k", "twice"]
    assert report.calibration_rows == 600
    # Order; a pass for q and k, one for the layer called twice; a check of each; the output before and after.
    assert len(seen) == 1 + 3 + 3 + 3 + 2 * 3


def test_a_batch_need_not_reach_the_layer():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.a(x) if len(x) > 50 else self.b(x)

    model = nn.Sequential(Routed(), nn.ReLU())
    model.register_forward_pre_hook(lambda module, args: (torch.cat([*args, -args[0]])[:60],))
    report = convert(model, [torch.randn(60, 16), torch.randn(10, 16), torch.randn(60, 16)])
    assert [layer.name for layer in report.layers] == ["0.a"]
    assert report.calibration_rows == 120
    assert report.skipped == {"0.b": "is not called in the model's forward"}


def test_padding_is_left_out():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    mask = (torch.arange(12) < torch.randint(3, 12, (40, 1))).long()
    batch = {"input_ids": torch.randint(1, 50, (40, 12)), "attention_mask": mask}
    report = convert(model, batch, select="encoder.layer.*.intermediate.dense")
    assert report.calibration_rows == int(mask.sum())
    assert [layer.name for layer in report.layers] == [f"encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    limited = convert(transformers.BertModel(config), [batch, batch], select="**.intermediate.dense", max_rows=100)
    assert limited.calibration_rows == 100


def test_wrapped_models_are_changed_inside():
    model = network()
    report = convert(nn.DataParallel(model), select="module.3")
    assert isinstance(model[3], LookupLinear)
    assert report.model == "Sequential"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bert"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.ReLU()}, ValueError, "model must hold at least one nn.Linear, got none in ReLU"),
        ({"select": "2.upp"}, ValueError, r"select: the model has no layer '2.upp'; near matches: 2\.up"),
        ({"select": "5.*"}, ValueError, r"select: the model has no layer '5\.\*'"),
        ({"select": []}, ValueError, "select must name at least one layer"),
        ({"select": lambda name, module: False}, ValueError, "select: the function chose none"),
        ({"select": "1"}, ValueError, r"select must choose an nn.Linear, got only 1 \(Residual\); inside it is 1\.up"),
        ({"bits": 0}, ValueError, "bits must be from 1 to 16, got 0"),
        ({"bits": 17}, ValueError, "bits must be from 1 to 16, got 17"),
        ({"rank": -1}, ValueError, "rank must be an int of at least 0, got -1"),
        ({"weighting": "l2"}, ValueError, "weighting must be one of"),
        ({"hash": "x"}, ValueError, "hash must be one of one_bit, two_bit, got 'x'"),
        ({"form": "x"}, ValueError, "form must be one of tables, signs, got 'x'"),
        ({"form": "signs", "hash": "x"}, ValueError, "hash must be one of one_bit, two_bit, got 'x'"),
        ({"form": "signs", "weighting": "l1"}, ValueError, "weighting must be 'none' for signs, got 'l1'"),
        ({"hash": "two_bit", "bits": 3}, ValueError, "bits must be even with the two_bit hash, got 3"),
        ({"quantize": "int4"}, ValueError, "quantize must be None, 'int8' or 'bf16', got 'int4'"),
        ({"batch_sizes": (1, 0)}, ValueError, "batch_sizes must be positive ints, got 0"),
        ({"max_rows": 3}, ValueError, "max_rows must be an int of at least 16, got 3"),
        ({"data": []}, ValueError, "data must give at least one batch, got none"),
        ({"data": 3}, TypeError, "data must be an iterable of batches, got int"),
        ({"data": torch.ones(4, 20)}, TypeError, r"data must be an iterable of batches, got one tensor; \[x\] is one"),
        ({"data": {"x": torch.ones(4, 20)}}, TypeError, r"got dict; \[batch\] is one batch"),
        ({"data": [{"pixels": torch.ones(2)}]}, ValueError, "model takes none of the batch's keys pixels"),
        ({"data": [torch.full((40, 20), torch.nan)]}, ValueError, "1.up: calibration must be finite"),
    ],
)
def test_bad_input(change, error, message):
    model = network()
    arguments = {"model": model, "data": batches(), **change}
    with pytest.raises(error, match=message):
        pyrepr.convert(**arguments)
    assert not layers(model, LookupLinear)


def test_tables_larger_than_memory_are_refused_and_nothing_is_changed(monkeypatch):
    model = network()
    monkeypatch.setattr("os.sysconf", lambda name: 400)  # pages of 400 bytes: 160 kB in all, less than all tables but 3
    convert(model, select="3")
    with pytest.raises(MemoryError, match="use fewer bits"):
        convert(model, select="2.*")
    assert layers(model, LookupLinear) == ["3"]


def test_few_rows_warn_by_name():
    with pytest.warns(UserWarning, match="data gives layer 3 20 rows for 32 features"):
        convert(network(), torch.randn(20, 20), select="3")


def test_constant_output_has_no_relative_error():
    model = network()
    nn.init.zeros_(model[3].weight)
    report = convert(model, select="3")
    assert math.isnan(report.layers[0].relative_mse)


@pytest.fixture
def report():
    model = nn.Sequential(network(), nn.Linear(10, 16), nn.Linear(16, 4))
    report = pyrepr.convert(model, batches(), batch_sizes=(1, 64), progress=False)
    return dataclasses.replace(report, model="</script><b>model")


def test_save_and_load(report, tmp_path):
    loaded = pyrepr.Conversion.load(report.save(tmp_path / "report.json"))
    assert loaded == report
    nan = dataclasses.replace(report.layers[0], relative_mse=math.nan)
    path = dataclasses.replace(report, layers=(nan,), output_mse=math.nan).save(tmp_path / "report.json")
    assert "NaN" not in path.read_text()
    assert math.isnan(pyrepr.Conversion.load(path).layers[0].relative_mse)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(ValueError, match=r"path must end in \.json"):
        report.save(tmp_path / "report.txt")
    for text in ("nothing", "{}", "[]", '{"format": "pyrepr.Conversion"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"written by Conversion\.save"):
            pyrepr.Conversion.load(tmp_path / "other.json")


def test_printed_table_and_page(report, tmp_path):
    lines = str(report).splitlines()
    assert report.describe() in lines[0] and "\n" not in repr(report)
    assert lines[1].split()[0] == "layer" and "ms at 64" in lines[1]
    assert len(lines) == 2 + len(report.layers) + 1 + len(report.skipped) + len(report.curve())
    page = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "__DATA__" not in page and "__TITLE__" not in page and "http" not in page
    assert "src=" not in page and "<link" not in page and page.count("</script>") == 1
    line = next(line for line in page.splitlines() if line.startswith("const data = "))
    data = json.loads(line.removeprefix("const data = ").removesuffix(";"))
    assert data["title"] == "Lookup tables in </script><b>model"
    assert len(data["lines"]) == len(data["errors"]) == len(report.layers)
    assert data["skipped"] == [list(item) for item in report.skipped.items()]
    empty = dataclasses.replace(report, layers=())
    empty.to_html(tmp_path / "page.html")
    assert str(empty).splitlines()[0].startswith("</script><b>model: 0 layers converted")


def pair(**options):
    teacher = network()
    student = copy.deepcopy(teacher)
    convert(student, **(options or {"bits": 4}))
    return student, teacher


def distill(student, teacher, data=None, **options):
    return pyrepr.distill(student, teacher, batches() if data is None else data, progress=False, **options)


def test_distilling_brings_layers_and_output_closer_on_unseen_data():
    student, teacher = pair()
    with torch.no_grad():
        for name in layers(student, LookupLinear):
            tables = student.get_submodule(name).tables
            tables.mul_(1 + 0.5 * torch.randn_like(tables))
        student.eval(), teacher.eval()
        x = torch.randn(2000, 20)
        truth, before = teacher(x), relative(student(x), teacher(x))
    result = distill(student, teacher, epochs=(4, 8), lr=0.02)
    with torch.no_grad():
        assert relative(student(x), truth) < 0.7 * before
    assert (len(result.layer_losses), len(result.output_losses)) == (32, 64)
    assert result.layer_losses[-1] < 0.9 * result.layer_losses[0]
    assert result.output_losses[-1] < result.output_losses[0]
    assert result.layers == ("0", "1.up", "1.down", "2.up", "2.down", "3")
    assert "layers" in repr(result) and "64 steps" in repr(result)


def test_signs_are_distilled_as_tables_are():
    student, teacher = pair(form="signs", hash="one_bit", rank=2)
    student[1].up.bias.requires_grad_(False)
    x = torch.randn(2000, 20)
    with torch.no_grad():
        truth, before = teacher.eval()(x), relative(student.eval()(x), teacher(x))
    result = distill(student, teacher, epochs=(4, 12), lr=0.02)
    with torch.no_grad():
        assert relative(student(x), truth) < 0.9 * before
    names = layers(student, SignLinear)
    assert result.layers == tuple(names)
    assert set(result.trained) == {f"{name}.{part}" for name in names for part in ("weight", "bias", "down", "up")}
    student[3].quantize_("int8")
    with pytest.raises(ValueError, match=r"to be trained, got int8 3\.weight; quantize afterwards"):
        distill(student, teacher)


def test_only_the_lookup_layers_are_trained_unless_told_otherwise():
    student, teacher = pair()
    student.train()
    student[3].bias.requires_grad_(False)
    for train, expected in (
        ("lookup", {f"{name}.{part}" for name in layers(student, LookupLinear) for part in ("tables", "bias")}),
        (lambda name, parameter: name.startswith("1.norm"), {"1.norm.weight", "1.norm.bias"}),
        ("all", {name for name, _ in student.named_parameters()}),
    ):
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        reference = [p.clone() for p in teacher.parameters()]
        result = distill(student, teacher, train=train)
        changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(result.trained) == expected
        assert all(map(torch.equal, reference, teacher.parameters()))
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert not student[3].bias.requires_grad and student[3].tables.requires_grad
    assert all(module.training for module in student.modules())
    assert hook_count(student) == hook_count(teacher) == 0


def test_chosen_layers_a_loss_of_ones_own_and_sparse_tables():
    student, teacher = pair()
    student[3].sparse = True
    seen = []

    def loss(value, truth, batch):
        seen.append(len(batch))
        return (value - truth).abs().mean()

    student[3].tables.data.mul_(2)
    assert distill(student, teacher, layers="*.norm", epochs=(1, 0)).layers == ("1.norm", "2.norm")
    result = distill(student, teacher, loss=loss, epochs=(0, 2))
    assert not result.layers and not result.layer_losses
    assert seen == [200] * 16 and student[3].sparse
    assert result.output_losses[-1] < result.output_losses[0]


def test_a_diverging_loss_leaves_finite_parameters():
    student, teacher = pair()
    data = batches()
    data[3][:] = torch.nan
    with pytest.raises(FloatingPointError, match="at step 3; try a smaller lr"):
        distill(student, teacher, data)
    assert all(p.isfinite().all() for p in student.parameters())
    assert hook_count(student) == hook_count(teacher) == 0


def quantized():
    student, teacher = pair()
    student[3].quantize_("int8")
    return {"student": student, "teacher": teacher, "train": lambda name, p: name == "3.tables"}


def shared():
    student, _ = pair()
    return {"student": student, "teacher": student}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda: {"student": 3}, TypeError, "student must be a torch.nn.Module, got int"),
        (lambda: {"teacher": None}, TypeError, "teacher must be a torch.nn.Module, got NoneType"),
        (
            lambda: {"data": torch.ones(3, 20)},
            TypeError,
            r"data must be an iterable of batches, got one tensor; \[x\] is one batch",
        ),
        (lambda: {"data": []}, ValueError, "data must give at least one batch, got none"),
        (lambda: {"data": iter(batches())}, ValueError, "data must be a list or a DataLoader for 2 passes"),
        (lambda: {"epochs": (1, -1)}, ValueError, "epochs must be two ints of at least 0"),
        (lambda: {"epochs": 1}, ValueError, "epochs must be two ints of at least 0, .*, got 1"),
        (lambda: {"loss": 3}, TypeError, "loss must be a function of .*, got 3"),
        (lambda: {"lr": "1"}, ValueError, "lr must be a positive and finite number, got '1'"),
        (lambda: {"lr": 0.0}, ValueError, "lr must be a positive and finite number, got 0.0"),
        (lambda: {"student": network()}, ValueError, "student must hold LookupLinear or SignLinear layers, got none"),
        (lambda: {"layers": "1.upp"}, ValueError, r"layers: the model has no layer '1\.upp'; near matches"),
        (lambda: {"teacher": network()[:2]}, ValueError, r"layers must be names that teacher has too, got 2\.up"),
        (lambda: {"train": "tables"}, ValueError, "train must be 'lookup', 'all' or a function, got 'tables'"),
        (lambda: {"train": lambda name, p: False}, ValueError, "train must choose at least one parameter"),
        (lambda: {"loss": lambda *args: 0.0}, ValueError, "loss must give a scalar tensor with a gradient, got float"),
        (quantized, ValueError, "student must be float32, float64 or bfloat16 to be trained, got int8 3.tables"),
        (shared, ValueError, "teacher must not share what is trained"),
    ],
)
def test_bad_input_of_distill(change, error, message):
    student, teacher = pair()
    arguments = {"student": student, "teacher": teacher, "data": batches(), "progress": False, **change()}
    with pytest.raises(error, match=message):
        pyrepr.distill(**arguments)


def test_distilling_for_the_worse_warns():
    student, teacher = pair()
    with pytest.warns(UserWarning, match=r"the loss of the layers rose from .* try a smaller lr, or more data"):
        distill(student, teacher, epochs=(1, 0), lr=1.0)


def test_few_rows_have_an_error_that_is_a_number():
    """An eighth of fewer than 16 rows is one row, which has no variance to compare an error with."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    report = pyrepr.convert(model, [torch.randn(9, 4)], bits=2, batch_sizes=(), progress=False)
    assert all(0 <= layer.relative_mse < 10 for layer in report.layers)
    constant = pyrepr.nn.LookupLinear.from_linear(torch.nn.Linear(4, 3), torch.ones(20, 4), bits=2)
    assert math.isnan(constant.conversion.relative_mse)
