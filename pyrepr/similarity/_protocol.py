"""What every measure of similarity is: a small object with options, for one pair of layers or for all pairs at once.

A subclass with a name is all it takes for a measure to be known by its shorthand everywhere (:data:`MEASURES`).
"""

from __future__ import annotations

import ast
import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyrepr._checks import INTEGERS, check_layers, check_tensor, layer_list, shape_of, shown
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.similarity._hsic import DegenerateInputWarning
from pyrepr.stats.moments import LayerMoments

MEASURES: dict[str, type[Measure]] = {}
# Shorthands of a measure with an option: name → (measure, options).
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {}


@dataclass(frozen=True)
class Measure:
    """Similarity of two representations of the same samples; call it with x [n, p] and y [n, q].

    Options are fields, so measures compare, hash and print by them. Work that belongs to one layer is done once a
    layer (`prepare`), whatever the number of pairs (`matrix`).

    Attributes:
        name: shorthand, as :func:`as_measure` takes it.
        title: for axes and colour bars.
        symmetric: whether measure(x, y) = measure(y, x). If not, the value says what the first explains of the second.
        limits: what a scale of colours spans where the values lie inside.

    Example:
        >>> x, y = torch.randn(50, 5), torch.randn(50, 7)
        >>> for measure in ("cka", "mutual_knn(k=5)"):
        ...     value = pyrepr.similarity.as_measure(measure).matrix([x, y])
        >>> value.shape
        torch.Size([2, 2])
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    symmetric: ClassVar[bool] = True
    limits: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            MEASURES[cls.name] = cls

    @property
    def least(self) -> int:
        """The smallest number of samples it takes."""
        return 2

    @property
    def streams(self) -> bool:
        """Whether :meth:`of_moments` gives it, so that no rows have to be held."""
        return False

    @property
    def key(self) -> str:
        """The shortest string that :func:`as_measure` makes this measure of."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        name = self.name
        for alias, (measure, options) in ALIASES.items():
            if measure == name and all(changed.get(option) == value for option, value in options.items()):
                name, changed = alias, {k: v for k, v in changed.items() if k not in options}
                break
        return name + (f"({', '.join(f'{k}={v}' for k, v in changed.items())})" if changed else "")

    def describe(self) -> str:
        """The measure and its options in words, for titles."""
        return self.title

    def chance(self, n: int) -> float | None:
        """The expected value for independent representations of n samples; ``None`` where there is no closed form."""
        return None

    def prepare(self, x: Tensor) -> Any:
        """What one layer [n, d] contributes to all its pairs. x: float32 or float64."""
        raise NotImplementedError

    def pairs(self, left: Sequence[Any], right: Sequence[Any] | None) -> Tensor:
        """Values [La, Lb] of what `prepare` made; right = ``None``: left with itself."""
        raise NotImplementedError

    def of_moments(self, moments: LayerMoments) -> Tensor:
        """Values [La, Lb] float64 from the moments of a stream.

        Raises:
            ValueError: if the measure needs the rows.
        """
        raise ValueError(f"{self.name} needs the rows of all samples; moments do not determine it")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The value for x [n, p] and y [n, q]: a scalar, float64 for float64 inputs, else float32."""
        layers = self._checked(["x", "y"], [x, y])
        return self._values(layers[:1], layers[1:])[0, 0]

    def matrix(self, xs: Sequence[Tensor] | Tensor, ys: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """Values of all pairs of layers.

        Args:
            xs: La layers as a list of [n, d_l] or one tensor [La, n, d].
            ys: Lb layers of the other network; ``None`` compares xs with itself.

        Returns:
            [La, Lb], float64 for float64 inputs, else float32; nothing is clamped.
        """
        names, layers = layer_list("xs", xs)
        split = len(layers)
        if ys is not None:
            more_names, more = layer_list("ys", ys)
            names, layers = names + more_names, layers + more
        layers = self._checked(names, layers)
        return self._values(layers[:split], layers[split:] if ys is not None else None)

    def stderr(
        self,
        xs: Sequence[Tensor] | Tensor,
        ys: Sequence[Tensor] | Tensor | None = None,
        *,
        groups: Tensor | None = None,
        draws: int = 20,
        seed: int = 0,
    ) -> Tensor:
        """Standard error of :meth:`matrix`: the delete-a-block jackknife.

        Samples are dealt at random into blocks and the matrix is computed without each of them. This is not a bootstrap
        with replacement, in which a sample that is drawn twice is its own nearest neighbour, at distance 0. It errs
        upwards on average (Efron & Stein 1981), for sets of neighbours by about a half.

        Args:
            xs, ys: as for :meth:`matrix`.
            groups: [n] integers; samples of one group (tokens of a text) stay together. ``None``: every sample is one.
            draws: number of blocks, and of matrices that are computed.
            seed: of the dealing.

        Returns:
            [La, Lb] float64.
        """
        _, layers = layer_list("xs", xs)
        split = len(layers)
        if ys is not None:
            layers = layers + layer_list("ys", ys)[1]
        if not isinstance(draws, int) or draws < 2:
            raise ValueError(f"draws must be an integer of at least 2, got {shown(draws)}")
        block = _dealt(layers[0], groups, draws, seed)
        values = []
        with torch.no_grad():
            for left_out in range(draws):
                rows = (block != left_out).nonzero()[:, 0]
                part = [x[rows] for x in layers]
                values.append(self.matrix(part[:split], part[split:] if ys is not None else None).double())
        spread = torch.stack(values) - torch.stack(values).mean(0)
        return ((draws - 1) / draws * spread.square().sum(0)).sqrt()

    def _checked(self, names: list[str], layers: list[Any]) -> list[Tensor]:
        layers = check_layers(names, layers)
        n = layers[0].shape[0]
        if n < self.least:
            raise ValueError(f"{names[0]} must have at least {self.least} samples for {self.describe()}, got {n}")
        return layers

    def _values(self, left: list[Tensor], right: list[Tensor] | None) -> Tensor:
        dtype = compute_dtype(left[0].dtype)
        sides = [side for side in (left, right) if side is not None]
        good = [_usable(side) for side in sides]
        prepared = []
        for side, usable in zip(sides, good, strict=True):
            rows = [x.to(dtype) for x in side]
            prepared.append([self.prepare(x if ok else _stand_in(x)) for x, ok in zip(rows, usable, strict=True)])
        values = self.pairs(prepared[0], prepared[1] if right is not None else None).to(dtype)
        if all(map(all, good)):
            return values
        defined = torch.outer(torch.tensor(good[0], device="cpu"), torch.tensor(good[-1], device="cpu")).to(
            values.device
        )
        return torch.where(defined, values, torch.nan)


def _usable(side: list[Tensor]) -> list[bool]:
    """Which layers have a similarity to anything; a warning names the others, whose values are NaN."""
    found = []
    for i, x in enumerate(side):
        x = x.detach()
        finite = bool(x.sum(dtype=torch.float64).isfinite()) or bool(x.isfinite().all())
        found.append(finite and not bool((x == x[:1]).all()))
        if not found[-1]:
            why = "all samples have the same features" if finite else "features are NaN or infinite"
            warnings.warn(f"layer {i}: {why}; returning NaN", DegenerateInputWarning, stacklevel=5)
    return found


def _stand_in(x: Tensor) -> Tensor:
    """Rows that any measure can take, in place of some it cannot; the values are not used."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)


def _dealt(x: Tensor, groups: Tensor | None, draws: int, seed: int) -> Tensor:
    """[n]: the block of every sample."""
    n = x.shape[0]
    if groups is None:
        inverse, count = torch.arange(n, device="cpu"), n
    else:
        groups = check_tensor("groups", groups, INTEGERS)
        if groups.shape != (n,):
            raise ValueError(f"groups must have shape [n] = [{n}], got {shape_of(groups)}")
        unique, inverse = groups.cpu().unique(return_inverse=True)
        count = len(unique)
    if count < draws:
        unit = "samples" if groups is None else "groups"
        raise ValueError(f"draws must be at most the number of {unit}, {count}, got {draws}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    return (order % draws)[inverse].to(x.device)


def pair_table(left: Sequence[Any], right: Sequence[Any] | None, value: Any, symmetric: bool = True) -> Tensor:
    """value(a, b) of all pairs as [La, Lb]; with itself, only once where it is symmetric."""
    others = left if right is None else right
    half = right is None and symmetric
    rows: list[list[Tensor]] = []
    for i, a in enumerate(left):
        rows.append([rows[j][i] if half and j < i else value(a, b) for j, b in enumerate(others)])
    return torch.stack([torch.stack(row) for row in rows])


def products(left: Sequence[Tensor], right: Sequence[Tensor] | None) -> Tensor:
    """Inner products [La, Lb] of one vector a layer."""
    stacked = torch.stack(list(left))
    return stacked @ (stacked if right is None else torch.stack(list(right))).T


def as_measure(measure: str | Measure | type[Measure]) -> Measure:
    """A measure from its shorthand, with options in brackets: ``"cka"``, ``"mutual_knn(k=5)"``.

    Raises:
        ValueError: for an unknown name or option; TypeError: for anything but a string or a measure.

    Example:
        >>> pyrepr.similarity.as_measure("mutual_knn(k=5)") == pyrepr.similarity.MutualKNN(k=5)
        True
    """
    if isinstance(measure, Measure):
        return measure
    if isinstance(measure, type) and issubclass(measure, Measure):
        return measure()
    if not isinstance(measure, str):
        raise TypeError(f"a measure must be a name or a Measure, got {type(measure).__name__}")
    form = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", measure)
    name = form.group(1).replace("-", "_").lower() if form else measure
    names = [*MEASURES, *ALIASES]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"near matches: {', '.join(close)}" if close else f"measures are {', '.join(names)}"
        raise ValueError(f"measure {measure!r} does not exist; {hint}")
    name, options = ALIASES.get(name, (name, {}))
    kind = MEASURES[name]
    known = [f.name for f in fields(kind)]
    options = {**options, **_options(form.group(2) or "" if form else "", measure)}
    for option in options:
        if option not in known:
            raise ValueError(f"measure {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return kind(**options)


def _options(text: str, measure: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^(]*\))", text):
        if part.strip():
            option, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise ValueError(f"measure {measure!r}: options are written name=value, got {part.strip()!r}")
            try:
                found[option] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[option] = value
    return found
