"""Family `causal_conv1d`: the convolution and its step. Truth: a sum over taps, sequence by sequence."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from draw import EPS, Case, Differential, Draw, compare, f64

WIDE = {torch.float64: torch.float64}


def silu(y: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return y / (1 + np.exp(-y))


def convolve(
    x: np.ndarray,  # [B, D, T]
    weight: np.ndarray,  # [D, W]
    bias: np.ndarray | None,
    initial: np.ndarray | None,  # [N, D, W - 1]
    bounds: list[tuple[int, int, int]],  # row, start, end of every sequence
    activation: bool,
) -> np.ndarray:
    kind = np.result_type(x, weight, *(a for a in (bias, initial) if a is not None))
    out = np.zeros(x.shape, dtype=kind)
    taps = weight.shape[1]
    for number, (row, start, end) in enumerate(bounds):
        before = np.zeros((x.shape[1], taps - 1)) if initial is None else initial[number]
        seen = np.concatenate([before, x[row, :, start:end]], 1)
        y = sum(weight[:, j : j + 1] * seen[:, j : j + end - start] for j in range(taps))
        out[row, :, start:end] = y + (0 if bias is None else bias[:, None])
    return silu(out) if activation else out


def final_states(
    x: np.ndarray, kept: int, initial: np.ndarray | None, bounds: list[tuple[int, int, int]]
) -> np.ndarray:
    found = np.zeros((len(bounds), x.shape[1], kept), dtype=x.dtype)
    for number, (row, start, end) in enumerate(bounds):
        before = np.zeros((x.shape[1], kept)) if initial is None else initial[number]
        found[number] = np.concatenate([before, x[row, :, start:end]], 1)[:, end - start :]
    return found


def cuts(draw: Draw, total: int) -> list[int]:
    """Borders of packed sequences, some of them empty."""
    inner = sorted(draw.randint(0, total) for _ in range(draw.randint(0, 4)))
    return [0, *inner, total]


def runs(marks: np.ndarray) -> list[tuple[int, int, int]]:
    """Sequences of seq_idx [B, T]."""
    found = []
    for row, line in enumerate(marks):
        edges = [0, *(np.nonzero(np.diff(line))[0] + 1), len(line)] if len(line) else []
        found += [(row, int(a), int(b)) for a, b in itertools.pairwise(edges)]
    return found


def size_bound(arrays: list[np.ndarray | None], bounds: Any, eps: float, taps: int) -> np.ndarray:
    """What rounding costs at most: SiLU's slope is below 1.1."""
    sizes = [None if a is None else np.abs(a) for a in arrays]
    return (2 * taps + 8) * eps * convolve(*sizes, bounds, False)


def draw_fn(draw: Draw) -> Case:
    packing = draw.choice(("rows", "rows", "cu_seqlens", "seq_idx"))
    batch = 1 if packing == "cu_seqlens" else draw.size(4)
    channels, total, taps = (
        draw.size(40),
        draw.size(130 if draw.chance(0.1) else 40),
        draw.choice((1, 2, 3, 4, 4, 4, 5, 7)),
    )
    if draw.chance(0.02):
        batch, channels, total = 1, draw.choice((512, 600)), draw.choice((300, 513))
    dtype = draw.dtype()
    filter_dtype = dtype if draw.chance(0.6) else draw.dtype() if dtype != "float64" else "float64"
    special = 0.0 if draw.chance(0.7) else 0.5
    lines = [f"x = {draw.array((batch, channels, total), dtype, wild=0.2, special=special)}"]
    if draw.chance(0.5):
        lines = [f"x = ({draw.array((batch, total, channels), dtype, wild=0.2, special=special)}).mT"]
    lines.append(f"weight = {draw.array((channels, taps), filter_dtype, wild=0.1)}")
    arguments = ["x", "weight"]
    with_bias = draw.chance(0.5)
    if with_bias:
        lines.append(f"bias = {draw.array((channels,), filter_dtype)}")
        arguments.append("bias")
    if packing == "cu_seqlens":
        edges = cuts(draw, total)
        bounds: Any = [(0, a, b) for a, b in itertools.pairwise(edges)]
        lines.append(f"cu_seqlens = torch.tensor({edges}, dtype=torch.{draw.choice(('int32', 'int64'))})")
        arguments.append("cu_seqlens=cu_seqlens")
    elif packing == "seq_idx":
        marks = f"(randn({draw.seed_()}, {batch}, {total}).abs() * 0.7).cumsum(-1)"
        lines.append(f"seq_idx = {marks}.to(torch.{draw.choice(('int32', 'int64'))})")
        arguments.append("seq_idx=seq_idx")
        bounds = None
    else:
        bounds = [(row, 0, total) for row in range(batch)]
    with_initial = packing != "seq_idx" and draw.chance(0.4)
    final = packing != "seq_idx" and draw.chance(0.4)
    if with_initial:
        state_dtype = dtype if draw.chance(0.7) else "float32" if dtype != "float64" else dtype
        lines.append(f"initial_states = {draw.array((len(bounds), channels, taps - 1), state_dtype)}")
        arguments.append("initial_states=initial_states")
    if final:
        arguments.append("return_final_states=True")
    activation = draw.choice((None, "silu", "swish"))
    if activation or draw.chance(0.3):
        arguments.append(f"activation={activation!r}")
    call = f"pyrepr.causal_conv1d_fn({', '.join(arguments)})"
    # PyTorch's sigmoid, in the reference that takes float64, rounds by where a thread's share begins.
    repeatable = not (activation and dtype == "float64")
    case = Case("causal_conv1d_fn", f"out = {call}", "value", lines, repeatable=repeatable)

    def truth(names: dict[str, Any]) -> tuple[list[np.ndarray | None], Any]:
        arrays = [f64(names[n]) if n in names else None for n in ("x", "weight", "bias", "initial_states")]
        return arrays, runs(names["seq_idx"].numpy()) if bounds is None else bounds

    def check(names: dict[str, Any]) -> str | None:
        out = names["out"]
        arrays, where = truth(names)
        if final:
            if not isinstance(out, tuple) or len(out) != 2:
                return "no final states were returned"
            out, state = out
            wanted = final_states(arrays[0], taps - 1, arrays[3], where)
            what = compare("final_states", state, wanted, 0.0 if not with_initial else 1e-30, names["x"].dtype)
            if what:
                return what
        dtype = names["x"].dtype
        eps = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
        finite = [None if a is None else np.where(np.isfinite(a), a, 0) for a in arrays]
        bound = 1.2 * size_bound(finite, where, eps, taps)
        if with_initial and names["initial_states"].dtype != dtype:  # a state is tokens, in their dtype
            bound = bound + 4 * EPS[dtype] * convolve(
                np.abs(finite[0]) * 0, np.abs(finite[1]), None, np.abs(finite[3]), where, False
            )
        return compare("out", out, convolve(*arrays, where, activation is not None), bound, dtype)

    case.check = check
    if not special and draw.chance(0.5) and batch * channels * total and packing != "seq_idx":
        variables = ["x", "weight", *["bias"] * with_bias, *["initial_states"] * (with_initial and taps > 1)]

        def derived(*varied: np.ndarray) -> np.ndarray:
            given = dict(zip(variables, varied, strict=True))
            out = convolve(
                given["x"],
                given["weight"],
                given.get("bias"),
                given.get("initial_states"),
                bounds,
                activation is not None,
            )
            return np.ravel(out)

        if not final:
            case.differential = Differential(call, tuple(variables), derived, vmap=packing == "rows")
    if draw.chance(0.12):
        spoil(
            draw,
            case,
            [
                n
                for n in ("x", "weight", "bias", "initial_states", "cu_seqlens", "seq_idx")
                if any(l.startswith(n) for l in lines)
            ],
        )
    return case


def spoil(draw: Draw, case: Case, names: list[str]) -> None:
    case.expect, case.differential = "error", None
    name = draw.choice(names)
    if name in ("cu_seqlens",) and draw.chance(0.6):
        case.lines.append(
            draw.choice(
                (
                    f"{name} = {name} + 1",
                    f"{name} = {name}.flip(0) - 1",
                    f"{name} = {name}[:0]",
                    f"{name} = {name}.float()",
                )
            )
        )
    else:
        case.lines.append(draw.wrong(name, wider=name not in ("x", "weight")))
    if case.lines[-1] == "bias = None":
        case.expect, case.check = "either", lambda names: None
    if case.lines[-1].split(" = ")[1] == "None" and name in ("initial_states", "cu_seqlens", "seq_idx"):
        case.expect, case.check = "either", lambda names: None


def draw_update(draw: Draw) -> Case:
    batch, channels, taps = draw.size(5), draw.size(40), draw.choice((1, 2, 3, 4, 4, 5))
    length = taps - 1 + draw.choice((0, 0, 0, 1, 3))
    total = None if draw.chance(0.4) else draw.size(9)
    dtype = draw.dtype()
    filter_dtype = dtype if draw.chance(0.7) else "float32" if dtype != "float64" else dtype
    indexed, ring = draw.chance(0.35), draw.chance(0.3)
    rows = batch + draw.randint(0, 3) if indexed else batch
    shape = (batch, channels) if total is None else (batch, channels, total)
    layout = draw.choice(("", ".mT.contiguous().mT")) if draw.chance(0.5) else ""
    lines = [
        f"x = {draw.array(shape, dtype, wild=0.1)}",
        f"conv_state = guarded((randn({draw.seed_()}, {rows}, {channels}, {length})).to(torch.{dtype}){layout}, 'end')",
        f"weight = {draw.array((channels, taps), filter_dtype)}",
    ]
    arguments = ["x", "conv_state", "weight"]
    with_bias = draw.chance(0.5)
    if with_bias:
        lines.append(f"bias = {draw.array((channels,), filter_dtype)}")
        arguments.append("bias")
    activation = draw.choice((None, "silu", "swish"))
    arguments.append(f"activation={activation!r}")
    index = list(range(batch))
    if indexed:
        index = draw.sample(range(rows), batch)
        if draw.chance(0.3):
            index = [-1 if draw.chance(0.4) else i for i in index]
        lines.append(f"conv_state_indices = torch.tensor({index}, dtype=torch.{draw.choice(('int32', 'int64'))})")
        arguments.append("conv_state_indices=conv_state_indices")
    places = [0] * batch
    if ring:
        places = [draw.randint(0, 20) for _ in range(batch)]
        lines.append(f"cache_seqlens = torch.tensor({places}, dtype=torch.{draw.choice(('int32', 'int64'))})")
        arguments.append("cache_seqlens=cache_seqlens")
    case = Case("causal_conv1d_update", f"out = pyrepr.causal_conv1d_update({', '.join(arguments)})", "value", lines)
    case.changed = ("conv_state",)
    lines.append("before = conv_state.clone()")

    def check(names: dict[str, Any]) -> str | None:
        x, old, weight = (f64(names[n]) for n in ("x", "before", "weight"))
        bias = f64(names["bias"]) if with_bias else None
        dtype = names["x"].dtype
        eps = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
        tokens = x[..., None] if total is None else x
        wanted, out, bound = old.copy(), np.zeros(tokens.shape, dtype=x.dtype), np.zeros(tokens.shape)
        for i, row in enumerate(index):
            if row < 0:
                continue
            order = (np.arange(length) + places[i]) % length if ring and length else np.arange(length)
            before = old[row][:, order]
            arrays = [tokens[i : i + 1], weight, bias, before[None, :, length - taps + 1 :]]
            where = [(0, 0, tokens.shape[2])]
            out[i] = convolve(*arrays, where, activation is not None)[0]
            bound[i] = 1.2 * size_bound(arrays, where, eps, taps)[0]
            moved = np.concatenate([before, tokens[i]], 1)[:, tokens.shape[2] :]
            if ring and length:
                wanted[row][:, (np.arange(length) + places[i] + tokens.shape[2]) % length] = moved
            else:
                wanted[row] = moved
        shape = names["x"].shape
        return compare("out", names["out"], out.reshape(shape), bound.reshape(shape), dtype) or compare(
            "conv_state", names["conv_state"], wanted, 0.0, names["conv_state"].dtype
        )

    case.check = check
    if draw.chance(0.2):
        case.expect = "error"
        choices = [
            "x = x[None, None]",
            "weight = weight[:, :0]",
            "conv_state = conv_state[..., 1:]" if length == taps - 1 and length else "weight = weight[0]",
            "conv_state = conv_state.to(torch.int32)",
            "conv_state = conv_state[:, :-1]" if channels else "x = None",
            "conv_state = conv_state[:1].expand(2, *conv_state.shape[1:]); x = x[:1].expand(2, *x.shape[1:])"
            if rows == batch == 1 and channels * length and not indexed and not ring and total != 0
            else "weight = 1.0",
        ]
        if indexed and batch >= 2 and channels * length:
            choices += [
                f"conv_state_indices[0] = {rows}",
                "conv_state_indices[0] = -2",
                "conv_state_indices = conv_state_indices.clamp(max=0).clamp(min=0)",
            ]
        lines.append(draw.choice(choices))
        lines[-1] += "; before = conv_state.clone()" if "conv_state =" in lines[-1] else ""
    return case


def draw(draw: Draw) -> Case:
    return draw_fn(draw) if draw.chance(0.65) else draw_update(draw)
