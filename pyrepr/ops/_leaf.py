"""How a leaf op is made: one schema, one fake, one reference, any number of faster implementations.

Leaf ops go to the dispatcher by ``Library.define``/``impl``, not by ``torch.library.custom_op``, whose autograd fails
under ``torch.func.grad``. Being behind the dispatcher also means that lazily negated or conjugated views are resolved
before an implementation reads a pointer. Where nobody could tell the difference – ordinary CPU tensors, nothing
tracing, transforming or profiling – the implementation is called directly: the dispatcher's way through Python costs
7 µs, more than a decoding step computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from pyrepr.backend import Unsupported, choose

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((bool, int, float, str, type(None)))  # asking whether these are tensors takes longer

LIBRARY = torch.library.Library("pyrepr", "DEF")


# Looked up once: at one token, the way to these functions costs as much as they do.
_is_compiling = torch.compiler.is_dynamo_compiling  # torch.export without it has a dispatch mode
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_profiler = torch.autograd.profiler

_autocast_exists = torch.amp.is_autocast_available
_autocast_is_on = torch.is_autocast_enabled

# Tells autograd that tensors were overwritten, so that it notices if they were kept for a backward.
written = torch.autograd.graph.increment_version


def watched() -> bool:
    """Whether somebody traces, transforms, intercepts or profiles what is called now."""
    return (
        _is_compiling()
        or _dispatch_modes() > 0
        or _transforms() is not None
        or _tracing() is not None
        or _profiler._is_profiler_enabled
    )


def readable(x: torch.Tensor) -> bool:
    """Whether a look at the numbers of x costs no waiting for a GPU and leaves no trace in a graph."""
    return type(x) in _PLAIN and x.is_cpu and not watched()


def require(good: torch.Tensor, message: str) -> None:
    """Raises ValueError where `good`, a bool scalar, is false; RuntimeError on a GPU or in a graph, when it runs."""
    if not readable(good):
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(message)


def _autocasts(device: str) -> bool:
    return _autocast_exists(device) and _autocast_is_on(device)


def _tensors(args: tuple) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif type(arg) is list or type(arg) is tuple:
            found.extend(a for a in arg if isinstance(a, torch.Tensor))
    return found


def _ordinary(args: Iterable) -> list[torch.Tensor] | None:
    """The tensors among them, if the dispatcher would add nothing: in real CPU memory, and no lazy negation or zeros.

    Lazy conjugation is complex numbers' alone, which no op takes.
    """
    found: list[torch.Tensor] = []
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            if not arg.is_cpu or arg.is_neg() or arg._is_zerotensor():
                return None
            found.append(arg)
        elif kind is list or kind is tuple:
            inner = _ordinary(arg)
            if inner is None:
                return None
            found += inner
        elif kind not in _NO_TENSORS and isinstance(arg, torch.Tensor):
            return None
    return found


def leaf_op(schema: str, *, fake: Callable, **implementations: Callable) -> Callable[..., Any]:
    """Registers ``pyrepr::<schema>`` and returns the function to call; its attribute `overload` is torch's op.

    Args:
        schema: name and signature in torch's schema language, without the namespace. An op that writes to its first
            argument, and only such a one, has a name that ends with an underscore.
        fake: allocates the outputs, with the shapes, dtypes and strides of the real ones.
        implementations: backend name → function with the op's arguments. ``reference`` must be among them.
    """
    name = schema.split("(", 1)[0]

    def run(*args: Any) -> Any:
        return checked(_tensors(args), args)

    def checked(tensors: list[torch.Tensor], args: tuple) -> Any:
        # Grad mode is off inside autograd.Function.forward, so this meets direct calls only.
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(
                f"torch.ops.pyrepr.{name} is a leaf op without a derivative; call the public pyrepr function, "
                "which is differentiable"
            )
        if name.endswith("_"):
            written(args[0])
        device = tensors[0].device.type
        chosen = choose(name, implementations, device)
        if not _autocasts(device):
            return first_that_can(chosen, args)
        with torch.autocast(device, enabled=False):  # an implementation says itself what it computes in
            return first_that_can(chosen, args)

    def first_that_can(chosen: list[Callable], args: tuple) -> Any:
        *others, last = chosen
        for implementation in others:
            try:
                return implementation(*args)
            except Unsupported:  # a try statement costs nothing, contextlib.suppress 1 µs
                continue
        return last(*args)

    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyrepr::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.pyrepr, name).default

    def call(*args: Any) -> Any:
        tensors = None if watched() else _ordinary(args)
        return overload(*args) if tensors is None else checked(tensors, args)

    call.overload = overload  # type: ignore[attr-defined]
    return call
