"""A network that has to remember: with a product-key memory, and its twin without. Offline, less than a minute.

    python examples/memory_layer.py results
    python examples/memory_layer.py results --steps 50   # a first look

Facts are drawn at random: two words of 128 each, and an answer out of 64. Nothing in the words says which; every fact
has to be stored. Both networks have the same embeddings, dense layers and head; one has a memory of 4096 slots beside
its hidden layer (`pyrepr.nn.ProductKeyMemory`; Lample et al. 2019, arXiv 1907.05242), which adds parameters and hardly
any work. They see the same batches in turn. At the end the shares of facts that they know are compared: with the
default settings it is an error if memory does not help.

Leaves memory_layer.json in the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import pyrepr

WORDS, ANSWERS, SEED = 128, 64, 0
LR, VALUES_LR = 2e-3, 2e-2  # of the values, ten times the rest's: a slot learns from few facts


class Network(nn.Module):
    """Two words [batch, 2] -> scores of the answers [batch, 64]."""

    def __init__(self, d: int, memory: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, d // 2)
        self.hidden = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.memory = pyrepr.nn.ProductKeyMemory(d, keys=64, k=16, heads=4) if memory else None
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, ANSWERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x).flatten(1)
        found = self.hidden(x)
        if self.memory is not None:
            found = found + self.memory(x)
        return self.head(self.norm(x + found))


def train(options: argparse.Namespace) -> dict:
    """Both networks, step by step in turn."""
    generator = torch.Generator().manual_seed(SEED)
    pairs = torch.randperm(WORDS * WORDS, generator=generator)[: options.facts]
    facts = torch.stack([pairs // WORDS, pairs % WORDS], 1)
    answers = torch.randint(ANSWERS, (options.facts,), generator=generator)
    torch.manual_seed(SEED)
    networks = {"with memory": Network(options.width, True), "twin": Network(options.width, False)}
    runs = {}
    for name, network in networks.items():
        values = [] if network.memory is None else [network.memory.values.weight]
        rest = [p for p in network.parameters() if all(p is not v for v in values)]
        groups = [{"params": rest}, *({"params": [v], "lr": VALUES_LR} for v in values)]
        optimizer = torch.optim.Adam(groups, LR, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        runs[name] = (network, optimizer, schedule, [], [])
    for _ in range(options.steps):
        chosen = torch.randint(options.facts, (options.batch,), generator=generator)
        for network, optimizer, schedule, ms, losses in runs.values():
            start = time.perf_counter()
            loss = functional.cross_entropy(network(facts[chosen]), answers[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            ms.append(1e3 * (time.perf_counter() - start))
            losses.append(loss.item())
    results = {}
    for name, (network, _, _, ms, losses) in runs.items():
        with torch.no_grad():
            known = (network(facts).argmax(1) == answers).double().mean().item()
        results[name] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "ms_per_step": statistics.median(ms),
            "known": known,
            "losses": losses,
        }
    return results


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"))
    for name, default in (("steps", 500), ("batch", 512), ("facts", 8192), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = train(options)
    written = {"facts": options.facts, "steps": options.steps, "batch": options.batch, "seed": SEED, "runs": results}
    (options.out / "memory_layer.json").write_text(json.dumps(written, indent=1) + "\n")
    for name, run in results.items():
        print(
            f"{name}: {run['parameters'] / 1e3:.0f} k parameters, {run['ms_per_step']:.1f} ms a step, "
            f"knows {run['known']:.3f} of {options.facts} facts after {options.steps} steps"
        )
    if options.steps >= 500 and not results["with memory"]["known"] > results["twin"]["known"]:
        print("the memory did not help", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
