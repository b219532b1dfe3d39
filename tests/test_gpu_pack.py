"""What travels to a machine with a GPU: no larger than allowed, in commands that a shell can read."""

from __future__ import annotations

import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pyrepr.benchmarks.gpu import cache, pack

from pyrepr import _ptxas


def archive(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"\x7fELF" + b"assembler" * 1000)
    return path


def test_an_assembler_comes_out_of_a_wheel_as_it_is(tmp_path):
    wheel = archive(tmp_path / "nvcc.whl", "nvidia/cu13/bin/ptxas", "nvidia/cu13/bin/nvcc", "nvidia/cu13/nvvm/notptxas")
    pack.extract(wheel, tmp_path / "ptxas.xz")
    assert lzma.decompress((tmp_path / "ptxas.xz").read_bytes()) == b"\x7fELF" + b"assembler" * 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvcc.whl", "ptxas.xz"]


@pytest.mark.parametrize("names", [(), ("a/bin/ptxas", "b/bin/ptxas")])
def test_a_wheel_without_one_assembler_leaves_nothing(names, tmp_path):
    with pytest.raises(pack.Failed, match=f"nvcc.whl must hold one bin/ptxas, got {len(names)}"):
        pack.extract(archive(tmp_path / "nvcc.whl", *names), tmp_path / "ptxas.xz")
    assert [path.name for path in tmp_path.iterdir()] == ["nvcc.whl"]


def test_what_is_too_large_is_said(tmp_path):
    (tmp_path / "a.whl").write_bytes(bytes(3 << 20))
    assert pack.checked_sizes(tmp_path, 3) == ["   3.0 MiB  a.whl"]
    with pytest.raises(pack.Failed, match=r"holds 3.0 MiB, more than the 2.5 that may travel"):
        pack.checked_sizes(tmp_path, 2.5)


def test_the_commands_unpack_and_run(tmp_path):
    """The first one with a pip and a check that only say how they were called."""
    folder, called = tmp_path / "some parts", tmp_path / "called"
    folder.mkdir()
    archive(tmp_path / "nvcc.whl", "bin/ptxas")
    pack.extract(tmp_path / "nvcc.whl", folder / "ptxas.xz")
    (folder / "pyrepr_kernels-0-py3-none-any.whl").touch()
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$PYTHONPATH" "$@" >> {called}\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    environment["TMPDIR"] = str(tmp_path)
    environment.pop("PYTHONPATH", None)
    for command in pack.commands("some parts", 560):
        assert len(command) < 2000
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    install, check, _, tune = called.read_text().splitlines()
    site = Path(check.split()[0])
    ptxas = site.parent / "ptxas"
    assert install.endswith(f"--target {site} {folder}/pyrepr_kernels-0-py3-none-any.whl")
    assert ptxas.read_bytes().startswith(b"\x7fELF") and os.access(ptxas, os.X_OK)
    assert check == f"{site} -m pyrepr.gpu_check --out {tmp_path}/out --seconds 560 --ptxas {ptxas}"
    assert tune.endswith(f" -m pyrepr.gpu_check --out {tmp_path}/out --autotune --seconds 224")


def test_a_cache_without_a_wheel_is_one_sentence(tmp_path):
    with pytest.raises(pack.Failed, match=r"the cache is made by the wheel, of which .* must hold one, got 0"):
        pack.cache(tmp_path, sys.executable, "90a-real")


HITS = """
import sys
from triton import knobs
from pyrepr.benchmarks.gpu import cache
hits = []
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
for capability, family, name in eval(sys.argv[1]):
    assert not cache._compile(capability, family, name)
print(hits)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: no cache to be filled")
def test_a_seeded_cache_compiles_nothing(tmp_path, monkeypatch):
    """Laid somewhere else, by another process, with the assembler at another path."""
    kernels = [(90, "gram", "squares BLOCK=128 PIECE=1024"), (90, "lookup", "hash-fp32"), (80, "lookup", "hash-fp32")]
    ptxas = tmp_path / "one" / "ptxas", tmp_path / "another" / "ptxas"
    for path in ptxas:
        path.parent.mkdir()
        shutil.copy(_ptxas.bundled(), path)
    archive, folder = tmp_path / "cache.tar.xz", tmp_path / "cache"
    assert cache.make(archive, kernels, ["", str(ptxas[0])]) == []
    assert cache.lay(archive, folder) == 3
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".cubin", ".json"}
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas[1]))
    for place, expected in ((folder, [True] * 3), (tmp_path / "empty", [False] * 3)):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(place))
        command = [sys.executable, "-c", HITS, repr(kernels)]
        found = subprocess.run(command, text=True, capture_output=True, check=True).stdout
        assert found == f"{expected}\n"


def test_what_does_not_compile_is_said(tmp_path):
    (said,) = cache.make(tmp_path / "cache.tar.xz", [(90, "gram", "no such kernel")], [""])
    assert said.startswith("sm_90 gram no such kernel: StopIteration")
    assert cache.lay(tmp_path / "cache.tar.xz", tmp_path / "cache") == 0


def ends_its_process(capability, family, name):
    os._exit(3)


def test_a_compiler_that_ends_its_process_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "_compile", ends_its_process)
    monkeypatch.setattr(cache, "every_variant", lambda capability: [(capability, "gram", "one"), (90, "gram", "two")])
    assert cache.main(["make", str(tmp_path / "cache.tar.xz")]) == 1
    said = capsys.readouterr()
    assert said.out == "cache: 0 kernels, 2 not made\n"
    assert [line[: line.index(": ")] for line in said.err.splitlines()] == ["sm_90 gram one", "sm_90 gram two"]
    assert cache.lay(tmp_path / "cache.tar.xz", tmp_path / "cache") == 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: no cache to be filled")
@pytest.mark.parametrize("names", [("hash-fp32",), ("hash-fp32", "no such kernel")])
def test_a_kernel_that_does_not_compile_fails_the_packing(names, tmp_path, monkeypatch, capfd):
    """Its cache has the others. The Python given installs nothing, and knows these kernels alone. As in a clone, there
    is another package of that name where it runs."""
    folder, python, script = tmp_path / "gpu", tmp_path / "python", tmp_path / "script.py"
    folder.mkdir()
    (folder / "pyrepr_kernels-0-py3-none-any.whl").touch()
    kernels = [(90, "lookup", name) for name in names]
    code = f"""
import sys
if sys.argv[2] == "pip":
    sys.exit()
from pyrepr.benchmarks.gpu import cache
cache.every_variant = lambda capability: {kernels!r}
sys.exit(cache.main(sys.argv[3:]))
"""
    script.write_text(code)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "$(cat {script})" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "pyrepr").mkdir()
    (tmp_path / "pyrepr" / "__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    failed = len(names) - 1
    assert pack.main(["gpu", "--python", "./python", "--parts", "cache"]) == failed
    said = capfd.readouterr()
    assert f"cache: 1 kernels, {failed} not made\n" in said.out
    assert ("pack: cache: some kernels do not compile; cache.tar.xz has the rest" in said.err) == failed
    assert ("sm_90 lookup no such kernel: StopIteration" in said.err) == failed
    assert cache.lay(folder / "cache.tar.xz", tmp_path / "cache") == 1


def test_a_part_that_fails_is_one_sentence(tmp_path, capsys):
    assert pack.main([str(tmp_path / "gpu"), "--python", str(tmp_path / "no python"), "--parts", "peer"]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("pack: peer: ") and "no python" in said
