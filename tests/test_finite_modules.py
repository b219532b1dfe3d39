"""Modules given NaN, infinities and zeros: what plain PyTorch gives, or one error; and cosines of any magnitude."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import pyrepr
from pyrepr import functional, nn

BAD = [math.nan, math.inf, -math.inf]


def clip(a, b):
    logits, at = 3 * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2


def matryoshka(a, b):
    at = torch.arange(len(a))
    cosines = [F.normalize(a[:, :d], dim=1) @ F.normalize(b[:, :d], dim=1).T for d in (8, 4, 2)]
    return sum(F.cross_entropy(20 * c, at) for c in cosines)


def memory_of(layer):
    def plain(x):
        queries, out = layer.norm(layer.query(x).unflatten(-1, (layer.heads, -1))), 0
        for h in range(layer.heads):
            first, second = (half @ layer.keys[h, i].T for i, half in enumerate(queries[:, h].chunk(2, 1)))
            scores, at = (first[:, :, None] + second[:, None, :]).flatten(1).topk(layer.k, 1)
            out = out + (scores.softmax(1)[..., None] * layer.values.weight[at]).sum(1)
        return layer.gate_out(out * F.silu(layer.gate_in(x))) if layer.gate_in is not None else out

    return plain


def cases():
    dense, rest = (
        torch.nn.Linear(8, 5),
        torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Linear(4, 5)),
    )
    memories = [nn.ProductKeyMemory(8, keys=8, k=3, heads=2, key_dim=4, gate=gate) for gate in (False, True)]
    x = [torch.randn(6, 8)]
    return {
        "ClipLoss": (lambda a, b: nn.ClipLoss()(a, b, 3.0), clip, [*x, torch.randn(6, 8)]),
        "MatryoshkaLoss": (nn.MatryoshkaLoss([8, 4, 2]), matryoshka, [*x, torch.randn(9, 8)]),
        "ProductKeyMemory": (memories[0], memory_of(memories[0]), x),
        "ProductKeyMemory, gate": (memories[1], memory_of(memories[1]), x),
        "LinearPlus": (nn.LinearPlus(dense, rest), lambda x: dense(x) + rest(x), x),
    }


def value_and_gradients(function, args):
    args = [x.clone().requires_grad_() for x in args]
    out = function(*args)
    out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape) if out.dim() else None)
    return out.detach(), [x.grad for x in args]


def same(found, expected):
    """Finite numbers are the same, and there are no others where the other has none."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_numbers_that_are_not_finite_are_what_they_are_in_plain_pytorch(name, value, backend_name):
    ours, plain, args = cases()[name]
    for place in range(len(args)):
        spoilt = [x.clone() for x in args]
        spoilt[place][3, 5] = value
        with pyrepr.use_backend(backend_name):
            out, gradients = value_and_gradients(ours, spoilt)
        expected, wanted = value_and_gradients(plain, spoilt)
        same(out, expected)
        for g, w in zip(gradients, wanted, strict=True):
            if backend_name == "cpu" or not name.endswith("Loss"):
                same(g, w)
        if not out.dim():  # the reference keeps what is not a number in the rows that it reaches
            assert not gradients[place][3].isfinite().any()


@pytest.mark.parametrize("name", ["ClipLoss", "ProductKeyMemory", "ProductKeyMemory, gate", "LinearPlus"])
def test_rows_of_zeros_are_what_they_are_in_plain_pytorch(name):
    ours, plain, args = cases()[name]
    args[0][2] = 0
    for found, expected in zip(*(value_and_gradients(f, args) for f in (ours, plain)), strict=True):
        for a, b in zip([*found], [*expected], strict=True) if isinstance(found, list) else [(found, expected)]:
            same(a, b)


def test_rows_of_zeros_have_no_direction():
    """F.normalize gives them a gradient of 1e12 times the others'; here it is zero."""
    ours, plain, args = cases()["MatryoshkaLoss"]
    args[0][2] = 0
    (out, gradients), (expected, wanted) = (value_and_gradients(f, args) for f in (ours, plain))
    same(out, expected)
    same(gradients[1], wanted[1])
    others = torch.arange(6) != 2
    same(gradients[0][others], wanted[0][others])
    assert not gradients[0][2].any()


@pytest.mark.parametrize("scale", [0.0, *BAD])
def test_a_scale_that_is_none_is_refused_by_its_name(scale):
    x = torch.randn(3, 4)
    for given in (scale, torch.tensor(scale)):
        with pytest.raises(ValueError, match=r"^logit_scale must be positive and finite, got"):
            nn.ClipLoss()(x, x, given)


@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-15, 1e15, 1e25, 1e35])
@pytest.mark.parametrize("prefixes", [None, [2, 5, 8]])
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_cosines_of_any_magnitude(size, prefixes, backend_name):
    x, y = torch.randn(6, 8) * torch.tensor(size), torch.randn(9, 8) * torch.tensor(size)
    x[4] /= torch.tensor(size)

    options = {"normalize": True, "prefixes": prefixes, "directions": ("rows",) if prefixes else ("rows", "columns")}

    def run(*args):
        return value_and_gradients(lambda a, b: functional.info_nce(a, b, 5.0, **options), args)

    expected, wanted = run(x.double(), y.double())
    with pyrepr.use_backend(backend_name):
        out, gradients = run(x, y)
        sums = functional.pairwise_logsumexp(x, y, kernel="cosine")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    for g, w, a in zip(gradients, wanted, (x, y), strict=True):
        norms = a.double().norm(dim=1, keepdim=True)
        torch.testing.assert_close(g.double() * norms, w * norms, rtol=0, atol=2e-5)
    torch.testing.assert_close(sums.double(), functional.pairwise_logsumexp(x.double(), y.double(), kernel="cosine"))


@pytest.mark.parametrize("value", BAD)
def test_sentence_transformers_losses(value):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    import pyrepr.integrations.sentence_transformers as accelerated

    spoilt = [torch.randn(6, 8), torch.randn(6, 8)]
    spoilt[1][2, 3] = value
    loss = losses.MultipleNegativesRankingLoss(torch.nn.Identity())

    def run():
        return value_and_gradients(lambda a, b: loss.compute_loss_from_embeddings([a, b], None), spoilt)

    theirs = run()
    accelerated.enable()
    try:
        ours = run()
    finally:
        accelerated.disable()
    same(ours[0], theirs[0])
    for g, w in zip(ours[1], theirs[1], strict=True):
        same(g, w)
