"""Probes of a model's layers: the rows are those that hooks see, the scores those of ``linear_probe``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from pyrepr import cli
from pyrepr.models import probe, probing
from pyrepr.stats import linear_probe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def digits(n=300):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:n], dtype=torch.float32), torch.tensor(y[:n])


@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_a_probe_is_that_of_the_layers_outputs(monkeypatch, kept):
    monkeypatch.setattr(probing, "KEPT_BYTES", kept)
    model, (x, y) = Net(), digits()
    found = probe(model, x.split(64), y, layers=["first", "second"], progress=False)
    with torch.no_grad():
        first = model.first(x)
        expected = linear_probe({"first": first, "second": model.second(first.relu())}, y)
    assert found.layers == ("first", "second") and found.samples == 300
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1 / 300)
    by_batch = probe(
        model,
        [(a, b) for a, b in zip(x.split(64), y.split(64), strict=True)],
        lambda batch: batch[1],
        layers=["first", "second"],
        progress=False,
    )
    assert torch.equal(by_batch.scores, found.scores)
    names = probe(model, x.split(64), [f"class {int(i)}" for i in y], layers="first", progress=False)
    assert torch.equal(names.scores, found.scores[:1])


def test_regression():
    model, (x, _) = Net(), digits()
    found = probe(model, x.split(64), x.mean(1), layers="first", task="regression", progress=False)
    assert found.metric == "R²" and float(found.best[0]) > 0.8


def test_bad_input(monkeypatch):
    model, (x, y) = Net(), digits(100)
    for call, message in (
        (lambda: probe(model, x.split(64), ["same"] * 100, progress=False), "y must hold at least two classes"),
        (lambda: probe(model, x.split(64), y[:80], progress=False), "labels must hold one for each row of the layers"),
        (
            lambda: probe(model, x.split(64), y.repeat(2), progress=False),
            "one for each of the 100 rows of the layers, got 200",
        ),
        (
            lambda: probe(model, x.split(64), y, layers="third", progress=False),
            "layers: the model has no layer 'third'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="data must be an iterable of batches, got one tensor"):
        probe(model, x, y)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        probe("model", [x], y)
    monkeypatch.setattr(probing, "KEPT_BYTES", 0)

    class Shuffled:
        def __iter__(self):
            return iter(x[torch.randperm(100)].split(50))

    with pytest.raises(ValueError, match="data must give the same batches every time"):
        probe(model, Shuffled(), y, progress=False)
    with pytest.raises(ValueError, match=r"data must start anew every time|an iterable that starts anew"):
        probe(model, iter(x.split(50)), y, progress=False)


def test_command_line(tmp_path, monkeypatch, capsys):
    x, y = digits()
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    (tmp_path / "y.txt").write_text("\n".join(f"digit {int(i)}" for i in y))
    from pyrepr.models import sources

    def resolve(spec, seed):
        torch.manual_seed(seed)
        return sources.Source(spec, Net())

    monkeypatch.setattr(sources, "resolve", resolve)
    common = ["probe", "net", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out"), "--quiet"]
    for labels in ("y.npy", "y.txt"):
        assert cli.main([*common, "--labels", str(tmp_path / labels), "--layers", "first,second"]) == 0
        assert {f.name for f in (tmp_path / "out").iterdir()} == {"depth.png", "probe.csv", "probe.json"}
        report = json.loads((tmp_path / "out" / "probe.json").read_text())
        assert [row["layer"] for row in report["layers"]] == ["first", "second"] and report["samples"] == 300
        assert report["layers"][0]["score"] > 0.7 and "accuracy" in capsys.readouterr().out
    assert cli.main([*common, "--labels", str(tmp_path / "y.npy"), "--alphas", "a"]) == 2
    assert "--alphas must be numbers" in capsys.readouterr().err
