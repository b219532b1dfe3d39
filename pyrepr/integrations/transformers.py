"""Runs the gated-delta, KDA and Mamba-2 models of transformers on pyrepr's kernels.

    import pyrepr.integrations.transformers as accelerated
    accelerated.enable()          # models made before and after this line; `disable()` takes it back

transformers resolves ``chunk_gated_delta_rule``, ``fused_recurrent_gated_delta_rule``, ``chunk_kda``,
``fused_recurrent_kda``, ``mamba_chunk_scan_combined``, ``selective_state_update``, ``causal_conv1d_fn`` and
``causal_conv1d_update`` once, when a modeling module is imported, regardless of the device: flash-linear-attention,
mamba_ssm and causal-conv1d if they are installed (whose kernels do not run on a CPU), else a PyTorch fallback. Its
official kernel mapping needs the package ``kernels`` and reaches only models made with ``use_kernels=True``. So the
functions are replaced where the modules look them up, and stay what the mapping can work on: a model with
``use_kernels=True`` still gets its hub kernels, where there are any. CPU tensors go to pyrepr, and those of a GPU where
its kernels are the default (``GPU_ORDER`` in :mod:`pyrepr.backend`) or :func:`pyrepr.use_backend` asks for them; all
others to what was there before, and so does a model that is being exported: what ``torch.export`` writes runs where
pyrepr is absent. The convolution serves every model that has it, Mamba's and LFM2's too; the scan those
of Mamba-2's kind (mamba2, bamba, falcon_h1, granitemoehybrid, nemotron_h, zamba2). The scan of Mamba itself stays what
it was: every channel decays on its own.

Importing this module also lets ``from_pretrained`` read the models with lookup layers that :func:`pyrepr.convert` made
and ``save_pretrained`` wrote.

Supported: transformers 5.23. Other versions warn if they have the same functions and raise if they do not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrepr import functional
from pyrepr._modules import is_bare
from pyrepr.backend import GPU_ORDER, forced_backend
from pyrepr.integrations._assisted import assisted, depth, remembering
from pyrepr.ops import causal_conv1d as convolution
from pyrepr.ops import delta_rule as rule

if importlib.util.find_spec("transformers"):
    from pyrepr.integrations import _quantizer  # noqa: F401  (registers what reads converted models)

__all__ = ["assisted", "disable", "enable", "enabled"]

TESTED = "5.23"
_MODELS = "transformers.models."
_FACTORY = "use_kernel_func_from_hub_with_fallback"
_ORIGINAL = "_pyrepr_original"
_SILU = (None, "silu", "swish")  # activations that the convolution's kernels know


def _function(original: Callable) -> Callable:
    """What has the name and the arguments: the package `kernels` makes modules of functions."""
    return original.forward if isinstance(original, torch.nn.Module) else original


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _is_ours(x: Tensor, op: str) -> bool:
    """Whether pyrepr takes tensors of that device, or leaves them to what was there before, as it does in an export."""
    if torch.compiler.is_exporting():
        return False
    return x.is_cpu or op in GPU_ORDER or forced_backend() is not None


_restarted: list[bool] = []  # not empty between the mask of a call whose positions restart and its first layer


def _mask(original: Callable) -> Callable:
    """What makes the padding mask of the linear layers: the one place that sees the positions they do not."""

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        mask = original(*args, **kwargs)
        positions: Any = kwargs.get("position_ids")
        _restarted.clear()
        looks = mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1
        if looks and not torch.compiler.is_compiling() and bool((positions.diff() <= 0).any()):
            _restarted.append(True)
        return mask

    return run


def _warn_of_mixing(options: dict[str, Any]) -> None:
    """Said once a call, by its first layer, whose options know whether it is told of the documents too."""
    if not _restarted:
        return
    _restarted.clear()
    if not _packed(options):
        warnings.warn(
            "position_ids restart within a row, which keeps its documents apart in attention alone: linear layers mix "
            "them. Give cu_seq_lens_q or seq_idx too, as DataCollatorWithFlattening(return_seq_idx=True) does",
            stacklevel=3,
        )


def _lengths(options: dict[str, Any], batch: int) -> Tensor | None:
    """Where packed sequences start and end, [N + 1], under whichever name a model passes it."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if options.get(name) is not None:
            return options[name]
    seq_idx = options.get("seq_idx")
    if seq_idx is None:
        return None
    if batch != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {batch}")
    starts = seq_idx[0].diff(prepend=seq_idx[0, :1] - 1).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([seq_idx.shape[1]])])


def _packed(options: dict[str, Any]) -> bool:
    return any(options.get(name) is not None for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx"))


def _rule(function: Callable, gate: rule.Gate | None, original: Callable) -> Callable:
    """A delta rule with the arguments that models pass, whatever else they pass along.

    One with a `gate` is for decoding: it writes the new state over ``initial_state``, which
    in a model is the cache that takes it anyway, and first tries the short way. Between two steps a model reads all its
    weights, so that every function on the way to a kernel has left the caches and costs 10 µs.
    """
    original_on_cpu = inspect.unwrap(original)

    @functools.wraps(_function(original), updated=())
    def run(
        query: Tensor,  # [B, T, H, K]
        key: Tensor,  # [B, T, H, K]
        value: Tensor,  # [B, T, HV, V]
        g: Tensor,  # [B, T, HV] or [B, T, HV, K]
        beta: Tensor,  # [B, T, HV]
        *args: Any,
        initial_state: Tensor | None = None,  # [N, HV, K, V]
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cached = output_final_state and depth() > 0
        if gate and not cached and beta is not None and output_final_state and not args and not _packed(kwargs):
            l2norm = bool(use_qk_l2norm_in_kernel)
            done = rule.step(query, key, value, g, beta, None, initial_state, initial_state, l2norm, gate)
            if done is not None:
                return done
        options: dict[str, Any] = {
            "initial_state": initial_state,
            "output_final_state": output_final_state,
            "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        }
        if not _is_ours(query, "delta_rule_forward"):
            return original(query, key, value, g, beta, *args, **options, **kwargs)
        if args:
            return original_on_cpu(query, key, value, g, beta, *args, **options, **kwargs)
        if initial_state is not None:
            options["initial_state"] = initial_state.float()
            if gate and output_final_state and not _needs_gradient(query, key, value, g, beta, initial_state):
                options["out_state"] = options["initial_state"]
        options["cu_seqlens"] = _lengths(kwargs, query.shape[0])
        if cached:
            options.pop("out_state", None)
            o, state = remembering(
                function, query.to(value.dtype), key.to(value.dtype), value, g=g, beta=beta, **options
            )
            return o.to(query.dtype), state
        o, state = function(query.to(value.dtype), key.to(value.dtype), value, g=g, beta=beta, **options)
        return o.to(query.dtype), state

    return run


def _with_activation(run: Callable[[str | None], Tensor], activation: str | None) -> Tensor:
    """`run`, which knows SiLU, followed by any other activation that transformers knows."""
    if activation in _SILU:
        return run(activation)
    from transformers.activations import ACT2FN

    return ACT2FN[activation](run(None))


def _convolution(original: Callable) -> Callable:
    """The causal convolution before a delta rule; packed sequences are kept apart, where the fallback raises."""

    @functools.wraps(_function(original), updated=())
    def run(
        hidden_states: Tensor,  # [B, D, T]
        weight: Tensor,  # [D, W]
        bias: Tensor | None = None,  # [D]
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:  # [B, D, T]
        if not _is_ours(hidden_states, "causal_conv1d_forward"):
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        _warn_of_mixing(kwargs)
        seq_idx = kwargs.get("seq_idx")
        bounds = _lengths(kwargs, hidden_states.shape[0]) if seq_idx is None else None
        return _with_activation(
            lambda act: functional.causal_conv1d_fn(
                hidden_states, weight, bias, seq_idx, activation=act, cu_seqlens=bounds
            ),
            activation,
        )

    return run


def _step(original: Callable) -> Callable:
    """The causal convolution of new tokens, with the ones before in a state."""
    original_on_cpu = inspect.unwrap(original)

    @functools.wraps(_function(original), updated=())
    def run(
        hidden_states: Tensor,  # [B, D, T]
        conv_state: Tensor,  # [B, D, S]
        weight: Tensor,  # [D, W]
        bias: Tensor | None = None,  # [D]
        activation: str | None = None,
    ) -> Tensor:  # [B, D, T]
        if activation in _SILU:
            done = convolution.step(hidden_states, conv_state, weight, bias, activation is not None)
            if done is not None:
                return done
        if not _is_ours(hidden_states, "causal_conv1d_update_"):
            return original(hidden_states, conv_state, weight, bias, activation)
        if conv_state.dtype != hidden_states.dtype or _needs_gradient(hidden_states, conv_state, weight, bias):
            return original_on_cpu(hidden_states, conv_state, weight, bias, activation)
        return _with_activation(
            lambda act: functional.causal_conv1d_update(hidden_states, conv_state, weight, bias, act), activation
        )

    return run


def _scan(original: Callable) -> Callable:
    """Mamba-2's scan over a prompt; packed sequences are kept apart."""

    @functools.wraps(_function(original), updated=())
    def run(
        hidden_states: Tensor,  # [B, T, H, P]
        dt: Tensor,  # [B, T, H]
        A: Tensor,  # [H]
        B: Tensor,  # [B, T, G, N]
        C: Tensor,  # [B, T, G, N]
        chunk_size: int,
        D: Tensor | None = None,  # [H]
        dt_bias: Tensor | None = None,  # [H]
        initial_states: Tensor | None = None,  # [B, H, P, N]
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:  # [B, T, H, P], and with return_final_states [B, H, P, N]
        options: dict[str, Any] = {
            "D": D,
            "dt_bias": dt_bias,
            "initial_states": initial_states,
            "dt_softplus": dt_softplus,
            "dt_limit": dt_limit,
            "return_final_states": return_final_states,
        }
        given = (hidden_states, dt, A, B, C, chunk_size)
        if not _is_ours(hidden_states, "delta_rule_forward"):
            return original(*given, **options, **kwargs)
        bounds = _lengths(kwargs, hidden_states.shape[0])
        return functional.mamba_chunk_scan_combined(*given, z=kwargs.get("z"), cu_seqlens=bounds, **options)

    return run


def _scan_step(original: Callable) -> Callable:
    """A token of the scan, with the state in a model's cache."""
    original_on_cpu = inspect.unwrap(original)

    @functools.wraps(_function(original), updated=())
    def run(
        state: Tensor,  # [B, H, P, N]
        hidden_states: Tensor,  # [B, H, P]
        dt: Tensor,  # [B, H, P]
        A: Tensor,  # [H, P, N]
        B: Tensor,  # [B, G, N]
        C: Tensor,  # [B, G, N]
        D: Tensor | None = None,  # [H, P]
        dt_bias: Tensor | None = None,  # [H, P]
        dt_softplus: bool = False,
        z: Tensor | None = None,  # [B, H, P]
        **kwargs: Any,
    ) -> Tensor:  # [B, H, P]
        given = (state, hidden_states, dt, A, B, C)
        options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "z": z}
        if not _is_ours(hidden_states, "delta_rule_update_"):
            return original(*given, **options, **kwargs)
        heads = hidden_states.dim() == 3 and state.dtype in (hidden_states.dtype, torch.float32)
        if not heads or _needs_gradient(*given, D, dt_bias, z):
            return original_on_cpu(*given, **options, **kwargs)
        return functional.selective_state_update(*given, **options)

    return run


def _layer(original: Callable) -> Callable:
    """The forward of a gated-delta layer of Qwen's kind: one native call between its projections for a token with a
    cache, and the original, whose functions are replaced too, for everything else.

    The call does not round between its parts to the model's dtype, as the original does with step sizes and within the
    norm. It stands in for the convolution and the norm, so both must be what the model was made with: no hooks, no
    kernels of a mapping.
    """

    @functools.wraps(original)
    def run(
        self: Any,
        hidden_states: Tensor,  # [B, T, hidden]
        cache_params: Any = None,
        attention_mask: Tensor | None = None,  # [B, T]
        **kwargs: Any,
    ) -> Tensor:  # [B, T, hidden]
        given = (hidden_states, cache_params, attention_mask)
        alone = cache_params is not None and attention_mask is None and hidden_states.shape[1] == 1 and depth() == 0
        native = rule.may_decode(hidden_states) and not torch.is_grad_enabled()
        if not alone or not native or _packed(kwargs) or not _is_plain(self):
            return original(self, *given, **kwargs)
        conv_state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        if conv_state is None or state is None or cache_params.is_recording_past(self.layer_idx):
            return original(self, *given, **kwargs)
        x, gate, g, beta = _projected(self, hidden_states)
        bias = self.conv1d.bias
        convolution_of = ((x,), (conv_state,), (self.conv1d.weight,), None if bias is None else (bias,), None)
        gates, norm = (g, beta, self.A_log, self.dt_bias), self.norm
        o = rule.decode(
            *convolution_of, *gates, state, norm.weight, gate, True, norm.variance_epsilon, False, None, None
        )
        if o is None:
            return original(self, *given, **kwargs)
        cache_params.update_recurrent_state(state, self.layer_idx)
        return self.out_proj(o)

    return run


def _is_plain(layer: Any) -> bool:
    """Whether the layer's convolution and norm are SiLU's and no more than their classes' own."""
    own = type(layer.norm).__module__ == type(layer).__module__ and type(layer.conv1d) is torch.nn.Conv1d
    silu = layer.activation in ("silu", "swish") and getattr(layer.norm, "activation", "silu") in ("silu", "swish")
    return own and silu and is_bare(layer.conv1d) and is_bare(layer.norm)


def _projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v beside each other, the norm's gate, and g and beta before their activations."""
    if hasattr(layer, "in_proj_qkv"):
        return layer.in_proj_qkv(x), layer.in_proj_z(x), layer.in_proj_a(x), layer.in_proj_b(x)
    *q_k_v, gate, beta, g = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    return torch.cat([y.flatten(2) for y in q_k_v], -1), gate, g, beta


# What transformers' kernel look-up calls a function, and what a modeling module calls it.
_REPLACEMENTS: dict[str, Callable[[Callable], Callable]] = {
    "chunk_gated_delta_rule": functools.partial(_rule, functional.chunk_gated_delta_rule, None),
    "fused_recurrent_gated_delta_rule": functools.partial(
        _rule, functional.fused_recurrent_gated_delta_rule, rule.Gate.PER_HEAD
    ),
    "chunk_kda": functools.partial(_rule, functional.chunk_kda, None),
    "fused_recurrent_kda": functools.partial(_rule, functional.fused_recurrent_kda, rule.Gate.PER_KEY),
    "mamba_chunk_scan_combined": _scan,
    "selective_state_update": _scan_step,
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _step,
    "create_recurrent_attention_mask": _mask,
    "gated delta layer": _layer,
}
_NAMES = {
    "torch_chunk_gated_delta_rule": "chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule": "fused_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "chunk_kda",
    "recurrent_kimi_delta_attention": "fused_recurrent_kda",
    "mamba2_chunk_scan": "mamba_chunk_scan_combined",
    "mamba2_selective_state_update": "selective_state_update",
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
    "create_recurrent_attention_mask": "create_recurrent_attention_mask",
}
_LAYERS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
_RULE = {"query", "key", "value", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}
_FILTER = {"hidden_states", "weight", "bias", "activation"}
_SCAN = {"hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus"}
_ARGUMENTS = {
    "mamba_chunk_scan_combined": _SCAN | {"chunk_size", "initial_states", "dt_limit", "return_final_states"},
    "selective_state_update": _SCAN | {"state", "z"},
    "causal_conv1d_fn": _FILTER,
    "causal_conv1d_update": _FILTER | {"conv_state"},
    "create_recurrent_attention_mask": {"inputs_embeds", "attention_mask"},
    "gated delta layer": {"hidden_states", "cache_params", "attention_mask"},
}


def _check_signature(kind: str, function: Callable) -> None:
    """That a function of an unknown version still takes what its replacement does."""
    missing = sorted(_ARGUMENTS.get(kind, _RULE) - inspect.signature(_function(function)).parameters.keys())
    if missing:
        import transformers

        raise RuntimeError(
            f"{getattr(function, '__module__', '?')} of transformers {transformers.__version__} has a {kind} without "
            f"{', '.join(missing)}, which pyrepr cannot replace; the supported version is {TESTED}"
        )


def _replace(kind: str, original: Callable) -> Callable:
    if hasattr(original, _ORIGINAL):
        return original
    _check_signature(kind, original)
    made = _REPLACEMENTS[kind](original)
    object.__setattr__(made, _ORIGINAL, original)
    return made


def _loaded() -> Iterator[tuple[Any, str, str]]:
    """(module, name of a function, kind) of everything there is to replace in the modeling modules imported so far."""
    for path, module in list(sys.modules.items()):
        if _is_model_file(path):
            yield from _found(module)


def _is_model_file(path: str) -> bool:
    return path.startswith(_MODELS) and ".modeling_" in path


def _found(module: Any) -> Iterator[tuple[Any, str, str]]:
    names = vars(module)
    if "causal_conv1d_fn" in names:  # every model file with one of the others has this one
        yield from ((module, name, kind) for name, kind in _NAMES.items() if name in names)
        yield from ((names[name], "forward", "gated delta layer") for name in _LAYERS if name in names)


def _replace_in(found: Iterator[tuple[Any, str, str]]) -> None:
    """All of it or nothing."""
    for module, name, function in [(m, name, _replace(kind, getattr(m, name))) for m, name, kind in found]:
        setattr(module, name, function)


class _ModelFiles(importlib.abc.MetaPathFinder):
    """Reaches model files imported after :func:`enable`, for functions that no decorator passes on."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not _is_model_file(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.abc.Loader):
            return spec
        execute = spec.loader.exec_module

        def run(module: Any) -> None:
            execute(module)
            _replace_in(_found(module))

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


_FINDER = _ModelFiles()


def enable() -> None:
    """Puts pyrepr's kernels under every gated-delta, KDA and Mamba-2 model, those already made and those still to come.

    The rules run on CPU tensors only, whether or not flash-linear-attention or causal-conv1d are installed. While
    decoding, the state in a model's cache is updated in place, and layers of Qwen3-Next and Qwen3.5 (with its MoE) make
    one call of all that is between their projections (:func:`pyrepr.functional.gated_delta_decode`), which rounds less
    than their own code: logits of a bfloat16 model differ by its rounding. Where a hook or a mapped kernel looks at
    their convolution or norm, with padding, or with gradients, they run as they were, call by call. Packed sequences
    (``cu_seq_lens_q`` or ``seq_idx``) are kept apart, where transformers' PyTorch fallback raises: every one comes out
    as it does alone, to rounding.
    Training of Mamba-2's models where mamba_ssm is installed runs its one function for convolution, scan and norm,
    which is not replaced.

    Raises:
        ImportError: if transformers is not installed.
        RuntimeError: if this transformers has no place where the functions could be put.

    Warns:
        UserWarning: if the version is not the tested one; later, in a call whose ``position_ids`` restart within a row
            while neither ``cu_seq_lens_q`` nor ``seq_idx`` is given: attention keeps these documents apart, linear
            layers cannot.
    """
    try:
        import transformers
        from transformers.integrations import hub_kernels
    except ImportError as error:
        raise ImportError(f"pyrepr.integrations.transformers needs transformers {TESTED}: {error}") from error
    factory = getattr(hub_kernels, _FACTORY, None)
    if factory is None:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no {_FACTORY}, which pyrepr.integrations.transformers "
            f"replaces; the tested version is {TESTED}"
        )
    if not transformers.__version__.startswith(TESTED + "."):
        warnings.warn(
            f"pyrepr.integrations.transformers is tested with transformers {TESTED}, got {transformers.__version__}",
            stacklevel=2,
        )
    _replace_in(_loaded())
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if not hasattr(factory, _ORIGINAL):
        _set_factory(_later(factory, hub_kernels.use_kernel_forward_from_hub))


def _later(factory: Callable, for_mapping: Callable) -> Callable:
    """The decorator factory with which modules still to be imported get their functions."""

    @functools.wraps(factory)
    def run(func_name: str, *args: Any, **kwargs: Any) -> Callable:
        decorator = factory(func_name, *args, **kwargs)
        if func_name not in _REPLACEMENTS:
            return decorator

        def replace(function: Callable) -> Callable:
            original = decorator(function)
            made = for_mapping(func_name)(_replace(func_name, original))
            object.__setattr__(made, _ORIGINAL, original)
            return made

        return replace

    setattr(run, _ORIGINAL, factory)
    return run


def disable() -> None:
    """Gives every module back what it had before :func:`enable`; does nothing without one."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    _restarted.clear()
    for module, name, _ in _loaded():
        function = getattr(module, name)
        setattr(module, name, getattr(function, _ORIGINAL, function))
    hub_kernels = sys.modules.get("transformers.integrations.hub_kernels")
    factory = getattr(getattr(hub_kernels, _FACTORY, None), _ORIGINAL, None)
    if factory is not None:
        _set_factory(factory)


def _set_factory(factory: Callable) -> None:
    from transformers import integrations
    from transformers.integrations import hub_kernels

    setattr(hub_kernels, _FACTORY, factory)
    setattr(integrations, _FACTORY, factory)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for the length of a ``with`` block."""
    enable()
    try:
        yield
    finally:
        disable()
