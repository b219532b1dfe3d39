"""Codes and rows: dense definitions in float64, gradients, and that rows × codes is never in memory."""

from __future__ import annotations

import pytest
import torch

from pyrepr import functional
from pyrepr.functional import (
    bag_of_codes,
    cluster_tokens,
    codes,
    householder,
    orthogonal_residual,
    paired_cosine,
    soft_lookup,
    unpool_tokens,
)


def distances(x, c):
    return (x[..., None, :] - c).square().sum(-1)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-11, **tolerance})


@pytest.mark.parametrize("blocks", [1 << 30, 900])
@pytest.mark.parametrize("width", [5, 3, 11])
def test_soft_lookup_is_its_definition(monkeypatch, blocks, width):
    monkeypatch.setattr(codes, "BLOCK_BYTES", blocks)
    x, book, values = (torch.randn(s, dtype=torch.float64) for s in ((2, 9, 5), (13, 5), (13, width)))
    expected = (-distances(x, book) / 0.7).softmax(-1) @ values
    close(soft_lookup(x, book, 0.7, values), expected)
    close(soft_lookup(x, book, 0.7), (-distances(x, book) / 0.7).softmax(-1) @ book)
    nearest = distances(x, book).argmin(-1)
    close(soft_lookup(x, book, 1e-6), book[nearest])
    low = soft_lookup(x.float() + 500, book.float() + 500, 0.7, values.float())
    close(low.double(), expected, rtol=2e-3, atol=2e-3)  # x + 500 is rounded to 3e-5


def test_gradients(monkeypatch):
    monkeypatch.setattr(codes, "BLOCK_BYTES", 200)
    x, book, values = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((2, 4, 3), (5, 3), (5, 2)))
    assert torch.autograd.gradcheck(lambda a, b, c: soft_lookup(a, b, 0.9, c), (x, book, values))
    assert torch.autograd.gradcheck(lambda a, b: bag_of_codes(a, b, pool="mean", mean_distance=2.0), (x, book))
    assert torch.autograd.gradcheck(lambda a, b: bag_of_codes(a, b, mean_distance=2.0), (x, book))
    tokens = torch.randn(1, 4, 4, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: cluster_tokens(t, (2, 2), steps=2, temperature=0.3).centres, (tokens,))
    processed = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    centres = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(unpool_tokens, (processed, x, centres))
    v = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    rows = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(householder, (rows, v)) and torch.autograd.gradcheck(
        orthogonal_residual, (rows, v[0])
    )
    assert torch.autograd.gradcheck(paired_cosine, (rows, v[0]))


def test_bag_of_codes_is_its_definition():
    x, book = torch.randn(3, 20, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    d = distances(x, book)
    soft = (-15 / d.amin(-1).mean() * d).softmax(-1)
    for pool, pooled in (("max", soft.amax(1)), ("mean", soft.mean(1))):
        close(bag_of_codes(x, book, pool=pool), pooled / pooled.sum(1, keepdim=True))
    close(bag_of_codes(x, book, pool="none"), soft)
    close(bag_of_codes(x, book, 4.0, mean_distance=2.0, pool="none"), (-2 * d).softmax(-1))


def test_cluster_tokens_is_its_definition(monkeypatch):
    x = torch.randn(2, 8, 12, 3, dtype=torch.float64)

    def dense(grid, h, w, steps, window, temperature):
        tokens = grid.flatten(0, 1)
        cell = torch.tensor([(r * h // 8) * w + c * w // 12 for r in range(8) for c in range(12)])
        centres = torch.stack([tokens[cell == i].mean(0) for i in range(h * w)])
        for _ in range(steps):
            weights = -temperature * distances(tokens, centres)
            for t in range(len(tokens)):
                for i in range(h * w):
                    apart = max(abs(int(cell[t]) // w - i // w), abs(int(cell[t]) % w - i % w))
                    if apart > window // 2:
                        weights[t, i] = -torch.inf
            weights = weights.softmax(1)
            centres = (weights.T @ tokens) / weights.sum(0)[:, None]
        return centres, distances(tokens, centres).argmin(1)

    for blocks in (1 << 30, 700):
        monkeypatch.setattr(codes, "BLOCK_BYTES", blocks)
        found = cluster_tokens(x, (4, 6), steps=3, window=3, temperature=0.8)
        for i in range(2):
            centres, labels = dense(x[i], 4, 6, 3, 3, 0.8)
            close(found.centres[i], centres)
            assert torch.equal(found.labels[i], labels)
    whole = cluster_tokens(x, (8, 12), steps=0)
    close(whole.centres, x.flatten(1, 2))
    assert torch.equal(whole.labels, torch.arange(96).expand(2, 96))
    doubled = cluster_tokens(10 * x + 5, (4, 6))  # the default temperature goes with the scale
    close(doubled.centres, 10 * cluster_tokens(x, (4, 6)).centres + 5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_unpool_tokens_is_its_definition(norm):
    processed, x, centres = (torch.randn(s, dtype=torch.float64) for s in ((2, 7, 4), (2, 30, 3), (2, 7, 3)))
    d = torch.stack([distances(a, c) for a, c in zip(x, centres, strict=True)])
    weights = (-0.05 * d).exp()
    keep = torch.zeros_like(weights).scatter_(2, d.topk(3, largest=False).indices, 1)
    weights = weights * keep
    size = weights.sum(2, keepdim=True) if norm == "l1" else weights.norm(dim=2, keepdim=True)
    close(unpool_tokens(processed, x, centres, norm=norm), weights / size @ processed)
    far = unpool_tokens(processed, x + 1e3, centres)  # where exp(−0.05 d²) is 0
    assert far.isfinite().all()


def test_memory_stays_in_blocks(monkeypatch):
    """No tensor as large as rows × codes is made, forward or backward."""
    monkeypatch.setattr(codes, "BLOCK_BYTES", 1 << 16)
    x, book = torch.randn(4096, 8).requires_grad_(), torch.randn(512, 8).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(t):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Watch():
        soft_lookup(x, book, 1.0).sum().backward()
        bag_of_codes(x.reshape(64, 64, 8), book).sum().backward()
    assert largest < 4096 * 512 * 4 / 8


def test_householder_is_the_product_of_reflections():
    x, v = torch.randn(7, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    q = torch.eye(6, dtype=x.dtype)
    for row in v:
        q = q @ (torch.eye(6, dtype=x.dtype) - 2 * torch.outer(row, row) / (row @ row))
    close(householder(x, v), x @ q)
    close(householder(x, v[0]), x - 2 * (x @ v[0])[:, None] * v[0] / (v[0] @ v[0]))
    a, tau = torch.geqrf(torch.randn(6, 4, dtype=x.dtype))
    lower = a.tril(-1) + torch.eye(6, 4, dtype=x.dtype)
    full = householder(torch.eye(6, dtype=x.dtype), lower.T)
    close(full[:, :3], torch.linalg.householder_product(a, tau)[:, :3])
    close((householder(x, v) ** 2).sum(1), (x**2).sum(1))
    close(householder(x, torch.stack([v[0], torch.zeros_like(v[0]), v[1]])), householder(x, v[:2]))


def test_orthogonal_residual_and_paired_cosine():
    x, g = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(2, 1, 5, dtype=torch.float64)
    rest = orthogonal_residual(x, g)
    close((rest * g).sum(-1), torch.zeros(2, 9, dtype=x.dtype))
    close(rest.square().sum(-1) + (x - rest).square().sum(-1), x.square().sum(-1))
    assert torch.equal(orthogonal_residual(x, 0 * g), x)
    close(orthogonal_residual(x, 1e-200 * g), rest)
    expected = torch.nn.functional.cosine_similarity(x, g.expand_as(x), dim=-1)
    close(paired_cosine(x, g, "none"), expected)
    close(paired_cosine(x, g), expected.mean())
    close(paired_cosine(x, g, "sum"), expected.sum())
    zero = torch.zeros(3, 4).requires_grad_()
    paired_cosine(zero, torch.randn(3, 4)).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 4))


def test_bad_input():
    x, book = torch.randn(4, 6, 3), torch.randn(5, 3)
    for call, message in (
        (lambda: soft_lookup(x, book, 0), "temperature must be a positive finite number, got 0"),
        (
            lambda: soft_lookup(x, torch.randn(5, 4), 1.0),
            r"codebook must have shape \[C, d\] with C ≥ 1 and the d of x, 3",
        ),
        (lambda: soft_lookup(x, book, 1.0, torch.randn(4, 2)), r"values must have shape \[C, h\] with C = 5"),
        (lambda: bag_of_codes(x[0], book), r"x must have shape \[B, T, d\]"),
        (lambda: bag_of_codes(x, book, -1), "inv_delta must be a positive finite number"),
        (lambda: bag_of_codes(x, book, pool="sum"), "pool must be one of max, mean, none"),
        (lambda: bag_of_codes(book[None], book), "every position of x is a code"),
        (lambda: bag_of_codes(x * torch.nan, book), "x and codebook must be finite"),
        (lambda: cluster_tokens(x, (2, 2)), r"x must have shape \[B, H, W, d\]"),
        (lambda: cluster_tokens(x[None], (9, 2)), r"size must be from \(1, 1\) to the grid's \(4, 6\)"),
        (lambda: cluster_tokens(x[None], (2, 2), window=4), "window must be an odd positive integer"),
        (lambda: unpool_tokens(x, x, x, k=7), "k must be an integer from 1 to the number of centres, 6"),
        (lambda: unpool_tokens(x, x, x[:, :, :2]), "centres must have the B and d of x"),
        (lambda: unpool_tokens(x, x, x, norm="l3"), "norm must be 'l1' or 'l2'"),
        (lambda: householder(x, torch.randn(2, 4)), "v must have the width of x"),
        (lambda: paired_cosine(x, x, "max"), "reduction must be one of"),
        (lambda: paired_cosine(book, x[0]), r"y must broadcast against x, got \[5, 3\] and \[6, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert functional.soft_lookup is soft_lookup
