"""What a file has to say of the modules that a conversion leaves, so that they can be made again before their tensors
are read: nested dictionaries of types that JSON has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pyrepr.nn._converted import Converted
from pyrepr.nn.linear_plus import LinearPlus
from pyrepr.nn.lookup import LookupLinear
from pyrepr.nn.sign_linear import SignLinear

Specification = dict[str, Any]
WHOLE = (LookupLinear, SignLinear, LinearPlus)  # what stands in the place of a layer, or of a network


def replacements(named: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Those of the modules (outer ones first) that a conversion made, without what is inside another of them."""
    found: dict[str, nn.Module] = {}
    for name, module in named:
        if type(module) in WHOLE and not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def specification(module: nn.Module) -> Specification:
    """
    Raises:
        ValueError: for a module of another kind than conversions make.
    """
    kind = type(module)
    if isinstance(module, Converted) and kind in WHOLE:
        return module.specification()
    if isinstance(module, LinearPlus) and kind is LinearPlus:
        return {
            "class": "LinearPlus",
            "linear": specification(module.linear),
            "rest": specification(module.rest),
        }
    if isinstance(module, nn.Sequential) and kind is nn.Sequential:
        return {"class": "Sequential", "modules": [specification(part) for part in module]}
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        parameters = {name: p for name, p in module.named_parameters() if p is not None}
        return {
            "class": "Linear",
            "sizes": [module.in_features, module.out_features],
            "dtypes": {name: str(p.dtype).removeprefix("torch.") for name, p in parameters.items()},
            "trained": [name for name, p in parameters.items() if p.requires_grad],
        }
    if _is_activation(kind) and not list(module.parameters()):
        options = {name: getattr(module, name) for name in getattr(module, "__constants__", ())}
        return {"class": kind.__name__, "options": options}
    raise ValueError(f"model must hold modules that a file can describe, got a {kind.__name__} beside a dense map")


def _is_activation(kind: type) -> bool:
    known = kind is nn.Identity or kind.__module__ == "torch.nn.modules.activation"
    return known and getattr(nn, kind.__name__, None) is kind


def specified(given: Specification, device: torch.device | str | None = None) -> nn.Module:
    """An empty module of the kind that gave the :func:`specification`; tables unpacked.

    Raises:
        ValueError: for anything that is no specification.
    """
    if not isinstance(given, dict) or "class" not in given:
        return LookupLinear.specified(given, device)
    if given["class"] == "SignLinear":
        return SignLinear.specified(given, device)
    try:
        if given["class"] == "LinearPlus":
            return LinearPlus(specified(given["linear"], device), specified(given["rest"], device))
        if given["class"] == "Sequential":
            return nn.Sequential(*(specified(part, device) for part in given["modules"]))
        if given["class"] == "Linear":
            return _linear(given, device)
        kind = getattr(nn, given["class"])
        if not _is_activation(kind):
            raise TypeError(f"{given['class']} is no activation")
        return kind(**given["options"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"specification must come from specification(), got {given!r:.200}: {error}") from error


def _linear(given: Specification, device: torch.device | str | None) -> nn.Linear:
    d, h = given["sizes"]
    linear = nn.Linear(d, h, bias="bias" in given["dtypes"], device=device)
    for name, dtype in given["dtypes"].items():
        place = getattr(linear, name)
        made = torch.empty(place.shape, dtype=getattr(torch, dtype), device=device)
        setattr(linear, name, nn.Parameter(made, requires_grad=name in given["trained"]))
    return linear


def sizes(module: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a replacement, or of a linear layer."""
    if isinstance(module, LinearPlus):
        return sizes(module.linear)
    if isinstance(module, (nn.Linear, Converted)):
        return module.in_features, module.out_features
    weight = module.weight  # [in, out] in Conv1D of transformers
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0], weight.shape[1]


def pack(module: nn.Module, given: Specification) -> None:
    """Packs the tables that were packed."""
    for layer, own in _lookups(module, given):
        if own["packed"]:
            layer.pack_()


def _lookups(module: nn.Module, given: Specification) -> Iterator[tuple[LookupLinear, Specification]]:
    if isinstance(module, LookupLinear):
        yield module, given
    elif isinstance(module, LinearPlus):
        yield from _lookups(module.linear, given["linear"])
        yield from _lookups(module.rest, given["rest"])
    elif isinstance(module, nn.Sequential):
        for part, own in zip(module, given["modules"], strict=True):
            yield from _lookups(part, own)
