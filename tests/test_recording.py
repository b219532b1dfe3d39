"""Rows are samples: every case in which they were not, with its value worked out by hand in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import pyrepr
from pyrepr.models import Layer
from pyrepr.models._axes import Place, find_samples, second_order

F64 = torch.float64


def right(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased linear CKA of rows, by the definition."""
    return float(pyrepr.reference.gram.cka(x.detach().double(), y.detach().double()))


def value(*args, **options) -> float:
    result = pyrepr.compare(*args, progress=False, **options)
    assert result.values.shape == (1, 1)
    return result.values.item()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(seed: int, make) -> nn.Module:
    torch.manual_seed(seed)
    return make().double().eval()


class Patches(nn.Module):
    """CLIP-style: the blocks work on (T, B, D)."""

    def __init__(self, first: bool = False):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=first)
        self.blocks = nn.ModuleList([layer])
        self.first = first

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x if self.first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x if self.first else x.transpose(0, 1)


def test_blocks_in_time_first_order():
    a, b, images = seeded(0, Patches), seeded(1, Patches), randn(64, 3, 24, 20)
    expected = right(a(images).flatten(1), b(images).flatten(1))
    named = pyrepr.compare(a, b, [images], layers_a="blocks.0", layers_b="blocks.0", progress=False)
    assert named.count == 64 and named.values.item() == pytest.approx(expected, rel=1e-9)
    by_default = pyrepr.compare(a, b, [images], progress=False)
    assert by_default.layers_a == ("patch", "blocks.0") and not by_default.skipped
    assert by_default.values[1, 1].item() == pytest.approx(expected, rel=1e-9)
    assert by_default.readings_a["blocks.0"] == "[30, 8, 16]: samples along axis 1, features along axis 2"


def test_the_same_weights_batch_first_or_not():
    a, b = seeded(0, Patches), seeded(0, lambda: Patches(first=True))
    b.load_state_dict(a.state_dict())
    for n in (8, 5):  # as many samples as tokens, too
        images = randn(n, 3, 16, 8)
        options = {"layers_a": "blocks.0", "layers_b": "blocks.0"}
        assert value(a, b, [images], samples="tokens", **options) == pytest.approx(1, abs=1e-9)
        assert value(a, b, [images], **options) == pytest.approx(1, abs=1e-9)


class ChannelsLast(nn.Module):
    """Swin-style blocks on (B, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(2)])

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = x + block(x)
        return x


def test_channels_last_blocks():
    a, b, images = seeded(0, ChannelsLast), seeded(1, ChannelsLast), randn(6, 3, 12, 8)
    rows = []
    for model in (a, b):
        x = model.patch(images).permute(0, 2, 3, 1)
        rows.append(model.blocks[0](x).reshape(-1, 6))
    result = pyrepr.compare(a, b, [images], samples="tokens", progress=False)
    assert result.count == 6 * 24 and result.layers_a == ("patch", "blocks.0", "blocks.1")
    assert result.values[1, 1].item() == pytest.approx(right(*rows), rel=1e-9)
    patches = [model.patch(images).permute(0, 2, 3, 1).reshape(-1, 6) for model in (a, b)]
    assert result.values[0, 0].item() == pytest.approx(right(*patches), rel=1e-9)


def test_one_dimensional_convolutions():
    def make():
        return nn.Sequential(nn.Conv1d(4, 7, 3), nn.ReLU(), nn.Conv1d(7, 5, 1))

    a, b, x = seeded(0, make), seeded(1, make), randn(9, 4, 7)  # as long as wide after the first
    expected = right(*(m(x).transpose(1, 2).reshape(-1, 5) for m in (a, b)))
    assert value(a, b, [x], samples="tokens", layers_a="2", layers_b="2") == pytest.approx(expected, rel=1e-9)
    relu = right(*(m[:2](x).transpose(1, 2).reshape(-1, 7) for m in (a, b)))
    assert value(a, b, [x], samples="tokens", layers_a="1", layers_b="1") == pytest.approx(relu, rel=1e-9)


def test_one_tensor_or_a_dataset_is_no_iterable_of_batches():
    model, x = seeded(0, lambda: nn.Linear(5, 4)), randn(20, 5)
    with pytest.raises(TypeError, match=r"got one tensor; \[x\] is one batch"):
        pyrepr.compare(model, model, x)
    with pytest.raises(TypeError, match=r"got TensorDataset; torch.utils.data.DataLoader\(dataset, batch_size=32\)"):
        pyrepr.compare(model, model, torch.utils.data.TensorDataset(x))
    other = seeded(1, lambda: nn.Linear(5, 4))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=6)
    assert value(model, other, loader) == pytest.approx(right(model(x), other(x)), rel=1e-9)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x, mask=None):
        return self.linear(x if mask is None else x * mask[:, None])


def test_labels_are_never_an_input():
    a, b, x, labels = seeded(0, Masked), seeded(1, Masked), randn(30, 5), torch.arange(30) % 3
    expected = right(a(x), b(x))
    assert value(a, b, [(x, labels)]) == pytest.approx(expected, rel=1e-9)
    assert value(a, b, [{"x": x, "labels": labels}]) == pytest.approx(expected, rel=1e-9)
    weighted = right(a(x, labels), b(x))
    both = (lambda batch: (batch[0], batch[1]), lambda batch: batch[0])
    assert value(a, b, [(x, labels)], inputs=both) == pytest.approx(weighted, rel=1e-9)
    by_name = (lambda batch: {"x": batch[0], "mask": batch[1]}, None)
    assert value(a, b, [(x, labels)], inputs=by_name) == pytest.approx(weighted, rel=1e-9)


class Recurrent(nn.Module):
    def __init__(self, packed: bool):
        super().__init__()
        self.lstm, self.packed = nn.LSTM(5, 6, batch_first=True), packed

    def forward(self, x, attention_mask):
        if self.packed:
            lengths = attention_mask.sum(1)
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.lstm(x)[0]


def lengths_mask(lengths: list[int], most: int | None = None) -> torch.Tensor:
    return (torch.arange(most or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def test_packed_against_padded_recurrent_layers():
    a, b = seeded(0, lambda: Recurrent(True)), seeded(0, lambda: Recurrent(False))
    mask = lengths_mask([3, 7, 5, 2, 6, 7])
    data = [{"x": randn(6, 7, 5), "attention_mask": mask}]
    options = {"layers_a": "lstm", "layers_b": "lstm"}
    result = pyrepr.compare(a, b, data, samples="tokens", progress=False, **options)
    assert result.count == int(mask.sum()) and result.values.item() == pytest.approx(1, abs=1e-9)
    for pool in ("mean", "last", "max"):
        assert value(a, b, data, pool=pool, **options) == pytest.approx(1, abs=1e-9)
    assert value(a, b, data, **options) == pytest.approx(1, abs=1e-9)


def test_a_packed_sequence_as_the_batch():
    model = seeded(0, lambda: nn.Sequential(nn.LSTM(5, 6)))
    x, lengths = randn(7, 6, 5), torch.tensor([3, 7, 5, 2, 6, 7])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    result = pyrepr.compare(model, model, [packed], layers_a="0", samples="tokens", progress=False)
    assert result.count == int(lengths.sum())
    rows = torch.cat([model[0](x[:n, i : i + 1])[0][:, 0] for i, n in enumerate(lengths.tolist())])
    other = {"rows": randn(len(rows), 3, seed=5)}
    assert value(model, other, [packed], layers_a="0", samples="tokens") == pytest.approx(
        right(rows, other["rows"]), rel=1e-9
    )


@pytest.fixture(scope="module")
def t5s():
    import transformers

    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_ff=20, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return [seeded(seed, lambda: transformers.T5Model(config)) for seed in (0, 1)]


def ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(5, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decoder", [[4, 6, 3, 6, 5], [9, 2, 9, 4, 7]])
def test_the_decoder_has_a_mask_of_its_own(t5s, decoder):
    mask, decoder_mask = lengths_mask([6, 2, 5, 3, 6]), lengths_mask(decoder)
    batch = {
        "input_ids": ids(*mask.shape),
        "attention_mask": mask,
        "decoder_input_ids": ids(*decoder_mask.shape, seed=3),
        "decoder_attention_mask": decoder_mask,
    }
    states = [m(**batch, output_hidden_states=True) for m in t5s]
    rows = [s.decoder_hidden_states[1][decoder_mask.bool()] for s in states]
    options = {"samples": "tokens", "layers_a": "decoder.block.0", "layers_b": "decoder.block.0"}
    assert value(*t5s, [batch], **options) == pytest.approx(right(*rows), rel=1e-9)
    rows = [s.encoder_hidden_states[1][mask.bool()] for s in states]
    options = {"samples": "tokens", "layers_a": "encoder.block.0", "layers_b": "encoder.block.0"}
    assert value(*t5s, [batch], **options) == pytest.approx(right(*rows), rel=1e-9)
    # Without a mask every position of the decoder counts; pooled, encoder and decoder can be compared.
    del batch["decoder_attention_mask"]
    states = [m(**batch, output_hidden_states=True) for m in t5s]
    rows = [s.decoder_hidden_states[1].flatten(0, 1) for s in states]
    options = {"layers_a": "decoder.block.0", "layers_b": "decoder.block.0"}
    assert value(*t5s, [batch], samples="tokens", **options) == pytest.approx(right(*rows), rel=1e-9)
    pooled = pyrepr.compare(*t5s, [batch], pool="mean", progress=False)
    assert {"encoder.block.0", "decoder.block.0"} <= set(pooled.layers_a)
    weights = (mask / mask.sum(1, keepdim=True).double())[..., None]
    encoded = (states[0].encoder_hidden_states[1] * weights).sum(1)
    decoded = states[1].decoder_hidden_states[1].mean(1)
    got = pooled.values[pooled.layers_a.index("encoder.block.0"), pooled.layers_b.index("decoder.block.0")]
    assert got.item() == pytest.approx(right(encoded, decoded), rel=1e-9)


def test_decoder_inputs_come_from_labels_where_there_are_no_others():
    import transformers

    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_ff=20, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = seeded(0, lambda: transformers.T5ForConditionalGeneration(config))
    batch = {"input_ids": ids(6, 5), "labels": ids(6, 4, seed=3)}
    result = pyrepr.compare(model, model, [batch], samples="tokens", layers_a="lm_head", progress=False)
    assert result.count == 24  # of the decoder


class Routed(nn.Module):
    """A mixture of two experts by the first feature's sign, which puts out its router's logits first."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        flat = x.flatten(0, 1)
        logits = self.gate(flat)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = logits.argmax(1) == i
            out[chosen] = expert(flat[chosen])
        return logits, out.view_as(x)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Routed(), Routed()])

    def forward(self, x, loss=False):
        for block in self.blocks:
            x = x + block(x)[1]
        return x


def test_a_block_that_puts_out_router_logits_and_hidden_states():
    a, b, x = seeded(0, Mixture), seeded(1, Mixture), randn(10, 6, 8)
    expected = right(*(m.blocks[0](x)[1].flatten(0, 1) for m in (a, b)))
    result = pyrepr.compare(a, b, [x], samples="tokens", progress=False)
    assert result.layers_a == ("blocks.0", "blocks.1") and result.count == 60
    assert result.values[0, 0].item() == pytest.approx(expected, rel=1e-9)
    assert result.readings_a["blocks.0"].endswith("output 1 of 2")
    logits = right(*(m.blocks[0](x)[0] for m in (a, b)))
    options = {"layers_a": Layer("blocks.0", output=0), "layers_b": [Layer("blocks.0", output="0")]}
    assert value(a, b, [x], samples="tokens", **options) == pytest.approx(logits, rel=1e-9)
    gates = value(a, b, [x], samples="tokens", layers_a="blocks.0.gate", layers_b="blocks.0.gate")
    assert gates == pytest.approx(logits, rel=1e-9)  # rows (B·T, 2) are B samples' tokens
    with pytest.raises(
        ValueError, match=r"layers_a: blocks\.0\.experts\.0 (has rows of its own|holds its samples in no)"
    ):
        pyrepr.compare(a, b, [x], samples="tokens", layers_a="**.experts.0")
    with pytest.raises(ValueError, match=r"puts out nothing under 'hidden'; there is 0, 1"):
        pyrepr.compare(a, b, [x], layers_a=Layer("blocks.0", output="hidden"))


def test_a_block_that_puts_out_a_loss_first():
    class Lossy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            y = self.inner(x)
            return y.square().mean(), y

    def make():
        return nn.Sequential(Lossy())

    a, b, x = seeded(0, make), seeded(1, make), randn(20, 5)
    expected = right(a[0].inner(x), b[0].inner(x))
    assert value(a, b, [x], layers_a="0", layers_b="0") == pytest.approx(expected, rel=1e-9)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.two = self.one

    def forward(self, x):
        return self.two(self.one(x).tanh())


def test_a_module_under_two_names_and_called_twice():
    model, x, brain = seeded(0, Twice), randn(40, 5), {"v1": randn(40, 3, seed=1)}
    first, second = model.one(x), model(x)
    expected = [right(first, brain["v1"]), right(second, brain["v1"])]
    result = pyrepr.compare(model, brain, [x], layers_a=["one", "two"], progress=False)
    assert result.layers_a == ("one#1", "one#2", "two#1", "two#2")
    torch.testing.assert_close(result.values[:, 0], torch.tensor(expected * 2, dtype=F64), rtol=1e-9, atol=0)
    assert pyrepr.compare(model, brain, [x], progress=False).layers_a == ("one#1", "one#2")
    assert value(model, brain, [x], layers_a="two#2") == pytest.approx(expected[1], rel=1e-9)
    assert value(model, brain, [x], layers_a=Layer("one", call=1)) == pytest.approx(expected[0], rel=1e-9)
    taken = value(model, brain, [x], layers_a=Layer("two", call=2, side="input"))
    assert taken == pytest.approx(right(first.tanh(), brain["v1"]), rel=1e-9)
    with pytest.raises(ValueError, match="layers_a: one is called 2 times, so there is no call 3"):
        pyrepr.compare(model, brain, [x], layers_a="one#3")


def test_albert_has_a_row_for_every_pass():
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=20,
    )
    a, b = (seeded(seed, lambda: transformers.AlbertModel(config)) for seed in (0, 1))
    batch = {"input_ids": ids(7, 6), "attention_mask": lengths_mask([6, 2, 5, 3, 6, 4, 6])}
    kept = batch["attention_mask"].bool()
    result = pyrepr.compare(a, b, [batch], samples="tokens", progress=False)
    rows = [name for name in result.layers_a if "#" in name]
    assert rows == [f"encoder.albert_layer_groups.0#{i}" for i in range(1, 7)]
    sides = [[s[kept] for s in m(**batch, output_hidden_states=True).hidden_states[1:]] for m in (a, b)]
    expected = torch.tensor([[right(x, y) for y in sides[1]] for x in sides[0]], dtype=F64)
    at = torch.tensor([result.layers_a.index(name) for name in rows])
    torch.testing.assert_close(result.values[at][:, at], expected, rtol=1e-8, atol=1e-12)


@pytest.fixture(scope="module")
def berts():
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
    )
    return [seeded(seed, lambda: transformers.BertModel(config)) for seed in (0, 1)]


def test_whole_texts_do_not_depend_on_the_padding(berts):
    lengths, values = [6, 2, 5, 3, 6, 4, 5], []
    for extra in (0, 3):
        mask = lengths_mask(lengths, 6 + extra)
        tokens = torch.zeros_like(mask)
        tokens[:, :6] = ids(7, 6)
        batch = {"input_ids": tokens * mask, "attention_mask": mask}
        options = {"layers_a": "encoder.layer.1", "layers_b": "encoder.layer.1"}
        values.append(value(*berts, [batch], **options))
        rows = [(m(**batch).last_hidden_state * mask[..., None]).flatten(1) for m in berts]
        assert values[-1] == pytest.approx(right(*rows), rel=1e-9)
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("pool", ["mean", "last", "cls", "max"])
@pytest.mark.parametrize("left", [False, True])
def test_pools_of_padded_text(berts, pool, left):
    mask = lengths_mask([6, 2, 5, 3, 6, 4, 5])
    mask = mask.flip(1) if left else mask
    batch = {"input_ids": ids(7, 6), "attention_mask": mask}
    rows = []
    for model in berts:
        states = model(**batch).last_hidden_state
        kept = [s[m.bool()] for s, m in zip(states, mask, strict=True)]
        pick = {"mean": lambda s: s.mean(0), "last": lambda s: s[-1], "cls": lambda s: s[0], "max": lambda s: s.amax(0)}
        rows.append(torch.stack([pick[pool](s) for s in kept]))
    options = {"layers_a": "encoder.layer.1", "layers_b": "encoder.layer.1", "pool": pool}
    assert value(*berts, [batch], **options) == pytest.approx(right(*rows), rel=1e-9)


def test_which_tokens_count(berts):
    mask = lengths_mask([6, 4, 5, 3, 6, 4, 5])
    special = torch.zeros_like(mask)
    special[:, 0] = 1
    batch = {"input_ids": ids(7, 6), "attention_mask": mask, "special_tokens_mask": special}
    options = {"layers_a": "encoder.layer.1", "layers_b": "encoder.layer.1", "samples": "tokens"}
    states = [m(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state for m in berts]
    plain = mask.bool() & (special == 0)
    result = pyrepr.compare(*berts, [batch], tokens="no_special", progress=False, **options)
    assert result.values.item() == pytest.approx(right(*(s[plain] for s in states)), rel=1e-9)
    assert "tokens without special tokens" in result.describe()
    second = mask.bool() & (torch.arange(6) == 1)
    got = value(*berts, [batch], tokens=lambda batch: torch.arange(6).expand(7, 6) == 1, **options)
    assert got == pytest.approx(right(*(s[second] for s in states)), rel=1e-9)
    del batch["special_tokens_mask"]
    with pytest.raises(ValueError, match="tokens='no_special' needs special_tokens_mask in the batch"):
        pyrepr.compare(*berts, [batch], tokens="no_special", progress=False, **options)
    with pytest.raises(ValueError, match=r"tokens must give a mask \[B, T\] for a batch, got \[3\]"):
        pyrepr.compare(*berts, [batch], tokens=lambda batch: torch.ones(3), progress=False, **options)


def test_two_towers_of_clip():
    import transformers

    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    image = {"image_size": 12, "patch_size": 4, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**text, **heads, "eos_token_id": 49, "bos_token_id": 48},
        vision_config={**image, **heads},
        projection_dim=8,
    )
    model = seeded(0, lambda: transformers.CLIPModel(config))
    mask = lengths_mask([10, 4, 7, 5, 10, 8])  # as long as an image has tokens
    batch = {"input_ids": ids(6, 10), "attention_mask": mask, "pixel_values": randn(6, 3, 12, 12)}
    options = {"layers_a": "text_model.encoder.layers.*", "layers_b": "vision_model.encoder.layers.*"}
    result = pyrepr.compare(model, model, [batch], pool="mean", progress=False, **options)
    texts = model.text_model(batch["input_ids"], mask, output_hidden_states=True).hidden_states[1:]
    images = model.vision_model(batch["pixel_values"], output_hidden_states=True).hidden_states[1:]
    rows = [torch.stack([s[m.bool()].mean(0) for s, m in zip(x, mask, strict=True)]) for x in texts]
    expected = torch.tensor([[right(x, y.mean(1)) for y in images] for x in rows], dtype=F64)
    torch.testing.assert_close(result.values, expected, rtol=1e-8, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = pyrepr.compare(model, model, [batch], pool="mean", progress=False)
    assert {"vision_model.encoder.layers.1", "text_model.encoder.layers.1"} <= set(every.layers_a)
    spatial = value(model, {"v": randn(6, 4)}, [batch], layers_a="vision_model.encoder.layers.1", pool="spatial")
    assert spatial == pytest.approx(right(images[1][:, 1:].mean(1), randn(6, 4)), rel=1e-8)


def test_models_with_different_tokenizers(berts):
    import transformers

    config = transformers.GPT2Config(vocab_size=70, n_embd=12, n_layer=2, n_head=2, n_positions=16)
    gpt = seeded(3, lambda: transformers.GPT2Model(config))
    texts = [f"{i * 37 % 101} {'x' * (i % 5)}" for i in range(9)]

    def tokenized(batch, cut):
        pieces = [[5 + ord(c) % 40 for c in text[::cut]] for text in batch]
        mask = lengths_mask([len(p) for p in pieces])
        return {"input_ids": torch.tensor([p + [0] * (mask.shape[1] - len(p)) for p in pieces]), "attention_mask": mask}

    feeds = (lambda batch: tokenized(batch, 1), lambda batch: tokenized(batch, 2))
    options = {"layers_a": "encoder.layer.1", "layers_b": "h.1", "inputs": feeds}
    rows = []
    for model, feed in zip((berts[0], gpt), feeds, strict=True):
        fed = feed(texts)
        seen = {}
        layer = model.get_submodule("encoder.layer.1" if model is berts[0] else "h.1")
        handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.update(x=out))
        model(**fed)
        handle.remove()
        states = seen["x"][0] if isinstance(seen["x"], tuple) else seen["x"]
        rows.append(torch.stack([s[m.bool()].mean(0) for s, m in zip(states, fed["attention_mask"], strict=True)]))
    assert value(berts[0], gpt, [texts[:5], texts[5:]], pool="mean", **options) == pytest.approx(right(*rows), rel=1e-9)
    with pytest.raises(ValueError, match=r"must give the same tokens for a batch, got .*; pool='mean' compares models"):
        pyrepr.compare(berts[0], gpt, [texts], samples="tokens", **options)


def test_grid_against_tokens():
    grid, tokens, images = seeded(0, ChannelsLast), seeded(1, lambda: Patches(first=True)), randn(12, 3, 24, 20)
    x = grid.patch(images).permute(0, 2, 3, 1)
    rows = grid.blocks[0](x).mean((1, 2)), tokens(images).mean(1)
    options = {"layers_a": "blocks.0", "layers_b": "blocks.0", "pool": "mean"}
    assert value(grid, tokens, [images], **options) == pytest.approx(right(*rows), rel=1e-9)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x, src_key_padding_mask=None):
        return self.encoder(x, src_key_padding_mask=src_key_padding_mask)


def test_the_fast_path_of_attention_is_left_and_taken_again():
    a, b, x, kept = seeded(0, Encoder), seeded(1, Encoder), randn(6, 7, 16), lengths_mask([3, 7, 5, 2, 6, 7]).bool()
    rows = []
    for model in (a, b):
        with torch.enable_grad():  # off the fast path
            rows.append(model.encoder.layers[0](x, src_key_padding_mask=~kept)[kept])
    batch = {"x": x, "src_key_padding_mask": ~kept}
    result = pyrepr.compare(a, b, [batch], samples="tokens", progress=False)
    assert result.layers_a == ("encoder.layers.0", "encoder.layers.1") and result.count == int(kept.sum())
    assert result.values[0, 0].item() == pytest.approx(right(*rows), rel=1e-9)
    assert torch.backends.mha.get_fastpath_enabled()


def test_nested_tensors():
    model = seeded(0, lambda: nn.Sequential(nn.Linear(5, 4)))
    parts = [randn(n, 5, seed=n) for n in (3, 7, 5, 2)]
    nested = torch.nested.nested_tensor(parts)
    rows, other = model(torch.cat(parts)), {"v": randn(17, 3)}
    got = value(model, other, [nested], layers_a="0", samples="tokens")
    assert got == pytest.approx(right(rows, other["v"]), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_quantised_traced_and_compiled_models():
    def make():
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    plain, x, brain = seeded(0, make).float(), randn(30, 5).float(), {"v": randn(30, 3).float()}
    expected = pyrepr.compare(plain, brain, [x], progress=False).values
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    result = pyrepr.compare(quantised, brain, [x], progress=False)
    assert result.layers_a == ("0", "2")
    torch.testing.assert_close(result.values, expected, rtol=0, atol=0.02)
    traced = torch.jit.trace(plain, x)
    result = pyrepr.compare(traced, brain, [x], progress=False)
    assert result.layers_a == ("(model)",)
    torch.testing.assert_close(result.values, expected[1:], rtol=1e-6, atol=0)
    inside = pyrepr.compare(nn.Sequential(traced, nn.Linear(3, 3)), brain, [x], progress=False)
    assert inside.layers_a == ("0", "1")
    compiled = seeded(0, make).float()
    compiled.compile(backend="eager")
    compiled(x)
    torch.testing.assert_close(pyrepr.compare(compiled, brain, [x], progress=False).values, expected, rtol=1e-6, atol=0)


def test_what_is_left_out_is_told_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner, self.spare = nn.Embedding(4, 5), nn.Linear(5, 5), nn.Linear(2, 2)
            self.mixer = nn.Linear(5, 5)

        def forward(self, x):
            y = self.inner(x) + self.table(torch.arange(1))
            return y + self.mixer(y.cumsum(0))

    model = seeded(0, Odd)
    with pytest.warns(UserWarning, match=r"3 layers left out \(see result.skipped\): model_a ") as caught:
        result = pyrepr.compare(model, model, [randn(9, 5)], progress=False)
    assert len(caught) == 1
    assert result.layers_a == ("inner",)
    assert result.skipped == {
        "table": "is the same in whatever order the samples come: a table or a weight, no representation",
        "spare": "is not called in the model's forward",
        "mixer": "holds its samples in no axis of [8, 5]: the model mixes samples in it, or has them in an order of "
        "its own",
    }
    with pytest.raises(ValueError, match="layers_a: mixer holds its samples in no axis"):
        pyrepr.compare(model, model, [randn(9, 5)], layers_a=["inner", "mixer"], progress=False)


def test_models_that_are_random_in_eval_mode():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(4, dtype=x.dtype)

    model = Noisy(5, 4).double()
    with pytest.raises(ValueError, match=r"\(model\) gives two values for the same samples \(it is random"):
        pyrepr.compare(model, model, [randn(9, 5)], progress=False)


def test_an_axis_that_cannot_be_told_is_asked_for():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))

        def forward(self, x):
            return x * self.scale

    model, x, brain = seeded(0, lambda: nn.Sequential(Free())), randn(10, 6, 7), {"v": randn(60, 3)}
    message = r"layers_a: 0 puts out \[8, 6, 7\], which reads as 6 positions of 7 features or as 7 positions of 6; say "
    with pytest.raises(ValueError, match=message):
        pyrepr.compare(model, brain, [x], layers_a="0", samples="tokens")
    got = value(model, brain, [x], layers_a=Layer("0", channel_axis=2), samples="tokens")
    assert got == pytest.approx(right(model(x).flatten(0, 1), brain["v"]), rel=1e-9)
    with pytest.raises(ValueError, match="has 6 samples in axis 1, but the batch 8"):
        pyrepr.compare(model, brain, [x], layers_a=Layer("0", batch_axis=1, channel_axis=0), samples="tokens")
    with pytest.raises(ValueError, match="which has no axis 5"):
        pyrepr.compare(model, brain, [x], layers_a=Layer("0", batch_axis=5))


def test_activations_that_are_not_finite_are_counted_by_layer():
    model = seeded(0, lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    x = randn(20, 5)
    x[13, 2] = torch.inf
    with pytest.warns(UserWarning, match="activations that are NaN or infinite: model_a 0: 4, model_a 1: 3"):
        result = pyrepr.compare(model, {"v": randn(20, 3)}, [x[:10], x[10:]], progress=False)
    assert result.nonfinite_a == {"0": 4, "1": 3} and not result.nonfinite_b
    assert result.values.isnan().all()


def test_the_sample_axis_is_found_in_every_place():
    order = second_order(5)
    assert not (order == torch.arange(5)).any()
    for shape, place in [((5, 7), Place(0)), ((7, 5), Place(1)), ((5, 5, 3), Place(1)), ((3, 5, 5), Place(2))]:
        x = randn(*shape)
        assert find_samples(x, x.index_select(place.axis, order), order) == place
    x = randn(5, 4, 3)
    assert find_samples(x.flatten(0, 1), x[order].flatten(0, 1), order) == Place(0, "first")
    y = x.transpose(0, 1)
    assert find_samples(y.flatten(0, 1), y[:, order].flatten(0, 1), order) == Place(0, "last")
    noisy = x.float()
    assert find_samples(noisy, noisy[order] * (1 + 1e-6 * torch.randn_like(noisy)), order) == Place(0)
    assert "same in whatever order" in find_samples(x, x, order)
    assert "same for every sample" in find_samples(x[:1].expand(5, 4, 3), x[:1].expand(5, 4, 3), order)
    square = x.flatten(1) @ x.flatten(1).T
    assert "in no axis" in find_samples(square, square[order][:, order], order)
    assert "number changes" in find_samples(x, x[1:], order)
    assert "single number" in find_samples(x.sum(), x.sum(), order)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": 3}, TypeError, "name must be a string, got int"),
        ({"side": "left"}, ValueError, "side must be 'output' or 'input', got 'left'"),
        ({"call": 0}, ValueError, "call must be an int from 1 on, got 0"),
        ({"output": 1.5}, TypeError, "output must be a position, a key or a path, got float"),
        ({"batch_axis": "0"}, TypeError, "batch_axis must be an int, got str"),
        ({"pool": "sum"}, ValueError, "pool must be None or one of 'mean', 'last', 'cls', 'max', 'spatial', got 'sum'"),
    ],
)
def test_bad_layers(options, error, message):
    with pytest.raises(error, match=message):
        Layer(**{"name": "0", **options})
