"""`StreamingCKA`: batches in any cut, merged, saved and loaded, refused batches in between. Truth: all rows at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from draw import Case, Draw, f64
from measures import cka_of, hsic_of, kernel_matrix, lost_by_moments, near

FACTOR = 4.0
BAD = (
    "stream.update([x0[:, :-1] if x0.shape[1] else x0[:, None]] * {layers})",
    "stream.update([x0[0]] * {layers})",
    "stream.update('x')",
    "stream.update([])",
    "stream.update(None)",
    "stream.update([x0] * ({layers} + 1))",
    "stream.update([x0.to(torch.int32)] * {layers})",
    "stream.update([x0, x0[1:]])",
    "stream.update(x0)",
    "stream.merge(None)",
    "stream.merge(pyrepr.StreamingCKA(estimator={other!r}, mode={mode!r}))",
    "stream.load_state_dict({{}})",
    "stream.load_state_dict({{**stream.state_dict(), 'estimator': 'both'}})",
    "stream.load_state_dict({{**stream.state_dict(), 'mode': 'other'}})",
    "stream.load_state_dict({{**stream.state_dict(), 'widths': [7] * 7}})",
    "stream.load_state_dict({{**stream.state_dict(), 'state': {{'n': 3}}}})",
    "stream.load_state_dict({{**stream.state_dict(), 'kernel': {{'name': 'x'}}}})",
    "stream.load_state_dict(5)",
)


def draw(draw: Draw) -> Case:
    """One stream of 2 to 4 batches, with detours that change nothing."""
    mode = draw.choice(("exact", "exact", "minibatch"))
    estimator = draw.choice(("unbiased", "biased"))
    layers, right = draw.randint(1, 3), draw.randint(0, 2)
    widths = [draw.choice((1, 2, 3, 8, 17, 33)) for _ in range(layers + right)]
    dtype = draw.dtype()
    batches = draw.randint(1, 4)
    rows = (
        [draw.choice((8, 16, 20))] * batches
        if mode == "minibatch"
        else [draw.choice((0, 1, 2, 3, 5, 8, 16, 33)) for _ in range(batches)]
    )
    wild = 0.15
    lines, wholes = [], []
    total = sum(rows)
    for i, width in enumerate(widths):
        lines.append(f"x{i} = {draw.array((total, width), dtype, wild=wild)}")
        wholes.append(f"x{i}")
    call = [f"stream = pyrepr.StreamingCKA(mode={mode!r}, estimator={estimator!r})"]
    if draw.chance(0.3):
        call.append(f"other = pyrepr.StreamingCKA(mode={mode!r}, estimator={estimator!r})")
    start, seen = 0, 0
    TROUBLE.clear()
    for number, count in enumerate(rows):
        target = "other" if len(call) > 1 and "other =" in call[1] and number % 2 else "stream"
        part = f"[{start} : {start + count}]"
        left, more = (", ".join(f"{x}{part}" for x in names) for names in (wholes[:layers], wholes[layers:]))
        call.append(f"{target}.update([{left}]{f', [{more}]' * bool(right)})")
        start, seen = start + count, seen + count * (target == "stream")
        if draw.chance(0.2):
            call.append(
                draw.choice(
                    (
                        "saved = stream.state_dict()\nstream = pyrepr.StreamingCKA()\nstream.load_state_dict(saved)",
                        "import copy; stream = copy.deepcopy(stream)",
                        "import pickle; stream = pickle.loads(pickle.dumps(stream))",
                    )
                )
            )
        if draw.chance(0.3) and seen:
            bad = draw.choice(BAD).format(
                layers=layers, other="biased" if estimator == "unbiased" else "unbiased", mode=mode
            )
            call.append(f"refused(lambda: {bad})")
    if any("other =" in line for line in call):
        call.append("stream.merge(other)")
    call.append("out = stream.compute()")
    least = 4 if estimator == "unbiased" else 2
    good = total >= least
    case = Case("StreamingCKA", "\n".join(call), "value" if good else "error", lines, calls=len(call))
    case.names = ("StreamingCKA", "the", "stream", "compute", "xs", "ys", "batch", "samples", "update")

    def check(names: dict[str, Any]) -> str | None:
        if names["trouble"]:
            return names["trouble"].pop()
        if names["stream"].samples != total:
            return f"samples is {names['stream'].samples}, {total} were given"
        names["dtype"] = names["x0"].dtype
        if names["out"].dtype != torch.float64:
            return f"out is {names['out'].dtype}"
        if names["dtype"] != torch.float64:
            names = {**names, "out": names["out"].float()}
        arrays = [f64(names[x]) for x in wholes]
        of = exact if mode == "exact" else lambda *a: minibatch(*a, rows=rows)

        def table(*arrays: np.ndarray) -> np.ndarray:
            left, more = arrays[:layers], arrays[layers:] if right else arrays
            return np.array([[of(a, b, estimator) for b in more] for a in left])

        first = next(count for count in rows if count)
        more = lost_by_moments(arrays, first, estimator) if mode == "exact" else 0.0
        return near("out", names, table, arrays, FACTOR, more)

    case.check = check
    return case


def exact(a: np.ndarray, b: np.ndarray, estimator: str) -> Any:
    return cka_of(a, b, {"name": "linear"}, estimator)


def minibatch(a: np.ndarray, b: np.ndarray, estimator: str, rows: list[int] = ()) -> Any:  # type: ignore[assignment]
    """A ratio of sums over batches (Nguyen et al. 2020); batches of one size, so that weights do not matter."""
    sums, start = np.zeros(3, dtype=a.dtype), 0
    for count in rows:
        parts = [x[start : start + count] for x in (a, b)]
        k, l = (kernel_matrix(x - x.mean(0), x - x.mean(0), {"name": "linear"}) for x in parts)
        sums += [hsic_of(k, l, estimator), hsic_of(k, k, estimator), hsic_of(l, l, estimator)]
        start += count
    return sums[0] / np.sqrt(sums[1] * sums[2])


TROUBLE: list[str] = []


def refused(call: Any) -> None:
    """Runs a call that must fail with a sentence; what is wrong otherwise is kept for the check."""
    try:
        call()
        TROUBLE.append("accepted what it should refuse")
    except (ValueError, TypeError) as error:
        if len(str(error).splitlines()) != 1:
            TROUBLE.append(f"{type(error).__name__} is not one sentence: {str(error)[:200]!r}")
    except Exception as error:
        TROUBLE.append(f"{type(error).__name__} is not an error for bad arguments: {str(error)[:200]}")


NAMES = {"refused": refused, "trouble": TROUBLE}
