"""Numbers that are not finite: refused by name where they would reach every result, kept in their row where not, and
never turned into a number."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import pyrepr
from pyrepr import functional, similarity, stats

BAD = [math.nan, math.inf, -math.inf]
X, CODES = torch.randn(9, 4), torch.randn(5, 4)
IMAGE = torch.randn(1, 4, 4, 3)


def spoilt(x, value, place=None):
    x = x.clone()
    x.view(-1)[x.numel() // 2 if place is None else place] = value
    return x


REFUSED = {
    "mean_cosine": ("x", X, stats.mean_cosine),
    "rdm": ("x", X, similarity.rdm),
    "rdm, cosine": ("x", X, lambda x: similarity.rdm(x, "cosine")),
    "rdm, euclidean": ("x", X, lambda x: similarity.rdm(x, "euclidean")),
    "rdm, sqeuclidean": ("x", X, lambda x: similarity.rdm(x, "sqeuclidean")),
    "rsa, first": ("d1", torch.rand(10), lambda d: similarity.rsa(d, torch.rand(10))),
    "rsa, second": ("d2", torch.rand(10), lambda d: similarity.rsa(torch.rand(10), d)),
    "rsa, ranks": ("d1", torch.rand(10), lambda d: similarity.rsa(d, torch.rand(10), "spearman")),
    "rsa, whitened": ("d1", torch.rand(10), lambda d: similarity.rsa(d, torch.rand(10), "cosine_cov")),
    "geotopological": ("d", torch.rand(10), similarity.geotopological),
    "anchors": ("anchors", X[:3], lambda a: similarity.relative_representation(X, a, "euclidean")),
    "soft_lookup, codebook": ("codebook", CODES, lambda c: functional.soft_lookup(X, c, 0.5)),
    "soft_lookup, values": ("values", torch.randn(5, 2), lambda v: functional.soft_lookup(X, CODES, 0.5, v)),
    "bag_of_codes, codebook": (
        "codebook",
        CODES,
        lambda c: functional.bag_of_codes(X[None], c, mean_distance=1.0),
    ),
    "bag_of_codes": ("x", X[None], lambda x: functional.bag_of_codes(x, CODES)),
    "cluster_tokens": ("x", IMAGE, lambda x: functional.cluster_tokens(x, (2, 2))),
    "unpool_tokens": ("centres", CODES[None], lambda c: functional.unpool_tokens(torch.randn(1, 5, 2), X[None], c)),
    "householder": ("v", X[:2], lambda v: functional.householder(X, v)),
    "neural_collapse": ("x", X, lambda x: stats.neural_collapse(x, torch.arange(9) % 3)),
    "Moments": ("x", X, lambda x: stats.Moments().update(x, X)),
    "match_units": ("x", X, lambda x: similarity.match_units(x, X)),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("value", BAD)
def test_what_would_reach_every_result_is_refused(name, value):
    argument, x, call = REFUSED[name]
    call(x)
    for dtype in (torch.float32, torch.bfloat16) if name in ("mean_cosine", "rdm") else (torch.float32,):
        with pytest.raises(ValueError, match=rf"^(.* and )?{argument}( and .*)? must be finite, got NaN or infinity"):
            call(spoilt(x, value).to(dtype))


def test_what_is_refused_stays_differentiable():
    for run in (torch.func.grad, lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(x[None])[0]):
        assert run(stats.mean_cosine)(X).isfinite().all()
    with pytest.raises(ValueError, match="x must be finite"):
        torch.func.grad(stats.mean_cosine)(spoilt(X, math.nan))
    hidden = torch.func.vmap(stats.mean_cosine)(torch.stack([X, spoilt(X, math.nan)]))
    assert hidden.isnan().tolist() == [False, True]


# What becomes of row i of the result follows from row i of x alone.
ROWS = {
    "paired_cosine": lambda x: functional.paired_cosine(x, X, "none"),
    "orthogonal_residual": lambda x: functional.orthogonal_residual(x, X),
    "householder": lambda x: functional.householder(x, X[:2]),
    "soft_lookup": lambda x: functional.soft_lookup(x, CODES, 0.5),
    "bag_of_codes": lambda x: functional.bag_of_codes(x[:, None], CODES, mean_distance=1.0),
    "unpool_tokens": lambda x: functional.unpool_tokens(CODES[None], x[None], CODES[None])[0],
    "relative_representation": lambda x: similarity.relative_representation(x, X[:3]),
    "relative_representation, ip": lambda x: similarity.relative_representation(x, X[:3], "ip"),
    "relative_representation, euclidean": lambda x: similarity.relative_representation(x, X[:3], "euclidean"),
    "pairwise_logsumexp": lambda x: functional.pairwise_logsumexp(x, X),
    "gram, cosine": lambda x: pyrepr.gram(x, X, kernel="cosine"),
    "gram, polynomial": lambda x: pyrepr.gram(x, X, kernel=pyrepr.Kernel("polynomial", degree=2)),
    "effective_rank": lambda x: stats.effective_rank(x[:, None].expand(-1, 5, -1) + CODES),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_a_row_keeps_its_numbers_to_itself(name, value, backend_name):
    at = 4
    with pyrepr.use_backend(backend_name):
        whole, found = ROWS[name](X), ROWS[name](spoilt(X, value, 4 * at + 1))
    others = torch.arange(9) != at
    torch.testing.assert_close(found[others], whole[others])
    row = found[at]
    assert not row.isfinite().any() or (name == "orthogonal_residual" and row.isnan().any())


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "cosine", "polynomial"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_no_kernel_makes_a_number_of_it(kernel, value, backend_name):
    """The reference's laplacian was 1 between all rows, and its CKA 0."""
    options = {"sigma": 1.0} if kernel in ("rbf", "laplacian") else {}
    x = spoilt(X, value, 17)
    with pyrepr.use_backend(backend_name):
        for dtype in (torch.float32, torch.float64):
            for other in (None, X.to(dtype)):
                assert not pyrepr.gram(x.to(dtype), other, kernel=kernel, **options)[4].isfinite().any()
            for estimator in ("unbiased", "biased"):
                both = x.to(dtype), X.to(dtype)
                assert pyrepr.cka(*both, kernel=kernel, estimator=estimator, **options).isnan()
                assert pyrepr.hsic(*both, kernel=kernel, estimator=estimator, **options).isnan()
            leaf = x.to(dtype).clone().requires_grad_()
            pyrepr.cka(leaf, X.to(dtype), kernel=kernel, **options).backward()
            assert leaf.grad.isnan().any()


@pytest.mark.parametrize("name", [name for name in similarity.MEASURES])
def test_measures_name_the_layer_and_keep_the_others(name):
    y, z = torch.randn(30, 5), torch.randn(30, 3)
    measure = similarity.as_measure(name)
    x = torch.randn(30, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = measure.matrix([x, spoilt(x, math.nan)], [y, z])
    said = [str(w.message) for w in caught if "features are NaN or infinite" in str(w.message)]
    assert len(said) == (name != "cka")  # cka() says nothing of what its result shows
    assert table[1].isnan().all()
    torch.testing.assert_close(table[:1], measure.matrix([x], [y, z]))
