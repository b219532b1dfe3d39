"""CKA and HSIC of layers of any magnitude, values and gradients, against the textbook in arithmetic without a range."""

from __future__ import annotations

import functools
import math
import warnings

import mpmath
import numpy as np
import pytest
import torch

import pyrepr
from pyrepr.stats import LayerMoments
from pyrepr.stats._robust import robust_centre

N, WIDTHS = 8, (4, 5)
RMS = (1e-25, 1.0, 300.0, 1e25)
ROWS = (1.0, 1e5, 1e12)  # how many times one row is as long as the others
KERNELS = {
    "linear": {"name": "linear"},
    "cosine": {"name": "cosine"},
    "rbf": {"name": "rbf", "bandwidth": 0.7},
    "rbf narrow": {"name": "rbf", "bandwidth": 0.1},
    "rbf fixed": {"name": "rbf", "sigma": 0.5},
    "laplacian": {"name": "laplacian"},
    "laplacian narrow": {"name": "laplacian", "bandwidth": 0.02},
    "polynomial 1": {"name": "polynomial", "degree": 1},
    "polynomial 3": {"name": "polynomial"},
    "polynomial 5": {"name": "polynomial", "degree": 5, "coef0": -0.5},
    "polynomial 12": {"name": "polynomial", "degree": 12, "coef0": 0.0},
}
# Relative to the value, ten times that to the gradient's terms. What goes wrong without care is wrong by 1e-3 and more.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}


def _medians(squares, n):
    upper = sorted(squares[i, j] for i in range(n) for j in range(i + 1, n))
    return (mpmath.sqrt(upper[(len(upper) - 1) // 2]) + mpmath.sqrt(upper[len(upper) // 2])) / 2


def _sigma(x, options):
    """σ of a layer in mpmath's numbers, or None."""
    if options["name"] not in ("rbf", "laplacian"):
        return None
    if "sigma" in options:
        return mpmath.mpf(options["sigma"])
    return options.get("bandwidth", 1.0) * _medians(_squares(x), len(x))


def _squares(x):
    dots = x @ x.T
    q = np.diagonal(dots)
    return q[:, None] + q[None, :] - 2 * dots


def _kernel(x, options, sigma):
    name, each = options["name"], np.frompyfunc(mpmath.exp, 1, 1)
    root = np.frompyfunc(mpmath.sqrt, 1, 1)
    dots = x @ x.T
    if name == "linear":
        return dots
    if name == "cosine":
        norms = root(np.diagonal(dots))
        return dots / norms[:, None] / norms[None, :]
    if name == "polynomial":
        return (dots / x.shape[1] + mpmath.mpf(options.get("coef0", 1.0))) ** options.get("degree", 3)
    if name == "rbf":
        return each(-_squares(x) / (2 * sigma**2))
    return each(-root(abs(_squares(x))) / sigma)


def _centred(k, estimator):
    """H K H, or the U-centred matrix, which makes HSIC an inner product."""
    n = len(k)
    if estimator == "biased":
        k = k - k.mean(0)[None, :]
        return k - k.mean(1)[:, None]
    k = k - np.diag(np.diagonal(k))
    rows = k.sum(0)
    k = k - rows[None, :] / (n - 2) - rows[:, None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return k - np.diag(np.diagonal(k))


def _cka(x, y, options, estimator, sigmas):
    k, l = (_centred(_kernel(a, options, s), estimator) for a, s in zip((x, y), sigmas, strict=True))
    return (k * l).sum() / mpmath.sqrt((k * k).sum() * (l * l).sum())


def _exact(x):
    return np.array([[mpmath.mpf(v) for v in row] for row in x.double().tolist()], dtype=object)


def pair(rms, row, dtype, seed=0):
    """Two related layers, one row of the first many times as long, in this dtype; and a direction of each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.randn(N, WIDTHS[1], generator=generator, dtype=torch.float64)
    y[:, :4] += x
    x[3] *= row
    directions = [torch.randn(a.shape, generator=generator, dtype=torch.float64) * a.abs() for a in (x, y)]
    return [(a * rms).float().to(dtype) for a in (x, y)], [d * rms for d in directions]


@functools.cache
def truth(kernel, estimator, rms, row):
    """The value and its derivative along the direction of `pair`."""
    layers, directions = pair(rms, row, torch.float64)
    with mpmath.workdps(120):
        (x, y), (u, v) = map(_exact, layers), map(_exact, directions)
        options = KERNELS[kernel]
        sigmas = [_sigma(a, options) for a in (x, y)]
        step = mpmath.mpf(10) ** -40
        value, up, down = (_cka(x + h * u, y + h * v, options, estimator, sigmas) for h in (0, step, -step))
        return float(value), float((up - down) / (2 * step))


def rows_for(kernel, rms):
    """A fixed σ, whatever the distances, has its limits: exponents must have digits in float64, and differences of 1
    part in row² of them."""
    if kernel == "rbf fixed":
        return (1.0, 1e2) if rms <= 1 else ()
    return ROWS


def held_to_truth(kernel, estimator, rms, row, dtype, way=lambda f, x, y: f(x, y)):
    """`way` takes the measure and two layers that require gradients to its value."""
    (x, y), directions = pair(rms, row, dtype)
    value, slope = truth(kernel, estimator, rms, row)
    tolerance = TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32]
    a, b = x.requires_grad_(), y.requires_grad_()
    spec = pyrepr.Kernel(**KERNELS[kernel])
    with warnings.catch_warnings():
        warnings.simplefilter("error", pyrepr.DegenerateInputWarning)
        ours = way(lambda x, y: pyrepr.cka(x, y, kernel=spec, estimator=estimator), a, b)
    assert abs(ours.item() - value) <= tolerance * max(1, abs(value)), (ours.item(), value)
    grads = torch.autograd.grad(ours, (a, b))
    terms = [(g.double() * d) for g, d in zip(grads, directions, strict=True)]
    size = sum(float(t.abs().sum()) for t in terms)
    along = sum(float(t.sum()) for t in terms)
    assert math.isfinite(size) and abs(along - slope) <= 10 * tolerance * max(size, 1e-9), (along, slope, size)


@pytest.mark.levels
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("rms", RMS)
def test_any_magnitude(kernel, estimator, rms):
    for dtype in TOLERANCE:
        for row in rows_for(kernel, rms):
            held_to_truth(kernel, estimator, rms, row, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rms", [1e-25, 1e25])
def test_any_magnitude_by_the_reference(kernel, rms):
    with pyrepr.use_backend("reference"):
        for row in rows_for(kernel, rms):
            held_to_truth(kernel, "unbiased", rms, row, torch.float32)


def by_vmap(f, x, y):
    return torch.func.vmap(f)(x[None], y[None])[0]


def compiled(f, x, y):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")(x, y)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_any_magnitude_under_vmap(kernel, estimator):
    for dtype in TOLERANCE:
        for rms in RMS[::3]:
            for row in rows_for(kernel, rms):
                held_to_truth(kernel, estimator, rms, row, dtype, by_vmap)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_magnitude_compiled(kernel):
    for rms in (1e-25, 1e25):
        for row in rows_for(kernel, rms)[1:2]:
            held_to_truth(kernel, "unbiased", rms, row, torch.float32, compiled)


MAPPED = {
    "value": lambda f, x, v: f(x),
    "grad": lambda f, x, v: torch.func.grad(f)(x),
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "hvp": lambda f, x, v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
    "grad of grad": lambda f, x, v: torch.func.grad(lambda x: (torch.func.grad(f)(x) * v).sum())(x),
}


@pytest.mark.parametrize("kernel", ["linear", "cosine", "rbf narrow", "laplacian", "polynomial 5"])
@pytest.mark.parametrize("mode", MAPPED)
def test_entries_of_vmap_have_their_own_magnitude(kernel, mode):
    """Every order of derivative, of layers of four magnitudes at once and by vmap of vmap: what each has alone."""
    xs, y = torch.stack([pair(rms, 1e5, torch.float64)[0][0] for rms in RMS]), pair(1.0, 1.0, torch.float64)[0][1]
    spec, vs = KERNELS[kernel], xs.flip(1)
    measures = [
        lambda x: pyrepr.cka(x, y, kernel=pyrepr.Kernel(**spec)),
        lambda x: pyrepr.gram(x, kernel=pyrepr.Kernel(**spec)).tanh().sum(),
        lambda x: pyrepr.cka_matrix([x, y, y[:, :2]], kernel=pyrepr.Kernel(**spec)).square().sum(),
    ]
    for f in measures[: 1 if spec["name"] in ("linear", "polynomial") else 3]:
        ours = torch.func.vmap(lambda x, v, f=f: MAPPED[mode](f, x, v))(xs, vs)
        twice = torch.func.vmap(torch.func.vmap(lambda x, v, f=f: MAPPED[mode](f, x, v)))(xs[None], vs[None])
        alone = torch.stack([MAPPED[mode](f, x, v) for x, v in zip(xs, vs, strict=True)])
        assert alone.isfinite().all()
        for found in (ours, twice[0]):
            off = (found - alone).view(4, -1).norm(dim=1) / alone.view(4, -1).norm(dim=1).clamp_min(1e-300)
            assert off.max() < 1e-9, off


def test_a_mask_under_vmap():
    x, y = torch.randn(2, 12, 4) * 1e-25, torch.randn(12, 5)
    mask = torch.randn(2, 12) > -0.5
    ours = torch.func.vmap(lambda x, mask: pyrepr.cka(x, y, mask=mask))(x, mask)
    assert torch.equal(ours, torch.stack([pyrepr.cka(a, y, mask=m) for a, m in zip(x, mask, strict=True)]))


def textbook(x, y, estimator="unbiased"):
    """Linear CKA of float64 layers around a centre that a dominant row does not move."""
    centred = [a.double() - a.double().median(0).values for a in (x, y)]
    k, l = (a @ a.T for a in centred)
    n = len(k)
    if estimator == "biased":
        h = torch.eye(n, dtype=k.dtype) - 1 / n
        k, l = h @ k @ h, h @ l @ h
        return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())

    def u_centred(a):
        a = a - a.diagonal().diag()
        rows = a.sum(0) / (n - 2)
        a = a - rows[None, :] - rows[:, None] + rows.sum() / (n - 1)
        return a - a.diagonal().diag()

    k, l = u_centred(k), u_centred(l)
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


@pytest.mark.levels
@pytest.mark.parametrize("row", [1e3, 1e4, 1e5, 1e20])
@pytest.mark.parametrize("n", [40, 300])  # by tiles and by features
def test_a_dominant_row(n, row):
    x, y = torch.randn(n, 40), torch.randn(n, 50)
    y[:, :40] += x
    x[7] *= row
    for estimator in ("unbiased", "biased"):
        assert abs(pyrepr.cka(x, y, estimator=estimator).item() - textbook(x, y, estimator)) < 2e-5
        assert abs(pyrepr.cka_matrix([x, y], estimator=estimator)[1, 0].item() - textbook(x, y, estimator)) < 2e-5
    mask = torch.arange(2 * n) % 2 == 0
    doubled = [a.repeat_interleave(2, 0).index_fill(0, (~mask).nonzero()[:, 0], torch.nan) for a in (x, y)]
    assert abs(pyrepr.cka(*doubled, mask=mask).item() - textbook(x, y)) < 2e-5


@pytest.mark.levels
@pytest.mark.parametrize("n", [6, 8])
def test_very_wide_layers(n):
    """Sums of 2²⁰ products, and of inner products that are mostly what centring few rows leaves of their norms."""
    x = torch.randn(n, 1 << 20)
    y = torch.cat([x[:, : 1 << 18], torch.randn(n, 1 << 18)], 1)
    x.requires_grad_()
    value = pyrepr.cka(x, y)
    assert abs(value.item() - textbook(x.detach(), y)) < 1e-5  # worst seen 6e-7
    (ours,) = torch.autograd.grad(value, x)
    wide = x.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(pyrepr.cka(wide, y.double()), wide)
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.levels
@pytest.mark.parametrize("large", [100.0, 300.0, 1000.0])
@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_an_element_that_moves_the_mean_away_from_the_other_rows(kernel, large):
    for element in range(0, 102, 17):
        x, y = torch.randn(6, 17), torch.randn(6, 17)
        y.view(-1)[element] = large
        wide = pyrepr.cka(x.double(), y.double(), kernel=kernel)
        assert abs(pyrepr.cka(x, y, kernel=kernel) - wide) < 1e-4  # 7e-5 seen in 60 of them, 2.5e-4 without care


@pytest.mark.levels
def test_an_element_that_dwarfs_all_others():
    x, y = torch.randn(8, 9), torch.randn(8, 24)
    y[3, 4] = -1e5
    for kernel in ("rbf", "laplacian"):
        for estimator in ("unbiased", "biased"):
            value = pyrepr.cka(x, y, kernel=kernel, bandwidth=0.3, estimator=estimator)
            wide = pyrepr.cka(x.double(), y.double(), kernel=kernel, bandwidth=0.3, estimator=estimator)
            options = {"name": kernel, "bandwidth": 0.3}
            exact = [_exact(a) for a in (x, y)]
            expected = float(_cka(*exact, options, estimator, [_sigma(a, options) for a in exact]))
            assert abs(value.item() - expected) < 2e-5 and abs(wide.item() - expected) < 1e-9
        k = pyrepr.gram(y, kernel=kernel, bandwidth=0.3).double()
        expected = _kernel(exact[1], options, _sigma(exact[1], options)).astype(float)
        assert (k - torch.tensor(expected)).abs().max() < 2e-6


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"degree": 1}, {"degree": 2, "coef0": 0.0}, {"degree": 4, "coef0": -0.5}])
def test_what_centring_leaves_of_a_kernel_bounds_the_digits(n, options):
    """Rows that nearly lie on one line: entries rounded to 2⁻⁵³ of the largest, of which centring leaves a rest.

    Of two samples the biased value is 1 or −1 whatever the entries; it has the same rounding all the same.
    """
    spec, y = {"name": "polynomial", **options}, torch.randn(n, 3, dtype=torch.float64)
    seen = 0
    for trial in range(24):
        away = 10.0 ** -(trial % 6)
        x = torch.randn(1, 5, dtype=torch.float64) + away * torch.randn(n, 5, dtype=torch.float64)
        value = pyrepr.cka(x, y, kernel=pyrepr.Kernel(**spec), estimator="biased")
        with mpmath.workdps(60):
            layers = _exact(x), _exact(y)
            expected = float(_cka(*layers, spec, "biased", [None, None]))
            worst = 1.0
            for layer in layers:
                k = _kernel(layer, spec, None) - mpmath.mpf(spec.get("coef0", 1.0)) ** spec.get("degree", 3)
                left = _centred(k, "biased")
                worst = max(worst, float(abs(k).max() / mpmath.sqrt((left * left).sum())))
        if 2.0**-53 * worst < 1e-10:  # beyond that it may be called rounding, and NaN
            seen += 1
            assert abs(value.item() - expected) < 64 * 2.0**-53 * worst, (value.item(), expected, worst)
    assert seen > 6


@pytest.mark.levels
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e19, 1e25])
def test_gram_matrices_of_any_magnitude(scale):
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    for kernel, factor in (("rbf", 1.0), ("laplacian", 1.0), ("cosine", 1.0), ("polynomial", scale**-2)):
        gamma = {"gamma": factor} if kernel == "polynomial" else {}
        for other in (None, y):
            expected = pyrepr.gram(x, other, kernel=pyrepr.Kernel(kernel, gamma=1.0 if gamma else None))
            some = (x * scale).float(), None if other is None else (y * scale).float()
            ours = pyrepr.gram(*some, kernel=pyrepr.Kernel(kernel, **gamma))
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_inner_products_of_zero_are_no_similarity(backend_name):
    """Different rows of these have inner products of 0, so that self-HSIC is exactly 0, and CKA no number."""
    x, y = torch.eye(9)[:, :4], torch.eye(9)[:, 2:7]
    for dtype in TOLERANCE:
        with (
            pyrepr.use_backend(backend_name),
            pytest.warns(pyrepr.DegenerateInputWarning, match="x, y: all samples have the same features, or"),
        ):
            assert pyrepr.cka(x.to(dtype), y.to(dtype)).isnan()
    assert abs(pyrepr.cka(x, y, estimator="biased").item() - textbook(x, y, "biased")) < 1e-6


@pytest.mark.levels
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_hsic_is_multiplied_back(scale):
    """Values that float32 holds are right, whatever they are made of; others become 0 or infinite."""
    x, y = torch.randn(30, 5), torch.randn(30, 4)
    y += x[:, :4]
    for kernel in ("linear", "cosine", "polynomial", "rbf"):
        spec = pyrepr.Kernel(kernel, degree=2, sigma=2 * scale if kernel == "rbf" else None, coef0=0.0)
        own = [pyrepr.Kernel(kernel, degree=2, sigma=2.0 if kernel == "rbf" else None, coef0=0.0)]
        power = {"linear": 4, "polynomial": 8}.get(kernel, 0)
        expected = pyrepr.hsic(x.double(), y.double(), kernel=own[0]) * scale**power
        value = pyrepr.hsic(x * scale, y * scale, kernel=spec)
        torch.testing.assert_close(value, expected.float(), rtol=2e-5, atol=0)
        wide = pyrepr.hsic(x.double() * scale, y.double() * scale, kernel=spec)
        torch.testing.assert_close(wide, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e19])
@pytest.mark.parametrize("row", [1.0, 1e4])
def test_streams_of_any_magnitude(scale, row):
    x, y = torch.randn(60, 6), torch.randn(60, 5)
    y += x[:, :5]
    x[7] *= row
    x, y = x * scale, y * scale
    for estimator in ("unbiased", "biased"):
        stream, moments = pyrepr.StreamingCKA(estimator=estimator), LayerMoments()
        for a, b in zip(x.split(20), y.split(20), strict=True):
            stream.update([a], [b])
            moments.update([a], [b])
        expected = textbook(x.double() / scale, y.double() / scale, estimator)
        assert abs(stream.compute().item() - expected) < 2e-5
        assert abs(pyrepr.similarity.CKA(estimator=estimator).of_moments(moments).item() - expected) < 2e-5
    batches = pyrepr.StreamingCKA(mode="minibatch", kernel="polynomial").update([x], [y])
    assert abs(batches.compute().item() - pyrepr.cka(x, y, kernel="polynomial").item()) < 1e-6


def test_losses_and_16_bit_layers_keep_their_gradients():
    x, y = (torch.randn(16, 8) * 1e20).requires_grad_(), torch.randn(16, 8)
    pyrepr.nn.CKALoss(kernel="cosine")(x, y).backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()
    narrow = (torch.randn(16, 8) * 1e25).bfloat16().requires_grad_()
    value = pyrepr.cka(narrow, y.bfloat16(), kernel="polynomial")
    expected = pyrepr.cka(narrow.detach().double(), y.bfloat16().double(), kernel="polynomial")
    assert value.dtype == torch.float32 and abs(value.item() - expected.item()) < 1e-6
    value.backward()
    assert narrow.grad.dtype == torch.bfloat16 and torch.isfinite(narrow.grad).all()


def test_other_modes_of_differentiation_reach_the_careful_way():
    x, y = torch.randn(12, 4) * 1e-20, torch.randn(12, 4)
    first = torch.func.grad(lambda a: pyrepr.cka(a, y))(x)
    x = x.requires_grad_()
    (second,) = torch.autograd.grad(pyrepr.cka(x, y), x, create_graph=True)
    torch.testing.assert_close(first, second)
    tangent = torch.randn(12, 4) * 1e-20
    _, along = torch.func.jvp(lambda a: pyrepr.cka(a, y), (x.detach(),), (tangent,))
    torch.testing.assert_close(along, (second.detach() * tangent).sum(), rtol=1e-4, atol=1e-6)
    (third,) = torch.autograd.grad((second * tangent).sum(), x)
    assert torch.isfinite(third).all() and third.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laplacian_gradients_of_rows_that_nearly_meet(dtype):
    """Rows 1e-4 apart, whose distance the norms of rows do not have in them: the derivative goes by its direction."""
    x, y = torch.randn(17, 1, dtype=torch.float64), torch.randn(17, 6)
    x[5], x[9] = x[2] + 1e-4, x[3]
    x, y = x.to(dtype), y.to(dtype)
    wide = x.double().requires_grad_()
    # |x_i − x_j| word for word; identical rows have a derivative of 0.
    k = torch.exp(-(wide - wide.T).abs() / 3)
    l = torch.exp(-torch.cdist(y.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist") / 3)
    h = torch.eye(17, dtype=torch.float64) - 1 / 17
    k, l = h @ k @ h, h @ l @ h
    ((k * l).sum() / (k.square().sum() * l.square().sum()).sqrt()).backward()
    for run in (torch.func.grad, lambda f: lambda a: torch.func.vmap(torch.func.grad(f))(a[None])[0]):
        ours = run(lambda a: pyrepr.cka(a, y, kernel="laplacian", sigma=3.0, estimator="biased"))(x)
        off = (ours.double() - wide.grad).abs().max() / wide.grad.abs().max()
        assert off < {torch.float32: 2e-4, torch.float64: 1e-11}[dtype]  # 7e-2 and 1e-10 by norms


@pytest.mark.levels
@pytest.mark.parametrize("off", [0.0, 1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("n", [7, 200])
def test_laplacian_of_rows_that_meet(n, off):
    """Samples that occur more than once, or nearly so: float32 alone gave kernels wrong by 9e-3, CKA by 1e-4."""
    kinds = torch.randn(max(3, n // 10), 48)
    x = kinds[torch.arange(n) % len(kinds)] + off * torch.randn(n, 48)
    y = torch.randn(n, 5) + x[:, :5]
    distances = [(a.double()[:, None] - a.double()[None]).square().sum(2).sqrt() for a in (x, y)]
    for sigma in (1.0, 8.0):
        k, l = (torch.exp(-d / sigma) for d in distances)
        assert (pyrepr.gram(x, kernel="laplacian", sigma=sigma).double() - k).abs().max() < 2e-6
        h = torch.eye(n, dtype=k.dtype) - 1 / n
        k, l = h @ k @ h, h @ l @ h
        expected = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
        value = pyrepr.cka(x, y, kernel="laplacian", sigma=sigma, estimator="biased")
        assert abs(value.double() - expected) < 2e-6  # worst seen 1e-7
        masked = torch.cat([x, 1e9 * x[:2]]), torch.cat([y, y[:2]])
        mask = torch.arange(n + 2) < n
        value = pyrepr.cka(*masked, kernel="laplacian", sigma=sigma, estimator="biased", mask=mask)
        assert abs(value.double() - expected) < 2e-6


@pytest.mark.parametrize("symmetric", [True, False])
def test_laplacian_gram_gradients_of_rows_that_nearly_meet(symmetric):
    x = torch.randn(9, 3)
    x[4] = x[1] + 1e-4 * torch.tensor([1.0, -2.0, 2.0])
    pull = torch.randn(9, 9, dtype=torch.float64)
    ours, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    others = [None, None] if symmetric else [x.flip(0).requires_grad_(), x.double().flip(0).requires_grad_()]
    (pyrepr.gram(ours, others[0], kernel="laplacian", sigma=1.0).double() * pull).sum().backward()
    b = wide if symmetric else others[1]
    step = wide[:, None] - b[None]
    length = (step.square().sum(2) + (step == 0).all(2)).sqrt() * ~(step == 0).all(2)
    (torch.exp(-length) * pull).sum().backward()
    for got, truth in [(ours, wide)] + [(others[0], others[1])] * (not symmetric):
        # The value itself has a distance made of norms in it, 1e-4 off where rows nearly meet; directions were by 1.
        assert (got.grad.double() - truth.grad).abs().max() < 3e-4 * truth.grad.abs().max()


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("signs", [[1, -1, 1, 1], [1, 1, 1, 1, 1, 1, 1, -1]])
def test_cosines_of_rows_on_one_line_are_no_similarity(backend_name, signs):
    """All but one of the same sign: the kernel off its diagonal is r_i + r_j, and unbiased self-HSIC exactly 0."""
    x = torch.tensor(signs, dtype=torch.float64)[:, None] * torch.rand(len(signs), 1, dtype=torch.float64)
    y = torch.randn(len(signs), 5, dtype=torch.float64)
    for dtype in TOLERANCE:
        for width in (1, 15):
            with (
                pyrepr.use_backend(backend_name),
                pytest.warns(pyrepr.DegenerateInputWarning, match="[xy]: all samples"),
            ):
                line = x.expand(-1, width).to(dtype)
                assert pyrepr.cka(line, y.to(dtype), kernel="cosine").isnan()
                assert pyrepr.nn.CKALoss(kernel="cosine")(y.to(dtype), line).isnan()


def test_a_layer_beyond_its_numbers_leaves_the_others_theirs():
    """A layer that became infinite beside one that needs care: NaN where it is meant, numbers elsewhere."""
    x, y = torch.randn(33, 7), torch.randn(33, 4)
    x[2, 3] = 1000.0
    far = torch.full((33, 5), torch.inf)
    for kernel in ("rbf", "laplacian", "polynomial", "cosine", "linear"):
        sigma = {"sigma": 1.0} if kernel in ("rbf", "laplacian") else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = pyrepr.cka_matrix([x, far], [y], kernel=kernel, **sigma)
            alone = pyrepr.cka(x, y, kernel=kernel, **sigma)
        assert table[1, 0].isnan()
        torch.testing.assert_close(table[0, 0], alone, rtol=1e-5, atol=1e-7, equal_nan=True)
        assert table[0, 0].isfinite()


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_float64_keeps_its_digits_beside_a_long_row(backend_name):
    """One element of -1e5, which cost up to 1e-10, and features around 1000, which the reference called alike."""
    long = torch.randn(17, 16, dtype=torch.float64)
    long[3, 5] = -1e5
    around = torch.randn(17, 8, dtype=torch.float64) + 1000
    y = torch.randn(17, 4, dtype=torch.float64)
    cases = (("linear", long, {}), ("rbf", long, {"sigma": 3.0}), ("laplacian", long, {"sigma": 3.0}))
    cases += (("polynomial 1", around, {"degree": 1, "coef0": 2.0}),)
    for name, x, options in cases:
        spec = {"name": name.split()[0], **options}
        with mpmath.workdps(60):
            sigmas = [_sigma(a, spec) for a in (x, y)]
            expected = float(_cka(_exact(x), _exact(y), spec, "unbiased", sigmas))
        with pyrepr.use_backend(backend_name):
            ours = pyrepr.cka(x, y, kernel=pyrepr.Kernel(**spec))
        # Inner products around 1000² hold what sets rows apart to 1e-9.
        assert abs(ours.item() - expected) < (5e-9 if x is around else 1e-12), name


def test_a_centre_of_an_expanded_layer():
    """torch's median of rows that are one in memory is another number, from beyond its end."""
    row = torch.randn(1, 3, dtype=torch.float64)
    assert torch.equal(robust_centre(row.expand(33, 3)), row[0])


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "cosine", "polynomial"])
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_16_bit_gradients_are_those_of_the_numbers_they_hold(backend_name, kernel):
    """Rounded once, at the end: the mean row is none of 16 bits, which moved inner products from their norms."""
    x, y = torch.randn(16, 3).bfloat16(), torch.randn(16, 24).bfloat16()
    options = {"sigma": 3.0} if kernel in ("rbf", "laplacian") else {}

    def run(*layers):
        layers = [a.clone().requires_grad_() for a in layers]
        pyrepr.cka(*layers, kernel=kernel, estimator="biased", **options).backward()
        return [a.grad for a in layers]

    with pyrepr.use_backend(backend_name):
        for ours, truth in zip(run(x, y), run(x.double(), y.double()), strict=True):
            assert (ours.double() - truth).abs().max() < 2.0**-8 * truth.abs().max()


def test_a_median_between_near_and_far_rows():
    """Of six distances three are around 8 and three around 1e8: the median is the mean of one of each."""
    x = torch.randn(4, 33, dtype=torch.float64)
    x[1, 3] = 1e8
    squares = (x[:, None] - x[None]).square().sum(2)
    sigma = squares[tuple(torch.triu_indices(4, 4, 1))].sqrt().sort().values[2:4].mean()
    expected = torch.exp(-squares.sqrt() / sigma)
    found = pyrepr.gram(x, kernel="laplacian")
    torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)  # as norms of 6e14 hold a distance of 8


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize("cut", [2, 3, 5])
def test_streams_whose_first_batch_has_a_long_row(backend_name, cut):
    """Centred around a third of it, all later rows are far from the origin: float32 gave -0.03 for -0.19."""
    for row in range(2):
        x, y = torch.randn(11, 17), torch.randn(11, 2)
        x[row, 7] = -1e5
        with pyrepr.use_backend(backend_name):
            stream = pyrepr.StreamingCKA()
            for a, b in ((x[:cut], y[:cut]), (x[cut:], y[cut:])):
                stream.update([a], [b])
            assert abs(stream.compute().item() - textbook(x.double(), y.double(), "unbiased")) < 1e-4
