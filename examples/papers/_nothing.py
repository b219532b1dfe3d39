"""Papers of which nothing honest can be shown on two cores with these functions, and why."""

from __future__ import annotations

NOTHING = {
    16: "it needs a vision-language model, and one query row is no work for a kernel",
    20: "it attributes outputs to inputs, which nothing here computes",
    22: "of it only the nearest code could be shown, and 32 shows that",
    24: "a survey, without a claim of its own",
    40: "no function here computes a part of it",
    42: "no function here computes a part of it",
    45: "it proposes no computation",
    48: "its regulariser is one cosine",
    53: "attention on graphs, which nothing here computes",
    61: "a bilinear product; its hashed inputs are torch.nn.functional.embedding_bag",
    63: "detection, which nothing here computes",
    66: "scaling laws of generators need generators of many sizes",
}
