"""Family `lookup`: hashing, weighted rows of tables, and segment sums. Truth: explicit loops over chunks in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from draw import EPS, Case, Differential, Draw, compare, f64

WEIGHTINGS = ("probability", "scaled", "l1", "none")
HASHES = {"one_bit": 1, "two_bit": 2}
INTEGERS = ("int32", "int64", "int16", "uint8")


def chunked(x: np.ndarray, bits: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], x.shape[-1] // bits, bits)


def codes_of(x: np.ndarray, bits: int, hash: str = "one_bit") -> np.ndarray:
    """The code of two bits is that of z and |z| − 1 in turn."""
    z = np.real(x)
    if hash == "two_bit":
        z = np.stack([z, np.abs(z) - 1], -1).reshape(*z.shape[:-1], 2 * z.shape[-1])
    return ((chunked(z, bits) >= 0) << np.arange(bits)).sum(-1)


def weights_of(x: np.ndarray, bits: int, weighting: str, temperature: float, hash: str = "one_bit") -> np.ndarray:
    bits //= HASHES[hash]
    z = chunked(x, bits)
    z = np.where(np.real(z) < 0, -z, z)  # |z|, analytic beside 0
    if weighting == "none":
        return np.where(np.isnan(np.real(z)).any(-1), np.nan, 1.0) + 0 * np.where(np.isfinite(z), z, 0).sum(-1)
    if weighting == "l1":
        return z.sum(-1) / bits
    with np.errstate(over="ignore"):
        p = (1 / (1 + np.exp(-2 * z / temperature))).prod(-1)
    return p * z.sum(-1) if weighting == "scaled" else p


def sums(codes: np.ndarray, weights: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Σ_k weights[..., k] tables[k, codes[..., k]]; tables: [K, n, h]."""
    rows = tables[np.arange(tables.shape[0]), codes]  # [..., K, h]
    return (weights[..., None] * rows).sum(-2)


def bytes_bound(names: dict[str, Any], codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What it may cost that weights, times the rows' scales, are rounded to 16 bits of the token's largest."""
    scales = f64(names["scales"])[np.arange(codes.shape[-1]), codes]
    largest = np.abs(np.where(np.isfinite(weights), weights, 0) * scales).max(-1, keepdims=True)
    plain = np.abs(f64(names["plain"] if "plain" in names else names["tables"]))
    return 2.0**-15 * sums(codes, np.broadcast_to(largest, weights.shape), plain)


def draw_tables(draw: Draw, k: int, n: int, h: int, kind: str) -> list[str]:
    if kind == "int8":
        return [
            f"tables = (randn({draw.seed_()}, {k}, {n}, {h}) * 40).clamp(-127, 127).to(torch.int8)",
            f"scales = (randn({draw.seed_()}, {k}, {n}).abs() * 0.1).to(torch.float32)",
        ]
    return [f"tables = {draw.array((k, n, h), kind, wild=0.05, special=0.02)}"]


def tables_of(names: dict[str, Any]) -> np.ndarray:
    tables = f64(names["plain"] if "plain" in names else names["tables"])
    return tables * f64(names["scales"])[..., None] if "scales" in names else tables


def lead(draw: Draw) -> tuple[int, ...]:
    count = draw.choice((0, 1, 1, 1, 2))
    if draw.chance(0.05):
        return (draw.choice((100, 300, 600)),)
    return tuple(draw.size(33 if count == 1 else 5) for _ in range(count))


def draw_linear(draw: Draw) -> Case:
    bits = draw.choice((1, 2, 3, 4, 4, 5, 8)) if draw.chance(0.9) else draw.choice((10, 12))
    k, h = draw.size(9), draw.size(130 if draw.chance(0.2) else 64)
    if bits > 5:
        k, h = draw.size(3), draw.size(33)
    packed = h in (64, 128) and draw.chance(0.5)
    hash = draw.choice(tuple(HASHES)) if bits % 2 == 0 else "one_bit"
    width = bits // HASHES[hash]
    shape = (*lead(draw), k * width)
    dtype = draw.dtype()
    kind = "float64" if dtype == "float64" else draw.choice((dtype, "float32", "bfloat16", "float16", "int8"))
    smooth = draw.chance(0.4)
    wild, special = (0, 0) if smooth else (0.15, 0.1)
    lines = [f"x = {draw.array(shape, dtype, wild=wild, special=special)}", *draw_tables(draw, k, 1 << bits, h, kind)]
    arguments = ["x", "tables"]
    if packed:
        lines.append("plain = tables; tables = pyrepr.pack_tables(tables)")
    with_bias = draw.chance(0.5)
    if with_bias:
        lines.append(f"bias = {draw.array((h,), draw.choice((dtype, 'float32' if dtype != 'float64' else dtype)))}")
        arguments.append("bias")
    weighting, temperature = draw.choice(WEIGHTINGS), draw.choice((1.0, 1.0, 0.5, 3.0))
    arguments.append(f"weighting={weighting!r}")
    if temperature != 1.0:
        arguments.append(f"temperature={temperature}")
    if kind == "int8":
        arguments.append("scales=scales")
    if hash != "one_bit":
        arguments.append(f"hash={hash!r}")
    converted = draw_converted(draw, k * width, h, dtype)
    lines += converted.lines
    arguments += [f"{name}={name}" for name in converted.names]
    call = f"pyrepr.lookup_linear({', '.join(arguments)})"
    case = Case("lookup_linear", f"out = {call}", "value", lines)

    def check(names: dict[str, Any]) -> str | None:
        x, tables = f64(names["x"]), tables_of(names)
        bias = f64(names["bias"]) if with_bias else 0.0
        dtype = names["x"].dtype
        eps = EPS[torch.float64] if dtype == torch.float64 else EPS[torch.float32]
        rest, dense, dense_size = converted.parts(names, x)
        z = converted.standardised(names, rest)
        codes, weights = codes_of(z, bits, hash), weights_of(z, bits, weighting, temperature, hash)
        truth = sums(codes, weights, tables) + bias + dense
        size = sums(codes, np.abs(weights), np.abs(tables)) + np.abs(bias) + dense_size
        bound = (4 * bits + 2 * k + 16 + converted.steps) * eps * size
        if converted.names:
            bound = bound + converted.doubt(names, x, z, eps, weighting, hash, np.abs(tables))
        if kind == "int8" and k:
            bound = bound + bytes_bound(names, codes, weights)
        if not np.isfinite(tables).all() or not np.isfinite(weights).all():
            truth = np.where(np.isnan(x).any(-1, keepdims=True), np.nan, truth)
        if converted.names and not np.isfinite(x).all():
            return None if np.isnan(f64(names["out"])[np.isnan(x).any(-1)]).all() else "NaN in x is not in out"
        return compare("out", names["out"], truth + np.zeros((*x.shape[:-1], tables.shape[2])), bound, dtype)

    case.check = check
    # Of many elements one is next to a jump, and of few in 16 bits one is 1, where that of two bits is.
    apart = math.prod(shape) < 2000 and (hash == "one_bit" or dtype in ("float32", "float64"))
    if smooth and k and math.prod(shape) and h and apart and not converted.names:
        variables = ["x", *["tables"] * (kind != "int8" and not packed), *["bias"] * with_bias]
        fixed = lines[1:]

        def truth(*varied: np.ndarray) -> np.ndarray:
            given = dict(zip(variables, varied, strict=True))
            tables = given.get("tables")
            tables = _tables(fixed) if tables is None else tables
            weights = weights_of(given["x"], bits, weighting, temperature, hash)
            return np.ravel(sums(codes_of(given["x"], bits, hash), weights, tables) + given.get("bias", 0.0))

        case.differential = Differential(call, tuple(variables), truth)
    if draw.chance(0.12):
        names = ["x", "tables", *["bias"] * with_bias, *["scales"] * (kind == "int8")]
        spoil(draw, case, [*names, *converted.names])
    return case


def features_of(z: np.ndarray, hash: str) -> np.ndarray:
    sign = np.where(z >= 0, 1.0, -1.0)
    if hash == "two_bit":
        sign = np.stack([sign, np.where(np.abs(z) >= 1, sign, -sign)], -1).reshape(*z.shape[:-1], 2 * z.shape[-1])
    return np.where(np.isnan(z).any(-1, keepdims=True), np.nan, sign)


def draw_signs(draw: Draw) -> Case:
    d, h = draw.size(130 if draw.chance(0.3) else 40), draw.size(130 if draw.chance(0.2) else 40)
    hash, kind = draw.choice(tuple(HASHES)), draw.choice(("int8", "int8", "float32", "float64", "bfloat16"))
    dtype = "float64" if kind == "float64" else draw.choice(("float32", "bfloat16", "float16"))
    shape, features = (*lead(draw), d), d * HASHES[hash]
    weight = f"randn({draw.seed_()}, {h}, {features})"
    weight = f"({weight} * 40).clamp(-128, 127)" if kind == "int8" else weight
    lines = [
        f"x = {draw.array(shape, dtype, wild=0.15, special=0.1)}",
        f"weight = {weight}.to(torch.{kind})",
    ]
    arguments, names = ["x", "weight"], ["x", "weight"]
    if draw.chance(0.5):
        lines.append(f"bias = {draw.array((h,), draw.choice((dtype, 'float32' if dtype != 'float64' else dtype)))}")
        arguments.append("bias")
        names.append("bias")
    if kind == "int8":
        lines.append(f"scales = randn({draw.seed_()}, {h}).abs().float() * 0.01")
        arguments.append("scales=scales")
        names.append("scales")
    arguments.append(f"hash={hash!r}")
    converted = draw_converted(draw, d, h, dtype)
    lines += converted.lines
    arguments += [f"{name}={name}" for name in converted.names]
    call = f"pyrepr.functional.sign_linear({', '.join(arguments)})"
    case = Case("sign_linear", f"out = {call}", "value", lines)

    def check(names: dict[str, Any]) -> str | None:
        x = f64(names["x"])
        bias = f64(names["bias"]) if "bias" in names else 0.0
        weight = f64(names["weight"]) * (f64(names["scales"])[:, None] if kind == "int8" else 1.0)
        eps = EPS[torch.float64] if dtype == "float64" else EPS[torch.float32]
        rest, dense, dense_size = converted.parts(names, x)
        z = converted.standardised(names, rest)
        truth = features_of(z, hash) @ weight.T + bias + dense
        size = np.abs(weight).sum(1) + np.abs(bias) + dense_size
        bound = (2 * features + 16 + converted.steps) * eps * size
        if converted.names:
            bound = bound + converted.doubt(names, x, z, eps, "none", hash, np.abs(weight))
        if converted.names and not np.isfinite(x).all():
            return None if np.isnan(f64(names["out"])[np.isnan(x).any(-1)]).all() else "NaN in x is not in out"
        return compare("out", names["out"], truth + np.zeros((*x.shape[:-1], h)), bound, names["x"].dtype)

    case.check = check
    if draw.chance(0.12):
        spoil(draw, case, [*names, *converted.names])
    return case


@dataclass
class Converted:
    """What a converted layer has beside its tables, and what it does to x, in float64."""

    lines: list[str]
    names: tuple[str, ...] = ()
    steps: int = 0  # of the longest sum

    def parts(self, names: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, Any, Any]:
        """What the tables get, what the dense part adds, and the size of its terms."""
        if "down" not in self.names:
            return x, 0.0, 0.0
        down, up = f64(names["down"]), f64(names["up"])
        inner = x @ down.T
        return x - inner @ down, inner @ up, np.abs(x) @ np.abs(down).T @ np.abs(up)

    def standardised(self, names: dict[str, Any], x: np.ndarray) -> np.ndarray:
        return (x - f64(names["centre"])) * f64(names["scale"]) if "centre" in self.names else x

    def doubt(
        self,
        names: dict[str, Any],
        x: np.ndarray,
        z: np.ndarray,
        eps: float,
        weighting: str,
        hash: str,
        tables: np.ndarray,
    ) -> np.ndarray:
        """What roundings of z do: to weights, and, where a code may be another, anything."""
        moved = np.abs(x)
        if "down" in self.names:
            down = np.abs(f64(names["down"]))
            moved = moved + moved @ down.T @ down
        if "centre" in self.names:
            moved = (moved + np.abs(f64(names["centre"]))) * np.abs(f64(names["scale"]))
        moved = 4 * (self.steps + 4) * eps * moved
        unsure = (np.abs(z) <= moved) | ((hash == "two_bit") & (np.abs(np.abs(z) - 1) <= moved))
        slope = tables.max(initial=0.0) * moved.sum(-1, keepdims=True) * (3 + np.abs(z).sum(-1, keepdims=True))
        return np.where(unsure.any(-1, keepdims=True), np.inf, 4 * slope * (weighting != "none"))


def draw_converted(draw: Draw, d: int, h: int, dtype: str) -> Converted:
    kind, given = dtype if dtype == "float64" else draw.choice((dtype, "float32")), Converted([])
    if draw.chance(0.6):
        return given
    if draw.chance(0.8):
        given.lines += [f"centre = randn({draw.seed_()}, {d}).to(torch.{kind})"]
        given.lines += [f"scale = (randn({draw.seed_()}, {d}).abs() + 0.3).to(torch.{kind})"]
        given.names, given.steps = ("centre", "scale"), 2
    if draw.chance(0.6):
        rank = draw.choice((0, 1, 2, 5, 17))
        given.lines += [f"down = (randn({draw.seed_()}, {rank}, {d}) * 0.3).to(torch.{kind})"]
        given.lines += [f"up = randn({draw.seed_()}, {rank}, {h}).to(torch.{kind})"]
        given.names, given.steps = (*given.names, "down", "up"), d + rank + 2
    return given


_known: dict[str, np.ndarray] = {}


def _tables(lines: list[str]) -> np.ndarray:
    """The tables that lines make; the last is kept."""
    text = "\n".join(line for line in lines if line.startswith(("tables", "scales")))
    if text not in _known:
        import draw
        import memory

        _known.clear()
        names: dict[str, Any] = {
            "torch": torch,
            "guarded": lambda x, side: x,
            **{n: getattr(draw, n) for n in ("randn", "gapped", "put")},
        }
        exec(text, names)
        _known[text] = tables_of(names).astype(np.float64)
        del memory
    return _known[text]


def spoil(draw: Draw, case: Case, names: list[str]) -> None:
    case.expect, case.differential = "error", None
    name = draw.choice(names)
    # Any number of codes a row will do where nothing goes with them.
    takes = {"tables": "bias = " in "".join(case.lines), "values": False, "codes": case.kind != "segment_sum"}
    wider = takes.get(name, True)
    case.lines.append(draw.wrong(name, wider=wider, deeper=name != "x"))
    # One code a row may have any shape, none as well.
    scalar = case.kind == "segment_sum" and "torch.zeros(()" in case.lines[-1]
    if scalar or (case.lines[-1] == f"{name} = None" and name in ("bias", "weights")):
        case.expect, case.check = "either", lambda names: None


def draw_codes(draw: Draw, shape: tuple[int, ...], n: int) -> tuple[str, bool]:
    """codes within 0 … n − 1, or one of them outside; and whether all are inside."""
    dtype = draw.choice(INTEGERS)
    text = (
        f"((randn({draw.seed_()}, {', '.join(map(str, shape))}) * 1e3).abs() % {n}).floor()"
        if shape
        else f"(randn({draw.seed_()}) * 1e3).abs() % {n}"
    )
    inside = True
    if draw.chance(0.1) and math.prod(shape):
        bad = draw.choice((n, n + 7, -1, -5, 2**31 - 1, 2**40, -(2**35)))
        dtype, inside = ("int64", False) if abs(bad) > 30000 else (draw.choice(("int32", "int64", "int16")), False)
        text = f"put({text}, ({draw.seed_()}, {bad}))"
    if n > 250 and dtype == "uint8":
        dtype = "int64"
    return f"codes = ({text}).to(torch.{dtype})", inside


def draw_sum(draw: Draw) -> Case:
    k, n, h = draw.size(9), draw.choice((1, 2, 3, 7, 16, 33, 100)), draw.size(130 if draw.chance(0.2) else 64)
    shape = (*lead(draw), k)
    kind = draw.choice(("float32", "float64", "bfloat16", "float16", "int8"))
    dtype = "float64" if kind == "float64" else draw.choice(("float32", "bfloat16", "float16"))
    codes, inside = draw_codes(draw, shape, n)
    smooth = draw.chance(0.4)
    lines = [
        codes,
        f"weights = {draw.array(shape, dtype, wild=0 if smooth else 0.15, special=0 if smooth else 0.08)}",
        *draw_tables(draw, k, n, h, kind),
    ]
    packed = h in (64, 128) and draw.chance(0.5)
    if packed:
        lines.append("plain = tables; tables = pyrepr.pack_tables(tables)")
    call = f"pyrepr.lookup_sum(codes, weights, tables{', scales=scales' * (kind == 'int8')})"
    case = Case("lookup_sum", f"out = {call}", "value" if inside else "error", lines)

    def check(names: dict[str, Any]) -> str | None:
        codes, weights, tables = names["codes"].long().numpy(), f64(names["weights"]), tables_of(names)
        wide = torch.float64 if kind == "float64" else torch.float32
        bound = (2 * k + 16) * EPS[wide] * sums(codes, np.abs(weights), np.abs(tables))
        if kind == "int8" and k:
            bound = bound + bytes_bound(names, codes, weights)
        return compare("out", names["out"], sums(codes, weights, tables), bound, wide)

    case.check = check
    if smooth and inside and k and h and math.prod(shape):
        variables = ["weights", *["tables"] * (kind != "int8" and not packed)]
        fixed, code_line = lines[2:], lines[0]

        def truth(weights: np.ndarray, tables: np.ndarray | None = None) -> np.ndarray:
            return np.ravel(sums(_codes(code_line), weights, _tables(fixed) if tables is None else tables))

        case.differential = Differential(call, tuple(variables), truth, vmap=True)
    if inside and draw.chance(0.12):
        spoil(draw, case, ["codes", "weights", "tables", *["scales"] * (kind == "int8")])
    return case


def _codes(line: str) -> np.ndarray:
    import draw

    names: dict[str, Any] = {"torch": torch, "randn": draw.randn, "put": draw.put}
    exec(line, names)
    return names["codes"].long().numpy()


def segments(values: np.ndarray, codes: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """[K, n, h]; values [T, h], codes and weights [T, K]."""
    out = np.zeros((codes.shape[1], n, values.shape[1]), dtype=np.result_type(values, weights))
    for k in range(codes.shape[1]):
        np.add.at(out[k], codes[:, k], values * weights[:, k : k + 1])
    return out


def draw_segments(draw: Draw) -> Case:
    single = draw.chance(0.3)
    k, n, h = draw.size(7), draw.choice((1, 2, 3, 7, 16, 33)), draw.size(64)
    before = lead(draw)
    shape = before if single else (*before, k)
    dtype = draw.dtype()
    codes, inside = draw_codes(draw, shape, n)
    weighted = draw.chance(0.5)
    smooth = draw.chance(0.4)
    lines = [
        codes,
        f"values = {draw.array((*before, h), dtype, wild=0 if smooth else 0.15, special=0 if smooth else 0.05)}",
    ]
    if weighted:
        kind = dtype if dtype == "float64" or draw.chance(0.5) else "float32"
        lines.append(
            f"weights = {draw.array(shape, kind)}" if shape else f"weights = (randn({draw.seed_()})).to(torch.{kind})"
        )
    # codes [...] of the values' leading shape are taken as one code a row.
    ambiguous = not single and shape == before
    call = f"pyrepr.segment_sum(values, codes, {n}{', weights=weights' * weighted})"
    case = Case(
        "segment_sum", f"out = {call}", "value" if inside else "error", lines, names=("values", "codes", "weights", "n")
    )

    def flat(names: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = math.prod(before)
        codes = names["codes"].long().numpy().reshape(count, 1 if single else k)
        weights = f64(names["weights"]).reshape(codes.shape) if weighted else np.ones(codes.shape)
        return f64(names["values"]).reshape(count, h), codes, weights

    def check(names: dict[str, Any]) -> str | None:
        values, codes, weights = flat(names)
        wide = torch.float64 if dtype == "float64" else torch.float32
        truth = segments(values, codes, weights, n)
        bound = (len(values) + 16) * EPS[wide] * segments(np.abs(values), codes, np.abs(weights), n)
        return compare("out", names["out"], truth[0] if single else truth, bound[0] if single else bound, wide)

    case.check = check
    if smooth and inside and not ambiguous and math.prod(before) and h and (single or k):
        variables = ["values", *["weights"] * weighted]

        def truth(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
            count = math.prod(before)
            codes = _codes(lines[0]).reshape(count, 1 if single else k)
            weights = np.ones(codes.shape) if weights is None else weights.reshape(codes.shape)
            return np.ravel(segments(values.reshape(count, h), codes, weights, n))

        case.differential = Differential(call, tuple(variables), truth)
    if inside and draw.chance(0.12):
        spoil(draw, case, ["codes", "values", *["weights"] * weighted])
    return case


def draw_hash(draw: Draw) -> Case:
    bits = draw.randint(1, 16)
    hash = draw.choice(tuple(HASHES)) if bits % 2 == 0 else "one_bit"
    shape = (*lead(draw), draw.size(7) * (bits // HASHES[hash]))
    lines = [f"x = {draw.array(shape, draw.dtype(), wild=0.2, special=0.2)}"]
    case = Case("hash_codes", f"out = pyrepr.hash_codes(x, {bits}, hash={hash!r})", "value", lines)

    def check(names: dict[str, Any]) -> str | None:
        out, x = names["out"], f64(names["x"])
        if out.dtype != torch.int32:
            return f"codes are {out.dtype}"
        return None if np.array_equal(out.numpy(), codes_of(x, bits, hash)) else "codes are wrong"

    case.check = check
    if draw.chance(0.15):
        case.expect = "error"
        if draw.chance(0.5):
            lines.append(draw.wrong("x", wider=bits > HASHES[hash], deeper=False, moved=False))
        else:
            case.call = f"out = pyrepr.hash_codes(x, {draw.choice((0, -1, 17, 2.0, True, None, repr('4')))})"
            case.names = ("bits", "x")
        if lines[-1].startswith("x = x[None") or bits == HASHES[hash]:
            case.expect, case.check = "either", lambda names: None
    return case


def draw(draw: Draw) -> Case:
    return draw.choices((draw_linear, draw_signs, draw_sum, draw_segments, draw_hash), (5, 2, 2, 2, 1))[0](draw)
