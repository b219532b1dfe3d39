"""The command ``pyrepr``: info, compare, probe, bench."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
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
from pyrepr._reporting import ending, fixed, printable
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
    except KeyboardInterrupt as error:
        print("pyrepr: interrupted" + "".join(f"; {note}" for note in error.args), file=sys.stderr)
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
    commands = parser.add_subparsers(required=True, metavar="{info,compare,probe,bench}")

    info = commands.add_parser(
        "info", help="what a bug report needs: versions, build, backends, instruction set, threads, GPU, environment"
    )
    info.set_defaults(run=_info)

    from pyrepr.models import sources

    compare = commands.add_parser(
        "compare",
        help="CKA and other similarities between the layers of two models",
        description="Compares two models layer by layer on the same data and writes comparison.npz (values and "
        "metadata), values.csv, heatmap.png and heatmap.html; a table and a picture for every measure.",
        epilog=sources.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_compare_arguments(compare)
    compare.set_defaults(run=_compare)

    probe = commands.add_parser(
        "probe",
        help="what can be read out of a model's layers by linear maps",
        description="Probes a model layer by layer and writes probe.csv, probe.json and depth.png: held-out accuracy "
        "(or R²) with its standard error.",
        epilog=sources.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_probe_arguments(probe)
    probe.set_defaults(run=_probe)

    bench = commands.add_parser("bench", help="speed, memory and error of every op on this machine")
    if "bench" in argv[:1]:
        from pyrepr.benchmarks import command

        command.add_arguments(bench)
        bench.set_defaults(run=command.main)
    for each in (info, compare, probe, bench):
        each.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    from pyrepr.models._layers import POOLS
    from pyrepr.similarity import MEASURES

    add = parser.add_argument
    add("a", metavar="A", help="model or activations, see below")
    add("b", metavar="B", help="model or activations")
    add("--data", type=Path, help="texts, images or arrays, see below")
    add("--column", metavar="NAME", help="which column of a .csv or .jsonl holds the texts")
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
    add("--tokens", choices=("all", "no_special"), default="all", help="which tokens count (default: %(default)s)")
    add("--pool", choices=POOLS, help="one row a sample from its tokens or positions; compares any two models")
    add(
        "--measure",
        action="append",
        metavar="NAME",
        help=f"{', '.join(MEASURES)}, with options in brackets as in 'mutual_knn(k=5)'; several with commas "
        "between them, or repeated (default: cka)",
    )
    add("--stderr", action="store_true", help="standard errors; cells within two of chance are hatched")
    add("--batch-size", type=_positive, default=32, metavar="N", help="(default: %(default)s)")
    add("--max-samples", type=_positive, metavar="N", help="lines, images or rows at most (default: all)")
    add("--max-length", type=_positive, default=128, metavar="N", help="tokens a text at most (default: %(default)s)")
    add("--estimator", choices=("unbiased", "biased"), default="unbiased", help="(default: %(default)s)")
    add("--mode", choices=("auto", "exact", "minibatch"), default="auto", help="(default: %(default)s)")
    add("--kernel", choices=("linear", "rbf", "laplacian", "polynomial", "cosine"), default="linear", help="of CKA")
    add("--bandwidth", type=float, metavar="F", help="σ of rbf and laplacian in medians of the distances (default: 1)")
    add("--sigma", type=float, metavar="F", help="σ itself")
    add("--title", help="above the pictures (default: the measure and the models)")
    add("--format", action="append", choices=("png", "svg", "pdf"), help="of the pictures, repeatable (default: png)")
    add("--dpi", type=_positive, default=150, metavar="N", help="of the pictures (default: %(default)s)")
    add("--resume", action="store_true", help="go on with a run into DIR that was interrupted")
    add("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    add("--device", default="cpu", help="where the models run (default: %(default)s)")
    add("--quiet", action="store_true", help="no progress bar, which a terminal gets otherwise")


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model, see below")
    add("--data", type=Path, required=True, help="text file (a text a line), folder of images, or file of arrays")
    add("--labels", type=Path, required=True, help="text file (a label a line) or .npy, in the order of the data")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results; made if missing")
    add("--layers", action="append", metavar="NAMES", help="names or patterns, separated by commas")
    add("--pool", choices=("mean", "max", "last", "cls", "spatial", "none"), help="(default: mean for text, else none)")
    add("--task", choices=("classification", "regression"), default="classification", help="(default: %(default)s)")
    add(
        "--alphas",
        default="1,100,10000",
        metavar="NUMBERS",
        help="λ to try, separated by commas (default: %(default)s)",
    )
    add("--folds", type=_positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--batch-size", type=_positive, default=32, metavar="N", help="(default: %(default)s)")
    add("--max-samples", type=_positive, metavar="N", help="lines, images or rows at most (default: all)")
    add("--max-length", type=_positive, default=128, metavar="N", help="tokens a text at most (default: %(default)s)")
    add("--title", help="of the picture")
    add("--seed", type=int, default=0, help="of folds and random weights (default: %(default)s)")
    add("--device", default="cpu", help="where the model runs (default: %(default)s)")
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
    kind = None if args.data is None else sources.kind_of(args.data)
    if args.column is not None and kind != "text":
        raise ValueError(f"--column is for .csv and .jsonl files, got {args.data or 'no --data'}")
    if args.tokens != "all" and kind != "text":
        raise ValueError(f"--tokens {args.tokens} is for texts, whose tokenizer says which tokens are special")
    samples = args.samples or ("tokens" if kind == "text" and not args.pool else "batch")
    if args.sigma is not None and args.bandwidth is not None:
        raise ValueError("--sigma is σ itself and --bandwidth a factor of the median distance; give one of them")
    if (args.bandwidth is not None or args.sigma is not None) and args.kernel not in ("rbf", "laplacian"):
        raise ValueError(f"--bandwidth and --sigma are of --kernel rbf and laplacian, got {args.kernel}")
    kernel = pyrepr.Kernel(args.kernel, 1.0 if args.bandwidth is None else args.bandwidth, args.sigma)
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
                column=args.column,
                pool=args.pool,
                tokens=args.tokens,
            )
        for model in models:
            model.to(device)
        shown = not args.quiet and sys.stderr.isatty()
        if shown and data is not None:
            print(f"{args.data}: read as {data.text}", file=sys.stderr)
        checkpoint = _checkpoint(args) if models else None
        with warnings.catch_warnings(), _resumable(checkpoint):
            warnings.filterwarnings("ignore", r"\d+ layers? left out")  # the summary has them all
            comparison = pyrepr.compare(
                a.model,
                b.model,
                None if data is None else data.batches,
                layers_a=_split(args.layers_a),
                layers_b=_split(args.layers_b),
                samples=samples,
                tokens=args.tokens,
                pool=args.pool,
                inputs=None if data is None else data.inputs,
                measures=_measures(args.measure),
                stderr=args.stderr,
                estimator=args.estimator,
                mode=args.mode,
                kernel=kernel,
                progress=shown,
                names=(args.name_a or args.a, args.name_b or args.b),
                checkpoint=checkpoint,
            )
        _write(comparison, folder, args)
        files = sorted(file.name for file in folder.iterdir())
    print(_summary(comparison))
    if data is not None:
        print("\n" + printable(f"read {args.data} as {data.text}"))
    print("\nwrote " + printable(", ".join(str(args.out / name) for name in files)))


def _probe(args: argparse.Namespace) -> None:
    import json

    from pyrepr._optional import PLOT, require
    from pyrepr.models import probe, sources

    device = _device(args.device)
    pool = args.pool or ("mean" if sources.kind_of(args.data) == "text" else "none")
    pool = None if pool == "none" else pool
    with _results(args.out) as folder:
        require("matplotlib", PLOT)
        source = sources.resolve(args.model, args.seed)
        if not isinstance(source.model, torch.nn.Module):
            raise ValueError(f"{args.model} holds activations; pyrepr.stats.linear_probe takes them")
        data = sources.load_data(
            args.data,
            [source],
            samples="batch",
            batch_size=args.batch_size,
            max_samples=args.max_samples,
            max_length=args.max_length,
            pool=pool,
        )
        labels = _labels(args.labels, args.task)[: args.max_samples]
        source.model.to(device)
        try:
            alphas = [float(number) for number in args.alphas.split(",")]
        except ValueError:
            raise ValueError(f"--alphas must be numbers separated by commas, got {args.alphas!r}") from None
        found = probe(
            source.model,
            data.batches,
            labels,
            inputs=data.inputs[0],
            layers=_split(args.layers),
            pool=pool,
            alphas=alphas,
            folds=args.folds,
            task=args.task,
            seed=args.seed,
            progress=not args.quiet and sys.stderr.isatty(),
        )
        found.plot(folder / "depth.png", title=args.title or f"{args.model}: linear probes, {found.samples} samples")
        rows = [dict(zip(("layer", "score", "stderr", "alpha"), row, strict=True)) for row in found.table()]
        report = {"model": args.model, "metric": found.metric, "chance": found.chance, "samples": found.samples}
        (folder / "probe.json").write_text(json.dumps({**report, "layers": rows}, indent=2) + "\n", encoding="utf-8")
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        (folder / "probe.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        files = sorted(file.name for file in folder.iterdir())
    print(found)
    print("\nwrote " + ", ".join(str(args.out / name) for name in files))


def _labels(path: Path, task: str) -> torch.Tensor | list[str]:
    """Labels of a file: .npy, or a text file with one a line."""
    if path.suffix == ".npy":
        import numpy as np

        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"--labels: {path} is not a .npy file of numbers ({error})") from error
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if task == "regression":
            return torch.tensor([float(line) for line in lines])
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise ValueError(f"--labels: {path} must hold a number a line for --task regression ({error})") from error
    return lines


def _checkpoint(args: argparse.Namespace) -> Path | None:
    """Where an interrupted run is kept; rows that are held are not."""
    path = args.out / "unfinished.pt"
    if args.measure or args.stderr:
        if args.resume:
            raise ValueError("--resume goes with CKA alone, without --measure and --stderr")
        return None
    if not args.resume:
        path.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _resumable(path: Path | None) -> Iterator[None]:
    """Ctrl-C says what it left."""
    try:
        yield
    except KeyboardInterrupt:
        if path is None or not path.exists():
            raise
        raise KeyboardInterrupt("the same command with --resume goes on with it") from None


def _write(comparison: Comparison, folder: Path, args: argparse.Namespace) -> None:
    """Everything a comparison is written as."""
    comparison.save(folder / "comparison.npz")
    for i, (key, score) in enumerate(comparison.scores.items()):
        suffix = "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in f"-{key}") if i else ""
        _write_csv(comparison, score.values, folder / f"values{suffix}.csv")
        if score.stderr is not None:
            _write_csv(comparison, score.stderr, folder / f"stderr{suffix}.csv")
        for form in dict.fromkeys(args.format or ["png"]):
            comparison.plot(path=folder / f"heatmap{suffix}.{form}", measure=key, title=args.title, dpi=args.dpi)
    comparison.to_html(folder / "heatmap.html", title=args.title)


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


def _measures(values: list[str] | None) -> list[str] | None:
    """Measures separated by commas, those within brackets aside."""
    if values is None:
        return None
    return [name.strip() for value in values for name in re.split(r",(?![^(]*\))", value) if name.strip()]


def _write_csv(comparison: Comparison, values: torch.Tensor, path: Path) -> None:
    """A row a layer. A name that a spreadsheet would take for a formula gets the apostrophe that says it is none."""
    import csv

    def cell(name: str) -> str:
        return f"'{name}" if name.lstrip().startswith(("=", "+", "-", "@")) else name

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *map(cell, comparison.layers_b)])
        for name, line in zip(comparison.layers_a, values.tolist(), strict=True):
            writer.writerow([cell(name), *line])


def _summary(comparison: Comparison) -> str:
    """For every layer of A, the layer of B most like it, where one is beyond chance; then what was left out."""
    described = (f"A  {comparison.model_a}", f"B  {comparison.model_b}", f"   {comparison.describe()}")
    lines = [*map(printable, described), ""]
    layers_a, layers_b = ([printable(name) for name in names] for names in (comparison.layers_a, comparison.layers_b))
    score = comparison.score()
    candidates = score.values.nan_to_num(nan=-torch.inf)
    if score.unsure is not None:
        candidates = candidates.masked_fill(score.unsure, -torch.inf)
    values, places = candidates.max(1)
    wide = max(len("layer of A"), *map(len, layers_a))
    lines.append(f"{'layer of A':<{wide}}  {score.title:>6}  most similar layer of B")
    for i, (name, value, place) in enumerate(zip(layers_a, values.tolist(), places.tolist(), strict=True)):
        if value == -torch.inf:
            why = "none is told from chance" if bool(score.values[i].isfinite().any()) else "–"
            lines.append(f"{name:<{wide}}  {'–':>6}  {why}")
            continue
        error = "" if score.stderr is None else f" ± {fixed(score.stderr[i, place], 4)}"
        lines.append(f"{name:<{wide}}  {fixed(value, 4):>6}{error}  {layers_b[place]}")
    lines += [f"left out: {printable(name)} {printable(why)}" for name, why in comparison.skipped.items()]
    return "\n".join(lines)
