"""Every way of differentiating, against a complex step through the textbook formula.

For an analytic f in NumPy, Im f(x + i h v) / h is the derivative along v to the last digit, for any small h. The second
derivative along v and w is the difference of two such steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from draw import EPS, Case, Draw
from torch import Tensor

FIRST = ("reverse", "func_grad", "jvp", "dual", "jacfwd", "vmap", "vmap_grad")
SECOND = ("create_graph", "grad_of_grad", "forward_over_reverse")
MODES = FIRST + SECOND
STEP = 1e-40
DIFFERENCE = 1e-7
# Errors seen on correct derivatives stay below a tenth of these.
OF_ROUNDING, OF_CONDITION = 4000, 1000


def flat(result: Any) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]


class Problem:
    """The function of a case, a loss on it, random directions, and what they have to give."""

    def __init__(self, case: Case, names: dict[str, Any], draw: Draw) -> None:
        self.case, self.names = case, names
        differential = case.differential
        assert differential is not None
        self.rng = np.random.default_rng(draw.seed_())
        # Forward mode writes tangents in the layout of their variables, so these may not overlap.
        self.variables = [names[name].detach().clone() for name in differential.variables]
        self.arrays = [x.double().resolve_neg().numpy() for x in self.variables]
        self.code = compile(differential.run, "case", "eval")
        narrow = max(EPS[x.dtype] for x in self.variables)
        self.eps = EPS[torch.float64] if narrow == EPS[torch.float64] else EPS[torch.float32]
        self.size = differential.truth(*self.arrays).size
        self.weights = self.rng.integers(-4, 5, self.size) * 0.25

    def function(self, *variables: Tensor) -> Any:
        return eval(self.code, {**self.names, **dict(zip(self.case.differential.variables, variables, strict=True))})

    def loss(self, *variables: Tensor) -> Tensor:
        outputs = flat(self.function(*variables))
        total, place = torch.zeros((), dtype=torch.float64), 0
        for out in outputs:
            weights = torch.from_numpy(self.weights[place : place + out.numel()]).view(out.shape)
            total, place = total + (out.double() * weights).sum(), place + out.numel()
        return total

    def direction(self) -> list[np.ndarray]:
        """As large as the variables, and exactly representable in their dtypes."""
        found = []
        for x, a in zip(self.variables, self.arrays, strict=True):
            rms = np.sqrt(np.mean(a * a)) if a.size else 0
            step = self.rng.standard_normal(a.shape) * (rms or 1)
            found.append(torch.from_numpy(np.asarray(step)).to(x.dtype).double().numpy())
        return found

    def step(self, arrays: list[np.ndarray], direction: list[np.ndarray]) -> np.ndarray:
        moved = [a + 1j * STEP * v for a, v in zip(arrays, direction, strict=True)]
        return np.imag(self.case.differential.truth(*moved)) / STEP

    def second(self, arrays: list[np.ndarray], v: list[np.ndarray], w: list[np.ndarray]) -> np.ndarray:
        sides = [self.step([a + sign * DIFFERENCE * b for a, b in zip(arrays, w, strict=True)], v) for sign in (1, -1)]
        return (sides[0] - sides[1]) / (2 * DIFFERENCE)

    def disturbed(self) -> list[np.ndarray]:
        return [a * (1 + self.eps * self.rng.choice([-1, 1], a.shape)) for a in self.arrays]

    def tensors(self, direction: list[np.ndarray]) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(v.copy()).to(x.dtype) for v, x in zip(direction, self.variables, strict=True))

    def judge(self, name: str, got: np.ndarray, of: Any, rounding: Any = 0.0) -> str | None:
        """Compares with of(arrays); `of` is the truth as a function of the variables."""
        truth = of(self.arrays)
        around = [of(self.disturbed()) for _ in range(2)]
        if not np.isfinite(truth).all() or not all(np.isfinite(a).all() for a in around):
            return None
        wide = torch.finfo(torch.float64 if self.eps == EPS[torch.float64] else torch.float32)
        if np.abs(truth).max(initial=0) > wide.max / 4:
            return None
        change = max(float(np.abs(a - truth).max(initial=0)) for a in around)
        if OF_CONDITION * change > self.size_of(truth) and change > 0:
            return None  # rounding decides
        least = 1e-300 if self.eps == EPS[torch.float64] else 1e-36  # as in draw.compare: precision ends
        room = OF_CONDITION * change + OF_ROUNDING * self.eps * self.size_of(truth) + rounding + least
        if np.isinf(room).any():
            return None  # the numbers themselves are beyond their type
        off = np.abs(got - truth) - room
        if not np.isfinite(got).all() or (off > 0).any():
            i = int(np.argmax(np.where(np.isfinite(off), off, np.inf)))
            got, truth = np.ravel(got)[i], np.ravel(truth)[i]
            zero = " (silently zero)" if got == 0 else ""
            return f"{name} is {got!r}{zero}, truth {truth!r}, allowed {float(np.max(room)):.3g}"
        return None

    def size_of(self, truth: np.ndarray) -> float:
        return max(self.typical, self.case.differential.size(*self.arrays), float(np.abs(truth).max(initial=0)))

    typical = 0.0


def inner(direction: list[np.ndarray], gradients: Any) -> tuple[float, float]:
    """⟨g, v⟩, and what rounding every element of g to its dtype may change in it, three times: under vmap a tensor that
    comes in twice has two gradients, which are added up."""
    total, rounding = 0.0, 0.0
    for v, g in zip(direction, gradients, strict=True):
        if g is None:
            continue
        product = g.detach().double().numpy(force=True) * v  # also of a lazy zero
        least = torch.finfo(g.dtype).smallest_normal * EPS[g.dtype] * 2 * float(np.abs(v).sum())
        total, rounding = (
            total + float(product.sum()),
            rounding + 4 * EPS[g.dtype] * float(np.abs(product).sum()) + least,
        )
    return total, rounding


def check(mode: str, case: Case, names: dict[str, Any], draw: Draw) -> tuple[str | None, int]:
    """What is wrong (or None), and how many calls it took. Exceptions are the caller's."""
    problem = Problem(case, names, draw)
    v, w = problem.direction(), problem.direction()
    if mode in ("jvp", "dual", "jacfwd"):
        return forward(problem, mode, v), 1
    if mode in ("vmap", "vmap_grad"):
        if not case.differential.vmap:
            return None, 0
        return mapped(problem, mode, v), 1
    if mode in SECOND:
        return second(problem, mode, v, w), 2
    variables = [x.clone().requires_grad_() for x in problem.variables]
    if mode == "reverse":
        gradients: Any = torch.autograd.grad(problem.loss(*variables), variables, allow_unused=True)
    else:
        places = tuple(range(len(variables)))
        gradients = torch.func.grad(problem.loss, argnums=places)(*problem.variables)
    got, rounding = inner(v, gradients)
    problem.typical = max(
        float(np.abs(problem.weights @ problem.step(problem.arrays, problem.direction()))) for _ in range(3)
    )
    return problem.judge("⟨gradient, v⟩", np.asarray(got), lambda a: problem.weights @ problem.step(a, v), rounding), 1


def forward(problem: Problem, mode: str, v: list[np.ndarray]) -> str | None:
    tangents = problem.tensors(v)
    if mode == "jvp":
        _, out = torch.func.jvp(lambda *a: tuple(flat(problem.function(*a))), tuple(problem.variables), tangents)
    elif mode == "dual":
        from torch.autograd import forward_ad

        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(problem.variables, tangents, strict=True)]
            parts = [(forward_ad.unpack_dual(y), y) for y in flat(problem.function(*duals))]
            out = [torch.zeros_like(y) if dual.tangent is None else dual.tangent for dual, y in parts]
    else:
        if sum(x.numel() for x in problem.variables) > 60:
            return None
        places = tuple(range(len(problem.variables)))
        jacobians = torch.func.jacfwd(lambda *a: tuple(flat(problem.function(*a))), argnums=places)(*problem.variables)
        out = [
            sum(
                (j.double().flatten(j.dim() - t.dim()) @ t.double().flatten()) if t.dim() else j.double() * t
                for j, t in zip(row, tangents, strict=True)
            ).to(row[0].dtype)
            for row in jacobians
        ]
    got = np.concatenate([y.detach().double().numpy().ravel() for y in out]) if out else np.zeros(0)
    rounding = 4 * max(EPS[y.dtype] for y in out) * float(np.abs(got).max(initial=0))
    rounding += max(torch.finfo(y.dtype).smallest_normal * EPS[y.dtype] * 2 for y in out)
    if mode == "jacfwd":
        rounding *= 16 * len(v)
    return problem.judge("tangent", got, lambda a: problem.step(a, v), rounding)


def mapped(problem: Problem, mode: str, v: list[np.ndarray]) -> str | None:
    """Three points along v at once."""
    along = (0.0, 0.25, -0.5)
    points = [
        [x + (s * torch.from_numpy(d)).to(x.dtype) for x, d in zip(problem.variables, v, strict=True)] for s in along
    ]
    stacked = [torch.stack(xs) for xs in zip(*points, strict=True)]
    if mode == "vmap":
        out = torch.func.vmap(lambda *a: tuple(flat(problem.function(*a))))(*stacked)
    else:
        places = tuple(range(len(stacked)))
        out = torch.func.vmap(torch.func.grad(problem.loss, argnums=places))(*stacked)
    for i, point in enumerate(points):
        if any(((a == 0) & (b != 0)).any() for a, b in zip(point, problem.variables, strict=True)):
            continue  # a step onto zero may be one onto a kink
        problem.arrays = [x.double().numpy() for x in point]
        if mode == "vmap":
            got = np.concatenate([y[i].detach().double().numpy().ravel() for y in out])
            rounding = 4 * max(EPS[y.dtype] for y in out) * float(np.abs(got).max(initial=0))
            what = problem.judge(f"value {i}", got, lambda a: problem.case.differential.truth(*a), rounding)
        else:
            value, rounding = inner(v, [g[i] for g in out])
            problem.typical = max(
                float(np.abs(problem.weights @ problem.step(problem.arrays, problem.direction()))) for _ in range(3)
            )
            what = problem.judge(
                f"⟨gradient {i}, v⟩", np.asarray(value), lambda a: problem.weights @ problem.step(a, v), rounding
            )
        if what:
            return what
    return None


def second(problem: Problem, mode: str, v: list[np.ndarray], w: list[np.ndarray]) -> str | None:
    if not np.isfinite(problem.case.differential.truth(*problem.arrays)).all():
        return None  # though it may be finite on both sides, where the truth takes its difference
    direction = [torch.from_numpy(d.copy()) for d in v]
    places = tuple(range(len(v)))

    def slope(gradients: Any) -> Tensor:
        parts = [(g.double() * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None]
        return torch.stack(parts).sum()

    if mode == "create_graph":
        variables = [x.clone().requires_grad_() for x in problem.variables]
        gradients = torch.autograd.grad(problem.loss(*variables), variables, create_graph=True, allow_unused=True)
        whole = slope(gradients)  # constant, if the function is linear
        seconds: Any = (
            torch.autograd.grad(whole, variables, allow_unused=True) if whole.requires_grad else [None] * len(v)
        )
    elif mode == "grad_of_grad":
        gradient = torch.func.grad(problem.loss, argnums=places)
        seconds = torch.func.grad(lambda *a: slope(gradient(*a)), argnums=places)(*problem.variables)
    else:
        gradient = torch.func.grad(problem.loss, argnums=places)
        _, seconds = torch.func.jvp(gradient, tuple(problem.variables), problem.tensors(w))
        v, w = w, v  # the second derivative is symmetric, but what was rounded is what was dotted with v
        got, rounding = inner(w, seconds)
    if mode != "forward_over_reverse":
        got, rounding = inner(w, seconds)
    first = np.abs(problem.weights) @ np.abs(problem.step(problem.arrays, v))
    rounding += float(np.finfo(np.longdouble).eps * first / DIFFERENCE)  # of the truth, which is a difference
    truth = problem.weights @ problem.second(problem.arrays, v, w)
    problem.typical = max(
        abs(float(problem.weights @ problem.second(problem.arrays, v, problem.direction()))) for _ in range(3)
    )
    # The first gradient is rounded to its dtype before it is differentiated again.
    narrow = max(EPS[x.dtype] for x in problem.variables)
    rounding += 64 * (narrow if narrow > 2.0**-20 else 0) * max(problem.typical, abs(truth))
    rounding += 1e-6 * problem.typical  # of the truth's own difference
    return problem.judge(
        "second derivative", np.asarray(got), lambda a: np.asarray(problem.weights @ problem.second(a, v, w)), rounding
    )
