"""A small MemoryFormer language model and its dense twin, trained side by side on docstrings, byte by byte. Offline.

    python examples/train_memoryformer.py results              # about fifteen minutes on two cores
    python examples/train_memoryformer.py results --steps 20   # a first look

They see the same batches in the same order, in turn, so that their times compare; the twin is the usual transformer of
the same width, heads and depth. The MemoryFormer trains with three times the learning rate, as in the paper
(Ding et al. 2024, arXiv 2411.12992), a copy of it with the twin's, one that hashes to sign and magnitude (two bits an
element, twice the tables) with three times, and all with the weighting of the released code:
the probability in the paper's text is small (0.15 at 8 bits), tables have to be large to make up for it, and Adam's
steps change large tables little (--weighting probability shows it). Dense Adam for all: a batch of two thousand bytes
reads five of six rows of the tables at the start, so row-sparse gradients would save little; at a few tokens a step
they would.

Leaves train_memoryformer.json and the plot train_memoryformer.png in the folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from docstrings import docstrings
from torch import Tensor, nn
from torch.nn import functional

import pyrepr
from pyrepr.nn.memoryformer import rotated

PACKAGES = ("numpy", "torch.nn", "torch.optim", "torch.distributions")
LR = 1e-3  # of the dense twin; the MemoryFormer gets three times as much
SEED = 0


class Transformer(nn.Module):
    """A decoder over bytes: an embedding, blocks whose attention knows places (rotary), a norm and a dense head.

    Shape: [batch, s] integers from 0 to 255 -> [batch, s, 256].
    """

    def __init__(self, block: Callable[[], nn.Module], d: int, depth: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, d)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 256)
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x))))


class MemoryFormer(Transformer):
    """A language model whose blocks multiply no matrix but attention's; the head stays dense, as in the paper."""

    def __init__(self, d: int = 128, heads: int = 4, depth: int = 4, **options) -> None:
        super().__init__(lambda: pyrepr.nn.MemoryFormerBlock(d, heads, rotary=True, **options), d, depth)


class DenseBlock(nn.Module):
    """The usual block: x + attention(norm(x)), then x + MLP(norm(x)) with GELU and four times the width inside."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.attention_norm(x)).chunk(3, -1)
        )  # [batch, heads, s, d / heads]
        attended = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class DenseTwin(Transformer):
    def __init__(self, d: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__(lambda: DenseBlock(d, heads), d, depth)


def corpus(packages: list[str]) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and those of a twentieth of the docstrings to validate on."""
    texts = docstrings(packages)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(SEED)).tolist()
    split = max(1, len(texts) // 20)
    parts = ("\n\n".join(texts[i] for i in part) for part in (order[split:], order[:split]))
    train, validation = (torch.frombuffer(bytearray(part, "utf-8"), dtype=torch.uint8).long() for part in parts)
    return train, validation


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs [batch, context] and what follows each of their bytes."""
    index = starts[:, None] + torch.arange(context)
    return text[index], text[index + 1]


class Run:
    """One model in training."""

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.95), fused=True)
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, 1.0, warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps - warmup), 0.1 * lr),
            ],
            [warmup],
        )
        self.lr, self.ms, self.train, self.validation = lr, [], [], []

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        loss = self.loss(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ms.append(1e3 * (time.perf_counter() - start))
        self.train.append(loss.item())

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> None:
        losses = [self.loss(*part) for part in zip(x.split(16), y.split(16), strict=True)]
        self.validation.append([len(self.train), torch.stack(losses).mean().item()])

    def state(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return {**parts, "history": (self.ms, self.train, self.validation)}

    def load(self, state: dict) -> None:
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.ms, self.train, self.validation = state["history"]

    def result(self) -> dict:
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "lr": self.lr,
            "ms_per_step": statistics.median(self.ms),
            "train": self.train,
            "validation": self.validation,
        }


def train(options: argparse.Namespace) -> dict:
    """All models, step by step in turn; the results. Goes on from the last validation if it was interrupted."""
    text, unseen = corpus(options.packages)
    torch.manual_seed(SEED)
    shape = {"d": options.width, "heads": 4, "depth": options.depth}
    model = MemoryFormer(**shape, bits=options.bits, weighting=options.weighting)
    runs = {
        "MemoryFormer": Run(model, 3 * LR, options.steps),
        "MemoryFormer at the twin's rate": Run(copy.deepcopy(model), LR, options.steps),
        "dense twin": Run(DenseTwin(**shape), LR, options.steps),
    }
    torch.manual_seed(SEED)
    two_bits = MemoryFormer(**shape, bits=options.bits, weighting=options.weighting, hash="two_bit")
    runs["MemoryFormer, two bits"] = Run(two_bits, 3 * LR, options.steps)
    generator = torch.Generator().manual_seed(SEED)

    def draw(source: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return windows(
            source, torch.randint(len(source) - options.context, (count,), generator=generator), options.context
        )

    fixed = draw(unseen, 4 * options.batch)
    checkpoint, start = options.out / "train_memoryformer.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, run in runs.items():
            run.load(state[name])
        start = len(run.train)
        generator.set_state(state["generator"])
    every = max(1, options.steps // 20)
    for step in range(start, options.steps):
        batch = draw(text, options.batch)
        for run in runs.values():
            run.step(*batch)
        if (step + 1) % every == 0 or step + 1 == options.steps:
            for run in runs.values():
                run.validate(*fixed)
            line = (f"{name} {run.validation[-1][1]:.3f} ({run.ms[-1]:.0f} ms)" for name, run in runs.items())
            print(f"step {step + 1}: validation loss, nats a byte: " + ", ".join(line), flush=True)
            states = {name: run.state() for name, run in runs.items()}
            torch.save({**states, "generator": generator.get_state()}, checkpoint)
    checkpoint.unlink()
    result = {
        "bytes": len(text),
        "context": options.context,
        "batch": options.batch,
        "bits": options.bits,
        "weighting": options.weighting,
        "seed": SEED,
        **shape,
    }
    return {**result, "runs": {name: run.result() for name, run in runs.items()}}


def plot(result: dict, path: Path) -> None:
    """Loss by step and by time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for (name, run), colour in zip(result["runs"].items(), ("#21918c", "#8fd744", "#3b528b", "#d1495b"), strict=True):
        steps = range(1, len(run["train"]) + 1)
        by_step.plot(steps, run["train"], color=colour, linewidth=0.7, alpha=0.35)
        at, losses = zip(*run["validation"], strict=True)
        label = f"{name}, {run['parameters'] / 1e6:.1f} M parameters, lr {run['lr']:g}"
        by_step.plot(at, losses, color=colour, label=label)
        by_time.plot([run["ms_per_step"] * step / 1e3 for step in at], losses, color=colour)
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds of training (median step × steps)")
    by_step.set_ylabel("loss, nats a byte")
    by_step.legend(fontsize=7)
    for axes in (by_step, by_time):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Validation loss on docstrings (thin: training batches)", fontsize=10)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"))
    for name, default in (("steps", 1000), ("batch", 16), ("context", 128), ("width", 128), ("depth", 4), ("bits", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weighting", default="scaled", choices=("scaled", "probability"), help="of the tables")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), help="whose docstrings are the text")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    result = train(options)
    (options.out / "train_memoryformer.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.out / "train_memoryformer.png")
    for name, run in result["runs"].items():
        at, loss = run["validation"][-1]
        print(
            f"{name}: {run['parameters'] / 1e6:.2f} M parameters, {run['ms_per_step']:.0f} ms a step, "
            f"validation loss {loss:.3f} nats a byte after {at} steps"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
