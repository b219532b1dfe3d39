"""Run by tests/test_gpu_compile.py: what Triton would compile when a family's GPU cases are launched on an sm_90.

A driver that only names its GPU takes the place of CUDA's, and compiling ends where Triton would begin: nothing runs,
and results are whatever was in memory, so that a case may stumble over them after its launches. Fails at a launch whose
types, alignment, constants or options are not those of its variant.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

import torch
import triton
from pyrepr.kernels import _launch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import pyrepr
from pyrepr import backend

TARGET = GPUTarget("cuda", 90, 32)


class Driver:
    """As much of a driver as a launch asks before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGET


def described(source):
    """What is compiled, with what Triton finds out about the arguments' values."""
    types = {
        name: kind.replace("i1", "u1") if kind in ("i1", "*i1") else kind for name, kind in source.signature.items()
    }
    attributes = {place: found for place, found in source.attrs.items() if found}
    return source.name, types, source.constants, attributes


def main(family):
    compiled = []

    def do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled.append((triton.compiler.ASTSource(self, signature, constexprs, attrs), options))

    driver.set_active(Driver())
    JITFunction._do_compile = do_compile
    torch.cuda.device = lambda device: contextlib.nullcontext()
    backend._PROBES["triton"] = lambda: (True, "")
    leaf = sys.modules["pyrepr.ops._leaf"]
    leaf.choose = lambda name, implementations, device: [implementations.get("triton", implementations["reference"])]
    variants = importlib.import_module(f"pyrepr.kernels.{family}").variants(90)
    listed = {(variant.key, variant.aligned) for variant in variants}
    with _launch.recorded() as launched:
        for case in importlib.import_module(f"pyrepr.benchmarks.gpu.{family}").cases():
            if case.timed or "triton" not in case.backends:
                continue
            for dtype in case.tolerance:
                with contextlib.suppress(Exception):
                    case.make(torch.device("cpu"), dtype, 0).run()
    assert len(launched) == len(compiled)
    wrong = {}
    for variant, (source, options) in zip(launched, compiled, strict=True):
        expected = (
            described(_launch.source(variant)),
            make_backend(TARGET).parse_options(_launch.options(variant)),
        )
        if (variant.key, variant.aligned) not in listed:
            wrong[variant.name] = "not listed"
        elif expected[0] != described(source):
            wrong[variant.name] = f"launched as {described(source)}, compiled ahead as {expected[0]}"
        elif expected[1].hash() != options.hash():
            wrong[variant.name] = f"launched with {options}, compiled ahead with {expected[1]}"
    seen = {(variant.key, variant.aligned) for variant in launched}
    print(len(seen), "of", len(listed), "variants launched;", len(wrong), "differ")
    print(*(f"{name}: {what}" for name, what in wrong.items()), sep="\n")
    return 1 if wrong or not launched else 0


if __name__ == "__main__":
    pyrepr.backends()
    sys.exit(main(sys.argv[1]))
