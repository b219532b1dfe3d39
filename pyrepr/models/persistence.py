"""Converted models in files: :func:`save_converted` and :func:`load_converted`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from pyrepr._modules import is_linear
from pyrepr._optional import require
from pyrepr._reporting import replacing, versions
from pyrepr.models._layers import layer_table, unwrap
from pyrepr.models._swapping import Swaps
from pyrepr.nn._converted import Converted
from pyrepr.nn._specification import WHOLE, pack, replacements, sizes, specification, specified

__all__ = ["load_converted", "save_converted"]

FORMAT = "pyrepr.converted"
Model = TypeVar("Model", bound=nn.Module)


def save_converted(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes a model with lookup layers, all of it, to a safetensors file that :func:`load_converted` reads.

    In the file are the model's ``state_dict``, each tensor once however many names it has, and, as metadata, the
    model's class and the specification of every :class:`pyrepr.nn.LookupLinear`, :class:`pyrepr.nn.SignLinear` and
    :class:`pyrepr.nn.LinearPlus`.

    Args:
        model: what :func:`pyrepr.convert` changed, or any module with such layers, also in the place of whole networks
            (:meth:`pyrepr.nn.LookupLinear.from_mlp`). A module that DataParallel or ``torch.compile`` wraps is saved
            without them.
        path: a file ending in ``.safetensors``.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix, a model without lookup layers, tensors on the meta device, state that is no
            tensor, or a network whose activation is of a class of its own beside a dense map. ImportError: without
            safetensors. OSError: if the file cannot be written (nothing is left behind).

    Example:
        >>> import os, tempfile
        >>> def network():
        ...     return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> model = network()
        >>> _ = pyrepr.convert(model, [torch.randn(256, 16)], bits=4, batch_sizes=(), progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pyrepr.save_converted(model, os.path.join(folder, "model.safetensors"))
        ...     again = pyrepr.load_converted(network(), path)
        >>> x = torch.randn(3, 16)
        >>> torch.equal(again(x), model(x))
        True
    """
    safetensors = require("safetensors.torch", "safetensors")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path.name!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    layers = replacements(layer_table(model).items())
    if not layers or type(model) in WHOLE:
        came = "it is one itself" if layers else f"got none in {type(model).__name__}"
        raise ValueError(f"model must hold at least one LookupLinear or SignLinear, {came}")
    tensors, aliases = _once(model.state_dict())
    content = {
        "format": FORMAT,
        "model": type(model).__name__,
        "layers": {name: specification(layer) for name, layer in layers.items()},
        "aliases": aliases,
        "versions": versions(),
    }
    with replacing(path) as temporary:
        safetensors.save_file(tensors, temporary, metadata={"pyrepr": json.dumps(content)})
    return path


def _once(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict, each under the first of its names, and from its other names to that one."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"model must have tensors as its state, got {name} of type {type(x).__name__}")
        if x.is_meta or type(x.data) is not Tensor:
            what = "on the meta device" if x.is_meta else f"of class {type(x.data).__name__}"
            raise ValueError(f"model must have plain tensors with values, got {name} {what}")
        place = (x.untyped_storage().data_ptr(), x.storage_offset(), x.dtype, x.shape, x.stride())
        if x.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            # Cloned: views of one memory are refused by safetensors, though they may be apart.
            apart = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
            tensors[name] = x.detach() if apart else x.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def load_converted(model: Model, path: str | os.PathLike[str]) -> Model:
    """Makes of a model what :func:`save_converted` saved: the same replacements, and every parameter and buffer.

    All is checked before anything changes, and if loading fails or is interrupted the model is as it was. Outputs are
    those of the saved model bit for bit, in eval mode, on the same kind of machine.

    Args:
        model: of the class that was saved, with the same layers: the network before its conversion, with any weights,
            or a converted one. Its devices are kept; dtypes become those of the file, in silence. Lookup layers are new
            modules, so make optimizers afterwards.
        path: a file written by :func:`save_converted`.

    Returns:
        The model.

    Raises:
        ValueError: one sentence, for a file of something else, a model of another class, and layers or tensors that one
            has and the other has not, or of other shapes. ImportError: without safetensors. OSError: if the file cannot
            be read.

    Example:
        >>> import os, tempfile
        >>> model, same = (torch.nn.Sequential(torch.nn.Linear(16, 4)) for _ in range(2))
        >>> _ = pyrepr.convert(model, [torch.randn(256, 16)], bits=4, batch_sizes=(), progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pyrepr.save_converted(model, os.path.join(folder, "model.safetensors"))
        ...     pyrepr.load_converted(same, path)[0].bits
        4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    content, tensors = _read(Path(path))
    inner = unwrap(model)
    if content["model"] != type(inner).__name__:
        raise ValueError(f"path holds a converted {content['model']}, but model is a {type(inner).__name__}")
    swaps = Swaps(inner)
    try:
        _put_layers(inner, swaps, content["layers"])
        aliases = content["aliases"]
        state = {**tensors, **{name: tensors[first] for name, first in aliases.items()}}
        with _assigned(inner, state, aliases):
            for name in content["layers"]:
                layer = inner.get_submodule(name)
                pack(layer, content["layers"][name])
                layer._apply(lambda x: x)  # tables that were read go to huge pages, as those that are moved
    except BaseException:
        swaps.undo()
        raise
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, checked as far as they can be without a model, and the tensors."""
    safetensors = require("safetensors", "safetensors")
    refusal = f"path must be a file written by pyrepr.save_converted, got {os.fspath(path)!r}"
    with open(path, "rb"):
        pass  # a missing file is the system's sentence, not that of the format
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["pyrepr"])
            kinds = {"model": str, "layers": dict, "aliases": dict}
            if content["format"] != FORMAT or any(not isinstance(content[key], kind) for key, kind in kinds.items()):
                raise KeyError("format")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if not all(first in tensors for first in content["aliases"].values()):
            raise KeyError("aliases")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(refusal) from error
    return content, tensors


def _put_layers(model: nn.Module, swaps: Swaps, specifications: dict[str, Any]) -> None:
    """Empty replacements in the places of linear layers and of networks."""
    table = layer_table(model)
    made = {}
    for name, given in specifications.items():
        try:
            layer = specified(given, device="meta")
        except ValueError as error:
            raise ValueError(f"path is damaged: layer {name}, {error}") from error
        old = table.get(name)
        if old is not None and (is_linear(old) or type(old) in WHOLE) and sizes(old) != sizes(layer):
            wanted, came = (f"{d} → {h}" for d, h in (sizes(layer), sizes(old)))
            raise ValueError(f"model must have {wanted} features in {name}, which path holds converted, got {came}")
        if not _can_become(old, layer):
            what = "linear layer" if isinstance(layer, Converted) else "network"
            came = "no such layer" if old is None else f"a {type(old).__name__}"
            raise ValueError(f"model must have a {what} {name}, which path holds converted, got {came}")
        made[name] = layer.train(old.training)
    devices = {name: next(iter(table[name].parameters())).device for name in made}
    for name, layer in made.items():
        swaps.put(name, layer.to_empty(device=devices[name]))


def _can_become(old: nn.Module | None, layer: nn.Module) -> TypeGuard[nn.Module]:
    """Whether a conversion could have made `layer` of it: of a linear layer, or of a network with both its widths."""
    if old is None or type(old) in WHOLE:
        return old is not None
    if is_linear(old):
        return isinstance(layer, Converted)
    inside = [sizes(module) for module in old.modules() if is_linear(module)]
    wanted = sizes(layer)
    return len(inside) > 1 and any(d == wanted[0] for d, _ in inside) and any(h == wanted[1] for _, h in inside)


@contextmanager
def _assigned(model: nn.Module, state: dict[str, Tensor], aliases: dict[str, str]) -> Iterator[None]:
    """The tensors of a file as the model's, all or none: checked first, then each put in the place of the old values,
    which come back if the block, or what is done here, is left by an exception."""
    places = model.state_dict(keep_vars=True)
    missing, unknown = [n for n in places if n not in state], [n for n in state if n not in places]
    if missing or unknown:
        name, where = (
            (missing[0], "model has, but path has not") if missing else (unknown[0], "path has, but model has not")
        )
        more = len(missing) + len(unknown) - 1
        raise ValueError(
            f"model and path must hold the same tensors, got {name}, which {where}"
            + (f", and {more} more" if more else "")
        )
    seen: dict[int, str] = {}
    for name, place in places.items():
        came = state[name]
        if came.shape != place.shape:
            raise ValueError(f"{name} must have shape {list(place.shape)} as in model, got {list(came.shape)} in path")
        if place.is_meta:
            raise ValueError(f"model must hold its tensors, got {name} on the meta device")
        other = seen.setdefault(id(place), name)
        if aliases.get(name, name) != aliases.get(other, other):
            raise ValueError(f"model ties {other} to {name}, which path has apart")
    kept = [(place, place.data) for place in places.values()]
    done: set[int] = set()
    try:
        with torch.no_grad():
            for name, place in places.items():
                if id(place) not in done:
                    done.add(id(place))
                    # A copy of its own, since names that share a tensor in the file may not in the model, or where
                    # the file has it at an odd address, by which products go other ways.
                    came = state[name]
                    place.data = came.to(place.device, copy=name in aliases or came.data_ptr() % 64 != 0)
        yield
    except BaseException:
        for place, data in kept:
            place.data = data
        raise
