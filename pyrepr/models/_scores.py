"""What one measure says of all pairs of layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Score:
    """What one measure says of all pairs of layers.

    Attributes:
        values: [La, Lb] float64 on the CPU.
        stderr: their standard errors, [La, Lb], where they were asked for.
        title: of the measure, for axes. how: its options, in words.
        low, high: what colours span. chance: what unrelated layers would have, where that is known.
    """

    values: Tensor
    stderr: Tensor | None = None
    title: str = "CKA"
    how: str = ""
    low: float = 0.0
    high: float = 1.0
    chance: float | None = None

    @property
    def unsure(self) -> Tensor | None:
        """[La, Lb] bool: cells within two standard errors of what unrelated layers would have."""
        if self.stderr is None or self.chance is None:
            return None
        return (self.values - self.chance).abs() < 2 * self.stderr
