"""``python -m pyrepr.benchmarks.gpu.pack FOLDER``: all that a machine with a GPU and no network needs to check kernels.

Into FOLDER go a wheel of this clone with CUDA kernels for that machine's Python and GPU; flash-linear-attention's
kernels (``fla_core``) as the peer of the delta rule; NVIDIA's newest assembler, since those that come with Triton are
known to make wrong code of such kernels; and Triton's cache of all kernels by its own assembler and by that one, for
which the Python here needs that machine's PyTorch and Triton. Then the sizes are checked and the two commands printed
that use it: the check, and the search for launch configurations with what time is left.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PARTS = ("wheel", "peer", "ptxas", "cache")
PEER = ("fla-core>=0.4", "einops")  # the kernels, and what they import beside PyTorch and Triton
ASSEMBLER = "nvidia-cuda-nvcc>=13.1"
MEBIBYTE = 1 << 20


class Failed(RuntimeError):
    """A part that could not be made, in one sentence."""


def root() -> Path:
    """The clone that the package is imported from."""
    import pyrepr

    found = Path(pyrepr.__file__).resolve().parents[1]
    if not (found / "setup.py").exists():
        raise Failed(
            f"pack builds a wheel of a clone, and pyrepr was imported from {found}; install with `pip install -e .`"
        )
    return found


def _run(command: Sequence[str], **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise Failed(f"{shlex.join(command[:4])} … ended with {done.returncode}: {last[0]}")
    return done.stdout


def _pip(python: str, *arguments: str, **environment: str) -> None:
    _run([python, "-m", "pip", "--disable-pip-version-check", *arguments], **environment)


def wheel(folder: Path, python: str, architectures: str) -> None:
    """A wheel of the clone with CUDA kernels, for `python`."""
    for old in folder.glob("pyrepr_kernels-*.whl"):
        old.unlink()
    _pip(
        python,
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(folder),
        str(root()),
        PYREPR_CUDA="1",
        PYREPR_CUDA_ARCHS=architectures,
    )


def peer(folder: Path, python: str) -> None:
    """The peer's wheels, which are pure Python."""
    for old in (*folder.glob("fla_core-*.whl"), *folder.glob("einops-*.whl")):
        old.unlink()
    _pip(python, "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), *PEER)


def ptxas(folder: Path, python: str) -> None:
    """ptxas.xz, out of NVIDIA's wheel of the compiler."""
    with tempfile.TemporaryDirectory() as download:
        platform = ("--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64")
        _pip(python, "download", "-q", "--no-deps", "--only-binary", ":all:", *platform, "-d", download, ASSEMBLER)
        (found,) = Path(download).glob("*.whl")
        extract(found, folder / "ptxas.xz")


def extract(archive: Path, to: Path) -> None:
    """The member bin/ptxas of a wheel, packed again by itself."""
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.endswith("bin/ptxas")]
        if len(names) != 1:
            raise Failed(f"{archive.name} must hold one bin/ptxas, got {len(names)}")
        temporary = to.with_suffix(".part")
        with file.open(names[0]) as source, lzma.open(temporary, "wb", preset=6) as target:
            shutil.copyfileobj(source, target)
        temporary.replace(to)


def cache(folder: Path, python: str, architectures: str) -> None:
    """cache.tar.xz: what Triton makes of the wheel's kernels, by its own assembler and by the one in the folder."""
    wheels = list(folder.glob("pyrepr_kernels-*.whl"))
    if len(wheels) != 1:
        raise Failed(f"the cache is made by the wheel, of which {folder} must hold one, got {len(wheels)}")
    archive = folder.resolve() / "cache.tar.xz"
    archive.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        site, assembler = Path(temporary, "site"), Path(temporary, "ptxas")
        _pip(python, "install", "-q", "--no-deps", "--target", str(site), str(wheels[0]))
        paths = [""]
        if (folder / "ptxas.xz").exists():
            assembler.write_bytes(lzma.decompress((folder / "ptxas.xz").read_bytes()))
            assembler.chmod(0o755)
            paths.append(str(assembler))
        program = os.path.abspath(shutil.which(python) or python)
        command = [program, "-m", "pyrepr.benchmarks.gpu.cache", "make", str(archive)]
        command += ["--architectures", *re.findall(r"\d+", architectures), "--ptxas", *paths]
        # Many kernels can fail: what it says is shown as it comes. Not in the clone, which hides what was installed.
        environment = {**os.environ, "PYTHONPATH": str(site)}
        if subprocess.run(command, cwd=temporary, env=environment, check=False).returncode:
            partly = f"some kernels do not compile; {archive.name} has the rest" if archive.exists() else "it failed"
            raise Failed(f"{partly}, as is said above")


def checked_sizes(folder: Path, limit: float) -> list[str]:
    """A line a file; Failed if together they are above `limit` MiB."""
    sizes = {path.name: path.stat().st_size / MEBIBYTE for path in sorted(folder.iterdir()) if path.is_file()}
    total = sum(sizes.values())
    if total > limit:
        raise Failed(f"{folder} holds {total:.1f} MiB, more than the {limit:g} that may travel; leave a part out")
    return [f"{size:6.1f} MiB  {name}" for name, size in sizes.items()]


def commands(folder: str, seconds: float) -> list[str]:
    """For a shell in the clone's root on that machine, with an empty folder named by OUT."""
    unpack = "import lzma; open('$D/ptxas', 'wb').write(lzma.open('$F/ptxas.xz').read())"
    ready = (
        f"set -e; export F=$PWD/{shlex.quote(folder)} D=$(mktemp -d); "
        'python3 -m pip install -q --no-index --no-deps --target "$D/site" "$F"/*.whl; '
        f'if [ -e "$F/ptxas.xz" ]; then python3 -c "{unpack}"; chmod +x "$D/ptxas"; P="$D/ptxas"; fi; cd "$D"; '
        'export PYTHONPATH="$D/site" TRITON_CACHE_DIR="$D/cache"; if [ -e "$F/cache.tar.xz" ]; then '
        'python3 -m pyrepr.benchmarks.gpu.cache lay "$F/cache.tar.xz" "$D/cache"; fi; '
    )
    run = 'python3 -m pyrepr.gpu_check --out "$OUT"'
    return [
        f'{ready}{run} --seconds {seconds:.0f} ${{P:+--ptxas "$P"}}',
        f'{ready}if [ "$P" ]; then export TRITON_PTXAS_PATH="$P"; fi; {run} --autotune --seconds {seconds * 0.4:.0f}',
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """0: packed; 1: a part failed, or a kernel of the cache; which is said, and all else is there."""
    parser = argparse.ArgumentParser(prog="python -m pyrepr.benchmarks.gpu.pack", description=__doc__)
    parser.add_argument("folder", type=Path, help="in the clone, whose root this runs in, where git ignores it: .gpu")
    parser.add_argument("--python", default="python3.12", help="of the version there (default python3.12)")
    parser.add_argument("--architectures", default="90a-real", help="PYREPR_CUDA_ARCHS (default 90a-real: H100, H200)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--limit", type=float, default=48, help="MiB that may travel beside the clone (default 48)")
    parser.add_argument("--seconds", type=float, default=560, help="of a call there (default 560)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    make = {
        "wheel": lambda: wheel(args.folder, args.python, args.architectures),
        "peer": lambda: peer(args.folder, args.python),
        "ptxas": lambda: ptxas(args.folder, args.python),
        "cache": lambda: cache(args.folder, args.python, args.architectures),
    }
    failures = []
    for part in args.parts:
        print(f"pack: {part}", flush=True)
        try:
            make[part]()
        except (Failed, OSError) as failure:
            failures.append(f"pack: {part}: {failure}")
    try:
        print("\n".join(checked_sizes(args.folder, args.limit)))
        print("\n".join(["", *commands(os.path.relpath(args.folder), args.seconds)]))
    except Failed as failure:
        failures.append(f"pack: {failure}")
    print("\n".join(failures), file=sys.stderr if failures else sys.stdout)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
