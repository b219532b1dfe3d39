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
PHASES = {"prefill": "the prompt", "decode": "a token"}


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


def implementations(module: ModuleType) -> dict[str, dict[str, Callable]]:
    """What the module calls in either run: run → name → function."""
    with accelerated.enabled():
        ours = {name: getattr(module, name) for name in FUNCTIONS}
    # Unwrapped, since an installed flash-linear-attention would be called, and does not run on a CPU.
    return {"fallback": {name: inspect.unwrap(getattr(module, name)) for name in FUNCTIONS}, "pyrepr": ours}


@contextlib.contextmanager
def using(module: ModuleType, functions: dict[str, Callable], clocks: dict[str, float] | None) -> Iterator[None]:
    """The module calls these functions; the time inside them is added to `clocks`."""

    def clocked(function: Callable, key: str, sums: dict[str, float]) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            sums[key] += time.perf_counter() - start
            return result

        return call

    before = {name: getattr(module, name) for name in FUNCTIONS}
    for name, function in functions.items():
        setattr(module, name, function if clocks is None else clocked(function, FUNCTIONS[name], clocks))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


class Run:
    """A text in the making: its cache, its tokens, and what each step took in seconds."""

    def __init__(self, model: Any, module: ModuleType, functions: dict[str, Callable], prompt: Tensor) -> None:
        import transformers

        self.model, self.module, self.functions = model, module, functions
        self.cache = transformers.DynamicCache(config=model.config)
        self.given, self.written = prompt, []
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        clocks = {"rule": 0.0, "convolution": 0.0}
        with using(self.module, self.functions, clocks):
            start = time.perf_counter()
            logits = self.model(self.given, past_key_values=self.cache, logits_to_keep=1).logits
            self.given = logits[:, -1:].argmax(-1)
            whole = time.perf_counter() - start
        self.written.append(self.given)
        self.steps.append({"all": whole, **clocks, "rest": whole - sum(clocks.values())})


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


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """In milliseconds, of every kind of time."""
    return {key: 1e3 * statistics.median(step[key] for step in steps) for key in steps[0]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, ready for JSON. The runs take turns prompt by prompt, and then token by token."""
    model, module = build(args.layers, args.hidden, args.heads)
    functions = implementations(module)
    prompt = torch.randint(1, 32768, (1, args.prompt), generator=torch.Generator().manual_seed(1))
    profiles = {}
    with torch.no_grad():
        rounds = []
        for _ in range(args.rounds + 1):  # the first warms up
            rounds.append({name: Run(model, module, functions[name], prompt) for name in RUNS})
            for run in rounds[-1].values():
                run.step()
        last = rounds[-1]
        for _ in range(args.tokens - 1):
            for run in last.values():
                run.step()
        for name in RUNS:
            with using(module, functions[name], None):
                profiles[name] = profile(model, prompt, args.profiled)
    first, second = (torch.cat(run.written, 1) for run in last.values())
    return {
        "machine": machine(),
        "model": {name: getattr(args, name) for name in ("layers", "hidden", "heads", "prompt", "tokens", "rounds")},
        "same_tokens": int((first == second).int().cumprod(1).sum()),
        "milliseconds": {
            name: {
                "prefill": medians([r[name].steps[0] for r in rounds[1:]]),
                "decode": medians(last[name].steps[1:]),
            }
            for name in RUNS
        },
        "profile_milliseconds": profiles,
    }


def report(result: dict[str, Any]) -> str:
    """The numbers as text."""
    ms = result["milliseconds"]
    lines = [f"same tokens: the first {result['same_tokens']} of {result['model']['tokens']}"]
    for phase, what in PHASES.items():
        lines.append(f"{phase + ', ' + what:<22}{'fallback':>12}{'pyrepr':>12}{'ratio':>9}")
        rows = {key: [ms[run][phase][key] for run in RUNS] for key in ("all", "rule", "convolution", "rest")}
        rows["rule + convolution"] = [a + b for a, b in zip(rows["rule"], rows["convolution"], strict=True)]
        for key, (slow, fast) in rows.items():
            lines.append(f"  {key:<20}{slow:9.3f} ms{fast:9.3f} ms{slow / fast:8.2f}x")
        (_, whole), *top = result["profile_milliseconds"]["pyrepr"][phase]
        lines.append("  left, by torch.profiler: " + ", ".join(f"{n} {100 * t / whole:.0f} %" for n, t in top[:8]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    for name, default in (("layers", 4), ("hidden", 1024), ("heads", 16), ("prompt", 2048), ("tokens", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5, help="prompts read by either run")
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
