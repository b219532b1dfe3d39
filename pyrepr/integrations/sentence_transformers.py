"""Trains sentence-transformers' models on pyrepr's contrastive losses; scripts stay as they are.

    import pyrepr.integrations.sentence_transformers as accelerated

    accelerated.enable()  # and accelerated.disable() to undo it

Afterwards ``MultipleNegativesRankingLoss`` (and losses that inherit from it) hold no matrix of scores, and
``MatryoshkaLoss`` around it runs the model once and shares one product among all dimensions; ``Matryoshka2dLoss`` is
made of the two. That covers cosine and dot product, gathering across devices, and the directions "query_to_doc" alone
or with "doc_to_query" per direction. What else these losses can be told (hardness weighting, joint partitions over more
directions, another similarity) runs as before, and a warning says so once.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyrepr._optional import require
from pyrepr.functional.pairs import info_nce

__all__ = ["disable", "enable"]

TESTED = "6.2"
INSTALL = "sentence-transformers"
LOSSES = "sentence_transformers.sentence_transformer.losses"

_originals: dict[tuple[type, str], Any] = {}
_warned: set[str] = set()


def enable() -> None:
    """Puts pyrepr's losses under sentence-transformers', those already made and those still to come.

    Raises:
        ImportError: if sentence-transformers is missing, or lacks what this replaces.
    """
    if _originals:
        return
    losses = require(LOSSES, INSTALL)
    wanted = (
        (losses.MultipleNegativesRankingLoss, "compute_loss_from_embeddings", _ranking),
        (losses.MatryoshkaLoss, "forward", _matryoshka),
    )
    for owner, name, _ in wanted:
        if name not in vars(owner):
            version = require("sentence_transformers", INSTALL).__version__
            raise ImportError(
                f"sentence-transformers {version} has no {owner.__name__}.{name}, which pyrepr replaces; the tested "
                f"version is {TESTED}"
            )
    for owner, name, replacement in wanted:
        original = vars(owner)[name]
        _originals[owner, name] = original
        setattr(owner, name, _method(replacement, original))


def _method(replacement: Any, original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return replacement(self, original, *args, **kwargs)

    return method


def disable() -> None:
    """Undoes :func:`enable`."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def _why_not(loss: Any) -> str | None:
    """What of a ranking loss's options pyrepr does not compute, or ``None``."""
    util = require("sentence_transformers.util", INSTALL)
    if loss.similarity_fct not in (util.cos_sim, util.dot_score):
        return "a similarity other than cos_sim and dot_score"
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        return "hardness weighting"
    both = set(loss.directions) == {"query_to_doc", "doc_to_query"} and loss.partition_mode == "per_direction"
    if set(loss.directions) != {"query_to_doc"} and not both:
        return f"directions {', '.join(loss.directions)} with partition_mode {loss.partition_mode!r}"
    return None


def _leaves(loss: Any, why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"{type(loss).__name__} with {why} runs on sentence-transformers' own code", stacklevel=4)


def _ranking(self: Any, original: Any, embeddings: list[Tensor], labels: Tensor) -> Tensor:
    if why := _why_not(self):
        _leaves(self, why)
        return original(self, embeddings, labels)
    return _of_embeddings(self, embeddings)


def _of_embeddings(
    loss: Any, embeddings: list[Tensor], prefixes: list[int] | None = None, weights: list[float] | None = None
) -> Tensor:
    """The ranking loss of [n, d] queries and [n, d] columns of documents, the positives first."""
    if len(embeddings) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
    util = require("sentence_transformers.util", INSTALL)
    queries, *documents = embeddings
    n, offset = len(queries), 0
    everyone = queries
    if loss.gather_across_devices:
        documents = [util.all_gather_with_grad(x) for x in documents]
        everyone, offset = util.all_gather_with_grad(queries), util.get_rank() * n
    # A prefix of Matryoshka is normalised whatever the similarity is, as sentence-transformers' is.
    options = {
        "labels": torch.arange(n, device=queries.device) + offset,
        "directions": "rows",
        "normalize": loss.similarity_fct is util.cos_sim or prefixes is not None,
        "prefixes": prefixes,
        "weights": weights,
    }
    found = info_nce(queries, torch.cat(documents), loss.scale, **options)
    if "doc_to_query" in loss.directions:
        found = (found + info_nce(documents[0][offset : offset + n], everyone, loss.scale, **options)) / 2
    return found


def _matryoshka(self: Any, original: Any, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
    losses = require(LOSSES, INSTALL)
    inner = self.loss
    if self.uses_gradient_cache or not isinstance(inner, losses.MultipleNegativesRankingLoss):
        why = f"{type(inner).__name__} inside"
    else:
        why = _why_not(inner)
    if why:
        _leaves(self, why)
        return original(self, sentence_features, labels)
    chosen = list(range(len(self.matryoshka_dims)))
    if 0 < self.n_dims_per_step < len(chosen):
        chosen = sorted(random.sample(range(len(chosen)), self.n_dims_per_step))
    embed = require("sentence_transformers.base.losses.merged_forward", INSTALL).embed_columns
    embeddings = embed(inner.model, sentence_features)
    # Largest first there, increasing here.
    dims = [self.matryoshka_dims[i] for i in reversed(chosen)]
    if dims[-1] > embeddings[0].shape[1]:
        raise ValueError(f"matryoshka_dims must be at most the model's {embeddings[0].shape[1]}, got {dims[-1]}")
    return _of_embeddings(inner, embeddings, dims, [self.matryoshka_weights[i] for i in reversed(chosen)])
