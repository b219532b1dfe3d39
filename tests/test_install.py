"""An install is native, or says so: what is refused, with which words, and what is said without compiled code.

Those marked `build` run CMake and compilers; they need setuptools, cmake, ninja and pybind11 in this environment, and
are run by `pytest -m build tests/test_install.py`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import pyrepr
from pyrepr import _C, _install

CLONE = Path(__file__).parents[1]
OP = "import torch, pyrepr; x = torch.arange(80.).reshape(20, 4).sin(); print(pyrepr.cka(x, x[:, :3].abs()).item())"
COMMANDS = ("apt install", "dnf install", "macOS with", "conda install", "PYREPR_NATIVE=0")


def python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYREPR_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**kept, **environment}, text=True, capture_output=True, check=False
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


# Running


def test_an_unknown_level_is_a_value_error_that_lists_the_levels(tmp_path):
    result = python(OP, cwd=tmp_path, PYREPR_SIMD="sse9")
    expected = "ValueError: PYREPR_SIMD must be one of baseline, avx2, avx512, avx512_bf16, amx, got 'sse9'"
    assert last_line(result) == expected
    table = python("import pyrepr; print(pyrepr.backends())", cwd=tmp_path, PYREPR_SIMD="sse9")
    assert "cpu        unavailable  PYREPR_SIMD must be one of" in table.stdout, table.stderr
    assert (
        python("import torch, pyrepr; pyrepr.use_backend('reference')", cwd=tmp_path, PYREPR_SIMD="x").returncode == 0
    )


def test_a_level_that_this_machine_or_build_lacks_is_a_runtime_error(tmp_path):
    """tests/native/check_kernels.cpp asks for one under emulation; here, for all that are missing."""
    for level in {"baseline", "avx2", "avx512", "avx512_bf16", "amx"} - set(_C.simd_levels()):
        error = last_line(python(OP, cwd=tmp_path, PYREPR_SIMD=level))
        assert error.startswith(f"RuntimeError: PYREPR_SIMD asks for {level}, which this")
        assert f"it must be one of {', '.join(_C.simd_levels())} here" in error


def test_the_reference_alone_is_said_once_with_reason_and_remedy(tmp_path):
    code = OP + "; pyrepr.gram(torch.eye(4)); print(pyrepr.backends()['cpu'])"
    result = python(code, cwd=tmp_path, PYREPR_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[0]) == pytest.approx(float(python(OP, cwd=tmp_path).stdout), abs=1e-5)
    warning = (
        "pyrepr runs on its reference in plain PyTorch, several times slower than compiled code: PYREPR_NATIVE=0 is"
    )
    assert result.stderr.count("UserWarning") == 1 and result.stderr.count(warning) == 1, result.stderr
    assert "to change that, unset PYREPR_NATIVE" in result.stderr
    assert "unavailable  PYREPR_NATIVE=0 is set" in result.stdout


def test_asking_for_the_reference_is_no_reason_to_warn(tmp_path):
    assert python(OP, cwd=tmp_path, PYREPR_NATIVE="0", PYREPR_BACKEND="reference").stderr == ""
    assert python(OP, cwd=tmp_path).stderr == ""


def test_a_switch_that_has_no_meaning_is_refused(tmp_path):
    assert (
        last_line(python(OP, cwd=tmp_path, PYREPR_NATIVE="no")) == "ValueError: PYREPR_NATIVE must be 0 or 1, got 'no'"
    )


@pytest.fixture
def clone(tmp_path):
    """The sources in a folder of their own, with spaces and letters in its name, without a module."""
    folder = tmp_path / "größe und mehr"
    for name in ("csrc", "pyrepr"):
        shutil.copytree(
            CLONE / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info*")
        )
    shutil.copy(CLONE / "setup.py", folder)
    return folder


def module_in(folder: Path) -> Path:
    return folder / "pyrepr" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_sources_without_a_module_are_refused(clone):
    error = last_line(python("import pyrepr", cwd=clone))
    assert error.startswith(f"ImportError: pyrepr was imported from {clone}, a folder of sources in which nothing is")
    assert f"pip install --no-deps -e '{clone}'" in error and "PYREPR_NATIVE=0" in error
    alone = python(OP, cwd=clone, PYREPR_NATIVE="0")
    assert alone.returncode == 0 and f"run pip install --no-deps -e '{clone}'" in alone.stderr, alone.stderr


def test_a_module_for_another_python_is_named(clone):
    (clone / "pyrepr/_C.cpython-39-x86_64-linux-gnu.so").touch()
    error = last_line(python("import pyrepr", cwd=clone))
    assert "compiled code for another Python (_C.cpython-39-x86_64-linux-gnu.so): install it for this one" in error


def test_a_module_that_does_not_load_is_an_error(clone):
    module_in(clone).write_bytes(b"no library")
    error = last_line(python(OP, cwd=clone))
    assert error.startswith("ImportError: pyrepr._C cannot be loaded (") and "build it again with pip install" in error


def test_a_module_of_other_sources_is_an_error_with_the_command(clone):
    shutil.copy(_C.__file__, module_in(clone))
    assert python(OP, cwd=clone).returncode == 0, python(OP, cwd=clone).stderr
    with (clone / "csrc/cpu/gram.cpp").open("a") as file:
        file.write("// faster\n")
    table = python("import pyrepr; print(pyrepr.backends())", cwd=clone).stdout
    assert f"; csrc has changed since it was built: pip install --no-deps -e '{clone}'" in table
    version, bindings = clone / "pyrepr/_version.py", clone / "csrc/bindings/gram.cpp"
    for path in (version, bindings):
        text = path.read_text()
        path.write_text(
            text.replace(pyrepr.__version__, "0.0.1") if path == version else text + "// one more argument\n"
        )
        error = last_line(python(OP, cwd=clone))
        other = "version 0.1.0, and the Python files are of 0.0.1" if path == version else "bindings that are not those"
        assert error.startswith(f"ImportError: {module_in(clone)} was built from {other}"), error
        assert f"build it again with pip install --no-deps -e '{clone}'" in error
        path.write_text(text)


def test_cmake_and_python_hash_the_same_files(monkeypatch):
    monkeypatch.setattr(_install, "ROOT", CLONE)
    assert _C.build["interface"] == _install.hash_of("csrc/bindings/*.*", "csrc/common.h")
    assert _C.build["sources"] == _install.hash_of("csrc/*/*.*", "csrc/*.h")
    assert _C.build["version"] == pyrepr.__version__ == importlib.metadata.version("pyrepr-kernels")


def test_the_command_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "pyrepr", "--version"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True)
    assert result.stdout == f"pyrepr {pyrepr.__version__}\n"


def test_one_openmp_library_is_mapped(tmp_path):
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list what a process has mapped")
    code = OP + "; print(open('/proc/self/maps').read())"
    maps = python(code, cwd=tmp_path).stdout
    assert len(set(re.findall(r"/\S*lib(?:gomp|iomp|omp)[^/\s]*\.so\S*", maps))) == 1


def test_readme_lists_every_variable():
    """Those that users may set; what tests and the build set for themselves is not theirs."""
    pattern = re.compile(r"""(?:environ(?:\.get)?[\[(]|getenv\(|switch\(|setenv\(|getenv\()["'](PYREPR_[A-Z_]+)""")
    found = set()
    for folder in ("pyrepr", "kernels", "benchmarks", "csrc", "tests"):
        for path in (CLONE / folder).rglob("*.*"):
            if path.suffix in (".py", ".cpp", ".h") and path != Path(__file__):
                found |= set(pattern.findall(path.read_text(encoding="utf-8")))
    found |= set(pattern.findall((CLONE / "setup.py").read_text()))
    names = re.findall(r"^\| (`PYREPR_[^|]*)\|", (CLONE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name for cell in names for name in re.findall(r"PYREPR_[A-Z_]+", cell)}
    assert found and listed == found


# Building: the words


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("pyrepr_setup", CLONE / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_setuptools_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup.setuptools, "__version__", "68.1.2")
    with pytest.raises(
        SystemExit, match=r"needs setuptools 77 or newer, and this is 68\.1\.2: pip install -U setuptools"
    ):
        setup.main()


def test_a_folder_that_cannot_be_written_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="cannot be written, and a build puts its files there: copy it"):
        setup.main()


def test_how_many_compilers_run(setup, monkeypatch):
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    assert int(setup.jobs()[1]) >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.jobs() == ["--parallel", "3"]
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "5")
    assert setup.jobs() == ["--parallel", "5"]
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "many")
    with pytest.raises(SystemExit, match="CMAKE_BUILD_PARALLEL_LEVEL must be a positive number, got 'many'"):
        setup.jobs()


def test_what_a_failed_compilation_says(setup):
    output = "[3/9] Building\ngram.cpp:7:3: error: expected ';'\n  7 | int x\nninja: build stopped"
    assert setup.what_failed("compiling", output).startswith("compiling failed: gram.cpp:7:3: error: expected ';'")
    killed = setup.what_failed("compiling", "c++: fatal error: Killed signal terminated program cc1plus")
    assert killed.endswith("; with MAX_JOBS=1 it takes less memory")
    headers = setup.what_failed("configuring", "Could NOT find Python (missing: Development.Module)")
    assert "the headers of this Python are missing. Debian and Ubuntu bring it with apt install python3-dev" in headers


# Building


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYREPR_", "CMAKE_", "CXX", "CC"))}
    environment = {"PYREPR_CUDA": "0", **environment}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=folder, env={**kept, **environment}, text=True, capture_output=True, check=False)


def write_compiler(folder: Path, *unknown: str) -> str:
    """A g++ that does not know some flags."""
    path = folder / "some-g++"
    refuse = "".join(
        f'case " $* " in *" {flag} "*) echo "error: unrecognized option {flag}" >&2; exit 1;; esac\n'
        for flag in unknown
    )
    path.write_text(f'#!/bin/sh\n{refuse}exec g++ "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def sources(clone):
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(CLONE / name, clone)
    for name in ("kernels", "benchmarks", "examples/papers"):
        shutil.copytree(CLONE / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    return clone


@pytest.mark.build
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PATH": "{tools}"}, "there is no C++ compiler. Debian and Ubuntu bring it with apt install g++"),
        ({"CXX": "/bin/false"}, "the C++ compiler /bin/false (from CXX) cannot make a program."),
        ({"CXX": "no-such-g++"}, "the C++ compiler no-such-g++ (from CXX) is not there."),
        ({"CXX": "{without_openmp}"}, "has no OpenMP. Debian and Ubuntu bring it with apt install g++ (or libomp-dev"),
        ({"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=/bin/false"}, "the C++ compiler that was found cannot make a program."),
        ({"CXXFLAGS": "-no-such-flag"}, "the C++ compiler that was found cannot make a program."),
    ],
)
def test_a_build_that_cannot_be_ends_with_what_is_missing(sources, environment, said, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        (tools / name).symlink_to(shutil.which(name))
    values = {"tools": tools, "without_openmp": write_compiler(tmp_path, "-fopenmp")}
    environment = {key: value.format(**values) for key, value in environment.items()}
    result = run_setup(sources, "bdist_wheel", **environment)
    assert result.returncode == 1
    last = last_line(result)
    assert last.startswith("pyrepr was not built: ") and said in last, last
    assert all(command in last for command in COMMANDS), last
    assert not list(sources.glob("dist/*"))


@pytest.mark.build
def test_nothing_is_installed_by_a_build_that_fails(sources, tmp_path):
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        ".",
    ]
    environment = {**os.environ, "CXX": "/bin/false"}
    result = subprocess.run(command, cwd=sources, env=environment, text=True, capture_output=True, check=False)
    assert result.returncode and "pyrepr was not built: the C++ compiler /bin/false" in result.stdout + result.stderr
    assert not list(target.rglob("*")) and not list(sources.glob("pyrepr/_C*"))


@pytest.mark.build
def test_cuda_that_is_insisted_on_and_cannot_be(sources, tmp_path):
    for name in ("cmake", "ninja"):
        (tmp_path / name).symlink_to(shutil.which(name))
    result = run_setup(sources, "build_ext", PYREPR_CUDA="1", PATH=str(tmp_path))
    assert last_line(result).endswith(
        "PYREPR_CUDA=1 asks for CUDA kernels, and there is no nvcc on the path (or in CUDACXX)."
    )
    assert last_line(run_setup(sources, "build_ext", PYREPR_CUDA="yes")).endswith(
        "PYREPR_CUDA must be 0 or 1, got 'yes'."
    )


@pytest.mark.build
def test_the_reference_alone_is_a_pure_wheel_that_says_so(sources, tmp_path):
    result = run_setup(sources, "bdist_wheel", PYREPR_NATIVE="0", PATH="/nowhere")
    (wheel,) = (sources / "dist").iterdir()
    assert wheel.name == f"pyrepr_kernels-{pyrepr.__version__}-py3-none-any.whl", result.stderr
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = python(OP, cwd=tmp_path / "site")
    assert done.returncode == 0 and done.stderr.count("it was built with PYREPR_NATIVE=0; to change that, run pip") == 1
    error = last_line(python(OP, cwd=tmp_path / "site", PYREPR_NATIVE="1"))
    assert "ImportError" in error and "holds no compiled code: install it again" in error
    packages = {path.parent.relative_to(CLONE).as_posix() for path in CLONE.glob("pyrepr/**/__init__.py")}
    packages |= {
        f"pyrepr/{path.parent.relative_to((CLONE / f).parent)}"
        for f in ("kernels", "benchmarks", "examples/papers")
        for path in (CLONE / f).rglob("__init__.py")
    }
    installed = {
        path.parent.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("__init__.py")
    }
    assert installed == packages


def configure(folder: Path, *arguments: str, **environment: str) -> tuple[str, str]:
    """The levels and the module's own account of itself, as CMake would build it."""
    import pybind11

    build = folder.parent / "configured"
    command = ["cmake", "-S", str(folder), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *arguments]
    result = subprocess.run(command, env={**os.environ, **environment}, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return (build / "build.ninja").read_text(), (build / "build.cpp").read_text()


@pytest.mark.build
@pytest.mark.skipif("avx2" not in _C.simd_levels(supported=False), reason="levels are x86's")
def test_a_level_that_the_compiler_does_not_know_is_left_out_and_the_others_stay(sources, tmp_path):
    rules, account = configure(sources, CXX=write_compiler(tmp_path, "-mavx512bf16"))
    assert "lookup_avx512.dir" in rules and "lookup_avx512_bf16.dir" not in rules
    assert "PYREPR_BUILT_avx512" in rules and "PYREPR_BUILT_avx512_bf16" not in rules
    assert '"avx512_bf16 amx"' in account


def test_levels_left_out_are_named(monkeypatch):
    from pyrepr import backend

    class Module:
        build = {**_C.build, "left_out": "avx512 avx512_bf16", "compiler": "GNU 9.4.0"}  # noqa: RUF012
        simd_level = staticmethod(lambda: "avx2")
        simd_levels = staticmethod(lambda: ["baseline", "avx2"])

    monkeypatch.setattr(backend, "native", lambda: (Module, ""))
    detail = backend._cpu.__wrapped__()[1]
    assert detail.endswith("(this machine can run: baseline, avx2; GNU 9.4.0 could not make: avx512, avx512_bf16)")


@pytest.mark.build
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here")
@pytest.mark.parametrize(
    ("present", "asked", "made"),
    [("9.0\n9.0\n8.6", "", "90a-real 86-real"), ("7.5", "", "80 90a-real 100-real"), ("9.0", "89-real", "89-real")],
)
def test_cuda_kernels_are_for_the_gpus_that_are_present_or_asked_for(sources, tmp_path, present, asked, made):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{present}'\n")
    tool.chmod(0o755)
    path = os.pathsep.join([str(tool.parent), os.environ["PATH"]])
    _, account = configure(sources, "-DPYREPR_CUDA=ON", f"-DPYREPR_CUDA_ARCHS={asked}", PATH=path)
    assert f'"{made}"' in account


def test_which_gpus_code_runs_on():
    from pyrepr.backend import _runs_on

    for architecture, runs in {
        "80": {(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)},
        "80-real": {(8, 0), (8, 6)},
        "86-real": {(8, 6)},
        "90a-real": {(9, 0)},
        "100f-real": {(10, 0), (10, 3)},
        "90-virtual": {(9, 0), (10, 0), (10, 3), (12, 0)},
    }.items():
        devices = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)]
        expected = runs | ({(10, 3)} if architecture == "80" else set())
        assert {device for device in devices if _runs_on(architecture, *device)} == expected
