"""transformers' own models of each kind, tiny, with all ops in Triton under `enable()`, against the reference."""

from __future__ import annotations

import pytest
import torch
import transformers
from pyrepr.benchmarks.gpu import behaviour

import pyrepr
from pyrepr.integrations import transformers as accelerated

FAMILIES = ("causal_conv1d", "delta_rule", "gram")
COMMON = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
COMMON |= {"num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None}
COMMON |= {"layer_types": ["linear_attention", "full_attention"]}
GATED = {"head_dim": 8, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
GATED |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
KIMI = {"linear_num_heads": 1, "linear_head_dim": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
MODELS = {
    "Qwen3Next": ("Qwen3NextConfig", GATED | MOE),
    "OlmoHybrid": ("OlmoHybridConfig", GATED),
    "KimiLinear": ("KimiLinearConfig", KIMI | MOE | {"v_head_dim": 8}),
}


def work(model, tokens):
    """Logits, the gradients of a training step, and what is decoded after a prompt."""
    logits = model(tokens).logits
    gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()), allow_unused=True)
    with torch.no_grad():
        said = model.generate(tokens[:, :9], max_new_tokens=3, do_sample=False)
    return [logits, *(g for g in gradients if g is not None)], said


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers(name, only_listed_variants):
    config, options = MODELS[name]
    torch.manual_seed(0)
    accelerated.enable()
    try:
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**COMMON | options)).eval()
        tokens = torch.randint(1, 31, (1, 18))
        found, said = work(model, tokens)
        with pyrepr.use_backend("reference"):
            expected, repeated = work(model, tokens)
    finally:
        accelerated.disable()
    launched = {variant.name.split()[0] for variant in only_listed_variants}
    assert {"forward", "scan", "gradient" if name != "KimiLinear" else "kda", "recurrent"} <= launched, launched
    assert torch.equal(said, repeated)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * max(1.0, float(b.abs().max())))


def test_autocast_changes_nothing(monkeypatch):
    monkeypatch.setattr(behaviour, "DEVICE", "cpu")
    behaviour.autocast_changes_nothing()
