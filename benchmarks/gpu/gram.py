"""GPU cases of family `gram`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyrepr.benchmarks.gpu import GpuCase, Problem, dtype_name
from pyrepr.benchmarks.gram import plain_cka_matrix
from pyrepr.benchmarks.harness import module_error, relative_error
from torch import Tensor

import pyrepr
from pyrepr.ops._gram_gradient import route_costs
from pyrepr.reference import gram as reference

KERNELS = reference.KERNELS
# Four times the worst error of the same cases in the interpreter. 16-bit features are centred and then rounded to 11
# bits (kernels/gram), which in small samples shows; of gradients the largest entry is the unit.
VALUE = {torch.float32: 2e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
LONG = {torch.float32: 5e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def layers(device: torch.device, dtype: torch.dtype, seed: int, n: int, widths: Sequence[int]) -> list[Tensor]:
    """Layers that share some of their directions, with means that are not zero."""
    generator = torch.Generator(device).manual_seed(seed)
    new = {"generator": generator, "device": device}
    shared = torch.randn(n, max(widths), **new)
    return [(shared[:, :d] + torch.randn(n, d, **new) + torch.randn(d, **new)).to(dtype) for d in widths]


def _spec(kernel: str) -> pyrepr.Kernel:
    return pyrepr.Kernel(kernel, sigma=8.0, gamma=0.02)


def _scale(kernel: str) -> float:
    return 0.02 if kernel == "polynomial" else 8.0


def _exact(xs: Sequence[Tensor], kernel: str = "linear") -> Tensor:
    """Unbiased CKA of all pairs in float64, differentiable; two kernel matrices at a time, or the products of features
    where they are smaller."""
    xs = [x.double() for x in xs]
    if kernel in reference.SHIFT_INVARIANT:
        xs = [x - x.mean(0) for x in xs]
    n = xs[0].shape[0]
    if kernel == "linear" and n > max(x.shape[1] for x in xs):
        q = torch.stack([x.square().sum(1) for x in xs])
        s = torch.stack([torch.stack([(x.T @ y).square().sum() for y in xs]) for x in xs])
        t = q.sum(1)
        hsic = s - n / (n - 2) * (q @ q.T) + torch.outer(t, t) / ((n - 1) * (n - 2))
    else:
        off = 1 - torch.eye(n, dtype=torch.float64, device=xs[0].device)
        kernels = [reference.kernel_matrix(x, x, kernel, _scale(kernel), 3, 1.0) * off for x in xs]
        rows = torch.stack([k.sum(1) for k in kernels])
        s = torch.stack([torch.stack([(k * l).sum() for l in kernels]) for k in kernels])
        total = rows.sum(1)
        hsic = s - 2 / (n - 2) * (rows @ rows.T) + torch.outer(total, total) / ((n - 1) * (n - 2))
    own = hsic.diagonal().sqrt()
    return hsic / torch.outer(own, own)


def _with_tf32(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return function()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def plain_cka_by_features(xs: Sequence[Tensor]) -> Tensor:
    """Unbiased CKA of all pairs of layers as one matrix product of all features, summed in float32. [M, M]"""
    x = torch.cat([(x.float() - x.float().mean(0)).to(x.dtype) for x in xs], 1)
    in_float32 = {"out_dtype": torch.float32} if x.is_cuda and x.dtype != torch.float32 else {}
    whole, n, widths = torch.mm(x.T, x, **in_float32).float().square(), x.shape[0], [each.shape[1] for each in xs]
    s = torch.stack([torch.stack([tile.sum() for tile in rows.split(widths, 1)]) for rows in whole.split(widths)])
    d = torch.stack([part.float().square().sum(1) for part in x.split(widths, 1)])
    totals = d.sum(1)
    hsic = s - n / (n - 2) * (d @ d.T) + torch.outer(totals, totals) / ((n - 1) * (n - 2))
    own = hsic.diagonal().sqrt()
    return hsic / torch.outer(own, own)


def _peers(xs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Centre, stack, multiply: in the layers' dtype, in float32, and with TF32; the same by features; pytorch-cka."""
    wide = [x.float() for x in xs]
    peers = {"plain torch, float32": lambda: plain_cka_matrix(wide)}
    peers["plain torch by features, float32"] = lambda: plain_cka_by_features(wide)
    if xs[0].dtype == torch.float32:
        peers["plain torch, TF32"] = _with_tf32(lambda: plain_cka_matrix(xs))
    else:
        name = dtype_name(xs[0].dtype)
        peers[f"plain torch, {name}"] = lambda: plain_cka_matrix(xs)
        peers[f"plain torch by features, {name}"] = lambda: plain_cka_by_features(xs)
    if not module_error("cka", "pytorch-cka"):
        from cka import cka_from_features

        peers["pytorch-cka"] = lambda: cka_from_features(xs, xs)
    return peers


def matrix_problem(n: int, widths: Sequence[int], kernel: str = "linear") -> Callable[..., Problem]:
    """All pairs of layers in one call."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        xs = layers(device, dtype, seed, n, widths)
        flops = 2 * (min(route_costs(n, widths)) if kernel == "linear" else route_costs(n, widths)[0])
        peers = _peers(xs) if kernel == "linear" else {}
        size = xs[0].element_size() * n * sum(widths)
        return Problem(
            lambda: pyrepr.cka_matrix(xs, kernel=_spec(kernel)), lambda: _exact(xs, kernel), peers, flops, size
        )

    return make


def pair_problem(n: int, p: int, q: int, kernel: str = "linear", masked: bool = False) -> Callable[..., Problem]:
    """One pair; `masked` leaves every third row out."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        x, y = layers(device, dtype, seed, n, (p, q))
        mask = torch.arange(n, device=device) % 3 > 0 if masked else None
        rows = slice(None) if mask is None else mask
        flops = 2 * min(route_costs(n, [p, q], 1))
        peers = {name: lambda f=f: f()[0, 1] for name, f in _peers([x, y]).items()} if kernel == "linear" else {}
        return Problem(
            lambda: pyrepr.cka(x, y, kernel=_spec(kernel), mask=mask),
            lambda: _exact([x[rows], y[rows]], kernel)[0, 1],
            peers,
            flops,
            x.element_size() * n * (p + q),
        )

    return make


def gradient_problem(n: int, p: int, q: int, kernel: str = "linear") -> Callable[..., Problem]:
    """Value and gradient of a student against a frozen guide."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        student, guide = layers(device, dtype, seed, n, (p, q))

        def step(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x), x)[0]

        def plain(dtype: torch.dtype) -> Callable[[], Tensor]:
            y = guide.to(dtype)
            return lambda: step(lambda x: plain_cka_matrix([x, y])[0, 1], student.to(dtype))

        peers = {"plain torch, float32": plain(torch.float32)}
        if dtype == torch.float32:
            peers["plain torch, TF32"] = _with_tf32(plain(dtype))
        else:
            peers[f"plain torch, {str(dtype).removeprefix('torch.')}"] = plain(dtype)
        return Problem(
            lambda: step(lambda x: pyrepr.cka(x, guide, kernel=_spec(kernel)), student),
            lambda: step(lambda x: _exact([x, guide], kernel)[0, 1], student.double()),
            peers if kernel == "linear" else {},
            2 * (min(route_costs(n, [p, q], 1)) + n * n * p),
        )

    return make


def gram_problem(n: int, d: int, kernel: str = "linear") -> Callable[..., Problem]:
    """A kernel matrix that is wanted whole."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        (x,) = layers(device, dtype, seed, n, (d,))
        return Problem(
            lambda: pyrepr.gram(x, kernel=_spec(kernel)),
            lambda: reference.kernel_matrix(x.double(), x.double(), kernel, _scale(kernel), 3, 1.0),
            {"torch.mm": lambda: x @ x.T} if kernel == "linear" else {},
            n * n * d,
            4 * n * n,
        )

    return make


def median_problem(n: int, d: int) -> Callable[..., Problem]:
    """The bandwidth of an RBF kernel."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        (x,) = layers(device, dtype, seed, n, (d,))
        return Problem(
            lambda: pyrepr.ops.gram.median_op([x], None, True)[0][0],
            lambda: reference.median_distance(x.double()),
            {"torch.pdist": lambda: torch.pdist(x.float()).median()},
            4 * n * n * d,
        )

    return make


def streaming_problem(n: int, widths: Sequence[int], batch: int) -> Callable[..., Problem]:
    """Batch after batch, in any number."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
        xs = layers(device, dtype, seed, n, widths)

        def stream() -> Tensor:
            tracker = pyrepr.StreamingCKA()
            for start in range(0, n, batch):
                tracker.update([x[start : start + batch] for x in xs])
            return tracker.compute()

        return Problem(stream, lambda: _exact(xs), flops=n * sum(widths) ** 2)

    return make


def _error(result: Tensor, truth: Tensor) -> float:
    return relative_error(result.cpu(), truth.cpu())


def _checks() -> list[GpuCase]:
    small = [
        GpuCase(
            f"cka {k}", "n=140 p=70 q=33", pair_problem(140, 70, 33, k), VALUE, graph=True, sanitize=True, error=_error
        )
        for k in KERNELS
    ]
    small += [
        GpuCase(f"cka_matrix {k}", "L=3 n=140 d=300", matrix_problem(140, (300, 500, 270), k), VALUE, error=_error)
        for k in KERNELS
    ]
    small += [
        GpuCase(f"gradient {k}", "n=140 p=200 q=9", gradient_problem(140, 200, 9, k), GRADIENT, error=_error)
        for k in KERNELS
    ]
    small += [
        GpuCase(f"gram {k}", "n=300 d=40", gram_problem(300, 40, k), dict.fromkeys(VALUE, 1e-5), error=_error)
        for k in KERNELS
    ]
    other = [
        ("cka masked", "n=300 p=70 q=33", pair_problem(300, 70, 33, masked=True), VALUE, ("triton",), False),
        ("cka_matrix linear", "L=4 n=70 d=400", matrix_problem(70, (400,) * 4), VALUE, ("triton",), True),
        ("cka_matrix features", "L=3 n=500", matrix_problem(500, (40, 130, 7)), VALUE, ("triton",), True),
        ("gradient features", "n=500 p=70 q=33", gradient_problem(500, 70, 33), GRADIENT, ("triton",), True),
        ("median", "n=300 d=20", median_problem(300, 20), dict.fromkeys(VALUE, 1e-5), ("triton",), True),
        ("StreamingCKA", "n=500 L=3", streaming_problem(500, (40, 130, 7), 100), VALUE, ("triton",), True),
        ("cka", "n=3 000 p=1 q=5 000", pair_problem(3000, 1, 5000), LONG, ("triton",), False),
    ]
    return small + [
        GpuCase(op, shape, make, tolerance, backends, graph="masked" not in op, sanitize=sanitize, error=_error)
        for op, shape, make, tolerance, backends, sanitize in other
    ]


def _timed() -> list[GpuCase]:
    both = (torch.bfloat16, torch.float32)
    cases = [
        ("cka", "n=4 096 p=q=1 024", pair_problem(4096, 1024, 1024), LONG, both),
        ("cka", "n=16 384 p=q=1 024", pair_problem(16384, 1024, 1024), LONG, both),
        ("cka", "n=4 096 p=q=16 384", pair_problem(4096, 16384, 16384), LONG, both),
        ("cka rbf", "n=4 096 p=q=1 024", pair_problem(4096, 1024, 1024, "rbf"), LONG, both),
        ("cka_matrix", "L=24 n=2 048 d=1 024", matrix_problem(2048, (1024,) * 24), LONG, both),
        ("cka_matrix", "L=24 n=16 384 d=1 024", matrix_problem(16384, (1024,) * 24), LONG, (torch.bfloat16,)),
        ("gradient", "n=512 p=q=4 096", gradient_problem(512, 4096, 4096), GRADIENT, both),
        ("gradient", "n=4 096 p=q=1 024", gradient_problem(4096, 1024, 1024), GRADIENT, both),
        ("gram", "n=8 192 d=1 024", gram_problem(8192, 1024), dict.fromkeys(VALUE, 1e-5), both),
        ("median", "n=4 096 d=1 024", median_problem(4096, 1024), dict.fromkeys(VALUE, 1e-5), both),
    ]
    return [
        GpuCase(op, shape, make, {d: tolerance[d] for d in dtypes}, timed=True, error=_error)
        for op, shape, make, tolerance, dtypes in cases
    ]


def cases() -> list[GpuCase]:
    """Correctness in every kernel and route, and the sizes that the targets name."""
    return _checks() + _timed()
