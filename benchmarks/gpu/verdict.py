"""What a run says: which aims are met, which kernels have earned to be defaults, which launch configurations won."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

OURS = ("pyrepr triton", "pyrepr cuda")
FLA = "flash-linear-attention"
DELTA_SHAPES = ("B=1 T=8192 H=8", "B=1 T=32768 H=8", "B=8 T=2048 H=16", "B=4 T=4096 H=64")
# The float64 truth of a gate per key goes token by token, and its gradient keeps a state per token.
KDA_SHAPES = {"kda forward": DELTA_SHAPES[::2], "kda forward + backward": ("B=1 T=2048 H=8",)}
LOOKUP = tuple(f"T={tokens} d=h=4096 τ=8" for tokens in (1, 64, 1024, 8192))

Aim = tuple[str, str, str, str, float, str]


def _aims() -> Iterator[Aim]:
    """(family, op, shape, kind, at least or at most, peer): all for bfloat16.

    Kinds: ``times``, as fast as the fastest peer whose name begins so; ``product``, share of a plain matrix product's
    rate; ``bandwidth``, share of a copy's; ``memory``, peak in units of the inputs; ``error``, in units of the peer's.
    """
    pair = "n=16 384 p=q=1 024"
    for op, shape in (
        ("cka", "n=4 096 p=q=1 024"),
        ("cka", pair),
        ("cka", "n=4 096 p=q=16 384"),
        ("cka_matrix", "L=24 n=2 048 d=1 024"),
        ("cka_matrix", "L=24 n=16 384 d=1 024"),
    ):
        yield "gram", op, shape, "product", 0.7, "a plain matrix product"
    yield "gram", "cka", pair, "times", 2.0, "plain torch"
    yield "gram", "cka", pair, "memory", 4.0, "the inputs"
    yield "gram", "cka_matrix", "L=24 n=16 384 d=1 024", "memory", 4.0, "the inputs"
    for rule in ("plain", "gated", "kda"):
        for op, factor in ((f"{rule} forward", 1.5), (f"{rule} forward + backward", 1.3)):
            for shape in DELTA_SHAPES if rule != "kda" else KDA_SHAPES[op]:
                yield "delta_rule", op, f"{shape} K=V=128", "times", factor, FLA
                yield "delta_rule", op, f"{shape} K=V=128", "error", 1.0, FLA
    for shape in ("n=8192 d=512", "n=32768 d=1024"):
        yield "pairs", "info_nce", shape, "times", 1.3, "plain torch"
        yield "pairs", "info_nce", shape, "product", 0.4, "a plain matrix product"
    yield "pairs", "info_nce", "n=8192 d=512", "times", 1.5, "open_clip"
    yield "pairs", "info_nce prefixes", "n=2048 d=768", "times", 2.0, "plain torch"
    for shape in ("n=20000 m=20000 d=384 k=10", "n=16 m=1000000 d=384 k=10", "n=20000 m=20000 d=384 k=100"):
        yield "pairs", "top-k", shape, "times", 2.0, "torch mm + topk"
        yield "pairs", "top-k", shape, "error", 1.0, "torch mm + topk"
    yield "lookup", "lookup forward", LOOKUP[0], "times", 4.0, "F.linear"
    for shape in LOOKUP:
        yield "lookup", "lookup forward", shape, "bandwidth", 0.8, "a copy"
        yield "lookup", "lookup forward", shape, "times", 2.0, "F.embedding_bag"
        yield "lookup", "lookup forward+backward", shape, "times", 3.0, "F.embedding_bag"


def _case(record: dict[str, Any]) -> tuple[str, str, str, str]:
    return record["family"], record["op"], record.get("shape", ""), record.get("dtype", "")


def _timed(records: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """Case → implementation → its row, where it has a time."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in records:
        if r["section"] == "time" and r.get("milliseconds"):
            found.setdefault(_case(r), {})[r["implementation"]] = r
    return found


def state(record: dict[str, Any]) -> str:
    """What came of a record: "right", "failed", or "unmeasured": not run, or stopped as its time was over."""
    failure = str(record.get("failure") or "")
    if failure.startswith("not run") or failure.endswith("time was over"):
        return "unmeasured"
    return "failed" if failure else "right"


def aims(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every aim with what the run measured; ``met`` is ``None`` where it measured nothing."""
    timed = _timed(records)
    rates = {r["bound"]: r["value"] for r in records if "bound" in r}
    found = []
    for family, op, shape, kind, limit, peer in _aims():
        rows = timed.get((family, op, shape, "bfloat16"), {})
        entry: dict[str, Any] = {"family": family, "op": op, "shape": shape, "kind": kind, "limit": limit, "peer": peer}
        entry.update(_measured(rows, kind, peer, rates))
        value = entry.get("value")
        at_most = kind in ("memory", "error")
        entry["met"] = None if value is None else bool(value <= limit if at_most else value >= limit)
        found.append(entry)
    return found


def _measured(rows: dict[str, dict[str, Any]], kind: str, peer: str, rates: dict[str, float]) -> dict[str, Any]:
    """The value, and what it was made of; without a value the reason."""
    ours = [rows[name] for name in OURS if name in rows and not rows[name].get("failure")]
    if not ours:
        failed = [rows[name]["failure"] for name in OURS if name in rows]
        return {"value": None, "why": failed[0] if failed else "pyrepr has no time"}
    best = min(ours, key=lambda r: r["milliseconds"])
    made = {"implementation": best["implementation"], "milliseconds": best["milliseconds"], "error": best.get("error")}
    if kind in ("times", "error"):
        others = [r for name, r in rows.items() if name.startswith(peer)]
        if not others:
            return {**made, "value": None, "why": f"no time of {peer}"}
        other = min(others, key=lambda r: r["milliseconds"])
        made.update(peer_milliseconds=other["milliseconds"], peer_error=other.get("error"))
        if kind == "times":
            return {**made, "value": other["milliseconds"] / best["milliseconds"]}
        errors = [None if r.get("error") is None else float(r["error"]) for r in (best, other)]
        if errors[0] is None or errors[1] is None or not math.isfinite(errors[1]):
            return {**made, "value": None, "why": "no error of both"}
        return {**made, "value": errors[0] / errors[1] if errors[1] else float(errors[0] > 0)}
    if kind == "memory":
        peak = best.get("peak_mib")
        return {**made, "value": None if peak is None else peak * 2**20 / best["bytes"]}
    rate = rates.get("matrix product bfloat16" if kind == "product" else "copy")
    if not rate:
        return {**made, "value": None, "why": "its bound was not measured"}
    amount = best["flops"] / 1e9 if kind == "product" else best["bytes"] / 1e6
    return {**made, "value": amount / best["milliseconds"] / rate}


def _under_one_assembler(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All but what was found under another assembler than the times were taken with."""
    timed = {r.get("assembler") for r in records if r["section"] == "time"}
    return (r for r in records if r["section"] != "right" or not timed or r.get("assembler") in timed)


def _judged(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, int]]:
    """(leaf op, backend) → how many checks and times it was right in, failed in, and is unmeasured in.

    Of what failed before it was known which ops it takes, those that other records of its case took, or all of its
    family, may be wrong. What was found under another assembler than the times were taken with does not count.
    """
    of_case: dict[tuple[str, str], set[str]] = {}
    of_family: dict[str, set[str]] = {}
    for r in records:
        of_case.setdefault((r["family"], r.get("op", "")), set()).update(r.get("ops", ()))
        of_family.setdefault(r["family"], set()).update(r.get("ops", ()))
    found: dict[tuple[str, str], dict[str, int]] = {}
    for r in _under_one_assembler(records):
        backend = r.get("backend") or str(r.get("implementation", "")).removeprefix("pyrepr ")
        ours = r.get("backend") or r.get("implementation") in OURS
        if r["section"] not in ("right", "check", "time") or not ours:
            continue
        known = of_case[r["family"], r.get("op", "")]
        for op in r.get("ops") or known or (of_family[r["family"]] if state(r) == "failed" else ()):
            found.setdefault((op, backend), dict.fromkeys(("right", "failed", "unmeasured"), 0))[state(r)] += 1
    return found


def ops(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every leaf op and backend that took part: how often it was right, failed, and is unmeasured."""
    return [{"op": op, "backend": b, **counts} for (op, b), counts in sorted(_judged(records).items())]


def order(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """GPU_ORDER as this run proves it: op → the backends that were right, failed in no check in which the op took part
    (times are checked too), and were faster than the reference in the cases timed with it (in the geometric mean), the
    fastest first.
    """
    judged = _judged(records)
    ratios: dict[tuple[str, str], list[float]] = {}
    for rows in _timed(records).values():
        base = rows.get("pyrepr reference")
        for name in OURS:
            if base and name in rows and not rows[name].get("failure"):
                for op in rows[name].get("ops", ()):
                    ratio = base["milliseconds"] / rows[name]["milliseconds"]
                    ratios.setdefault((op, name.removeprefix("pyrepr ")), []).append(math.log(ratio))
    found: dict[str, list[tuple[float, str]]] = {}
    for (op, backend), logs in sorted(ratios.items()):
        mean = sum(logs) / len(logs)
        if judged[op, backend]["right"] and not judged[op, backend]["failed"] and mean > 0:
            found.setdefault(op, []).append((mean, backend))
    return {op: [backend for _, backend in sorted(backends, reverse=True)] for op, backends in found.items()}


def order_lines(found: dict[str, list[str]]) -> list[str]:
    """What to put into pyrepr/backend.py."""
    lines = [f'    "{op}": ({", ".join(f"{b!r}" for b in backends)},),' for op, backends in sorted(found.items())]
    return ["GPU_ORDER: dict[str, tuple[str, ...]] = {", *(line.replace("'", '"') for line in lines), "}"]


def rows(records: list[dict[str, Any]]) -> list[str]:
    """Of a search: for each table and architecture the configuration that is fastest over all problems that it was
    searched for (in the geometric mean of the time over the row's of today), and by how much."""
    searched: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in records:
        searched.setdefault((r["table"], r["row"]), []).append(r)
    lines = []
    for (table, row), found in sorted(searched.items()):
        usable = [r for r in found if r["times"].get(r["now"])]
        shared = set.intersection(*(set(r["times"]) for r in usable)) if usable else set()
        if not shared:
            lines.append(f"{table} sm_{row}: today's row did not run in any of {len(found)} problems")
            continue
        means = {c: sum(math.log(r["times"][c] / r["times"][r["now"]]) for r in usable) / len(usable) for c in shared}
        best = min(sorted(means), key=lambda c: means[c])
        now = usable[0]["now"]
        change = "as it is" if best == now else f"{100 * (1 - math.exp(means[best])):.1f} % less time than {now}"
        lines.append(f"{table} sm_{row}: {best}  # {change}, {len(usable)} problems")
    return lines
