"""Multi-query associative recall with keys that change their value: the delta rule recalls, additive attention fails.

    pip install ".[plot]"
    python examples/recall.py results

A text writes values under keys, some keys more than once, then asks for all keys in another order; the model is to say
the values that were written last (multi-query recall as in Arora et al. 2023, arXiv 2312.04927, with the rewritten keys
of Schlag et al. 2021, arXiv 2102.11174). Two models of two layers are trained on the same texts from the same start:
pyrepr.nn.DeltaNet, S ← S + β k (v − Sᵀk)ᵀ, and the same layer without the term that erases, S ← S + β k vᵀ, which is
additive linear attention. Leaves recall.json and recall.png in the folder; a few minutes on two cores.
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


class AdditiveAttention(pyrepr.nn.DeltaNet):
    """The same layer with o_t = scale · Σ_{s≤t} β_s (q_t·k_s) v_s."""

    def _attend(self, x, q, k, v, options):
        beta = self.b_proj(x).sigmoid()
        q, k = (functional.normalize(y, dim=-1) for y in (q, k))
        scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * q.shape[-1] ** -0.5
        return torch.einsum("bhts,bshv->bthv", scores, beta[..., None] * v), None


LAYERS = {"delta rule": pyrepr.nn.DeltaNet, "additive": AdditiveAttention}


class Model(nn.Module):
    """Embedding, two layers with a residual each, and the embedding again as read-out. [B, T] -> [B, T, vocabulary]."""

    def __init__(self, layer: type[pyrepr.nn.DeltaNet], vocabulary: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(layer(hidden_size=width, num_heads=heads) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(norm(x))[0]
        return functional.linear(self.norms[2](x), self.embedding.weight)


def texts(batch: int, keys: int, writes: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [batch, 2 · keys · writes + keys]: key, value, key, value, …, then the keys; and the answers [batch, keys].

    Every one of a text's keys is written `writes` times, in random order, with a new value each time. The first half
    of the vocabulary are keys, the second half values.
    """
    half = vocabulary // 2
    chosen = torch.rand(batch, half, generator=generator).argsort(1)[:, :keys]
    order = torch.rand(batch, keys * writes, generator=generator).argsort(1) % keys  # which key is written when
    values = torch.randint(half, vocabulary, order.shape, generator=generator)
    asked = torch.rand(batch, keys, generator=generator).argsort(1)
    pairs = torch.stack([chosen.gather(1, order), values], 2).flatten(1)
    when = (order[:, None] == asked[..., None]) * torch.arange(1, order.shape[1] + 1)  # [batch, keys, keys · writes]
    return torch.cat([pairs, chosen.gather(1, asked)], 1), values.gather(1, when.argmax(2))


def recall(model: Model, writes: int, args: argparse.Namespace) -> float:
    """Share of the values said right, over texts that training has not seen."""
    ids, answers = texts(args.evaluated, args.keys, writes, args.vocabulary, torch.Generator().manual_seed(1 << 20))
    with torch.no_grad():
        said = model(ids)[:, -args.keys :].argmax(-1)
    return (said == answers).float().mean().item()


def train(name: str, args: argparse.Namespace) -> dict:
    """One model: its recall while it learns and in the end, by how often keys were written, and the seconds it took."""
    torch.manual_seed(args.seed)
    model = Model(LAYERS[name], args.vocabulary, args.width, args.heads)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=args.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    curve, start = [], time.perf_counter()
    for step in range(args.steps):
        writes = args.writes[step % len(args.writes)]
        ids, answers = texts(args.batch, args.keys, writes, args.vocabulary, generator)
        loss = functional.cross_entropy(model(ids)[:, -args.keys :].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, args.steps // 20) == 0:
            curve.append([step + 1, recall(model, max(args.writes), args)])
            print(f"{name:>10}  step {step + 1:5}  loss {loss.item():.3f}  recall {curve[-1][1]:.3f}", flush=True)
    seconds = time.perf_counter() - start
    return {"curve": curve, "recall": {w: recall(model, w, args) for w in args.writes}, "seconds": seconds}


def draw(results: dict[str, dict], args: argparse.Namespace, path: Path) -> None:
    """Recall while learning, and in the end by how often each key was written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    learning, end = figure.subplots(1, 2, sharey=True)
    for name, result in results.items():
        learning.plot(*zip(*result["curve"], strict=True), marker=".", label=name)
        end.plot(list(result["recall"]), list(result["recall"].values()), marker="o", label=name)
    learning.set(xlabel="training step", ylabel="share of values recalled", ylim=(0, 1.03))
    learning.set_title(f"every key written {max(args.writes)} times")
    end.set(xlabel="times every key was written", title="after training")
    end.set_xscale("log", base=2)
    end.set_xticks(args.writes, [str(w) for w in args.writes])
    for axes in (learning, end):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--keys", type=int, default=8, help="in a text")
    parser.add_argument("--writes", type=int, nargs="+", default=[1, 2, 4, 8], help="of every key; texts take turns")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--evaluated", type=int, default=200, help="texts per number")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {name: train(name, args) for name in LAYERS}
    options = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "recall.json").write_text(json.dumps({"options": options, "results": results}, indent=1) + "\n")
    draw(results, args, args.out / "recall.png")
    for name, result in results.items():
        shown = "  ".join(f"{writes}: {share:.3f}" for writes, share in result["recall"].items())
        print(f"{name:>10}  recall by writes of a key  {shown}  ({result['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
