"""Standard errors: the jackknife's formulas against leaving rows out, and against the spread of draws."""

from __future__ import annotations

import pytest
import torch

import pyrepr
from pyrepr.reference.gram import hsic_of_kernels, kernel_matrix
from pyrepr.similarity._stderr import cka_stderr
from pyrepr.similarity.kernels import Kernel


def layers(n: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (5, 9, 70)]
    xs[1][:, :5] += xs[0]
    return xs


def left_out(xs: list[torch.Tensor], spec: Kernel, estimator: str, groups: torch.Tensor) -> torch.Tensor:
    """By its definition: CKA of what is left without each group, σ held."""
    moved = [x - x.mean(0) for x in xs] if spec.name in ("linear", "rbf", "laplacian") else xs
    ks = [
        kernel_matrix(x, x, spec.name, s, spec.degree, spec.coef0)
        for x, s in zip(moved, spec.scales(xs).tolist(), strict=True)
    ]
    values = []
    for group in groups.unique():
        kept = [k[groups != group][:, groups != group] for k in ks]
        table = torch.stack([torch.stack([hsic_of_kernels(k, l, estimator) for l in kept]) for k in kept])
        own = table.diagonal().sqrt()
        values.append(table / torch.outer(own, own))
    every, g = torch.stack(values), len(values)
    return ((g - 1) / g * (every - every.mean(0)).square().sum(0)).sqrt()


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "polynomial", "cosine"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("grouped", [False, True])
def test_equal_to_leaving_out(kernel, estimator, grouped):
    xs, spec = layers(), Kernel(kernel)
    groups = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(1)) if grouped else None
    exact = left_out(xs, spec, estimator, torch.arange(40) if groups is None else groups)
    for features in (False, True) if kernel == "linear" else (False,):
        whole = cka_stderr(xs, spec, estimator, groups, 0, features)
        torch.testing.assert_close(whole, exact, rtol=1e-9, atol=1e-9)  # 2e-10 seen, of the laplacian's square roots
        across = cka_stderr(xs, spec, estimator, groups, 1, features)
        torch.testing.assert_close(across, exact[:1, 1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "polynomial", "cosine"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("n", [9, 40])  # along rows and, if the kernel is linear, along features
def test_layers_of_any_magnitude(kernel, estimator, n):
    """NaN before, or 42 for 0.07."""
    spec, xs = Kernel(kernel, coef0=0.0), layers(n)[:2]
    exact = pyrepr.cka(*xs, kernel=spec, estimator=estimator, return_stderr=True)[1].item()
    for scale in (1e-25, 1e-12, 1e12, 1e25):
        for given in ([xs[0] * scale, xs[1]], [(x * scale).float() for x in xs]):
            error = pyrepr.cka(*given, kernel=spec, estimator=estimator, return_stderr=True)[1].item()
            assert error == pytest.approx(exact, rel=1e-4 if given[0].dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "polynomial", "cosine"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("grouped", [False, True])
def test_beside_a_row_that_dwarfs_the_others(kernel, estimator, grouped):
    spec = Kernel(kernel, sigma=3.0 if kernel in ("rbf", "laplacian") else None)
    groups = torch.arange(12) // 2 if grouped else torch.arange(12)
    for row in (1e2, 1e5):
        xs = [x.float() for x in layers(12)]
        xs[0][3] *= row
        kept = [groups != g for g in groups.unique()]
        values = torch.stack(
            [pyrepr.cka(*(x[k].double() for x in xs[:2]), kernel=spec, estimator=estimator) for k in kept]
        )
        exact = ((len(kept) - 1) / len(kept) * (values - values.mean()).square().sum()).sqrt().item()
        given = {"kernel": spec, "estimator": estimator, "return_stderr": True, "groups": groups if grouped else None}
        assert pyrepr.cka(*xs[:2], **given)[1].item() == pytest.approx(exact, rel=1e-4)
        assert pyrepr.cka_matrix(xs, **given)[1][1, 0].item() == pytest.approx(exact, rel=1e-4)
        assert pyrepr.cka_matrix(xs[:1], xs[1:], **given)[1][0, 0].item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("n", [64, 160])
def test_public_functions_on_both_routes_and_in_float32(n):
    xs = layers(n)
    values, errors = pyrepr.cka_matrix(xs, return_stderr=True)
    torch.testing.assert_close(values, pyrepr.cka_matrix(xs), rtol=0, atol=1e-14)  # PyTorch's products differ by blocks
    torch.testing.assert_close(errors, left_out(xs, Kernel(), "unbiased", torch.arange(n)), rtol=1e-8, atol=1e-12)
    single = [x.float() for x in xs]
    torch.testing.assert_close(pyrepr.cka_matrix(single, return_stderr=True)[1].double(), errors, rtol=1e-3, atol=1e-6)
    value, error = pyrepr.cka(xs[0], xs[1], return_stderr=True)
    assert (value.item(), error.item()) == pytest.approx((values[0, 1].item(), errors[0, 1].item()), rel=1e-9)
    mask = torch.arange(n) % 3 > 0
    masked = pyrepr.cka(xs[0], xs[1], mask=mask, return_stderr=True)
    plain = pyrepr.cka(xs[0][mask], xs[1][mask], return_stderr=True)
    torch.testing.assert_close(masked, plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("grouped", [False, True])
def test_shares_of_the_pass_that_makes_the_values(dtype, estimator, grouped, monkeypatch):
    """Rows enough for several tiles, on the Gram route, within a network and across two."""
    from pyrepr.similarity import _stderr

    n, generator = 150, torch.Generator().manual_seed(2)
    base = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    xs = [base @ torch.randn(6, d, generator=generator, dtype=torch.float64) + 3 for d in (200, 37, 260)]
    xs = [(x + 4 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(dtype) for x in xs]
    groups = torch.randint(0, 20, (n,), generator=generator) if grouped else None
    monkeypatch.setattr(_stderr, "BLOCK_BYTES", 7 * n * 4 * 8)
    assert pyrepr.similarity.choose_route(n, [x.shape[1] for x in xs]) == "gram"
    exact = left_out([x.double() for x in xs], Kernel(), estimator, torch.arange(n) if groups is None else groups)
    options = {"estimator": estimator, "groups": groups, "return_stderr": True}
    values, errors = pyrepr.cka_matrix(xs, **options)
    # The values alone are added up in another order.
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(values, pyrepr.cka_matrix(xs, estimator=estimator), **close)
    rtol = 1e-8 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(errors.double(), exact, rtol=rtol, atol=1e-6 if dtype == torch.float32 else 1e-12)
    across = pyrepr.cka_matrix(xs[:1], xs[1:], **options)
    torch.testing.assert_close(across[0], pyrepr.cka_matrix(xs[:1], xs[1:], estimator=estimator), **close)
    torch.testing.assert_close(across[1], errors[:1, 1:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("by_features", [False, True])
def test_shares_have_the_same_bits_for_any_number_of_threads(by_features):
    from pyrepr.ops.gram import constants_of, gram_row_stats, gram_stats

    xs = [torch.randn(330, d, generator=torch.Generator().manual_seed(d)) for d in (40, 90, 33)]
    constants, before, found = constants_of(torch.ones(3, dtype=torch.float64), "linear"), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        stats, shares = gram_row_stats(xs, by_features)
        plain = gram_stats(xs, None, constants, "linear", by_features=by_features)
        assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=True))
        found.append(shares)
    torch.set_num_threads(before)
    one, two = found
    assert torch.equal(one.p, two.p) and torch.equal(one.moved, two.moved)
    assert all(torch.equal(block, two.cross[pair]) for pair, block in one.cross.items())
    torch.testing.assert_close(one.p.sum(1), stats.s[tuple(torch.triu_indices(3, 3))], rtol=5e-6, atol=0)


@pytest.mark.parametrize("by_features", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shares_of_wide_and_narrow_layers_are_those_of_their_definition(by_features, dtype):
    from pyrepr.ops.gram import gram_row_stats

    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(d, 430, generator=generator).to(dtype).T for d in (3, 700, 401)]  # of every kind of tile
    xs[1] = xs[1].contiguous() + 5
    centred = [x.double() - x.double().mean(0) for x in xs]
    kernels = [x @ x.T for x in centred]
    q = torch.stack([k.diagonal() for k in kernels])
    _, shares = gram_row_stats(xs, by_features)
    for i, (a, b) in enumerate(torch.triu_indices(3, 3).T.tolist()):
        off = (kernels[a] * kernels[b]).fill_diagonal_(0)
        error = (shares.p[i] - off.sum(1)).abs().max() / off.sum(1).abs().max()
        assert error < (1e-13 if dtype == torch.float64 else 3e-6)  # bfloat16: as of the values
        torch.testing.assert_close(shares.moved[a, b], kernels[a] @ q[b], rtol=1e-5, atol=1e-5 * float(q[b].sum()))
    _, half = gram_row_stats(xs, True, 2)
    assert torch.equal(half.p[0], _shares(xs)[0]) and not bool(half.p[1].any())  # of the second side only with itself


def _shares(xs):
    from pyrepr.ops.gram import gram_row_stats

    return gram_row_stats(xs, True)[1].p


def test_blocks_of_rows_hold_whole_groups(monkeypatch):
    from pyrepr.similarity import _stderr

    xs, groups, near = layers(), torch.arange(40) // 7, {"rtol": 1e-12, "atol": 1e-12}  # of errors; 5e-14 was seen
    whole = cka_stderr(xs, Kernel("rbf"), "unbiased", groups, 0, False)
    monkeypatch.setattr(_stderr, "BLOCK_BYTES", 3 * 40 * 8 * 9)  # nine rows: one group a block
    torch.testing.assert_close(cka_stderr(xs, Kernel("rbf"), "unbiased", groups, 0, False), whole, **near)
    monkeypatch.setattr(_stderr, "BLOCK_BYTES", 1)
    torch.testing.assert_close(cka_stderr(xs, Kernel("rbf"), "unbiased", groups, 0, False), whole, **near)


def test_the_estimate_is_the_spread_of_draws():
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    values, errors = [], []
    for _ in range(400):
        x = torch.randn(60, 20, generator=generator, dtype=torch.float64)
        y = x @ mixing + 8 * torch.randn(60, 20, generator=generator, dtype=torch.float64)
        value, error = pyrepr.cka(x, y, return_stderr=True)
        values.append(value)
        errors.append(error)
    spread = torch.stack(values).std().item()
    assert torch.stack(errors).mean().item() == pytest.approx(spread, rel=0.15)  # 400 draws tell it to 3.5 %


@pytest.mark.parametrize(
    ("groups", "n", "message"),
    [
        (None, 4, "leaves out one sample at a time and needs at least 5, got 4"),
        (
            torch.zeros(9, dtype=torch.int64),
            9,
            "groups must leave at least 4 samples .* got 1 group of up to 9 among 9",
        ),
        (torch.arange(9) // 6, 9, "got 2 groups of up to 6 among 9 samples"),
        (torch.zeros(8, dtype=torch.int64), 9, r"groups must be integers of shape \[n\] = \[9\], got \[8\]"),
        (torch.zeros(9), 9, r"groups must be integers of shape \[n\] = \[9\], got \[9\] torch.float32"),
        ([0] * 9, 9, "groups must be integers .* got list"),
    ],
)
def test_bad_groups(groups, n, message):
    xs = layers(n)
    with pytest.raises(ValueError, match=message):
        pyrepr.cka_matrix(xs, return_stderr=True, groups=groups)


def test_groups_without_a_standard_error_are_refused():
    x, groups = torch.randn(9, 3), torch.arange(9)
    for call in (lambda: pyrepr.cka(x, x, groups=groups), lambda: pyrepr.cka_matrix([x], groups=groups)):
        with pytest.raises(ValueError, match=r"groups must come with return_stderr=True, .* got groups without it"):
            call()
