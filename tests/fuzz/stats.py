"""Family `stats`: moments and what follows from them, probes, neural collapse, spectra. Truth: the textbook's formulas
on all rows at once, in float64 (or long double, where no decomposition is needed)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from draw import Case, Draw, f64
from measures import Noise, distances, lost_by_moments, near
from streams import NAMES as _NAMES
from streams import TROUBLE

NAMES = _NAMES
SIZES = (0, 1, 2, 3, 5, 8, 16, 33, 40)
# Bounds of decompositions are multiples of what disturbing the inputs by their rounding changes.
FLOAT32 = 2.0**-24


def centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(0)


def solve(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression: coef [q, d] and intercept [q]."""
    a, b = centred(x), centred(y)
    d = a.shape[1]
    if (a * a).sum() < 1e6 * alpha:  # which decomposing [a; √α] would lose beside √α
        coef = plain(eliminated(a.T @ a + alpha * np.eye(d), a.T @ b)).T
    else:
        a, b = plain(a), plain(b)
        tall = np.concatenate([a, np.sqrt(alpha) * np.eye(d)]), np.concatenate([b, np.zeros((d, b.shape[1]))])
        coef = np.linalg.lstsq(*tall, rcond=1e-12)[0].T
    return coef, plain(y.mean(0)) - coef @ plain(x.mean(0))


def eliminated(s: np.ndarray, right: np.ndarray) -> np.ndarray:
    """s⁻¹ right of a positive definite s, in long double, for which NumPy has no decomposition."""
    rows = np.concatenate([s, right], 1)
    for i in range(len(s)):
        rows[i] = rows[i] / rows[i, i]
        others = np.arange(len(s)) != i
        rows[others] -= rows[others, i][:, None] * rows[i]
    return rows[:, len(s) :]


def plain(x: Any) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def r2(x: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
    coef, intercept = solve(x, y, alpha)
    error = plain(y) - (plain(x) @ coef.T + intercept)
    return 1 - (error**2).sum(0) / (plain(centred(y)) ** 2).sum(0)


def canonical(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Canonical correlations, by orthonormal bases of the centred columns."""
    bases = []
    for a in (x, y):
        u, s, _ = np.linalg.svd(plain(centred(a)), full_matrices=False)
        bases.append(u[:, s > 1e-4 * s[0]])
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def procrustes(x: np.ndarray, y: np.ndarray) -> Any:
    a, b = plain(centred(x)), plain(centred(y))
    return np.linalg.svd(a.T @ b, compute_uv=False).sum() / (np.linalg.norm(a) * np.linalg.norm(b))


def cka(x: np.ndarray, y: np.ndarray, estimator: str) -> Any:
    from measures import cka_of

    return cka_of(x, y, {"name": "linear"}, estimator)


# What is asked of moments of x, or of x and y: expression, truth, rows it needs for each direction, and its size.
OF_X = (
    ("mean", lambda x: x.mean(0), 1),
    ("covariance", lambda x: centred(x).T @ centred(x) / (len(x) - 1), 2),
    ("correlation", lambda x: correlation(x, x), 3),
    (
        "pca().explained_variance",
        lambda x: np.linalg.eigvalsh(plain(centred(x).T @ centred(x)))[::-1] / (len(x) - 1),
        2,
    ),
)
OF_XY = (
    ("correlation", lambda x, y: correlation(x, y), 3),
    ("ridge(1.0).coef", lambda x, y: solve(x, y, 1.0)[0], 2),
    ("ridge([0.5, 10.0]).intercept", lambda x, y: np.stack([solve(x, y, a)[1] for a in (0.5, 10.0)]), 2),
    ("r2(1.0, 'raw_values')", lambda x, y: r2(x, y, 1.0), 3),
    ("procrustes()", procrustes, 2),
    ("cka()", lambda x, y: cka(x, y, "unbiased"), 5),
    ("cka('biased')", lambda x, y: cka(x, y, "biased"), 3),
)


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = centred(x), centred(y)
    return a.T @ b / np.sqrt(np.outer((a * a).sum(0), (b * b).sum(0)))


BAD = (
    "m.update(x0[0])",
    "m.update(x0[:, :-1] if x0.shape[1] > 1 else x0[:, [0, 0]])",
    "m.update(None)",
    "m.update(x0.to(torch.int32))",
    "m.merge(3)",
    "m.merge(pyrepr.stats.Moments(classes=7))",
    "m.load_state_dict({})",
    "m.load_state_dict({'classes': 0})",
    "m.load_state_dict({'classes': None, 'widths': 5, 'split': 0, 'state': 3})",
    "m.load_state_dict({'classes': 3, 'sums': 5})",
    "m.load_state_dict(5)",
    "m.ridge(-1.0)",
    "m.ridge('a')",
    "m.pca(0)",
    "m.procrustes('other')",
    "m.r2(1.0, 'all')",
    "m.update(x0 * float('nan')) if len(x0) else m.update(None)",
)


def draw_moments(draw: Draw) -> Case:
    """Batches in any cut, merged, saved and loaded, a fold taken away; refused calls in between."""
    d, q, dtype = draw.choice((1, 2, 3, 8, 17)), draw.choice((0, 1, 2, 9)), draw.dtype()
    rows = [draw.choice(SIZES) for _ in range(draw.randint(1, 4))]
    total = sum(rows)
    name, truth, least = draw.choice(OF_XY if q and draw.chance(0.8) else OF_X)
    if q and (name, truth, least) in OF_X and name in ("correlation",):
        name, truth, least = OF_XY[0]
    lines = [f"x0 = {draw.array((total, d), dtype, wild=0.15)}"]
    if q:
        lines.append(f"y0 = {draw.array((total, q), draw.choice((dtype, dtype, 'float32')), wild=0.1)}")
    call = ["m, other = pyrepr.stats.Moments(), pyrepr.stats.Moments()"]
    start = 0
    TROUBLE.clear()
    for number, count in enumerate(rows):
        part = f"[{start} : {start + count}]"
        target = "other" if number % 2 and draw.chance(0.5) else "m"
        call.append(f"{target}.update(x0{part}{f', y0{part}' * bool(q)})")
        start += count
        if draw.chance(0.2):
            call.append(
                draw.choice(
                    (
                        "saved = m.state_dict(); m = pyrepr.stats.Moments(); m.load_state_dict(saved)",
                        "import pickle; m = pickle.loads(pickle.dumps(m))",
                    )
                )
            )
        if draw.chance(0.3) and start:
            call.append(f"refused(lambda: {draw.choice(BAD)})" if number and rows[0] else "")
    call += ["m.merge(other)", f"out = m.{name}"]
    case = Case("Moments", "\n".join(line for line in call if line), "value", lines, calls=len(call))
    case.expect = "value" if total >= least else "either"
    case.repeatable = name in ("mean", "covariance", "correlation", "cka()", "cka('biased')")  # not LAPACK's
    case.names = ("x", "y", "moments", "other", "alphas", "kind", "k", "samples", "this")

    if dtype == "float16":
        case.expect = "either"  # numbers beyond its range are refused

    def check(names: dict[str, Any]) -> str | None:
        if names["trouble"]:
            return names["trouble"].pop()
        if names["m"].samples != total:
            return f"samples is {names['m'].samples}, {total} were given"
        if total < least:
            return None
        arrays = [f64(names[key]) for key in ("x0", "y0")[: truth.__code__.co_argcount]]
        first = next(count for count in rows if count)
        more = lost_by_moments(arrays, first, "biased" if "biased" in name else "unbiased") if "cka" in name else 0.0
        return close(names, truth, arrays, f64(names["x0"]), name, more)

    case.check = check
    return case


def close(
    names: dict[str, Any], truth: Any, arrays: list[np.ndarray], x: np.ndarray, what: str, more: float = 0.0
) -> str | None:
    """`out`, float64, against the truth; products of features are made in float32, unless those are float64."""
    out = names["out"]
    if out.dtype != torch.float64:
        return f"out is {out.dtype}"
    narrow = all(names[name].dtype == torch.float64 for name in ("x0", "y0") if name in names)
    names = {**names, "dtype": torch.float64 if narrow else torch.float32, "out": out if narrow else out.float()}
    size = 1.0
    if what in ("mean", "covariance", "pca().explained_variance") or "ridge" in what:
        size = float(np.abs(plain(truth(*arrays))).max(initial=0)) or 1.0
        if what == "mean":
            size = float(np.abs(x).max(initial=0)) or 1.0
    if size > 1e37 or size < 1e-37:
        return None
    return near("out", names, truth, arrays, size, more)


def draw_classes(draw: Draw) -> Case:
    """Moments(classes): counts, means, within and between."""
    c, d, n, dtype = draw.randint(2, 5), draw.choice((1, 3, 8, 17)), draw.choice((4, 9, 16, 33, 65)), draw.dtype()
    what = draw.choice(("counts", "class_means", "within", "between", "mean", "covariance"))
    lines = [
        f"x0 = {draw.array((n, d), dtype, wild=0.15)}",
        f"y0 = (randn({draw.seed_()}, {n}).abs() * 1e6).to(torch.{draw.choice(('int64', 'int32', 'uint8'))}) % {c}",
    ]
    cut = draw.randrange(n + 1)
    call = f"m = pyrepr.stats.Moments(classes={c})\nm.update(x0[:{cut}], y0[:{cut}])\n"
    if draw.chance(0.5):
        call += f"m.merge(pyrepr.stats.Moments(classes={c}).update(x0[{cut}:], y0[{cut}:]))\n"
    else:
        call += f"m.update(x0[{cut}:], y0[{cut}:])\n"
    if draw.chance(0.3):
        call += f"m = m.merge(pyrepr.stats.Moments(classes={c}).update(x0, y0))\n"
        call += f"m = m - pyrepr.stats.Moments(classes={c}).update(x0, y0)\n"
    case = Case("Moments of classes", call + f"out = m.{what}", lines=lines, calls=4)
    case.names = ("x", "y", "moments")
    if dtype == "float16":
        case.expect = "either"  # numbers beyond its range are refused

    def truth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return of_classes(x, y, c)[what]

    def check(names: dict[str, Any]) -> str | None:
        x, y = f64(names["x0"]), names["y0"].numpy()
        if what == "counts":
            return None if names["out"].tolist() == np.bincount(y, minlength=c).tolist() else f"counts {names['out']}"
        return close(names, lambda a: truth(a, y), [x], x, "mean" if "mean" in what else "covariance")

    case.check = check
    if draw.chance(0.1):
        case.expect = "error"
        lines.append(draw.choice((f"y0 = y0.long() + {c}", "y0 = y0.float()", "y0 = y0[1:]", "y0 = y0[:, None]")))
    return case


def of_classes(x: np.ndarray, y: np.ndarray, c: int) -> dict[str, np.ndarray]:
    means = np.stack([x[y == k].mean(0) if (y == k).any() else np.full(x.shape[1], np.nan) for k in range(c)])
    has = means[~np.isnan(means).any(1)]
    inner = x - means[y]
    return {
        "class_means": means,
        "within": inner.T @ inner / len(x),
        "between": centred(has).T @ centred(has) / len(has),
        "mean": x.mean(0),
        "covariance": centred(x).T @ centred(x) / (len(x) - 1),
    }


def draw_layers(draw: Draw) -> Case:
    """Measures that follow from LayerMoments, a fold added and taken away."""
    n, dtype, estimator = draw.choice((8, 16, 33, 65)), draw.dtype(), draw.choice(("unbiased", "biased"))
    widths = [draw.choice((1, 2, 8, 17)) for _ in range(draw.randint(1, 3))]
    lines = [f"x{i} = {draw.array((n, d), dtype, wild=0.1)}" for i, d in enumerate(widths)]
    xs = ", ".join(f"x{i}" for i in range(len(widths)))
    half = ", ".join(f"x{i}[: {n // 2}]" for i in range(len(widths)))
    call = [f"m = pyrepr.stats.LayerMoments().update([{xs}])"]
    if draw.chance(0.5):
        call.append(f"m = m.merge(pyrepr.stats.LayerMoments().update([{half}]))")
        call.append(f"m = m - pyrepr.stats.LayerMoments().update([{half}])")
    call.append(f"out = pyrepr.similarity.CKA(estimator={estimator!r}).of_moments(m)")
    case = Case("LayerMoments", "\n".join(call), lines=lines, calls=len(call))
    case.names = ("xs", "moments", "CKA")

    def truth(*arrays: np.ndarray) -> np.ndarray:
        return np.array([[cka(a, b, estimator) for b in arrays] for a in arrays])

    def check(names: dict[str, Any]) -> str | None:
        names = {**names, "dtype": names["x0"].dtype}
        if names["dtype"] != torch.float64:
            names["out"] = names["out"].float()
        arrays = [f64(names[f"x{i}"]) for i in range(len(widths))]
        return near("out", names, truth, arrays, 4.0, lost_by_moments(arrays, n, estimator))

    case.check = check
    return case


def draw_spectra(draw: Draw) -> Case:
    n, d, dtype = draw.size(40), draw.size(40), draw.dtype()
    lines = [f"x = {draw.array((n, d), dtype, wild=0.2)}"]
    kind, centre = draw.choice(("entropy", "participation")), draw.chance(0.6)
    if draw.chance(0.3):
        call, of = "out = pyrepr.stats.mean_cosine(x)", mean_cosine
    else:
        call = f"out = pyrepr.stats.effective_rank(x, {kind!r}, center={centre})"
        of = lambda x: effective_rank(x, kind, centre)  # noqa: E731
    good = n and d and dtype != "float16"  # in which an outlier is infinite
    case = Case("spectra", call, "value" if good else "either", lines, repeatable=False)

    def check(names: dict[str, Any]) -> str | None:
        x = f64(names["x"])
        if not x.size:
            return None
        return near("out", {**names, "dtype": names["x"].dtype}, of, [x], float(min(x.shape)))

    case.check = check
    if draw.chance(0.1):
        case.expect = "error"
        lines.append(draw.wrong("x", wider=False, deeper=False, moved=False))
    return case


def effective_rank(x: np.ndarray, kind: str, centre: bool) -> Any:
    s = np.linalg.svd(plain(centred(x) if centre else x), compute_uv=False)
    if kind == "participation":
        return (s**2).sum() ** 2 / (s**4).sum()
    p = s / s.sum()
    return np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()) if s.sum() else np.nan


def mean_cosine(x: np.ndarray) -> Any:
    from pairs import unit

    n, u = len(x), unit(x)
    return ((u @ u.T).sum() - (u * u).sum()) / (n * (n - 1)) if n > 1 else np.nan


def draw_collapse(draw: Draw) -> Case:
    c, d = draw.randint(2, 5), draw.choice((2, 3, 8, 17))
    n, dtype, soft = draw.choice((12, 20, 40)), draw.choice(("float32", "float64")), draw.chance(0.3)
    lines = [f"x0 = {draw.array((n, d), dtype, wild=0.1)}", f"y0 = torch.arange({n}) % {c}"]
    if soft:
        lines.append(f"y0 = torch.softmax(randn({draw.seed_()}, {n}, {c}), 1)")
    with_weight = draw.chance(0.6)
    if with_weight:
        lines += [f"w = {draw.array((c, d), dtype)}", f"b = {draw.array((c,), dtype)}"]
    call = f"out = torch.stack(pyrepr.stats.neural_collapse(x0, y0{', w, b' * with_weight}))"
    case = Case("neural_collapse", call, lines=lines, repeatable=False)
    case.names = ("features", "labels", "weight", "bias")

    def check(names: dict[str, Any]) -> str | None:
        x = f64(names["x0"])
        y = plain(names["y0"].numpy()) if soft else np.eye(c)[names["y0"].numpy()]
        w, b = (plain(f64(names[k])) for k in "wb") if with_weight else (None, None)

        def truth(a: np.ndarray) -> np.ndarray:
            return np.array([v for v in collapse(plain(a), y, w, b) if v is not None])

        out = names["out"]
        if not with_weight and not out[2:].isnan().all():
            return f"out is {out.tolist()}, without a weight"
        names = {**names, "dtype": torch.float64, "out": out if with_weight else out[:2]}
        # Ties may go either way, and means that differ by rounding are one.
        if with_weight and abs(float(out[3]) - truth(x)[3]) > 1.5 / n + undecided(plain(x), y):
            return f"nc4 is {float(out[3])}, truth {truth(x)[3]}"
        names["out"] = names["out"][:3]
        size = max(1.0, float(np.abs(truth(x)[:1]).max()))
        return near("out", names, lambda a: truth(a)[:3], [x], size)

    case.check = check
    if draw.chance(0.15):
        case.expect = "error"
        lines.append(
            draw.choice(
                (
                    "y0 = torch.zeros_like(y0)",
                    "y0 = y0[1:]",
                    "y0 = None",
                    "y0 = y0 - 5",
                    "x0 = x0[0]",
                    "x0 = None",
                    "y0 = [1, 2]",
                )
            )
        )
    return case


def collapse(x: np.ndarray, y: np.ndarray, w: np.ndarray | None, b: np.ndarray | None) -> tuple[Any, ...]:
    """Papyan et al. (2020). y: [n, C] one-hot or soft."""
    n, c = len(x), y.shape[1]
    means = (y.T @ x) / y.sum(0)[:, None]
    within = sum((y[:, k : k + 1] * (x - means[k])).T @ (x - means[k]) for k in range(c)) / n
    m = means - means.mean(0)
    if Noise.unit:  # decompositions, the truth's too, are exact for a matrix that near by its norm
        m = m + Noise.unit * np.linalg.norm(m) * Noise.rng.choice([-1.0, 1.0], m.shape)
    _, sizes, axes = np.linalg.svd(m)
    kept = np.arange(len(sizes)) < np.sum(sizes[: c - 1] > 1e-13 * np.abs(means).max())
    nc1 = (
        np.einsum("ij,jk,ik->i", axes[: len(sizes)][kept], within, axes[: len(sizes)][kept]) / sizes[kept] ** 2
    ).sum()
    gram = m @ m.T
    nc2 = np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(c) - 1 / c) / np.sqrt(c - 1))
    if w is None or b is None:
        return nc1, nc2, None, None
    nc3 = np.linalg.norm(w / np.linalg.norm(w) - m / np.linalg.norm(m))
    nearest = ((x[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    return nc1, nc2, nc3, ((x @ w.T + b).argmax(1) != nearest).mean()


def undecided(x: np.ndarray, y: np.ndarray) -> float:
    """The share of samples that are as far from two of the class means, but for rounding."""
    means = (y.T @ x) / y.sum(0)[:, None]
    d2 = np.sort(distances(x, means), 1)
    return float((d2[:, 1] - d2[:, 0] <= 1e-14 * ((x**2).sum(1) + (means**2).sum(1).max())).mean())


def draw_probe(draw: Draw) -> Case:
    """linear_probe with samples to validate on; and its models."""
    c, n, held = draw.randint(2, 4), draw.choice((20, 33, 64)), draw.choice((10, 17))
    task = draw.choice(("classification", "regression"))
    dtype, alpha = draw.choice(("float32", "float64")), draw.choice((0.5, 10.0, 300.0))
    widths = [draw.choice((1, 3, 8)) for _ in range(draw.randint(1, 3))]
    lines = [f"x{i} = {draw.array((n + held, d), dtype, wild=0.1)}" for i, d in enumerate(widths)]
    if task == "classification":
        lines.append(
            f"y0 = torch.cat([torch.arange({c}), (randn({draw.seed_()}, {n + held - c}).abs() * 1e6).long() % {c}])"
        )
    else:
        lines.append(f"y0 = {draw.array((n + held, draw.randint(1, 3)), dtype)}")
    left = f"[{', '.join(f'x{i}[:{n}]' for i in range(len(widths)))}]"
    right = f"[{', '.join(f'x{i}[{n}:]' for i in range(len(widths)))}]"
    call = (
        f"probe = pyrepr.stats.linear_probe({left}, y0[:{n}], val=({right}, y0[{n}:]), alphas={alpha}, task={task!r})\n"
        "out = probe.scores[:, 0]"
    )
    case = Case("linear_probe", call, lines=lines, repeatable=False)
    case.names = ("layers", "y", "val", "alphas", "task", "classes", *(str(i) for i in range(3)))
    beyond = any(re.search(r"\* 1e(19|2\d)", line) for line in lines[: len(widths)])
    if task == "regression" or (dtype == "float32" and beyond):
        case.expect = "either"  # targets that are the same for every sample are refused, and squares beyond float32

    def check(names: dict[str, Any]) -> str | None:
        y = names["y0"]
        y = np.eye(c)[y.numpy()] if task == "classification" else plain(f64(y))
        scores = []
        for i in range(len(widths)):
            x = plain(f64(names[f"x{i}"]))
            coef, intercept = solve(x[:n], y[:n], alpha)
            answer = x[n:] @ coef.T + intercept
            if task == "classification":
                top = np.sort(answer, 1)
                sure = top[:, -1] - top[:, -2] > 1e-3 * np.abs(top).max()
                right = answer.argmax(1) == y[n:].argmax(1)
                scores.append((right[sure].sum() / held, (right[sure].sum() + (~sure).sum()) / held))
            else:
                varies = (centred(y[n:]) ** 2).sum() if np.ptp(y[n:], 0).any() else np.nan
                error = ((y[n:] - answer) ** 2).sum() / varies
                scale = max(1.0, error) * max(1.0, np.abs(x).max() / (x[:n].std() + 1e-30))
                scores.append((1 - error - 1e-3 * scale, 1 - error + 1e-3 * scale))
        for i, (least, most) in enumerate(scores):
            got = float(names["out"][i])
            if not least - 1e-9 <= got <= most + 1e-9 and np.isfinite([least, most]).all():
                return f"score of layer {i} is {got}, truth {least} to {most}"
        return None

    case.check = check
    if draw.chance(0.15):
        case.expect = "error"
        lines.append(
            draw.choice(
                (
                    "y0 = y0[:-3]",
                    "x0 = x0[0]",
                    "y0 = y0.to(torch.complex64)",
                    "x0 = x0.bool()",
                )
            )
        )
    return case


BAD_OPTIONS = (
    ("linear_probe([x], y, folds=1)", "folds"),
    ("linear_probe([x], y, folds=99)", "folds"),
    ("linear_probe([x], y, alphas=-1)", "alphas"),
    ("linear_probe([x], y, alphas=[])", "alphas"),
    ("linear_probe([x], y, task='other')", "task"),
    ("linear_probe([], y)", "layers"),
    ("linear_probe(3, y)", "layers"),
    ("linear_probe([x], y, val=3)", "val"),
    ("linear_probe([x], y, val=([x, x], y))", "val layers"),
    ("linear_probe([x], y, classes=1)", "classes y"),
    ("linear_probe([x], y, classes='a')", "classes"),
    ("linear_probe([x], x[:, 0])", "y"),
    ("linear_probe([x], y, task='regression')", "y"),
    ("linear_probe([x], y, seed='a')", "seed"),
    ("effective_rank(x, 'other')", "kind"),
    ("effective_rank(3)", "x"),
    ("effective_rank(pyrepr.stats.Moments())", "moments"),
    ("effective_rank(pyrepr.stats.Moments().update(x), center=False)", "center"),
    ("mean_cosine(x[0])", "x"),
    ("v_information(x, y)", "y"),
    ("v_information(x)", "y"),
    ("v_information(x, x, alpha=-1)", "alphas"),
    ("concept_depth([])", "scores"),
    ("concept_depth('a')", "scores"),
    ("concept_depth([1.0, float('nan')])", "scores"),
    ("concept_depth([1.0], share=2)", "share"),
    ("Moments(classes=1)", "classes"),
    ("Moments(classes='a')", "classes"),
    ("Moments(classes=True)", "classes"),
    ("Moments().mean", "moments"),
    ("Moments().update(x).ridge()", "y"),
    ("Moments().update(x).within", "classes"),
    ("Moments().update(x).pca(9)", "k"),
    ("Moments().update(x, x).svcca(2.0)", "variance"),
    ("LayerMoments().update([])", "xs"),
    ("LayerMoments().update([x, x[1:]])", "xs"),
    ("LayerMoments().hsic()", "moments"),
    ("neural_collapse(pyrepr.stats.Moments().update(x))", "features"),
    ("neural_collapse(x, y, x[:3], x)", "bias weight"),
)


def draw_options(draw: Draw) -> Case:
    text, words = draw.choice(BAD_OPTIONS)
    lines = ["x = randn(1, 12, 4).float()", "y = torch.arange(12) % 3"]
    return Case("options", f"out = pyrepr.stats.{text}", "error", lines, names=tuple(words.split()))


def draw(draw: Draw) -> Case:
    kinds = (draw_moments, draw_classes, draw_layers, draw_spectra, draw_collapse, draw_probe, draw_options)
    return draw.choices(kinds, (5, 3, 2, 2, 2, 2, 0.7))[0](draw)
