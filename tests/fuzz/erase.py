"""Rules whose erase reads along a vector of its own: `chunk_comba`, `chunk_gdn2` and their recurrent twins. Truth: the
recurrence in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from causal_conv1d import cuts
from delta_rule import recurrence, room
from draw import EPS, Case, Differential, Draw, compare

NAMES = {"comba": ("q", "k", "v", "p", "g", "beta"), "gdn2": ("q", "k", "v", "g", "b", "w")}


def comba(q, k, v, p, g, beta, initial, options):
    return recurrence(q, k, v, g, beta, initial, options | {"undecayed": True}, p)


def gdn2(q, k, v, g, b, w, initial, options):
    if options["l2norm"]:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    erased = b * np.repeat(k, v.shape[2] // k.shape[2], 2)
    return recurrence(q, k, w * v, g, np.ones(v.shape[:3]), initial, options | {"l2norm": False}, erased)


TRUTH = {"comba": comba, "gdn2": gdn2}


def draw(draw: Draw) -> Case:
    rule = draw.choice(("comba", "gdn2"))
    packed = draw.chance(0.3)
    batch = 1 if packed else draw.size(4)
    total = draw.choice((1, 1, 2, 3)) if draw.chance(0.3) else draw.size(33 if draw.chance(0.7) else 129)
    heads = draw.choice((1, 1, 2, 3))
    value_heads = heads * draw.choice((1, 1, 2, 3))
    width, values = draw.choice((1, 2, 3, 8, 16, 17, 32, 40)), draw.choice((1, 2, 3, 8, 15, 16, 32, 48))
    if draw.chance(0.03):
        width, values, total = draw.choice((64, 128, 129)), draw.choice((64, 128)), draw.size(70)
    dtype = draw.dtype()
    smooth = draw.chance(0.4)
    special = 0.0 if smooth or draw.chance(0.85) else 0.3
    l2norm = draw.chance(0.5)
    scale = "1.0" if l2norm else f"{width**-0.5:.3f}"
    wide = "float64" if dtype == "float64" else "float32"
    shapes = {name: (batch, total, heads, width) for name in "qkp"} | {"v": (batch, total, value_heads, values)}
    small = {"beta": (batch, total, value_heads), "b": (batch, total, value_heads, width), "w": shapes["v"]}
    small["g"] = small["beta"] if rule == "comba" else small["b"]
    lines, names = [], NAMES[rule]
    for name in names:
        if name in shapes:
            own = {"scale": "1.0" if name == "v" else scale, "wild": 0.0 if smooth else 0.1, "special": special}
            lines.append(f"{name} = {draw.array(shapes[name], dtype, **own)}")
        else:
            text = f"({draw.values(small[name])})"
            size = draw.choice((0.05, 0.3, 1.0, 5.0, 40.0))
            text = f"{text}.abs() * -{size}" if name == "g" else f"{text}.sigmoid()"
            lines.append(f"{name} = {draw.tensor(text, len(small[name]), draw.choice((dtype, wide)))}")
    arguments = [f"{name}={name}" for name in names]
    options: dict[str, Any] = {"l2norm": l2norm, "scale": None, "edges": cuts(draw, total) if packed else None}
    if draw.chance(0.3):
        options["scale"] = draw.choice((1.0, 0.125, 2, -0.5))
        arguments.append(f"scale={options['scale']}")
    if packed:
        lines.append(f"cu_seqlens = torch.tensor({options['edges']}, dtype=torch.{draw.choice(('int32', 'int64'))})")
        arguments.append("cu_seqlens=cu_seqlens")
    sequences = len(options["edges"]) - 1 if packed else batch
    with_state = draw.chance(0.4)
    if with_state:
        lines.append(f"initial_state = {draw.array((sequences, value_heads, width, values), wide)}")
        arguments.append("initial_state=initial_state")
    arguments += ["output_final_state=True"] + ["use_qk_l2norm_in_kernel=True"] * l2norm
    name = f"{draw.choice(('chunk', 'fused_recurrent'))}_{rule}"
    case = Case(name, f"out = pyrepr.functional.{name}({', '.join(arguments)})", "value", lines)
    case.check = lambda names: check(names, rule, options)
    if smooth and batch * total and total <= 40 and sequences:
        variables = (*NAMES[rule], *["initial_state"] * with_state)

        def truth(*varied: np.ndarray) -> np.ndarray:
            given = (*varied, *[None] * (not with_state))
            return np.concatenate([x.ravel() for x in TRUTH[rule](*given, options)])

        case.differential = Differential(case.call.removeprefix("out = "), variables, truth, vmap=not packed)
    if draw.chance(0.12):
        case.expect, case.differential = "error", None
        case.lines.append(draw.wrong(draw.choice(names), wider=False))
    return case


def check(names: dict[str, Any], rule: str, options: dict[str, Any]) -> str | None:
    out, dtype = names["out"], names["v"].dtype
    given = [names.get(name) for name in (*NAMES[rule], "initial_state")]
    arrays = [None if x is None else x.detach().double().resolve_neg().numpy() for x in given]
    eps = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
    if dtype == torch.bfloat16:
        eps = 2.0**-16
    truth = TRUTH[rule](*arrays, options)
    if not all(x is None or np.isfinite(x).all() for x in arrays):
        # Which tokens it reaches is the business of the rules that share these kernels: here, that none vanishes.
        lost = np.isnan(truth[0]) & np.isfinite(out[0].detach().double().numpy())
        inf = any(x is not None and np.isinf(x).any() for x in arrays)
        return "a NaN vanished from o" if lost.any() and not inf else None
    bounds = room(arrays, options, eps, TRUTH[rule])
    what = compare("o", out[0], truth[0], bounds[0], dtype)
    return what or compare(
        "final_state", out[1], truth[1], bounds[1], given[-1].dtype if given[-1] is not None else out[1].dtype
    )
