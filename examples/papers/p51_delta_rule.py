"""A linear attention that overwrites: what was written last under a key is found, and all tokens at once."""

from __future__ import annotations

import torch
from pyrepr.papers._row import Chart, Finding, Paper

from pyrepr import chunk_delta_rule

PAPER = Paper(
    51,
    "Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024",
    "S ← S + β k (v − Sᵀk)ᵀ; in chunks, products of Householder-like matrices in WY form",
    "in chunks the outputs are those token by token (to 1e-5); of 24 keys written twice, the last value is the nearest "
    "to what is read for 90 % of keys, and for at most 65 % where values are only added",
)
KEYS, WIDTH, TASKS = 24, 64, 16


def run() -> Finding:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(TASKS, KEYS, WIDTH, generator=generator)
    keys = keys / keys.norm(dim=2, keepdim=True)
    values = torch.randn(TASKS, 2 * KEYS, WIDTH, generator=generator)
    order = torch.stack([torch.randperm(KEYS, generator=generator) for _ in range(TASKS)])
    again = keys.gather(1, order[:, :, None].expand(-1, -1, WIDTH))
    written = torch.cat([keys, again], 1)
    q = torch.cat([written, again], 1)
    k, v = (torch.cat([z, torch.zeros_like(again)], 1) for z in (written, values))
    rates = torch.cat([torch.ones(TASKS, 2 * KEYS), torch.zeros(TASKS, KEYS)], 1)[:, :, None]
    inputs = [z[:, :, None] for z in (q, k, v)]
    by_chunks = chunk_delta_rule(*inputs, rates, scale=1.0)[0][:, :, 0]
    state, read = torch.zeros(TASKS, WIDTH, WIDTH), []
    for step in range(q.shape[1]):
        key = k[:, step, :, None]
        state = state + rates[:, step, :, None] * key @ (v[:, step, None] - key.mT @ state)
        read.append(q[:, step, None] @ state)
    by_tokens = torch.cat(read, 1)
    off = float((by_chunks - by_tokens).abs().max() / by_tokens.abs().max())
    added = again @ (written.mT @ values)
    truth = KEYS + torch.arange(KEYS)
    found = {
        name: float((torch.cdist(read, values).argmin(2) == truth).float().mean())
        for name, read in (("delta rule", by_chunks[:, -KEYS:]), ("added up", added))
    }
    text = f"off by {off:.0e}; last value found {', '.join(f'{name} {rate:.2f}' for name, rate in found.items())}"
    chart = Chart({"found": list(found.values())}, list(found), "", "last value is the nearest")
    holds = off < 1e-5 and found["delta rule"] >= 0.9 and found["added up"] <= 0.65
    return Finding(text, holds, {"off": off, **found}, chart)
