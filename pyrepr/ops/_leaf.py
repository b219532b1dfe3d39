"""How a leaf op is made: one schema, one fake, one reference, any number of faster implementations.

Leaf ops go to the dispatcher by ``Library.define``/``impl``, not by ``torch.library.custom_op``, whose autograd fails
under ``torch.func.grad``. Being behind the dispatcher also means that lazily negated or conjugated views are resolved
before an implementation reads a pointer. Where nobody could tell the difference – ordinary CPU tensors, nothing
tracing, transforming or profiling – the implementation is called directly: the dispatcher's way through Python costs
7 µs, more than a decoding step computes.

What an op's derivative is, ``_differentiable.py`` says; here is how the modes of differentiation reach it. An op under
a transform of ``torch.func`` is taken at the first key of the dispatcher, before the transform takes it apart; dual
numbers and ordinary autograd, also of a graph that ``torch.compile`` or ``torch.export`` made, at the key Autograd. An
op without a derivative refuses at the same places, and under ``vmap`` loops over the axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch

from pyrepr.backend import Unsupported, choose
from pyrepr.ops._differentiable import Derivative, Derived, has_derivative, looped, transformed

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((bool, int, float, str, type(None)))  # asking whether these are tensors takes longer

LIBRARY = torch.library.Library("pyrepr", "DEF")


# Looked up once: at one token, the way to these functions costs as much as they do.
_is_compiling = torch.compiler.is_dynamo_compiling  # torch.export without it has a dispatch mode
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_profiler = torch.autograd.profiler

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_batched = torch._C._functorch.is_batchedtensor
_unwrapped = torch._C._functorch.get_unwrapped

_autocast_exists = torch.amp.is_autocast_available
_autocast_is_on = torch.is_autocast_enabled

# Tells autograd that tensors were overwritten, so that it notices if they were kept for a backward.
written = torch.autograd.graph.increment_version


def watched() -> bool:
    """Whether somebody traces, transforms, intercepts or profiles what is called now."""
    return (
        _is_compiling()
        or _dispatch_modes() > 0
        or transformed()
        or _tracing() is not None
        or _profiler._is_profiler_enabled
    )


def readable(x: torch.Tensor) -> bool:
    """Whether x has numbers to look at: no graph is being made, and no axis of x is hidden by ``vmap``."""
    if _is_compiling() or _tracing() is not None:
        return False
    while _wrapped(x):
        if _batched(x):
            return False
        x = _unwrapped(x)
    return type(x) in _PLAIN


def at_hand(x: torch.Tensor) -> bool:
    """Whether a look at the numbers of x costs no waiting for a GPU and leaves no trace in a graph."""
    return type(x) in _PLAIN and x.is_cpu and not watched()


def require(good: torch.Tensor, message: str) -> None:
    """Raises ValueError where `good`, a bool scalar, is false; RuntimeError on a GPU or in a graph, when it runs."""
    if not at_hand(good):
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(message)


def require_finite(name: str, x: torch.Tensor) -> None:
    """Raises ValueError for NaN and infinity where they can be seen: on the CPU, in no graph and under no ``vmap``."""
    if x.is_cpu and readable(x) and not bool(x.sum(dtype=torch.float64).isfinite()) and not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def on_one_thread(implementation: Callable) -> Callable:
    """The plain PyTorch of an op, which splits sums by the number of threads: the contract is that bits do not tell."""

    def run(*args: Any) -> Any:
        if not all(x.is_cpu for x in _tensors(args)) or torch.get_num_threads() == 1:
            return implementation(*args)
        one = functools.partial(torch.set_num_threads, 1)
        many = functools.partial(torch.set_num_threads, torch.get_num_threads())
        # On one line: an interrupt before it finds nothing changed, and one after it comes from inside the block.
        with ExitStack() as stack: stack.callback(many); one(); return implementation(*args)  # noqa: E701, E702 # fmt: skip

    return run


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


def derives(*tensors: torch.Tensor | None) -> bool:
    """Whether the results of a call may be differentiated with respect to these tensors, now or when a graph runs.

    A graph that is being made shows neither the transforms around it nor, if exported, who will call it.
    """
    if _is_compiling() or torch.compiler.is_exporting():
        return torch.is_grad_enabled() or torch.compiler.is_exporting()
    return (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or transformed()


def leaf_op(
    schema: str, *, fake: Callable, derivative: Derivative | None = None, **implementations: Callable
) -> Callable[..., Any]:
    """Registers ``pyrepr::<schema>`` and returns the function to call; its attribute `overload` is torch's op.

    Args:
        schema: name and signature in torch's schema language, without the namespace. An op that writes to its first
            argument, and only such a one, has a name that ends with an underscore.
        fake: allocates the outputs, with the shapes, dtypes and strides of the real ones.
        derivative: default none; then whoever differentiates the op is refused.
        implementations: backend name → function with the op's arguments. ``reference`` must be among them.
    """
    name = schema.split("(", 1)[0]
    implementations["reference"] = on_one_thread(implementations["reference"])

    def run(*args: Any) -> Any:
        return run_on(_tensors(args), args)

    def run_on(tensors: list[torch.Tensor], args: tuple) -> Any:
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

    def derive(args: tuple) -> Any:
        if derived is None:
            raise RuntimeError(
                f"torch.ops.pyrepr.{name} is a leaf op without a derivative; call the public pyrepr function, "
                "which is differentiable"
            )
        return derived.apply(args)

    def at_autograd(keys: Any, *args: Any) -> Any:
        # Grad modes are off inside Function.forward, from where this is called again.
        if has_derivative(_tensors(args)):
            return derive(args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def call(*args: Any) -> Any:
        tensors = None if watched() else _ordinary(args)
        if tensors is None:
            return overload(*args)
        return derive(args) if has_derivative(tensors) else run_on(tensors, args)

    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, at_autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"pyrepr::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.pyrepr, name).default
    derived = None if derivative is None else Derived(derivative, call, overload._schema)
    if derived is None:
        torch.library.register_vmap(
            f"pyrepr::{name}", lambda info, dims, *args: looped(overload, info.batch_size, dims, args), lib=LIBRARY
        )
    else:
        LIBRARY.impl(name, lambda *args: derived.apply(args), "FuncTorchDynamicLayerFrontMode")

    call.overload = overload  # type: ignore[attr-defined]
    return call
