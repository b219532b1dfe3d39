"""What is done to any ``nn.Module``, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle

# Each change is made by the call that promises to take it back, so that an interrupt finds no line between the two.


@contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the training flag it had."""
    with ExitStack() as stack:
        for model in models:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            model.eval()
        yield


@contextmanager
def restored(changes: Iterable[tuple[object, str, object]]) -> Iterator[None]:
    """Attributes (object, name, value) have other values inside, and afterwards those they had."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


class Hooks(ExitStack):
    """Removes hooks also should an interrupt come just as its block is left: when it is let go of. (Only hooks: values
    must be restored in order, from the inside outwards, or not at all.)"""

    __del__ = ExitStack.close


@contextmanager
def hooked(registrations: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """Each of `registrations` adds a hook, which is there inside only."""
    with Hooks() as stack:
        for register in registrations:
            stack.callback(register().remove)
        yield
