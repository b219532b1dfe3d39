"""transformers' own gated-delta and KDA models, tiny and with random weights, on pyrepr and on their own fallback."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", minversion="5.23")

from pyrepr.integrations import transformers as accelerated  # noqa: E402

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
GATED = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
KIMI = {
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MODELS = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", GATED | MOE),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", GATED),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", GATED | {"num_key_value_heads": 4}),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", KIMI | MOE),
}


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    accelerated.disable()


def build(name):
    config, model, options = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**(COMMON | options))).eval()


def tokens(rows, length):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


class Counter(TorchDispatchMode):
    """Counts how often pyrepr's op runs."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.pyrepr.delta_rule_forward.default
        return function(*args, **(kwargs or {}))


def both(function):
    """What `function` returns on the fallback and on pyrepr."""
    with Counter() as counter:
        expected = function()
        assert counter.calls == 0
        with accelerated.enabled():
            got = function()
        assert counter.calls >= 2
    return expected, got


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    model, ids = build(name), tokens(2, 70)
    with torch.no_grad():
        expected, got = both(lambda: model(ids).logits)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_gives_the_same_tokens(name):
    model, ids = build(name), tokens(1, 10)
    expected, got = both(lambda: model.generate(ids, max_new_tokens=64, do_sample=False))
    assert expected.shape[1] == 74
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_batch(name):
    model, ids = build(name), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    with torch.no_grad():
        expected, got = both(lambda: model(ids, attention_mask=mask).logits[:, 13:])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_training_step(name):
    model, ids = build(name).train(), tokens(2, 40)

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, got = both(step)
    assert expected.keys() == got.keys()
    for parameter, grad in expected.items():
        torch.testing.assert_close(got[parameter], grad, atol=1e-5, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")


def test_packed_sequences_are_kept_apart():
    """What the fallback refuses: every sequence comes out as if it were alone."""
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    layer = next(m for m in build("qwen3_next").modules() if isinstance(m, module.Qwen3NextGatedDeltaNet))
    x = torch.randn(1, 50, 64)
    bounds = torch.tensor([0, 2, 20, 50], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(bounds.tolist())], 1)
        with pytest.raises(ValueError, match="packed"):
            layer(x, cu_seq_lens_q=bounds)
        with accelerated.enabled():
            packed = layer(x, cu_seq_lens_q=bounds)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_enable_and_disable_leave_the_modules_as_they_were():
    from transformers.integrations import hub_kernels
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    before = dict(vars(module)), hub_kernels.use_kernel_func_from_hub_with_fallback
    accelerated.enable()
    accelerated.enable()
    assert module.torch_chunk_gated_delta_rule is not before[0]["torch_chunk_gated_delta_rule"]
    accelerated.disable()
    accelerated.disable()
    assert vars(module) == before[0]
    assert hub_kernels.use_kernel_func_from_hub_with_fallback is before[1]


def test_modules_imported_later_are_reached_and_given_back():
    code = (
        "from pyrepr.integrations import transformers as accelerated\n"
        "accelerated.enable()\n"
        "from transformers.models.qwen3_5 import modeling_qwen3_5 as module\n"
        "assert hasattr(module.torch_chunk_gated_delta_rule, '_pyrepr_original')\n"
        "assert hasattr(module.torch_recurrent_gated_delta_rule, '_pyrepr_original')\n"
        "accelerated.disable()\n"
        "assert not hasattr(module.torch_chunk_gated_delta_rule, '_pyrepr_original')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_an_untested_version_is_named(monkeypatch):
    monkeypatch.setattr(accelerated, "TESTED", "4.99")
    with pytest.warns(UserWarning, match=rf"tested with transformers 4.99, got {transformers.__version__}"):
        accelerated.enable()
