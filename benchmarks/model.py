"""A whole model, on transformers' PyTorch fallback and on pyrepr: ``python -m pyrepr.benchmarks.model --json FILE``.

A model of Qwen3.5's type with random weights reads a prompt and writes tokens greedily, with a cache. Both runs take
turns in one process. The time inside the rule and the convolution is taken by a clock around the functions that the
model calls; what is left is told by torch's profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pyrepr.benchmarks.harness import machine
from torch import Tensor

from pyrepr.integrations import transformers as accelerated

FUNCTIONS = {
    "torch_chunk_gated_delta_rule": "rule",
    "torch_recurrent_gated_delta_rule": "rule",
    "causal_conv1d_fn": "convolution",
    "causal_conv1d_update": "convolution",
}
RUNS = ("fallback", "pyrepr")
PHASES = ("prefill", "decode")


def build(layers: int, hidden: int, heads: int) -> tuple[Any, ModuleType]:
    """A model like Qwen3.5 0.8B with `layers`, of which three of four are linear, and 32768 words; and its module."""
    import transformers
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(
        vocab_size=32768,
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, heads // 2),
        num_key_value_heads=max(1, heads // 8),
        head_dim=256,
        layer_types=[("full" if i % 4 == 3 else "linear") + "_attention" for i in range(layers)],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.Qwen3_5ForCausalLM(config).eval(), module


@contextlib.contextmanager
def functions_of(run: str, module: ModuleType, clocks: dict[str, float] | None) -> Iterator[None]:
    """The module's functions of a run; the time inside them is added to `clocks`."""

    def clocked(function: Callable, key: str, sums: dict[str, float]) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            sums[key] += time.perf_counter() - start
            return result

        return call

    with accelerated.enabled() if run == "pyrepr" else contextlib.nullcontext():
        before = {name: getattr(module, name) for name in FUNCTIONS}
        for name, key in FUNCTIONS.items():
            # Unwrapped, since an installed flash-linear-attention would be called, and does not run on a CPU.
            function = inspect.unwrap(before[name]) if run == "fallback" else before[name]
            setattr(module, name, function if clocks is None else clocked(function, key, clocks))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(module, name, function)


def generate(model: Any, prompt: Tensor, tokens: int, clocks: dict[str, float]) -> tuple[Tensor, dict[str, Any]]:
    """The tokens written, and seconds per phase: in all, in the rule, in the convolution."""
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    seconds: dict[str, Any] = {}
    written, given = [], prompt
    for phase, steps in zip(PHASES, (1, tokens - 1), strict=True):
        clocks.update(rule=0.0, convolution=0.0)
        start = time.perf_counter()
        for _ in range(steps):
            given = model(given, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            written.append(given)
        seconds[phase] = {"all": time.perf_counter() - start, **clocks}
    return torch.cat(written, 1), seconds


def profile(model: Any, prompt: Tensor, tokens: int, top: int = 12) -> dict[str, list[tuple[str, float]]]:
    """Per phase the operations with the most time of their own, in milliseconds, the phase's whole time first."""
    import transformers
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    cache = transformers.DynamicCache(config=model.config)
    tables = {}
    for phase, given in (("prefill", [prompt]), ("decode", [prompt[:, :1]] * tokens)):
        with watch(activities=[ProfilerActivity.CPU]) as profiler:
            for ids in given:
                model(ids, past_key_values=cache, logits_to_keep=1)
        events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
        whole = sum(e.self_cpu_time_total for e in events)
        tables[phase] = [("all", whole / 1e3), *((e.key, e.self_cpu_time_total / 1e3) for e in events[:top])]
    return tables


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, ready for JSON."""
    model, module = build(args.layers, args.hidden, args.heads)
    prompt = torch.randint(1, 32768, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[dict[str, Any]]] = {run: [] for run in RUNS}
    written, profiles = {}, {}
    with torch.no_grad():
        for round_number in range(args.rounds + 1):
            for run in RUNS:
                clocks: dict[str, float] = {}
                with functions_of(run, module, clocks):
                    written[run], seconds = generate(model, prompt, args.tokens, clocks)
                if round_number:  # the first warms up
                    times[run].append(seconds)
        for run in RUNS:
            with functions_of(run, module, None):
                profiles[run] = profile(model, prompt, args.profiled)
    same = int((written["fallback"] == written["pyrepr"]).int().cumprod(1).sum())
    return {
        "machine": machine(),
        "model": {name: getattr(args, name) for name in ("layers", "hidden", "heads", "prompt", "tokens", "rounds")},
        "same_tokens": same,
        "milliseconds": {
            run: {
                phase: {key: 1e3 * statistics.median(t[phase][key] for t in times[run]) for key in times[run][0][phase]}
                for phase in PHASES
            }
            for run in RUNS
        },
        "profile_milliseconds": profiles,
    }


def report(result: dict[str, Any]) -> str:
    """The numbers as text."""
    ms = result["milliseconds"]
    lines = [f"same tokens: the first {result['same_tokens']} of {result['model']['tokens']}"]
    for phase in PHASES:
        lines.append(f"{phase:<10}{'fallback':>12}{'pyrepr':>12}{'ratio':>9}")
        rows = {key: [ms[run][phase][key] for run in RUNS] for key in ("all", "rule", "convolution")}
        rows["rule + convolution"] = [a + b for a, b in zip(rows["rule"], rows["convolution"], strict=True)]
        rows["rest"] = [a - b for a, b in zip(rows["all"], rows["rule + convolution"], strict=True)]
        for key, (slow, fast) in rows.items():
            lines.append(f"  {key:<20}{slow:9.1f} ms{fast:9.1f} ms{slow / fast:8.2f}x")
        (_, whole), *top = result["profile_milliseconds"]["pyrepr"][phase]
        lines.append("  left, by torch.profiler: " + ", ".join(f"{n} {100 * t / whole:.0f} %" for n, t in top[:8]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    for name, default in (("layers", 4), ("hidden", 1024), ("heads", 16), ("prompt", 2048), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profiled", type=int, default=16, help="decoded tokens under the profiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    args = parser.parse_args()
    result = measure(args)
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
