"""Family `pairs`: nearest rows, log-sum-exps, contrastive losses. Truth: the whole matrix of scores, long double."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from draw import EPS, Case, Differential, Draw, f64
from measures import accumulation, near

METRICS = ("ip", "cosine", "sqeuclidean")
LABELS = ("int32", "int64")


def unit(x: np.ndarray) -> np.ndarray:
    """Rows over their norms; zeros stay."""
    zero = (np.real(x) == 0).all(1, keepdims=True)
    largest = np.where(zero, 1, np.abs(np.real(x)).max(1, keepdims=True, initial=0))
    scaled = x / largest
    return scaled / np.where(zero, 1, np.sqrt(np.where(zero, 1, (scaled * scaled).sum(1, keepdims=True))))


def scores(x: np.ndarray, y: np.ndarray, metric: str) -> np.ndarray:
    """[n, m], larger is nearer."""
    if metric == "sqeuclidean":
        difference = x[:, None] - y[None]
        return -(difference * difference).sum(-1)
    return unit(x) @ unit(y).T if metric == "cosine" else x @ y.T


def logsumexp(s: np.ndarray, axis: int) -> np.ndarray:
    """log Σ e^s along an axis; −inf of nothing."""
    if not s.shape[axis]:
        return np.full(np.delete(s.shape, axis), -np.inf, dtype=s.dtype)
    largest = np.real(s).max(axis, keepdims=True)
    largest = np.where(np.isinf(largest), 0, largest)
    return np.log(np.exp(s - largest).sum(axis)) + np.squeeze(largest, axis)


def gaps(s: np.ndarray, own: np.ndarray) -> np.ndarray:
    """log Σ_j e^{s_ij} − s_{i, own_i}, with the digits of a small one. s: [n, m]."""
    rows = np.arange(len(s))
    above = s - s[rows, own][:, None]
    others = np.ones(s.shape, dtype=bool)
    others[rows, own] = False
    found = []
    for line, keep in zip(above, others, strict=True):
        rest = line[keep]
        top = max(0.0, np.real(rest).max(initial=-np.inf))
        small = np.exp(rest - top).sum()
        found.append(_log1p(small) if top == 0 else np.log(np.exp(-top) + small) + top)
    return np.array(found)


def _log1p(z: Any) -> Any:
    """log(1 + z), and its derivative: NumPy's is of real numbers in long double only."""
    return np.log1p(np.real(z)) + (1j * np.imag(z) / (1 + np.real(z)) if np.iscomplexobj(z) else 0)


def nce(x: np.ndarray, y: np.ndarray, o: dict[str, Any]) -> Any:
    """InfoNCE; `o` has scale, labels, directions, label_smoothing, normalize, prefixes and weights."""
    labels = np.arange(len(x)) if o.get("labels") is None else o["labels"]
    prefixes = o.get("prefixes") or [x.shape[1]]
    weights = o.get("weights") or [1.0] * len(prefixes)
    alpha, total = o.get("label_smoothing", 0.0), 0.0
    for p, weight in zip(prefixes, weights, strict=True):
        s = o.get("scale", 1.0) * scores(x[:, :p], y[:, :p], "cosine" if o.get("normalize") else "ip")
        positive = s[np.arange(len(x)), labels]
        parts = []
        if "rows" in o["directions"]:
            parts.append((gaps(s, labels) + alpha * (positive - s.mean(1))).mean())
        if "columns" in o["directions"]:
            t = s.T[labels]  # [n, n]: of row i's positive, the scores of all rows
            parts.append((gaps(t, np.arange(len(x))) + alpha * (positive - t.mean(1))).mean())
        total = total + weight * sum(parts) / len(parts)
    return total


def draw_pair(draw: Draw, least: int = 0) -> tuple[int, int, int, str]:
    n, m, d = (max(least, draw.size(100 if draw.chance(0.1) else 33)) for _ in range(3))
    return n, m, d, draw.dtype()


def draw_topk(draw: Draw) -> Case:
    n, m, d, dtype = draw_pair(draw)
    metric = draw.choice(METRICS)
    same, exclude, sums = draw.chance(0.25), draw.chance(0.3), draw.chance(0.3)
    m = n if same else m
    k = draw.choice((1, 1, 2, 3, 5, 10, max(1, m - exclude), m + 1))
    special = 0.08
    lines = [f"x = {draw.array((n, d), dtype, wild=0.25, special=special)}"]
    y = "x" if same else "y"
    if not same:
        lines.append(f"y = {draw.array((m, d), dtype, wild=0.25, special=special)}")
    given = "None" if same else "y"
    cut = draw.randrange(1, 40)
    blocks = not same and draw.chance(0.2) and m > 0
    if blocks:
        given = draw.choice((f"list(y.split({cut}))", f"iter(y.split({cut}))", "[y]"))
        if dtype != "bfloat16" and draw.chance(0.4):
            given = draw.choice(("np.array(y.resolve_neg())", "[np.array(y.resolve_neg())]"))
    options = f"k={k}, metric={metric!r}{', exclude_self=True' * exclude}{', return_logsumexp=True' * sums}"
    good = m > 0 and 1 <= k <= m - exclude
    case = Case("pairwise_topk", f"out = pyrepr.functional.pairwise_topk(x, {given}, {options})", lines=lines)
    case.expect = "value" if good else "error"
    case.names = ("x", "y", "k", "every")

    def check(names: dict[str, Any]) -> str | None:
        return topk_fault(names["out"], f64(names["x"]), f64(names[y]), names["x"].dtype, k, metric, exclude, sums)

    case.check = check
    if draw.chance(0.1):
        case.expect = "either"
        case.check = lambda names: None
        lines.append(draw.wrong(draw.choice(("x", "x") if same or blocks else ("x", "y"))))
    return case


def topk_fault(
    out: Any, x: np.ndarray, y: np.ndarray, dtype: torch.dtype, k: int, metric: str, exclude: bool, sums: bool
) -> str | None:
    wide = accumulation(dtype)
    if len(out) != 2 + sums or out[0].dtype != wide or out[1].dtype != torch.int64:
        return f"out is {[part.dtype for part in out]}"
    if out[0].shape != (len(x), k) or out[1].shape != (len(x), k):
        return f"out has shapes {[list(part.shape) for part in out]}"
    s = scores(x, y, metric)
    size = np.abs(s) if metric == "sqeuclidean" else scores(np.abs(x), np.abs(y), metric)
    # Exact but for one rounding, and float64 itself for float64 inputs.
    room = 2 * EPS[wide] * np.abs(s) + (64 + 8 * x.shape[1]) * EPS[torch.float64] * size
    room = room + np.float64(torch.finfo(wide).tiny)
    if exclude:
        diagonal = np.arange(min(s.shape))
        s[diagonal, diagonal] = -np.inf
    largest = np.longdouble(torch.finfo(wide).max)
    # What is near the largest number may be rounded to infinity, and what squares beyond it may be no number.
    unsure = (np.abs(s) + room > largest / 2) & ~np.isneginf(s) | (metric == "cosine") & _extreme(x, y, wide)
    unsure |= np.isnan(s) & ~_not_finite(x, y)
    if unsure.any():
        return None
    if sums and (what := _sums_fault(out[2], s, room, wide, 2.0**-10 if wide is torch.float32 else 0)):
        return what
    s = np.where(np.isnan(s), -np.inf, s)
    values, places = f64(out[0]), out[1].numpy()
    values = -values if metric == "sqeuclidean" else values
    order = np.argsort(-s, 1, kind="stable")[:, :k]
    for i in range(len(x)):
        best = s[i, order[i]]
        missing = np.isneginf(best)
        if (places[i][missing] != -1).any() or not np.isneginf(values[i][missing]).all():
            return f"row {i}: where there is no number, index {places[i][missing]} and value {values[i][missing]}"
        got, at = values[i][~missing], places[i][~missing]
        if (at < 0).any() or (at >= len(y)).any() or len(set(at.tolist())) != len(at):
            return f"row {i} has the indices {at.tolist()}"
        slack = room[i, order[i]][~missing]
        with np.errstate(invalid="ignore"):
            wrong = ~((np.abs(got - best[~missing]) <= slack) | (got == best[~missing]))
            wrong |= ~((np.abs(got - s[i, at]) <= room[i, at]) | (got == s[i, at]))
        if wrong.any():
            j = int(wrong.argmax())
            return f"row {i}, rank {j}: value {float(got[j])!r} of index {at[j]}, truth {float(best[j])!r}"
        if any(a == b and p > q for a, b, p, q in zip(got, got[1:], at, at[1:], strict=False)):
            return f"row {i}: equal values are not by index, {at.tolist()}"
    return None


def _not_finite(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return ~np.isfinite(x).all(1)[:, None] | ~np.isfinite(y).all(1)[None]


def _extreme(x: np.ndarray, y: np.ndarray, wide: torch.dtype) -> np.ndarray:
    """Pairs with a row whose norm's square is not a normal number of float64."""
    norms = [np.where((a == 0).all(1), 1, np.sqrt((a * a).sum(1))) for a in (x, y)]
    bad = [(n < 1e-150) | (n > 1e150) for n in norms]
    return bad[0][:, None] | bad[1][None]


def _sums_fault(out: torch.Tensor, s: np.ndarray, room: np.ndarray, wide: torch.dtype, share: float = 0) -> str | None:
    """`room`: how far a score may be off; `share`: beside that, of its size. Scores that add nothing add no room."""
    truth, got = logsumexp(s, 1), f64(out)
    with np.errstate(invalid="ignore"):
        size = 8 + np.where(np.isfinite(truth), np.abs(truth), 0)
        near = np.isfinite(s) & (s > truth[:, None] - 50)
        slack = np.where(near, room, 0).max(1, initial=0) + EPS[wide] * (64 + 400 * size) + share * size
        off = np.isfinite(truth) & ~(np.abs(got - truth) <= slack)
        off |= np.isneginf(truth) & ~np.isneginf(got)
        off &= ~np.isnan(got) | np.isfinite(s).all(1)  # documented: no number where a score is none
    if off.any():
        i = int(off.argmax())
        return f"logsumexp[{i}] is {float(got[i])!r}, truth {float(truth[i])!r}"
    return None


def draw_logsumexp(draw: Draw) -> Case:
    n, m, d, dtype = draw_pair(draw)
    kernel = draw.choice(("dot", "cosine"))
    scale = draw.choice((1.0, 1.0, 0.25, 10.0, 100.0))
    # Second derivatives are of the size of scale², and what is left of them then is rounding.
    smooth = draw.chance(0.5) and n and m and d > (kernel == "cosine") and n * m < 600 and scale <= 1
    wild = 0 if smooth else 0.25
    lines = [f"{name} = {draw.array((rows, d), dtype, wild=wild)}" for name, rows in (("x", n), ("y", m))]
    call = f"out = pyrepr.functional.pairwise_logsumexp(x, y, scale={scale}, kernel={kernel!r})"
    case = Case("pairwise_logsumexp", call, lines=lines)
    metric = "cosine" if kernel == "cosine" else "ip"

    def truth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return logsumexp(scale * scores(x, y, metric), 1)

    def check(names: dict[str, Any]) -> str | None:
        x, y, out = f64(names["x"]), f64(names["y"]), names["out"]
        wide = accumulation(names["x"].dtype)
        if out.dtype != wide or out.shape != (len(x),):
            return f"out is {out.dtype} {list(out.shape)}"
        s = scale * scores(x, y, metric)
        size = scale * (np.ones_like(s) if metric == "cosine" else np.abs(x) @ np.abs(y).T)
        room = (8 + 4 * d**0.5) * EPS[wide] * size
        if (size > torch.finfo(wide).max / 4).any() or (metric == "cosine" and _narrow(x, y, wide)):
            return None
        return _sums_fault(out, s, room, wide)

    case.check = check
    if smooth:
        run, fixed = call.removeprefix("out = "), _line(lines[1])

        def size(x: np.ndarray, y: np.ndarray = fixed) -> float:
            """Of a second derivative's terms, a variance of logits: rows of y that are alike leave nothing of it."""
            longest = 1 if kernel == "cosine" else np.prod([np.linalg.norm(rows, axis=1).max() for rows in (x, y)])
            return len(x) * float(scale * longest) ** 2

        variables = draw.choice((("x", "y"), ("x",)))
        of = truth if len(variables) == 2 else lambda x: truth(x, fixed)
        case.differential = Differential(run, variables, of, size=size)
    if draw.chance(0.1):
        case.expect, case.differential = "error", None
        lines.append(draw.wrong(draw.choice(("x", "y"))))
    return case


def _narrow(x: np.ndarray, y: np.ndarray, wide: torch.dtype) -> bool:
    """Whether the squares of a row leave the accumulation type: a known limit of cosines there."""
    info = torch.finfo(wide)
    norms = [np.abs(a).max(1, initial=0) for a in (x, y)]
    return any(((n > 0) & ((n * n > info.max / 1e3) | (n * n < info.tiny * 1e9))).any() for n in norms)


def _line(line: str) -> np.ndarray:
    from measures import _array

    return _array(line)


def draw_nce(draw: Draw) -> Case:
    """info_nce, ClipLoss and MatryoshkaLoss: one formula."""
    n, m, d, dtype = draw_pair(draw, 1)
    n, m, d = min(n, 33), min(m, 40), min(d, 40)
    which = draw.choice(("info_nce", "info_nce", "info_nce", "ClipLoss", "MatryoshkaLoss"))
    o: dict[str, Any] = {"scale": draw.choice((1.0, 0.5, 20.0, 100.0)), "directions": ("rows", "columns")}
    labels = which != "ClipLoss" and draw.chance(0.3)
    if which == "ClipLoss" or not labels:
        m = n if which == "ClipLoss" else max(n, m)
    if which != "ClipLoss":
        o["directions"] = draw.choice((("rows",), ("columns",), ("rows", "columns")))
        o["label_smoothing"] = draw.choice((0.0, 0.0, 0.1, 0.9))
        o["normalize"] = which == "MatryoshkaLoss" or draw.chance(0.4)
    if which == "MatryoshkaLoss" or (which == "info_nce" and draw.chance(0.3)):
        o["prefixes"] = sorted(draw.sample(range(1, d + 1), min(d, draw.randint(1, 3))))
        o["weights"] = [draw.choice((1.0, 0.5, 2.0)) for _ in o["prefixes"]] if draw.chance(0.5) else None
    # Two gradients of 16 bits are added up where labels are smoothed.
    rounded = dtype in ("bfloat16", "float16") and bool(o.get("label_smoothing"))
    smooth = draw.chance(0.5) and n * m * d < 4000 and o["scale"] <= 20 and not rounded
    wild = 0 if smooth else 0.2
    lines = [f"{name} = {draw.array((rows, d), dtype, wild=wild)}" for name, rows in (("x", n), ("y", m))]
    extra = ""
    if labels:
        kind = draw.choice(LABELS)
        lines.append(f"labels = (randn({draw.seed_()}, {n}).abs() * 1e6).to(torch.{kind}) % {m}")
        extra = ", labels=labels" if which == "info_nce" else ", labels"
    call = f"out = {_call(which, o, extra)}"
    case = Case(which, call, lines=lines)
    case.names = ("x", "y", "labels", "image_features", "text_features")

    def truth(x: np.ndarray, y: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        return np.ravel(nce(x, y, {**o, "labels": at}))

    def check(names: dict[str, Any]) -> str | None:
        x, y = f64(names["x"]), f64(names["y"])
        at = names["labels"].numpy() if labels else None
        names = {**names, "dtype": names["x"].dtype, "out": names["out"].reshape(1)}
        wide = accumulation(names["dtype"])
        if o.get("normalize") and _narrow(x, y, wide):
            return None
        size = max(1.0, float(np.abs(truth(x, y, at)).max()))
        return near("out", names, lambda a, b: truth(a, b, at), [x, y], size)

    case.check = check
    flat = o.get("normalize") and (o.get("prefixes") or [d])[-1] == 1  # cosines of numbers have no slope
    if smooth and not labels and not flat:
        case.differential = Differential(call.removeprefix("out = "), ("x", "y"), truth)
    if draw.chance(0.08):
        case.expect, case.differential = "error", None
        lines.append(_spoilt(draw, which, labels, m))
    return case


def _call(which: str, o: dict[str, Any], extra: str) -> str:
    if which == "ClipLoss":
        return f"pyrepr.nn.ClipLoss()(x, y, {o['scale']})"
    if which == "MatryoshkaLoss":
        options = ", ".join(f"{key}={o[key]!r}" for key in ("scale", "directions", "label_smoothing"))
        return f"pyrepr.nn.MatryoshkaLoss({o['prefixes']}, {o['weights']}, {options})(x, y{extra})"
    options = "".join(f", {key}={value!r}" for key, value in o.items() if key not in ("scale", "labels"))
    return f"pyrepr.functional.info_nce(x, y, {o['scale']}{options}{extra})"


def _spoilt(draw: Draw, which: str, labels: bool, m: int) -> str:
    if labels and draw.chance(0.5):
        return draw.choice(
            (
                f"labels = labels + {m}",
                "labels = labels - 1 - labels.max()",
                "labels = labels[:-1]",
                "labels = labels.float()",
                "labels = labels.tolist()",
                "labels = labels[:, None]",
            )
        )
    return draw.wrong(draw.choice(("x", "y")))


BAD: Sequence[tuple[str, str]] = (
    ("pairwise_topk(x, x, 0)", "k"),
    ("pairwise_topk(x, x, 1.5)", "k"),
    ("pairwise_topk(x, x, True)", "k"),
    ("pairwise_topk(x, metric='l2')", "metric"),
    ("pairwise_topk(x, 'x', 1)", "y"),
    ("pairwise_topk(x, [x, 3], 1)", "y"),
    ("pairwise_topk(x, [x, x[:, :1]], 1)", "y"),
    ("pairwise_topk(x, np.zeros((3, 4)), 1)", "y"),
    ("pairwise_topk(x, np.zeros((3, 4), dtype=int), 1)", "y"),
    ("pairwise_topk(x, np.zeros(4, dtype='f4'), 1)", "y"),
    ("pairwise_topk(x, [], 1)", "y"),
    ("pairwise_logsumexp(x, x, kernel='rbf')", "kernel"),
    ("pairwise_logsumexp(x, x, scale=0)", "scale"),
    ("pairwise_logsumexp(x, x, scale=float('nan'))", "scale"),
    ("pairwise_logsumexp(x, x, scale='1')", "scale"),
    ("pairwise_logsumexp(x, x, scale=torch.ones(2))", "scale"),
    ("pairwise_logsumexp(x, x, scale=torch.tensor(-1.0))", "scale"),
    ("pairwise_logsumexp(x, x, scale=torch.tensor(1))", "scale"),
    ("info_nce(x, x[:2])", "y"),
    ("info_nce(x[:0], x)", "x"),
    ("info_nce(x, x, directions='all')", "directions"),
    ("info_nce(x, x, directions=())", "directions"),
    ("info_nce(x, x, directions=3)", "directions"),
    ("info_nce(x, x, label_smoothing=1)", "label_smoothing"),
    ("info_nce(x, x, label_smoothing='a')", "label_smoothing"),
    ("info_nce(x, x, label_smoothing=float('nan'))", "label_smoothing"),
    ("info_nce(x, x, prefixes=[3, 2])", "prefixes"),
    ("info_nce(x, x, prefixes=[9])", "prefixes"),
    ("info_nce(x, x, prefixes=3)", "prefixes"),
    ("info_nce(x, x, prefixes=[2.0])", "prefixes"),
    ("info_nce(x, x, prefixes=[2], weights=[1, 2])", "weights"),
    ("info_nce(x, x, prefixes=[2], weights=['a'])", "weights"),
    ("info_nce(x, x, prefixes=[2], weights=3)", "weights"),
    ("info_nce(x, x, weights=[1.0])", "weights"),
)
BAD_MODULES: Sequence[tuple[str, str]] = (
    ("MatryoshkaLoss([])(x, x)", "dims"),
    ("MatryoshkaLoss([2, 2])(x, x)", "dims"),
    ("MatryoshkaLoss(3)(x, x)", "dims"),
    ("MatryoshkaLoss(['a'])(x, x)", "dims prefixes"),
    ("MatryoshkaLoss([2], [1, 2])(x, x)", "weights"),
    ("MatryoshkaLoss([2], ['a'])(x, x)", "weights"),
    ("MatryoshkaLoss([2], scale=-1)(x, x)", "scale"),
    ("ClipLoss(use_horovod=True)(x, x, 1.0)", "use_horovod"),
    ("ClipLoss(rank=1)(x, x, 1.0)", "rank"),
    ("ClipLoss(world_size=2)(x, x, 1.0)", "world_size torch"),
    ("ClipLoss()(x, x[:2], 1.0)", "text_features"),
    ("ClipLoss()(x, None, 1.0)", "text_features"),
    ("ClipLoss()(x, x, None)", "scale logit_scale"),
)


def draw_options(draw: Draw) -> Case:
    if draw.chance(0.6):
        text, words = draw.choice(BAD)
        text = f"pyrepr.functional.{text}"
    else:
        text, words = draw.choice(BAD_MODULES)
        text = f"pyrepr.nn.{text}"
    return Case("options", f"out = {text}", "error", ["x = randn(1, 6, 4).float()"], names=tuple(words.split()))


def draw(draw: Draw) -> Case:
    return draw.choices((draw_topk, draw_logsumexp, draw_nce, draw_options), (4, 3, 4, 0.5))[0](draw)
