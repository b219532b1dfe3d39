"""Random test cases as lines of Python: what a failure prints is what was run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = ("float32", "float64", "bfloat16", "float16")
EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 47, 63, 64, 65, 80, 96, 100, 127, 128, 129)
SPECIAL = ("nan", "inf", "-inf")


def randn(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gapped(x: Tensor) -> Tensor:
    """x with a NaN (or the least integer) after every element of the last axis."""
    rest = torch.full_like(x, torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)
    return torch.stack([x, rest], -1).flatten(-2)[..., ::2]


def put(x: Tensor, *values: tuple[int, float]) -> Tensor:
    """x with numbers put at places of its flattened form."""
    x = x.clone()
    for place, value in values if x.numel() else ():
        x.view(-1)[place % x.numel()] = value
    return x


# What a printed script needs in place of an import of this module, by the names that stand in it.
HELPERS = {
    "randn(": "randn = lambda seed, *s: torch.randn(s, generator=torch.Generator().manual_seed(seed), "
    "dtype=torch.float64)",
    "gapped(": "gapped = lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]",
    "put(": "put = lambda x, *v: x.flatten().index_put((torch.tensor([i % x.numel() for i, _ in v]),), "
    "torch.tensor([a for _, a in v], dtype=x.dtype)).view(x.shape)",
    "write(": "import base64; from pathlib import Path; write = lambda name, text: (Path(name).parent.mkdir("
    "parents=True, exist_ok=True), Path(name).write_bytes(base64.b64decode(text)))",
    "run(": "from pyrepr import cli; run = cli.main",
    "state(": "from models import net, state, unchanged  # with PYTHONPATH=tests/fuzz",
    "refused(": "refused = lambda call: call()  # has to raise; take it out to see the next line",
    "guarded(": "guarded = lambda x, side: x  # in the fuzzer: beside a page that nobody may touch",
}


@dataclass
class Differential:
    """What is differentiated: a call with some tensors of the case as variables.

    run: an expression in the case's names. variables: those that vary. truth: NumPy arrays of the variables, complex
    too, to the result (a complex step through it is the derivative). vmap_axes: the same, if a new leading axis of
    all variables may be mapped over. size: of the terms a derivative is made of at these variables, where they cancel.
    """

    run: str
    variables: tuple[str, ...]
    truth: Callable[..., np.ndarray]
    vmap: bool = True
    size: Callable[..., float] = lambda *variables: 0.0


@dataclass
class Case:
    """One call. Lines make tensors, the call binds `out`; check says in a sentence what is wrong with it."""

    kind: str
    call: str
    expect: str = "value"  # or "error", or "either": a right value or a clear error
    lines: list[str] = field(default_factory=list)
    check: Callable[[dict[str, Any]], str | None] = lambda names: None
    changed: tuple[str, ...] = ()  # tensors that the call may write to
    differential: Differential | None = None
    names: tuple[str, ...] = ()  # words one of which a clear message has to hold; default: the call's arguments
    calls: int = 1
    repeatable: bool = True  # with the same bits on another number of threads
    around: str = ""  # the mode in which it was run, for the script

    def script(self) -> str:
        text = "\n".join([*self.lines, self.call])
        helpers = [line for name, line in HELPERS.items() if name in text]
        return "\n".join(
            [
                "import numpy as np, torch, pyrepr",
                *helpers,
                *self.lines,
                *([self.around] * bool(self.around)),
                self.call,
            ]
        )


class Draw(random.Random):
    """Random choices, and expressions for random tensors."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def size(self, most: int = 40, zero: float = 0.02) -> int:
        if self.chance(zero):
            return 0
        if self.chance(0.12):
            return 1
        return self.choice([size for size in SIZES if size <= most])

    def seed_(self) -> int:
        return self.randrange(1 << 30)

    def dtype(self, weights: Sequence[float] = (5, 2, 2, 2)) -> str:
        return self.choices(DTYPES, weights)[0]

    def values(self, shape: Sequence[int], *, scale: str = "", wild: float = 0.0) -> str:
        """An expression for [shape] in float64; with probability `wild` of an unusual kind."""
        text = f"randn({self.seed_()}, {', '.join(map(str, shape))})" if len(shape) else f"randn({self.seed_()})"
        if scale:
            text += f" * {scale}"
        if self.chance(wild):
            kind = self.choice(("power", "zeros", "constant", "integers", "outlier", "offset"))
            if kind == "power":
                text = f"({text}) * 1e{self.randint(-25, 25)}"
            elif kind == "zeros":
                text = f"({text}) * 0.0"
            elif kind == "constant":
                text = f"({text}) * 0 + {self.choice((-2.5, 1.0, 1e-3))}"
            elif kind == "integers":
                text = f"({text}).round()"
            elif kind == "outlier":
                text = f"put({text}, ({self.seed_()}, {self.choice((1e3, -1e5, 1e8))}))"
            else:
                text = f"({text}) + {self.choice((10.0, 1e3, -1e5))}"
        return text

    def special(self, text: str) -> str:
        """`text` with one or two numbers that are not finite."""
        places = [f"({self.seed_()}, float('{self.choice(SPECIAL)}'))" for _ in range(self.randint(1, 2))]
        return f"put({text}, {', '.join(places)})"

    def tensor(self, values: str, dims: int, dtype: str, layouts: bool = True) -> str:
        """An expression for a tensor of those values: dtype, strides, and where it lies in memory."""
        text = f"({values}).to(torch.{dtype})"
        if not layouts or self.chance(0.3):
            return text
        kind = self.choice(("plain", "transposed", "gapped", "offset", "sliced", "negated", "parameter", "plain"))
        if kind == "transposed" and dims >= 2:
            text = f"{text}.mT.contiguous().mT"
        elif kind == "gapped" and dims >= 1:
            text = f"gapped({text})"
        elif kind == "offset" and dims >= 1:
            text = f"torch.cat([{text}[..., :1], {text}], -1)[..., 1:]"
        elif kind == "sliced" and dims >= 2:
            text = f"torch.stack([{text}, {text} * 3], 1).flatten(0, 1)[::2]"
        if self.chance(0.5):
            text = f"guarded({text}, '{self.choice(('end', 'start'))}')"
        if kind == "negated":
            text = f"torch._neg_view(-{text})"
        elif kind == "parameter":
            text = f"torch.nn.Parameter({text}, requires_grad=False)"
        return text

    def expanded(self, shape: Sequence[int], dtype: str, scale: str = "", overlapping: bool = True) -> str:
        """[shape] with a stride of 0 somewhere, or windows that overlap."""
        shape = list(shape)
        if len(shape) >= 2 and shape[-1] and shape[-2] and overlapping and self.chance(0.5):
            flat = [*shape[:-2], shape[-2] + shape[-1] - 1]
            return f"guarded(({self.values(flat, scale=scale)}).to(torch.{dtype}), 'end').unfold(-1, {shape[-1]}, 1)"
        axis = self.randrange(len(shape))
        small = [1 if i == axis else size for i, size in enumerate(shape)]
        wanted = ", ".join(map(str, shape))
        return f"guarded(({self.values(small, scale=scale)}).to(torch.{dtype}), 'end').expand({wanted})"

    def array(
        self, shape: Sequence[int], dtype: str, *, scale: str = "", wild: float = 0.0, special: float = 0.0
    ) -> str:
        """A tensor of any values and layout."""
        if len(shape) and self.chance(0.08):
            return self.expanded(shape, dtype, scale)
        values = self.values(shape, scale=scale, wild=wild)
        if self.chance(special):
            values = self.special(values)
        return self.tensor(values, len(shape), dtype)

    def wrong(self, name: str, wider: bool = True, deeper: bool = True, moved: bool = True) -> str:
        """A line that spoils the tensor `name` in one of many ways; wider, deeper, moved:
        one more column, more axes, another device do."""
        return self.choice(
            (f"{name} = torch.cat([{name}, {name}[..., :1]], -1) if {name}.numel() else 3.0",) * wider
            + (f"{name} = {name}[None, None, None]",) * deeper
            + (f"{name} = torch.zeros({name}.shape, dtype={name}.dtype, device='meta')",) * moved
            + (
                f"{name} = None",
                f"{name} = 3.0",
                f"{name} = 'x'",
                f"{name} = {name}.tolist() if isinstance({name}, torch.Tensor) else [1.0]",
                f"{name} = torch.zeros((), dtype={name}.dtype)",
                f"{name} = {name}.to(torch.complex64)",
                f"{name} = {name}.to(torch.bool)",
                f"{name} = {name}.to(torch.float8_e4m3fn)",
                f"{name} = {name}.detach().to_sparse()",
            )
        )


def f64(x: Tensor) -> np.ndarray:
    """x as float64 numbers (in the widest type NumPy has here: x87's 80 bits have the exponents that squares need)."""
    return x.detach().double().resolve_neg().numpy().astype(np.longdouble)


def compare(name: str, out: Tensor, truth: np.ndarray, bound: np.ndarray | float, dtype: torch.dtype) -> str | None:
    """Whether `out`, of dtype, is the rounded truth within bound.

    Where the truth is not finite, neither may `out` be; where truth and bound come near the largest number of the
    arithmetic, nothing is asked.
    """
    if not isinstance(out, Tensor) or out.device.type != "cpu":
        return f"{name} is {f'on {out.device}' if isinstance(out, Tensor) else type(out).__name__}"
    if out.dtype != dtype:
        return f"{name} must be {dtype}, is {out.dtype}"
    truth = np.asarray(truth)
    if tuple(out.shape) != truth.shape:
        return f"{name} must have shape {truth.shape}, has {tuple(out.shape)}"
    got, bound = f64(out), np.broadcast_to(np.asarray(bound, dtype=np.longdouble), truth.shape)
    largest = torch.finfo(dtype).max
    wide = torch.finfo(torch.float32).max if dtype in (torch.bfloat16, torch.float16) else largest
    known = np.isfinite(truth) & np.isfinite(bound)
    should_not_be_finite = ~np.isfinite(truth) & np.isfinite(got)
    if should_not_be_finite.any():
        i = np.unravel_index(int(should_not_be_finite.argmax()), truth.shape)
        return f"{name}{list(map(int, i))} is {float(got[i])!r} where the truth is {float(truth[i])!r}"
    with np.errstate(all="ignore"):
        inside = known & (np.abs(truth) + bound < largest / 2) & (bound < wide / 4)
        # Below the normal numbers of the arithmetic, and of the result, precision ends.
        least = 8 * EPS[dtype] * torch.finfo(dtype).smallest_normal + (1e-300 if dtype == torch.float64 else 1e-36)
        room = bound + 2 * EPS[dtype] * np.abs(truth) + least
        off = inside & ~(np.abs(got - truth) <= room)
    if off.any():
        i = np.unravel_index(int(off.argmax()), truth.shape)
        ratio = float(np.abs(got[i] - truth[i]) / room[i])
        return (
            f"{name}{list(map(int, i))} is {float(got[i])!r}, truth {float(truth[i])!r}, "
            f"off by {ratio:.3g} of what is allowed ({int(off.sum())} of {off.size})"
        )
    return None
