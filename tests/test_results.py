"""What a comparison becomes: pictures, frames, notebooks, pages; measures and standard errors in one pass."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import pyrepr
from pyrepr._reporting import fixed, progress_bar, remaining
from pyrepr.models import ComparisonCallback
from pyrepr.models import _collecting as collecting
from pyrepr.models._figures import _wrapped as wrapped
from pyrepr.models._figures import labels_of, ticks_of
from pyrepr.models._scores import Score
from pyrepr.similarity import MutualKNN


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()


def batches() -> tuple[torch.Tensor, ...]:
    return torch.randn(90, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(30)


def sides() -> list[list[torch.Tensor]]:
    x = torch.cat(batches())
    with torch.no_grad():
        return [[network(seed)[:1](x), network(seed)(x)] for seed in (0, 1)]


def compare(**options) -> pyrepr.Comparison:
    return pyrepr.compare(network(0), network(1), batches(), progress=False, **options)


SCORES = {"cka": Score(torch.empty(0), chance=0.0)}


def made(rows: int, columns: int, prefix: str = "", **options) -> pyrepr.Comparison:
    generator = torch.Generator().manual_seed(0)
    told = {"model_a": "first", "model_b": "second", "samples": "batch", "count": 9, "estimator": "unbiased"}
    return pyrepr.Comparison(
        values=torch.rand(rows, columns, generator=generator, dtype=torch.float64),
        layers_a=tuple(f"{prefix}layers.{i}" for i in range(rows)),
        layers_b=tuple(f"{prefix}layers.{i}" for i in range(columns)),
        **{**told, "mode": "exact", "kernel": "linear", **options},
    )


def test_measures_in_one_pass():
    result = compare(measures=("cka", "mutual_knn(k=5)", MutualKNN(k=7), "procrustes"))
    assert list(result.measures) == ["cka", "mutual_knn(k=5)", "mutual_knn(k=7)", "procrustes"]
    xs, ys = sides()
    torch.testing.assert_close(result.values, pyrepr.cka_matrix(xs, ys), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.measures["mutual_knn(k=5)"], MutualKNN(k=5).matrix(xs, ys), rtol=1e-9, atol=0)
    assert "mutual kNN" in result.describe("mutual_knn(k=5)") and "chance 0.056" in result.describe("mutual_knn(k=5)")
    moments = compare(measures=["cka", "procrustes"])  # no rows are held
    for key, values in moments.measures.items():
        torch.testing.assert_close(values, result.measures[key], rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="measure must be one of cka, procrustes, got 'rsa'"):
        moments.plot(measure="rsa")


def test_standard_errors():
    xs, ys = sides()
    result = compare(stderr=True)
    torch.testing.assert_close(result.stderr, pyrepr.cka_matrix(xs, ys, return_stderr=True)[1], rtol=1e-8, atol=0)
    assert result.score().chance == 0
    several = compare(stderr=True, measures=("cka", "mutual_knn"))
    torch.testing.assert_close(several.stderr, result.stderr, rtol=1e-8, atol=0)
    assert several.scores["mutual_knn"].stderr.shape == (2, 2)
    spread = compare(stderr=True, mode="minibatch")
    tables = [pyrepr.cka(xs[0][i : i + 30], ys[0][i : i + 30]) for i in (0, 30, 60)]
    assert 0 < spread.stderr[0, 0] < 2 * torch.stack(tables).std()
    assert compare().stderr is None


def test_standard_errors_of_tokens_leave_out_whole_texts():
    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 3)).double()

    a, b, ids = make(0), make(1), torch.randint(20, (11, 6), generator=torch.Generator().manual_seed(0))
    result = pyrepr.compare(
        a, b, ids.split(4), samples="tokens", stderr=True, layers_a="1", layers_b="1", progress=False
    )
    groups = torch.arange(11).repeat_interleave(6)
    x, y = a(ids).flatten(0, 1).detach(), b(ids).flatten(0, 1).detach()
    expected = pyrepr.cka(x, y, return_stderr=True, groups=groups)
    torch.testing.assert_close((result.values[0, 0], result.stderr[0, 0]), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measures": "mutual_nn"}, ValueError, "measure 'mutual_nn' does not exist; near matches: mutual_knn"),
        ({"measures": 3}, TypeError, "measures must be names or measures, got int"),
        ({"names": ("one",)}, TypeError, r"names must be two strings, got \('one',\)"),
        ({"names": "ab"}, TypeError, "names must be two strings, got 'ab'"),
        ({"measures": ()}, ValueError, "measures must name at least one measure"),
        (
            {"measures": ("cka", "mutual_knn", "cka")},
            ValueError,
            "measures must name each measure once, got 'cka' twice",
        ),
        ({"measures": "rsa", "mode": "minibatch"}, ValueError, "mode='minibatch' is an estimate of CKA alone"),
        ({"measures": "mutual_knn(k=400)"}, ValueError, "400"),
        ({"measures": "rsa", "checkpoint": "never.pt"}, ValueError, "checkpoint cannot hold the rows that rsa needs"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        compare(**options)


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(collecting, "memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"mutual_knn needs the rows of all samples: .* give fewer samples or layers"):
        compare(measures="mutual_knn")


def test_equality_and_files(tmp_path):
    result = compare(measures=("cka", "mutual_knn"), stderr=True)
    loaded = pyrepr.Comparison.load(result.save(tmp_path / "result.npz"))
    assert loaded == result and loaded != compare() and loaded != 3
    assert loaded.describe("mutual_knn") == result.describe("mutual_knn")
    nan = made(2, 2)
    nan.values[0, 0] = torch.nan
    assert pyrepr.Comparison.load(nan.save(tmp_path / "nan.npz")) == nan


def test_files_that_are_none(tmp_path):
    import numpy as np

    good = json.dumps({"format": "pyrepr.Comparison", **made(2, 2).metadata()})
    cases = [
        {"values": np.zeros(4), "metadata": good},
        {"values": np.zeros((2, 2), complex), "metadata": good},
        {"values": np.array([["a", "b"], ["c", "d"]]), "metadata": good},
        {"values": np.zeros((2, 2)), "metadata": "{}"},
        {"values": np.zeros((2, 2)), "metadata": "[1]"},
        {"values": np.zeros((2, 2)), "metadata": good.replace('["layers.0", "layers.1"]', '"ab"')},
        {"metadata": good},
    ]
    for case in cases:
        np.savez(tmp_path / "bad.npz", **case)
        with pytest.raises(ValueError, match=r"path must be a file written by Comparison\.save"):
            pyrepr.Comparison.load(tmp_path / "bad.npz")


def test_frames_and_datasets(monkeypatch):
    result = compare(measures=("cka", "mutual_knn"), stderr=True)
    frame = result.to_pandas("mutual_knn")
    assert frame.loc["0", "2"] == result.measures["mutual_knn"][0, 1].item()
    assert (frame.index.name, frame.columns.name) == ("Sequential", "Sequential") and frame.attrs["count"] == 90
    import xarray

    dataset = result.to_xarray()
    assert isinstance(dataset, xarray.Dataset) and set(dataset) == {
        "cka",
        "cka_stderr",
        "mutual_knn",
        "mutual_knn_stderr",
    }
    assert float(dataset["cka"].sel(layer_a="2", layer_b="0")) == result.values[1, 0].item()
    for name, method in (("pandas", result.to_pandas), ("xarray", result.to_xarray)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"{name} is needed here and .*: pip install {name}"):
            method()


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_axes_are_given_or_made():
    from matplotlib.figure import Figure

    result = made(3, 4)
    result.values[0, 0], result.values[1, 1] = -0.001, torch.nan
    mine = Figure().add_subplot()
    axes = result.plot(mine, vmin=-1, vmax=2, origin="lower", title="mine")
    assert axes is mine and axes.images[0].get_clim() == (-1, 2) and axes.images[0].origin == "lower"
    assert axes.figure.get_suptitle() == "" and "mine" in axes.get_title()
    assert {"0.00", "–"} <= set(texts(axes)) and not any("-0.00" in text for text in texts(axes))
    own = result.plot()
    assert own.images[0].get_clim() == (0, 1) and own.figure.get_suptitle() == "CKA: first × second"
    assert not texts(result.plot(annotate=False)) and not texts(made(40, 40).plot())
    with pytest.raises(ValueError, match="origin must be 'upper' or 'lower', got 'left'"):
        result.plot(origin="left")
    with pytest.raises(TypeError, match="ax must be axes of matplotlib or a path, got int"):
        result.plot(3)
    for low, high in ((1, 0), (0.5, 0.5), (float("nan"), 1), ("a", 1)):
        with pytest.raises(ValueError, match="vmin and vmax must be finite numbers, vmin the smaller one, got"):
            result.plot(vmin=low, vmax=high)
    assert result.plot(vmin=torch.tensor(-0.5)).images[0].get_clim() == (-0.5, 1)


def test_a_hundred_and_sixty_layers_have_room():
    axes = made(160, 160, "model.language_model.").plot()
    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    for labels, low in ((axes.get_yticklabels(), 8), (axes.get_xticklabels(), 8)):
        assert low <= len(labels) <= 80 and all(text.get_text().startswith("…") for text in labels)
    boxes = [text.get_window_extent(renderer) for text in axes.get_yticklabels()]
    assert all(one.y0 >= two.y1 for one, two in itertools.pairwise(boxes))  # no two overlap
    assert "160 layers, … = model.language_model.layers" in axes.get_ylabel()


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (7, 7), (3, 90), (160, 160)])
def test_nothing_is_clipped(rows, columns):
    prefix = "a_module_with_a_very_long_name_indeed.and_another_one." * 2
    result = made(rows, columns, prefix, model_a="m" * 70, stderr=torch.ones(rows, columns), scores=SCORES)
    axes = result.plot()
    figure = axes.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    everything = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label, axes.title]
    for text in everything:
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1


def test_names_are_no_formulas():
    result = made(3, 3, r"$\frac$ \x1b ", model_a=r"$\bad$", model_b="$x$\n$y$")
    result.values[1, 1] = torch.nan
    axes = result.plot(title=r"$\worse$")
    axes.figure.canvas.draw()  # would refuse formulas that are none
    assert axes.get_xticklabels()[0].get_text() == r"$\frac$ \x1b layers.0" and r"$x$\n$y$" in axes.get_xlabel()
    assert "grey: undefined" in axes.get_title().replace("\n", " ")


def test_doubtful_cells_are_hatched():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 4, generator=generator) for _ in range(2))
    doubtful = pyrepr.compare({"x": x}, {"y": y, "same": x + 0.1 * y}, stderr=True, progress=False)
    assert doubtful.score().unsure.tolist() == [[True, False]]
    (mesh,) = [c for c in doubtful.plot().collections if c.get_hatch()]
    assert mesh.get_array().mask.tolist() == [[False, True]]
    assert "hatched: within two standard errors" in doubtful.describe()


def test_long_names_break_at_their_dots():
    assert wrapped("(… = transformer.encoder.blocks.layer)", 20) == "(… = transformer.\nencoder.blocks.\nlayer)"
    assert wrapped("2048 tokens, linear kernel, exact", 24) == "2048 tokens, linear\nkernel, exact"
    assert wrapped("x" * 40, 15) == "\n".join(["x" * 15, "x" * 15, "x" * 10]) and wrapped("", 9) == ""


def test_labels_and_ticks():
    names = ["embeddings", *(f"encoder.layer.{i}" for i in range(30)), "x" * 80]
    labels, prefix = labels_of(names)
    assert prefix == "encoder.layer." and labels[1] == "…0" and labels[0] == "embeddings" and len(labels[-1]) == 31
    assert labels_of(["encoder.layer.0", "encoder.layer.1"]) == (["encoder.layer.0", "encoder.layer.1"], "")
    assert ticks_of(160, 70) == list(range(0, 160, 5)) and ticks_of(7, 10) == list(range(7))
    assert [fixed(v, 2) for v in (-0.004, -0.006, 0.0, 1.0, float("nan"))] == ["0.00", "-0.01", "0.00", "1.00", "nan"]
    assert [remaining(s) for s in (40, 700, 9000)] == ["40 s", "12 min", "2.5 h"]


def test_notebooks():
    result = made(2, 3, model_b="</script><b>second")
    text = result._repr_html_()
    assert text.count("<td") == 6 and "<b>" not in text and "<script" not in text
    many = made(160, 160)._repr_html_()
    assert "data:image/png;base64," in many and "<td" not in many
    import base64
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(many.split("base64,")[1].split('"')[0])))
    assert picture.size == (160, 160)


def test_page_has_a_switch_and_what_was_left_out(tmp_path):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            return self.used(x)

    model = Spare().double()
    with pytest.warns(UserWarning, match="1 layer left out|2 layers left out"):
        result = pyrepr.compare(model, network(1), batches(), measures=("cka", "rsa"), stderr=True, progress=False)
    data = page_data(result.to_html(tmp_path / "page.html"))
    assert data["skipped"] == [["spare", "is not called in the model's forward"]]
    for key, shown in zip(("cka", "rsa"), data["measures"], strict=True):
        score = result.score(key)
        assert (shown["key"], shown["title"]) == (key, f"{score.title}: Spare × Sequential")
        assert (shown["how"], shown["low"], shown["high"]) == (result.describe(key), score.low, score.high)
        assert shown["values"] == score.values.tolist() and shown["stderr"] == score.stderr.tolist()
        assert shown["unsure"] == score.unsure.tolist()
    assert data["measures"][0]["values"] != data["measures"][1]["values"]
    titled = page_data(result.to_html(tmp_path / "page.html", title="mine"))
    assert [shown["title"] for shown in titled["measures"]] == ["mine", "mine"]


def page_data(path) -> dict:
    line = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("const data = "))
    return json.loads(line.removeprefix("const data = ").removesuffix(";"))


def test_page_of_names_that_are_none(tmp_path):
    names = ("</script><b>", "\x1b[31mred", "a\nb", "\u202ertl", "block.0", "block.1")
    result = made(6, 6, model_a="\x1b[2J", skipped_a={"\x07": "is not called"})
    result = dataclasses.replace(result, layers_b=names)
    page = result.to_html(tmp_path / "page.html")
    data = page_data(page)
    assert data["columns"] == ["</script><b>", r"\x1b[31mred", r"a\nb", r"\u202ertl", "block.0", "block.1"]
    assert data["model_a"] == r"\x1b[2J" and data["skipped"] == [[r"\x07", "is not called"]]
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 1 and "\x1b" not in text and r"<title>CKA: \x1b[2J × second</title>" in text
    assert page_data(made(40, 3, "model.").to_html(page))["prefixes"] == ["model.layers.", "model.layers."]


@pytest.mark.parametrize("template", ["heatmap.html", "conversion.html"])
def test_pages_stand_alone_and_take_the_keyboard(template):
    text = (Path(pyrepr.models.__file__).with_name(template)).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=|@import|fetch\(|//(?!www.w3.org/2000/svg)\w", text)  # needs no other file
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert (
        '<svg tabindex="0"' in text and "ArrowDown" in text
    ) or 'add(add($("main thead tr"), "th"), "button"' in text


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    path, whole, seen = tmp_path / "state.pt", compare(), []

    def cut():
        for i, batch in enumerate(batches()):
            if i == 2 and not seen:
                seen.append(i)
                raise KeyboardInterrupt
            yield batch

    def run(data, **options):
        return pyrepr.compare(network(0), network(1), data, progress=False, checkpoint=path, **options)

    for mode in ("exact", "minibatch"):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            run(cut(), mode=mode)
        assert path.exists()
        with pytest.raises(ValueError, match="is of other layers or options; delete it"):
            run(batches(), mode=mode, layers_a="0")
        with pytest.raises(ValueError, match="is of other weights, data or batches; delete it"):
            run([x + 1 for x in batches()], mode=mode)
        with pytest.raises(
            ValueError, match=r"data must give the batches that checkpoint .* has seen, 60 samples in the"
        ):
            run([batches()[0], torch.cat(batches()[1:])], mode=mode)
        with pytest.raises(ValueError, match=r"data must give the batches that checkpoint .* has seen, 2, got 1"):
            run(batches()[:1], mode=mode)
        result = run(batches(), mode=mode)
        assert not path.exists() and result.count == 90
        if mode == "exact":
            torch.testing.assert_close(result.values, whole.values, rtol=1e-12, atol=0)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="checkpoint must be a file that an interrupted compare left"):
        run(batches())
    path.unlink()
    monkeypatch.setattr(collecting, "SAVE_SECONDS", 0.0)
    assert run(batches()) == compare() and not path.exists()


def test_progress_without_tqdm(monkeypatch, capsys):
    import time

    monkeypatch.setitem(sys.modules, "tqdm", None)
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    assert list(progress_bar([1, 2, 3, 4], True, "compare", "batch")) == [1, 2, 3, 4]
    assert capsys.readouterr().err == "compare: 1 of 4, 2 min left\ncompare: 3 of 4, 27 s left\n"


class Logger:
    def __init__(self, pictures: bool):
        self.numbers, self.pictures = [], []
        if pictures:
            self.experiment = types.SimpleNamespace(add_figure=lambda *args: self.pictures.append(args))

    def log_metrics(self, numbers, step):
        self.numbers.append((numbers, step))


def test_callback_logs_to_whatever_is_attached():
    callback = ComparisonCallback(lambda model: pyrepr.compare(model, network(1), batches(), progress=False), every=2)
    loggers = [Logger(True), Logger(False)]
    model = network(0)
    with pytest.warns(UserWarning, match="logger Logger takes no pictures; numbers are logged") as caught:
        for epoch in range(4):
            trainer = types.SimpleNamespace(current_epoch=epoch, global_step=10 * epoch, loggers=loggers)
            callback.on_train_epoch_start(trainer, model)
            callback.on_train_epoch_end(trainer, model)
    assert len(caught) == 1
    assert [step for _, step in loggers[0].numbers] == [10, 30]
    assert loggers[1].numbers[0][0]["comparison/2"] == pytest.approx(callback.last.values[1].max().item())
    assert len(loggers[0].pictures) == 2 and not loggers[1].pictures
    with pytest.raises(TypeError, match=r"run must give a pyrepr\.Comparison, got int"):
        ComparisonCallback(lambda model: 3).on_train_epoch_end(trainer, model)
    with pytest.raises(TypeError, match="run must be a function of the model, got int"):
        ComparisonCallback(3)
    with pytest.raises(ValueError, match="every must be an int from 1 on, got 0"):
        ComparisonCallback(len, every=0)


def test_callback_never_ends_a_training(monkeypatch):
    import matplotlib.pyplot as pyplot

    def epochs(logger, count=2) -> None:
        for epoch in range(count):
            trainer = types.SimpleNamespace(current_epoch=epoch, global_step=epoch, loggers=[logger])
            callback.on_train_epoch_end(trainer, network(0))

    def fresh() -> ComparisonCallback:
        return ComparisonCallback(lambda model: pyrepr.compare(model, network(1), batches(), progress=False))

    callback, logger = fresh(), Logger(True)
    before = pyplot.get_fignums()
    epochs(logger)
    assert len(logger.pictures) == 2 and pyplot.get_fignums() == before  # pyplot keeps none of them
    callback = fresh()
    with pytest.warns(UserWarning) as caught:
        epochs(object())
    assert [str(one.message) for one in caught] == [
        "logger object takes no numbers; the comparison is the callback's last",
        "logger object takes no pictures; numbers are logged",
    ]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    callback, logger = fresh(), Logger(True)
    with pytest.warns(UserWarning, match="no pictures are logged, numbers are: matplotlib is needed here") as caught:
        epochs(logger)
    assert len(caught) == 1 and len(logger.numbers) == 2 and not logger.pictures


def test_notebooks_and_pages_need_no_matplotlib(tmp_path):
    code = f"""
import sys
sys.modules["matplotlib"] = None
import torch, pyrepr
from torch import nn
result = pyrepr.compare({{"a": torch.randn(9, 3)}}, {{"b": torch.randn(9, 3)}}, progress=False)
report = pyrepr.convert(nn.Sequential(nn.Linear(16, 8)), [torch.randn(99, 16)], progress=False, batch_sizes=())
for each in (result, report):
    assert "<table>" in each._repr_html_()
    each.to_html({str(tmp_path / "page.html")!r})
    try:
        each.plot()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    sentence = 'matplotlib is needed here and is not installed: pip install "pyrepr-kernels[plot]"'
    assert done.stdout.splitlines() == [sentence, sentence], done.stderr


def test_metric_of_torchmetrics():
    from pyrepr.integrations.torchmetrics import CKAMetric

    xs, ys = sides()
    metric, other = CKAMetric(), CKAMetric()
    for i in (0, 30):
        batch = metric([x[i : i + 30] for x in xs], [y[i : i + 30] for y in ys])
    torch.testing.assert_close(batch, pyrepr.cka_matrix([x[30:60] for x in xs], [y[30:60] for y in ys]))
    other.update([x[60:] for x in xs], [y[60:] for y in ys])
    metric.merge_state(other)
    torch.testing.assert_close(metric.compute(), pyrepr.cka_matrix(xs, ys), rtol=1e-10, atol=1e-12)
    metric.reset()
    assert not metric.streams
    with pytest.raises(ValueError, match="mode must be"):
        CKAMetric(mode="fast")


def test_conversions_as_frames_pictures_and_notebooks(tmp_path):
    with pytest.raises(ValueError, match=r"dpi must be positive and at most .* for this figure, got 'a'"):
        made(2, 2).plot(path=tmp_path / "table.png", dpi="a")
    report = pyrepr.convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), [torch.randn(300, 16)], progress=False)
    frame = report.to_pandas()
    assert list(frame.index) == ["0", "1"] and frame.loc["1", "out_features"] == 8 and "ms_before_64" in frame
    assert report._repr_html_().count("<tr>") == 4
    axes = report.plot(path=tmp_path / "bars.svg")
    assert len(axes.patches) == 2 and (tmp_path / "bars.svg").exists() and not axes.texts
    undefined = dataclasses.replace(report.layers[0], name="$x", relative_mse=float("nan"))
    report = dataclasses.replace(report, layers=(undefined, report.layers[1]))
    figure = axes.figure
    axes.clear()
    figure.suptitle("mine")
    assert texts(report.plot(axes, title="$y")) == [" undefined"]
    assert figure.get_suptitle() == "mine" and axes.get_title() == "$y"
    assert pyrepr.Conversion.load(report.save(tmp_path / "report.json")) == report
