"""The modules of `pyrepr.nn`. Truth: the formula of each layer in NumPy, with its own weights.

Where a layer keeps states between calls, the same tokens cut into pieces have to give what they give at once.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from causal_conv1d import convolve, cuts, silu
from delta_rule import recurrence
from draw import EPS, Case, Draw, compare, f64
from lookup import HASHES, codes_of, sums, weights_of
from measures import KERNELS, cka_of, near

ROOM = 3e-3  # of the largest output: float32 layers on float64 truth; 16-bit ones have their own
NARROW = {torch.float32: 1.0, torch.float64: 1e-8, torch.bfloat16: 60.0, torch.float16: 10.0}


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().resolve_neg().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def delta_layer(layer: Any, x: np.ndarray, options: dict[str, Any], edges: list[int] | None = None) -> np.ndarray:
    """Projections, convolutions, rule, gated norm, output; x: [B, T, hidden]."""
    p = {name: array(value) for name, value in layer.state_dict().items()}
    linear = lambda name, y: y @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)  # noqa: E731
    bounds = [(0, a, b) for a, b in itertools.pairwise(edges)] if edges else [(i, 0, x.shape[1]) for i in range(len(x))]
    parts = []
    kind, activation = options["kind"], options.get("qk_activation", "silu")
    for i, name in enumerate("qkv"):
        y = linear(f"{name}_proj", x)
        active = i == 2 or activation == "silu"
        if layer.use_short_conv:
            filtered = convolve(
                np.swapaxes(y, 1, 2),
                p[f"{name}_conv1d.weight"][:, 0],
                p.get(f"{name}_conv1d.bias"),
                None,
                bounds,
                active,
            )
            y = np.swapaxes(filtered, 1, 2)
        elif active:
            y = silu(y)
        parts.append(y)
    heads, values = layer.num_heads, layer.num_v_heads
    q, k = (y.reshape(*x.shape[:2], heads, y.shape[2] // heads) for y in parts[:2])
    v = parts[2].reshape(*x.shape[:2], values, parts[2].shape[2] // values)
    if activation == "relu":
        q, k = np.maximum(q, 0), np.maximum(k, 0)
    elif activation == "elu":
        q, k = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (q, k))
    l2norm = options.get("qk_norm", "l2") == "l2"
    if not l2norm:
        q, k = (y / np.maximum(np.abs(y).sum(-1, keepdims=True), 1e-6) for y in (q, k))
    beta = sigmoid(linear("b_proj", x)) if "b_proj.weight" in p else np.ones((*x.shape[:2], values))
    beta = beta * (2 if layer.allow_neg_eigval else 1)
    g = None
    if kind == "GatedDeltaNet":
        g = -np.exp(p["A_log"]) * softplus(linear("a_proj", x) + p["dt_bias"])
    elif kind == "KimiDeltaAttention":
        raw = (linear("f_proj.1", linear("f_proj.0", x)) + p["dt_bias"]).reshape(*x.shape[:2], values, k.shape[3])
        rate = np.exp(p["A_log"])[:, None]
        g = -rate * softplus(raw) if layer.lower_bound is None else layer.lower_bound * sigmoid(rate * raw)
    o, _ = recurrence(q, k, v, g, beta, None, {"l2norm": l2norm, "scale": None, "edges": edges})
    o = rms_norm(o, p["o_norm.weight"], layer.o_norm.eps)
    if kind == "KimiDeltaAttention":
        o = o * sigmoid(linear("g_proj.1", linear("g_proj.0", x)).reshape(o.shape))
    elif "g_proj.weight" in p:
        gate = linear("g_proj", x).reshape(o.shape)
        o = o * (sigmoid(gate) if layer.o_norm.activation == "sigmoid" else silu(gate))
    return linear("o_proj", o.reshape(*x.shape[:2], values * v.shape[3]))


def draw_delta(draw: Draw) -> Case:
    kind = draw.choice(("DeltaNet", "GatedDeltaNet", "KimiDeltaAttention"))
    heads, width = draw.choice((1, 2, 3)), draw.choice((1, 4, 8, 16))
    hidden = heads * width
    options: dict[str, Any] = {"hidden_size": hidden, "num_heads": heads}
    if kind == "DeltaNet":
        options |= {"use_gate": draw.chance(0.5), "use_beta": draw.chance(0.8)}
        options |= {
            "qk_activation": draw.choice(("silu", "relu", "elu", "identity")),
            "qk_norm": draw.choice(("l2", "l2", "sum")),
        }
        options["expand_v"] = draw.choice((1.0, 2.0))
    else:
        options["hidden_size"] = draw.choice((hidden, 12))
        options |= {"head_dim": width, "num_v_heads": draw.choice((None, 2 * heads))}
        options["expand_v"] = draw.choice((1, 2))
    if kind == "GatedDeltaNet":
        options |= {"use_gate": draw.chance(0.8), "output_gate_activation": draw.choice(("swish", "silu", "sigmoid"))}
    if kind == "KimiDeltaAttention" and draw.chance(0.5):
        options |= {"lower_bound": -5.0, "safe_gate": draw.chance(0.5)}
    options |= {"use_short_conv": draw.chance(0.7), "conv_size": draw.choice((1, 2, 4)), "conv_bias": draw.chance(0.3)}
    options |= {"allow_neg_eigval": draw.chance(0.3), "layer_idx": 0}
    batch, total = draw.size(3, 0.01), draw.size(40, 0.02)
    # Of heads so narrow the output may lie among float16's coarsest numbers, before its norm makes it 1 again, and keys
    # and queries are signs, which 16 bits may round to the other one.
    dtype = draw.dtype((6, 2, 0, 0) if width == 1 else (6, 2, 1, 1))
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    lines = [
        f"torch.manual_seed({draw.seed_()})",
        f"layer = pyrepr.nn.{kind}({text}).to(torch.{dtype})",
        f"x = {draw.array((batch, total, options['hidden_size']), dtype)}",
    ]
    options["kind"] = kind
    way = draw.choice(("whole", "whole", "pieces", "mask", "packed", "bad"))
    case = Case(f"nn.{kind}", "", "value", lines, repeatable=False)  # PyTorch's products need not be
    return {"whole": whole, "pieces": pieces, "mask": masked, "packed": packed, "bad": bad_delta}[way](
        draw, case, options, batch, total
    )


def judge(out: torch.Tensor, of: Any, x: torch.Tensor) -> str | None:
    """`out` against of(x). 16-bit layers round between their stages too, which costs as much as rounding x: where a
    query and a key all but cancel, the norm that follows makes that as large as the output."""
    values = array(x)
    truth = of(values)
    room = ROOM * NARROW[x.dtype] * np.abs(truth).max(initial=0) + 1e-9
    if x.dtype in (torch.bfloat16, torch.float16):
        rng = np.random.default_rng(0)
        for _ in range(3):
            rounded = values * (1 + EPS[x.dtype] * rng.choice([-1.0, 1.0], values.shape))
            room = np.maximum(room, 8 * np.abs(of(rounded) - truth).max(-1, keepdims=True, initial=0))
    return compare("out", out, truth, room, x.dtype)


def whole(draw: Draw, case: Case, options: dict[str, Any], batch: int, total: int) -> Case:
    case.call = f"out = layer(x{', use_cache=True' * draw.chance(0.3)})[0]"
    case.check = lambda names: judge(names["out"], lambda x: delta_layer(names["layer"], x, options), names["x"])
    return case


def pieces(draw: Draw, case: Case, options: dict[str, Any], batch: int, total: int) -> Case:
    """Piece by piece through a cache, as decoding does; some tokens are tried and taken back."""
    edges = sorted({0, total, *(draw.randint(0, total) for _ in range(3))})
    back = draw.choice((0, 0, 1, 3))
    lines = [f"cache = pyrepr.nn.DeltaCache(rollback={back})"]
    names = []
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        lines.append(f"out{i} = layer(x[:, {a}:{b}], past_key_values=cache, use_cache=True)[0]")
        names.append(f"out{i}")
        if back and draw.chance(0.5):
            tried = draw.randint(1, back)
            lines.append(f"layer(x[:, :1].expand(-1, {tried}, -1), past_key_values=cache, use_cache=True)")
            lines.append(draw.choice((f"cache.crop(-{tried})", "cache.accept(0)", f"cache.crop({b})")))
    if not names:
        return whole(draw, case, options, batch, total)
    lines.append(f"out = torch.cat([{', '.join(names)}], 1)")
    case.call, case.calls = "\n".join(lines), len(names)
    case.check = lambda names: judge(names["out"], lambda x: delta_layer(names["layer"], x, options), names["x"])
    return case


def masked(draw: Draw, case: Case, options: dict[str, Any], batch: int, total: int) -> Case:
    lengths = [draw.randint(0, total) for _ in range(batch)]
    side = draw.choice(("left", "right"))
    marks = [[int((i < n) if side == "right" else (i >= total - n)) for i in range(total)] for n in lengths]
    case.lines.append(
        f"mask = torch.tensor({marks}, dtype=torch.{draw.choice(('int64', 'bool', 'float32'))}).view({batch}, {total})"
    )
    case.call = "out = layer(x, attention_mask=mask)[0]"

    def check(names: dict[str, Any]) -> str | None:
        def of(x: np.ndarray) -> np.ndarray:
            truth = np.zeros(x.shape)
            for i, n in enumerate(lengths):
                rows = slice(0, n) if side == "right" else slice(total - n, total)
                truth[i, rows] = delta_layer(names["layer"], x[i : i + 1, rows], options)[0]
            return truth

        return judge(names["out"], of, names["x"])

    case.check = check
    return case


def packed(draw: Draw, case: Case, options: dict[str, Any], batch: int, total: int) -> Case:
    if batch != 1:
        return whole(draw, case, options, batch, total)
    edges = cuts(draw, total)
    case.lines.append(f"cu_seqlens = torch.tensor({edges})")
    case.call = "out = layer(x, cu_seqlens=cu_seqlens)[0]"
    case.check = lambda names: judge(names["out"], lambda x: delta_layer(names["layer"], x, options, edges), names["x"])
    return case


def bad_delta(draw: Draw, case: Case, options: dict[str, Any], batch: int, total: int) -> Case:
    case.expect = "error"
    case.call = "out = layer(x)[0]"
    choice = draw.choice(("wrong", "mask", "cache", "option"))
    case.names = ("hidden_states", "attention_mask", "past_key_values", "x", "q", "v", *options)
    if choice == "wrong":
        case.lines.append(draw.wrong("x", moved=False))
    elif choice == "mask":
        shape = draw.choice(("3", f"{batch}", f"{batch}, {max(0, total - 1)}", f"{batch + 1}, {total}"))
        case.lines.append(f"mask = torch.ones({shape})")
        case.call = "out = layer(x, attention_mask=mask)[0]"
        if total == 0:
            case.expect = "either"
    elif choice == "cache":
        case.call = f"out = layer(x, past_key_values={draw.choice(('3', '[]', '{}', 'object()'))})[0]"
    else:
        name, values = draw.choice(
            (
                ("hidden_size", (0, -1, 7.5, "4")),
                ("num_heads", (0, -2, 5, 1.5)),
                ("expand_v", (0, -1, 0.001)),
                ("conv_size", (0, -1)),
                ("layer_idx", ("a",)),
            )
        )
        kind = case.kind.removeprefix("nn.")
        text = ", ".join(
            f"{k}={v!r}"
            for k, v in {**{k: v for k, v in options.items() if k != "kind"}, name: draw.choice(values)}.items()
        )
        case.lines = []
        case.call = f"out = pyrepr.nn.{kind}({text})(torch.zeros(1, 3, {options['hidden_size']}))[0]"
        case.expect = "either"
        case.names += ("kernel_size", "heads", "width", "head", "integer", "multiple", "positive")
    return case


def draw_convolution(draw: Draw) -> Case:
    channels, taps = draw.size(33), draw.choice((1, 2, 4, 5))
    batch, total = draw.size(3), draw.size(20)
    dtype = draw.dtype((6, 2, 1, 1))
    activation = draw.choice((None, "silu", "swish"))
    lines = [
        f"torch.manual_seed({draw.seed_()})",
        f"layer = pyrepr.nn.ShortConvolution({channels}, {taps}, bias={draw.chance(0.5)}, activation={activation!r})"
        f".to(torch.{dtype})",
        f"x = {draw.array((batch, total, channels), dtype)}",
    ]
    case = Case("nn.ShortConvolution", "out = layer(x)[0]", "value" if channels else "either", lines)
    if channels == 0:  # torch.nn.Conv1d's own business
        lines[1:] = [
            f"x = {draw.array((batch, total, 4), dtype)}",
            f"layer = pyrepr.nn.ShortConvolution(4, {taps}, activation={activation!r}).to(torch.{dtype})",
        ]
        case.expect = "value"
    cut = draw.randint(0, total)
    if draw.chance(0.5):
        case.call = (
            f"first, state = layer(x[:, :{cut}], output_final_state=True)\n"
            f"second, state = layer(x[:, {cut}:], cache=state, output_final_state=True)\n"
            "out = torch.cat([first, second], 1)"
        )
        case.calls = 2

    def check(names: dict[str, Any]) -> str | None:
        layer = names["layer"]
        bias = None if layer.bias is None else array(layer.bias)
        bounds = [(i, 0, total) for i in range(batch)]

        def of(x: np.ndarray) -> np.ndarray:
            filters = array(layer.weight)[:, 0]
            truth = convolve(np.swapaxes(x, 1, 2), filters, bias, None, bounds, activation is not None)
            return np.swapaxes(truth, 1, 2)

        return judge(names["out"], of, names["x"])

    case.check = check
    return case


def draw_lookup(draw: Draw) -> Case:
    bits, chunks, features = draw.choice((1, 2, 4, 5)), draw.randint(1, 6), draw.choice((1, 3, 8, 64, 65))
    weighting = draw.choice(("probability", "scaled", "l1", "none"))
    hash = draw.choice(tuple(HASHES)) if bits % 2 == 0 else "one_bit"
    width = chunks * bits // HASHES[hash]
    dtype, table = draw.dtype((6, 2, 1, 1)), draw.choice(("float32", "bfloat16", "float16"))
    table = "float64" if dtype == "float64" else table
    shape = draw.choice(((7,), (2, 3), (), (0,), (33,)))
    lines = [
        f"torch.manual_seed({draw.seed_()})",
        f"layer = pyrepr.nn.LookupLinear({width}, {features}, bits={bits}, hash={hash!r}, weighting={weighting!r}, "
        f"temperature={draw.choice((1.0, 0.5))}, table_dtype=torch.{table}, bias={draw.chance(0.6)})",
        f"x = {draw.array((*shape, width), dtype, wild=0.1)}",
    ]
    case = Case("nn.LookupLinear", "out = layer(x)", "value", lines)
    extra = (
        draw.choice(("", "", "layer.quantize_('int8')", "layer.quantize_('bf16')", "copy"))
        if table == "float32"
        else draw.choice(("", "copy"))
    )
    if extra == "copy":
        lines.append("import copy; layer = copy.deepcopy(layer); layer.load_state_dict(layer.state_dict())")
    elif extra:
        lines.append(extra)
    if features == 64 and draw.chance(0.5):
        lines.append("layer.pack_()")

    def check(names: dict[str, Any]) -> str | None:
        layer, x = names["layer"], f64(names["x"])
        state = layer.state_dict()
        tables = f64(state["tables"])
        if "scales" in state:
            tables = tables * f64(state["scales"])[..., None]
        codes, weights = codes_of(x, bits, hash), weights_of(x, bits, weighting, layer.temperature, hash)
        truth = sums(codes, weights, tables) + (0 if layer.bias is None else f64(layer.bias))
        size = sums(codes, np.abs(weights), np.abs(tables)).max(-1, keepdims=True, initial=0)
        return compare(
            "out",
            names["out"],
            truth,
            (1e-3 if "scales" in state else 1e-4 if dtype != "float64" else 1e-12) * size + 1e-30,
            names["x"].dtype,
        )

    case.check = check
    if draw.chance(0.15):
        case.expect, case.names = (
            "error",
            (
                "x",
                "tables",
                "in_features",
                "bits",
                "hash",
                "weighting",
                "temperature",
                "kind",
                "out_features",
                "table_dtype",
            ),
        )
        if draw.chance(0.5):
            lines.append(draw.wrong("x", wider=True, deeper=False))
        else:
            case.lines = []
            case.call = "out = " + draw.choice(
                (
                    "pyrepr.nn.LookupLinear(8, 4, bits=3)",
                    "pyrepr.nn.LookupLinear(0, 4)",
                    "pyrepr.nn.LookupLinear(8, 4, bits=17)",
                    "pyrepr.nn.LookupLinear(8, 4, bits=2.0)",
                    "pyrepr.nn.LookupLinear(8, 4, weighting='x')",
                    "pyrepr.nn.LookupLinear(8, 4, hash='x')",
                    "pyrepr.nn.LookupLinear(6, 4, bits=3, hash='two_bit')",
                    "pyrepr.nn.LookupLinear(8, 4, temperature=0)",
                    "pyrepr.nn.LookupLinear(8, -1)",
                    "pyrepr.nn.LookupLinear(-8, 4)",
                    "pyrepr.nn.LookupLinear(8, 4, table_dtype=torch.int32)",
                    "pyrepr.nn.LookupLinear(8, 5).pack_()",
                    "pyrepr.nn.LookupLinear(8, 4).quantize_('int4')",
                    "pyrepr.nn.LookupLinear(8, 4).quantize_('int8').quantize_('int8')",
                    "pyrepr.nn.LookupLinear(8.0, 4)",
                    "pyrepr.nn.LookupLinear(8, 'a')",
                )
            )
    return case


def draw_fit(draw: Draw) -> Case:
    """from_linear and from_mlp: the layer is finite, and no worse than predicting the mean."""
    bits, chunks, features = draw.choice((1, 2, 4)), draw.randint(1, 4), draw.choice((1, 3, 8))
    width, rows, dtype = chunks * bits, draw.choice((16, 40, 100)), draw.choice(("float32", "float64"))
    rank = draw.choice((0, 0, 1))
    hash = draw.choice(tuple(HASHES)) if bits % 2 == 0 else "one_bit"
    lines = [
        f"torch.manual_seed({draw.seed_()})",
        f"linear = torch.nn.Linear({width}, {features}, bias={draw.chance(0.7)}).to(torch.{dtype})",
        f"x = {draw.array((rows, width), dtype, wild=0.2)}",
    ]
    function = draw.choice(("from_linear", "from_mlp"))
    case = Case(
        f"nn.LookupLinear.{function}",
        f"out = pyrepr.nn.LookupLinear.{function}(linear, x, bits={bits}, hash={hash!r}, rank={rank})(x)",
        "value",
        lines,
        repeatable=False,  # PyTorch's products and solvers may have other bits on another number of threads
    )
    case.lines.append("before = linear.weight.clone()")

    def check(names: dict[str, Any]) -> str | None:
        out = names["out"]
        if out.shape != (rows, features) or out.dtype != names["x"].dtype:
            return f"out is {list(out.shape)} {out.dtype}"
        if not torch.equal(names["before"], names["linear"].weight):
            return "the linear layer was changed"
        if not out.isfinite().all():
            return "out is not finite"
        x, y = array(names["x"]), array(names["linear"](names["x"]))
        few = rows < 2 * width * HASHES[hash]  # what was held out is then anybody's guess
        if few or np.ptp(x, 0).max() < 1e-6 * np.abs(x).max() + 1e-30:
            return None
        error, varies = ((array(out) - y) ** 2).sum(), ((y - y.mean(0)) ** 2).sum()
        return (
            f"the fit's error is {error / varies:.3g} of the variance"
            if error > 1.2 * varies + 1e-9 * (y**2).sum()
            else None
        )

    case.check = check
    if draw.chance(0.2) and width > 1:  # x[..., None] has one feature
        case.expect, case.names = "error", ("calibration", "rank", "linear", "bits", "mlp", "mat1")
        lines.append(
            draw.choice(
                ("x = x[:0]", "x = x[..., :0]", "x = x.long()", "x = x * float('nan')", "x = x[..., None]", "x = None")
            )
        )
    return case


def best_slots(
    p: dict[str, np.ndarray], x: np.ndarray, heads: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All n² scores of every token and head in order: the k best slots, their scores, and how far the next one is."""
    query = (x @ p["query.weight"].T + p["query.bias"]).reshape(len(x), heads, 2 * p["keys"].shape[-1])
    centred = query - query.mean(-1, keepdims=True)
    query = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["norm.weight"] + p["norm.bias"]
    first, second = np.split(query, 2, -1)
    scores = np.einsum("thc,hic->thi", first, p["keys"][:, 0])[..., None]
    scores = scores + np.einsum("thc,hjc->thj", second, p["keys"][:, 1])[:, :, None]
    scores = scores.reshape(len(x), heads, p["keys"].shape[2] ** 2)
    order = np.argsort(-scores, -1, kind="stable")
    sorted_scores = np.take_along_axis(scores, order, -1)
    gap = (
        sorted_scores[..., k - 1] - sorted_scores[..., k] if scores.shape[-1] > k else np.full(scores.shape[:2], np.inf)
    )
    return order[..., :k], sorted_scores[..., :k], gap


def draw_memory(draw: Draw) -> Case:
    """Truth: a softmax over the k best of all n² slots, found by sorting. Not looked at: tokens of which two scores all
    but meet."""
    width, features, keys, heads = draw.randint(1, 12), draw.choice((1, 3, 8)), draw.randint(1, 7), draw.randint(1, 3)
    k, gate = draw.randint(1, keys), draw.chance(0.3)
    dtype = draw.choice(("float32", "float64"))
    shape = draw.choice(((7,), (2, 3), (), (0,), (33,)))
    lines = [
        f"torch.manual_seed({draw.seed_()})",
        f"layer = pyrepr.nn.ProductKeyMemory({width}, {features}, keys={keys}, k={k}, heads={heads}, gate={gate}, "
        f"dtype=torch.{dtype})",
        f"x = {draw.array((*shape, width), dtype)}",
    ]
    case = Case("nn.ProductKeyMemory", "out = layer(x)", "value", lines, repeatable=False)  # PyTorch's products

    def check(names: dict[str, Any]) -> str | None:
        x, out = array(names["x"]).reshape(-1, width), array(names["out"]).reshape(-1, features)
        p = {name: array(value) for name, value in names["layer"].state_dict().items()}
        slots, scores, gap = best_slots(p, x, heads, k)
        weights = np.exp(scores - scores[..., :1])
        weights /= weights.sum(-1, keepdims=True)
        truth = (weights[..., None] * p["values.weight"][slots]).sum((1, 2))
        if gate:
            truth = (truth * silu(x @ p["gate_in.weight"].T + p["gate_in.bias"])) @ p["gate_out.weight"].T
            truth = truth + p["gate_out.bias"]
        room = 1e-3 if dtype == "float32" else 1e-9
        clear = (gap > room).all(1)  # a rounding chooses among the others
        size = 1 + np.abs(truth).max(initial=0)
        return compare("out", torch.from_numpy(out[clear]), truth[clear], room * size, torch.float64)

    case.check = check
    if draw.chance(0.15):
        case.expect, case.names = "error", ("x", "k", "key_dim", "keys", "heads", "in_features", "gate")
        if draw.chance(0.5):
            lines.append(draw.wrong("x", wider=True, deeper=False))
        else:
            wrong = ("8, k=200", "0", "8, key_dim=3", "8, heads=0", "8, keys=-1, k=1", "8, gate=1", "8.0", "8, k=2.0")
            case.lines, case.call = [], f"out = pyrepr.nn.ProductKeyMemory({draw.choice(wrong)})"
    return case


def draw_network(draw: Draw) -> Case:
    """from_mlp of a network of two linear layers, as every kind: no worse than predicting the mean, and what a file
    keeps of it gives the same bits."""
    width, hidden, features = 4 * draw.randint(1, 3), draw.choice((3, 8, 20)), draw.choice((1, 4, 8))
    kind, rows = draw.choice(("remainder", "tables", "linear+neurons")), draw.choice((40, 100))
    neurons = draw.randint(1, hidden)
    activation = draw.choice(("ReLU()", "GELU()", "GELU('tanh')", "SiLU()", "Tanh()", "Identity()", "Softsign()"))
    dtype = draw.choice(("float32", "float64"))
    lines = [
        f"torch.manual_seed({draw.seed_()})",
        "import tempfile, os",
        f"net = lambda: torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear({width}, {hidden}), "
        f"torch.nn.{activation}, torch.nn.Linear({hidden}, {features})).to(torch.{dtype}))",
        "model, other = net(), net()",
        f"x = {draw.array((rows, width), dtype, wild=0.1)}",
        "truth, before = model(x), [p.clone() for p in model.parameters()]; mlp = model[0]",
    ]
    call = (
        f"model[0] = pyrepr.nn.LookupLinear.from_mlp(mlp, x, kind={kind!r}, bits=4, neurons={neurons})\n"
        "out = model(x)\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    path = pyrepr.save_converted(model, os.path.join(folder, 'a.safetensors'))\n"
        "    again = pyrepr.load_converted(other, path)(x)"
    )
    case = Case(f"nn.LookupLinear.from_mlp {kind}", call, "value", lines, repeatable=False)

    def check(names: dict[str, Any]) -> str | None:
        out, truth = names["out"], array(names["truth"])
        if out.shape != (rows, features) or out.dtype != names["x"].dtype or not out.isfinite().all():
            return f"out is {list(out.shape)} {out.dtype}, finite: {bool(out.isfinite().all())}"
        if not torch.equal(out, names["again"]):
            return "what was loaded is not what was saved"
        if not all(map(torch.equal, names["before"], names["mlp"].parameters())):
            return "the network was changed"
        x = array(names["x"])
        varies = np.ptp(x, 0).max() > 1e-6 * np.abs(x).max() + 1e-30
        if rows < 4 * width or not varies or np.abs(x).max() > 30 * np.median(np.abs(x)):
            return None  # what was held out, or lies far outside, is then anybody's guess
        error, varies = ((array(out) - truth) ** 2).sum(), ((truth - truth.mean(0)) ** 2).sum()
        return (
            f"the fit's error is {error / varies:.3g} of the variance"
            if error > 1.2 * varies + 1e-9 * (truth**2).sum()
            else None
        )

    case.check = check
    return case


def draw_former(draw: Draw) -> Case:
    """MemoryFormer's parts: shapes, finite values, and causality."""
    bits, heads = draw.choice((1, 2, 4)), draw.choice((1, 2))
    d = heads * bits * draw.choice((2, 4))
    batch, total = draw.size(3, 0.03), draw.choice((1, 2, 5, 9))
    rotary = draw.chance(0.5) and d // heads % 2 == 0
    lines = [f"torch.manual_seed({draw.seed_()})"]
    kind = draw.choice(("LookupQKV", "MemoryFormerMLP", "MemoryFormerBlock"))
    weighting = draw.choice(("probability", "scaled", "l1", "none"))
    arguments = f"{d}, {heads}, rotary={rotary}" if kind == "MemoryFormerBlock" else f"{d}"
    lines += [
        f"layer = pyrepr.nn.{kind}({arguments}, bits={bits}, weighting={weighting!r})",
        f"x = {draw.array((batch, total, d), 'float32')}",
        f"cut = {draw.randint(0, total)}",
    ]
    call = "out, part = layer(x), layer(x[:, :cut])"
    if kind == "LookupQKV":
        call = "out, part = (torch.cat(layer(y), -1) for y in (x, x[:, :cut]))"
    case = Case(f"nn.{kind}", call, "value", lines, calls=2, repeatable=False)

    def check(names: dict[str, Any]) -> str | None:
        out, part = names["out"], names["part"]
        if out.shape[:2] != (batch, total) or not out.isfinite().all():
            return f"out is {list(out.shape)}, finite: {bool(out.isfinite().all())}"
        # Attention sums in another order for another length, and a last bit may turn a sign that the next layer hashes.
        apart = (out[:, : names["cut"]] - part).abs() > 1e-4 * (1 + out[:, : names["cut"]].abs())
        share = float(apart.double().mean()) if apart.numel() else 0.0
        return (
            f"{share:.0%} of what came before depends on what comes later"
            if share > 0.3 and kind != "MemoryFormerBlock"
            else None
        )

    case.check = check
    return case


def draw_loss(draw: Draw) -> Case:
    n, pairs, estimator = draw.choice((4, 8, 16, 33)), draw.randint(1, 3), draw.choice(("unbiased", "biased"))
    kernel, dtype = draw.choice(KERNELS), draw.dtype()
    reduction = draw.choice(("mean", "sum", "none"))
    lines, left, right = [], [], []
    for i in range(pairs):
        for side, names in (("s", left), ("g", right)):
            shape = draw.choice(((n, draw.size(20, 0)), (n, 2, 3)))
            lines.append(f"{side}{i} = {draw.array(shape, dtype)}")
            names.append(f"{side}{i}")
    sigma = ", sigma=3.0" * (kernel in ("rbf", "laplacian"))
    lines.append(
        f"loss = pyrepr.nn.CKALoss(kernel={kernel!r}{sigma}, estimator={estimator!r}, reduction={reduction!r})"
    )
    case = Case("nn.CKALoss", f"out = loss([{', '.join(left)}], [{', '.join(right)}])", "value", lines)

    def check(names: dict[str, Any]) -> str | None:
        names["dtype"] = names["s0"].dtype
        arrays = [f64(names[x]).reshape(n, -1) for x in (*left, *right)]

        def of(*arrays: np.ndarray) -> np.ndarray:
            spec = {"name": kernel, "sigma": 3.0}
            found = np.array(
                [1 - cka_of(a, b, spec, estimator) for a, b in zip(arrays[:pairs], arrays[pairs:], strict=True)]
            )
            return found if reduction == "none" else found.mean() if reduction == "mean" else found.sum()

        return near("out", names, of, arrays, 1.0 * pairs)

    case.check = check
    if draw.chance(0.15):
        case.expect, case.names = "error", ("student", "guide", "x", "y", "mask", "reduction")
        lines.append(
            draw.choice(
                ("s0 = s0[1:]", "s0 = None", "s0 = s0.to(torch.int32)", "s0 = s0.flatten()[0]", "s0 = s0.flatten()")
            )
        )
    return case


def draw(draw: Draw) -> Case:
    rooms = (draw_delta, draw_convolution, draw_lookup, draw_fit, draw_former, draw_loss, draw_memory, draw_network)
    return draw.choices(rooms, (6, 2, 4, 1, 1, 2, 2, 1))[0](draw)
