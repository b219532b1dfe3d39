"""transformers' own gated-delta and KDA models, tiny and with random weights, on pyrepr and on their own fallback."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", minversion="5.23")

import pyrepr  # noqa: E402
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
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
LINEAR = {"layer_types": ["linear_attention"] * 3}
# Models of the same installed version that share the functions.
OTHERS = {
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", GATED | MOE),
    "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", GATED | MOE | LINEAR | {"hc_count": 2, "hc_lowrank": 8}),
    "bailing_hybrid": (
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        LATENT
        | EXPERTS
        | {"head_dim": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "num_local_experts": 4, "num_mtp_layers": 0}
        | {"layer_types": None, "layer_group_size": 3, "first_k_dense_replace": 1},
    ),
    "glm5_next": (
        "Glm5NextTextConfig",
        "Glm5NextTextModel",
        LATENT
        | EXPERTS
        | LINEAR
        | {"mlp_layer_types": ["dense", "sparse", "sparse"], "q_lora_rank": 16}
        | {"linear_num_heads": 4, "linear_head_dim": 16, "n_routed_experts": 4, "hc_mult": 2},
    ),
}


# Models of Mamba-2's kind.
SIZES = {k: v for k, v in COMMON.items() if k != "layer_types"} | {"num_hidden_layers": 2}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
PLAIN = {"state_size": 16, "n_groups": 2, "chunk_size": 16}
SCANS = {
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", PLAIN | {"num_heads": 8, "head_dim": 16}),
    "bamba": ("BambaConfig", "BambaForCausalLM", STATE | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", STATE | {"mamba_d_ssm": 128, "head_dim": 16}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        STATE
        | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
        | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16, "head_dim": 16}
        | {"ssm_state_size": 16, "n_groups": 2, "chunk_size": 16},
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "n_mamba_heads": 8}
        | {"mamba_headdim": 16, "mamba_d_state": 16, "mamba_ngroups": 2, "chunk_size": 16}
        | {"num_mem_blocks": 1, "adapter_rank": 8},
    ),
}


@pytest.fixture(autouse=True)
def leave_nothing_behind():
    yield
    accelerated.disable()


def build(name):
    config, model, options = (MODELS | OTHERS | SCANS)[name]
    common = SIZES if name in SCANS else COMMON
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**(common | options))).eval()


def tokens(rows, length):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


OPS = {
    "rule": (torch.ops.pyrepr.delta_rule_forward.default, torch.ops.pyrepr.delta_rule_update_.default),
    "convolution": (torch.ops.pyrepr.causal_conv1d_forward.default, torch.ops.pyrepr.causal_conv1d_update_.default),
}


class Counter(TorchDispatchMode):
    """Counts how often pyrepr's ops run."""

    def __init__(self):
        super().__init__()
        self.calls = dict.fromkeys(OPS, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for name, ops in OPS.items():
            self.calls[name] += function in ops
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def fallback():
    """transformers' own PyTorch functions, also where flash-linear-attention is installed."""
    before = [(module, name, getattr(module, name)) for module, name, _ in accelerated._loaded()]
    for module, name, function in before:
        setattr(module, name, inspect.unwrap(function))
    yield
    for module, name, function in before:
        setattr(module, name, function)


def both(function):
    """What `function` returns on the fallback and on pyrepr."""
    with Counter() as counter:
        with fallback():
            expected = function()
        assert not any(counter.calls.values())
        with accelerated.enabled():
            got = function()
        assert all(calls >= 2 for calls in counter.calls.values())
    return expected, got


@pytest.mark.parametrize("name", MODELS | OTHERS)
def test_logits(name):
    model, ids = build(name), tokens(2, 70)
    with torch.no_grad():
        expected, got = both(lambda: model(ids, use_cache=False)[0])
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


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_generation_gives_the_same_tokens(name):
    model, ids = build(name), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    expected, got = both(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_comes_in_two_parts(name):
    """The second part finds states in the cache, of the rule and of the convolution."""
    model, ids = build(name), tokens(2, 50)

    def run():
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split([2, 30, 1, 17], 1)]
        return torch.cat(parts, 1)

    expected, got = both(run)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), accelerated.enabled():
        torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits(dtype):
    model, ids = build("qwen3_5").to(dtype), tokens(2, 70)
    with torch.no_grad():
        expected, got = both(lambda: model(ids).logits)
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packing", ["cu_seq_lens_q", "seq_idx"])
def test_packed_sequences_are_kept_apart(name, packing):
    """What the fallback refuses: every sequence comes out as if it were alone."""
    layer = next(m for m in build(name).modules() if "Delta" in type(m).__name__)
    x = torch.randn(1, 50, 64)
    bounds = torch.tensor([0, 2, 20, 50], dtype=torch.int32)
    seq_idx = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), bounds.diff())[None]
    options = {"cu_seq_lens_q": bounds} if packing == "cu_seq_lens_q" else {"seq_idx": seq_idx}
    with torch.no_grad():
        with fallback():
            alone = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(bounds.tolist())], 1)
        with accelerated.enabled():
            packed = layer(x, **options)
            with pytest.raises(ValueError, match="batch of 1"):
                layer(x.expand(2, -1, -1), seq_idx=seq_idx.expand(2, -1))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_of_a_layer_equal_separate_rows(name):
    """To float32's rounding: 4.3e-7 of the largest output seen."""
    layer = next(m for m in build(name).modules() if "Delta" in type(m).__name__)
    x, bounds = torch.randn(1, 150, 64, generator=torch.Generator().manual_seed(4)), [0, 2, 50, 51, 150]
    with torch.no_grad(), accelerated.enabled():
        alone = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(bounds)], 1)
        packed = layer(x, cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))
    assert (packed - alone).abs().max() <= 1e-6 * alone.abs().max()


def test_documents_that_only_position_ids_tell_apart_are_warned_of():
    model, ids = build("qwen3_5"), tokens(1, 30)
    bounds = torch.tensor([0, 12, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 18, "max_length_k": 18}
    with torch.no_grad(), accelerated.enabled():
        with pytest.warns(UserWarning, match="position_ids restart within a row"):
            mixed = model(ids, position_ids=positions, use_cache=False).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids, use_cache=False)
            model(ids, position_ids=torch.arange(30)[None], use_cache=False)
            packed = model(ids, position_ids=positions, use_cache=False, **lengths).logits
            padded = torch.ones_like(ids)
            padded[:, :5] = 0
            model(ids, attention_mask=padded, position_ids=(padded.cumsum(-1) - 1).clamp_min(0), use_cache=False)
            alone = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :12], ids[:, 12:])], 1)
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-6)
    assert (mixed - alone).abs().max() > 1e-3


class Assisted:
    """A target, an assistant that is often wrong, and what they say."""

    def __init__(self, name):
        self.target, self.draft = build(name), build(name)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.draft.parameters():
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        self.draft.generation_config.update(num_assistant_tokens=5, assistant_confidence_threshold=0.0)

    def say(self, **options):
        return self.target.generate(tokens(1, 12), max_new_tokens=40, do_sample=False, **options)


@pytest.mark.parametrize("name", MODELS)
def test_assisted_generation_gives_the_tokens_of_greedy_decoding(name):
    """transformers refuses these models; with states to go back to it says what the model alone would."""
    models, calls = Assisted(name), []
    with accelerated.enabled():
        alone = models.say()
        with pytest.raises(ValueError, match="not supported with stateful models"):
            models.say(assistant_model=models.draft)
        models.target.register_forward_hook(lambda *_: calls.append(1))
        with accelerated.assisted(models.target):
            helped = models.say(assistant_model=models.draft)
            assisted_calls = len(calls)
            looked_up = models.say(prompt_lookup_num_tokens=4)
        assert torch.equal(models.say(), alone)
    assert models.target._is_stateful and "_is_stateful" not in vars(models.target)
    assert torch.equal(helped, alone) and torch.equal(looked_up, alone)
    assert assisted_calls < 40  # drafts were accepted, and rejected ones did no harm


def test_assisted_generation_refuses_what_it_cannot_go_back_to():
    models = Assisted("qwen3_5")
    with fallback(), accelerated.assisted(models.target), pytest.raises(RuntimeError, match="from something else"):
        models.say(assistant_model=models.draft)
    sentence = r"tokens of assisted\(\) must be at least the \d+ to go back by, got 1"
    with (
        accelerated.enabled(),
        accelerated.assisted(models.target, tokens=1),
        pytest.raises(RuntimeError, match=sentence),
    ):
        models.say(assistant_model=models.draft)
    with pytest.raises(ValueError, match="tokens must be a positive integer, got 0"), accelerated.assisted(tokens=0):
        pass
    scan = build("bamba")
    with accelerated.enabled(), accelerated.assisted(scan), pytest.raises(RuntimeError, match="something else"):
        scan.generate(tokens(1, 12), max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=2)


def test_an_exported_model_has_pytorchs_operations_alone():
    model, ids = build("qwen3_5"), tokens(1, 20)
    kwargs = {"use_cache": False, "return_dict": False}
    with torch.no_grad():
        with accelerated.enabled():
            exported = torch.export.export(model, (ids,), kwargs, strict=False)
        assert not any("pyrepr" in str(node.target) for node in exported.graph.nodes)
        with fallback():
            expected = model(ids, **kwargs)[0]
        torch.testing.assert_close(exported.module()(ids, **kwargs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCANS)
def test_models_with_a_scan(name):
    """A prompt, a padded one, and decoding."""
    model, ids = build(name), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0

    def run():
        with torch.no_grad():
            logits = model(ids, use_cache=False)[0], model(ids, attention_mask=mask).logits[:, 13:]
        return logits, model.generate(ids, max_new_tokens=12, do_sample=False)

    expected, got = both(run)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[1], expected[1])


def test_gradients_and_16_bits_of_a_scan():
    model, ids = build("mamba2"), tokens(2, 40)

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected, got = both(step)
    for parameter, grad in expected.items():
        torch.testing.assert_close(got[parameter], grad, atol=1e-5, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}")
    model.bfloat16()
    with torch.no_grad():
        expected, got = both(lambda: model(ids).logits)
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


def test_packed_sequences_of_a_scan_are_kept_apart():
    layer = next(m for m in build("mamba2").modules() if type(m).__name__ == "Mamba2Mixer")
    x, bounds = torch.randn(1, 50, 64), [0, 2, 20, 50]
    numbers = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(bounds).diff())[None]
    with torch.no_grad():
        with fallback():
            alone = torch.cat([layer(x[:, a:b]) for a, b in itertools.pairwise(bounds)], 1)
        with accelerated.enabled():
            packed = layer(x, seq_idx=numbers)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_a_scan_decodes_in_place():
    """The state that a prompt leaves has the layout that the kernel writes where it stands."""
    model, ids = build("mamba2"), tokens(1, 9)
    with torch.no_grad(), accelerated.enabled():
        cache = model(ids[:, :8], use_cache=True).cache_params
        state = cache.layers[0].recurrent_states[0]
        assert state.mT.is_contiguous()
        before = state.clone()
        model(ids[:, 8:], cache_params=cache)
    assert cache.layers[0].recurrent_states[0] is state and not torch.equal(state, before)


@pytest.mark.parametrize("name", ["Lfm2", "Lfm3"])
def test_the_convolution_serves_models_without_a_delta_rule(name):
    config = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in COMMON.items() if k != "layer_types"}, layer_types=["conv", "conv", "full_attention"]
    )
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"{name}ForCausalLM")(config).eval(), tokens(2, 30)
    with fallback():
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with accelerated.enabled(), Counter() as counter:
        got = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, expected)
    assert counter.calls["convolution"] == 2 * 8


def test_decoding_updates_the_cache_in_place():
    model, ids = build("qwen3_5"), tokens(1, 9)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), accelerated.enabled():
        model(ids[:, :8], past_key_values=cache)
        states = [cache.layers[0].recurrent_states[0], cache.layers[0].conv_states[0]]
        before = [x.clone() for x in states]
        model(ids[:, 8:], past_key_values=cache)
    assert cache.layers[0].recurrent_states[0] is states[0]
    assert not any(torch.equal(a, b) for a, b in zip(states, before, strict=True))


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


def run_alone(code, path=None):
    """In a process of its own, with the folder `path` in front of the installed packages."""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stderr[-3000:]


LATER = """
from pyrepr.integrations import transformers as accelerated
accelerated.enable()
from transformers.models.qwen3_5 import modeling_qwen3_5 as module
names = ('torch_chunk_gated_delta_rule', 'torch_recurrent_gated_delta_rule', 'causal_conv1d_fn', 'causal_conv1d_update')
assert all(hasattr(getattr(module, name), '_pyrepr_original') for name in names)
"""
TINY = """
import torch, transformers
torch.manual_seed(0)
config = transformers.Qwen3_5TextConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, layer_types=['linear_attention', 'full_attention'], head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, pad_token_id=0, eos_token_id=None)
model = transformers.Qwen3_5ForCausalLM(config).eval()
ids = torch.arange(1, 9)[None]
"""


EVERY = """
import importlib, pathlib, re, transformers
from pyrepr.integrations import transformers as accelerated
names = '|'.join(n for n in accelerated._NAMES if n != 'create_recurrent_attention_mask')
defined = re.compile(rf'^def ({names})[(]', re.MULTILINE)
found = []
if first: accelerated.enable()
for path in sorted((pathlib.Path(transformers.__file__).parent / 'models').glob('*/modeling_*.py')):
    functions = defined.findall(path.read_text())
    if functions:
        module = importlib.import_module(f'transformers.models.{path.parent.name}.{path.stem}')
        found += [(module, name) for name in functions]
if not first: accelerated.enable()
missed = [f'{m.__name__}.{n}' for m, n in found if not hasattr(getattr(m, n), '_pyrepr_original')]
assert not missed, missed
assert len({m for m, _ in found}) >= 20, found
accelerated.disable()
assert not any(hasattr(getattr(m, n), '_pyrepr_original') for m, n in found)
assert accelerated._FINDER not in __import__('sys').meta_path
"""


@pytest.mark.parametrize("first", [True, False])
def test_every_model_file_is_reached_whether_it_is_imported_before_or_after(first):
    """Also LFM3's, whose functions no decorator passes on; found by the text of the files."""
    run_alone(f"first = {first}\n{EVERY}")


def test_modules_imported_later_are_reached_and_given_back():
    given_back = "accelerated.disable()\nassert not any(hasattr(getattr(module, n), '_pyrepr_original') for n in names)"
    run_alone(LATER + given_back)


def test_an_installed_flash_linear_attention_is_not_called_on_the_cpu(tmp_path):
    """Without pyrepr it would be, and fail: its kernels have no driver here."""
    for package, functions in {
        "fla/ops/gated_delta_rule": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
        "causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
    }.items():
        folder = tmp_path / package
        folder.mkdir(parents=True)
        lines = [f"def {name}(*args, **kwargs): raise RuntimeError('0 active drivers')" for name in functions]
        (folder / "__init__.py").write_text("\n".join(lines))
    (tmp_path / "fla/__init__.py").touch()
    (tmp_path / "fla/ops/__init__.py").touch()
    code = (
        "try: model(ids)\n"
        "except RuntimeError as error: assert '0 active drivers' in str(error)\n"
        "else: raise AssertionError('the stand-in was not called')\n"
        "from pyrepr.integrations import transformers as accelerated\n"
        "with accelerated.enabled():\n"
        "    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)\n"
        "    model(ids, labels=ids).loss.backward()\n"
    )
    run_alone(TINY + code, tmp_path)


KERNELS = """
import inspect
from torch import nn

class _Nothing:
    def __init__(self, *args, **kwargs): pass

CUDAProperties = Device = KernelizeFallback = LayerRepository = LocalLayerRepository = ROCMProperties = _Nothing
class Mode: INFERENCE = TRAINING = TORCH_COMPILE = 1
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = get_kernel = kernelize = _Nothing

def use_kernel_forward_from_hub(name):
    def decorate(target):
        if isinstance(target, type):
            return target
        class Func(nn.Module):
            kernel_layer_name = name
            def forward(self, *args, **kwargs): return target(*args, **kwargs)
        parameters = inspect.signature(target).parameters.values()
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        Func.forward.__signature__ = inspect.Signature([me, *parameters])
        return Func()
    return decorate

def use_kernelized_func(*functions):
    for function in functions:
        if not hasattr(function, 'kernel_layer_name'):
            raise ValueError(f'{function} is not decorated')
    return lambda cls: cls
"""


def test_with_the_package_kernels_functions_stay_what_its_mapping_works_on(tmp_path):
    """A stand-in for `kernels`, which makes modules of the functions and refuses anything else."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(KERNELS)
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    (tmp_path / "kernels-0.18.2.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    code = (
        "assert all(isinstance(getattr(module, name), torch.nn.Module) for name in names)\n"
        "assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)\n"
        "accelerated.disable()\n"
        "assert not any(hasattr(getattr(module, n), '_pyrepr_original') for n in names)\n"
        "with accelerated.enabled():\n"
        "    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)\n"
    )
    run_alone(LATER + TINY + code, tmp_path)


def test_tensors_elsewhere_stay_with_what_was_there_unless_a_kernel_is_proven_or_asked_for(monkeypatch):
    calls = []

    def original(q, k, v, g, beta, **options):
        calls.append(options)
        return v, None

    run = accelerated._rule(pyrepr.chunk_gated_delta_rule, "", original)
    q, gates = torch.zeros(1, 3, 2, 4, device="meta"), torch.zeros(1, 3, 2, device="meta")
    run(q, q, q, gates, gates)
    assert len(calls) == 1
    with pyrepr.use_backend("reference"):
        run(q, q, q, gates, gates)
    monkeypatch.setitem(accelerated.GPU_ORDER, "delta_rule_forward", ("triton",))
    run(q, q, q, gates, gates)
    assert len(calls) == 1


def test_an_untested_version_is_named(monkeypatch):
    monkeypatch.setattr(accelerated, "TESTED", "4.99")
    with pytest.warns(UserWarning, match=rf"tested with transformers 4.99, got {transformers.__version__}"):
        accelerated.enable()


def test_a_function_that_changed_is_named(monkeypatch):
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    def chunk(query, key, value, g, beta, state):
        pass

    before = module.causal_conv1d_fn
    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", chunk)
    with pytest.raises(RuntimeError, match="has a chunk_gated_delta_rule without initial_state, output_final_state"):
        accelerated.enable()
    assert module.causal_conv1d_fn is before


def test_the_whole_model_benchmark_runs():
    from argparse import Namespace

    from pyrepr.benchmarks import model

    tiny = Namespace(layers=4, hidden=64, heads=2, prompt=40, tokens=4, rounds=1, profiled=2)
    result = model.measure(tiny)
    assert result["same_tokens"] == 4
    for run in model.RUNS:
        for phase in model.PHASES:
            took = result["milliseconds"][run][phase]
            assert 0 < took["rule"] < took["all"] and 0 < took["convolution"] < took["all"]
            assert len(result["profile_milliseconds"][run][phase]) > 5
    assert "rule + convolution" in model.report(result)


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear"])
def test_hessian_products_are_those_of_the_fallback(name):
    """Of the loss, along one direction of all parameters."""
    model, ids = build(name), tokens(2, 9)
    model.config._attn_implementation = "eager"  # the fused kernels of attention have no second derivative
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]

    def product():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        second = torch.autograd.grad(along, parameters, materialize_grads=True)
        return torch.cat([x.flatten() for x in second])

    expected, got = both(product)
    assert (got - expected).norm() < 1e-4 * expected.norm()
