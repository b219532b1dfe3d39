"""Which layers of a model are looked at: :class:`Layer`, names, patterns, and what is chosen by default.

Works on any ``nn.Module``: transformers, timm, torchvision, your own.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import nn

ROOT = "(model)"  # what the model itself is called among its layers
POOLS = ("mean", "last", "cls", "max", "spatial")
SIDES = ("output", "input")


@dataclass(frozen=True)
class Layer:
    """One view of one module, said in full; a name alone is its short form.

    Args:
        name: of the module, as ``model.named_modules()`` has it, or a pattern; ``"block#2"`` is short for ``call=2``.
        output: which of several tensors the module puts out (or takes): a position, a key, an attribute, or a path of
            them as a tuple or with dots, ``"hidden_states.0"``. ``None`` (default): the one shaped like the module's
            input, else the first whose samples can be told; never a scalar such as a loss.
        call: of a module that is called several times the call, counted from 1; ``None`` (default): every call, as
            ``name#1``, ``name#2``, …
        side: ``"output"`` (default) or ``"input"``, what the module is given.
        batch_axis: where the samples are; ``None`` (default): found by an experiment (see :func:`pyrepr.compare`).
        channel_axis: where the features of a position are; ``None`` (default): as the module that made the tensor has
            it.
        pool: as ``pool=`` of :func:`pyrepr.compare`, for this layer.

    Raises:
        ValueError, TypeError: for a value that is none of these.

    Example:
        >>> pyrepr.models.Layer("encoder.layer.0", output=0, pool="mean").path
        (0,)
    """

    name: str
    _: KW_ONLY
    output: int | str | tuple | None = None
    call: int | None = None
    side: str = "output"
    batch_axis: int | None = None
    channel_axis: int | None = None
    pool: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__}")
        if self.side not in SIDES:
            raise ValueError(f"side must be 'output' or 'input', got {self.side!r}")
        check_pool(self.pool)
        if self.call is not None and (not isinstance(self.call, int) or self.call < 1):
            raise ValueError(f"call must be an int from 1 on, got {self.call!r}")
        if self.output is not None and not isinstance(self.output, (int, str, tuple)):
            raise TypeError(f"output must be a position, a key or a path, got {type(self.output).__name__}")
        for option in ("batch_axis", "channel_axis"):
            if not isinstance(getattr(self, option), (int, type(None))):
                raise TypeError(f"{option} must be an int, got {type(getattr(self, option)).__name__}")

    @property
    def path(self) -> tuple | None:
        """`output` as a path of positions, keys and attributes."""
        if self.output is None or isinstance(self.output, tuple):
            return self.output
        parts = [self.output] if isinstance(self.output, int) else self.output.split(".")
        return tuple(int(part) if isinstance(part, str) and part.isdigit() else part for part in parts)


def check_pool(pool: object) -> None:
    if pool is not None and pool not in POOLS:
        raise ValueError(f"pool must be None or one of {', '.join(map(repr, POOLS))}, got {pool!r}")


Layers = str | Layer | Sequence[str | Layer] | Callable[[str, nn.Module], bool]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel or torch.compile: same values, plain names."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(module, torch.jit.ScriptModule):
        return []  # TorchScript runs no hooks of what is inside
    parts = [(name, unwrap(child)) for name, child in module._modules.items() if child is not None]
    return [part for part in parts if part[0] != "_packed_params"]  # what a quantised layer keeps its weight in


def layer_table(model: nn.Module) -> dict[str, nn.Module]:
    """Every name a layer can be asked for by, in the order of definition; without wrappers' ``module.``."""
    table: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        table[name or ROOT] = module
        for child_name, child in _children(module):
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", unwrap(model))
    return table


def _is_leaf(module: nn.Module) -> bool:
    return not _children(module)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or any(hasattr(m, "_packed_params") for m in module.modules())


def _holds_blocks(module: nn.Module) -> bool:
    """A ModuleList of composite modules, or a Sequential in which one class of composite module repeats."""
    composite = [type(child) for child in module.children() if not _is_leaf(child)]
    if isinstance(module, nn.ModuleList):
        return bool(composite)
    return isinstance(module, nn.Sequential) and len(set(composite)) < len(composite)


def default_layers(model: nn.Module) -> list[str]:
    """The outermost repeated blocks and what stands before and after them; without blocks, leaves with parameters."""
    chosen: list[str] = []

    def leads_to_blocks(module: nn.Module) -> bool:
        return any(_holds_blocks(part) for part in module.modules())

    def walk(prefix: str, module: nn.Module) -> None:
        for child_name, child in _children(module):
            name = f"{prefix}.{child_name}" if prefix else child_name
            if not _holds_blocks(module) and leads_to_blocks(child):
                walk(name, child)
            elif _has_parameters(child):
                chosen.append(name)

    table = layer_table(model)
    if leads_to_blocks(unwrap(model)):
        walk("", unwrap(model))
    else:
        chosen = [name for name, module in table.items() if _is_leaf(module) and _has_parameters(module)]
    first: dict[int, str] = {}  # a module under two names is looked at once
    for name in chosen or [ROOT]:
        first.setdefault(id(table[name]), name)
    return list(first.values())


def _matches(name: str, pattern: str) -> bool:
    """Glob by parts: ``*`` stays within one part of a dotted name, ``**`` stands for any number of parts."""
    return _match_parts(name.split("."), pattern.split("."))


def _match_parts(name: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_match_parts(name[i:], pattern[1:]) for i in range(len(name) + 1))
    return bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and _match_parts(name[1:], pattern[1:])


def near_matches(wanted: str, names: Sequence[str]) -> str:
    """A clause for an error message: the names most like the wanted one, else the first few there are."""
    close = difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)
    if not close:  # a last part is often all that is remembered
        close = [name for name in names if wanted.split(".")[-1] in name.split(".")][:4]
    if close:
        return "near matches: " + ", ".join(close)
    return "its layers are " + ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def choose_names(
    names: Sequence[str], wanted: str | Layer | Iterable[str | Layer], argument: str, where: str = "the model"
) -> list[Layer]:
    """The layers that names, patterns and :class:`Layer` ask for, in the order asked for, each once."""
    chosen: dict[Layer, None] = {}
    for item in [wanted] if isinstance(wanted, (str, Layer)) else wanted:
        if not isinstance(item, (str, Layer)):
            raise TypeError(f"{argument} must hold names of layers as strings, or Layer, got {type(item).__name__}")
        layer = item if isinstance(item, Layer) else Layer(item)
        pattern = layer.name
        found = _found(names, pattern)
        if not found and (parts := pattern.rpartition("#"))[1] and parts[2].isdigit():
            layer, pattern = replace(layer, call=int(parts[2])), parts[0]
            found = _found(names, pattern)
        if not found:
            raise ValueError(f"{argument}: {where} has no layer {pattern!r}; {near_matches(pattern, names)}")
        chosen.update(dict.fromkeys(replace(layer, name=name) for name in found))
    if not chosen:
        raise ValueError(f"{argument} must name at least one layer, got none")
    return list(chosen)


def _found(names: Sequence[str], pattern: str) -> list[str]:
    """The layer of this name; else those that match it as a pattern."""
    forms = [pattern, pattern.removeprefix("module.")]
    same = next((hits for form in forms if (hits := [n for n in names if n == form])), None)
    return same or next((hits for form in forms if (hits := [n for n in names if _matches(n, form)])), [])


def choose_layers(model: nn.Module, wanted: Layers | None, argument: str) -> list[Layer]:
    """The layers `wanted` asks for; `argument` is what errors call it."""
    if wanted is None:
        return [Layer(name) for name in default_layers(model)]
    table = layer_table(model)
    if callable(wanted) and not isinstance(wanted, Layer):
        chosen = [Layer(name) for name, module in table.items() if wanted(name, module)]
        if not chosen:
            raise ValueError(f"{argument}: the function chose none of the model's {len(table)} layers")
        return chosen
    if not isinstance(wanted, (str, Layer, Sequence)):
        raise TypeError(f"{argument} must be names, patterns or a function, got {type(wanted).__name__}")
    return choose_names(list(table), wanted, argument)


def choose_modules(model: nn.Module, wanted: Layers | None, argument: str) -> list[str]:
    """Names of the modules `wanted` asks for, where it is the module that matters and no view of it."""
    return list(dict.fromkeys(layer.name for layer in choose_layers(model, wanted, argument)))
