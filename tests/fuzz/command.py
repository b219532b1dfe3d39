"""The command line and the loaders, with files that are damaged, or are something else than their names say.

Truth: exit code 0 and the values of the arrays' CKA, or exit code 2, one sentence, and no trace in the folder.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import Case, Draw
from measures import cka_of

import pyrepr
from pyrepr import cli

BACKENDS = False
# What PyTorch says when a model is called with data that does not suit it: the model's sentence, not pyrepr's.
FORWARD = (
    "mat1 and mat2",
    "index out of range in self",
    "must have the same dtype",
    "expected scalar type",
    "this model cannot be made",
)
FOLDER = Path(tempfile.mkdtemp(prefix="pyrepr-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.chdir(FOLDER)
NETS = """
import torch
def tiny():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 5))
def pixels():
    return torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten(), torch.nn.Linear(48, 3))
def activations():
    return {"a": torch.arange(24.0).view(8, 3).sin()}
def number():
    return 3
def broken():
    raise RuntimeError("this model cannot be made")
"""


def run(argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def write(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(base64.b64decode(text))


NAMES = {"run": run, "write": write, "Path": Path}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz(arrays: dict[str, np.ndarray], compressed: bool) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()})


def image(draw: Draw) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    size = draw.choice(((1, 1), (8, 8), (5, 30), (30, 2)))
    mode = draw.choice(("RGB", "L", "RGBA", "P", "1", "CMYK"))
    kind = draw.choice(("PNG", "JPEG", "BMP", "WEBP"))
    try:
        Image.new(mode, size, draw.randint(0, 1)).save(file, kind)
    except (OSError, ValueError, KeyError):
        file = io.BytesIO()
        Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def damaged(draw: Draw, data: bytes) -> bytes:
    """Cut short, bits turned, parts overwritten, repeated or swapped."""
    kind = draw.choice(("cut", "turn", "turn", "zero", "insert", "double", "empty", "number", "garbage"))
    if not data or kind == "empty":
        return b""
    place = draw.randrange(len(data))
    if draw.chance(0.5):
        place = draw.randrange(min(len(data), 128))  # in the header
    if kind == "cut":
        return data[:place]
    if kind == "turn":
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(data)) if draw.chance(0.5) else place] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == "zero":
        return data[:place] + bytes(min(16, len(data) - place)) + data[place + 16 :]
    if kind == "insert":
        return data[:place] + draw.randbytes(draw.randint(1, 9)) + data[place:]
    if kind == "double":
        return data + data[place:]
    if kind == "number":  # a size in a header becomes enormous, or negative
        digits = [i for i, byte in enumerate(data[:200]) if chr(byte).isdigit()]
        at = draw.choice(digits) if digits else place
        return data[:at] + draw.choice((b"99999999999999", b"-1", b"0", b"1e9", b"true")) + data[at + 1 :]
    return draw.randbytes(draw.randint(1, 300))


def odd_array(draw: Draw) -> np.ndarray:
    return draw.choice(
        (
            np.array([{"a": 1}, None], dtype=object),
            np.array(["text", "more"]),
            np.zeros((0, 3)),
            np.zeros((3, 0)),
            np.float64(3.0),
            np.zeros((4, 3), dtype=np.complex64),
            np.arange(12).reshape(4, 3),
            np.full((8, 3), np.nan),
            np.zeros((8, 3)),
            np.ones((2, 3)),
            np.zeros((8, 2, 2)),
            np.zeros(8, dtype=[("a", "f4")]),
            np.zeros((8, 3), dtype=">f8"),
            np.zeros((8, 3), dtype=bool),
            np.random.default_rng(0).standard_normal((9, 3)),
            np.asfortranarray(np.random.default_rng(1).standard_normal((8, 3))),
            np.full((8, 3), np.inf),
            np.zeros((8, 3), dtype=np.float16),
            np.zeros((8, 3), dtype="M8[s]"),
            np.zeros((8, 3), dtype=np.uint16),
        )
    )


def arrays_of(draw: Draw, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(draw.seed_())
    names = draw.sample(["a", "b.c", "layer 1", "é", "=1+1", "x/y", "\x1b[31mred", "..", "a\nb"], draw.randint(1, 3))
    return {
        name: rng.standard_normal((rows, draw.choice((1, 3, 5)))).astype(draw.choice((np.float32, np.float64)))
        for name in names
    }


def activations(draw: Draw, side: str, rows: int) -> tuple[str, bytes, dict[str, np.ndarray] | None]:
    """A file of activations: its name, its bytes, and what it holds, or None if that may be refused."""
    arrays = arrays_of(draw, rows)
    suffix = draw.choice((".npz", ".npz", ".safetensors"))
    known: dict[str, np.ndarray] | None = arrays
    if len({a.dtype for a in arrays.values()}) > 1:
        known = None
    if draw.chance(0.25):
        arrays[draw.choice(list(arrays))] = odd_array(draw)
        known = None
    try:
        data = npz(arrays, draw.chance(0.5)) if suffix == ".npz" else safetensors(arrays)
    except Exception:  # safetensors raises a class of its own
        data = npz(arrays, False)
    if draw.chance(0.5):
        data, known = damaged(draw, data), None
    if draw.chance(0.05):
        suffix, known = draw.choice((".npy", ".json", ".txt", ".pt", ".SAFETENSORS", "")), None
    return f"{side}{suffix}", data, known


def put_file(lines: list[str], name: str, data: bytes) -> None:
    lines.append(f"write({name!r}, {base64.b64encode(data).decode()!r})")


def left_behind() -> str | None:
    """What a call that failed must not leave."""
    found = [
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*")
        if path.name.startswith(".") or path.parts[len(FOLDER.parts)] == "out"
    ]
    return f"{found[0]} was left behind" if found else None


def clear() -> None:
    for path in FOLDER.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("nets.py").write_text(NETS)


def check_run(names: dict[str, Any], truth: Any = None) -> str | None:
    code, _, err = names["out"]
    if code not in (0, 2):
        return f"exit code {code}: {err[-300:]!r}"
    if code == 2:
        line = err.strip().splitlines()[-1] if err.strip() else ""
        if ": error: " not in line or len([x for x in err.splitlines() if ": error: " in x]) != 1:
            return f"no line of error: {err[-300:]!r}"
        if "--traceback shows where" in line and not any(word in line for word in FORWARD):
            return f"an error that is a bug: {line!r}"
        if "\x1b" in err:
            return f"an escape reaches the terminal: {err!r}"
        return f"a good file is refused: {line!r}" if truth else left_behind()
    if "\x1b" in names["out"][1] + err:
        return "an escape reaches the terminal"
    if truth:
        found = pyrepr.Comparison.load("out/comparison.npz")
        values = found.values.numpy()
        wanted = truth(found.layers_a, found.layers_b)
        if values.shape != wanted.shape or not np.allclose(values, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
            return f"values are {values.tolist()}, truth {wanted.tolist()}"
    return None


def draw_stored(draw: Draw) -> Case:
    """compare A.npz B.npz"""
    rows, lines = draw.choice((8, 8, 5, 4)), []
    name_a, data_a, a = activations(draw, "a", rows)
    name_b, data_b, b = activations(draw, "b", rows)
    put_file(lines, name_a, data_a)
    put_file(lines, name_b, data_b)
    estimator = draw.choice(("unbiased", "biased"))
    argv = ["compare", name_a, name_b, "--out", "out", "--estimator", estimator, "--quiet"]
    truth = None
    if a is not None and b is not None and {x.dtype for x in a.values()} == {x.dtype for x in b.values()}:

        def truth(rows: Any, columns: Any) -> np.ndarray:
            sides = [[side[name].astype(np.longdouble) for name in names] for side, names in ((a, rows), (b, columns))]
            return np.array(
                [[cka_of(x, y, {"name": "linear"}, estimator) for y in sides[1]] for x in sides[0]], dtype=np.float64
            )

    if draw.chance(0.2):
        truth = None
        argv += draw.choice(
            (
                ["--kernel", "rbf"],
                ["--mode", "minibatch"],
                ["--layers-a", "a"],
                ["--layers-a", "zz*"],
                ["--samples", "tokens"],
                ["--device", "cuda:9"],
                ["--device", "nowhere"],
                ["--batch-size", "0"],
                ["--max-samples", "-1"],
                ["--data", name_a],
                ["--kernel", "what"],
                ["--seed", "x"],
                ["--mode", "exact", "--kernel", "rbf"],
            )
        )
    case = Case("compare FILES", f"out = run({argv!r})", "value", lines)
    case.check = lambda names: check_run(names, truth)
    return case


def draw_data(draw: Draw) -> Case:
    """compare py:nets:tiny … --data FILE"""
    lines: list[str] = []
    kind = draw.choice(("npy", "npz", "safetensors", "txt", "images", "nothing", "json"))
    function, path = "tiny", f"data.{kind}"
    rng = np.random.default_rng(draw.seed_())
    good = draw.chance(0.3)
    x = rng.standard_normal((8, 4)).astype(np.float32) if draw.chance(0.8) else odd_array(draw)
    if kind == "npy":
        data = npy(x)
    elif kind in ("npz", "safetensors"):
        try:
            data = npz({"input": x}, False) if kind == "npz" else safetensors({"input": x})
        except Exception:  # safetensors raises a class of its own
            data = npz({"input": x}, False)
    elif kind == "txt":
        data = draw.choice(
            (b"one\ntwo\n", b"", b"\n \n", b"\xff\xfe bad", "é\u2028x".encode(), b"a\0b\n", b"\xed\xa0\x80")
        )
    elif kind == "json":
        data = draw.choice((b"{}", b"[1, 2]", b"{", b"null"))
    if kind == "images":
        function, path = "pixels", "pictures"
        for i in range(draw.randint(0, 5)):
            picture = image(draw)
            put_file(
                lines,
                f"pictures/{i}.{draw.choice(('png', 'jpg', 'webp', 'bmp'))}",
                picture if good or draw.chance(0.7) else damaged(draw, picture),
            )
        lines.append("Path('pictures').mkdir(exist_ok=True)")
    elif kind != "nothing":
        put_file(lines, path, data if good else damaged(draw, data))
    function = draw.choice((function, function, function, "activations", "number", "broken", "missing"))
    argv = [
        "compare",
        f"py:nets:{function}",
        f"py:nets:{draw.choice((function, 'tiny'))}",
        "--out",
        "out",
        "--data",
        path,
        "--quiet",
    ]
    case = Case("compare MODELS", f"out = run({argv!r})", "value", lines)

    case.check = check_run
    return case


def draw_model(draw: Draw) -> Case:
    """compare hf:FOLDER … with what a folder may hold"""
    lines: list[str] = []
    config = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 20,
    }
    text = json.dumps(config).encode()
    if draw.chance(0.5):
        text = damaged(draw, text)
    put_file(lines, "model/config.json", text)
    if draw.chance(0.5):
        put_file(lines, "model/model.safetensors", damaged(draw, safetensors({"x": np.zeros(3, dtype=np.float32)})))
    if draw.chance(0.3):
        put_file(
            lines,
            "model/tokenizer.json",
            damaged(draw, b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}}}'),
        )
    put_file(lines, "data.npy", npy(np.arange(24).reshape(6, 4)))
    spec = draw.choice(
        (
            "hf:./model",
            "hf-random:./model",
            "hf:./nowhere",
            "hf:@nopackage/x",
            "timm:nothing",
            "py:nets",
            "py::",
            "hf:",
            "x.npz",
            "what",
            "",
        )
    )
    argv = ["compare", spec, spec, "--out", "out", "--data", "data.npy", "--quiet"]
    case = Case("compare SPEC", f"out = run({argv!r})", "value", lines)
    case.check = check_run
    return case


def draw_load(draw: Draw) -> Case:
    """Comparison.load and Conversion.load."""
    lines: list[str] = []
    if draw.chance(0.5):
        values = torch.rand(2, 1, dtype=torch.float64)
        made = pyrepr.Comparison(values=values, **dict(COMPARISON))
        made.save(FOLDER / "good.npz")
        data = (FOLDER / "good.npz").read_bytes()
        data = rewritten(draw, data) if draw.chance(0.5) else damaged(draw, data)
        put_file(lines, "bad.npz", data)
        call = "out = pyrepr.Comparison.load('bad.npz'); text = str(out) + repr(out)"
    else:
        text = (
            json.dumps(CONVERSION)
            if draw.chance(0.5)
            else json.dumps(draw.choice(([], {}, 3, None, "x", {"format": "pyrepr.Conversion"}, {"format": "other"})))
        )
        put_file(lines, "bad.json", damaged(draw, text.encode()))
        call = "out = pyrepr.Conversion.load('bad.json'); text = str(out) + repr(out)"
    case = Case(call.split("(")[0].removeprefix("out = pyrepr."), call, "either", lines, names=("path",))

    def check(names: dict[str, Any]) -> str | None:
        out = names["out"]
        if isinstance(out, pyrepr.Comparison) and tuple(out.values.shape) != (len(out.layers_a), len(out.layers_b)):
            return f"values {list(out.values.shape)} for {len(out.layers_a)} and {len(out.layers_b)} layers"
        return None

    case.check = check
    return case


def rewritten(draw: Draw, data: bytes) -> bytes:
    """A saved comparison with one field of its metadata lost or replaced."""
    with np.load(io.BytesIO(data)) as file:
        values, metadata = file["values"], json.loads(str(file["metadata"]))
    key = draw.choice(list(metadata))
    if draw.chance(0.3):
        metadata.pop(key)
    else:
        metadata[key] = draw.choice((None, 3, [], "x", {}, [1, 2], ["a"]))
    if draw.chance(0.2):
        values = draw.choice(
            (np.zeros((0, 0)), np.zeros(3), np.array(["x"]), np.zeros((2, 1), dtype=complex), np.zeros((1, 2)))
        )
    return npz({"values": values, "metadata": np.array(json.dumps(metadata))}, False)


def _examples() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a comparison and a conversion hold beside values, taken from real ones."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    x = torch.randn(32, 4)
    comparison = pyrepr.compare(net, net, [x], progress=False)
    conversion = pyrepr.convert(net, [x], bits=2, batch_sizes=(), progress=False)
    conversion.save(FOLDER / "example.json")
    metadata = {**comparison.metadata(), "layers_a": ("a", "b"), "layers_b": ("c",)}
    for made_again in ("format", "scores"):
        metadata.pop(made_again, None)
    return metadata, json.loads((FOLDER / "example.json").read_text())


COMPARISON, CONVERSION = _examples()


def draw(draw: Draw) -> Case:
    clear()
    return draw.choices((draw_stored, draw_data, draw_model, draw_load), (4, 4, 2, 3))[0](draw)
