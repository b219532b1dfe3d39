"""States of the delta rule as serving needs them: in a pool, after every token, and in a cache that goes back."""

from __future__ import annotations

import itertools

import pytest
import torch

import pyrepr
from pyrepr.nn import DeltaCache, DeltaNet, GatedDeltaNet, KimiDeltaAttention

RULES = ("delta_rule", "gated_delta_rule", "kda")
LAYERS = {
    "delta": lambda: DeltaNet(hidden_size=16, num_heads=2, layer_idx=0),
    "bare": lambda: DeltaNet(hidden_size=16, num_heads=2, layer_idx=0, use_short_conv=False, use_beta=False),
    "gated": lambda: GatedDeltaNet(hidden_size=16, head_dim=8, num_heads=1, num_v_heads=2, layer_idx=0),
    "kimi": lambda: KimiDeltaAttention(hidden_size=16, head_dim=8, num_heads=2, layer_idx=0),
}


def inputs(rule, batch, total, dtype=torch.float32):
    """Arguments of a rule with HV = 4, K = 8, V = 6."""
    generator = torch.Generator().manual_seed(total)

    def draw(*shape):
        return torch.randn(batch, total, *shape, generator=generator, dtype=dtype)

    given = {"q": draw(2, 8), "k": draw(2, 8), "v": draw(4, 6), "beta": draw(4).sigmoid()}
    if rule != "delta_rule":
        given["g"] = -draw(4, *([8] if rule == "kda" else [])).exp() / 4
    return given


def recurrent(rule, given, **options):
    function = getattr(pyrepr.functional, f"fused_recurrent_{rule}")
    return function(**given, output_final_state=True, use_qk_l2norm_in_kernel=True, **options)


def part(given, rows, tokens):
    return {name: x[rows, tokens] for name, x in given.items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("v_first", [False, True])
def test_states_after_every_token_are_those_of_shorter_calls(rule, v_first):
    given = inputs(rule, 2, 7)
    start = torch.randn(2, 4, *((6, 8) if v_first else (8, 6)))
    options = {"initial_state": start, "state_v_first": v_first}
    o, state, every = recurrent(rule, given, output_states="every token", **options)
    _, _, last = recurrent(rule, given, output_states=3, **options)
    close(o, recurrent(rule, given, **options)[0])
    assert every.shape == (2, 7, *start.shape[1:]) and last.shape == (2, 3, *start.shape[1:])
    for t in range(7):
        close(every[:, t], recurrent(rule, part(given, slice(None), slice(t + 1)), **options)[1])
    close(last, every[:, 4:])
    close(state, every[:, -1])


def test_states_of_short_sequences_are_their_first_where_there_is_no_token():
    given, bounds = inputs("gated_delta_rule", 1, 6), torch.tensor([0, 1, 1, 6])
    start = torch.randn(3, 4, 8, 6)
    o, state, last = recurrent("gated_delta_rule", given, initial_state=start, cu_seqlens=bounds, output_states=2)
    _, _, every = recurrent(
        "gated_delta_rule", given, initial_state=start, cu_seqlens=bounds, output_states="every token"
    )
    expected = recurrent("gated_delta_rule", given, initial_state=start, cu_seqlens=bounds)
    close(o, expected[0])
    close(state, expected[1])
    assert torch.equal(last[1], start[1:2].expand(2, -1, -1, -1)) and torch.equal(last[0, 0], start[0])
    close(last[0, 1], every[0, 0])
    close(last[2], every[0, 4:])


def test_states_after_tokens_depend_on_no_later_token():
    given = inputs("kda", 1, 9)
    whole = recurrent("kda", given, output_states="every token")[2]
    assert torch.equal(
        whole[:, :4], recurrent("kda", part(given, slice(None), slice(4)), output_states="every token")[2]
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("total", [1, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_states_in_a_pool(rule, total, packed):
    given = inputs(rule, 3, total)
    pool = torch.randn(6, 4, 8, 6)
    before = pool.clone()
    options = {}
    if packed:
        given = {name: x.flatten(0, 1)[None] for name, x in given.items()}
        options["cu_seqlens"] = torch.arange(4) * total
    expected, states = recurrent(rule, given, initial_state=before[[4, 0, 2]], **options)
    o, returned = recurrent(rule, given, initial_state=pool, state_indices=torch.tensor([4, -1, 2]), **options)
    skipped = expected.reshape(3, total, 4, 6).clone()
    skipped[1] = 0
    assert returned is pool
    close(o.reshape(skipped.shape), skipped)
    close(pool[[4, 2]], states[[0, 2]])
    assert torch.equal(pool[[0, 1, 3, 5]], before[[0, 1, 3, 5]])
    # From one pool into another.
    other = torch.zeros_like(pool)
    indices = torch.tensor([4, 0, 2], dtype=torch.int32)
    o, returned = recurrent(rule, given, initial_state=before, out_state=other, state_indices=indices, **options)
    assert returned is other
    close(o, expected)
    close(other[[4, 0, 2]], states)
    assert not other[[1, 3, 5]].any()


def test_nobody_in_a_pool():
    given, pool = inputs("gated_delta_rule", 2, 3), torch.randn(2, 4, 8, 6)
    before = pool.clone()
    o, returned = recurrent("gated_delta_rule", given, initial_state=pool, state_indices=torch.tensor([-1, -1]))
    assert not o.any() and returned is pool and torch.equal(pool, before)
    o, _, states = recurrent(
        "gated_delta_rule", given, initial_state=pool[:0], state_indices=torch.tensor([-1, -1]), output_states=2
    )
    assert not o.any() and states.shape == (2, 2, 4, 8, 6) and not states.any()


def test_a_sequence_that_is_nan_stays_in_its_row_of_the_pool():
    given, pool = inputs("gated_delta_rule", 3, 2), torch.randn(4, 4, 8, 6)
    given["v"][1] = float("nan")
    before = pool.clone()
    o, _ = recurrent("gated_delta_rule", given, initial_state=pool, state_indices=torch.tensor([0, 3, 1]))
    assert o[[0, 2]].isfinite().all() and o[1].isnan().all()
    assert pool[[0, 1, 2]].isfinite().all() and torch.equal(pool[2], before[2]) and pool[3].isnan().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_indices": torch.tensor([0, 4])}, "state_indices must be from -1 to 3, the rows of initial_state"),
        ({"state_indices": torch.tensor([0, -2])}, "state_indices must be from -1 to 3, the rows of initial_state"),
        ({"state_indices": torch.tensor([1, 1])}, "state_indices must name a row of initial_state once at most"),
        ({"state_indices": torch.tensor([1])}, r"state_indices must have shape \[N\] = \[2\], got \[1\]"),
        ({"state_indices": torch.tensor([1.0, 2.0])}, "state_indices must be"),
        (
            {"state_indices": torch.tensor([0, 1]), "initial_state": None},
            "initial_state, which must be given with them",
        ),
        ({"output_states": 0}, "output_states must be None, 'every token' or a positive number of tokens, got 0"),
        ({"output_states": True}, "output_states must be None, 'every token' or a positive number of tokens, got True"),
        (
            {"output_states": "all"},
            "output_states must be None, 'every token' or a positive number of tokens, got 'all'",
        ),
        ({"output_states": 1 << 22}, r"output_states must fit into 2 GiB, got 8388608 states of together 6 GiB"),
    ],
)
def test_bad_states_are_one_clear_sentence(options, words):
    pool = torch.randn(4, 4, 8, 6) if "state_indices" in options else torch.randn(2, 4, 8, 6)
    before = pool.clone()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        recurrent("gated_delta_rule", inputs("gated_delta_rule", 2, 3), **({"initial_state": pool} | options))
    assert torch.equal(pool, before)


def test_states_that_are_written_are_not_differentiated():
    given, pool = inputs("gated_delta_rule", 2, 3), torch.randn(4, 4, 8, 6)
    given["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="initial_state is written in place and cannot be differentiated"):
        recurrent("gated_delta_rule", given, initial_state=pool, state_indices=torch.tensor([1, 2]))


def test_continuous_batching_is_each_alone():
    """Sequences come and go; while some decode token by token, others are prefilled in pieces, in one packed call."""
    rule, slots, lengths = "gated_delta_rule", 3, (9, 4, 17, 1, 12, 6)
    alone = [inputs(rule, 1, n) for n in lengths]
    expected = [recurrent(rule, given) for given in alone]
    pool = torch.randn(slots, 4, 8, 6)  # what others left
    waiting, running, free, outputs = list(range(len(lengths))), {}, list(range(slots)), {i: [] for i in range(6)}
    calls = 0
    while waiting or running:
        while waiting and free:
            slot, number = free.pop(), waiting.pop(0)
            pool[slot] = 0
            running[number] = (slot, 0)
        # A prompt of five tokens in pieces of up to three, then one token a call.
        pieces = [(i, slot, seen, min(3 if seen < 5 else 1, lengths[i] - seen)) for i, (slot, seen) in running.items()]
        tokens = [part(alone[i], slice(None), slice(seen, seen + n)) for i, _, seen, n in pieces]
        packed = {name: torch.cat([t[name] for t in tokens], 1) for name in tokens[0]}
        bounds = torch.tensor([0, *itertools.accumulate(n for *_, n in pieces)])
        indices = torch.tensor([slot for _, slot, *_ in pieces])
        o, _ = recurrent(rule, packed, initial_state=pool, state_indices=indices, cu_seqlens=bounds)
        calls += 1
        for (i, slot, seen, n), out in zip(pieces, o.split([n for *_, n in pieces], 1), strict=True):
            outputs[i].append(out)
            running[i] = (slot, seen + n)
            if seen + n == lengths[i]:
                close(pool[slot], expected[i][1][0])
                free.append(running.pop(i)[0])
    for number, (whole, _) in enumerate(expected):
        close(torch.cat(outputs[number], 1), whole)
    assert calls < sum(lengths) / 2


# The cache


def run(layer, cache, x):
    """Tokens one call each; what the layer says of them."""
    return torch.cat([layer(token, past_key_values=cache, use_cache=True)[0] for token in x.split(1, 1)], 1)


def same_states(a, b):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        close(x, y)


def tensors(cache):
    state = cache[0]
    return [state["recurrent_state"], *(state["conv_state"] or ())]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 5], [5, 1, 3], [9]])
def test_a_cropped_cache_goes_on_as_if_the_rest_had_never_been(name, pieces):
    layer, x, other = LAYERS[name](), torch.randn(2, 9, 16), torch.randn(2, 3, 16)
    with torch.no_grad():
        for back in range(4):
            cache, expected = DeltaCache(rollback=3), DeltaCache()
            for piece in x.split(pieces, 1):
                layer(piece, past_key_values=cache, use_cache=True)
            layer(x[:, : 9 - back], past_key_values=expected, use_cache=True)
            kept = sum(p.numel() for p in tensors(cache))
            cache.crop(-back) if back % 2 else cache.crop(9 - back)
            assert cache.get_seq_length() == 9 - back and kept == sum(p.numel() for p in tensors(cache))
            same_states(cache, expected)
            close(run(layer, cache, other), run(layer, expected, other))


def test_an_empty_cache_has_nothing_to_go_back_to():
    cache = DeltaCache(rollback=2)
    cache.crop(0)
    cache.accept(0)
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=f"length must be at most the 0 tokens of the cache, got {wrong}"):
            cache.crop(wrong)
    for wrong in (1, torch.tensor([1, 1])):
        with pytest.raises(ValueError, match="num_accepted_tokens must be 0, the cache is empty, got"):
            cache.accept(wrong)
    with pytest.raises(TypeError, match=r"num_accepted_tokens must be a torch\.Tensor, got float"):
        cache.accept(1.5)


def test_a_cache_goes_back_to_its_beginning_and_further_only_as_said():
    layer, x = LAYERS["gated"](), torch.randn(2, 6, 16)
    with torch.no_grad():
        cache = DeltaCache(rollback=2)
        run(layer, cache, x)
        cache.crop(5)
        with pytest.raises(ValueError, match=r"the cache can take back 1 tokens, got 3 to take back.*rollback=2"):
            cache.crop(2)
        with pytest.raises(ValueError, match="length must be at most the 5 tokens of the cache, got 6"):
            cache.crop(6)
        with pytest.raises(ValueError, match="length must be at most the 5 tokens of the cache, got -6"):
            cache.crop(-6)
        with pytest.raises(TypeError, match=r"length must be an integer, got 1\.5"):
            cache.crop(1.5)
        assert cache.get_seq_length() == 5
        cache.crop(0)
        assert cache.get_seq_length() == 0 and cache.get(0) is None
        close(run(layer, cache, x), layer(x)[0])
        first = DeltaCache(rollback=4)
        run(layer, first, x[:, :2])
        first.crop(-2)
        close(run(layer, first, x), layer(x)[0])
    for wrong in (-1, 1.0, True, "2"):
        with pytest.raises(ValueError, match="rollback must be a number of tokens, 0 or more, got"):
            DeltaCache(rollback=wrong)


def test_padding_begins_anew_what_can_be_taken_back():
    layer, x = LAYERS["gated"](), torch.randn(2, 4, 16)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    cache = DeltaCache(rollback=3)
    with torch.no_grad():
        layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="the cache can take back 0 tokens, got 1"):
            cache.crop(3)
        layer(x[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(4)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("name", LAYERS)
def test_every_row_keeps_the_tokens_it_accepts(name):
    layer, x, new, other = LAYERS[name](), torch.randn(4, 3, 16), torch.randn(4, 3, 16), torch.randn(4, 2, 16)
    counts = [0, 3, 1, 2]
    with torch.no_grad():
        cache = DeltaCache(rollback=3)
        layer(x, past_key_values=cache, use_cache=True)
        layer(new, past_key_values=cache, use_cache=True)
        cache.accept(torch.tensor(counts))
        assert cache.get_seq_length() == 6
        o = run(layer, cache, other)
        for row, count in enumerate(counts):
            text = torch.cat([x[row], new[row, :count], other[row]])[None]
            close(o[row], layer(text)[0][0, -2:])
        with pytest.raises(ValueError, match="the cache can take back 2 tokens, got 3"):
            cache.crop(5)


def test_accepting_says_what_is_wrong():
    layer, cache = LAYERS["gated"](), DeltaCache(rollback=2)
    with torch.no_grad():
        layer(torch.randn(2, 4, 16), past_key_values=cache, use_cache=True)
        layer(torch.randn(2, 3, 16), past_key_values=cache, use_cache=True)
    before = [x.clone() for x in tensors(cache)]
    for wrong, words in (
        (4, "num_accepted_tokens must be from 0 to the 3 tokens of the last call, got 4"),
        (-1, "num_accepted_tokens must be from 0 to the 3 tokens of the last call, got -1"),
        (0, "the cache can take back 2 tokens, got 3"),
        (torch.tensor([1, 2, 3]), r"num_accepted_tokens must have shape \[B\] = \[2\], got \[3\]"),
        (torch.tensor([1, 4]), "num_accepted_tokens must be from 0 to the 3 tokens of the last call, got 4"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.accept(wrong)
    for wrong in (1.0, True, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match="num_accepted_tokens must be"):
            cache.accept(wrong)
    assert cache.get_seq_length() == 7 and all(map(torch.equal, before, tensors(cache)))
    cache.accept(1)
    assert cache.get_seq_length() == 5


def test_rows_are_selected_and_copies_are_apart():
    layer, x, other = LAYERS["kimi"](), torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    with torch.no_grad():
        cache = DeltaCache(rollback=1)
        run(layer, cache, x)
        copy, beams = cache.copy(), cache.copy()
        copy.select(torch.tensor([2, 0]))
        beams.reorder_cache(torch.tensor([1, 1, 0]))
        rows = run(layer, copy, other[:2])
        close(rows, layer(torch.cat([x[[2, 0]], other[:2]], 1))[0][:, -2:])
        close(run(layer, beams, other), layer(torch.cat([x[[1, 1, 0]], other], 1))[0][:, -2:])
        close(run(layer, cache, other), layer(torch.cat([x, other], 1))[0][:, -2:])
        copy.crop(-1)
        same_states(copy, step_by_step(layer, torch.cat([x[[2, 0]], other[:2, :1]], 1)))
        with pytest.raises(ValueError, match="rows must be from 0 to 2, got 0 to 3"):
            cache.select(torch.tensor([0, 3]))
        with pytest.raises(ValueError, match=r"rows must have shape \[B'\], got \[1, 1\]"):
            cache.select(torch.tensor([[0]]))
        with pytest.raises(TypeError, match="rows must be"):
            cache.select(torch.tensor([0.0]))
        cache.select(torch.tensor([], dtype=torch.long))
        assert cache[0]["recurrent_state"].shape[0] == 0


def step_by_step(layer, x):
    cache = DeltaCache()
    run(layer, cache, x)
    return cache


def test_a_saved_cache_goes_on(tmp_path):
    layer, x, path = LAYERS["gated"](), torch.randn(2, 5, 16), tmp_path / "cache.pt"
    with torch.no_grad():
        cache = DeltaCache(rollback=2)
        run(layer, cache, x)
        cache.save(path)
        loaded = DeltaCache.load(path)
        assert loaded.rollback == 2 and loaded.get_seq_length() == 5
        assert torch.equal(run(layer, cache, x), run(layer, loaded, x))
        again = DeltaCache.load(str(path), device="cpu")
        again.crop(3)
        same_states(again, step_by_step(layer, x[:, :3]))
    assert [p.name for p in tmp_path.iterdir()] == ["cache.pt"]


def test_files_that_are_no_cache(tmp_path):
    path = tmp_path / "cache.pt"
    state = {"recurrent_state": torch.zeros(1, 2, 3, 4), "conv_state": (torch.zeros(1, 3, 2),)}
    layer = {"state": state, "seen": 1, "offset": 1, "earlier": []}
    torch.save({"DeltaCache": 1, "rollback": 0, "layers": {0: layer}}, path)
    assert DeltaCache.load(path).get_seq_length() == 1
    for content in (
        {"DeltaCache": 99},
        {"weights": torch.zeros(2)},
        [1],
        {"DeltaCache": 1, "rollback": 0, "layers": 3},
        {"DeltaCache": 1, "rollback": 0, "layers": {0: layer | {"seen": 1.5}}},
        {"DeltaCache": 1, "rollback": 0, "layers": {0: layer | {"state": {"recurrent_state": 1, "conv_state": None}}}},
        {"DeltaCache": 1, "rollback": 0, "layers": {0: layer | {"earlier": [state | {"conv_state": None}]}}},
        {"DeltaCache": 1, "rollback": -1, "layers": {}},
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"path must be a file that DeltaCache.save wrote, got "):
            DeltaCache.load(path)
    for raw in (b"", b"no archive", path.read_bytes()[:40]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"path must be a file that DeltaCache.save wrote, got "):
            DeltaCache.load(path)
    with pytest.raises(FileNotFoundError):
        DeltaCache.load(tmp_path / "nowhere.pt")


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    layer, cache, path = LAYERS["gated"](), DeltaCache(), tmp_path / "cache.pt"
    with torch.no_grad():
        run(layer, cache, torch.randn(1, 2, 16))
    path.write_text("what was there")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cache.save(tmp_path / "none" / "cache.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["cache.pt"] and path.read_text() == "what was there"
