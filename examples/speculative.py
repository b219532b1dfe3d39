"""Speculative decoding with delta-rule layers: a small model drafts, a larger one checks all its tokens in one call.

    python examples/speculative.py results              # about five minutes on two cores
    python examples/speculative.py results --steps 20   # a first look

Leviathan et al. 2023, arXiv 2211.17192, in its greedy form: the draft says the next tokens one by one, the target
computes what it would have said after each of them, and as many are kept as agree, and the target's own next token.
The text is the one that the target alone would write. Attention keeps keys that can be dropped again; a delta-rule
layer has one state in which all is added up, so its cache keeps the states before the last tokens,
pyrepr.nn.DeltaCache(rollback=n), and goes back by accept and crop.

Two byte-level language models are trained on docstrings of installed packages, offline. Leaves speculative.json in the
folder: tokens a second alone and with the draft, by how many tokens are drafted, and the share that was accepted.
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
from train_memoryformer import corpus, windows

import pyrepr

PACKAGES = ("numpy", "torch.nn", "torch.optim", "torch.distributions")


class Model(nn.Module):
    """Bytes [B, T] in, logits of the next one [B, T, 256] out: gated delta-rule layers and networks with GELU."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.layers = nn.ModuleList(
            pyrepr.nn.GatedDeltaNet(width, head_dim=32, num_heads=width // 32, expand_v=1, layer_idx=i)
            for i in range(depth)
        )
        self.networks = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor, cache: pyrepr.nn.DeltaCache | None = None) -> Tensor:
        x = self.bytes(ids)
        for layer, network, norm in zip(self.layers, self.networks, self.norms, strict=True):
            x = x + layer(norm(x), past_key_values=cache, use_cache=cache is not None)[0]
            x = x + network(x)
        return self.head(self.norm(x))


def train(model: Model, text: Tensor, args: argparse.Namespace) -> float:
    """The loss of the last tenth of the steps, in nats a byte."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    losses = []
    for _ in range(args.steps):
        starts = torch.randint(len(text) - args.context - 1, (args.batch,), generator=generator)
        x, y = windows(text, starts, args.context)
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, args.steps // 10) :]
    return sum(last) / len(last)


def alone(model: Model, prompt: Tensor, count: int) -> list[int]:
    """`count` greedy tokens after a prompt [1, T], one a call."""
    cache = pyrepr.nn.DeltaCache()
    said = [int(model(prompt, cache)[0, -1].argmax())]
    while len(said) < count:
        said.append(int(model(torch.tensor([said[-1:]]), cache)[0, -1].argmax()))
    return said


def with_draft(target: Model, draft: Model, prompt: Tensor, count: int, drafted: int) -> tuple[list[int], int, int]:
    """The same tokens; and how many were drafted, and how many of these accepted."""
    cache, draft_cache = (pyrepr.nn.DeltaCache(rollback=drafted + 1) for _ in range(2))
    draft(prompt, draft_cache)
    said = [int(target(prompt, cache)[0, -1].argmax())]  # the last one has been read by neither model
    total = accepted = 0
    while len(said) < count:
        guesses = said[-1:]
        for _ in range(drafted):
            guesses.append(int(draft(torch.tensor([guesses[-1:]]), draft_cache)[0, -1].argmax()))
        draft(torch.tensor([guesses[-1:]]), draft_cache)  # in case all are right
        own = target(torch.tensor([guesses]), cache)[0].argmax(-1).tolist()  # after each guess
        right = next((i for i in range(drafted) if guesses[i + 1] != own[i]), drafted)
        cache.accept(right + 1)
        draft_cache.crop(cache.get_seq_length())
        said += own[: right + 1]
        total, accepted = total + drafted, accepted + right
    return said[:count], total, accepted


def measured(models: tuple[Model, Model], text: Tensor, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and tokens of all ways, prompt by prompt in turn, so that they compare."""
    target, draft = models
    ways = ["alone", *map(str, args.drafted)]
    seconds, counts = dict.fromkeys(ways, 0.0), {way: [0, 0] for way in ways}
    for i in range(args.prompts):
        start = len(text) * i // args.prompts
        prompt = text[None, start : start + args.context]
        expected: list[int] = []
        for way in ways:
            begin = time.perf_counter()
            if way == "alone":
                expected = alone(target, prompt, args.tokens)
            else:
                said, total, accepted = with_draft(target, draft, prompt, args.tokens, int(way))
                if said != expected:
                    raise SystemExit("the text with a draft is not the one without")
                counts[way][0] += total
                counts[way][1] += accepted
            seconds[way] += time.perf_counter() - begin
    runs: dict[str, dict[str, float]] = {}
    for way in ways:
        runs[way] = {"tokens a second": args.prompts * args.tokens / seconds[way]}
        if way != "alone":
            runs[way]["accepted"] = counts[way][1] / counts[way][0]
    return runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    for name, default in (("steps", 400), ("batch", 16), ("context", 128), ("prompts", 8), ("tokens", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--drafted", type=int, nargs="+", default=[2, 4, 6], help="tokens drafted at a time")
    parser.add_argument("--width", type=int, default=256, help="of the target; the draft has a quarter")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="whose docstrings are the text")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    text, unseen = corpus(args.packages)
    models = Model(args.width, 4), Model(args.width // 4, 1)
    losses = [train(model, text, args) for model in models]
    for model in models:
        model.eval()
    with torch.inference_mode():
        runs = measured(models, unseen, args)
    args.out.mkdir(parents=True, exist_ok=True)
    written = {"losses": dict(zip(("target", "draft"), losses, strict=True)), "runs": runs}
    (args.out / "speculative.json").write_text(json.dumps(written, indent=1) + "\n")
    print(f"losses in nats a byte: target {losses[0]:.3f}, draft {losses[1]:.3f}")
    for way, run in runs.items():
        share = f", {run['accepted']:.0%} accepted" if "accepted" in run else ""
        print(f"{way if way == 'alone' else way + ' drafted'}: {run['tokens a second']:.0f} tokens a second{share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
