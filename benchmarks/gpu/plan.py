"""What a run of the GPU check does, most valuable evidence first, and which assemblers it has to do it with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pyrepr import _ptxas
from pyrepr.backend import cuda_tool

# Families whose kernels multiply on the tensor cores: the instructions that assemblers got wrong.
MULTIPLY = ("delta_rule", "gram", "pairs")


@dataclass(frozen=True)
class Stage:
    """One part of a run, in processes of its own, with a share of the time that is left when its turn comes.

    timed: (family, pattern of ops) whose timed cases it times, after compiling them in parallel; none for the stages
    that ``runner.Run`` knows by name.
    """

    name: str
    share: float
    timed: tuple[tuple[str, str], ...] = ()


STAGES = (
    Stage("machine", 1),
    Stage("right", 9),  # every product on the tensor cores, under every assembler there is
    Stage("forward", 14, (("delta_rule", r"(plain|gated|kda) forward$"),)),
    Stage("decode", 3, (("delta_rule", r".* decode$"), ("causal_conv1d", r"decode, .*"))),
    Stage("cka", 6, (("gram", r"cka( rbf|_matrix)?$"),)),
    Stage("convolution", 4, (("causal_conv1d", r"convolution .*"),)),
    Stage("backward", 14, (("delta_rule", r".* forward \+ backward$"), ("gram", r"gradient$"))),
    Stage("pairs", 5, (("pairs", r".*"),)),
    Stage("lookup", 4, (("lookup", r".*"), ("gram", r"(gram|median)$"))),
    Stage("check", 8),  # every small case of every family
    Stage("behaviour", 4),
    Stage("sanitize", 6),  # does not work on every host
)


def chosen(names: list[str] | None) -> list[Stage]:
    """The stages with these names, in the order asked for; all by default."""
    known = {stage.name: stage for stage in STAGES}
    for name in names or []:
        if name not in known:
            raise ValueError(f"--stages must be among {', '.join(known)}, got {name!r}")
    return [known[name] for name in names] if names else list(STAGES)


@dataclass(frozen=True)
class Assembler:
    """A ptxas: the one that comes with Triton (no path), or another."""

    name: str
    path: str | None
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ptxas {'.'.join(map(str, self.version)) or 'of unknown version'}"


def assemblers(carried: Path | None) -> list[Assembler]:
    """Every ptxas there is, the oldest first: Triton's own, the CUDA toolkit's, and one that was carried along."""
    found = []
    if bundled := _ptxas.bundled():
        found.append(Assembler("bundled", None, _ptxas.version_of(bundled)))
    for name, path in (("system", cuda_tool("ptxas")), ("carried", carried and str(carried))):
        if path and os.access(path, os.X_OK) and (version := _ptxas.version_of(path)):
            found.append(Assembler(name, path, version))
    return sorted({a.version: a for a in reversed(found)}.values(), key=lambda a: a.version)
