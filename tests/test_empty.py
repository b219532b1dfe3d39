"""Every public function with every one of its sizes zero, in every combination: the right numbers and gradients, or one
sentence. Fresh memory holds NaN, so that what nobody wrote shows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import pyrepr
from pyrepr import functional


@dataclass(frozen=True)
class Case:
    """A function of float32 tensors, the same from the textbook in float64, and the sizes it is made for."""

    sizes: dict[str, int]
    shapes: dict[str, str]  # of each tensor, in letters of `sizes`; a digit is itself
    call: Callable
    truth: Callable
    refused: frozenset[str] = frozenset()  # sizes that must not be zero
    differentiable: bool = True

    def inputs(self, zero):
        sizes = {name: 0 if name in zero else size for name, size in self.sizes.items()}
        shapes = ([sizes[s] if s in sizes else int(s) for s in text.split()] for text in self.shapes.values())
        return sizes, dict(zip(self.shapes, (torch.rand(shape) - 0.5 for shape in shapes), strict=True))


def convolved(x, w, b, i=None):
    """The last W − 1 tokens of nothing, or of the state, then x; B D T."""
    before = x.new_zeros(*x.shape[:2], w.shape[1] - 1) if i is None else i
    windows = torch.cat([before, x], -1).unfold(-1, w.shape[1], 1) if x.shape[2] else x.new_zeros(*x.shape, w.shape[1])
    return torch.nn.functional.silu(torch.einsum("bdtw,dw->bdt", windows, w) + b[:, None])


def delta(q, k, v, beta, g=None, state=None):
    groups, (B, T, HV, V) = v.shape[2] // q.shape[2], v.shape
    q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    s = q.new_zeros(B, HV, q.shape[3], V) if state is None else state
    out = [v[:, :0]]
    for t in range(T):
        if g is not None:
            s = s * (g[:, t, :, None, None] if g.dim() == 3 else g[:, t, ..., None]).exp()
        error = v[:, t]
        if beta is not None:
            error = beta[:, t, :, None] * (error - torch.einsum("bhkv,bhk->bhv", s, k[:, t]))
        s = s + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
        out.append(torch.einsum("bhkv,bhk->bhv", s, q[:, t])[:, None] * q.shape[3] ** -0.5)
    return torch.cat(out, 1), s


def scanned(x, dt, A, b, c):
    o, s = delta(c * c.shape[3] ** 0.5, b, x * dt[..., None], None, A * dt)
    return o, s.mT


def one_hot(codes, n, like):
    return (codes[..., None] == torch.arange(n)).to(like.dtype)


def codes_for(sizes, n):
    return torch.arange(sizes["T"] * sizes["C"]).view(sizes["T"], sizes["C"]) % max(1, n)


def looked_up(x, tables, b):
    z = x.unflatten(-1, (tables.shape[0], 2))
    codes = ((z >= 0) * torch.tensor([1, 2])).sum(-1)
    return torch.einsum("tk,tkn,knh->th", torch.sigmoid(2 * z.abs()).prod(-1), one_hot(codes, 4, x), tables) + b


DELTA = {"B": 2, "T": 3, "H": 1, "J": 2, "K": 4, "V": 5}
RULE = {"q": "B T H K", "k": "B T H K", "v": "B T J V", "beta": "B T J"}
CASES = {
    "conv": Case(
        {"B": 2, "D": 3, "T": 5, "W": 4},
        {"x": "B D T", "w": "D W", "b": "D"},
        lambda s, x, w, b: pyrepr.causal_conv1d_fn(x, w, b, activation="silu"),
        lambda s, x, w, b: convolved(x, w, b),
        frozenset("W"),
    ),
    "conv with states": Case(
        {"B": 2, "D": 3, "T": 5},
        {"x": "B D T", "w": "D 4", "b": "D", "i": "B D 3"},
        lambda s, x, w, b, i: pyrepr.causal_conv1d_fn(x, w, b, None, i, True, activation="silu"),
        lambda s, x, w, b, i: (convolved(x, w, b, i), torch.cat([i, x], -1)[..., x.shape[2] :]),
    ),
    "conv packed": Case(
        {"D": 3, "N": 2},
        {"x": "1 D 6", "w": "D 4", "b": "D"},
        lambda s, x, w, b: pyrepr.causal_conv1d_fn(
            x[..., : 3 * s["N"]], w, b, cu_seqlens=torch.arange(0, 3 * s["N"] + 1, 3), activation="silu"
        ),
        lambda s, x, w, b: torch.cat(
            [x[..., :0], *(convolved(part, w, b) for part in x[..., : 3 * s["N"]].split(3, -1))], -1
        ),
    ),
    "conv of one tap": Case(
        {"B": 2, "D": 3, "T": 5},
        {"x": "B D T", "w": "D 1", "b": "D"},
        lambda s, x, w, b: pyrepr.causal_conv1d_fn(x, w, b, activation="silu", return_final_states=True),
        lambda s, x, w, b: (convolved(x, w, b), x.new_zeros(s["B"], s["D"], 0)),
    ),
    "chunk_delta_rule": Case(
        DELTA,
        RULE,
        lambda s, **x: pyrepr.chunk_delta_rule(**x, output_final_state=True),
        lambda s, **x: delta(**x),
        frozenset("HKV"),
    ),
    "chunk_gated_delta_rule": Case(
        DELTA,
        RULE | {"g": "B T J", "state": "B J K V"},
        lambda s, **x: pyrepr.chunk_gated_delta_rule(initial_state=x.pop("state"), **x, output_final_state=True),
        lambda s, **x: delta(**x),
        frozenset("HKV"),
    ),
    "chunk_kda": Case(
        DELTA,
        RULE | {"g": "B T J K", "state": "B J K V"},
        lambda s, **x: pyrepr.chunk_kda(initial_state=x.pop("state"), **x, output_final_state=True),
        lambda s, **x: delta(**x),
        frozenset("HKV"),
    ),
    "chunk_gla": Case(
        DELTA,
        {n: s for n, s in RULE.items() if n != "beta"} | {"g": "B T J K", "state": "B J K V"},
        lambda s, **x: functional.chunk_gla(initial_state=x.pop("state"), **x, output_final_state=True),
        lambda s, **x: delta(**x, beta=None),
        frozenset("HKV"),
    ),
    "mamba_chunk_scan_combined": Case(
        {"B": 2, "T": 3, "H": 2, "P": 4, "N": 5},
        {"x": "B T H P", "dt": "B T H", "A": "H", "b": "B T 1 N", "c": "B T 1 N"},
        lambda s, x, dt, A, b, c: functional.mamba_chunk_scan_combined(x, dt, A, b, c, return_final_states=True),
        lambda s, **x: scanned(**{n: t.clamp_min(0) if n == "dt" else t for n, t in x.items()}),
        frozenset("PN"),
    ),
    "chunk_gated_delta_rule packed": Case(
        {"N": 2, "J": 2},
        {"q": "1 6 1 4", "k": "1 6 1 4", "v": "1 6 J 5", "beta": "1 6 J", "g": "1 6 J", "state": "N J 4 5"},
        lambda s, **x: pyrepr.chunk_gated_delta_rule(
            initial_state=x.pop("state"),
            **{name: t[:, : 3 * s["N"]] for name, t in x.items()},
            cu_seqlens=torch.arange(0, 3 * s["N"] + 1, 3),
            output_final_state=True,
        ),
        lambda s, **x: packed(s["N"], **x),
    ),
    "lookup_linear": Case(
        {"T": 3, "C": 2, "H": 5},
        {"x": "T 1", "tables": "C 4 H", "b": "H"},
        lambda s, x, tables, b: pyrepr.lookup_linear(x.expand(-1, 2 * s["C"]), tables, b),
        lambda s, x, tables, b: looked_up(x.expand(-1, 2 * s["C"]), tables, b),
    ),
    "lookup_linear sparse": Case(
        {"T": 3, "C": 2, "H": 5},
        {"x": "T 1", "tables": "C 4 H", "b": "H"},
        lambda s, x, tables, b: pyrepr.lookup_linear(x.expand(-1, 2 * s["C"]), tables, b, sparse=True),
        lambda s, x, tables, b: looked_up(x.expand(-1, 2 * s["C"]), tables, b),
    ),
    "sign_linear": Case(
        {"T": 3, "D": 4, "H": 5},
        {"x": "T D", "w": "H D", "b": "H"},
        lambda s, x, w, b: functional.sign_linear(x, w, b, hash="one_bit"),
        lambda s, x, w, b: x.sign() @ w.T + b,
    ),
    "lookup_sum": Case(
        {"T": 3, "C": 2, "H": 5},
        {"w": "T C", "tables": "C 4 H"},
        lambda s, w, tables: pyrepr.lookup_sum(codes_for(s, 4), w, tables),
        lambda s, w, tables: torch.einsum("tk,tkn,knh->th", w, one_hot(codes_for(s, 4), 4, w), tables),
    ),
    "lookup_sum sparse": Case(
        {"T": 3, "C": 2, "H": 5},
        {"w": "T C", "tables": "C 4 H"},
        lambda s, w, tables: pyrepr.lookup_sum(codes_for(s, 4), w, tables, sparse=True),
        lambda s, w, tables: torch.einsum("tk,tkn,knh->th", w, one_hot(codes_for(s, 4), 4, w), tables),
    ),
    "segment_sum": Case(
        {"T": 3, "C": 2, "H": 5},
        {"v": "T H", "w": "T C"},
        lambda s, v, w: pyrepr.segment_sum(v, codes_for(s, 4), 4, weights=w),
        lambda s, v, w: torch.einsum("th,tk,tkn->knh", v, w, one_hot(codes_for(s, 4), 4, w)),
    ),
    "gram": Case(
        {"N": 4, "D": 3},
        {"x": "N D"},
        lambda s, x: pyrepr.gram(x),
        lambda s, x: x @ x.T,
    ),
    "gram rbf": Case(
        {"N": 4, "M": 5, "D": 3},
        {"x": "N D", "y": "M D"},
        lambda s, x, y: pyrepr.gram(x, y, kernel="rbf", sigma=1.5),
        lambda s, x, y: (-(x[:, None] - y).square().sum(-1) / 4.5).exp(),
        differentiable=False,
    ),
    "gram polynomial": Case(
        {"N": 4, "M": 5, "D": 3},
        {"x": "N D", "y": "M D"},
        lambda s, x, y: pyrepr.gram(x, y, kernel=pyrepr.Kernel("polynomial", gamma=0.5, coef0=2.0), center=False),
        lambda s, x, y: (0.5 * x @ y.T + 2) ** 3,
        differentiable=False,
    ),
    "gram cosine, centred": Case(
        {"N": 4, "D": 3},
        {"x": "N D"},
        lambda s, x: pyrepr.gram(x, kernel="cosine", center=True),
        lambda s, x: centred(torch.nn.functional.normalize(x, dim=1)),
        differentiable=False,
    ),
    "gram of two": Case(
        {"N": 4, "M": 5, "D": 3},
        {"x": "N D", "y": "M D"},
        lambda s, x, y: pyrepr.gram(x, y),
        lambda s, x, y: x @ y.T,
    ),
}


def centred(x):
    h = torch.eye(len(x), dtype=x.dtype) - 1 / max(1, len(x))
    return h @ x @ x.T @ h


def packed(count, q, k, v, beta, g, state):
    parts = [delta(*(x[:, 3 * i : 3 * i + 3] for x in (q, k, v, beta, g)), state[i : i + 1]) for i in range(count)]
    return torch.cat([v[:, :0], *(o for o, _ in parts)], 1), torch.cat([state[:0], *(last for _, last in parts)])


@contextlib.contextmanager
def memory_that_holds_nan():
    """Fresh tensors are filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def fresh_memory():
    with memory_that_holds_nan():
        yield


def run(function, sizes, tensors, weight):
    """Results, and the gradients of their weighted sum in every input (dense; zeros where there is none)."""
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    out = function(sizes, **leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((o.double() * weight(o.shape)).sum() for o in out)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else []
    grads = grads or [None] * len(leaves)
    return out, [
        torch.zeros_like(t) if g is None else g.to_dense() for g, t in zip(grads, leaves.values(), strict=True)
    ]


def weight(shape):
    return torch.linspace(-1, 2, max(1, shape.numel()), dtype=torch.float64)[: shape.numel()].view(shape)


def check(case, dtype):
    for count in range(1, len(case.sizes) + 1):
        for zero in itertools.combinations(case.sizes, count):
            sizes, tensors = case.inputs(zero)
            tensors = {key: t.to(dtype) for key, t in tensors.items()}
            if "state" in tensors:
                tensors["state"] = tensors["state"].to(torch.promote_types(dtype, torch.float32))
            if case.refused & set(zero):
                with pytest.raises(ValueError, match=r"must have|at least|multiple of"):
                    run(case.call, sizes, tensors, weight)
                continue
            with torch.set_grad_enabled(case.differentiable):
                got, grads = run(case.call, sizes, tensors, weight)
                want, truth = run(case.truth, sizes, {key: t.double() for key, t in tensors.items()}, weight)
            near = 0.05 if dtype is torch.bfloat16 else 1e-5
            for a, b in zip((*got, *grads), (*want, *truth), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=near, atol=near, msg=lambda m, z=zero: f"{z}: {m}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_sizes(backend, name, dtype):
    check(CASES[name], dtype)


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "cosine", pyrepr.Kernel("rbf", sigma=1.0)])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_layers_without_features_are_degenerate(backend, kernel, estimator):
    """Their HSIC with anything is zero, and so are its gradients; their CKA is undefined."""
    x, y = torch.randn(9, 0, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    for a, b in ((x, y), (y, x), (x, x)):
        value = pyrepr.hsic(a, b, kernel=kernel, estimator=estimator)
        assert abs(value.item()) < 1e-9
        for leaf, grad in zip((a, b), torch.autograd.grad(value, (a, b)), strict=True):
            assert grad.shape == leaf.shape and (grad.abs() < 1e-8).all()
        with pytest.warns(pyrepr.DegenerateInputWarning, match="^[xy]: all|^x, y: all"):
            assert pyrepr.cka(a, b, kernel=kernel, estimator=estimator).isnan()
    with pytest.warns(pyrepr.DegenerateInputWarning, match=r"xs\[1\]"):
        table = pyrepr.cka_matrix([y, x], kernel=kernel, estimator=estimator)
    assert table.isnan().tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "polynomial", "cosine"])
def test_no_samples_are_refused_by_name(backend, kernel):
    for n in range(4):
        x, y = torch.randn(n, 2), torch.randn(n, 3)
        for call in (pyrepr.cka, pyrepr.hsic, lambda *args, **more: pyrepr.cka_matrix(args, **more)):
            with pytest.raises(ValueError, match=r"x must have at least 4 samples for the unbiased estimator, got \d"):
                call(x, y, kernel=kernel)
    with pytest.raises(ValueError, match="mask must have at least 4 samples for the unbiased estimator, got 0"):
        pyrepr.cka(torch.randn(9, 2), torch.randn(9, 3), kernel=kernel, mask=torch.zeros(9, dtype=torch.bool))
    for n in (0, 1):
        if kernel in ("rbf", "laplacian"):
            with pytest.raises(ValueError, match=f"x must have at least 2 rows for a median distance, got {n}"):
                pyrepr.gram(torch.randn(n, 2), kernel=kernel)
        else:
            assert pyrepr.gram(torch.randn(n, 2), kernel=kernel).shape == (n, n)
