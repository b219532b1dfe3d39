"""Which layers of a model are looked at, and what they put out for a batch.

Works on any ``nn.Module``: transformers, timm, torchvision, your own. Nothing stays on the model: hooks live for one
forward pass only, and are removed whatever happens in it.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._modules import hooked

ROOT = "(model)"  # what the model itself is called among its layers
SAMPLES = ("batch", "tokens")

Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]


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
    return [(name, unwrap(child)) for name, child in module._modules.items() if child is not None]


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
    return next(module.children(), None) is None


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


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

    if leads_to_blocks(unwrap(model)):
        walk("", unwrap(model))
        return chosen
    return [name for name, module in layer_table(model).items() if _is_leaf(module) and _has_parameters(module)]


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


def choose_names(names: Sequence[str], wanted: str | Sequence[str], argument: str) -> list[str]:
    """The names that patterns ask for, in the order asked for, each once."""
    chosen: dict[str, None] = {}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must hold names of layers as strings, got {type(pattern).__name__}")
        forms = [pattern, pattern.removeprefix("module.")]
        found = next((hits for form in forms if (hits := [n for n in names if n == form])), None)
        found = found or next((hits for form in forms if (hits := [n for n in names if _matches(n, form)])), None)
        if not found:
            raise ValueError(f"{argument}: the model has no layer {pattern!r}; {near_matches(pattern, names)}")
        chosen.update(dict.fromkeys(found))
    if not chosen:
        raise ValueError(f"{argument} must name at least one layer, got none")
    return list(chosen)


def choose_layers(model: nn.Module, wanted: Layers | None, argument: str) -> list[str]:
    """Names of the layers `wanted` asks for; `argument` is what errors call it."""
    if wanted is None:
        return default_layers(model)
    table = layer_table(model)
    if callable(wanted):
        chosen = [name for name, module in table.items() if wanted(name, module)]
        if not chosen:
            raise ValueError(f"{argument}: the function chose none of the model's {len(table)} layers")
        return chosen
    if not isinstance(wanted, (str, Sequence)):
        raise TypeError(f"{argument} must be names, patterns or a function, got {type(wanted).__name__}")
    return choose_names(list(table), wanted, argument)


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor in a tensor, tuple, list, dict or dataclass, depth first."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        parts: Sequence[Any] = list(output.values())
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name) for field in fields(output)]
    elif isinstance(output, (tuple, list)):
        parts = output
    else:
        return None
    return next((tensor for part in parts if (tensor := first_tensor(part)) is not None), None)


def rows_of(output: Tensor, samples: str, mask: Tensor | None) -> Tensor:
    """A layer's output as [n, d], rows are samples.

    ``"batch"``: (B, …) → [B, rest]. ``"tokens"``: (B, T, D) → [B·T, D], (B, C, H, W) → [B·H·W, C], (B, D) stays;
    where the mask is (B, T), only the rows it keeps.

    Raises:
        ValueError: if the output has no such reading.
    """
    if output.dim() == 0:
        raise ValueError("puts out a single number, not one row a sample")
    if samples == "batch" or output.dim() <= 2:
        return output.reshape(output.shape[0], -1)
    if output.dim() >= 4:
        return output.movedim(1, -1).flatten(0, -2)
    if mask is None:
        return output.flatten(0, 1)
    if output.shape[:2] != mask.shape:
        raise ValueError(
            f"puts out {list(output.shape)}, which does not fit the batch's attention_mask {list(mask.shape)} (B, T)"
        )
    return output[mask.to(output.device)]


def _device(model: nn.Module) -> torch.device | None:
    """Where a batch has to be for this model; `None` if its parameters are on several devices or on none."""
    devices = {tensor.device for tensor in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor) and device is not None:
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_moved(part, device) for part in value]
    return value


def call(model: nn.Module, batch: Any, argument: str) -> Any:
    """Feeds a batch to a model: a tensor or a tuple by position, a dict by keyword.

    Keywords the model's forward does not have are left out (one tokenizer's output can serve models that differ in
    them); a tuple that does not fit is an error.
    """
    batch = _moved(batch, _device(model))
    signature = inspect.signature(model.forward)
    if isinstance(batch, dict):
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        known = {key: value for key, value in batch.items() if open_ended or key in signature.parameters}
        if not known:
            raise ValueError(f"data: {argument} takes none of the batch's keys {', '.join(map(str, batch))}")
        return model(**known)
    args = batch if isinstance(batch, list) else [batch]
    try:
        signature.bind(*args)
    except TypeError as error:
        raise ValueError(
            f"data: a batch of {len(args)} parts does not fit {argument}, {type(model).__name__}.forward{signature} "
            f"({error}); leave out what is no input, as in ((x,) for x, label in loader)"
        ) from None
    return model(*args)


class Recorder:
    """One model and the layers to record.

    Args:
        model: any module; DataParallel and the like are looked through (see :func:`unwrap`).
        wanted: as ``layers_a`` of :func:`pyrepr.compare`.
        samples: ``"batch"`` or ``"tokens"``, see :func:`rows_of`.
        argument: what errors call the model, ``"model_a"``.
    """

    def __init__(self, model: nn.Module, wanted: Layers | None, samples: str, argument: str) -> None:
        self.argument = argument
        self.samples = samples
        self.model = unwrap(model)
        self.layers = choose_layers(self.model, wanted, argument.replace("model", "layers"))
        self._by_default = wanted is None
        self._table = layer_table(self.model)

    def run(self, batch: Any, mask: Tensor | None) -> dict[str, Tensor]:
        """One forward pass; the layers' outputs as [n, d] with one n, in the order of ``layers``."""
        raw: dict[str, Tensor] = {}
        failed: dict[str, str] = {}

        def hook(name: str) -> Callable:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                tensor = first_tensor(output)
                if tensor is None:
                    failed[name] = "puts out no floating-point tensor"
                    return
                try:  # a copy: the module after it may work in place
                    raw[name] = rows_of(tensor.detach(), self.samples, mask).clone()
                except ValueError as error:
                    failed[name] = str(error)

            return keep

        with hooked(partial(self._table[name].register_forward_hook, hook(name)) for name in self.layers):
            call(self.model, batch, self.argument)
        return self._checked({name: raw[name] for name in self.layers if name in raw}, failed)

    def _checked(self, rows: dict[str, Tensor], failed: dict[str, str]) -> dict[str, Tensor]:
        """Layers that cannot be compared are left out if they were chosen by default, else an error."""
        counts = [x.shape[0] for x in rows.values()]
        usual = max(counts, key=lambda n: (counts.count(n), n), default=0)
        problems = {name: failed.get(name, "is not called in the model's forward") for name in self.layers}
        problems = {name: why for name, why in problems.items() if name not in rows or name in failed}
        for name, x in rows.items():
            if x.shape[0] != usual:
                other = next(key for key, y in rows.items() if y.shape[0] == usual)
                problems[name] = f"puts out {x.shape[0]} samples, but {other} {usual}"
                if self.samples == "tokens":
                    problems[name] += "; samples='batch' compares layers of different resolution"
        if problems and (not self._by_default or len(problems) == len(self.layers)):
            name, why = next(iter(problems.items()))
            raise ValueError(f"{self.argument.replace('model', 'layers')}: {name} {why}")
        if problems:
            self.layers = [name for name in self.layers if name not in problems]
            self._by_default = False  # from the second batch on, the layers are what they are
        return {name: rows[name] for name in self.layers}
