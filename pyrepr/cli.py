"""The command ``pyrepr``: info, compare, bench."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

import pyrepr
from pyrepr._reporting import ending, printable
from pyrepr.backend import build_info, native

if TYPE_CHECKING:
    from pyrepr.models.comparison import Comparison

OPTIONAL = ("triton", "transformers", "timm", "safetensors", "matplotlib", "tqdm", "pillow")
# Environment variables that decide what runs, or how fast.
VARIABLES = (
    "PYREPR_",
    "OMP_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "TRITON_",
    "CUDA_VISIBLE_DEVICES",
    "CMAKE_ARGS",
    "CXX",
    "LD_PRELOAD",
)
# What bad input raises. Anything else is a bug, in pyrepr or in a model, and names its class.
EXPECTED = (ValueError, TypeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line on stderr."""
    from_shell = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(argv).parse_args(argv)
        if from_shell and "bench" in argv[:1]:
            from pyrepr.benchmarks.harness import restart_pinned

            restart_pinned()
        with ending(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = args.run(args) or 0
        sys.stdout.flush()  # here, where a broken pipe is still caught
        return code
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--traceback" in argv:
            raise
        kind = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        hint = "" if isinstance(error, EXPECTED) else " (--traceback shows where)"
        print(printable(f"pyrepr: error: {kind}{_one_line(error)}{hint}"), file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning):
        print(printable(f"pyrepr: warning: {message}"), file=sys.stderr)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyrepr", description=pyrepr.__doc__)
    parser.add_argument("--version", action="version", version=f"pyrepr {pyrepr.__version__}")
    commands = parser.add_subparsers(required=True, metavar="{info,compare,bench}")

    info = commands.add_parser(
        "info", help="what a bug report needs: versions, build, backends, instruction set, threads, GPU, environment"
    )
    info.set_defaults(run=_info)

    from pyrepr.models import sources

    compare = commands.add_parser(
        "compare",
        help="CKA between the layers of two models",
        description="Compares two models layer by layer on the same data and writes comparison.npz (values and "
        "metadata), values.csv, heatmap.png and heatmap.html.",
        epilog=sources.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_compare_arguments(compare)
    compare.set_defaults(run=_compare)

    bench = commands.add_parser("bench", help="speed, memory and error of every op on this machine")
    if "bench" in argv[:1]:
        from pyrepr.benchmarks import command

        command.add_arguments(bench)
        bench.set_defaults(run=command.main)
    for each in (info, compare, bench):
        each.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", metavar="A", help="model or activations, see below")
    add("b", metavar="B", help="model or activations")
    add("--data", type=Path, help="text file (a text a line), folder of images, or .npy/.npz/.safetensors of inputs")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results; made if missing")
    for side in "ab":
        add(f"--name-{side}", metavar="NAME", help=f"what to call {side.upper()} in the results (default: the spec)")
        add(
            f"--layers-{side}",
            action="append",
            metavar="NAMES",
            help="names or patterns, separated by commas; * stays within one part of a dotted name, ** crosses parts "
            "(default: the outermost repeated blocks and what stands around them)",
        )
    add("--samples", choices=("batch", "tokens"), help="what a sample is (default: tokens for text, else batch)")
    add("--batch-size", type=_positive, default=32, metavar="N", help="(default: %(default)s)")
    add("--max-samples", type=_positive, metavar="N", help="lines, images or rows at most (default: all)")
    add("--max-length", type=_positive, default=128, metavar="N", help="tokens a text at most (default: %(default)s)")
    add("--estimator", choices=("unbiased", "biased"), default="unbiased", help="(default: %(default)s)")
    add("--mode", choices=("auto", "exact", "minibatch"), default="auto", help="(default: %(default)s)")
    add("--kernel", choices=("linear", "rbf", "laplacian", "polynomial", "cosine"), default="linear")
    add("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    add("--device", default="cpu", help="where the models run (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, which a terminal gets otherwise")


def _info(args: argparse.Namespace) -> None:
    for name, value in (*_versions(), *_native_code(), *_machine(), *_surroundings()):
        print(f"{name:<13} {value}")
    print(f"\nbackends\n{pyrepr.backends()}")


def _versions() -> Iterator[tuple[str, str]]:
    yield "pyrepr", pyrepr.__version__
    yield "commit", build_info().get("commit") or "unknown"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", torch.__version__
    for name in ("numpy", *OPTIONAL):
        yield name, _version(name)


def _native_code() -> Iterator[tuple[str, str]]:
    """The compiled module: where it is, and how it was made."""
    try:
        module, reason = native()
    except (ImportError, ValueError, RuntimeError) as error:
        module, reason = None, str(error)
    if module is None:
        yield "SIMD level", f"none ({reason})"
        return
    build = module.build
    yield "module", f"{module.__file__} ({Path(module.__file__).stat().st_size / 1e6:.1f} MB)"
    yield "compiler", f"{build['compiler']} {build['flags']}"
    yield "SIMD level", module.simd_level()
    yield "SIMD built", ", ".join(module.simd_levels(supported=False))
    yield "SIMD left out", ", ".join(build["left_out"].split()) or "none"


def _machine() -> Iterator[tuple[str, str]]:
    yield "system", f"{platform.platform()} {platform.machine()}"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "GPU", ", ".join(devices) or "none that PyTorch can use"


def _surroundings() -> Iterator[tuple[str, str]]:
    """What else decides: environment variables, and other packages of the same name on the path."""
    here = Path(pyrepr.__file__).parent
    yield "package", str(here)
    places = {Path(entry or ".").resolve() / "pyrepr" for entry in sys.path}
    others = sorted(str(place) for place in places if (place / "__init__.py").exists() and place != here.resolve())
    if others:
        yield "also there", ", ".join(others)
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            yield "environment", f"{name}={os.environ[name]}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def _results(out: Path) -> Iterator[Path]:
    """A scratch folder inside `out` whose files move up when all of them are there; a failure leaves no trace."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    scratch = None
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".pyrepr-", dir=out))
        except OSError as error:
            raise OSError(f"--out: {out} cannot be written: {error.strerror}") from error
        yield scratch
        for file in scratch.iterdir():
            os.replace(file, out / file.name)
    except BaseException:
        if scratch:
            shutil.rmtree(scratch)
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    scratch.rmdir()


def _compare(args: argparse.Namespace) -> None:
    from pyrepr._optional import PLOT, require
    from pyrepr.models import sources

    device = _device(args.device)
    if args.data is not None:
        kind = sources.kind_of(args.data)
        samples = args.samples or ("tokens" if kind == "text" else "batch")
    else:
        samples = args.samples or "batch"
    with _results(args.out) as folder:
        require("matplotlib", PLOT)
        a = sources.resolve(args.a, args.seed)
        b = a if args.b == args.a else sources.resolve(args.b, args.seed)
        models = [source.model for source in (a, b) if isinstance(source.model, torch.nn.Module)]
        if models and args.data is None:
            raise ValueError("--data is needed: a text file, a folder of images or a file of arrays")
        data = None
        if args.data is not None:
            data = sources.load_data(
                args.data,
                [a, b],
                samples=samples,
                batch_size=args.batch_size,
                max_samples=args.max_samples,
                max_length=args.max_length,
            )
        for model in models:
            model.to(device)
        comparison = pyrepr.compare(
            a.model,
            b.model,
            data,
            layers_a=_split(args.layers_a),
            layers_b=_split(args.layers_b),
            samples=samples,
            estimator=args.estimator,
            mode=args.mode,
            kernel=args.kernel,
            progress=not args.quiet and sys.stderr.isatty(),
            names=(args.name_a or args.a, args.name_b or args.b),
        )
        comparison.save(folder / "comparison.npz")
        _write_csv(comparison, folder / "values.csv")
        comparison.plot(folder / "heatmap.png")
        comparison.to_html(folder / "heatmap.html")
        files = sorted(file.name for file in folder.iterdir())
    print(_summary(comparison))
    print("\nwrote " + printable(", ".join(str(args.out / name) for name in files)))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be a PyTorch device as cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _split(values: list[str] | None) -> list[str] | None:
    return None if values is None else [name.strip() for value in values for name in value.split(",") if name.strip()]


def _write_csv(comparison: Comparison, path: Path) -> None:
    """A row a layer. A name that a spreadsheet would take for a formula gets the apostrophe that says it is none."""
    import csv

    def cell(name: str) -> str:
        return f"'{name}" if name.lstrip().startswith(("=", "+", "-", "@")) else name

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *map(cell, comparison.layers_b)])
        for name, line in zip(comparison.layers_a, comparison.values.tolist(), strict=True):
            writer.writerow([cell(name), *line])


def _summary(comparison: Comparison) -> str:
    """For every layer of A, the layer of B most like it."""
    described = (f"A  {comparison.model_a}", f"B  {comparison.model_b}", f"   {comparison.describe()}")
    lines = [*map(printable, described), ""]
    layers_a, layers_b = ([printable(name) for name in names] for names in (comparison.layers_a, comparison.layers_b))
    values, places = comparison.values.nan_to_num(nan=-torch.inf).max(1)
    wide = max(len("layer of A"), *map(len, layers_a))
    lines.append(f"{'layer of A':<{wide}}  {'CKA':>6}  most similar layer of B")
    for name, value, place in zip(layers_a, values.tolist(), places.tolist(), strict=True):
        found = (value, layers_b[place]) if value > -torch.inf else (torch.nan, "–")
        lines.append(f"{name:<{wide}}  {found[0]:6.4f}  {found[1]}")
    return "\n".join(lines)
