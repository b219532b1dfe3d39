"""Family `measures`: gram, hsic, cka, cka_matrix in every kernel. Truth: centring matrices in long double."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from draw import EPS, Case, Differential, Draw, compare, f64

DISTANCES = ("rbf", "laplacian")
KERNELS = ("linear", "rbf", "laplacian", "polynomial", "cosine")
KINK = 3e-6  # the steps of differences are a tenth of it
FACTOR = 400  # of the change that rounding the inputs makes; errors seen stay below a tenth


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x_i − y_j|², without cancellation. x: [n, d], y: [m, d] -> [n, m]."""
    difference = x[:, None] - y[None]
    return (difference * difference).sum(-1)


def median(x: np.ndarray) -> Any:
    upper = np.triu_indices(len(x), 1)
    d = np.sort(np.sqrt(distances(x.real, x.real)[upper]))
    return (d[(len(d) - 1) // 2] + d[len(d) // 2]) / 2


def kernel_matrix(x: np.ndarray, y: np.ndarray, kernel: dict[str, Any], base: np.ndarray | None = None) -> np.ndarray:
    """k(x_i, y_j); the median is that of `base`, by default of x."""
    name = kernel["name"]
    if name == "linear":
        return x @ y.T
    if name == "polynomial":
        gamma = kernel.get("gamma")
        return (
            (1 / max(1, x.shape[1]) if gamma is None else gamma) * (x @ y.T) + kernel.get("coef0", 1.0)
        ) ** kernel.get("degree", 3)
    if name == "cosine":
        unit = [a / np.where(np.real(norm := np.sqrt((a * a).sum(1, keepdims=True))) == 0, 1, norm) for a in (x, y)]
        return unit[0] @ unit[1].T
    return np.exp(-exponents(x, y, kernel, x if base is None else base))


def exponents(x: np.ndarray, y: np.ndarray, kernel: dict[str, Any], base: np.ndarray) -> np.ndarray:
    """−log k of the kernels of distances; the median is that of `base`."""
    sigma = kernel.get("sigma")
    sigma = kernel.get("bandwidth", 1.0) * median(base) if sigma is None else sigma
    d2 = distances(x, y)
    if kernel["name"] == "rbf":
        return d2 / (2 * sigma * sigma)
    return np.where(np.real(d2) == 0, 0, np.sqrt(np.where(np.real(d2) == 0, 1, d2))) / sigma


def lost_by_norms(x: np.ndarray, kernel: dict[str, Any], exponent: np.ndarray) -> Any:
    """How much nearer or farther rows that all but meet may seem to laplacian: squared distances are made of norms, and
    the root makes their rounding its own root, 1e-4 of the rows in float32 and 1e-8 in float64."""
    if kernel["name"] != "laplacian":
        return 0.0
    q = distances(x, x.mean(0)[None])
    change = Noise.symmetric(Noise.unit, exponent.shape) * (q + q.T) * (1 - np.eye(len(x)))
    d2 = distances(x, x)
    unit = np.sqrt(d2.max(initial=0)) / max(exponent.max(initial=0), 1e-4000)  # σ
    return (np.sqrt(np.maximum(d2 + change, 0)) - np.sqrt(d2)) / (unit or 1)


def off_constant(x: np.ndarray, kernel: dict[str, Any], scaled: bool) -> tuple[np.ndarray, float]:
    """k(x_i, x_j) minus a constant, which no HSIC notices, and the constant: that of rows at 0 or all alike, where the
    others differ from it by less than their digits hold. `scaled`: only the direction of what is off the diagonal
    matters, so where all rows are far apart the largest is 1."""
    name = kernel["name"]
    if name == "polynomial" and (c := kernel.get("coef0", 1.0)):
        gamma, degree = kernel.get("gamma"), kernel.get("degree", 3)
        z = (1 / max(1, x.shape[1]) if gamma is None else gamma) * (x @ x.T)
        return sum(math.comb(degree, i) * z**i * c ** (degree - i) for i in range(1, degree + 1)), c**degree
    if name not in DISTANCES:
        return kernel_matrix(x, x, kernel), 0.0
    exponent = exponents(x, x, kernel, x)
    nearest = np.real(exponent)[~np.eye(len(x), dtype=bool)].min(initial=np.inf)
    if Noise.unit:  # of rows very far apart, differences of exponents have no digits left, in float64 either
        exponent = exponent + exponent * Noise.symmetric(EPS[torch.float64], exponent.shape)
        exponent = np.maximum(exponent + lost_by_norms(x, kernel, exponent), 0)
    if nearest < 1:
        return np.expm1(-exponent), 1.0
    return np.exp(np.where(np.eye(len(x)), -np.inf, nearest - exponent) if scaled else -exponent), 0.0


def centred_matrix(k: np.ndarray, estimator: str) -> np.ndarray:
    """HKH, or what adds up to 0 in every row without the diagonal (Székely and Rizzo 2014).

    Products of these have no terms that cancel, as Song's formula has where a kernel is all but constant.
    """
    n = len(k)
    if estimator == "biased":
        return k - k.mean(0) - k.mean(1, keepdims=True) + k.mean()
    off = 1 - np.eye(n)
    k = (k - (k * off).sum() / (n * (n - 1))) * off
    return (k - (k.sum(0) + k.sum(1, keepdims=True)) / (n - 2) + k.sum() / ((n - 1) * (n - 2))) * off


def hsic_of(k: np.ndarray, l: np.ndarray, estimator: str) -> Any:
    n = len(k)
    k, l = (centred_matrix(a, estimator) for a in (k, l))
    return (k * l.T).sum() / ((n - 1) ** 2 if estimator == "biased" else n * (n - 3))


def normalised(k: np.ndarray, l: np.ndarray, estimator: str) -> Any:
    """CKA of two kernel matrices; NaN where what centring leaves of one is no more than its entries' rounding."""
    xy, *own = (hsic_of(a, b, estimator) for a, b in ((k, l), (k, k), (l, l)))
    eps, counted = np.finfo(k.dtype).eps, 1 - np.eye(len(k)) * (estimator == "unbiased")
    for a, square in zip((k, l), own, strict=True):
        if np.real(square) <= (16 * eps * np.abs(a * counted).max(initial=0)) ** 2:
            return xy * np.nan
    return xy / (np.sqrt(own[0]) * np.sqrt(own[1]))


def centred_rows(x: np.ndarray) -> np.ndarray:
    return x - x.mean(0)


class Noise:
    """While entered, every kernel matrix has entries rounded at random to a unit of `eps`."""

    unit = 0.0
    rng = np.random.default_rng(0)

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __enter__(self) -> None:
        Noise.unit, Noise.rng = self.eps, np.random.default_rng(1)

    def __exit__(self, *error: Any) -> None:
        Noise.unit = 0.0

    @classmethod
    def symmetric(cls, unit: float, shape: tuple[int, ...]) -> np.ndarray:
        """[n, n] of ± unit."""
        upper = np.triu(unit * cls.rng.choice([-1.0, 1.0], shape))
        return upper + np.triu(upper, 1).T


def matrices(x: np.ndarray, y: np.ndarray, kernel: dict[str, Any], scaled: bool = False) -> list[np.ndarray]:
    """K and L of layers x and y, up to a constant; `scaled`: also up to a factor, and without their diagonals."""
    if kernel["name"] == "linear":
        x, y = centred_rows(x), centred_rows(y)
    found, constants = zip(*(off_constant(a, kernel, scaled) for a in (x, y)), strict=True)
    if Noise.unit:
        found = tuple(
            k + (k + constant) * Noise.symmetric(Noise.unit, k.shape)
            for k, constant in zip(found, constants, strict=True)
        )
    return list(found)


def cka_of(x: np.ndarray, y: np.ndarray, kernel: dict[str, Any], estimator: str) -> Any:
    return normalised(*matrices(x, y, kernel, estimator == "unbiased"), estimator)


def hsic_of_rows(x: np.ndarray, y: np.ndarray, kernel: dict[str, Any], estimator: str) -> Any:
    return hsic_of(*matrices(x, y, kernel), estimator)


def draw_kernel(draw: Draw) -> tuple[dict[str, Any], str]:
    """A kernel as a dict, and as the arguments of a call."""
    name = draw.choice(KERNELS)
    options: dict[str, Any] = {}
    if name in ("rbf", "laplacian"):
        if draw.chance(0.5):
            options["sigma"] = draw.choice((0.5, 1.0, 3.0, 10.0))
        elif draw.chance(0.5):
            options["bandwidth"] = draw.choice((0.3, 1.0, 2.5))
    if name == "polynomial" and draw.chance(0.6):
        options |= {"degree": draw.choice((1, 2, 3, 4)), "coef0": draw.choice((0.0, 1.0, -0.5, 2.0))}
        if draw.chance(0.5):
            options["gamma"] = draw.choice((0.1, 1.0))
    kernel = {"name": name, **options}
    arguments = ", ".join(f"{k}={v!r}" for k, v in options.items())
    if name == "polynomial" or draw.chance(0.3):
        return kernel, f"kernel=pyrepr.Kernel({name!r}{', ' * bool(arguments)}{arguments})"
    return kernel, f"kernel={name!r}{', ' * bool(arguments)}{arguments}"


def disturbed(x: np.ndarray, eps: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * (eps * rng.choice([-1.0, 1.0], x.shape))  # 1 + 2⁻⁵³ would be 1


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def near(
    name: str, names: dict[str, Any], of: Any, arrays: list[np.ndarray], size: Any, more: float = 0.0
) -> str | None:
    """`out` against of(*arrays), with the room that its condition asks for, and `more` in units of `size`; NaN is right
    where that is all of it."""
    out, dtype = names["out"], accumulation(names["dtype"])
    if any(not np.isfinite(a).all() for a in arrays):
        return None
    eps = EPS[dtype]
    rng = np.random.default_rng(0)
    truth = np.asarray(of(*arrays))
    with np.errstate(all="ignore"), Noise(eps):
        changes = [np.abs(np.asarray(of(*(disturbed(a, eps, rng) for a in arrays))) - truth) for _ in range(3)]
    change = np.maximum.reduce(changes)
    bound = FACTOR * (np.max(change, initial=0) + eps * size) + more * size
    lost = ~np.isfinite(change) | (bound > 0.05 * size) | ~np.isfinite(truth)
    if lost.all():
        return None  # rounding alone decides: any number and NaN are both honest
    return compare(name, out, truth, np.where(lost, np.inf, bound), dtype)


def lost_by_moments(arrays: list[np.ndarray], first: int, estimator: str) -> float:
    """What CKA made of moments may be off by: XᵀX around the mean of the `first` rows holds a long row's square, of
    which the unbiased estimator asks for the rest. Errors seen are a quarter of it."""
    ratios = [0.0]
    for x in arrays if len(arrays[0]) >= 4 else ():
        whole = distances(x, x[:first].mean(0)[None]).sum() ** 2
        k = centred_rows(x) @ centred_rows(x).T
        own = hsic_of(k, k, estimator) * len(x) * (len(x) - 3)
        ratios.append(whole / own if own > 0 else np.inf)
    return float(16 * EPS[torch.float64] * max(ratios))


def draw_shapes(draw: Draw) -> tuple[int, list[int]]:
    n = draw.choice((4, 5, 6, 8, 9, 16, 17, 20, 33)) if draw.chance(0.9) else draw.choice((64, 65, 100))
    return n, [draw.size(40, 0) for _ in range(4)]


def draw_gram(draw: Draw) -> Case:
    n, m, d = draw.size(33), draw.size(33), draw.size(40)
    kernel, arguments = draw_kernel(draw)
    dtype = draw.dtype()
    special = 0.1
    lines = [f"x = {draw.array((n, d), dtype, wild=0.2, special=special)}"]
    both = draw.chance(0.5)
    if both:
        lines.append(f"y = {draw.array((m, d), dtype, wild=0.2, special=special)}")
    centre = draw.chance(0.2)
    needs_median = kernel["name"] in DISTANCES and "sigma" not in kernel
    call = f"out = pyrepr.gram(x{', y' * both}, {arguments}{', center=True' * centre})"
    case = Case("gram", call, "either" if needs_median and n < 2 else "value", lines)

    def check(names: dict[str, Any]) -> str | None:
        x = f64(names["x"])
        y = f64(names["y"]) if both else x
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            return None if names["out"].shape == (len(x), len(y)) else f"out has shape {list(names['out'].shape)}"
        dtype = accumulation(names["x"].dtype)
        eps, k = EPS[dtype], kernel_matrix(x, y, kernel, x)
        bound = gram_bound(x, y, kernel, k, eps) if k.size else np.zeros(k.shape)
        if centre and k.size:
            mean = k.mean(1, keepdims=True)
            k = k - mean - k.mean(0, keepdims=True) + k.mean()
            bound = (
                bound
                + bound.mean(1, keepdims=True)
                + bound.mean(0, keepdims=True)
                + bound.mean()
                + 4 * eps * np.abs(mean).max()
            )
        return compare("out", names["out"], k, bound, dtype)

    case.check = check
    if kernel["name"] == "linear" and n and m and d:
        case.differential = Differential(
            call.removeprefix("out = "),
            ("x", "y") if both else ("x",),
            lambda x, y=None: np.ravel(_centred_gram(x, x if y is None else y, centre)),
        )
    if draw.chance(0.12):
        case.expect, case.differential = "error", None
        case.lines.append(draw.wrong(draw.choice(("x", "y")) if both else "x", wider=both, moved=both))
        if case.lines[-1].startswith("y = None"):
            case.expect = "either"
            case.check = lambda names: None
    return case


def _centred_gram(x: np.ndarray, y: np.ndarray, centre: bool) -> np.ndarray:
    return (x - x.mean(0)) @ (y - y.mean(0)).T if centre else x @ y.T


def gram_bound(x: np.ndarray, y: np.ndarray, kernel: dict[str, Any], k: np.ndarray, eps: float) -> np.ndarray:
    """What rounding each operation costs at most, entry by entry."""
    name = kernel["name"]
    if name == "linear":
        return (8 + 2 * x.shape[1] ** 0.5) * eps * (np.abs(x) @ np.abs(y).T)
    if name == "cosine":
        return np.full(k.shape, 40 * eps)
    if name == "polynomial":
        gamma = kernel.get("gamma")
        gamma = 1 / max(1, x.shape[1]) if gamma is None else gamma
        c, degree = kernel.get("coef0", 1.0), kernel.get("degree", 3)
        size = gamma * (np.abs(x) @ np.abs(y).T) + abs(c)
        return 16 * degree * eps * size**degree
    sigma = kernel.get("sigma")
    sigma = kernel.get("bandwidth", 1.0) * median(x) if sigma is None else sigma
    if not sigma > 0:
        return np.full(k.shape, np.inf)
    mean = x.mean(0)
    # The mean row is subtracted in the accumulation type, so rows are known to its unit.
    offset = eps * np.sqrt((mean * mean).sum())
    norms = distances(x, mean[None]) + distances(y, mean[None]).T
    root = np.sqrt(distances(x, y))
    change = 16 * eps * norms + 8 * offset * root + 16 * offset**2
    if name == "rbf":
        exponent = change / (2 * sigma * sigma) + 8 * eps * (1 + root**2 / (2 * sigma * sigma))
    else:
        exponent = np.minimum(change / np.where(root == 0, 1e-4000, root), np.sqrt(change)) / sigma + 8 * eps * (
            1 + root / sigma
        )
    return k * np.expm1(np.minimum(exponent, 50)) + 2 * eps


def draw_pair(draw: Draw) -> Case:
    function = draw.choice(("cka", "hsic"))
    n, (p, q, *_) = draw_shapes(draw)
    if draw.chance(0.05):
        n, p, q = draw.size(5), draw.size(5), draw.size(5)
    kernel, arguments = draw_kernel(draw)
    estimator = draw.choice(("unbiased", "biased"))
    dtype = draw.dtype()
    # The median is held constant by the derivative, and differences of it by no formula.
    smooth = draw.chance(0.5) and n >= 4 and n <= 20 and not (kernel["name"] in DISTANCES and "sigma" not in kernel)
    wild, special = (0, 0) if smooth else (0.35, 0.03)
    lines = [
        f"x = {draw.array((n, p), dtype, wild=wild, special=special)}",
        f"y = {draw.array((n, q), dtype, wild=wild, special=special)}",
    ]
    masked = draw.chance(0.15) and function == "cka"
    if masked:
        lines.append(f"mask = randn({draw.seed_()}, {n}) > -1")
    call = f"out = pyrepr.{function}(x, y, {arguments}, estimator={estimator!r}{', mask=mask' * masked})"
    least = 4 if estimator == "unbiased" else 2
    case = Case(function, call, "value" if n >= least and not masked else "either" if masked else "error", lines)
    of = {"cka": cka_of, "hsic": hsic_of_rows}[function]

    def check(names: dict[str, Any]) -> str | None:
        x, y = f64(names["x"]), f64(names["y"])
        if masked:
            rows = names["mask"].numpy()
            x, y = x[rows], y[rows]
        if not x.shape[1] or not y.shape[1]:
            return None if not torch.isinf(names["out"]) else "a layer without features gives infinity"
        names["dtype"] = names["x"].dtype
        size = 1.0
        if function == "hsic":
            own = [hsic_of_rows(a, a, kernel, "biased") for a in (x, y)]
            size = np.sqrt(np.abs(own[0] * own[1]))
        return near("out", names, lambda a, b: of(a, b, kernel, estimator), [x, y], size)

    case.check = check
    if smooth and case.expect == "value":
        case.differential = Differential(
            call.removeprefix("out = "),
            draw.choice((("x", "y"), ("x",))),
            lambda a, b=None: _derived(of, a, b, lines, kernel, estimator),
            size=lambda a, b=None: _cancelling(a, _array(lines[1]) if b is None else b, kernel),
        )
    if draw.chance(0.1):
        case.differential, case.expect = None, "error"
        lines.append(
            draw.wrong(draw.choice(("x", "y") + ("mask",) * masked), wider=False)
            if draw.chance(0.8)
            else f"y = y[: {n - 1}]"
        )
        if lines[-1].startswith("mask"):
            case.expect, case.check = "either", lambda names: None
    return case


def _derived(
    of: Any, a: np.ndarray, b: np.ndarray | None, lines: list[str], kernel: dict[str, Any], estimator: str
) -> np.ndarray:
    if b is None:
        b = _array(lines[1])
    value = np.ravel(of(a, b, kernel, estimator))
    if np.isnan(of(a.real, b.real, kernel, estimator)):  # which a complex step away from equal rows does not see
        return value * np.nan
    for x in (a.real, b.real):
        if np.ptp(x, 0).max(initial=0) <= 1e-12 * np.abs(x).max(initial=0):  # equal rows: 0 / 0, or what rounding left
            return value * np.nan
    if kernel["name"] == "laplacian":  # which has no derivative where two rows meet, nor differences across that
        for x in (a, b):
            d2 = distances(x.real, x.real)
            if ((d2 > 0) & (d2 < KINK**2)).any():
                return value * np.nan
    return value


def _cancelling(a: np.ndarray, b: np.ndarray, kernel: dict[str, Any]) -> float:
    """The size of what a derivative is the small rest of. The cosine of one feature is a sign, and of rows far apart
    the nearest pair is all there is: CKA does not notice how near. Errors seen are a tenth of the room this gives."""
    if kernel["name"] == "cosine" and 1 in (a.shape[1], b.shape[1]):
        return 1.0
    if kernel["name"] not in DISTANCES:
        return 0.0
    least = [exponents(x, x, kernel, x)[~np.eye(len(x), dtype=bool)].min() for x in (a, b)]
    return 0.1 if max(least) > 5 else 0.0


_known: dict[str, np.ndarray] = {}


def _array(line: str) -> np.ndarray:
    """The tensor a line makes, as float64; the last few are kept."""
    if line not in _known:
        if len(_known) > 8:
            _known.clear()
        from draw import gapped, put, randn

        names: dict[str, Any] = {
            "torch": torch,
            "randn": randn,
            "gapped": gapped,
            "put": put,
            "guarded": lambda x, _: x,
        }
        exec(line, names)
        _known[line] = names[line.split(" = ")[0]].detach().double().resolve_neg().numpy()
    return _known[line]


def draw_matrix(draw: Draw) -> Case:
    n, widths = draw_shapes(draw)
    kernel, arguments = draw_kernel(draw)
    estimator, dtype = draw.choice(("unbiased", "biased")), draw.dtype()
    left, right = draw.randint(1, 3), draw.randint(0, 2)
    lines = [f"x{i} = {draw.array((n, draw.choice(widths)), dtype, wild=0.15)}" for i in range(left + right)]
    xs, ys = (", ".join(f"x{i}" for i in part) for part in (range(left), range(left, left + right)))
    call = f"out = pyrepr.cka_matrix([{xs}]{f', [{ys}]' * bool(right)}, {arguments}, estimator={estimator!r})"
    case = Case("cka_matrix", call, "value", lines)

    def table(*arrays: np.ndarray) -> np.ndarray:
        rows, columns = arrays[:left], arrays[left:] if right else arrays
        return np.array([[cka_of(a, b, kernel, estimator) for b in columns] for a in rows])

    def check(names: dict[str, Any]) -> str | None:
        names["dtype"] = names["x0"].dtype
        return near("out", names, table, [f64(names[f"x{i}"]) for i in range(left + right)], 1.0)

    case.check = check
    if draw.chance(0.1):
        case.expect = "error"
        lines.append(draw.wrong(f"x{draw.randrange(left + right)}", wider=False, moved=left + right > 1))
        case.names = ("xs", "ys", *(f"x{i}" for i in range(5)))
    return case


def draw_options(draw: Draw) -> Case:
    """Options out of their range."""
    option = draw.choice(
        (
            "kernel='rbg'",
            "kernel=3",
            "kernel=None",
            "sigma=0.0",
            "sigma=-1.0",
            "sigma=float('nan')",
            "sigma='1'",
            "bandwidth=0",
            "bandwidth=float('inf')",
            "bandwidth=[1]",
            "estimator='both'",
            "estimator=None",
            "mask=[True]",
            "mask=torch.ones(3)",
            "kernel=pyrepr.Kernel('polynomial', degree=0)",
            "kernel=pyrepr.Kernel('polynomial', degree=1.5)",
            "kernel=pyrepr.Kernel('polynomial', coef0=float('inf'))",
            "kernel=pyrepr.Kernel('linear', gamma=-1)",
            "kernel=pyrepr.Kernel('rbf', sigma=2.0), sigma=1.0",
            "kernel=pyrepr.Kernel('rbf'), bandwidth=3.0",
            "kernel=pyrepr.Kernel('polynomial', degree=True)",
            "sigma=True",
            "kernel=pyrepr.Kernel('rbf', degree='a')",
        )
    )
    names = ("kernel", "sigma", "bandwidth", "estimator", "mask", "degree", "coef0", "gamma")
    return Case("options", f"out = pyrepr.cka(x, x, {option})", "error", ["x = randn(1, 6, 3)"], names=names)


def draw(draw: Draw) -> Case:
    return draw.choices((draw_gram, draw_pair, draw_matrix, draw_options), (4, 6, 2, 0.3))[0](draw)
