"""Which linear layers of a model can be replaced by other modules, and replacing them so that it can be undone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyrepr._modules import is_conv1d, is_linear, restored
from pyrepr.models._layers import ROOT, Layer, Layers, choose_modules, layer_table, unwrap

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def choose_linears(model: nn.Module, select: Layers | None, width: int) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers to replace, and of those left alone with the reason, in the order of definition.

    `select` as of :func:`pyrepr.convert`; `width`: what in_features must be a multiple of. What an adapter wraps is
    chosen only by its own name, and what it adds never.

    Raises:
        ValueError: if it chooses no ``nn.Linear`` at all.
    """
    table = layer_table(model)
    if select is None:
        chosen = [name for name, module in table.items() if is_linear(module)]
        if not chosen:
            raise ValueError(f"model must hold at least one nn.Linear, got none in {type(unwrap(model)).__name__}")
    else:
        chosen = choose_modules(model, select, "select")
        if not any(is_linear(table[name]) for name in chosen):
            inside = next((n for n in table if n.startswith(f"{chosen[0]}.") and is_linear(table[n])), None)
            hint = f"; inside it is {inside}" if inside else ""
            name = chosen[0]
            raise ValueError(f"select must choose an nn.Linear, got only {name} ({type(table[name]).__name__}){hint}")
    head = _language_head(model) if select is None else None
    listed = [select] if isinstance(select, (str, Layer)) else [] if callable(select) else select or []
    found = Obstacles(table, width, {item.name if isinstance(item, Layer) else item for item in listed})
    reasons = {name: found.reason(name) or (name == head and "is the language-model head") or "" for name in chosen}
    return [name for name in chosen if not reasons[name]], {name: why for name, why in reasons.items() if why}


def _language_head(model: nn.Module) -> str | None:
    """The linear layer that gives a score a word: as many outputs as an embedding of its input's width has rows."""
    table = layer_table(model)
    embeddings = [(m.num_embeddings, m.embedding_dim) for m in table.values() if isinstance(m, nn.Embedding)]
    heads = [
        name
        for name, module in table.items()
        if isinstance(module, nn.Linear) and (module.out_features, module.in_features) in embeddings
    ]
    return heads[-1] if heads else None


class Obstacles:
    """Why a layer cannot be replaced by one that computes from the same input alone. `asked`: layers chosen by name."""

    def __init__(self, table: dict[str, nn.Module], width: int, asked: Collection[str] = ()) -> None:
        self.table, self.width, self.asked = table, width, asked
        self.owners: dict[int, list[str]] = {}  # of a parameter's memory
        for name, module in table.items():
            for attribute, parameter in module.named_parameters(recurse=False):
                self.owners.setdefault(parameter.data_ptr() or id(parameter), []).append(f"{name}.{attribute}")

    def reason(self, name: str) -> str | None:
        """A clause after the layer's name, or ``None`` if nothing stands in the way."""
        module = self.table[name]
        if not is_linear(module):
            return f"is no nn.Linear but a {type(module).__name__}"
        if name == ROOT:
            return (
                "is the model itself, which cannot be replaced in place; use from_linear of LookupLinear or SignLinear"
            )
        if parametrize.is_parametrized(module):
            return "has parametrized tensors"
        if (adapter := self._adapter(name)) is not None:
            return f"belongs to an adapter, {adapter}; merge it into the model first, or name the base_layer in select"
        if hasattr(module, "_hf_hook"):
            return "is offloaded: its weights are moved in and out by hooks"
        if type(module) is not nn.Linear and not is_conv1d(module):
            return f"is a subclass of nn.Linear, {type(module).__name__}, that may do more"
        if "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in HOOKS):
            return "has hooks, or a forward of its own"
        return self._of_values(name, module) or self._of_place(name, module)

    def _adapter(self, name: str) -> str | None:
        """What an adapter (PEFT) wraps or adds is inside a module that holds a ``base_layer``."""
        parts = name.split(".")
        if parts[-1] == "base_layer" and name in self.asked:
            return None
        for end in range(len(parts)):
            holder = self.table[".".join(parts[:end]) or ROOT]
            if "base_layer" in holder._modules:
                return type(holder).__name__
        return None

    def _of_values(self, name: str, module: nn.Module) -> str | None:
        if type(module.weight) is not nn.Parameter or type(module.weight.data) is not torch.Tensor:
            return f"has a weight of class {type(module.weight.data).__name__}, whose values are not what is stored"
        width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
        if width % self.width:
            return f"has in_features = {width}, no multiple of a chunk's {self.width} elements"
        if not module.weight.is_floating_point() or module.weight.is_meta:
            where = "on the meta device" if module.weight.is_meta else str(module.weight.dtype).removeprefix("torch.")
            return f"has a weight {where}"
        for parameter in module.parameters():
            owners = self.owners.get(parameter.data_ptr() or id(parameter), [])
            others = [owner for owner in owners if owner.rpartition(".")[0] != name]
            if others:
                return f"is tied to {others[0]}"
        return None

    def _of_place(self, name: str, module: nn.Module) -> str | None:
        holder, attribute = _place(self.table, name)
        if holder._modules.get(attribute) is not module:
            return f"is wrapped in {type(holder._modules.get(attribute)).__name__}"
        if isinstance(holder, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)):
            return f"is read by {type(holder).__name__} without being called"
        return None


def _place(table: dict[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    """The module that holds a layer, and under which attribute."""
    prefix, _, attribute = name.rpartition(".")
    return table[prefix or ROOT], attribute


class Swaps:
    """Replaces layers by name, and can undo it."""

    def __init__(self, model: nn.Module) -> None:
        self._table = layer_table(model)
        self._originals: dict[str, nn.Module] = {}

    def put(self, name: str, module: nn.Module) -> None:
        """Puts `module` in the place of the layer."""
        self._originals.setdefault(name, self._table[name])
        setattr(*_place(self._table, name), module)

    def undo(self, names: Sequence[str] | None = None) -> None:
        """Puts back what was there under these names; under all, by default."""
        for name in list(self._originals) if names is None else names:
            self.put(name, self._originals[name])
            del self._originals[name]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Inside, the model is as it was."""
        places = {name: _place(self._table, name) for name in self._originals}
        with restored([(*places[name], original) for name, original in self._originals.items()]):
            yield
