"""The command line, in this process: what it prints and writes, and how it refuses."""

from __future__ import annotations

import csv
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyrepr
from pyrepr import cli
from pyrepr.models import sources
from pyrepr.models._collecting import Checkpoint

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "small", "dogs", "run", "by"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT, its tokenizer, and a text file that suits it."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(" ".join(WORDS[i : i + 3 + i % 5]) for i in range(10)) + "\n")
    return path


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module `tiny_models` in the current folder, with functions for py: specs."""
    (tmp_path / "tiny_models.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def mlp():\n    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))\n"
        "def conv():\n    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=32), nn.Flatten(), nn.LazyLinear(2))\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise KeyError('weights')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("tiny_models", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.fixture
def array(tmp_path):
    path = tmp_path / "inputs.npy"
    np.save(path, np.random.RandomState(0).randn(20, 5).astype(np.float32))
    return path


def refused(capsys, *argv: object) -> str:
    """Runs a command that must fail; its one line on stderr."""
    assert cli.main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 1 and lines[0].startswith("pyrepr: error: "), captured.err
    return lines[0].removeprefix("pyrepr: error: ")


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"pyrepr        {pyrepr.__version__}" in out
    assert torch.__version__ in out
    for word in (
        "commit",
        "module",
        "compiler",
        "SIMD built",
        "SIMD left out",
        "SIMD level",
        "package",
        "threads",
        "GPU",
        "reference",
        "triton",
        "cuda",
    ):
        assert word in out


def test_compare_of_pretrained_and_random(bert, text, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    argv = ["compare", f"hf:{bert}", f"hf-random:{bert}", "--data", text, "--out", out, "--batch-size", 4, "--seed", 3]
    assert cli.main([str(arg) for arg in argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "most similar layer of B" in captured.out and str(out / "heatmap.html") in captured.out
    assert sorted(p.name for p in out.iterdir()) == ["comparison.npz", "heatmap.html", "heatmap.png", "values.csv"]
    result = pyrepr.Comparison.load(out / "comparison.npz")
    assert result.layers_a == ("embeddings", "encoder.layer.0", "encoder.layer.1")
    assert (result.samples, result.mode, result.model_b) == ("tokens", "exact", f"hf-random:{bert}")
    with (out / "values.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header[1:] == list(result.layers_b)
    assert torch.tensor([[float(v) for v in line[1:]] for line in lines], dtype=torch.float64).equal(result.values)

    # The same from Python, all lines at once.
    import transformers

    a = transformers.AutoModel.from_pretrained(bert)
    torch.manual_seed(3)
    b = transformers.AutoModel.from_config(a.config)
    tokens = transformers.AutoTokenizer.from_pretrained(bert)(
        [line for line in text.read_text().splitlines() if line], padding=True, return_tensors="pt"
    )
    expected = pyrepr.compare(a, b, [tokens], samples="tokens", progress=False)
    torch.testing.assert_close(result.values, expected.values, rtol=1e-4, atol=1e-5)
    assert result.count == expected.count == int(tokens["attention_mask"].sum())


def test_text_with_whole_lines_as_samples(bert, text, tmp_path):
    out = tmp_path / "out"
    argv = ["compare", f"hf:{bert}", f"hf:{bert}", "--data", text, "--out", out, "--samples", "batch"]
    argv += ["--max-length", 8, "--max-samples", 9, "--layers-a", "encoder.layer.*,pooler", "--estimator", "biased"]
    assert cli.main([str(arg) for arg in argv]) == 0
    result = pyrepr.Comparison.load(out / "comparison.npz")
    assert (result.count, result.samples, result.estimator) == (9, "batch", "biased")
    assert result.layers_a == ("encoder.layer.0", "encoder.layer.1", "pooler")


def test_python_functions_and_arrays(models, array, capsys):
    argv = ["compare", "py:tiny_models:mlp", "py:tiny_models:mlp", "--data", str(array), "--out", "out"]
    assert cli.main([*argv, "--mode", "minibatch", "--batch-size", "6", "--name-a", "one"]) == 0
    result = pyrepr.Comparison.load("out/comparison.npz")
    assert (result.count, result.mode, result.layers_a, result.model_a) == (20, "minibatch", ("0", "2"), "one")
    torch.testing.assert_close(result.values.diagonal(), torch.ones(2).double())


def test_image_folder(models, capsys):
    from PIL import Image

    (models / "images" / "more").mkdir(parents=True)
    for i in range(5):
        pixels = np.random.RandomState(i).randint(0, 255, (40 + i, 60, 3), np.uint8)
        Image.fromarray(pixels).save(models / "images" / "more" / f"{i}.png")
    argv = ["compare", "py:tiny_models:conv", "py:tiny_models:conv", "--data", "images", "--out", "out"]
    assert cli.main([*argv, "--layers-a", "0"]) == 0
    assert pyrepr.Comparison.load("out/comparison.npz").count == 5
    capsys.readouterr()
    (models / "images" / "bad.png").write_bytes(b"no image")
    assert "bad.png is not a readable image" in refused(capsys, *argv)


def test_image_is_resized_cropped_and_normalised(tmp_path):
    from PIL import Image

    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30, 0] = 255  # the middle square is red
    Image.fromarray(pixels).save(tmp_path / "red.png")
    shape = sources.ImageShape(size=20, crop=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    image = sources.load_image(tmp_path / "red.png", shape)
    expected = torch.tensor([1.0, -2.0, -0.5])[:, None, None].expand(3, 20, 20)
    torch.testing.assert_close(image, expected)


def test_stored_activations(tmp_path, capsys):
    from safetensors.torch import save_file

    x = torch.randn(30, 4, 3, generator=torch.Generator().manual_seed(0))
    save_file({"v1": x, "v4": x[:, :2].contiguous()}, tmp_path / "brain.safetensors")
    np.savez(tmp_path / "model.npz", out=x.flatten(1).numpy())
    argv = ["compare", tmp_path / "brain.safetensors", tmp_path / "model.npz", "--out", tmp_path / "out"]
    assert cli.main([str(arg) for arg in argv]) == 0
    result = pyrepr.Comparison.load(tmp_path / "out" / "comparison.npz")
    expected = pyrepr.cka_matrix([x.flatten(1), x[:, :2].flatten(1)], [x.flatten(1)])
    torch.testing.assert_close(result.values.float(), expected, rtol=1e-6, atol=1e-7)
    assert (result.layers_a, result.layers_b, result.count) == (("v1", "v4"), ("out",), 30)


def fake_timm(monkeypatch):
    class Net(nn.Sequential):
        pretrained_cfg = {"input_size": (3, 64, 64), "crop_pct": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}  # noqa: RUF012

    calls = []

    def create_model(name, pretrained):
        calls.append((name, pretrained))
        return Net(nn.Conv2d(3, 2, 1))

    module = types.ModuleType("timm")
    module.is_model = lambda name: name == "resnet18"
    module.list_models = lambda: ["resnet18", "resnet34", "vit_tiny"]
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


def test_timm_specs(monkeypatch):
    calls = fake_timm(monkeypatch)
    assert sources.resolve("timm:resnet18").images.size == 64
    sources.resolve("timm:resnet18.a1_in1k?pretrained")
    assert calls == [("resnet18", False), ("resnet18.a1_in1k", True)]
    with pytest.raises(ValueError, match="timm has no model 'resnet19'; near matches: resnet"):
        sources.resolve("timm:resnet19")
    with pytest.raises(ValueError, match="only 'pretrained' is known, got 'weights'"):
        sources.resolve("timm:resnet18?weights")


def test_missing_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is needed here and .*: pip install timm torchvision"):
        sources.resolve("timm:resnet18")


def test_random_weights_come_from_the_seed(models):
    state = torch.get_rng_state()
    weights = [sources.resolve("py:tiny_models:mlp", seed).model[0].weight for seed in (1, 1, 2)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ("resnet18", "'resnet18' is no model; expected hf:PATH, hf-random:PATH, st:PATH, timm:NAME"),
        ("hf:./nothing", "'./nothing' must be a folder with a transformers model"),
        ("hf:@no_such_package/model", "names the package 'no_such_package', which is not installed"),
        ("py:tiny_models", "must be py:MODULE:FUNCTION"),
        ("py:tiny_modules:mlp", "there is no module 'tiny_modules'"),
        ("py:tiny_models:mpl", "has no function 'mpl'; near matches: mlp"),
        ("py:tiny_models:number", "must return a torch.nn.Module or a dict of activations, got int"),
        ("py:tiny_models:broken", "KeyError: 'weights' (--traceback shows where)"),
        ("hf:./no_weights", "'hf:./no_weights' cannot be loaded: "),
        ("st:no_folder", "'no_folder' must be a folder with a sentence-transformers model (a modules.json), got none"),
        ("nothing.npz", "no such file: nothing.npz"),
        ("broken.npy", "broken.npy holds no readable arrays of numbers; expected a .npy file"),
        ("broken.pt", "broken.pt holds no readable arrays of numbers; expected a tensor or a dict of tensors"),
        ("code.pt", "code.pt holds no readable arrays of numbers; expected a tensor or a dict of tensors"),
        ("broken.npz", "broken.npz holds no readable arrays"),
        ("broken.safetensors", "broken.safetensors holds no readable arrays of numbers; expected a .safetensors file"),
    ],
)
def test_bad_specs(models, array, capsys, a, message):
    (models / "no_weights").mkdir()
    (models / "no_weights" / "config.json").write_text('{"model_type": "bert"}')
    for name in ("broken.npz", "broken.safetensors", "broken.npy", "broken.pt"):
        (models / name).write_bytes(b"nothing of that kind")
    (models / "code.pt").write_bytes(pickle.dumps(print))
    before = sorted(p.name for p in models.iterdir() if p.name != "__pycache__")
    assert message in refused(capsys, "compare", a, "py:tiny_models:mlp", "--data", array, "--out", "out")
    assert sorted(p.name for p in models.iterdir() if p.name != "__pycache__") == before


def test_an_encoder_and_decoder_read_the_same_text(bert, text, tmp_path, capsys):
    import transformers

    folder = tmp_path / "t5"
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    transformers.T5Model(config).eval().save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(folder)
    argv = ["compare", f"hf:{folder}", f"hf:{bert}", "--data", text, "--out", tmp_path / "out", "--samples", "tokens"]
    assert cli.main([str(arg) for arg in argv]) == 0
    result = pyrepr.Comparison.load(tmp_path / "out" / "comparison.npz")
    tokens = tokenizer(sources.read_texts(text, None)[0], padding=True, return_tensors="pt")
    mask, shared = tokens["attention_mask"].bool(), {key: tokens[key] for key in ("input_ids", "attention_mask")}
    model = transformers.T5Model.from_pretrained(folder).eval()
    other = transformers.BertModel.from_pretrained(bert).eval()
    decoder = {"decoder_input_ids": tokens["input_ids"], "decoder_attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        x = model(**shared, **decoder, output_hidden_states=True).decoder_hidden_states[1][mask]
        y = other(**shared).last_hidden_state[mask]
    value = result.values[result.layers_a.index("decoder.block.0"), result.layers_b.index("encoder.layer.1")]
    torch.testing.assert_close(value, pyrepr.cka(x.double(), y.double()), rtol=1e-4, atol=1e-6)


def test_image_size_of_a_model_without_a_preprocessor(tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    source = sources.resolve(f"hf:{tmp_path / 'vit'}")
    assert source.images.size == 32 and source.tokenizer is None
    with pytest.raises(ValueError, match=r"it is read as texts, but hf:.* takes images"):
        sources.load_data(Path(__file__), [source], samples="batch", batch_size=4, max_samples=None, max_length=8)


def test_ctrl_c_says_how_to_go_on(models, array, capsys, monkeypatch):
    def cut(self, batch, step=Checkpoint.step):
        if self.seen == 2:
            raise KeyboardInterrupt
        step(self, batch)

    argv = ["compare", "py:tiny_models:mlp", "py:tiny_models:mlp", "--data", str(array), "--out", "out"]
    argv += ["--batch-size", "5"]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "step", cut)
        assert cli.main(argv) == 130
    assert capsys.readouterr().err == "pyrepr: interrupted; the same command with --resume goes on with it\n"
    assert "is of other weights, data or batches" in refused(capsys, *argv, "--resume", "--batch-size", "4")
    assert cli.main([*argv, "--resume"]) == 0
    assert pyrepr.Comparison.load(models / "out" / "comparison.npz").count == 20
    assert not (models / "out" / "unfinished.pt").exists()


def test_bad_data(models, array, bert, capsys):
    def message(data, *more, model="py:tiny_models:mlp"):
        return refused(capsys, "compare", model, model, "--data", data, "--out", "out", *more)

    (models / "empty.txt").write_text("\n \n")
    (models / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (models / "folder").mkdir()
    np.save(models / "none.npy", np.zeros((0, 5), np.float32))
    np.savez(models / "two.npz", a=np.zeros((4, 5)), b=np.zeros((3, 5)))
    (models / "ok.txt").write_text("the cat\n" * 5)
    assert "--data: no such file or folder: missing.txt" in message("missing.txt")
    assert "--data: empty.txt is empty" in message("empty.txt", model=f"hf:{bert}")
    assert "--data: binary.txt is not UTF-8" in message("binary.txt", model=f"hf:{bert}")
    assert "--data: folder holds no images" in message("folder")
    assert "none.npy must hold arrays with at least one row" in message("none.npy")
    assert "must have one number of rows, got [3, 4]" in message("two.npz")
    assert "a text file needs a tokenizer" in message("ok.txt")
    assert "layers_a: the model has no layer '00'; near matches: 0" in message(array, "--layers-a", "00")
    assert "--device must be a PyTorch device as cpu or cuda:0, got 'gpu'" in message(array, "--device", "gpu")
    assert "--device cuda:99: PyTorch sees" in message(array, "--device", "cuda:99")
    assert "--column is for .csv and .jsonl files" in message(array, "--column", "text")
    assert "--tokens no_special is for texts" in message(array, "--tokens", "no_special")
    assert "--sigma is σ itself" in message(array, "--kernel", "rbf", "--sigma", "1", "--bandwidth", "2")
    assert "--bandwidth and --sigma are of --kernel rbf and laplacian, got linear" in message(array, "--bandwidth", "0")
    assert "kernel='rbf' is of CKA" in message(array, "--kernel", "rbf", "--measure", "rsa")
    assert "measure 'mutual_kn' does not exist; near matches: mutual_knn" in message(
        array, "--measure", "cka,mutual_kn"
    )
    assert "at most" in message(array, "--dpi", "1000000")
    np.save(models / "few.npy", np.random.RandomState(1).randn(3, 5).astype(np.float32))
    assert "data must give at least 4 samples for the unbiased estimator, got 3" in message("few.npy")
    assert "data must give at least 11 samples for mutual kNN" in message("few.npy", "--measure", "mutual_knn,cka")
    (models / "list.jsonl").write_text("[1, 2]\n")
    assert "line 1 of list.jsonl must be an object or a text" in message("list.jsonl", model=f"hf:{bert}")
    assert "is a folder, which is read as images, but hf:" in message("folder", model=f"hf:{bert}")
    assert not (models / "out").exists()
    assert "--data is needed" in refused(capsys, "compare", "py:tiny_models:mlp", "py:tiny_models:mlp", "--out", "out")


def test_out_that_cannot_be_written(models, array, capsys):
    (models / "file").write_text("here")
    argv = ["compare", "py:tiny_models:mlp", "py:tiny_models:mlp", "--data", array]
    assert "--out: file cannot be written: File exists" in refused(capsys, *argv, "--out", "file")
    assert "--out: file/out cannot be written: Not a directory" in refused(capsys, *argv, "--out", "file/out")


def test_a_failure_while_writing_leaves_earlier_results(models, array, capsys, monkeypatch):
    argv = ["compare", "py:tiny_models:mlp", "py:tiny_models:mlp", "--data", str(array), "--out", "out"]
    assert cli.main(argv) == 0
    before = {p.name: p.read_bytes() for p in (models / "out").iterdir()}
    capsys.readouterr()

    def fail(*_, **__):
        raise OSError(28, "No space left on device", "heatmap.html")

    monkeypatch.setattr(pyrepr.Comparison, "to_html", fail)
    assert "heatmap.html: No space left on device" in refused(capsys, *argv, "--estimator", "biased")
    assert {p.name: p.read_bytes() for p in (models / "out").iterdir()} == before


def test_missing_matplotlib_is_noticed_first(models, array, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["compare", "py:tiny_models:mlp", "py:tiny_models:mlp", "--data", array, "--out", "out"]
    assert 'pip install "pyrepr-kernels[plot]"' in refused(capsys, *argv)
    assert not (models / "out").exists()


def test_traceback_on_request(models, array):
    argv = ["compare", "py:tiny_models:broken", "py:tiny_models:mlp", "--data", str(array), "--out", "out"]
    with pytest.raises(KeyError):
        cli.main([*argv, "--traceback"])


def test_wrong_arguments_exit_with_2(capsys):
    for argv in ([], ["compare", "a"], ["compare", "a", "b", "--out", "o", "--batch-size", "0"], ["dance"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_bench_is_handed_to_its_command(monkeypatch):
    seen = []
    command = types.ModuleType("pyrepr.benchmarks.command")
    command.add_arguments = lambda parser: parser.add_argument("--quick", action="store_true")
    command.main = lambda args: seen.append(args.quick) or 0
    import pyrepr.benchmarks

    monkeypatch.setitem(sys.modules, "pyrepr.benchmarks.command", command)
    monkeypatch.setattr(pyrepr.benchmarks, "command", command, raising=False)
    assert cli.main(["bench", "--quick"]) == 0
    assert seen == [True]


def test_bench_pins_a_thread_to_each_core_unless_told_otherwise(monkeypatch):
    from pyrepr.benchmarks import harness

    started = []
    monkeypatch.setattr(harness.os, "execve", lambda *command: started.append(command))
    monkeypatch.setattr(harness, "_cores", lambda: [0, 2, 5])
    for name in harness.PLACES:
        monkeypatch.delenv(name, raising=False)
    assert harness.pinned() == "no"
    harness.restart_pinned()
    ((program, arguments, environment),) = started
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == sys.orig_argv[1:]
    assert environment["GOMP_CPU_AFFINITY"] == "0 2 5"
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    harness.restart_pinned()
    assert len(started) == 1
    assert harness.pinned() == "OMP_PROC_BIND=false"


def test_a_quick_run_ends_when_its_time_is_used_up_and_says_what_it_left_out(monkeypatch, capsys):
    from pyrepr.benchmarks import command
    from pyrepr.benchmarks.harness import Case, Workload

    def make():
        return Workload({"pyrepr": lambda: 1.0, "peer": lambda: 1.0}, lambda: 1.0, 0.0)

    cases = [Case("op", shape, make, quick=True) for shape in ("small", "large")]
    monkeypatch.setattr(command, "cases_of", lambda family: cases)
    clock = iter([0.0, 1.0, command.QUICK_BUDGET + 1])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    assert list(command._run([("gram", case) for case in cases], quick=True)) == ["gram"]
    printed = capsys.readouterr().out
    assert "2 cases in at most 90 s" in printed
    assert "small" in printed.split("left out")[0] and "large" in printed.split("left out")[1]


def test_importing_pyrepr_is_light():
    import subprocess

    code = (
        "import sys, json, torch; before = set(sys.modules); import pyrepr; print(json.dumps([m for m in "
        "('transformers', 'matplotlib', 'tqdm', 'PIL', 'safetensors', 'timm') if m in set(sys.modules) - before]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_output_can_be_piped_to_a_reader_that_leaves():
    import subprocess

    code = "import sys; from pyrepr.cli import main; sys.exit(main(['info']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(), error) == (0, b"")
