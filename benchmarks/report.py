"""Markdown of benchmark runs: ``python -m pyrepr.benchmarks.report FILE.json`` for every row of one run on a CPU,
with ``--summary`` for a line per case, as in the README, ``--page FILE.json ...`` for a section a run, and ``--gpu
benchmarks/results`` for all that was measured on GPUs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def _head(run: dict[str, Any]) -> str:
    """The machine of a run on a CPU, its versions and its bounds."""
    facts = run["machine"]
    bounds = (
        f"{facts['fma_peak_gflops']:.0f} GFLOP/s fp32 (micro-kernel {facts['micro_kernel_gflops']:.0f}), "
        f"{facts['read_bandwidth_gbs']:.0f} GB/s"
    )
    return (
        f"{facts['processor']}, {facts['threads']} threads, SIMD level {facts['simd']}, torch {facts['torch']}"
        + (f", commit {facts['commit']}" if facts.get("commit") else "")
        + f"; measured in the same run: {bounds}."
    )


def _milliseconds(ms: float) -> str:
    return f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}"


def _error(error: float) -> str:
    """NaN stands for an implementation that computes something else, and is there for its time."""
    return f"{error:.0e}" if error == error else "–"


def summary(run: dict[str, Any]) -> str:
    """A table with one line per case: pyrepr's time and error, and those of the fastest peer that gives a number."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run["rows"]:
        cases.setdefault((row["op"], row["shape"]), []).append(row)
    lines = [
        _head(run),
        "",
        "| op | shape | pyrepr, ms | fastest peer | × | error | peer's error | of bound |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for (op, shape), rows in cases.items():
        own = [row for row in rows if row["implementation"].startswith("pyrepr")]
        peers = [row for row in rows if row not in own and row["milliseconds"] is not None]
        best = min(own, key=lambda row: row["milliseconds"])
        peer = min(peers, key=lambda row: row["milliseconds"], default=None)
        bound = best["fraction_of_bound"]
        cells = [op, shape, _milliseconds(best["milliseconds"])]
        if peer is None:
            cells += ["–", "", _error(best["error"]), ""]
        else:
            ratio = peer["milliseconds"] / best["milliseconds"]
            cells += [peer["implementation"], f"{ratio:.2f}", _error(best["error"]), _error(peer["error"])]
        lines.append("| " + " | ".join([*cells, f"{100 * bound:.0f} %" if bound else ""]) + " |")
    return "\n".join(lines)


def markdown(run: dict[str, Any]) -> str:
    """A table with one line per case and implementation, time, speed-up and error side by side."""
    lines = [
        _head(run),
        "",
        "| op | shape | implementation | ms | × | error | extra MiB | of bound |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    last = None
    for row in run["rows"]:
        case = (row["op"], row["shape"])
        op, shape = case if case != last else ("", "")
        last = case
        if row["milliseconds"] is None:
            lines.append(f"| {op} | {shape} | {row['implementation']} | fails | | | | |")
            continue
        bound = row["fraction_of_bound"]
        cells = [
            op,
            shape,
            f"**{row['implementation']}**" if row["implementation"].startswith("pyrepr") else row["implementation"],
            _milliseconds(row["milliseconds"]),
            f"{row['speedup']:.2f}",
            _error(row["error"]),
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{100 * bound:.0f} %" if bound else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TITLES = {
    "cpu_gram": "CKA and Gram matrices",
    "cpu_delta_rule": "Delta rule",
    "cpu_causal_conv1d": "Causal convolution",
    "cpu_lookup": "Lookup layers",
    "cpu_pairs": "Nearest neighbours and contrastive losses",
    "cpu_probe": "Linear probes",
}


def page(paths: list[Path]) -> str:
    """A section a run, in the order of TITLES."""
    runs = {path.stem: json.loads(path.read_text()) for path in paths}
    return "\n\n".join(f"## {title}\n\n{markdown(runs[name])}" for name, title in TITLES.items() if name in runs)


def gpu_markdown(run: dict[str, Any]) -> str:
    """One run of ``python -m pyrepr.gpu_check``: the machine, the times, and what failed."""
    records = run["records"]
    aims, order = _gpu_aims(run.get("aims", [])), _gpu_order(run)
    parts = (
        _gpu_head(run),
        _gpu_assemblers(run),
        aims,
        _gpu_ops(run.get("ops", [])),
        _gpu_times(records),
        _gpu_notes(records),
        _gpu_checks(records),
        order,
    )
    return "\n\n".join(part for part in parts if part)


def _gpu_aims(aims: list[dict[str, Any]]) -> str:
    """What was aimed at beside what was measured, bfloat16."""
    if not aims:
        return ""
    words = {
        "times": "≥ {} × as fast as {}",
        "product": "≥ {} of the rate of {}",
        "bandwidth": "≥ {} of the bandwidth of {}",
        "memory": "≤ {} × the memory of {}",
        "error": "error ≤ {} × that of {}",
    }
    lines = ["| aim | op | shape | measured | pyrepr, ms | peer, ms | error | peer's error | |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---|")
    for aim in aims:
        value = aim.get("value")
        ms, errors = (
            ["" if aim.get(key) is None else show(float(aim[key])) for key in keys]
            for keys, show in (
                (("milliseconds", "peer_milliseconds"), _milliseconds),
                (("error", "peer_error"), _error),
            )
        )
        verdict = {True: "met", False: "missed", None: f"unmeasured: {aim.get('why', 'no number')}"}[aim["met"]]
        cells = [words[aim["kind"]].format(f"{aim['limit']:g}", aim["peer"]), aim["op"], aim["shape"]]
        cells += ["" if value is None else f"{value:.2f}", *ms, *errors, verdict.replace("\n", " ")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gpu_order(run: dict[str, Any]) -> str:
    """What the run proves fit to be a default, as pyrepr/backend.py says it."""
    if not run.get("order") or run["dry_run"]:
        return ""
    from pyrepr.benchmarks.gpu.verdict import order_lines

    lines = ["For pyrepr/backend.py, once this run is in benchmarks/results/:", "", "```python"]
    return "\n".join([*lines, *order_lines(run["order"]), "```"])


def _gpu_head(run: dict[str, Any]) -> str:
    facts = run["machine"]
    versions = ", ".join(f"{k} {facts[k]}" for k in ("torch", "cuda", "triton", "fla-core") if facts.get(k))
    bounds = ", ".join(f"{r['op']} {r['value']:.0f} {r['unit']}" for r in run["records"] if "bound" in r)
    note = "" if run["finished"] else " The run did not finish."
    reason = run.get("build", {}).get("cuda_reason") or run.get("build", {}).get("reason")
    note += f" CUDA C++ was not built: {reason}." if reason and not run["dry_run"] else ""
    return (
        f"{facts.get('device', 'unknown device')}, driver {run['driver']}, {versions}, commit {run['commit']}, "
        f"{run['date']}. Measured in the same run: {bounds or 'nothing'}.{note}"
    )


def _gpu_assemblers(run: dict[str, Any]) -> str:
    """Under which assemblers the products were right, and which one everything else ran with."""
    from pyrepr.benchmarks.gpu.verdict import state

    lines = []
    for name in run.get("assemblers", []):
        states = [state(r) for r in run["records"] if r["section"] == "right" and r.get("assembler") == name]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("right", "failed", "unmeasured") if states.count(s))
        taken = "; what follows ran with it" if name == run.get("assembler") else ""
        lines.append(f"- {name}: {counts or 'unmeasured'}{taken}")
    return "\n".join(lines)


def _gpu_ops(ops: list[dict[str, Any]]) -> str:
    """Every leaf op by itself: in how many checks it was right, failed, or is unmeasured."""
    lines = [f"| {o['op']} | {o['backend']} | {o['right']} | {o['failed']} | {o['unmeasured']} |" for o in ops]
    return (
        "\n".join(["| leaf op | backend | right | failed | unmeasured |", "|---|---|---:|---:|---:|", *lines])
        if ops
        else ""
    )


def _gpu_times(records: list[dict[str, Any]]) -> str:
    """Device time with a cold L2 beside the error against float64; × is the time in units of pyrepr's fastest."""
    rows = [r for r in records if r["section"] == "time"]
    products = {r["op"].rsplit(" ", 1)[1]: r["value"] for r in records if r.get("bound", "").startswith("matrix")}
    copy = next((r["value"] for r in records if r.get("bound") == "copy"), None)
    fastest: dict[tuple, float] = {}
    for r in rows:
        if r.get("milliseconds") and r["implementation"] in ("pyrepr triton", "pyrepr cuda"):
            fastest[_gpu_case(r)] = min(fastest.get(_gpu_case(r), float("inf")), r["milliseconds"])
    lines = []
    last = None
    for r in rows:
        case = _gpu_case(r)
        op, shape, dtype = case[1:] if case != last else ("", "", "")
        last = case
        name = r.get("implementation", "")
        error = "" if r.get("error") is None else f"{float(r['error']):.0e}"
        if not r.get("milliseconds"):
            lines.append(
                f"| {op} | {shape} | {dtype} | {name} | {r.get('failure') or 'no time'} | | | | |".replace("\n", " ")
            )
            continue
        ms = r["milliseconds"]
        rate = r["flops"] / ms / 1e9
        bandwidth = r["bytes"] / ms / 1e6
        share = max(rate / products.get(dtype or case[3], float("inf")), bandwidth / copy if copy else 0)
        own = name in ("pyrepr triton", "pyrepr cuda")
        cells = [
            *(op, shape, dtype, f"**{name}**" if own else name),
            _milliseconds(ms),
            f"{ms / fastest[case]:.2f}" if case in fastest else "",
            f"{error} ({r['failure']})" if r.get("failure") else error,
            "" if r.get("peak_mib") is None else f"{r['peak_mib']:.0f}",
            f"{100 * share:.0f} %" if own and share else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = "| op | shape | dtype | implementation | ms | × | error | extra MiB | of bound |"
    return "\n".join([head, "|---|---|---|---|---:|---:|---:|---:|---:|", *lines])


def _gpu_notes(records: list[dict[str, Any]]) -> str:
    """What a family has to say about its times: the ``notes(records)`` of its module, where there is one."""
    found = []
    for family in dict.fromkeys(r["family"] for r in records if r["section"] == "time"):
        module = f"pyrepr.benchmarks.gpu.{family}"
        if importlib.util.find_spec(module) is None:  # a file of a later version, say
            continue
        notes = getattr(importlib.import_module(module), "notes", None)
        found += notes([r for r in records if r["family"] == family and r["section"] == "time"]) if notes else []
    return "\n".join(f"- {note}" for note in found)


def _gpu_case(record: dict[str, Any]) -> tuple:
    return record["family"], record["op"], record.get("shape", ""), record.get("dtype", "")


CHECKS = {
    "right": "under an assembler",
    "check": "against float64",
    "behaviour": "inside torch",
    "sanitize": "compute-sanitizer",
}


def _gpu_checks(records: list[dict[str, Any]]) -> str:
    """How many correctness and sanitizer cases passed a family, and every one that did not."""
    counts: dict[tuple[str, str], list[int]] = {}
    lines = []
    for r in records:
        what = CHECKS.get(r["section"])
        if what is None or str(r.get("failure")).startswith("not run"):
            continue
        passed = counts.setdefault((r["family"], what), [0, 0])
        passed[0] += not r.get("failure")
        passed[1] += 1
        if r.get("failure"):
            name = " ".join(str(r[key]) for key in ("op", "shape", "backend", "dtype", "tool") if r.get(key))
            lines.append(f"- {r['family']} {what}: {name}: {r['failure']}")
    skipped = sum(1 for r in records if str(r.get("failure")).startswith("not run"))
    summary = "; ".join(f"{family} {what} {good} of {all}" for (family, what), (good, all) in counts.items())
    text = f"Passed: {summary or 'nothing was checked'}." + (f" Not run: {skipped}." if skipped else "")
    return "\n".join([text, *lines])


def gpu_section(folder: Path) -> str:
    """What the README says about GPUs: every ``gpu*.json`` of the folder that comes from one, or that there is none."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu*.json"))]
    return "\n\n".join(gpu_markdown(run) for run in runs if not run["dry_run"]) or "GPU: not measured yet."


if __name__ == "__main__":
    if sys.argv[1] == "--gpu":
        print(gpu_section(Path(sys.argv[2])))
    elif sys.argv[1] == "--page":
        print(page([Path(name) for name in sys.argv[2:]]))
    else:
        with open(sys.argv[-1]) as file:
            print((summary if "--summary" in sys.argv else markdown)(json.load(file)))
