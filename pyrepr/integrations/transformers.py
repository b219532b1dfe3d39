"""Runs the gated-delta and KDA models of transformers on pyrepr's CPU kernels.

    import pyrepr.integrations.transformers as accelerated
    accelerated.enable()          # models made before and after this line; `disable()` takes it back

transformers resolves ``chunk_gated_delta_rule``, ``fused_recurrent_gated_delta_rule``, ``chunk_kda`` and
``fused_recurrent_kda`` once, when a modeling module is imported, regardless of the device: flash-linear-attention if it
is installed (whose kernels do not run on a CPU), else a PyTorch fallback. Its own kernel mapping wants the package
``kernels`` and reaches only models asked for with ``use_kernels=True``; so here the modules' functions are replaced.
CPU tensors go to pyrepr, all others to what was there before. Tested with transformers 5.23.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pyrepr

__all__ = ["disable", "enable", "enabled"]

TESTED = "5.23"
_MODELS = "transformers.models."
_FACTORY = "use_kernel_func_from_hub_with_fallback"
_ORIGINAL = "_pyrepr_original"


def _rule(function: Callable, original: Callable) -> Callable:
    """A delta rule with the arguments that models pass, whatever else they pass along."""

    @functools.wraps(original)
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *args: Any,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        options = {
            "initial_state": initial_state,
            "output_final_state": output_final_state,
            "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        }
        if query.device.type != "cpu" or args:
            return original(query, key, value, g, beta, *args, **options, **kwargs)
        if initial_state is not None:
            options["initial_state"] = initial_state.float()
        lengths = kwargs.get("cu_seqlens")
        options["cu_seqlens"] = kwargs.get("cu_seq_lens_q") if lengths is None else lengths
        o, state = function(query.to(value.dtype), key.to(value.dtype), value, g, beta, **options)
        return o.to(query.dtype), state

    return run


def _packed_convolution(
    x: Tensor,  # [1, D, T]
    weight: Tensor,  # [D, W]
    bias: Tensor | None,  # [D]
    sequence: Tensor,  # [T] which sequence a token belongs to
) -> Tensor:  # [1, D, T]
    """Depthwise causal convolution that does not look across the border of a sequence."""
    x = x.to(weight.dtype)
    taps = weight.shape[-1]
    out = x * weight[:, -1:]
    for back in range(1, min(taps, x.shape[-1])):
        same = sequence[back:] == sequence[:-back]
        moved = x[..., :-back] * same * weight[:, taps - 1 - back, None]
        out = out + torch.nn.functional.pad(moved, (back, 0))
    return out if bias is None else out + bias[:, None]


def _convolution(original: Callable) -> Callable:
    """The causal convolution before a delta rule; packed sequences are kept apart, where the fallback cannot."""

    @functools.wraps(original)
    def run(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs):
        bounds = next((kwargs[n] for n in ("cu_seqlens", "cu_seq_lens_q") if kwargs.get(n) is not None), None)
        sequence = kwargs.get("seq_idx")
        if sequence is None and bounds is not None:
            positions = torch.arange(hidden_states.shape[-1], device=bounds.device)
            sequence = torch.bucketize(positions, bounds.to(positions.dtype), right=True)
        if sequence is None or hidden_states.device.type != "cpu":
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        if hidden_states.shape[0] != 1:
            raise ValueError(f"packed sequences need a batch of 1, got {hidden_states.shape[0]}")
        out = _packed_convolution(hidden_states, weight, bias, sequence.flatten())
        if activation is not None:
            from transformers.activations import ACT2FN

            out = ACT2FN[activation](out)
        return out.to(hidden_states.dtype)

    return run


# The name a modeling module gives a function, and the one it has for transformers' kernel look-up.
_REPLACEMENTS: dict[str, Callable[[Callable], Callable]] = {
    "chunk_gated_delta_rule": functools.partial(_rule, pyrepr.chunk_gated_delta_rule),
    "fused_recurrent_gated_delta_rule": functools.partial(_rule, pyrepr.fused_recurrent_gated_delta_rule),
    "chunk_kda": functools.partial(_rule, pyrepr.chunk_kda),
    "fused_recurrent_kda": functools.partial(_rule, pyrepr.fused_recurrent_kda),
}
_NAMES = {
    "torch_chunk_gated_delta_rule": "chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule": "fused_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "chunk_kda",
    "recurrent_kimi_delta_attention": "fused_recurrent_kda",
}
_CONVOLUTION = "causal_conv1d_fn"


def _replace(kind: str, original: Callable) -> Callable:
    if hasattr(original, _ORIGINAL):
        return original
    made = _convolution(original) if kind == _CONVOLUTION else _REPLACEMENTS[kind](original)
    setattr(made, _ORIGINAL, original)
    return made


def _loaded() -> Iterator[tuple[Any, str, str]]:
    """(module, name of a function, kind) of every imported modeling module that has a delta rule."""
    for path, module in list(sys.modules.items()):
        names = vars(module) if path.startswith(_MODELS) and ".modeling_" in path else {}
        if any(name in names for name in _NAMES):
            for name, kind in (*_NAMES.items(), (_CONVOLUTION, _CONVOLUTION)):
                if name in names:
                    yield module, name, kind


def enable() -> None:
    """Puts pyrepr's kernels under every gated-delta and KDA model, those already made and those still to come.

    Convolutions stay transformers' own, except that packed sequences (``cu_seq_lens_q`` or ``seq_idx``) are kept apart,
    where its PyTorch fallback raises.

    Raises:
        ImportError: if transformers is not installed.
        RuntimeError: if this transformers has no place where the functions could be put.

    Warns:
        UserWarning: if the version is not the tested one.
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
    for module, name, kind in _loaded():
        setattr(module, name, _replace(kind, getattr(module, name)))
    if hasattr(factory, _ORIGINAL):
        return

    @functools.wraps(factory)
    def later(func_name: str, *args: Any, **kwargs: Any) -> Callable:
        decorator = factory(func_name, *args, **kwargs)
        if func_name not in _REPLACEMENTS and func_name != _CONVOLUTION:
            return decorator
        return lambda function: _replace(func_name, decorator(function))

    setattr(later, _ORIGINAL, factory)
    _set_factory(later)


def disable() -> None:
    """Gives every module back what it had before :func:`enable`; does nothing without one."""
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
