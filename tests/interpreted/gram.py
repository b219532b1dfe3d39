"""Triton kernels of family `gram` against the textbook in float64, interpreted on the CPU.

Tolerances are the worst errors seen here times about 4. Centred 16-bit features are rounded to 11 bits once more, which
is all that bfloat16 and float16 add (see kernels/gram).
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import pyrepr
from pyrepr.ops import gram as ops
from pyrepr.reference import gram as reference

KERNELS = reference.KERNELS
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def spec(kernel):
    return pyrepr.Kernel(kernel, sigma=6.0, gamma=0.02)


def truth(x, y, kernel="linear", estimator="unbiased"):
    scale = 0.02 if kernel == "polynomial" else 6.0
    x, y = x.double(), y.double()
    if kernel in reference.SHIFT_INVARIANT:
        x, y = x - x.mean(0), y - y.mean(0)
    k, l = (reference.kernel_matrix(a, a, kernel, scale, 3, 1.0) for a in (x, y))
    xy, xx, yy = (reference.hsic_of_kernels(a, b, estimator) for a, b in ((k, l), (k, k), (l, l)))
    return xy / (xx * yy).sqrt()


def layers(n, widths, dtype=torch.float32):
    shared = torch.randn(n, max(widths))
    return [(shared[:, :d] + torch.randn(n, d)).to(dtype) for d in widths]


def close(value, expected, tolerance):
    assert abs(float(value) - float(expected)) <= tolerance * max(1.0, abs(float(expected)))


@pytest.mark.parametrize(
    ("kernel", "estimator", "dtype"),
    [(kernel, "unbiased", torch.float32) for kernel in KERNELS]
    + [(kernel, "biased", torch.float32) for kernel in ("linear", "rbf")]
    + [(kernel, "unbiased", dtype) for kernel in ("linear", "rbf") for dtype in (torch.bfloat16, torch.float16)],
)
def test_pair(kernel, estimator, dtype):
    # Two rows of tiles for the linear kernel, whose pairs have a kernel of their own.
    x, y = layers(150 if kernel == "linear" else 100, (170, 133), dtype)
    value = pyrepr.cka(x, y, kernel=spec(kernel), estimator=estimator)
    assert value.dtype == torch.float32
    close(value, truth(x, y, kernel, estimator), TOLERANCE[dtype])


@pytest.mark.parametrize(("n", "p", "q"), [(4, 1, 1), (5, 3, 200), (128, 64, 65), (129, 300, 1), (40, 257, 500)])
def test_awkward_shapes(n, p, q):
    x, y = layers(n, (p, q))
    for kernel in ("linear", "rbf"):
        close(pyrepr.cka(x, y, kernel=spec(kernel)), truth(x, y, kernel), 1e-5)


# at_once: tiles that go through the slab together, of three for n = 140
@pytest.mark.parametrize(
    ("kernel", "n", "at_once"), [("linear", 140, 1), ("rbf", 140, 2), *((kernel, 100, 9) for kernel in KERNELS)]
)
def test_all_pairs_through_the_slab(kernel, n, at_once, monkeypatch):
    from pyrepr.kernels.gram import _hosts as kernels

    monkeypatch.setattr(kernels, "SLAB_BYTES", at_once * 4 * 3 * 128 * 128)  # two float16 an entry
    xs = layers(n, (300, 500, 270))
    table = pyrepr.cka_matrix(xs, kernel=spec(kernel))
    for a in range(3):
        for b in range(3):
            close(table[a, b], truth(xs[a], xs[b], kernel), 2e-6)


def test_more_layers_than_a_block_of_them():
    xs = layers(20, (30,) * 66)
    table = pyrepr.cka_matrix(xs, kernel=spec("cosine"))
    for a, b in ((0, 65), (64, 3), (40, 62), (17, 17)):
        close(table[a, b], truth(xs[a], xs[b], "cosine"), 2e-6)


def test_features_route_and_split():
    xs, ys = layers(300, (5, 130, 30)), layers(300, (9, 7))
    assert pyrepr.similarity.choose_route(300, [5, 130, 30], [9, 7]) == "features"
    own, cross = pyrepr.cka_matrix(xs), pyrepr.cka_matrix(xs, ys)
    for a, x in enumerate(xs):
        for b, y in enumerate(xs):
            close(own[a, b], truth(x, y), 2e-6)
        for b, y in enumerate(ys):
            close(cross[a, b], truth(x, y), 2e-6)


@pytest.mark.parametrize(
    ("kernel", "n", "p", "q"),
    # Rows of weights as long as a multiple of 16, and others.
    [("linear", 140, 9, 20), ("linear", 40, 90, 70), ("rbf", 140, 9, 20), *((k, 40, 90, 70) for k in KERNELS[1:])]
    + [(k, 48, 90, 70) for k in ("linear", "rbf")],
)
def test_gradient(kernel, n, p, q):
    x, y = layers(n, (p, q))
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    pyrepr.cka(a, b, kernel=spec(kernel)).backward()
    c, d = x.double().requires_grad_(), y.double().requires_grad_()
    truth(c, d, kernel).backward()
    for ours, theirs in ((a.grad, c.grad), (b.grad, d.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_mask_is_selection_whatever_the_other_rows_hold(kernel):
    x, y = layers(150, (20, 30))
    mask = torch.rand(150) < 0.5
    x[~mask] = torch.nan
    a, c = x.clone().requires_grad_(), x.clone().requires_grad_()
    masked = pyrepr.cka(a, y, kernel=spec(kernel), mask=mask)
    selected = pyrepr.cka(c[mask], y[mask], kernel=spec(kernel))
    close(masked, selected, 1e-6)
    masked.backward()
    selected.backward()
    assert not a.grad[~mask].any()
    torch.testing.assert_close(a.grad[mask], c.grad[mask], rtol=1e-4, atol=1e-5 * float(c.grad[mask].abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("large", [False, True])
def test_gram_matrix(kernel, large, monkeypatch):
    from pyrepr.kernels.gram import _hosts as kernels

    monkeypatch.setattr(kernels, "LARGE", 0 if large else 1 << 40)
    x, y = torch.randn(150, 20), 100 * torch.randn(33, 20)
    scale = 0.02 if kernel == "polynomial" else 6.0
    for other in (None, y, y[:0]):
        expected = reference.kernel_matrix(x.double(), (x if other is None else other).double(), kernel, scale, 3, 1.0)
        ours = pyrepr.gram(x, other, kernel=spec(kernel))
        assert ours.shape == expected.shape
        if expected.numel():
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
        assert other is not None or torch.equal(ours, ours.T)


@pytest.mark.parametrize("n", [2, 3, 60, 150])
def test_median_distance(n):
    x = torch.randn(n, 4) + 3
    expected = torch.pdist(x.double()).sort().values
    expected = (expected[(len(expected) - 1) // 2] + expected[len(expected) // 2]) / 2
    close(ops.median_op([x, x], None, True)[0][1], expected, 2e-6)
    mask = torch.arange(2 * n) % 2 == 0
    close(ops.median_op([x.repeat_interleave(2, 0)], mask, True)[0], expected, 2e-6)


def test_streaming():
    xs = layers(200, (30, 140, 3))
    streaming = pyrepr.StreamingCKA()
    for start in range(0, 200, 50):
        part = [x[start : start + 50] for x in xs]
        streaming.update(part[:2], part[2:])
    table = streaming.compute()
    close(table[0, 0], truth(xs[0], xs[2]), 2e-6)
    close(table[1, 0], truth(xs[1], xs[2]), 2e-6)


@pytest.mark.parametrize("ratio", [1, 10, 1000])
def test_large_means_cost_no_digits(ratio):
    x, y = (a + ratio * a.std() for a in layers(100, (60, 90)))
    close(pyrepr.cka(x, y), truth(x, y), 2e-6)
    close(pyrepr.cka_matrix([x, y, x])[0, 1], truth(x, y), 2e-6)


@pytest.mark.parametrize("kernel", ["linear", "polynomial"])
def test_one_sample_far_from_all_others(kernel):
    """Its tile holds values 100 times as large as the others. Worst seen: 1.3e-7."""
    xs = layers(150, (200, 300, 250))
    for x in xs:
        x[3] *= 10
    table = pyrepr.cka_matrix(xs, kernel=spec(kernel))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        close(table[a, b], truth(xs[a], xs[b], kernel), 5e-7)


@pytest.mark.parametrize("power", [-60, 0, 40])
def test_units_do_not_matter(power):
    x, y = layers(50, (30, 60))
    close(pyrepr.cka(x * 2.0**power, y), pyrepr.cka(x, y), 1e-7)


def test_nan_and_infinity_reach_the_result_and_no_further():
    for bad in (torch.nan, torch.inf):
        xs = layers(30, (40, 50, 60))
        xs[1][7, 2] = bad
        for table in (pyrepr.cka_matrix(xs), pyrepr.cka_matrix(xs, kernel="rbf", sigma=6.0)):
            assert table[1].isnan().all() and table[:, 1].isnan().all()
            assert torch.isfinite(table[0, 2]) and torch.isfinite(table[0, 0])
        assert pyrepr.cka(xs[0], xs[1], kernel="rbf").isnan()


def test_constant_features_give_nan():
    x, y = torch.full((20, 5), 12345.678), torch.randn(20, 3)
    for kernel in KERNELS:
        with pytest.warns(pyrepr.DegenerateInputWarning, match="x: all samples have the same features"):
            assert pyrepr.cka(x, y, kernel=spec(kernel)).isnan()


def test_loss_in_bfloat16_and_other_strides():
    student, guide = torch.randn(60, 4, 12).bfloat16(), torch.randn(30, 60).T
    student.requires_grad_()
    loss = pyrepr.nn.CKALoss()(student.float(), guide)
    close(loss, 1 - truth(student.detach().flatten(1), guide), 1e-6)
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_same_bits_twice():
    xs = layers(100, (140, 200, 130))
    assert torch.equal(pyrepr.cka_matrix(xs, kernel=spec("rbf")), pyrepr.cka_matrix(xs, kernel=spec("rbf")))


def test_float64_is_refused():
    x = torch.randn(20, 3).double()
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16 layers, got torch"):
        pyrepr.cka(x, x)


class Launches(TorchDispatchMode):
    """What a GPU would be asked for besides Triton's kernels: every op that is not a view or an allocation.

    Small tables of sizes are made once (lift_fresh).
    """

    FREE = ("empty", "view", "select", "slice", "detach", "alias", "unsqueeze", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("pyrepr."):
            with self:  # its implementation, which would not be seen otherwise
                return function.redispatch(IMPLEMENTATION, *args, **(kwargs or {}))
        if not any(free in name for free in self.FREE):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def unseen(function):
    def run(*args):
        with _disable_current_modes():
            return function(*args)

    return run


IMPLEMENTATION = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.mark.parametrize(
    ("n", "widths", "features", "kernels"),
    [
        (200, (20, 33), True, ["fit", "pack_layers", "parts", "squares", "reduce", "values"]),
        (60, (200, 170), False, ["fit", "pack_layers", "pair", "reduce", "values"]),
        (40, (9,) * 24, False, ["fit", "pack_layers", "tiles", "products", "reduce", "values"]),
    ],
)
def test_cka_of_all_pairs_takes_six_launches(n, widths, features, kernels, only_listed_variants, monkeypatch):
    from pyrepr.kernels.gram import _cka, _hosts

    monkeypatch.setattr(_cka, "by_features", lambda *sizes: features)
    monkeypatch.setattr(_hosts, "processors", lambda device: 132)
    monkeypatch.setattr(_hosts, "SHORTEST", 128)
    monkeypatch.setattr("pyrepr.similarity._hsic._warn", lambda *of: None)  # which looks at numbers on the CPU alone
    for module in (_cka, _hosts):  # what the interpreter does with a kernel's arguments is not asked of a GPU
        monkeypatch.setattr(module, "launch", unseen(module.launch))
    xs = layers(n, widths)
    with Launches() as launches:
        table = pyrepr.cka_matrix(xs) if len(xs) > 2 else pyrepr.cka(*xs)
    names = [variant.name.split()[0] for variant in only_listed_variants]
    assert names == kernels and len(names) + len(launches.seen) <= 6, launches.seen
    close(table if len(xs) == 2 else table[0, 1], truth(xs[0], xs[1]), 1e-6)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("split", [0, 1])
def test_both_routes_to_all_values_and_a_table_between_two_networks(estimator, split, monkeypatch):
    from pyrepr.kernels.gram import _cka

    xs = layers(70, (20, 150, 33), torch.float16)
    xs[2] = xs[2][:, :1].expand(70, 33) * 0 + 3  # all alike: NaN
    expected = reference.gram_hsic(xs, estimator, split, True, False, False, False)
    for features in (False, True):
        monkeypatch.setattr(_cka, "by_features", lambda *sizes, features=features: features)
        values, degenerate, *_ = ops.at_once_op(xs, estimator, split, True, False, False, False)
        assert degenerate.tolist() == expected[1].tolist() == [0, 0, 1]
        part = (slice(0, split or None), slice(split, None))
        torch.testing.assert_close(values[part], expected[0][part], rtol=0, atol=1e-4, equal_nan=True)
    with pytest.raises(RuntimeError, match="up to 64 layers at once, got 65"):
        ops.at_once_op([xs[0]] * 65, "unbiased", 0, True, False, False, False)


def test_which_route_a_gpu_takes():
    from pyrepr.kernels.gram._cka import by_features

    assert by_features(16384, (1024, 1024), 1, 132)
    assert by_features(1 << 20, (128, 128), 1, 132)  # three tiles, cut along the samples
    assert not by_features(4096, (16384, 16384), 1, 132)
    assert not by_features(1024, (1024,) * 24, 0, 132)
