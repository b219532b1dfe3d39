"""Family `delta_rule`: the six functions, and the four without an erase. Truth: the recurrence in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from causal_conv1d import cuts
from draw import EPS, Case, Differential, Draw, compare

RULES = {
    "": ("chunk_delta_rule", "fused_recurrent_delta_rule"),
    "HV": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "K": ("chunk_kda", "fused_recurrent_kda"),
}
WITHOUT_ERASE = {
    "": ("chunk_simple_gla", "fused_recurrent_simple_gla"),
    "HV": ("chunk_simple_gla", "fused_recurrent_simple_gla"),
    "K": ("chunk_gla", "fused_recurrent_gla"),
}
FACTOR = 4000  # of the change that rounding every number makes; the largest error seen, of a state that grows, is 2180

LARGE = 1e35


def recurrence(
    q: np.ndarray,  # [B, T, H, K]
    k: np.ndarray,  # [B, T, H, K]
    v: np.ndarray,  # [B, T, HV, V]
    g: np.ndarray | None,  # [B, T, HV] or [B, T, HV, K]
    beta: np.ndarray | None,  # [B, T, HV]; None: nothing is erased
    initial: np.ndarray | None,  # [N, HV, K, V]
    options: dict[str, Any],
    p: np.ndarray | None = None,  # [B, T, H or HV, K], what the erase reads along; None: k
) -> tuple[np.ndarray, np.ndarray]:
    """o [B, T, HV, V] and the states [N, HV, K, V] after the last token of every sequence."""
    p = k if p is None else p
    if options["l2norm"]:
        q, k, p = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k, p))
    q, k, p = (np.repeat(x, v.shape[2] // x.shape[2], 2) for x in (q, k, p))
    q = q * (q.shape[3] ** -0.5 if options["scale"] is None else options["scale"])
    kind = np.result_type(q, k, v, *(x for x in (g, beta, initial) if x is not None))
    o = np.zeros(v.shape, dtype=kind)
    edges = options["edges"]
    if edges is None:
        runs = [(slice(None), slice(None), 0, v.shape[1])]
        sequences = v.shape[0]
    else:
        runs = [(slice(i, i + 1), slice(0, 1), a, b) for i, (a, b) in enumerate(itertools.pairwise(edges))]
        sequences = len(runs)
    states = np.zeros((sequences, v.shape[2], k.shape[3], v.shape[3]), dtype=kind)
    if initial is not None:
        states += initial
    for number, rows, start, end in runs:
        s = states[number]
        for t in range(start, end):
            before = s
            if g is not None:
                decay = np.exp(g[rows, t])
                s = s * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
            key = k[rows, t]
            error = v[rows, t]
            if beta is not None:
                read = before if options.get("undecayed") else s
                error = beta[rows, t, :, None] * (error - (read * p[rows, t, ..., None]).sum(2))
            s = s + key[..., None] * error[:, :, None]
            o[rows, t] = (s * q[rows, t, ..., None]).sum(2)
        states[number] = s
    return o, states


def room(
    arrays: list[np.ndarray | None], options: dict[str, Any], eps: float, rule: Callable = recurrence
) -> tuple[np.ndarray, np.ndarray]:
    """The change that rounding makes, over a head's tokens so far and all its values."""
    rng = np.random.default_rng(0)
    truth = rule(*arrays, options)
    change = [np.zeros(x.shape) for x in truth]
    for _ in range(2):
        moved = rule(
            *(None if a is None else a * (1 + eps * rng.choice([-1.0, 1.0], a.shape)) for a in arrays), options
        )
        change = [np.maximum(c, np.abs(a - b)) for c, a, b in zip(change, truth, moved, strict=True)]
    o, state = (c + eps * np.abs(x) for c, x in zip(change, truth, strict=True))
    o = np.broadcast_to(o.max(-1, keepdims=True, initial=0), o.shape)
    if options["edges"] is None:
        o = np.maximum.accumulate(o, 1) if o.size else o
    else:
        parts = [
            np.maximum.accumulate(o[:, a:b], 1)
            for a, b in zip(options["edges"], options["edges"][1:], strict=False)
            if b > a
        ]
        o = np.concatenate(parts, 1) if parts else o
    state = np.broadcast_to(state.max((-1, -2), keepdims=True, initial=0), state.shape)
    # Where a head comes close to float32's end, sums in another order may pass it.
    o, state = (np.where(x > eps * LARGE, np.inf, FACTOR * x) for x in (o, state))
    return o, state


def before_nan(arrays: list[np.ndarray | None], options: dict[str, Any]) -> np.ndarray:
    """[B, T, HV, V]: whether everything up to this token in its sequence and head is finite."""
    q, k, v, g, beta, initial = arrays
    groups = v.shape[2] // k.shape[2]
    good = np.isfinite(v).all(-1)
    if beta is not None:
        good &= np.isfinite(beta)
    for x in (q, k):
        good &= np.repeat(np.isfinite(x).all(-1), groups, 2)
    if g is not None:
        good &= np.isfinite(g) if g.ndim == 3 else np.isfinite(g).all(-1)
    edges = options["edges"] or [0, v.shape[1]]
    found = np.zeros(good.shape, dtype=bool)
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        found[:, a:b] = np.logical_and.accumulate(good[:, a:b], 1) if b > a else found[:, a:b]
        if initial is not None:
            own = initial if options["edges"] is None else initial[number : number + 1]
            found[:, a:b] &= np.isfinite(own).all((-1, -2))[:, None]
    return np.broadcast_to(found[..., None], v.shape)


def draw(draw: Draw) -> Case:
    gate = draw.choice(("", "HV", "K"))
    packed = draw.chance(0.3)
    batch = 1 if packed else draw.size(4)
    total = draw.choice((1, 1, 1, 2, 3)) if draw.chance(0.3) else draw.size(33 if draw.chance(0.7) else 129)
    heads = draw.choice((1, 1, 2, 3))
    value_heads = heads * draw.choice((1, 1, 2, 3))
    width, values = draw.choice((1, 2, 3, 4, 8, 16, 17, 24, 32, 40)), draw.choice((1, 2, 3, 4, 8, 15, 16, 24, 32, 48))
    if draw.chance(0.03):
        width, values, total = draw.choice((64, 128, 129, 256)), draw.choice((64, 128)), draw.size(70)
    dtype = draw.dtype()
    if dtype == "bfloat16" and draw.chance(0.3):  # whole tiles
        width, values, total = draw.choice((32, 64)), draw.choice((32, 64)), draw.size(129)
    wild = 0.1
    special = 0.0 if draw.chance(0.85) else 0.3
    smooth = draw.chance(0.4)
    if smooth:
        wild = special = 0.0
    erases = draw.chance(0.75)
    l2norm = erases and draw.chance(0.5)
    scale = "1.0" if l2norm else f"{width**-0.5:.3f}" if draw.chance(0.9) else "1.0"
    state_dtype = "float64" if dtype == "float64" else "float32"
    beta_dtype, g_dtype = (draw.choice((dtype, "float32" if dtype != "float64" else dtype)) for _ in range(2))
    beta = f"({draw.values((batch, total, value_heads))}).sigmoid() * {draw.choice((1.0, 2.0))}"
    if draw.chance(0.05):
        beta = draw.values((batch, total, value_heads), wild=0.3)
    lines = [
        f"q = {draw.array((batch, total, heads, width), dtype, scale=scale, wild=wild, special=special)}",
        f"k = {draw.array((batch, total, heads, width), dtype, scale=scale, wild=wild, special=special)}",
        f"v = {draw.array((batch, total, value_heads, values), dtype, wild=wild, special=special)}",
    ]
    if erases:
        lines.append(f"beta = {draw.tensor(beta, 3, beta_dtype)}")
    recurrent = draw.chance(0.4)
    arguments = ["q", "k", "v"]
    if gate:
        shape = (batch, total, value_heads, *(width,) * (gate == "K"))
        size = draw.choice((0.05, 0.3, 1.0, 5.0)) if draw.chance(0.9) else 40.0
        text = f"({draw.values(shape)}).abs() * -{size}" if draw.chance(0.95) else f"({draw.values(shape)}) * 0.1"
        if draw.chance(special):
            text = draw.special(text)
        lines.append(f"g = {draw.tensor(text, len(shape), g_dtype)}")
        arguments.append("gk=g" if gate == "K" and recurrent and not erases else "g=g")
    if erases:
        arguments.append("beta=beta")
    options: dict[str, Any] = {"l2norm": l2norm, "scale": None, "edges": cuts(draw, total) if packed else None}
    if erases and not smooth and draw.chance(0.3):
        add_activations(draw, lines, arguments, options, (value_heads, *(width,) * (gate == "K")) if gate else None)
    if draw.chance(0.3):
        options["scale"] = draw.choice((1.0, 0.125, 2, -0.5))
        arguments.append(f"scale={options['scale']}")
    sequences = len(options["edges"]) - 1 if packed else batch
    if packed:
        lines.append(f"cu_seqlens = torch.tensor({options['edges']}, dtype=torch.{draw.choice(('int32', 'int64'))})")
        arguments.append("cu_seqlens=cu_seqlens")
    with_state = draw.chance(0.4)
    state_shape = (sequences, value_heads, width, values)
    if with_state:
        lines.append(f"initial_state = {draw.array(state_shape, state_dtype, special=special * 0.3)}")
        arguments.append("initial_state=initial_state")
    final = draw.chance(0.5)
    if final:
        arguments.append("output_final_state=True")
    if l2norm:
        arguments.append("use_qk_l2norm_in_kernel=True")
    in_place = recurrent and not smooth and draw.chance(0.4)
    name = (RULES if erases else WITHOUT_ERASE)[gate][recurrent]
    case = Case(name, "", "value", lines)
    if in_place:
        add_state(draw, case, arguments, state_shape, state_dtype, with_state)
    call = f"pyrepr.functional.{name}({', '.join(arguments)})"
    case.call = f"out = {call}"
    case.check = lambda names: check(names, options, final or in_place, in_place)
    if smooth and batch * total and total <= 40 and (sequences or not packed):
        add_differential(case, call, (gate, erases), with_state, final, packed, options)
    if draw.chance(0.12):
        spoil(draw, case, (gate, erases), with_state, packed, in_place)
    return case


def add_activations(
    draw: Draw, lines: list[str], arguments: list[str], options: dict[str, Any], token: tuple[int, ...] | None
) -> None:
    """Gates (of this shape a token) and step sizes that are given before their activation."""
    if token is not None:
        lines.append(f"A_log = {draw.values(token[:1])}.float()")
        lines.append(f"dt_bias = {draw.values((int(np.prod(token)),))}.float()")
        arguments += ["use_gate_in_kernel=True", "A_log=A_log", "dt_bias=dt_bias"]
    arguments.append("use_beta_sigmoid_in_kernel=True")
    options["twice"] = draw.chance(0.5)
    if options["twice"]:
        arguments.append("allow_neg_eigval=True")


def activated(arrays: list[np.ndarray | None], names: dict[str, Any], options: dict[str, Any]) -> None:
    """Gates and step sizes in the place of what they are made from."""
    g = arrays[3]
    with np.errstate(over="ignore"):
        if g is not None:
            rate = np.exp(names["A_log"].double().numpy())
            x = g + names["dt_bias"].double().numpy().reshape(g.shape[2:])
            arrays[3] = -rate.reshape(-1, *(1,) * (g.ndim - 3)) * np.logaddexp(0, x)
        arrays[4] = (2 if options["twice"] else 1) / (1 + np.exp(-arrays[4]))


def add_state(draw: Draw, case: Case, arguments: list[str], shape: tuple, dtype: str, with_state: bool) -> None:
    """out_state, which may be the initial state itself."""
    if with_state and draw.chance(0.5):
        case.lines[-1] = (
            f"initial_state = guarded((randn({draw.seed_()}, {', '.join(map(str, shape))})).to(torch.{dtype}), 'end')"
        )
        case.lines.append("given = initial_state.clone()")
        arguments.append("out_state=initial_state")
        case.changed = ("initial_state",)
    else:
        case.lines.append(f"out_state = guarded(torch.full({shape}, torch.nan, dtype=torch.{dtype}), 'end')")
        arguments.append("out_state=out_state")
        case.changed = ("out_state",)


def check(names: dict[str, Any], options: dict[str, Any], final: bool, in_place: bool) -> str | None:
    out = names["out"]
    if not isinstance(out, tuple) or len(out) != 2:
        return "the result is no pair"
    if (out[1] is not None) != final:
        return f"the final state is {type(out[1]).__name__}"
    if in_place and out[1] is not names.get("out_state", names.get("initial_state")):
        return "the state that was returned is not out_state"
    given = [names.get(n) for n in ("q", "k", "v", "g", "beta")]
    given.append(names.get("given", names.get("initial_state")))
    arrays = [None if x is None else x.detach().double().resolve_neg().numpy() for x in given]
    if "twice" in options:
        activated(arrays, names, options)
    dtype = names["v"].dtype
    eps = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
    if dtype == torch.bfloat16:
        eps = 2.0**-16  # products of 16-bit numbers, sums in float32
    if "twice" in options:
        eps *= 4  # what makes the gates is rounded too
    truth = recurrence(*arrays, options)
    finite = before_nan(arrays, options)
    clean = [None if a is None else np.where(np.isfinite(a), a, 0) for a in arrays]
    bounds = room(clean, options, eps)
    if finite.all():
        what = compare("o", out[0], truth[0], bounds[0], dtype)
        if not what and final:
            what = compare(
                "final_state", out[1], truth[1], bounds[1], torch.float64 if dtype == torch.float64 else torch.float32
            )
        return what
    got = out[0].detach().double().numpy()
    lost = np.isnan(truth[0]) & np.isfinite(got) & finite_inputs(arrays)
    if lost.any():
        return "a NaN vanished from o"
    calm = recurrence(*clean, options)[0]
    bound = np.where(finite, bounds[0], np.inf)
    return compare("o before a number that is not finite", out[0], np.where(finite, calm, 0), bound, dtype)


def finite_inputs(arrays: list[np.ndarray | None]) -> bool:
    """Whether NaN came in as such: infinities may cancel or not, by the order of operations."""
    return not any(a is not None and np.isinf(a).any() for a in arrays)


def add_differential(
    case: Case, call: str, kind: tuple[str, bool], with_state: bool, final: bool, packed: bool, options: dict
) -> None:
    gate, erases = kind
    variables = ["q", "k", "v", *["g"] * bool(gate), *["beta"] * erases, *["initial_state"] * with_state]

    def truth(*varied: np.ndarray) -> np.ndarray:
        given = dict(zip(variables, varied, strict=True))
        o, state = recurrence(*(given.get(n) for n in ("q", "k", "v", "g", "beta", "initial_state")), options)
        return np.concatenate([o.ravel(), state.ravel()]) if final else o.ravel()

    run = call if final else f"{call}[0]"
    case.differential = Differential(run, tuple(variables), truth, vmap=not packed)


def spoil(draw: Draw, case: Case, kind: tuple[str, bool], with_state: bool, packed: bool, in_place: bool) -> None:
    case.expect, case.differential = "error", None
    gate, erases = kind
    names = [
        "q",
        "k",
        "v",
        *["beta"] * erases,
        *["g"] * bool(gate),
        *["initial_state"] * with_state,
        *["cu_seqlens"] * packed,
    ]
    name = draw.choice(names)
    line = draw.wrong(name, wider=name not in ("v",) or with_state or in_place)
    if name == "cu_seqlens" and draw.chance(0.6):
        line = draw.choice(
            (f"{name} = {name} + 1", f"{name} = {name}[:0]", f"{name} = {name}.float()", f"{name} = {name}.flip(0) - 3")
        )
    if draw.chance(0.1):
        line = draw.choice(
            (
                "q = q.double() if q.dtype != torch.float64 else q.float()",
                "k = k[..., :0]",
                "v = v[..., :0]",
                "beta = beta[:, :, :0]" if erases else "v = v[:, :0]",
                "q = q[:, :, :0]; k = k[:, :, :0]",
            )
        )
        name = "q"
    case.lines.append(line)
    may_be_none = ["initial_state", "cu_seqlens"]
    if not erases:
        may_be_none += ["g"] * (case.kind != "chunk_gla")
    elif "recurrent" in case.kind:
        may_be_none += ["beta"] + ["g"] * ("gated" in case.kind)
    if line == f"{name} = None" and name in may_be_none:
        case.expect, case.check = "either", lambda names: None
