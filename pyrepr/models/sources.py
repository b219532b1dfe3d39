"""What the command line's words stand for: models by a spec, data by a path.

========================  ==================================================================================
``hf:PATH``               a transformers model, from a folder, the hub, or ``@PACKAGE/folder`` of an installed package
``hf-random:PATH``        the same architecture, randomly initialised
``st:PATH``               the transformer of a sentence-transformers folder
``timm:NAME``             a timm model, randomly initialised; ``timm:NAME?pretrained`` with its weights
``py:MODULE:FUNCTION``    what the function returns: a module, or a dict of activations
``FILE``                  activations, ``.npz``, ``.npy``, ``.safetensors`` or ``.pt``: one array [N, …] a layer
========================  ==================================================================================

Data is a text file (a text a line), a ``.csv`` or ``.jsonl`` with a text column, a folder of images, or a file of
arrays: ``.npy``, ``.npz``, ``.safetensors`` or ``.pt`` (tensors only).
"""

from __future__ import annotations

import csv
import difflib
import importlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._optional import COMPARE, require
from pyrepr.models._inputs import parameters_of

FORMS = (
    "hf:PATH, hf-random:PATH, st:PATH, timm:NAME, timm:NAME?pretrained, py:MODULE:FUNCTION, or a file "
    ".npz, .npy, .safetensors or .pt"
)
ARRAYS = (".npy", ".npz", ".safetensors", ".pt", ".pth")
TABLES = (".csv", ".jsonl")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class ImageShape:
    """How an image becomes an input: shorter edge to ``size / crop``, the middle ``size`` × ``size``, normalised."""

    size: int = 224
    crop: float = 0.875
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass
class Source:
    """A side of the comparison: a model or stored activations, and how to prepare data for it."""

    spec: str
    model: nn.Module | dict[str, Tensor]
    tokenizer: Callable[[], Any] | None = None
    images: ImageShape | None = None


def resolve(spec: str, seed: int = 0) -> Source:
    """The model or the activations a spec stands for (see the module's table); random weights come from `seed`.

    Raises:
        ValueError, OSError, ImportError: one sentence that says what is wrong with the spec.
    """
    scheme, colon, rest = spec.partition(":")
    makers = {"hf": _transformers, "hf-random": _transformers, "st": _sentences, "timm": _timm, "py": _function}
    if colon and rest and scheme in makers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return makers[scheme](spec, rest)
    if Path(spec).suffix in ARRAYS:
        return Source(spec, load_arrays(Path(spec)))
    raise ValueError(f"{spec!r} is no model; expected {FORMS}")


def _folder(path: str, holds: str = "config.json") -> str:
    """`path`, with ``@PACKAGE`` standing for the folder of an installed package."""
    if path.startswith("@"):
        package, _, inside = path[1:].partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"{path!r} names the package {package!r}, which is not installed")
        path = os.path.join(next(iter(found.submodule_search_locations)), inside)
    elif holds == "config.json" and not path.startswith((".", "/", "~")) and not Path(path).exists():
        return path  # a name on the hub
    if not (Path(path).expanduser() / holds).is_file():
        kind = "transformers" if holds == "config.json" else "sentence-transformers"
        raise ValueError(f"{path!r} must be a folder with a {kind} model (a {holds}), got none")
    return str(Path(path).expanduser())


def _transformers(spec: str, rest: str) -> Source:
    transformers = require("transformers", COMPARE)
    path = _folder(rest)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if spec.startswith("hf-random:"):
            model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(path))
        else:
            model = transformers.AutoModel.from_pretrained(path)
    except Exception as error:  # transformers, its configuration checks and safetensors have classes of their own
        raise ValueError(f"{spec!r} cannot be loaded: {error}") from error
    if getattr(model, "main_input_name", "") == "pixel_values":
        return Source(spec, model, images=_transformers_images(path, model.config))
    return Source(spec, model, tokenizer=lambda: _tokenizer(spec, path))


def _sentences(spec: str, rest: str) -> Source:
    path = Path(_folder(rest, "modules.json"))
    modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    inside = [m.get("path", "") for m in modules if str(m.get("type", "")).endswith("Transformer")]
    if not inside:
        raise ValueError(f"{spec!r} has no transformer among its modules")
    return _transformers(spec, str(path / inside[0]))


def _tokenizer(spec: str, path: str) -> Any:
    try:
        tokenizer = require("transformers", COMPARE).AutoTokenizer.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{spec!r} has no tokenizer that can be read; give arrays of token ids as --data") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _transformers_images(path: str, model: Any) -> ImageShape:
    """From preprocessor_config.json, where there is one, else of the size that the model's configuration says."""
    base = require("transformers.image_processing_base", COMPARE)
    try:
        config, _ = base.ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        size = getattr(model, "image_size", ImageShape.size)
        return ImageShape(size) if isinstance(size, int) else ImageShape()
    size = config.get("crop_size") if config.get("do_center_crop") else None
    size = size or config.get("size") or ImageShape.size
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or ImageShape.size
    crop = ImageShape.crop if config.get("do_center_crop") else 1.0
    mean, std = config.get("image_mean") or ImageShape.mean, config.get("image_std") or ImageShape.std
    return ImageShape(int(size), crop, tuple(mean), tuple(std))


def _timm(spec: str, rest: str) -> Source:
    timm = require("timm", "timm torchvision")
    name, _, option = rest.partition("?")
    if option not in ("", "pretrained"):
        raise ValueError(f"{spec!r}: after ? only 'pretrained' is known, got {option!r}")
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise ValueError(f"timm has no model {name!r}" + (f"; near matches: {', '.join(close)}" if close else ""))
    model = timm.create_model(name, pretrained=bool(option))
    config = getattr(model, "pretrained_cfg", None) or {}
    images = ImageShape(
        int(config.get("input_size", (3, ImageShape.size))[1]),
        float(config.get("crop_pct") or ImageShape.crop),
        tuple(config.get("mean") or ImageShape.mean),
        tuple(config.get("std") or ImageShape.std),
    )
    return Source(spec, model, images=images)


def _function(spec: str, rest: str) -> Source:
    module_name, _, function_name = rest.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{spec!r} must be py:MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec!r}: there is no module {error.name!r} here or installed") from error
    if not callable(function := getattr(module, function_name, None)):
        names = [name for name, value in vars(module).items() if callable(value)]
        close = difflib.get_close_matches(function_name, names)
        hint = f"; near matches: {', '.join(close)}" if close else ""
        raise ValueError(f"{spec!r}: module {module_name} has no function {function_name!r}{hint}")
    model = function()
    if not isinstance(model, (nn.Module, dict)):
        raise ValueError(f"{spec!r} must return a torch.nn.Module or a dict of activations, got {type(model).__name__}")
    return Source(spec, model)


def load_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a ``.npy``, ``.npz``, ``.safetensors`` or ``.pt`` file by name; nothing is run in reading it."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            arrays = require("safetensors.torch", COMPARE).load_file(path)
        elif path.suffix in (".pt", ".pth"):
            with warnings.catch_warnings():  # of other pickles, which are refused
                warnings.simplefilter("ignore")
                loaded = torch.load(path, map_location="cpu", weights_only=True)
            arrays = {path.stem: loaded} if isinstance(loaded, Tensor) else dict(loaded)
            if not all(isinstance(x, Tensor) for x in arrays.values()):
                raise ValueError("it must hold a tensor, or a dict of them")
        elif path.suffix == ".npy":
            arrays = {path.stem: torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of the reader's own class and words, which may advise to run what the file holds
        form = "a tensor or a dict of tensors" if path.suffix in (".pt", ".pth") else f"a {path.suffix} file"
        raise ValueError(f"{path} holds no readable arrays of numbers; expected {form}") from error
    if not arrays or any(x.dim() == 0 or x.shape[0] == 0 for x in arrays.values()):
        raise ValueError(f"{path} must hold arrays with at least one row, got an empty one or none")
    return arrays


@dataclass
class Batches:
    """Batches prepared on the fly: item i is made when it is asked for, and kept by nobody."""

    bounds: list[tuple[int, int]]
    make: Callable[[int, int], Any]

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[Any]:
        return (self.make(start, stop) for start, stop in self.bounds)


def _even(n: int, batch_size: int) -> list[tuple[int, int]]:
    """[0, n) in batches of nearly one size, at most `batch_size`: no short last one."""
    count = -(-n // batch_size)
    return [(n * i // count, n * (i + 1) // count) for i in range(count)]


def kind_of(path: Path) -> str:
    """``"text"``, ``"images"`` or ``"arrays"``, by what lies there.

    Raises:
        FileNotFoundError: if nothing does.
    """
    if not path.exists():
        raise FileNotFoundError(f"--data: no such file or folder: {path}")
    if path.is_dir():
        return "images"
    return "arrays" if path.suffix in ARRAYS else "text"


@dataclass
class Data:
    """Batches, what each side is fed of one (``inputs=`` of :func:`pyrepr.compare`), and what they were read as."""

    batches: Batches
    inputs: tuple[Callable[[Any], Any] | None, Callable[[Any], Any] | None]
    text: str


def load_data(
    path: Path,
    sources: list[Source],
    *,
    samples: str,
    batch_size: int,
    max_samples: int | None,
    max_length: int,
    column: str | None = None,
    pool: str | None = None,
    tokens: str = "all",
) -> Data:
    """A text file (a line, or a row of a table, a sequence), a folder of images or a file of arrays.

    Every side tokenizes with its own tokenizer, and gets images of its own size.

    Raises:
        ValueError, OSError: if it is missing, empty, unreadable, or does not suit the models.
    """
    kind = kind_of(path)
    if kind == "text":
        texts, what = read_texts(path, column)
        texts = texts[:max_samples]
        feeds = _tokenizing(sources, samples, pool, tokens, max_length)
        bounds = _even(len(texts), batch_size)
        return Data(Batches(bounds, lambda i, j: texts[i:j]), feeds, f"{len(texts)} {what}")
    if kind == "images":
        return _images(path, sources, batch_size, max_samples)
    arrays = load_arrays(path)
    lengths = {len(x) for x in arrays.values()}
    if len(lengths) > 1:
        raise ValueError(f"--data: the arrays of {path} must have one number of rows, got {sorted(lengths)}")
    n = _limited(lengths.pop(), max_samples)
    bounds = _even(n, batch_size)
    shapes = ", ".join(f"{name} {[n, *x.shape[1:]]}" for name, x in arrays.items())
    if len(arrays) == 1:
        single = next(iter(arrays.values()))
        return Data(Batches(bounds, lambda i, j: single[i:j]), (None, None), f"the array {shapes}")
    batches = Batches(bounds, lambda i, j: {k: x[i:j] for k, x in arrays.items()})
    return Data(batches, (None, None), f"arrays by keyword: {shapes}")


def _limited(n: int, max_samples: int | None) -> int:
    return n if max_samples is None else min(n, max_samples)


def read_texts(path: Path, column: str | None) -> tuple[list[str], str]:
    """The texts of a file, and what they are: lines, or a column of a ``.csv`` or ``.jsonl``.

    Raises:
        ValueError: if it is not UTF-8, empty, or has no such column.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"--data: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    what = "texts, one a line"
    if path.suffix in TABLES:
        records = _records(path, lines)
        columns = list(dict.fromkeys(key for record in records for key in record))
        if column is None and len(columns) == 1:
            column = columns[0]
        if column is None or column not in columns:
            came = "no --column" if column is None else f"{column!r}"
            raise ValueError(
                f"--column must name the texts of {path}, one of {', '.join(columns) or 'none'}; got {came}"
            )
        texts = [str(record[column]) for record in records if record.get(column) is not None]
        what = f"texts, column {column!r} of a {path.suffix} table"
    elif column is not None:
        raise ValueError(f"--column is for .csv and .jsonl files, got {path}")
    else:
        texts = [line.rstrip("\r\n") for line in lines]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"--data: {path} is empty; expected one text a line")
    return texts, what


def _records(path: Path, lines: list[str]) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        return list(csv.DictReader(lines))
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"--data: line {number} of {path} is no JSON: {error}") from None
            if not isinstance(record, (dict, str)):
                raise ValueError(f"--data: line {number} of {path} must be an object or a text, got {line.strip():.40}")
            records.append(record if isinstance(record, dict) else {"text": record})
    return records


def _tokenizing(
    sources: list[Source], samples: str, pool: str | None, tokens: str, max_length: int
) -> tuple[Callable[[Any], Any] | None, Callable[[Any], Any] | None]:
    """How each side turns texts into tokens: by its own tokenizer, or the other's where it has none."""
    for source in sources:
        if source.images:
            raise ValueError(f"--data: it is read as texts, but {source.spec} takes images, a folder of them")
    known = {source.spec: source.tokenizer() for source in sources if source.tokenizer}
    if not known:
        raise ValueError("--data: a text file needs a tokenizer, so at least one hf: model; give arrays of token ids")
    (first, tokenizer), *others = known.items()
    same = all(other.get_vocab() == tokenizer.get_vocab() for _, other in others)
    if not same and samples == "tokens" and not pool:
        raise ValueError(
            f"--data: {first} and {others[0][0]} have different vocabularies, so tokens cannot be paired; --pool mean "
            "compares texts"
        )
    padding = "max_length" if samples == "batch" and not pool else True

    def feed(tokenizer: Any, both: bool) -> Callable[[list[str]], Any]:
        most = min(max_length, tokenizer.model_max_length)
        options = {"padding": padding, "truncation": True, "max_length": most, "return_tensors": "pt"}

        def encoded(texts: list[str]) -> Any:
            found = tokenizer(texts, **options, return_special_tokens_mask=tokens == "no_special")
            if both:  # encoder and decoder read the same text
                found["decoder_input_ids"] = found["input_ids"]
                found["decoder_attention_mask"] = found["attention_mask"]
            return found

        return encoded

    feeds: dict[tuple[str, bool], Any] = {}
    sides = []
    for source in (sources[0], sources[-1]):
        both = bool(getattr(getattr(source.model, "config", None), "is_encoder_decoder", False))
        spec = first if same else source.spec if source.spec in known else first
        made = feeds.setdefault((spec, both), feed(known[spec], both))
        sides.append(made if isinstance(source.model, nn.Module) else None)
    return sides[0], sides[1]


def _images(path: Path, sources: list[Source], batch_size: int, max_samples: int | None) -> Data:
    for source in sources:
        if source.tokenizer and "pixel_values" not in (parameters_of(source.model) or ()):  # type: ignore[arg-type]
            raise ValueError(f"--data: {path} is a folder, which is read as images, but {source.spec} takes texts")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"--data: {path} holds no images ({', '.join(IMAGES)})")
    require("PIL", "pillow")
    files = files[:max_samples]
    usual = next((source.images for source in sources if source.images), ImageShape())

    def feed(shape: ImageShape) -> Callable[[list[Path]], Tensor]:
        return lambda batch: torch.stack([load_image(file, shape) for file in batch])

    shapes = [source.images or usual for source in (sources[0], sources[-1])]
    first = feed(shapes[0])
    feeds = (first, first if shapes[1] == shapes[0] else feed(shapes[1]))
    sizes = " and ".join(dict.fromkeys(f"{shape.size}×{shape.size}" for shape in shapes))
    return Data(Batches(_even(len(files), batch_size), lambda i, j: files[i:j]), feeds, f"{len(files)} images, {sizes}")


def load_image(path: Path, shape: ImageShape) -> Tensor:  # [3, size, size]
    """One image as a normalised tensor."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise ValueError(f"--data: {path} is not a readable image: {error}") from error
    edge = max(shape.size, round(shape.size / shape.crop))
    scale = edge / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - shape.size) // 2, (image.height - shape.size) // 2
    image = image.crop((left, top, left + shape.size, top + shape.size))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(shape.mean)[:, None, None]) / torch.tensor(shape.std)[:, None, None]
