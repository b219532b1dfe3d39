"""Which implementation runs, how one is forced, and what is said when it cannot."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys

import pytest
import torch

import pyrepr
from pyrepr import backend


def run(code, **environment):
    """Runs code in a fresh interpreter; returns (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, env={**os.environ, **environment}, check=False
    )
    return result.returncode, result.stdout, result.stderr


def test_table_lists_every_backend_with_a_reason():
    table = pyrepr.backends()
    assert list(table) == ["reference", "cpu", "triton", "cuda"]
    assert table["reference"].available and table["cpu"].available
    assert "SIMD level" in table["cpu"].detail
    assert all(b.detail for b in table.values())
    assert str(table).count("\n") == 3


def test_forcing_a_backend_is_scoped_and_nests():
    assert backend.forced_backend() is None
    with pyrepr.use_backend("reference"):
        with pyrepr.use_backend("cpu"):
            assert backend.forced_backend() == "cpu"
        assert backend.forced_backend() == "reference"
    assert backend.forced_backend() is None


def test_a_backward_in_another_thread_takes_what_was_forced():
    """That of CUDA tensors always runs in another; on the CPU, the innermost of many nested ones does."""
    code = """
import os, threading, torch, pyrepr
from pyrepr import backend

class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
        else:
            here = threading.get_ident() == threading.main_thread().ident
            print(here, backend._forced.get(), backend.forced_backend())
        return grad, None

with pyrepr.use_backend("cpu"):
    with pyrepr.use_backend("reference"):
        Nested.apply(torch.ones(1, requires_grad=True), 70).backward()
    Nested.apply(torch.ones(1, requires_grad=True), 70).backward()
Nested.apply(torch.ones(1, requires_grad=True), 70).backward()
print(backend.forced_backend(), flush=True)
os._exit(0)
"""
    status, out, error = run(code)
    assert status == 0, error
    assert out.splitlines() == ["False None reference", "False None cpu", "False None None", "None"]


def test_forcing_what_is_not_there_is_an_error():
    with (
        pytest.raises(ValueError, match="must be one of reference, cpu, triton, cuda, got 'gpu'"),
        pyrepr.use_backend("gpu"),
    ):
        pass
    with pytest.raises(RuntimeError, match="'triton', which is unavailable"), pyrepr.use_backend("triton"):
        pass
    implementations = {"reference": None, "cpu": None}
    with (
        pyrepr.use_backend("cpu"),
        pytest.raises(RuntimeError, match="runs on cpu tensors, but op was given cuda tensors"),
    ):
        backend.choose("op", implementations, "cuda")
    with pyrepr.use_backend("cpu"), pytest.raises(RuntimeError, match="op has no implementation in backend 'cpu'"):
        backend.choose("op", {"reference": None}, "cpu")


def test_environment_variable_forces_and_is_checked():
    code = "import torch, pyrepr; print(pyrepr.cka(torch.eye(5), torch.eye(5)).item())"
    assert run(code, PYREPR_BACKEND="reference")[0] == 0
    status, _, error = run(code, PYREPR_BACKEND="fast")
    assert status and "PYREPR_BACKEND must be one of reference, cpu, triton, cuda, got 'fast'" in error


def test_without_a_native_module_everything_works_on_the_reference():
    code = """
import torch, pyrepr
assert not pyrepr.backends()["cpu"].available, pyrepr.backends()
x = torch.randn(20, 4, requires_grad=True)
pyrepr.cka(x, torch.randn(20, 3), kernel="rbf").backward()
try:
    pyrepr.use_backend("cpu").__enter__()
except RuntimeError as error:
    print(error)
"""
    status, out, error = run(code, PYREPR_NATIVE="0")
    assert status == 0, error
    assert "backend 'cpu', which is unavailable: PYREPR_NATIVE=0 is set" in out


def test_import_costs_little_beside_torch():
    code = """
import time
start = time.process_time()
import torch
between = time.process_time()
import pyrepr
print((time.process_time() - between) / (between - start))
"""
    share = min(float(run(code, PYTHONDONTWRITEBYTECODE="")[1]) for _ in range(4))
    assert share < 0.15, share  # 0.10 to 0.13 on a busy machine, once compiled to bytecode
    assert not torch.cuda.is_initialized()


def test_unsupported_arguments_go_to_the_next_implementation_unless_one_is_forced():
    from pyrepr.ops._leaf import leaf_op

    def narrow(x):
        if x.dtype == torch.float64:
            raise backend.Unsupported("backend 'cpu' computes float32 only, got torch.float64")
        return x + 1

    op = leaf_op("only_for_a_test(Tensor x) -> Tensor", fake=torch.empty_like, reference=lambda x: x + 2, cpu=narrow)
    assert op(torch.zeros(1)) == 1
    assert op(torch.zeros(1).double()) == 2
    with pyrepr.use_backend("cpu"), pytest.raises(RuntimeError, match=r"float32 only, got torch\.float64"):
        op(torch.zeros(1).double())


@pytest.mark.parametrize(
    ("found", "cuda", "capability", "said"),
    [
        (None, None, None, "triton is not installed"),
        (True, None, None, "is installed; PyTorch was built without CUDA"),
        (True, "13.0", None, "is installed; PyTorch sees no CUDA device"),
        (True, "13.0", (7, 5), "the kernels need sm_80 or newer, Some GPU is sm_75"),
        (True, "13.0", (9, 0), "device Some GPU (sm_90)"),
    ],
)
def test_why_triton_can_or_cannot_run(monkeypatch, found, cuda, capability, said):
    spec = importlib.machinery.ModuleSpec("triton", None) if found else None
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(backend.importlib.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    available, detail = backend._triton()
    assert said in detail and available == (capability == (9, 0))


def test_an_assembler_in_doubt_is_named(monkeypatch, tmp_path):
    from pyrepr import _ptxas

    def assembler(version):
        path = tmp_path / "ptxas"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
        path.chmod(0o755)
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(path))
        _ptxas.in_use.cache_clear()

    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(_ptxas, "bundled", lambda: None)
    _ptxas.in_use.cache_clear()
    assert _ptxas.doubted(9).startswith("ptxas of unknown version is known for wrong code on sm_90")  # there is none
    assembler("12.8.93")
    assert _ptxas.version_of(str(tmp_path / "ptxas")) == (12, 8, 93) and _ptxas.version_of("/none") == ()
    assert _ptxas.doubted(9).startswith("ptxas 12.8.93 is known for wrong code on sm_90; set TRITON_PTXAS_PATH")
    assert _ptxas.doubted(8) is None and _ptxas.doubted(10) is None
    for name, version in (("available", (9, 0)), ("get_device_name", "H200")):
        monkeypatch.setattr(torch.cuda, {"available": "is_available"}.get(name, name), lambda *_, v=version: v)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(pyrepr.backend, "_INTERPRETED", False)
    assert "without the delta rule's backward: ptxas 12.8.93" in pyrepr.backends()["triton"].detail
    monkeypatch.setenv("PYREPR_ANY_PTXAS", "1")
    assert _ptxas.doubted(9) is None
    monkeypatch.delenv("PYREPR_ANY_PTXAS")
    monkeypatch.setattr(_ptxas, "PROVEN", ((12, 8, 93),))
    assert _ptxas.doubted(9) is None
    assembler("13.1.80")
    assert _ptxas.doubted(9) is None
    _ptxas.in_use.cache_clear()
