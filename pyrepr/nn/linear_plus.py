"""A dense map and what stands beside it: how a whole feed-forward network becomes less than it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyrepr._modules import as_linear, evaluating, hooked, is_linear
from pyrepr.nn._lookup_fit import Fit


class LinearPlus(nn.Module):
    """linear(x) + rest(x): what :meth:`LookupLinear.from_mlp` makes of a network that is nearly linear.

    Args:
        linear: the dense map. rest: what is added, for instance a few neurons or a :class:`LookupLinear`.

    Shape:
        x: [..., d] -> [..., h], as both of them.

    Attributes:
        conversion: the error and the bytes of the fit that made it, else ``None``.

    Raises:
        TypeError: for anything but modules.

    Example:
        >>> layer = pyrepr.nn.LinearPlus(torch.nn.Linear(16, 8), pyrepr.nn.LookupLinear(16, 8))
        >>> layer(torch.randn(5, 16)).shape
        torch.Size([5, 8])
    """

    def __init__(self, linear: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        for name, module in (("linear", linear), ("rest", rest)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        self.linear, self.rest = linear, rest
        self.conversion: Fit | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.rest(x)


USUAL = (nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.Identity())


class Network(NamedTuple):
    """A feed-forward network of one hidden layer: second(activation(first(x)))."""

    first: nn.Linear
    activation: nn.Module
    second: nn.Linear


def network_of(mlp: object, rows: Tensor) -> Network:
    """The parts of a module that computes second(activation(first(x))), as rows [N, d] show it.

    The activation is the module inside, or the usual function, that gives what goes into the second layer from what
    comes out of the first.

    Raises:
        ValueError: if it computes something else.
    """
    what = "mlp must be a module of two linear layers with an activation between for kind 'linear+neurons'"
    if not isinstance(mlp, nn.Module):
        raise ValueError(f"{what}, got a {type(mlp).__name__}")
    linears = [module for module in mlp.modules() if is_linear(module)]
    if len(linears) != 2:
        raise ValueError(f"{what}, got {len(linears)} linear layers")
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append((module, args[0], output))

    sample = rows[:64]
    with evaluating([mlp]), hooked(lambda m=module: m.register_forward_hook(see) for module in linears):
        out = mlp(sample)
        if len(seen) != 2 or seen[0][0] is seen[1][0]:
            raise ValueError(f"{what}, got one that calls them {len(seen)} times")
        (first, given, inner), (second, hidden, last) = seen
        if not (_same(given, sample) and _same(last, out)):
            raise ValueError(f"{what}, got one that does more before or after them")
        for activation in _activations(mlp):
            found = activation(inner)
            if isinstance(found, Tensor) and _same(found, hidden):
                return Network(as_linear(first), _usual(activation, inner.device), as_linear(second))
    raise ValueError(f"{what}, got one whose activation is neither a module of its own nor a usual function")


def _activations(mlp: nn.Module) -> Iterator[nn.Module]:
    for module in mlp.modules():
        if not [*module.children(), *module.parameters()] and not isinstance(module, nn.Dropout):
            yield module
    yield from USUAL


def _usual(activation: nn.Module, device: torch.device) -> nn.Module:
    """PyTorch's own module of the same function, which a file can name, or else a copy."""
    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64, device=device)
    found = activation(grid.clone())
    same = (own for own in USUAL if isinstance(found, Tensor) and torch.allclose(own(grid), found, rtol=0, atol=1e-12))
    return copy.deepcopy(next(same, activation))


def _same(x: Tensor, y: Tensor) -> bool:
    near = 8 * torch.finfo(y.dtype).eps * float(y.abs().max())
    return x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=near)
