"""What is done to any ``nn.Module``, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

# Each change is made by the call that promises to take it back, so that an interrupt finds no line between the two. A
# block is left by two contexts, the same stack twice: an interrupt as the inner one is left finds the outer one.


@contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has the training flag it had."""
    with (stack := ExitStack()), stack:
        for model in models:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            model.eval()
        yield


@contextmanager
def restored(changes: Iterable[tuple[object, str, object]]) -> Iterator[None]:
    """Attributes (object, name, value) have other values inside, and afterwards those they had."""
    with (stack := ExitStack()), stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextmanager
def hooked(registrations: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """Each of `registrations` adds a hook, which is there inside only."""
    with (stack := ExitStack()), stack:
        for register in registrations:
            stack.callback(register().remove)
        yield


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is nothing but its class's forward, which a fused call may stand in for."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and not _has_any_global_hook()


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, or ``Conv1D`` of transformers: a linear layer that stores its weight as [in, out]."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def as_linear(module: nn.Module) -> nn.Linear:
    """The ``nn.Linear`` that computes the same: the module itself, or one with a transposed view of a Conv1D."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = module.weight, module.bias
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.train(module.training)
