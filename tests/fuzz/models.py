"""Whole models: compare, convert and distill on small networks of any make.

Truth: CKA of the activations that hooks saw, in NumPy; a converted layer's own report; after an error, the model as
it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from draw import Case, Draw
from measures import cka_of

import pyrepr

BACKENDS = False
KINDS = ("linear", "mlp", "branch", "tied", "norm", "batchnorm", "dropout", "twice", "tuple", "dict")


class Branch(torch.nn.Module):
    """Two linear layers side by side, one of them never called."""

    def __init__(self, d: int, h: int, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.unused = torch.nn.Linear(d, h), torch.nn.Linear(h, d), torch.nn.Linear(d, d)
        self.kind = kind

    def forward(self, x: torch.Tensor, **more: Any) -> Any:
        y = self.second(torch.tanh(self.first(x)))
        if self.kind == "twice":
            y = self.second(torch.tanh(self.first(y)))
        return (y, None) if self.kind == "tuple" else {"logits": y} if self.kind == "dict" else x + y


def net(kind: str, d: int, h: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    linear, tanh = torch.nn.Linear, torch.nn.Tanh
    if kind in ("branch", "twice", "tuple", "dict"):
        return Branch(d, h, kind)
    if kind == "tied":
        model = torch.nn.Sequential(linear(d, d), tanh(), linear(d, d))
        model[2].weight = model[0].weight
        return model
    middle = {"norm": torch.nn.LayerNorm(h), "batchnorm": torch.nn.BatchNorm1d(h), "dropout": torch.nn.Dropout(0.5)}
    if kind == "linear":
        return torch.nn.Sequential(linear(d, h))
    return torch.nn.Sequential(linear(d, h), middle.get(kind, tanh()), linear(h, d, bias=kind != "mlp"))


def state(model: torch.nn.Module) -> dict[str, Any]:
    """Everything a call must leave as it was."""
    return {
        "weights": {name: p.detach().clone() for name, p in model.state_dict().items()},
        "types": {name: type(m).__name__ for name, m in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "training": {name: m.training for name, m in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
    }


def difference(before: dict[str, Any], after: dict[str, Any], parts: tuple[str, ...]) -> str | None:
    for part in parts:
        if part == "weights":
            same = before[part].keys() == after[part].keys() and all(
                torch.equal(a, after[part][name]) or bool(a.isnan().any()) for name, a in before[part].items()
            )
        else:
            same = before[part] == after[part]
        if not same:
            return f"{part} of a model are not as they were"
    return None


def activations(model: torch.nn.Module, names: tuple[str, ...], batches: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """What hooks see, [N, features] a layer; `name#i` is the i-th run, from 1 on, of a layer that runs twice."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modules = {"(model)": model, **dict(model.named_modules())}
    training = {name: m.training for name, m in modules.items()}
    runs: dict[str, list[Any]] = {name.partition("#")[0]: [] for name in names}
    hooks = [modules[name].register_forward_hook(lambda m, i, o, to=to: to.append(o)) for name, to in runs.items()]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            for outputs in runs.values():
                outputs.clear()
            model(batch)
            for name in names:
                layer, _, run = name.partition("#")
                y = runs[layer][int(run or 1) - 1]
                if not isinstance(y, torch.Tensor):
                    y = next(t for t in (y.values() if isinstance(y, dict) else y) if isinstance(t, torch.Tensor))
                seen[name].append(y.flatten(1))
    for hook in hooks:
        hook.remove()
    for name, flag in training.items():
        modules[name].training = flag
    return {name: torch.cat(parts).double().numpy().astype(np.longdouble) for name, parts in seen.items()}


NAMES = {"net": net, "state": state}


def batches_line(draw: Draw, d: int, wild: float = 0.1) -> str:
    rows = [draw.choice((1, 4, 8, 16, 33)) for _ in range(draw.randint(1, 3))]
    parts = [draw.values((n, d), wild=wild) for n in rows]
    return "batches = [" + ", ".join(f"({part}).float()" for part in parts) + "]"


def prepared(draw: Draw, name: str, kind: str, d: int, h: int) -> list[str]:
    lines = [f"{name} = net({kind!r}, {d}, {h}, {draw.seed_()})"]
    if draw.chance(0.3):
        lines.append(f"{name}.eval()")
    if draw.chance(0.2):
        lines.append(f"next({name}.parameters()).requires_grad_(False)")
    return lines


def draw_compare(draw: Draw) -> Case:
    d, h = draw.choice((1, 2, 4, 7)), draw.choice((1, 3, 8))
    lines = [
        *prepared(draw, "a", draw.choice(KINDS), d, h),
        *prepared(draw, "b", draw.choice(KINDS), d, h),
        batches_line(draw, d, 0),
    ]
    lines.append("before = [state(a), state(b)]")
    estimator = draw.choice(("unbiased", "biased"))
    options = [f"estimator={estimator!r}", "progress=False"]
    extra = draw.choice(
        (
            "",
            "",
            "",
            "samples='tokens'",
            "mode='minibatch'",
            "layers_a='**'",
            "layers_b=lambda n, m: 'first' in n",
            "layers_a='nothing'",
            "mode='what'",
            "kernel='rbf'",
            "samples=3",
        )
    )
    if extra:
        options.append(extra)
    data = draw.choice(("batches",) * 6 + ("[]", "None", "3", "batches[0]"))
    call = f"out = pyrepr.compare(a, {draw.choice(('b', 'b', 'a'))}, {data}, {', '.join(options)})"
    case = Case("compare", call, "either", lines, repeatable=False)
    case.names = (
        "data",
        "model_a",
        "model_b",
        "layers_a",
        "layers_b",
        "samples",
        "mode",
        "kernel",
        "estimator",
        "batch",
        "layers",
        "model",
        "estimator",
        "samples",
    )

    def check(names: dict[str, Any]) -> str | None:
        out, models = (
            names["out"],
            [names["a"], names["b"] if call.startswith("out = pyrepr.compare(a, b") else names["a"]],
        )
        what = [
            difference(old, state(m), tuple(old))
            for old, m in zip(names["before"], (names["a"], names["b"]), strict=True)
        ]
        if any(what):
            return next(w for w in what if w)
        if tuple(out.values.shape) != (len(out.layers_a), len(out.layers_b)):
            return "values do not fit the layers"
        if (
            extra in ("samples='tokens'", "mode='minibatch'", "kernel='rbf'")
            or out.mode != "exact"
            or "batches[0]" in call
        ):
            return None
        left, right = (
            activations(m, layers, names["batches"])
            for m, layers in zip(models, (out.layers_a, out.layers_b), strict=True)
        )
        for i, x in enumerate(out.layers_a):
            for j, y in enumerate(out.layers_b):
                truth = float(cka_of(left[x], right[y], {"name": "linear"}, estimator))
                spread = min(
                    np.ptp(side[name], 0).max() / (np.abs(side[name]).max() + 1e-30)
                    for side, name in ((left, x), (right, y))
                )
                if (
                    np.isfinite(truth)
                    and spread > 1e-3
                    and abs(truth) < 50
                    and not abs(float(out.values[i, j]) - truth) < 0.01 * (1 + abs(truth))
                ):
                    return f"CKA of {x!r} and {y!r} is {float(out.values[i, j])}, truth {truth}"
        return None

    case.check = check
    return case


def draw_convert(draw: Draw) -> Case:
    d, h = draw.choice((2, 4, 8)), draw.choice((3, 4, 8))
    kind = draw.choice(KINDS)
    lines = [*prepared(draw, "model", kind, d, h), batches_line(draw, d), "before = state(model)"]
    options = [
        f"bits={draw.choice((1, 2, 2, 4, 3))}",
        "batch_sizes=()",
        "progress=False",
        f"rank={draw.choice((0, 0, 0, 1, 2))}",
        f"hash={draw.choice(('one_bit', 'two_bit'))!r}",
    ]
    if draw.chance(0.3):
        options.append("form='signs'")
    if draw.chance(0.3):
        options.append(f"quantize={draw.choice(('int8', 'bf16'))!r}")
    if draw.chance(0.3):
        options.append(
            draw.choice(
                (
                    "select='**'",
                    "select='0'",
                    "select='nothing'",
                    "select=lambda n, m: True",
                    "select=3",
                    "weighting='x'",
                    "form='x'",
                    "hash='x'",
                    "max_rows=3",
                    "max_rows=16",
                    "rank=-1",
                    "rank=99",
                    "quantize='int4'",
                )
            )
        )
        key = options[-1].split("=")[0]
        options = [o for o in options if o.split("=")[0] != key or o is options[-1]]
    data = draw.choice(
        ("batches",) * 8
        + ("batches[0]", "[]", "None", "'x'", "[torch.zeros(3, 99)]", "[b * float('nan') for b in batches]")
    )
    case = Case(
        "convert", f"out = pyrepr.convert(model, {data}, {', '.join(options)})", "either", lines, repeatable=False
    )
    case.names = (
        "data",
        "model",
        "calibration_data",
        "select",
        "bits",
        "rank",
        "weighting",
        "form",
        "hash",
        "quantize",
        "max_rows",
        "calibration",
        "batch",
        "output",
        "mat1",
    )

    def check(names: dict[str, Any]) -> str | None:
        out, model = names["out"], names["model"]
        after = state(model)
        what = difference(names["before"], after, ("hooks",))
        if what:
            return what
        kinds = (pyrepr.nn.LookupLinear, pyrepr.nn.SignLinear)
        for layer in out.layers:
            module = dict(model.named_modules())[layer.name]
            if not isinstance(module, kinds):
                return f"{layer.name} is reported and was not converted"
            if not np.isfinite(layer.relative_mse) and not np.isnan(layer.relative_mse):
                return f"relative_mse is {layer.relative_mse}"
        count = sum(isinstance(m, kinds) for m in model.modules())
        if count != len(out.layers):
            return f"{count} layers were replaced and {len(out.layers)} are reported"
        if {n: t for n, t in after["training"].items() if n in names["before"]["training"]} != names["before"][
            "training"
        ]:
            return "training flags are not as they were"
        str(out), repr(out)
        model.eval()
        return None

    case.check = check
    return restored(case, "model")


def restored(case: Case, name: str) -> Case:
    """A call that fails has to leave the model as it was: that is checked in the call itself."""
    case.call = (
        f"before_call = state({name})\ntry:\n    {case.call}\n"
        f"except Exception:\n    unchanged(before_call, state({name}))\n    raise"
    )
    return case


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    what = difference(before, after, tuple(before))
    if what:
        raise AssertionError(f"after an error {what}")


NAMES["unchanged"] = unchanged


def draw_distill(draw: Draw) -> Case:
    d, h = draw.choice((2, 4)), draw.choice((4, 8))
    lines = [
        *prepared(draw, "teacher", draw.choice(KINDS), d, h),
        batches_line(draw, d, 0.05),
        "import copy; student = copy.deepcopy(teacher)",
    ]
    if draw.chance(0.9):
        lines.append("pyrepr.convert(student, batches, bits=2, batch_sizes=(), progress=False)")
    lines.append("before = state(teacher)")
    options = [f"epochs={draw.choice(((1, 1), (0, 1), (1, 0), (2, 1), (0, 0)))}", "progress=False"]
    if draw.chance(0.4):
        options.append(
            draw.choice(
                (
                    "train='all'",
                    "train='x'",
                    "train=lambda n, p: False",
                    "lr=0",
                    "lr=float('nan')",
                    "lr=1.0",
                    "layers='0'",
                    "layers='no'",
                    "loss=lambda s, t, b: 3",
                    "loss=3",
                    "epochs=1",
                )
            )
        )
        options = [o for o in options[:-1] if o.split("=")[0] != options[-1].split("=")[0]] + options[-1:]
    data = draw.choice(
        ("batches",) * 8 + ("batches[0]", "[]", "iter(batches)", "3", "[b * float('nan') for b in batches]")
    )
    case = Case(
        "distill",
        f"out = pyrepr.distill(student, teacher, {data}, {', '.join(options)})",
        "either",
        lines,
        repeatable=False,
    )
    case.names = ("student", "teacher", "data", "layers", "train", "epochs", "lr", "loss", "batch", "output")
    case.names += ("calibration",)  # of the conversion before, whose layers may overflow

    def check(names: dict[str, Any]) -> str | None:
        what = difference(names["before"], state(names["teacher"]), tuple(names["before"]))
        if what:
            return f"the teacher: {what}"
        if any(p.grad is not None for p in names["student"].parameters()):
            return "gradients are left behind"
        if not all(np.isfinite(names["out"].layer_losses)) or not all(np.isfinite(names["out"].output_losses)):
            return "a loss is not finite"
        return None

    case.check = check
    return case


def draw(draw: Draw) -> Case:
    return draw.choices((draw_compare, draw_convert, draw_distill), (3, 3, 2))[0](draw)
