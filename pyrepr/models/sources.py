"""What the command line's words stand for: models by a spec, data by a path.

========================  ==================================================================================
``hf:PATH``               a transformers model, from a folder, the hub, or ``@PACKAGE/folder`` of an installed package
``hf-random:PATH``        the same architecture, randomly initialised
``timm:NAME``             a timm model, randomly initialised; ``timm:NAME?pretrained`` with its weights
``py:MODULE:FUNCTION``    what the function returns: a module, or a dict of activations
``FILE``                  activations, ``.npz`` or ``.safetensors``: one array [N, …] a layer
========================  ==================================================================================
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._optional import COMPARE, require

FORMS = "hf:PATH, hf-random:PATH, timm:NAME, timm:NAME?pretrained, py:MODULE:FUNCTION, FILE.npz or FILE.safetensors"
ARRAYS = (".npy", ".npz", ".safetensors")
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
    makers = {"hf": _transformers, "hf-random": _transformers, "timm": _timm, "py": _function}
    if colon and rest and scheme in makers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return makers[scheme](spec, rest)
    if Path(spec).suffix in (".npz", ".safetensors"):
        return Source(spec, load_arrays(Path(spec)))
    raise ValueError(f"{spec!r} is no model; expected {FORMS}")


def _folder(path: str) -> str:
    """`path`, with ``@PACKAGE`` standing for the folder of an installed package."""
    if path.startswith("@"):
        package, _, inside = path[1:].partition("/")
        found = importlib.util.find_spec(package) if package.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise ValueError(f"{path!r} names the package {package!r}, which is not installed")
        path = os.path.join(next(iter(found.submodule_search_locations)), inside)
    elif not path.startswith((".", "/", "~")) and not Path(path).exists():
        return path  # a name on the hub
    if not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(f"{path!r} must be a folder with a transformers model (a config.json), got none")
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
    images = _transformers_images(path) if getattr(model, "main_input_name", "") == "pixel_values" else None
    return Source(spec, model, tokenizer=lambda: _tokenizer(path), images=images)


def _tokenizer(path: str) -> Any:
    tokenizer = require("transformers", COMPARE).AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _transformers_images(path: str) -> ImageShape:
    """From the model's preprocessor_config.json, where there is one."""
    base = require("transformers.image_processing_base", COMPARE)
    try:
        config, _ = base.ImageProcessingMixin.get_image_processor_dict(path)
    except OSError:
        return ImageShape()
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
    """The arrays of a ``.npy``, ``.npz`` or ``.safetensors`` file by name; nothing is unpickled."""
    import zipfile

    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            arrays = require("safetensors.torch", COMPARE).load_file(path)
        elif path.suffix == ".npy":
            arrays = {path.stem: torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except ImportError:
        raise
    except (zipfile.BadZipFile, EOFError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} holds no readable arrays of numbers: {error}") from error
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"{path} cannot be read: {error}") from error
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


def load_data(
    path: Path, sources: list[Source], *, samples: str, batch_size: int, max_samples: int | None, max_length: int
) -> Batches:
    """Batches of a text file (one line a sequence), a folder of images or a file of arrays.

    Raises:
        ValueError, OSError: if it is missing, empty, unreadable, or does not suit the models.
    """
    kind = kind_of(path)
    if kind == "text":
        return _texts(path, sources, samples == "batch", batch_size, max_samples, max_length)
    if kind == "images":
        return _images(path, sources, batch_size, max_samples)
    arrays = load_arrays(path)
    lengths = {len(x) for x in arrays.values()}
    if len(lengths) > 1:
        raise ValueError(f"--data: the arrays of {path} must have one number of rows, got {sorted(lengths)}")
    single = next(iter(arrays.values())) if len(arrays) == 1 else None
    if single is not None:
        return Batches(_even(_limited(lengths.pop(), max_samples), batch_size), lambda i, j: single[i:j])
    return Batches(
        _even(_limited(lengths.pop(), max_samples), batch_size), lambda i, j: {k: x[i:j] for k, x in arrays.items()}
    )


def _limited(n: int, max_samples: int | None) -> int:
    return n if max_samples is None else min(n, max_samples)


def _texts(
    path: Path, sources: list[Source], fixed: bool, batch_size: int, max_samples: int | None, max_length: int
) -> Batches:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"--data: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not lines:
        raise ValueError(f"--data: {path} is empty; expected one text a line")
    tokenizers = {source.spec: source.tokenizer() for source in sources if source.tokenizer}
    if not tokenizers:
        raise ValueError("--data: a text file needs a tokenizer, so at least one hf: model; give arrays of token ids")
    (first, tokenizer), *others = tokenizers.items()
    for spec, other in others:
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"--data: {first} and {spec} have different vocabularies, so tokens cannot be paired")
    most = min(max_length, tokenizer.model_max_length)

    def tokens(start: int, stop: int) -> Any:
        padding = "max_length" if fixed else True
        return tokenizer(lines[start:stop], padding=padding, truncation=True, max_length=most, return_tensors="pt")

    return Batches(_even(_limited(len(lines), max_samples), batch_size), tokens)


def _images(path: Path, sources: list[Source], batch_size: int, max_samples: int | None) -> Batches:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"--data: {path} holds no images ({', '.join(IMAGES)})")
    require("PIL", "pillow")
    shape = next((source.images for source in sources if source.images), ImageShape())
    bounds = _even(_limited(len(files), max_samples), batch_size)
    return Batches(bounds, lambda i, j: torch.stack([load_image(file, shape) for file in files[i:j]]))


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
