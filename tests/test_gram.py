"""Family `gram` against the textbook in float64: every kernel, estimator, route, dtype and awkward shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pyrepr
from pyrepr.ops import gram as ops
from pyrepr.ops.gram import gram_stats
from pyrepr.reference import gram as reference

KERNELS = reference.KERNELS
ESTIMATORS = ("unbiased", "biased")
# Worst errors seen over all levels, kernels and shapes below, times about 5: 4e-7 in float32, 3e-15 in float64.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 2e-6}


def spec(kernel):
    return pyrepr.Kernel(kernel, sigma=2.0, gamma=0.5)


def truth(x, y, kernel="linear", estimator="unbiased"):
    scale = 0.5 if kernel == "polynomial" else 2.0
    k, l = (reference.kernel_matrix(a.double(), a.double(), kernel, scale, 3, 1.0) for a in (x, y))
    xy, xx, yy = (reference.hsic_of_kernels(a, b, estimator) for a, b in ((k, l), (k, k), (l, l)))
    return xy / (xx * yy).sqrt()


def pair(n=60, p=7, q=11, dtype=torch.float64):
    x = torch.randn(n, p, dtype=torch.float64)
    y = torch.cat([x[:, : min(p, q)], torch.zeros(n, max(0, q - p), dtype=torch.float64)], 1) + torch.randn(
        n, q, dtype=torch.float64
    )
    return x.to(dtype), y.to(dtype)


def close(value, expected, tolerance):
    assert abs(float(value) - float(expected)) <= tolerance * max(1.0, abs(float(expected)))


@pytest.mark.levels
def test_published_numbers():
    rng = np.random.RandomState(1337)
    x = torch.tensor(rng.randn(100, 10))
    y = torch.tensor(rng.randn(100, 10)) + x
    squares = [reference.squared_distances(a, a).flatten().sort().values for a in (x, y)]
    medians = [((s[4999] + s[5000]) / 2).item() for s in squares]
    close(pyrepr.cka(x, y, estimator="biased"), 0.5576132566, 1e-10)
    close(pyrepr.cka(x, y), 0.5134564895, 1e-10)
    # σ differs between x and y here: half the root of the median over all n² squared distances, zeros included.
    k, l = (
        reference.kernel_matrix(a, a, "rbf", 0.5 * math.sqrt(m), 3, 1.0) for a, m in zip((x, y), medians, strict=True)
    )
    own = [reference.hsic_of_kernels(a, a, "biased") for a in (k, l)]
    expected = reference.hsic_of_kernels(k, l, "biased") / (own[0] * own[1]).sqrt()
    close(expected, 0.6548311823, 1e-10)
    scale = torch.tensor([0.5 * math.sqrt(m) for m in medians], dtype=torch.float64)
    s, r, d, *_ = gram_stats([x, y], None, ops.constants_of(scale, "rbf"), "rbf")
    r = r + d
    hsic = s + d @ d.T - 2 / 100 * (r @ r.T) + torch.outer(r.sum(1), r.sum(1)) / 100**2
    close(hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]).sqrt(), 0.6548311823, 1e-10)


@pytest.mark.levels
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cka_is_the_textbooks(backend, kernel, estimator, dtype):
    x, y = pair(dtype=dtype)
    value = pyrepr.cka(x, y, kernel=spec(kernel), estimator=estimator)
    assert value.dtype == dtype
    close(value, truth(x, y, kernel, estimator), TOLERANCE[dtype])


@pytest.mark.levels
@pytest.mark.parametrize(
    ("n", "p", "q"), [(4, 1, 1), (5, 3, 2), (33, 1, 17), (64, 385, 40), (257, 30, 500), (700, 3, 5), (1000, 800, 20)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_awkward_shapes(n, p, q, dtype):
    x, y = pair(n, p, q, dtype)
    close(pyrepr.cka(x, y), truth(x, y), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_cost_only_their_own_rounding(dtype):
    x, y = pair(200, 50, 70, dtype)
    value = pyrepr.cka(x, y)
    assert value.dtype == torch.float32
    close(value, truth(x, y), 2e-6)


def plain(x):
    return x


LAYOUTS = {
    "rows": plain,
    "rows apart": lambda x: torch.cat([x, x[:, :3]], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "columns": lambda x: x.T.contiguous().T,
}


@pytest.mark.levels
@pytest.mark.parametrize("ratio", [0, 1, 2.7, 3, 300])
@pytest.mark.parametrize(
    ("n", "width", "layout"),
    [(133, 801, "rows"), (257, 770, "rows apart"), (130, 1000, "columns"), (140, 9001, "every other row")],
)
def test_bfloat16_layers_with_a_mean(n, width, layout, ratio):
    # Worst seen over all levels: 3e-6 on white noise, where rows are centred after their product (|mean| < 2.8
    # standard deviations).
    x, y = (LAYOUTS[layout]((a + ratio * torch.randn(a.shape[1])).bfloat16()) for a in pair(n, width, width - 2))
    expected = truth(*(a.double() - a.double().mean(0) for a in (x, y)))
    close(pyrepr.cka(x, y), expected, 1e-5)
    close(pyrepr.cka_matrix([x, y, x])[1, 2], expected, 1e-5)
    mask = torch.arange(n) % 40 > 0
    kept = truth(*(a[mask].double() - a[mask].double().mean(0) for a in (x, y)))
    close(pyrepr.cka(x, y, mask=mask), kept, 1e-5)


@pytest.mark.levels
@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e15])
def test_bfloat16_layers_of_any_magnitude(size):
    x, y = ((a * size).bfloat16() for a in pair(150, 600, 500))
    close(pyrepr.cka(x, y), truth(x.double() / size, y.double() / size), 4e-6)


@pytest.mark.levels
def test_every_16_bit_pattern_is_read_right():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)[:, None]
        one = torch.ones(1, 1, dtype=dtype)
        product = pyrepr.gram(x, one)[:, 0]
        torch.testing.assert_close(product, x[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["columns", "strided", "expanded"])
def test_non_contiguous_inputs(layout):
    base = torch.randn(80, 60)
    x = {"columns": base.T.contiguous().T, "strided": base[::2, ::3], "expanded": base[:, :1].expand(80, 9)}[layout]
    y = torch.randn(x.shape[0], 13)
    assert not x.is_contiguous()
    close(pyrepr.cka(x, y), truth(x, y), 2e-6)
    with_reference = pyrepr.cka_matrix([x, y])
    close(with_reference[0, 1], truth(x, y), 2e-6)


def test_lazily_negated_input_is_resolved():
    z = torch.randn(40, 6, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    close(pyrepr.gram(x, torch.ones(1, 6))[0, 0], x[0].sum(), 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [20, 300])  # 20: Gram route, 300: feature route
def test_matrix_is_all_pairs(n, estimator):
    xs = [torch.randn(n, d, dtype=torch.float64) for d in (5, 9, 30)]
    ys = [x[:, :4] + 0.3 * torch.randn(n, 4, dtype=torch.float64) for x in xs[:2]]
    assert pyrepr.similarity.choose_route(n, [5, 9, 30], [4, 4]) == ("gram" if n == 20 else "features")
    cross = pyrepr.cka_matrix(xs, ys, estimator=estimator)
    own = pyrepr.cka_matrix(xs, estimator=estimator)
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            close(cross[i, j], truth(x, y, estimator=estimator), 1e-12)
        for j, y in enumerate(xs):
            close(own[i, j], truth(x, y, estimator=estimator), 1e-12)
    assert cross.shape == (3, 2) and own.shape == (3, 3)


def test_matrix_takes_a_stacked_tensor_and_every_kernel():
    xs = torch.randn(3, 90, 12, dtype=torch.float64)
    for kernel in KERNELS:
        table = pyrepr.cka_matrix(xs, kernel=spec(kernel))
        close(table[0, 2], truth(xs[0], xs[2], kernel), 1e-12)


def test_routes_agree_on_wide_layers():
    xs = [torch.randn(120, d) for d in (700, 33)]
    constants = ops.constants_of(torch.ones(2, dtype=torch.float64), "linear")
    by_tiles, by_features = (
        ops.stats_op(xs, None, constants, "linear", 1, True, features, 0, False) for features in (False, True)
    )
    for a, b in zip(by_tiles, by_features, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(by_tiles[0].abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_autograds_through_the_textbook(backend, kernel, estimator):
    x, y = pair(30, 5, 8)
    grads = []
    for cka in (
        lambda a, b: pyrepr.cka(a, b, kernel=spec(kernel), estimator=estimator),
        lambda a, b: truth(a, b, kernel, estimator),
    ):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        grads.append(torch.autograd.grad(cka(a, b), (a, b)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel):
    x, y = pair(12, 3, 4)
    assert torch.autograd.gradcheck(
        lambda a, b: pyrepr.hsic(a, b, kernel=spec(kernel)), (x.requires_grad_(), y.requires_grad_()), fast_mode=True
    )


@pytest.mark.levels
@pytest.mark.parametrize(("n", "p", "q"), [(200, 3, 5), (40, 90, 70), (600, 300, 310)])
def test_gradient_on_every_route(n, p, q, monkeypatch):
    monkeypatch.setattr("pyrepr.ops._gram_gradient.BACKWARD_BLOCK_BYTES", 1)  # blocks of 64 rows
    x, y = pair(n, p, q)
    for kernel in ("linear", "rbf"):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        pyrepr.cka(a, b, kernel=spec(kernel)).backward()
        c, d = x.clone().requires_grad_(), y.clone().requires_grad_()
        truth(c, d, kernel).backward()
        for ours, theirs in ((a.grad, c.grad), (b.grad, d.grad)):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def test_all_pairs_gradient():
    xs = [torch.randn(50, d, dtype=torch.float64, requires_grad=True) for d in (4, 9, 2)]
    weights = torch.randn(3, 3, dtype=torch.float64)
    ours = torch.autograd.grad((weights * pyrepr.cka_matrix(xs)).sum(), xs)
    theirs = torch.autograd.grad(sum(weights[i, j] * truth(xs[i], xs[j]) for i in range(3) for j in range(3)), xs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_identities_of_the_gradient(estimator):
    x, y = pair(50, 20, 30)
    x.requires_grad_()
    (g,) = torch.autograd.grad(pyrepr.cka(x, y, estimator=estimator), x)
    x = x.detach()
    assert abs(float((x * g).sum())) < 1e-12  # scale
    assert float(g.sum(0).abs().max()) < 1e-12  # shift
    assert float((x.T @ g - g.T @ x).abs().max()) < 1e-12  # rotation


def test_identities_of_the_value():
    x, y = pair(80, 20, 30)
    q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    for other in (x @ q, 3.7 * x, x + torch.randn(20, dtype=torch.float64)):
        close(pyrepr.cka(other, y), pyrepr.cka(x, y), 1e-12)
    close(pyrepr.cka(x, x), 1, 1e-14)
    basis = torch.randn(80, 9, dtype=torch.float64)
    basis, _ = torch.linalg.qr(basis - basis.mean(0))
    close(pyrepr.cka(basis[:, :4], basis, estimator="biased"), math.sqrt(4 / 9), 1e-12)


@pytest.mark.levels
@pytest.mark.parametrize("ratio", [1, 10, 1000])
def test_large_means_cost_no_digits(ratio):
    x, y = (a + ratio * a.std() for a in pair(256, 512, 300, torch.float32))
    # The textbook on uncentred features loses its digits to cancellation, in float64 too.
    expected = truth(*(a.double() - a.double().mean(0) for a in (x, y)))
    for kernel_estimate in (
        pyrepr.cka(x, y),
        pyrepr.cka_matrix([x, y])[0, 1],
        pyrepr.StreamingCKA().update([x], [y]).compute(),
    ):
        close(kernel_estimate, expected, 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mask_is_selection(kernel, backend):
    x, y = pair(70, 6, 5)
    mask = torch.rand(70) < 0.6
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    c, d = x.clone().requires_grad_(), y.clone().requires_grad_()
    masked = pyrepr.cka(a, b, kernel=pyrepr.Kernel(kernel), mask=mask)
    selected = pyrepr.cka(c[mask], d[mask], kernel=pyrepr.Kernel(kernel))
    close(masked.detach(), selected.detach(), 1e-13)
    masked.backward()
    selected.backward()
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)
    assert not a.grad[~mask].any()


def test_a_frozen_guide_gets_no_gradient():
    x, y = pair()
    pyrepr.cka(x.requires_grad_(), y).backward()
    assert x.grad is not None and y.grad is None


@pytest.mark.levels
@pytest.mark.parametrize("n", [2, 3, 5, 60, 301])
def test_median_distance_is_exact(n):
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(n, 4, dtype=dtype)
        expected = torch.pdist(x.double()).sort().values
        expected = (expected[(len(expected) - 1) // 2] + expected[len(expected) // 2]) / 2
        close(ops.median_op([x], None, True)[0], expected, 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.levels
@pytest.mark.parametrize("kernel", KERNELS)
def test_gram_matrix(backend, kernel):
    x, y = torch.randn(45, 8), torch.randn(33, 8) + 5
    scale = 0.5 if kernel == "polynomial" else 2.0
    for other in (None, y):
        expected = reference.kernel_matrix(x.double(), (x if other is None else other).double(), kernel, scale, 3, 1.0)
        ours = pyrepr.gram(x, other, kernel=spec(kernel))
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
        if other is None:
            assert torch.equal(ours, ours.T)
    h = torch.eye(45, dtype=torch.float64) - 1 / 45
    expected = h @ reference.kernel_matrix(x.double(), x.double(), kernel, scale, 3, 1.0) @ h
    centred = pyrepr.gram(x, kernel=spec(kernel), center=True).double()
    torch.testing.assert_close(centred, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_gram_is_differentiable_and_of_nothing_empty():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for kernel in ("linear", "rbf", "polynomial"):
        assert torch.autograd.gradcheck(
            lambda a, k=kernel: pyrepr.gram(a, kernel=k, sigma=2.0 if k == "rbf" else None, center=True), x
        )
    assert pyrepr.gram(torch.empty(0, 3)).shape == (0, 0)
    assert pyrepr.gram(torch.empty(4, 0)).tolist() == [[0.0] * 4] * 4


@pytest.mark.parametrize(
    ("kernel", "n", "widths"),
    [*((kernel, 500, (40, 700)) for kernel in KERNELS), ("linear", 3000, (40, 300, 1)), ("linear", 70_000, (1, 5))],
)
def test_same_bits_for_any_thread_count(kernel, n, widths):
    xs = [torch.randn(n, d) for d in widths]
    weights = torch.randn(n, n) if n < 10_000 else None
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a = [x.clone().requires_grad_() for x in xs]
            table = pyrepr.cka_matrix(a, kernel=kernel)
            results.append([table.detach(), *torch.autograd.grad(table.sum(), a)])
            if n < 10_000:
                b = xs[0].clone().requires_grad_()
                k = pyrepr.gram(b, kernel=kernel)
                results[-1] += [k.detach(), *torch.autograd.grad((k * weights).sum(), b)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nan_and_infinity_reach_the_result_and_no_further():
    for bad in (torch.nan, torch.inf):
        xs = [torch.randn(30, 4) for _ in range(3)]
        xs[1][7, 2] = bad
        table = pyrepr.cka_matrix(xs)
        assert table[1].isnan().all() and table[:, 1].isnan().all()
        assert torch.isfinite(table[0, 2]) and torch.isfinite(table[0, 0])
        assert pyrepr.cka(xs[0], xs[1], kernel="rbf").isnan()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("constant", [0.0, 1.0, 12345.678])
def test_constant_features_give_nan_and_name_the_layer(kernel, constant):
    x = torch.full((20, 5), constant)
    y = torch.randn(20, 3)
    with pytest.warns(pyrepr.DegenerateInputWarning, match=r"y: all samples have the same features"):
        assert pyrepr.cka(y, x, kernel=pyrepr.Kernel(kernel, sigma=1.0)).isnan()
    with pytest.warns(pyrepr.DegenerateInputWarning, match=r"xs\[1\]: all samples"):
        table = pyrepr.cka_matrix([y, x], kernel=pyrepr.Kernel(kernel, sigma=1.0))
    assert torch.isfinite(table[0, 0]) and table[1].isnan().all()


def test_unbiased_values_are_not_clamped():
    values = [float(pyrepr.cka(torch.randn(6, 50), torch.randn(6, 50))) for _ in range(50)]
    assert min(values) < 0
    x = torch.randn(6, 50, requires_grad=True)
    y = next(y for y in (torch.randn(6, 50) for _ in range(100)) if pyrepr.cka(x.detach(), y) < 0)
    pyrepr.cka(x, y).backward()
    assert torch.isfinite(x.grad).all()


X = torch.zeros(5, 2).copy_(torch.arange(10).view(5, 2) % 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pyrepr.cka(X[:3], X[:3]),
            ValueError,
            "x must have at least 4 samples for the unbiased estimator, got 3",
        ),
        (lambda: pyrepr.cka(X[:1], X[:1], estimator="biased"), ValueError, "at least 2 samples for the biased"),
        (lambda: pyrepr.cka(X, X[:4]), ValueError, "y must have the n of x, 5 samples, got 4"),
        (lambda: pyrepr.cka(X[0], X), ValueError, r"x must have shape \[n, d\], got \[2\]"),
        (lambda: pyrepr.hsic(X, X.int()), TypeError, "y must be float32, float64, bfloat16 or float16, got int32"),
        (lambda: pyrepr.cka(X, X.double()), TypeError, "y must have the dtype of x, torch.float32, got torch.float64"),
        (lambda: pyrepr.cka(X, X.to("meta")), ValueError, "y must be on the device of x, cpu, got meta"),
        (lambda: pyrepr.cka(X, [1]), TypeError, "y must be a torch.Tensor, got list"),
        (lambda: pyrepr.cka(X, X, kernel="rfb"), ValueError, "kernel must be one of linear, rbf, .*, got 'rfb'"),
        (lambda: pyrepr.cka(X, X, kernel=3), TypeError, "kernel must be a name or a pyrepr.Kernel, got int"),
        (
            lambda: pyrepr.cka(X, X, kernel="rbf", sigma=0.0),
            ValueError,
            "sigma must be a positive finite number, got 0.0",
        ),
        (lambda: pyrepr.cka(X, X, kernel="rbf", bandwidth=math.nan), ValueError, "bandwidth must be a positive"),
        (lambda: pyrepr.Kernel("polynomial", degree=0), ValueError, "degree must be an integer from 1 to 1000, got 0"),
        (
            lambda: pyrepr.cka(X, X, estimator="best"),
            ValueError,
            "estimator must be 'unbiased' or 'biased', got 'best'",
        ),
        (lambda: pyrepr.cka(X, X, mask=torch.ones(5)), TypeError, "mask must be a bool tensor"),
        (
            lambda: pyrepr.cka(X, X, mask=torch.ones(4) > 0),
            ValueError,
            r"mask must have shape \[n\] = \[5\], got \[4\]",
        ),
        (lambda: pyrepr.cka(X, X, mask=torch.arange(5) < 3), ValueError, "mask must have at least 4 samples .* got 3"),
        (lambda: pyrepr.cka_matrix([]), ValueError, "xs must hold at least one layer, got none"),
        (lambda: pyrepr.cka_matrix(X), ValueError, r"xs must be a list of \[n, d\] tensors or one tensor"),
        (lambda: pyrepr.cka_matrix({"a": X}), TypeError, "xs must be a list .* got dict"),
        (
            lambda: pyrepr.cka_matrix([X], [X, X[:4]]),
            ValueError,
            r"ys\[1\] must have the n of xs\[0\], 5 samples, got 4",
        ),
        (lambda: pyrepr.gram(X, X[:, :1]), ValueError, "y must have the width of x, 2, got 1"),
        (lambda: pyrepr.gram(X[:1], kernel="rbf"), ValueError, "x must have at least 2 rows for a median distance"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("size", [1e-16, 1e-12, 1e-6, 1e9, 1e16])
@pytest.mark.parametrize("n", [20, 300])  # 20: Gram route, 300: feature route
def test_layers_of_any_magnitude(backend, n, size):
    x, y = (size * a for a in pair(n, 30, 40, torch.float32))
    x.requires_grad_()
    value = pyrepr.cka(x, y)
    close(value.detach(), truth(x, y).detach(), 2e-6)
    wide = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(value, x)
    (expected,) = torch.autograd.grad(truth(wide, y), wide)
    assert float((gradient - expected).abs().max()) <= 5e-6 * float(expected.abs().max())


def test_a_median_of_zero_is_named():
    x = torch.zeros(40, 3)
    x[0] = 1
    with pytest.warns(UserWarning, match="layer 0 of 2: most samples have the same features, so the median"):
        value = pyrepr.cka(x, torch.randn(40, 3), kernel="rbf")
    assert value.isnan()


def test_a_sparse_layer_is_named():
    with pytest.raises(TypeError, match=r"^x must be a dense tensor, got layout sparse_coo$"):
        pyrepr.cka(torch.eye(8).to_sparse(), torch.randn(8, 2))


def test_compiled_for_any_number_of_samples():
    compiled = torch.compile(lambda x, y: pyrepr.cka(x, y), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 40):
        x, y = torch.randn(n, 3), torch.randn(n, 5)
        assert torch.equal(compiled(x, y), pyrepr.cka(x, y))


@pytest.mark.parametrize("beside", [{"sigma": 2.0}, {"bandwidth": 0.5}])
def test_options_beside_a_kernel_are_not_ignored(beside):
    x, y, kernel = torch.randn(9, 3), torch.randn(9, 4), pyrepr.Kernel("rbf", sigma=1.0)
    (name,) = beside
    calls = (
        lambda: pyrepr.cka(x, y, kernel=kernel, **beside),
        lambda: pyrepr.hsic(x, y, kernel=kernel, **beside),
        lambda: pyrepr.cka_matrix([x], [y], kernel=kernel, **beside),
        lambda: pyrepr.gram(x, kernel=kernel, **beside),
        lambda: pyrepr.StreamingCKA(mode="minibatch", kernel=kernel, **beside),
        lambda: pyrepr.nn.CKALoss(kernel=kernel, **beside),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"^{name} belongs into the Kernel"):
            call()


@pytest.mark.parametrize("degree", [0, -1, 2.0, True, 10**10])
def test_degrees_that_no_kernel_takes(degree):
    with pytest.raises(ValueError, match="degree must be an integer from 1 to 1000"):
        pyrepr.Kernel("polynomial", degree=degree)


@pytest.mark.parametrize("by_features", [False, True])
def test_a_mask_that_leaves_no_row_writes_nothing(by_features):
    """The functions refuse it, a compiled one cannot: an empty index has no address, as one that is not given."""
    x, nothing = torch.randn(500, 3), torch.zeros(500, dtype=torch.bool)
    one = ops.constants_of(torch.ones(1, dtype=torch.float64), "linear")
    s, r, d, *_ = torch.ops.pyrepr.gram_stats([x], nothing, one, "linear", 1, True, by_features, 0, False)
    assert s.item() == 0 and not r.any() and not d.any()


@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_a_median_of_zero_leaves_no_number(kernel, backend):
    x = torch.randn(1, 7).expand(5, 7)
    for y in (None, torch.randn(2, 7)):
        with pytest.warns(UserWarning, match="median distance is 0"):
            assert pyrepr.gram(x, y, kernel=kernel).isnan().all()
