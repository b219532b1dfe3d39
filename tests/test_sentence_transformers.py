"""sentence-transformers' losses and trainer on pyrepr's: the same losses, scripts unchanged. No model is downloaded."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

pytest.importorskip("sentence_transformers")

import pyrepr.integrations.sentence_transformers as accelerated

WORDS = ["red", "green", "blue", "small", "large", "round", "old", "new", "soft", "hard", "warm", "cold"]


@pytest.fixture
def enabled():
    accelerated.enable()
    yield
    accelerated.disable()


def tiny_model(layers=2):
    """A BERT of random weights with a tokenizer over a dozen words."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return SentenceTransformer, modules, BertModel(config), fast


@pytest.fixture
def model(tmp_path):
    SentenceTransformer, modules, bert, tokenizer = tiny_model()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    return SentenceTransformer(modules=[transformer, modules.Pooling(32)], device="cpu")


def losses():
    from sentence_transformers.sentence_transformer import losses

    return losses


def embeddings(columns=2, n=10, d=32):
    return [torch.randn(n, d, requires_grad=True) for _ in range(columns)]


OPTIONS = [
    {},
    {"scale": 7.5},
    {"similarity_fct": "dot"},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
]


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_ranking_loss_is_theirs(options, columns):
    from sentence_transformers.util import dot_score

    options = {**options, **({"similarity_fct": dot_score} if "similarity_fct" in options else {})}
    loss = losses().MultipleNegativesRankingLoss(model=None, **options)
    given = embeddings(columns)
    theirs = loss.compute_loss_from_embeddings(given, None)
    grads = torch.autograd.grad(theirs, given)
    accelerated.enable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = loss.compute_loss_from_embeddings(given, None)
    finally:
        accelerated.disable()
    assert type(ours.grad_fn) is not type(theirs.grad_fn)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, given), grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_what_is_not_covered_runs_as_before_and_says_so(enabled):
    accelerated._warned.clear()
    loss = losses().MultipleNegativesRankingLoss(None, hardness_mode="all_negatives", hardness_strength=0.5)
    given = embeddings()
    with pytest.warns(UserWarning, match="hardness weighting runs on sentence-transformers' own code"):
        ours = loss.compute_loss_from_embeddings(given, None)
    accelerated.disable()
    assert torch.equal(ours, loss.compute_loss_from_embeddings(given, None))


@pytest.mark.parametrize("kind", ["ranking", "matryoshka", "matryoshka, sampled", "matryoshka 2d"])
def test_a_training_script_runs_unchanged_and_reaches_the_same_losses(kind, model):
    def wrapped(model):
        inner = losses().MultipleNegativesRankingLoss(model)
        if kind == "ranking":
            return inner
        if kind == "matryoshka 2d":
            return losses().Matryoshka2dLoss(model, inner, [32, 16, 8])
        steps = 2 if "sampled" in kind else -1
        return losses().MatryoshkaLoss(model, inner, [32, 16, 8, 4], [1, 0.5, 2, 1], n_dims_per_step=steps)

    def train(steps=4):
        model.load_state_dict(start)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        loss, found = wrapped(model), []
        random.seed(3)
        for step in range(steps):
            chosen = [[WORDS[(i + step + c) % 12] + " " + WORDS[(2 * i + c) % 12] for i in range(6)] for c in range(2)]
            features = [model.preprocess(texts) for texts in chosen]
            value = loss(features, None)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            found.append(value.item())
        return found

    start = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = train()
    accelerated.enable()
    try:
        ours = train()
    finally:
        accelerated.disable()
    assert ours == pytest.approx(theirs, rel=2e-4)
    assert len(set(ours)) == len(ours)  # it trains


def test_enabling_twice_and_disabling_leaves_what_was_there():
    before = losses().MultipleNegativesRankingLoss.compute_loss_from_embeddings
    accelerated.enable()
    accelerated.enable()
    assert losses().MultipleNegativesRankingLoss.compute_loss_from_embeddings is not before
    accelerated.disable()
    assert losses().MultipleNegativesRankingLoss.compute_loss_from_embeddings is before
