"""What test_faults.py starts: every family with less and less memory left, in this process; prints what went wrong.

A call gives the right number or an error that says memory, and the next call with memory enough is right again.
Started with MALLOC_MMAP_THRESHOLD_ set: what an earlier call gave back then is not at hand for the next, so that every
family meets the limit, whatever the machine.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable

import torch

import pyrepr

ROOM = (0, 1 << 18, 1 << 20, 4 << 20, 12 << 20, 32 << 20, 128 << 20)  # bytes that may still be mapped


def calls() -> dict[str, Callable[[], object]]:
    """Large enough to need scratch memory of their own."""
    torch.manual_seed(0)
    x, y = torch.randn(700, 300), torch.randn(700, 200)
    q, k = (torch.nn.functional.normalize(torch.randn(1, 512, 4, 64), dim=-1) for _ in range(2))
    v, beta, g = torch.randn(1, 512, 4, 64), torch.rand(1, 512, 4), -torch.rand(1, 512, 4)
    z, tables = torch.randn(600, 128), torch.randn(16, 256, 256)
    tokens, taps = torch.randn(2, 256, 800), torch.randn(256, 4)
    stream = pyrepr.StreamingCKA()
    stream.update([x[:400], y[:400]])

    def trained() -> object:
        a, b = x.clone().requires_grad_(), tables.clone().requires_grad_()
        (pyrepr.cka(a, y) + pyrepr.lookup_linear(z, b).square().mean()).backward()
        return a.grad, b.grad

    def streamed() -> object:
        before = stream.compute()
        try:
            stream.update([x[400:], y[400:]])
        except (MemoryError, RuntimeError):
            assert torch.equal(stream.compute(), before), "a stream was changed by an update that failed"
            raise
        after = stream.compute()
        stream.load_state_dict(saved)
        return after

    saved = stream.state_dict()
    return {
        "cka": lambda: pyrepr.cka(x, y),
        "cka rbf": lambda: pyrepr.cka(x, y, kernel="rbf"),
        "gram": lambda: pyrepr.gram(x, kernel="laplacian"),
        "cka_matrix": lambda: pyrepr.cka_matrix([x, y, x], kernel="cosine"),
        "delta rule": lambda: pyrepr.chunk_gated_delta_rule(q, k, v, g, beta),
        "convolution": lambda: pyrepr.causal_conv1d_fn(tokens, taps, activation="silu"),
        "lookup": lambda: pyrepr.lookup_linear(z, tables),
        "segment_sum": lambda: pyrepr.segment_sum(x, torch.arange(700) % 50, 50),
        "gradients": trained,
        "stream": streamed,
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or bool((a - b).abs().max() <= 1e-5 * b.abs().max())
    return a is b or (isinstance(a, tuple) and all(same(p, q) for p, q in zip(a, b, strict=True)))


def mapped() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def main() -> None:
    faults, stopped, trouble = 0, 0, []
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    for name, call in calls().items():
        truth, refused = call(), 0
        for room in ROOM:
            resource.setrlimit(resource.RLIMIT_AS, (mapped() + room, hard))
            what = None
            try:
                found = call()
            except (MemoryError, RuntimeError) as error:
                found, refused = None, refused + 1
                if not any(word in str(error).lower() for word in ("memory", "alloc")) and not isinstance(
                    error, MemoryError
                ):
                    what = f"{type(error).__name__}: {error}"
            except Exception as error:
                found, what = None, f"{type(error).__name__}: {error}"
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            faults += 1
            if found is not None and not same(found, truth):
                what = "other numbers"
            if what or not same(call(), truth):
                trouble.append(f"{name} with {room} bytes: {what or 'other numbers afterwards'}")
        stopped += refused
        if not refused:
            trouble.append(f"{name}: the limits were too large to be noticed")
    sys.stdout.write(json.dumps({"faults": faults, "stopped": stopped, "trouble": trouble[:5]}))


if __name__ == "__main__":
    main()
