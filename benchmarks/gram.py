"""Cases of family `gram`. Peers: "centre, stack, mm" in plain torch, pytorch-cka 1.1.3, torch-cka 0.21."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyrepr.benchmarks.activations import minilm_layers
from pyrepr.benchmarks.harness import Case, Workload, module_error, random_layers
from torch import Tensor

import pyrepr
from pyrepr.reference import gram as reference

SAMPLED = 3  # layers whose values are checked against float64 where checking all would take longer than measuring


def plain_cka_matrix(layers: list[Tensor]) -> Tensor:
    """Unbiased CKA of all pairs as one writes it in torch: centre, stack the Gram matrices, one product."""
    n = layers[0].shape[0]
    centred = [x - x.mean(0) for x in layers]
    grams = torch.stack([x @ x.T for x in centred])
    q = grams.diagonal(dim1=1, dim2=2)
    flat = grams.flatten(1)
    t = q.sum(1)
    hsic = flat @ flat.T - n / (n - 2) * (q @ q.T) + torch.outer(t, t) / ((n - 1) * (n - 2))
    own = hsic.diagonal().sqrt()
    return hsic / torch.outer(own, own)


def plain_rbf_matrix(layers: list[Tensor]) -> Tensor:
    """The same with an RBF kernel whose σ is the median distance."""
    n = layers[0].shape[0]
    upper = torch.triu_indices(n, n, 1)
    grams = []
    for x in layers:
        distance = torch.cdist(x, x)
        sigma = distance[upper[0], upper[1]].median()
        grams.append(torch.exp(-(distance**2) / (2 * sigma**2)).fill_diagonal_(0))
    flat = torch.stack(grams).flatten(1)
    rows = flat.view(len(layers), n, n).sum(2)
    total = rows.sum(1)
    hsic = flat @ flat.T - 2 / (n - 2) * (rows @ rows.T) + torch.outer(total, total) / ((n - 1) * (n - 2))
    own = hsic.diagonal().sqrt()
    return hsic / torch.outer(own, own)


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased CKA of one pair, for autograd."""
    return plain_cka_matrix([x, y])[0, 1]


def torch_cka_matrix(layers: list[Tensor]) -> Tensor:
    """torch-cka's estimator on given activations: three n × n products for every pair, as its `compare` does."""
    from torch_cka import CKA

    estimator = CKA.__new__(CKA)  # its constructor wants two models and hooks them
    estimator.device = "cpu"
    result = torch.empty(len(layers), len(layers))
    for i, x in enumerate(layers):
        k = (x @ x.T).fill_diagonal_(0)
        for j, y in enumerate(layers):
            l = (y @ y.T).fill_diagonal_(0)
            kl, kk, ll = (estimator._HSIC(a, b) for a, b in ((k, l), (k, k), (l, l)))
            result[i, j] = kl / (kk * ll) ** 0.5
    return result


def pytorch_cka_matrix(layers: list[Tensor]) -> Tensor:
    """pytorch-cka's function for features that are already there."""
    from cka import cka_from_features

    return cka_from_features(layers, layers)


def exact_matrix(layers: list[Tensor], kernel: str = "linear", sigmas: list[float] | None = None) -> Tensor:
    """Textbook CKA of all pairs in float64, from explicit kernel matrices."""
    kernels = [
        reference.kernel_matrix(x.double(), x.double(), kernel, sigmas[i] if sigmas else 1.0, 3, 1.0)
        for i, x in enumerate(reference._centred(x.double()) for x in layers)
    ]
    hsic = torch.stack([torch.stack([_hsic(k, l) for l in kernels]) for k in kernels])
    own = hsic.diagonal().sqrt()
    return hsic / torch.outer(own, own)


def _hsic(k: Tensor, l: Tensor) -> Tensor:
    """Song et al. 2012, eq. 5, without the n × n products of the reference."""
    n = k.shape[0]
    k, l = k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)
    total = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return total / (n * (n - 3))


def _corner(matrix: Tensor) -> Tensor:
    return matrix[:SAMPLED, :SAMPLED]


def _matrix_workload(layers: list[Tensor], peers: dict[str, Callable], data: str = "random") -> Workload:
    n, widths = layers[0].shape[0], sum(x.shape[1] for x in layers)
    return Workload(
        {"pyrepr": lambda: pyrepr.cka_matrix(layers), **{name: lambda f=f: f(layers) for name, f in peers.items()}},
        truth=lambda: exact_matrix(layers[:SAMPLED]),
        result=_corner,
        tolerance=1e-5,
        flops=2 * min(pyrepr.ops._gram_gradient.route_costs(n, [x.shape[1] for x in layers])),
        bytes=layers[0].element_size() * n * widths,
        data=data,
    )


def _bfloat16() -> Workload:
    """Layers as models in bfloat16 record them; the peers take them as float32, the way they are right with."""
    layers = [x.bfloat16() for x in random_layers(24, 4096, 768)]
    wide = {name: lambda xs, f=f: f([x.float() for x in xs]) for name, f in _peers().items()}
    return _matrix_workload(layers, {"pyrepr, float32": lambda xs: pyrepr.cka_matrix([x.float() for x in xs]), **wide})


def _peers(*, torch_cka: bool = False) -> dict[str, Callable]:
    peers: dict[str, Callable] = {"plain torch": plain_cka_matrix}
    if not module_error("cka", "pytorch-cka"):
        peers["pytorch-cka"] = pytorch_cka_matrix
    if torch_cka and not module_error("torch_cka", "torch-cka"):
        peers["torch-cka"] = torch_cka_matrix
    return peers


def _pretrained() -> Workload:
    layers = minilm_layers(2048)
    if layers is None:
        return _matrix_workload(random_layers(7, 2048, 384), _peers(), "random (no [demo] extra)")
    return _matrix_workload(layers, _peers(), "MiniLM on docstrings")


def _rbf() -> Workload:
    layers = random_layers(6, 2048, 384)
    return Workload(
        {
            "pyrepr": lambda: pyrepr.cka_matrix(layers, kernel="rbf"),
            "plain torch": lambda: plain_rbf_matrix(layers),
        },
        truth=lambda: exact_matrix(
            layers[:SAMPLED], "rbf", [float(reference.median_distance(x.double())) for x in layers[:SAMPLED]]
        ),
        result=_corner,
        tolerance=1e-5,
        flops=3 * 2048**2 * 6 * 384,  # one pass for the kernel, two for the median
    )


def _training(n: int, d: int) -> Workload:
    student, guide = (x.requires_grad_() for x in random_layers(2, n, d))

    def step(cka: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = cka(x, y)
        return value.detach(), *torch.autograd.grad(value, (x, y))

    return Workload(
        {"pyrepr": lambda: step(pyrepr.cka, student, guide), "plain torch": lambda: step(plain_cka, student, guide)},
        truth=lambda: step(plain_cka, student.double(), guide.double()),
        tolerance=1e-4,
        flops=2 * n * n * 2 * d * 1.5,  # half a product forward, one backward, for both
    )


def _streaming(samples: int) -> Workload:
    count, width, pool, batch = 12, 384, 8192, 1024
    layers = random_layers(count, pool, width)

    def stream() -> Tensor:
        tracker = pyrepr.StreamingCKA()
        for start in range(0, samples, batch):
            at = start % pool
            tracker.update([x[at : at + batch] for x in layers])
        return tracker.compute()

    def truth() -> Tensor:  # the pool repeated: every sum over samples grows by the same factor
        repeats = samples // pool
        centred = [x.double() - x.double().mean(0) for x in layers[:SAMPLED]]
        q = torch.stack([x.square().sum(1) for x in centred])
        s = torch.stack([torch.stack([(x.T @ y).square().sum() for y in centred]) for x in centred])
        t, n = q.sum(1) * repeats, samples
        hsic = s * repeats**2 - n / (n - 2) * repeats * (q @ q.T) + torch.outer(t, t) / ((n - 1) * (n - 2))
        own = hsic.diagonal().sqrt()
        return hsic / torch.outer(own, own)

    return Workload({"pyrepr": stream}, truth, tolerance=1e-5, result=_corner, flops=samples * (count * width) ** 2)


def _accuracy(ratio: float) -> Workload:
    layers = [x + ratio * x.std() for x in random_layers(3, 256, 512)]
    return Workload(
        {
            "pyrepr": lambda: pyrepr.cka_matrix(layers),
            **{k: lambda f=f: f(layers) for k, f in _peers(torch_cka=True).items()},
        },
        truth=lambda: exact_matrix(layers),
        tolerance=1e-5,
    )


def _gram(n: int, d: int) -> Workload:
    (x,) = random_layers(1, n, d)
    return Workload(
        {"pyrepr": lambda: pyrepr.gram(x), "torch.mm": lambda: torch.mm(x, x.T)},
        truth=lambda: x.double() @ x.double().T,
        tolerance=1e-5,
        flops=n * n * d,  # by symmetry
    )


def cases() -> list[Case]:
    """All cases of the family, small ones first."""
    return [
        Case("cka_matrix", "L=7 n=2048 d=384", _pretrained, quick=True),
        *(
            Case("cka_matrix", f"L=3 n=256 d=512, mean/std {ratio:g}", lambda ratio=ratio: _accuracy(ratio), quick=True)
            for ratio in (1, 10, 1000)
        ),
        Case("cka forward+backward", "n=512 d=1024", lambda: _training(512, 1024), quick=True),
        Case("gram", "n=2048 d=768", lambda: _gram(2048, 768), quick=True),
        Case("cka_matrix rbf", "L=6 n=2048 d=384", _rbf, quick=True),
        Case("cka_matrix", "L=8 n=20000 d=128", lambda: _matrix_workload(random_layers(8, 20000, 128), {})),
        Case("cka forward+backward", "n=1024 d=4096", lambda: _training(1024, 4096)),
        Case("StreamingCKA exact", "8 192 samples, L=12 d=384", lambda: _streaming(8192)),
        Case("StreamingCKA exact", "98 304 samples, L=12 d=384", lambda: _streaming(98304)),
        Case("cka_matrix", "L=24 n=4096 d=768", lambda: _matrix_workload(random_layers(24, 4096, 768), _peers())),
        Case("cka_matrix, bf16", "L=24 n=4096 d=768", _bfloat16),
    ]
