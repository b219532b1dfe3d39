"""The examples run, with settings so small that nothing is learned."""

from __future__ import annotations

import importlib
import json
import math
import string
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example's main in this process, which has imported all that is slow to import; what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(script: str, *arguments: object) -> str:
        assert importlib.import_module(script).main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


def test_recall(tmp_path):
    options = "--steps 3 --keys 4 --writes 1 2 --batch 4 --width 16 --vocabulary 32 --evaluated 4"
    command = [sys.executable, str(EXAMPLES / "recall.py"), str(tmp_path / "out"), *options.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out/recall.json").read_text())
    assert set(written["results"]) == {"delta rule", "additive"}
    for run in written["results"].values():
        assert [step for step, _ in run["curve"]] == [1, 2, 3]
        assert set(run["recall"]) == {"1", "2"} and all(0 <= share <= 1 for share in run["recall"].values())
    assert (tmp_path / "out/recall.png").stat().st_size > 1000


def test_train_memoryformer(example, tmp_path):
    options = "--steps 3 --batch 2 --context 16 --width 16 --depth 1 --bits 4 --packages torch.optim"
    printed = example("train_memoryformer", tmp_path / "out", *options.split())
    written = json.loads((tmp_path / "out/train_memoryformer.json").read_text())
    same_rate = "MemoryFormer at the twin's rate"
    assert set(written["runs"]) == {"MemoryFormer", same_rate, "dense twin", "MemoryFormer, two bits"}
    assert written["runs"][same_rate]["lr"] == written["runs"]["dense twin"]["lr"]
    assert written["runs"][same_rate]["train"][0] == written["runs"]["MemoryFormer"]["train"][0]
    assert written["runs"]["MemoryFormer"]["lr"] == 3 * written["runs"]["dense twin"]["lr"]
    for name, run in written["runs"].items():
        assert len(run["train"]) == 3 and [step for step, _ in run["validation"]] == [1, 2, 3]
        assert all(math.isfinite(loss) and loss < 8 for loss in run["train"])
        assert name in printed
    assert (tmp_path / "out/train_memoryformer.png").stat().st_size > 1000


def test_memory_layer(example, tmp_path):
    printed = example("memory_layer", tmp_path, *["--steps", "3", "--batch", "16", "--facts", "64", "--width", "16"])
    runs = json.loads((tmp_path / "memory_layer.json").read_text())["runs"]
    assert set(runs) == {"with memory", "twin"} and "knows" in printed
    assert runs["with memory"]["parameters"] == runs["twin"]["parameters"] + 4096 * 16 + 4 * 2 * 64 * 4 + 17 * 32 + 16
    assert all(len(run["losses"]) == 3 and 0 <= run["known"] <= 1 for run in runs.values())


def test_speculative(example, tmp_path):
    options = "--steps 10 --batch 2 --context 32 --prompts 2 --tokens 30 --drafted 1 3 --width 128"
    printed = example("speculative", tmp_path / "out", *options.split(), "--packages", "torch.optim")
    written = json.loads((tmp_path / "out/speculative.json").read_text())
    assert set(written["runs"]) == {"alone", "1", "3"} and set(written["losses"]) == {"target", "draft"}
    assert all(run["tokens a second"] > 0 for run in written["runs"].values())
    assert 0 <= written["runs"]["3"]["accepted"] <= 1 and "3 drafted: " in printed


@pytest.fixture
def bert(tmp_path):
    """A folder with a tiny BERT and a tokenizer that knows letters."""
    import transformers

    folder = tmp_path / "bert"
    folder.mkdir()
    pieces = [mark + letter for letter in string.printable[:62] for mark in ("", "##")]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    config = transformers.BertConfig(
        vocab_size=20000, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_convert_minilm(example, bert, tmp_path):
    out, settings = tmp_path / "out", ["linear, 4 bits, rank 0", "ffn, 8 bits, rank 0", "dense, rank 384"]
    only = [part for setting in settings for part in ("--only", setting)]
    options = ["--quick", "--model", f"hf-random:{bert}", "--packages", "torch.optim"]
    printed = example("convert_minilm", out, *options, *only)
    results = out / "convert_minilm.json"
    written = json.loads(results.read_text())
    assert list(written) == settings
    for name, line in written.items():
        assert f"| {name} |" in printed
        assert all(0.9 < line[when]["cosine"] <= 1.000001 for when in ("before", "after"))
        assert len(line["speed"]) == 2 and ("int8" in line) == (line["kind"] != "dense")
    assert (out / "convert_minilm.png").stat().st_size > 1000
    again = example("convert_minilm", out, "--only", "none")
    assert again == printed[printed.index("| network becomes") :]
    example("convert_minilm", out, *options, "--speeds", *only[:2])
    timed = json.loads(results.read_text())
    assert timed[settings[0]]["speed"] != written[settings[0]]["speed"]
    for line in (timed[settings[0]], timed[settings[0]]["int8"], written[settings[0]], written[settings[0]]["int8"]):
        del line["speed"]
    assert timed == written
