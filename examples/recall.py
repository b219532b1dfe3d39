"""Multi-query associative recall: the delta rule recalls where additive linear attention fails.

    pip install ".[plot]"
    python examples/recall.py results

A text gives pairs of a key and a value, then asks for all keys in another order; the model is to say the values (Arora
et al. 2023, "Zoology", arXiv 2312.04927). Two models of two layers are trained on the same texts from the same start:
pyrepr.nn.DeltaNet, and the same without its erasing term, S ← S + β k vᵀ, which is additive linear attention. Leaves
recall.json and recall.png in the folder; a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import pyrepr

RULES = {"delta rule": pyrepr.nn.DeltaNet}


class AdditiveAttention(pyrepr.nn.DeltaNet):
    """The same layer with o_t = scale · Σ_{s≤t} β_s (q_t·k_s) v_s: nothing is erased before it is written."""

    def _attend(self, x, q, k, v, beta, options):
        q, k = (functional.normalize(y, dim=-1) for y in (q, k))
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * q.shape[-1] ** -0.5
        return torch.einsum("bhts,bshv->bthv", scores, beta[..., None] * v), None


RULES["additive"] = AdditiveAttention


class Model(nn.Module):
    """Embedding, two layers with a residual each, and a linear read-out. ids: [B, T] -> [B, T, vocabulary]."""

    def __init__(self, layer: type[pyrepr.nn.DeltaNet], vocabulary: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(layer(hidden_size=width, num_heads=heads) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(norm(x))[0]
        return self.head(self.norms[2](x))


def texts(batch: int, pairs: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [batch, 3 · pairs]: key, value, key, value, …, then the keys shuffled; and the values asked for, in order.

    The first half of the vocabulary are keys, of which a text has no two alike, the second half values.
    """
    half = vocabulary // 2
    keys = torch.rand(batch, half, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(half, vocabulary, (batch, pairs), generator=generator)
    order = torch.rand(batch, pairs, generator=generator).argsort(1)
    ids = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
    return ids, values.gather(1, order)


def accuracy(model: Model, pairs: int, args: argparse.Namespace) -> float:
    """Share of the values said right, over texts that training has not seen."""
    ids, answers = texts(args.evaluated, pairs, args.vocabulary, torch.Generator().manual_seed(1 << 20))
    with torch.no_grad():
        said = model(ids)[:, 2 * pairs :].argmax(-1)
    return (said == answers).float().mean().item()


def train(name: str, args: argparse.Namespace) -> dict:
    """One model: its accuracies while it learns and in the end, for every number of pairs, and the seconds it took."""
    torch.manual_seed(args.seed)
    model = Model(RULES[name], args.vocabulary, args.width, args.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    curve, start = [], time.perf_counter()
    for step in range(args.steps):
        pairs = args.pairs[step % len(args.pairs)]
        ids, answers = texts(args.batch, pairs, args.vocabulary, generator)
        loss = functional.cross_entropy(model(ids)[:, 2 * pairs :].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, args.steps // 20) == 0:
            curve.append([step + 1, accuracy(model, max(args.pairs), args)])
            print(f"{name:>10}  step {step + 1:5}  loss {loss.item():.3f}  recall {curve[-1][1]:.3f}", flush=True)
    seconds = time.perf_counter() - start
    return {"curve": curve, "recall": {pairs: accuracy(model, pairs, args) for pairs in args.pairs}, "seconds": seconds}


def draw(results: dict[str, dict], args: argparse.Namespace, path: Path) -> None:
    """Recall while learning, and in the end over the number of pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    learning, capacity = figure.subplots(1, 2, sharey=True)
    for name, result in results.items():
        learning.plot(*zip(*result["curve"], strict=True), marker=".", label=name)
        capacity.plot(list(result["recall"]), list(result["recall"].values()), marker="o", label=name)
    learning.set(
        xlabel="training step", ylabel="share of values recalled", title=f"{max(args.pairs)} pairs", ylim=(0, 1.03)
    )
    capacity.set(xlabel="pairs in a text", title=f"after training, head width {args.width // args.heads}")
    capacity.set_xscale("log", base=2)
    capacity.set_xticks(args.pairs, [str(p) for p in args.pairs])
    for axes in (learning, capacity):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--evaluated", type=int, default=100, help="texts per accuracy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {name: train(name, args) for name in RULES}
    options = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "recall.json").write_text(json.dumps({"options": options, "results": results}, indent=1) + "\n")
    draw(results, args, args.out / "recall.png")
    for name, result in results.items():
        shown = "  ".join(f"{pairs}: {share:.3f}" for pairs, share in result["recall"].items())
        print(f"{name:>10}  recall by pairs  {shown}  ({result['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
