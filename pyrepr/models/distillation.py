"""Fine-tuning a converted model to do as the model it came from: :func:`distill`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pyrepr._modules import evaluating, hooked, restored
from pyrepr._reporting import progress_bar, versions
from pyrepr.models._inputs import Inputs, Stream, Streams, call, check_data, dense, main_output, taken, tensors_of
from pyrepr.models._layers import Layers, choose_modules, layer_table, unwrap
from pyrepr.models._recording import plain_execution, watched
from pyrepr.models.conversion import kept
from pyrepr.nn._converted import Converted
from pyrepr.nn.lookup import LookupLinear

__all__ = ["Distillation", "distill"]

Loss = Callable[[Any, Any, Any], Tensor]


@dataclass(frozen=True, repr=False)
class Distillation:
    """How :func:`distill` went.

    Attributes:
        layer_losses: a float a step of the first phase: squared error of the layers' outputs over their variance, mean
            over the layers.
        output_losses: a float a step of the second phase: the same of the model's output, or what `loss` gave.
        layers: where activations were matched. trained: names of the parameters that were trained.
        versions: of pyrepr, torch and Python.

    Example:
        >>> import copy
        >>> batches = [torch.randn(64, 16)]
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        >>> student = copy.deepcopy(teacher)
        >>> report = pyrepr.convert(student, batches, bits=4, batch_sizes=(), progress=False)
        >>> history = pyrepr.distill(student, teacher, batches, lr=1e-4, progress=False)
    """

    layer_losses: tuple[float, ...]
    output_losses: tuple[float, ...]
    layers: tuple[str, ...]
    trained: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        def phase(name: str, losses: tuple[float, ...]) -> str:
            if not losses:
                return f"{name} not trained"
            first, last = _ends(losses)
            return f"{name} {first:.3g} → {last:.3g} in {len(losses)} steps"

        return (
            f"Distillation({phase('layers', self.layer_losses)}, {phase('output', self.output_losses)}; "
            f"{len(self.trained)} parameters trained, matched at {len(self.layers)} layers)"
        )


def _ends(losses: tuple[float, ...]) -> tuple[float, float]:
    """Mean loss of the first and of the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def _warn_if_worse(what: str, losses: tuple[float, ...]) -> None:
    if losses and (ends := _ends(losses))[1] > ends[0]:
        warnings.warn(
            f"the loss of the {what} rose from {ends[0]:.3g} to {ends[1]:.3g} in {len(losses)} steps; "
            "try a smaller lr, or more data",
            stacklevel=3,
        )


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    inputs: Inputs | None = None,
    layers: Layers | None = None,
    train: str | Callable[[str, nn.Parameter], bool] = "lookup",
    epochs: tuple[int, int] = (1, 1),
    lr: float = 0.01,
    loss: Loss | None = None,
    progress: bool = True,
) -> Distillation:
    """Fine-tunes a model converted to tables or signs (:func:`pyrepr.convert`) to do as the original did, in place.

    First all activations at the converted layers together, then the model's output. Both models run in eval mode on
    the same batches; hooks are removed and training flags restored whatever happens. Adam, with steps in units of each
    parameter's own size, which in each phase rise for a tenth of the steps and fall along half a cosine.

    Args:
        student: the converted model, in float32, float64 or bfloat16; the parameters of the last are trained as float32
            copies, from which they are rounded after every step.
        teacher: the original, for instance a ``copy.deepcopy`` made before.
        data: as of :func:`pyrepr.compare`; a list or a ``DataLoader``, for it is gone through ``sum(epochs)`` times.
            Padding is left out by the mask of the stream a layer works on.
        inputs: a function from a batch to what both models take, as of :func:`pyrepr.compare`.
        layers: where activations are matched in the first phase; as ``layers_a`` of :func:`pyrepr.compare`, names that
            both models have. By default the student's converted layers, :class:`pyrepr.nn.LookupLinear` and
            :class:`pyrepr.nn.SignLinear`.
        train: ``"lookup"`` (default): tables or weights, biases and low-rank parts of these layers; ``"all"``: every
            parameter; or a function of (name, parameter) that says yes or no.
        epochs: passes over the data for the layers, and for the output.
            Signs, and tables of two bits, let a gradient through to the layers before them by their low-rank part only:
            without one (`rank` of :func:`pyrepr.convert`) the second phase trains the last of them alone.
        lr: the largest steps' size relative to a parameter's root mean square. Default 0.01, for students with an error
            of a tenth or more, and some 50 batches. One that is already close to its teacher gets worse at first and
            needs many steps to come back: take 0.001 or less, and compare the losses.
        loss: of the second phase, a function of (student's output, teacher's output, batch); by default the squared
            error of the model's output over its variance; of several outputs that of the same name in both (``logits``,
            ``last_hidden_state``, …), never a loss.
        progress: a tqdm bar on stderr, where tqdm is installed.

    Returns:
        A :class:`Distillation` with the losses.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
        FloatingPointError: if the loss is not finite; the student keeps what it had learnt before that step.

    Warns:
        UserWarning: if a phase's loss is higher at its end than at its start.

    Example:
        >>> import copy
        >>> batches = [torch.randn(64, 16)]
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        >>> student = copy.deepcopy(teacher)
        >>> report = pyrepr.convert(student, batches, bits=4, batch_sizes=(), progress=False)
        >>> history = pyrepr.distill(student, teacher, batches, lr=1e-4, progress=False)
    """
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    _check_options(data, epochs, lr, loss)
    student, teacher = unwrap(student), unwrap(teacher)
    names = _matched(student, teacher, layers) if epochs[0] else []
    trained = _trained(student, teacher, train)
    phases: tuple[Callable[[Any], Tensor], ...] = (
        _LayerLoss(student, teacher, names, inputs),
        _OutputLoss(student, teacher, loss, inputs),
    )
    history: list[tuple[float, ...]] = []
    with evaluating([student, teacher]), plain_execution(), _only(student, trained), torch.enable_grad():
        for what, phase, count in zip(("layers", "output"), phases, epochs, strict=True):
            history.append(tuple(_run(phase, trained, data, count, lr, f"distill {what}", progress)))
            _warn_if_worse(what, history[-1])
    return Distillation(history[0], history[1], tuple(names), tuple(trained), versions())


def _check_options(data: object, epochs: object, lr: object, loss: object) -> None:
    check_data(data)
    if (
        not isinstance(epochs, Sequence)
        or len(epochs) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in epochs)
    ):
        raise ValueError(f"epochs must be two ints of at least 0, for the layers and for the output, got {epochs!r}")
    if sum(epochs) > 1 and isinstance(data, Iterator):
        raise ValueError(f"data must be a list or a DataLoader for {sum(epochs)} passes, got a {type(data).__name__}")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be a positive and finite number, got {lr!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of (student's output, teacher's output, batch), got {loss!r}")


def _matched(student: nn.Module, teacher: nn.Module, layers: Layers | None) -> list[str]:
    """The names of `layers`, which both models must have."""
    if layers is None:
        names = [name for name, module in layer_table(student).items() if isinstance(module, Converted)]
        if not names:
            raise ValueError("student must hold LookupLinear or SignLinear layers, got none; see pyrepr.convert")
    else:
        names = choose_modules(student, layers, "layers")
    table = layer_table(teacher)
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"layers must be names that teacher has too, got {missing[0]}")
    return names


def _trained(
    student: nn.Module, teacher: nn.Module, train: str | Callable[[str, nn.Parameter], bool]
) -> dict[str, nn.Parameter]:
    everything = dict(student.named_parameters())
    if callable(train):
        chosen = {name: p for name, p in everything.items() if train(name, p)}
    elif train == "all":
        chosen = everything
    elif train == "lookup":
        own = {id(p) for m in student.modules() if isinstance(m, Converted) for p in m.parameters()}
        chosen = {name: p for name, p in everything.items() if id(p) in own}
    else:
        raise ValueError(f"train must be 'lookup', 'all' or a function, got {train!r}")
    if not chosen:
        raise ValueError("train must choose at least one parameter of student, got none")
    shared = {p.data_ptr() for p in teacher.parameters()}
    for name, p in chosen.items():
        if p.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            came = str(p.dtype).removeprefix("torch.")
            raise ValueError(
                f"student must be float32, float64 or bfloat16 to be trained, got {came} {name}; quantize afterwards"
            )
        if p.data_ptr() in shared:
            raise ValueError(f"teacher must not share what is trained, got {name} in both; deepcopy before converting")
    return chosen


@contextmanager
def _only(student: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients, dense ones, for these parameters and no other; flags are restored and gradients dropped."""
    wanted = {id(p) for p in trained.values()}
    changes: list[tuple[object, str, object]] = [(p, "requires_grad", id(p) in wanted) for p in student.parameters()]
    changes += [(m, "sparse", False) for m in student.modules() if isinstance(m, LookupLinear) and m.sparse]
    with restored(changes), (stack := ExitStack()), stack:
        for p in trained.values():
            stack.callback(setattr, p, "grad", None)
        yield


def _run(
    loss_of: Callable[[Any], Tensor],
    trained: dict[str, nn.Parameter],
    data: Iterable[Any],
    epochs: int,
    lr: float,
    description: str,
    progress: bool,
) -> Iterator[float]:
    """One phase; a loss a step."""
    if not epochs:
        return
    # Steps of a hundredth are lost in bfloat16: what is trained is a float32 copy, which the parameter is rounded from.
    masters = {name: p.detach().float() if p.dtype == torch.bfloat16 else p for name, p in trained.items()}
    groups = [{"params": [p], "lr": lr * _size(p)} for p in masters.values()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    length = epochs * len(data) if isinstance(data, Sized) else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, length))
    steps = 0
    batches = (batch for _ in range(epochs) for batch in data)
    for batch in progress_bar(batches, progress, description, "step", length):
        value = loss_of(batch)
        if not bool(value.isfinite()):
            raise FloatingPointError(f"the loss must be finite, got {value.item()} at step {steps}; try a smaller lr")
        optimizer.zero_grad()
        value.backward()
        _step(optimizer, trained, masters)
        schedule.step()
        steps += 1
        yield value.item()
    if not steps:
        raise ValueError("data must give at least one batch, got none")


def _step(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter], masters: dict[str, Tensor]) -> None:
    """One of the optimizer's, whose parameters are the masters; theirs are the gradients of what is trained."""
    copies = [(p, masters[name]) for name, p in trained.items() if masters[name] is not p]
    for p, master in copies:
        master.grad = None if p.grad is None else p.grad.float()
        p.grad = None
    optimizer.step()
    with torch.no_grad():
        for p, master in copies:
            p.copy_(master)


def _pace(step: int, length: int | None) -> float:
    """The step size over lr: up in the first tenth of the steps, for Adam's first ones know no noise; then half a
    cosine down to zero. Constant after 20 steps where the length is not known."""
    warmup = 20 if length is None else length // 10
    if step < warmup or length is None:
        return min(1.0, (step + 1) / max(1, warmup))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, length - warmup)))


def _size(parameter: Tensor) -> float:
    """Root mean square; 1e-3 for a parameter that is all zero, whose steps would otherwise be nothing."""
    return float(parameter.detach().square().mean().sqrt()) or 1e-3


class _Watch:
    """Runs a model and keeps what some of its layers put out, each with the streams it worked on."""

    def __init__(self, model: nn.Module, names: list[str], argument: str, inputs: Inputs | None) -> None:
        table = layer_table(model)
        self.model, self.argument, self.inputs = model, argument, inputs
        self.modules = {name: table[name] for name in names}
        self.streams = Streams(model)

    def __call__(self, batch: Any) -> tuple[Any, dict[str, tuple[Tensor, list[Stream]]]]:
        found: dict[str, tuple[Tensor, list[Stream]]] = {}

        def sink(name: str, side: str, call: int, output: Any, given: Any) -> None:
            for _, value in tensors_of(output)[:1]:
                found[name] = (dense(value)[0], self.streams.current)

        self.streams.begin(batch, taken(batch, self.inputs))
        sides = {name: {"output"} for name in self.modules}
        with hooked(chain(self.streams.hooks(), watched(self.modules, sides, sink))):
            output = call(self.model, batch, self.argument, self.inputs)
        missing = [name for name in self.modules if name not in found]
        if missing:
            raise ValueError(f"layers: {missing[0]} is not called in {self.argument}, or puts out no tensor")
        return output, found


class _LayerLoss:
    """Mean over the layers of what activations are off by."""

    def __init__(self, student: nn.Module, teacher: nn.Module, names: list[str], inputs: Inputs | None) -> None:
        self.student = _Watch(student, names, "student", inputs)
        self.teacher = _Watch(teacher, names, "teacher", inputs)

    def __call__(self, batch: Any) -> Tensor:
        with torch.no_grad():
            _, truths = self.teacher(batch)
        _, values = self.student(batch)
        losses = [
            _relative(values[name][0], truth, streams, f"layers: {name}") for name, (truth, streams) in truths.items()
        ]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class _OutputLoss:
    """The user's loss, or what the outputs of one name are off by."""

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: Loss | None, inputs: Inputs | None) -> None:
        self.student = _Watch(student, [], "student", inputs)
        self.teacher = _Watch(teacher, [], "teacher", inputs)
        self.loss = loss

    def __call__(self, batch: Any) -> Tensor:
        with torch.no_grad():
            truth, _ = self.teacher(batch)
        value, _ = self.student(batch)
        if self.loss is not None:
            return self._checked(self.loss(value, truth, batch))
        mine, true = main_output(value), main_output(truth)
        if mine is None or true is None:
            raise ValueError("student and teacher must put out a floating-point tensor, got none; give a loss")
        if mine[0] != true[0]:
            raise ValueError(
                f"student and teacher must put out the same, got {mine[0] or 'a tensor'} and {true[0] or 'a tensor'}; "
                "give a loss"
            )
        return _relative(mine[1], true[1], self.teacher.streams.current, "student and teacher")

    @staticmethod
    def _checked(value: Any) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
            came = list(value.shape) if isinstance(value, Tensor) and value.dim() else type(value).__name__
            raise ValueError(f"loss must give a scalar tensor with a gradient, got {came}")
        return value


def _relative(x: Tensor, truth: Tensor, streams: list[Stream], name: str) -> Tensor:
    """Squared error over the variance of truth [..., d], without padding."""
    truth = truth.to(x.device, x.dtype)
    if x.shape != truth.shape:
        raise ValueError(f"{name} must put out one shape, got {list(x.shape)} and {list(truth.shape)}")
    x, truth = kept(x, streams), kept(truth, streams)
    variance = (truth - truth.mean(0)).square().sum()
    return (x - truth).square().sum() / torch.where(variance > 0, variance, 1)
