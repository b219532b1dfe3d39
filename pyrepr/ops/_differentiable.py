"""Derivatives of leaf ops: right in every mode, with the fast backward kernel in every first derivative.

A family writes a :class:`Derivative` for an op and hands it to ``leaf_op(..., derivative=...)``. Nothing else is
needed: the op is then differentiable wherever and however it is called. Two ``autograd.Function``s are made of it:

    Operation   forward: the op.                     backward: Gradient.       jvp: of the reference.
    Gradient    forward: the fast backward kernel.   backward, jvp: of the reference's vector–Jacobian product.

So a first derivative, ``torch.func.grad`` included, runs the kernels; a second one differentiates the reference, plain
PyTorch, and every higher order follows by autograd. Both save for backward and for forward, and both have a ``vmap``,
which folds the axis into one that the op has anyway (:class:`Fold`), or else loops over it. How the modes of
differentiation reach the functions is the business of ``_leaf.py``.

What a family keeps to: the op's schema takes its tensors first (a list of tensors, if there is one, before all others)
and then everything else, its `constants`. Below, `args` is the tuple of all of them, as the op takes them; `tensors`
are the tensors alone, those of a list last. Public functions check their arguments and call the op; they ask
``_leaf.derives`` where a result without a derivative is cheaper, and never read a number of a tensor that may be under
``vmap``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

SHARED = "shared"  # a tensor that is one for all entries of the folded axis
ALONE = "alone"  # a tensor with which nothing can be folded

_transforms = torch._C._functorch.peek_interpreter_stack
_old_batched = torch._C._functorch.is_legacy_batchedtensor
_NOTHING = contextlib.nullcontext()
_forward_mode = torch._C._is_fwd_grad_enabled


@dataclass(frozen=True)
class Fold:
    """How a vmapped axis becomes part of the op's own axes.

    Args:
        inputs: of every one of `tensors` the axis that it is folded into, in its own counting; negative ones count from
            the end. A tensor without the vmapped axis is repeated. Or :data:`SHARED`: the tensor stays as it is and
            must not have the axis; calls for its gradient, one for each entry, loop. Or :data:`ALONE`: if the tensor is
            given, calls loop.
        outputs: the same axes of every output.
        constants: (size of the axis, constants) to the constants of the folded call; by default the same.
    """

    inputs: tuple[int | str, ...]
    outputs: tuple[int, ...]
    constants: Callable[[int, tuple], tuple] = lambda size, constants: constants


@dataclass(frozen=True)
class Derivative:
    """What is known of an op's derivative.

    Args:
        reference: (args, kept) to the tuple of the differentiable outputs, in the op's dtypes: plain PyTorch,
            differentiable any number of times. Neither writes into tensors nor reads their numbers, since it runs under
            transforms.
        backward: (args, kept, grads, wanted) to one gradient for every one of `tensors`, in the input's dtype, ``None``
            where `wanted`, as many bools, says so. `grads` are those of the differentiable outputs, never ``None``.
            Calls leaf ops, runs without autograd, and may read numbers. Autocast is off in both functions.
        outputs: positions of the differentiable outputs.
        kept: positions of the outputs that are kept for the backward. What they hold follows from the inputs (the
            reference computes it anew), or counts as a constant (the reference takes it from there too).
        fixed: names of floating tensors that have no derivative. Asking for one is an error.
        fold: see :class:`Fold`; by default a vmapped axis is looped over.
    """

    reference: Callable[[tuple, tuple], tuple]
    backward: Callable[[tuple, tuple, tuple, tuple], Sequence[Tensor | None]]
    outputs: tuple[int, ...] = (0,)
    kept: tuple[int, ...] = ()
    fixed: tuple[str, ...] = ()
    fold: Fold | None = None


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or a level of dual numbers is active."""
    return _transforms() is not None or forward_ad._current_level >= 0


def has_derivative(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd follows any of these tensors now, in reverse or with dual numbers."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    level = forward_ad._current_level
    if level < 0 or not _forward_mode():
        return False
    return any(t is not None and torch._VF._unpack_dual(t, level=level)[1] is not None for t in tensors)


def _placed(values: Sequence, places: Sequence[int], new: Sequence) -> list:
    """The values with `new` ones at these places."""
    values = list(values)
    for place, value in zip(places, new, strict=True):
        values[place] = value
    return values


def _forward_mode_of(function: Callable, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Any:
    """The Jacobian–vector product of a function that returns a tuple.

    As the transpose of the transpose: ``torch.func.jvp`` cannot run inside a level of dual numbers, this can.
    """
    # Inside a Function's jvp forward mode is off; transforms further out may need it.
    with forward_ad._set_fwd_grad_enabled(True):
        out, pull = torch.func.vjp(function, *(forward_ad.unpack_dual(x, level=0).primal for x in primals))
        _, push = torch.func.vjp(pull, tuple(torch.zeros_like(x) for x in out))
        return push(tuple(tangents))[0]


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keeps tensors for a Function's backward and jvp; gradients and tangents that are zero come as ``None``."""
    ctx.set_materialize_grads(False)  # in forward mode, tangents of zeros would be pushed too
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _saved(ctx: Any) -> tuple:
    """The tensors that a Function saved; a pullback may be called when its transform is over."""
    return unwrap_dead_wrappers(ctx.saved_tensors)


class Derived:
    """An op with its derivative: ``apply(args)`` is the op, differentiable."""

    def __init__(self, rule: Derivative, op: Callable, schema: Any) -> None:
        kinds = [str(a.type) for a in schema.arguments]
        self.rule, self.op, self.name = rule, op, schema.name.split("::")[1]
        self.listed = kinds[0] == "List[Tensor]"
        self.defaults = tuple(a.default_value for a in schema.arguments)
        self.count = sum("Tensor" in kind for kind in kinds)  # tensor arguments, a list being one
        self.single = [a.name for a in schema.arguments[int(self.listed) : self.count]]  # those that are no list
        self.several = len(schema.returns) > 1
        self.fixed = [self.single.index(name) for name in rule.fixed]
        self.operation, self.gradient = _operation(self), _gradient(self)

    def apply(self, args: tuple) -> Any:
        args = (*args, *self.defaults[len(args) :])
        tensors = args[: self.count]
        if self.listed:
            tensors = (*tensors[1:], *tensors[0])
        return self.operation.apply(args[self.count :], *tensors)

    def args(self, constants: tuple, tensors: Sequence) -> tuple:
        if not self.listed:
            return (*tensors, *constants)
        single = len(self.single)
        return (list(tensors[single:]), *tensors[:single], *constants)

    def check_fixed(self, asked: Sequence[bool]) -> None:
        for place in self.fixed:
            if asked[place]:
                raise RuntimeError(
                    f"{self.single[place]} counts as a constant in {self.name} and cannot be differentiated; detach it"
                )

    def split(self, count: int, tensors: Sequence) -> tuple[Sequence, Sequence, Sequence]:
        """Inputs, kept outputs and gradients of outputs."""
        end = count + len(self.rule.kept)
        return tensors[:count], tensors[count:end], tensors[end:]

    def backward(self, constants: tuple, wanted: tuple, tensors: Sequence) -> Sequence[Tensor | None]:
        """The fast kernel: a gradient for every input that has one."""
        inputs, kept, grads = self.split(len(wanted), tensors)
        with _without_autocast(inputs):
            return self.rule.backward(self.args(constants, inputs), tuple(kept), tuple(grads), wanted)

    def outputs_of(self, constants: tuple, inputs: Sequence, kept: Sequence, places: Sequence[int]) -> Callable:
        """The reference: the differentiable outputs as a function of the inputs at these places."""

        def outputs(*values: Tensor) -> tuple:
            return self.rule.reference(self.args(constants, _placed(inputs, places, values)), tuple(kept))

        return outputs

    def gradients_of(
        self, constants: tuple, count: int, tensors: Sequence, of: Sequence[int], places: Sequence[int]
    ) -> Callable:
        """The reference: the gradients in the inputs `of` as a function of the tensors at these places."""

        def gradients(*values: Tensor) -> tuple:
            inputs, kept, grads = self.split(count, _placed(tensors, places, values))
            _, pull = torch.func.vjp(self.outputs_of(constants, inputs, kept, of), *(inputs[i] for i in of))
            return pull(tuple(grads))

        return gradients


def _by_new_vmap(backward: Callable) -> Callable:
    """``torch.autograd.grad(is_grads_batched=True)`` calls a backward under the vmap of before ``torch.func``, which
    knows no functions of this kind: the same under the new one.
    """

    def batched(ctx: Any, *grads: Tensor | None) -> tuple:
        places = [i for i, g in enumerate(grads) if g is not None and _old_batched(g)]
        if not places:
            return backward(ctx, *grads)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        found: list[int] = []  # places of what is not None

        def results(*entries: Tensor) -> list[Tensor]:
            result = backward(ctx, *_placed(grads, places, entries))
            found[:] = [i for i, x in enumerate(result) if x is not None]
            return [result[i] for i in found]

        size = 1  # only asked for where the axis is missing, which it is not
        plain = [torch._remove_batch_dim(grads[i], level, size, 0) for i in places]
        new = torch.func.vmap(results)(*plain)
        inputs = len(ctx.needs_input_grad)
        return tuple(_placed([None] * inputs, found, [torch._add_batch_dim(x, 0, level) for x in new]))

    return batched


def _operation(derived: Derived) -> type[Function]:
    rule, several = derived.rule, derived.several

    class Operation(Function):
        """(constants, *inputs) to the op's outputs."""

        @staticmethod
        def forward(constants, *inputs):
            return derived.op(*derived.args(constants, inputs))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.constants, *saved = inputs
            derived.check_fixed(ctx.needs_input_grad[1:])
            if several:
                ctx.sizes = [(x.shape, x.dtype) for x in output]
                ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i not in rule.outputs))
                saved += [output[i] for i in rule.kept]
            _save(ctx, saved)

        @staticmethod
        @_by_new_vmap
        def backward(ctx, *grads):
            wanted = ctx.needs_input_grad[1:]
            some = next((g for g in grads if g is not None), None)
            if some is None:
                return (None,) * (1 + len(wanted))
            if several:
                sizes = zip(grads, ctx.sizes, strict=True)
                grads = [some.new_zeros(shape, dtype=dtype) if g is None else g for g, (shape, dtype) in sizes]
            tensors = (*_saved(ctx), *(grads[i] for i in rule.outputs))
            if not torch.is_grad_enabled() and not transformed():  # nobody differentiates the result
                return (None, *derived.backward(ctx.constants, wanted, tensors))
            found = iter(derived.gradient.apply(ctx.constants, wanted, *tensors))
            return (None, *(next(found) if want else None for want in wanted))

        @staticmethod
        def jvp(ctx, _, *tangents):
            inputs, kept, _ = derived.split(len(tangents), _saved(ctx))
            places = [i for i, t in enumerate(tangents) if t is not None]
            derived.check_fixed([i in places for i in range(len(tangents))])
            with _without_autocast(inputs):
                function = derived.outputs_of(ctx.constants, inputs, kept, places)
                pushed = _forward_mode_of(function, [inputs[i] for i in places], [tangents[i] for i in places])
            return tuple(_placed([None] * len(ctx.sizes), rule.outputs, pushed)) if several else pushed[0]

        @staticmethod
        def vmap(info, in_dims, constants, *inputs):
            return _vmap(derived, info.batch_size, in_dims[1:], constants, None, inputs)

    return Operation


def _gradient(derived: Derived) -> type[Function]:
    def variables(ctx) -> list[int]:
        """Places of what the gradients depend on; the kept outputs follow from the inputs."""
        first = len(ctx.wanted)
        return [i for i in range(len(ctx.saved_tensors)) if not first <= i < first + len(derived.rule.kept)]

    def gradients_of(ctx, used: Iterable[int], places: Sequence[int]) -> Callable:
        of = [i for i, want in enumerate(ctx.wanted) if want]
        return derived.gradients_of(ctx.constants, len(ctx.wanted), _saved(ctx), [of[i] for i in used], places)

    class Gradient(Function):
        """(constants, wanted, *inputs, *kept outputs, *gradients of outputs) to the wanted gradients of inputs."""

        @staticmethod
        def forward(constants, wanted, *tensors):
            found = derived.backward(constants, wanted, tensors)
            return tuple(x for x, want in zip(found, wanted, strict=True) if want)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.constants, ctx.wanted, *tensors = inputs
            ctx.sparse = [x.layout is not torch.strided for x in output]
            _save(ctx, tensors)

        @staticmethod
        @_by_new_vmap
        def backward(ctx, *grads):
            tensors = _saved(ctx)
            places = [i for i in variables(ctx) if ctx.needs_input_grad[2 + i]]
            used = [i for i, g in enumerate(grads) if g is not None]
            _check_dense(ctx.sparse[i] for i in used)
            result = [None] * (2 + len(tensors))
            if used and places:
                with _without_autocast(tensors):
                    _, pull = torch.func.vjp(gradients_of(ctx, used, places), *(tensors[i] for i in places))
                    result = _placed(result, [2 + i for i in places], pull(tuple(grads[i] for i in used)))
            return tuple(result)

        @staticmethod
        def jvp(ctx, _constants, _wanted, *tangents):
            tensors = _saved(ctx)
            _check_dense(ctx.sparse)
            places = [i for i in variables(ctx) if tangents[i] is not None]
            with _without_autocast(tensors):
                function = gradients_of(ctx, range(sum(ctx.wanted)), places)
                return _forward_mode_of(function, [tensors[i] for i in places], [tangents[i] for i in places])

        @staticmethod
        def vmap(info, in_dims, constants, wanted, *tensors):
            return _vmap(derived, info.batch_size, in_dims[2:], constants, wanted, tensors)

    return Gradient


def _check_dense(sparse: Iterable[bool]) -> None:
    if any(sparse):
        raise RuntimeError("a sparse gradient cannot be differentiated again; ask for dense ones with sparse=False")


def _without_autocast(tensors: Sequence[Tensor | None]) -> Any:
    device = next(t.device.type for t in tensors if t is not None)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


def _entry(x: Any, dim: Any, i: int) -> Any:
    """What entry i of a vmapped axis sees of an argument."""
    if isinstance(dim, (list, tuple)):
        return [_entry(y, d, i) for y, d in zip(x, dim, strict=True)]
    return x if dim is None else x.select(dim, i)


def looped(function: Callable, size: int, dims: Sequence, args: Sequence) -> tuple[Any, Any]:
    """A function over a vmapped axis, entry by entry."""
    entries = [function(*(_entry(x, d, i) for x, d in zip(args, dims, strict=True))) for i in range(size)]
    if not isinstance(entries[0], tuple):
        return torch.stack(entries), 0
    return tuple(torch.stack(column) for column in zip(*entries, strict=True)), (0,) * len(entries[0])


def _vmap(
    derived: Derived, size: int, dims: Sequence[int | None], constants: tuple, wanted: tuple | None, tensors: Sequence
) -> tuple[Any, Any]:
    """Operation, or with `wanted` Gradient, over an axis: its results, and where these have the axis."""
    axes = _fold_axes(derived, dims, wanted, tensors)
    function, leading = (derived.operation, ()) if wanted is None else (derived.gradient, (wanted,))
    if axes is None:
        return looped(function.apply, size, (None,) * (1 + len(leading)) + tuple(dims), (constants, *leading, *tensors))
    into, out_of = axes
    folded = [_folded(t, d, axis, size) for t, d, axis in zip(tensors, dims, into, strict=True)]
    found = function.apply(derived.rule.fold.constants(size, constants), *leading, *folded)
    if type(found) is not tuple:
        return _unfolded(found, out_of[0], size)
    return tuple(zip(*(_unfolded(x, axis, size) for x, axis in zip(found, out_of, strict=True)), strict=True))


def _fold_axes(
    derived: Derived, dims: Sequence[int | None], wanted: tuple | None, tensors: Sequence
) -> tuple[list, list] | None:
    """The axis that every tensor is folded into and every result out of, or ``None`` where only a loop is right."""
    fold, rule = derived.rule.fold, derived.rule
    if fold is None:
        return None
    into, out_of = list(fold.inputs), list(fold.outputs)
    if wanted is not None:
        out_of = [axis for axis, want in zip(into, wanted, strict=True) if want]
        into += [fold.outputs[i] for i in (*rule.kept, *rule.outputs)]
    for axis, d, t in zip(into, dims, tensors, strict=True):
        if t is not None and (axis == ALONE or (axis == SHARED and d is not None)):
            return None
    return None if SHARED in out_of else (into, out_of)


def _folded(t: Tensor | None, dim: int | None, axis: int | str, size: int) -> Tensor | None:
    if t is None or isinstance(axis, str):
        return t
    place = axis if axis >= 0 else axis - 1  # negative ones: before the axis that it is folded into
    if dim is None:
        t = t.unsqueeze(place).expand([size if i == place % (t.dim() + 1) else -1 for i in range(t.dim() + 1)])
    else:
        t = t.movedim(dim, place)
    return t.flatten(place, place + 1)


def _unfolded(t: Tensor, axis: int, size: int) -> tuple[Tensor, int]:
    t = t.unflatten(axis, (size, -1))
    return t, axis if axis >= 0 else t.dim() + axis - 1
