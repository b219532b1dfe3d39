"""Measures as one op each, for graphs: ``torch.compile`` and ``torch.export`` see no numbers, the op that runs does.

What a measure does with the numbers it meets (`_ranges.py`) would be lost in a graph of its parts. First derivatives
are an op as well; higher ones, and forward mode, go through the parts without a look at numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrepr.ops._differentiable import Derivative
from pyrepr.ops._leaf import leaf_op

KERNEL = "str kernel, float bandwidth, float? sigma, int degree, float coef0, float? gamma"  # Kernel.fields()
TENSORS = "Tensor[] xs, Tensor? mask, Tensor? scales"
# All that a thread excludes which is in no op.
_AUTOCAST = functools.reduce(
    torch._C.DispatchKeySet.__or__,
    (torch._C.DispatchKeySet(key) for name, key in torch._C.DispatchKey.__members__.items() if "Autocast" in name),
)


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Autograd and its transforms inside an op, to which the dispatcher comes without them."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude & _AUTOCAST):
        yield


def whole_op(name: str, constants: str, returns: str, fake: Callable, function: Callable) -> Callable[..., Any]:
    """An op of (xs, mask, scales, *fields of the kernel, *constants), differentiable in the layers by its first output.

    Args:
        function: the measure, made of differentiable ops; a tuple. It may look at numbers where it can.
    """

    def gradients(xs, mask, scales, grad, *rest):
        *options, wanted = rest
        of = [i for i, want in enumerate(wanted) if want]

        def first(*layers: Tensor) -> Tensor:
            given = list(xs)
            for i, x in zip(of, layers, strict=True):
                given[i] = x
            return function(given, mask, scales, *options)[0]

        with _autograd():
            return list(torch.func.vjp(first, *(xs[i] for i in of))[1](grad))

    def gradients_fake(xs, mask, scales, grad, *rest):
        return [
            torch.empty_like(x, memory_format=torch.contiguous_format) for x, w in zip(xs, rest[-1], strict=True) if w
        ]

    def contiguous(*args: Any) -> list[Tensor]:
        return [g.contiguous() for g in gradients(*args)]

    everywhere = ("reference", "cpu", "triton")  # its parts choose for themselves
    more = f", {constants}" if constants else ""
    backward_op = leaf_op(
        f"{name}_backward({TENSORS}, Tensor grad, {KERNEL}{more}, bool[] wanted) -> Tensor[]",
        fake=gradients_fake,
        **dict.fromkeys(everywhere, contiguous),
    )

    def backward(args: tuple, kept: tuple, grads: tuple, wanted: tuple) -> tuple:
        found = iter(backward_op(*args[:3], grads[0], *args[3:], list(wanted[2:])))
        return None, None, *(next(found) if want else None for want in wanted[2:])

    def run(*args: Any) -> Any:
        found = function(*args)
        return found if len(found) > 1 else found[0]

    return leaf_op(
        f"{name}({TENSORS}, {KERNEL}{more}) -> {returns}",
        fake=fake,
        derivative=Derivative(reference=lambda args, kept: (function(*args)[0],), backward=backward, fixed=("scales",)),
        **dict.fromkeys(everywhere, run),
    )
