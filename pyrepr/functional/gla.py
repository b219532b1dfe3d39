"""Linear attention that decays and erases nothing: gated linear attention, with a gate per head or per key channel.

    S ← e^{g_t}·S;   S ← S + k_t v_tᵀ;   o_t = scale · Sᵀ q_t

Names, order and meaning of arguments are those of flash-linear-attention 0.6. It is the delta rule of
:mod:`pyrepr.functional.delta_rule` without its erase, and runs on the same kernels of the CPU with less to do; GPU
tensors take plain PyTorch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrepr._checks import INTEGERS, check_device, check_shape, check_tensor
from pyrepr.functional._delta_rule_extras import call, without_erase
from pyrepr.reference.delta_rule import Gate

__all__ = ["chunk_gla", "chunk_simple_gla", "fused_recurrent_gla", "fused_recurrent_simple_gla"]


def chunk_simple_gla(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None = None,  # [B, T, HV]
    g_gamma: Tensor | None = None,  # [HV]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """Gated linear attention with one gate a head: the state-space duality of Mamba-2 (Dao and Gu 2024, "Transformers
    are SSMs"), retention (Sun et al. 2023) with g_gamma, linear attention without a gate.

    Args:
        q, k: [B, T, H, K]; float32, bfloat16, float16 or float64; any strides.
        v: [B, T, HV, V] of the same dtype. HV is a multiple of H; value head i uses query and key head i // (HV // H).
        g: [B, T, HV], natural logarithm of the decay of the state before each token, meant to be ≤ 0. Any floating
            dtype. Default no decay.
        g_gamma: [HV], the same for a decay that is one for all tokens; not together with g. Default none.
        scale: factor on q. Default K^−½, as in softmax attention.
        initial_state: [N, HV, K, V] in float32 (float64 for float64 inputs), N the sequences. Default zero.
        output_final_state: return the state after the last token as well; default no.
        state_v_first, cu_seqlens, cu_seqlens_cpu, chunk_size: as in :func:`pyrepr.chunk_delta_rule`.

    Returns:
        o: [B, T, HV, V] in v's dtype, and the final state in float32 (float64 for float64 inputs), or ``None``.
        Differentiable in q, k, v, the gate and initial_state, as :func:`pyrepr.chunk_delta_rule` is: first derivatives
        in reverse run on the kernels, everything else goes through the chunk form in plain PyTorch.

    Raises:
        ValueError, TypeError: if an argument has the wrong shape, dtype, device or range; NaN stays in its sequence
            and head.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> o, state = pyrepr.functional.chunk_simple_gla(q, k, v, g=-torch.rand(1, 100, 2), output_final_state=True)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    g, gate = _per_head(v, g, g_gamma)
    more = without_erase(state_v_first=state_v_first, cu_seqlens_cpu=cu_seqlens_cpu, chunk_size=chunk_size)
    return call(more, q, k, v, g, None, scale, initial_state, output_final_state, False, cu_seqlens, gate)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    output_states: str | int | None = None,
) -> Any:
    """:func:`chunk_simple_gla` for decoding.

    Args:
        reverse: go from the last token of every sequence to its first; default no. Not with the three below.
        out_state, state_indices, output_states: as in :func:`pyrepr.fused_recurrent_delta_rule`.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> state = torch.zeros(1, 2, 16, 16)
        >>> o, _ = pyrepr.functional.fused_recurrent_simple_gla(
        ...     q, k, v, g=-torch.rand(1, 1, 2), initial_state=state, out_state=state
        ... )
        >>> o.shape
        torch.Size([1, 1, 2, 16])
    """
    g, gate = _per_head(v, g, g_gamma)
    kept = {"out_state": out_state, "state_indices": state_indices, "output_states": output_states}
    options = {"state_v_first": state_v_first}
    if reverse:
        return _backwards(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, gate, kept, options)
    out = kept.pop("out_state")
    more = without_erase(**options, **kept)
    return call(more, q, k, v, g, None, scale, initial_state, output_final_state, False, cu_seqlens, gate, out)


def chunk_gla(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor,  # [B, T, HV, K]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, HV, K, V]
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor | None]:  # [B, T, HV, V], [N, HV, K, V]
    """Gated linear attention with a gate per key channel (Yang et al. 2024, "Gated Linear Attention Transformers with
    Hardware-Efficient Training").

    Args:
        g: [B, T, HV, K], natural logarithm of the decay of every row of the state before each token.

    Everything else, and what is returned and raised, is as in :func:`chunk_simple_gla`.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> o, _ = pyrepr.functional.chunk_gla(q, k, v, g=-torch.rand(1, 100, 2, 16))
        >>> o.shape
        torch.Size([1, 100, 2, 16])
    """
    more = without_erase(state_v_first=state_v_first, cu_seqlens_cpu=cu_seqlens_cpu)
    return call(more, q, k, v, g, None, scale, initial_state, output_final_state, False, cu_seqlens, Gate.PER_KEY)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    out_state: Tensor | None = None,
    state_indices: Tensor | None = None,
    output_states: str | int | None = None,
) -> Any:
    """:func:`chunk_gla` for decoding.

    Args:
        gk: [B, T, HV, K], what is g there; default no decay.
        gv: [B, T, HV, V], a decay per value channel, on top of gk; every channel then is a head of its own, which takes
            V times the work of the keys. Default none.
        reverse, out_state, state_indices, output_states: as in :func:`fused_recurrent_simple_gla`.

    Example:
        >>> q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
        >>> o, _ = pyrepr.functional.fused_recurrent_gla(q, k, v, gk=-torch.rand(1, 1, 2, 16))
        >>> o.shape
        torch.Size([1, 1, 2, 16])
    """
    kept = {"out_state": out_state, "state_indices": state_indices, "output_states": output_states}
    options = {"state_v_first": state_v_first, "gk": gk, "gv": gv}
    if reverse:
        given = (q, k, v, None, scale, initial_state, output_final_state, cu_seqlens, Gate.NONE)
        return _backwards(*given, kept, options)
    out = kept.pop("out_state")
    more = without_erase(**options, **kept)
    return call(more, q, k, v, None, None, scale, initial_state, output_final_state, False, cu_seqlens, Gate.NONE, out)


def _per_head(v: Any, g: Tensor | None, g_gamma: Tensor | None) -> tuple[Tensor | None, Gate]:
    """The gate of every token, and its kind."""
    if g_gamma is None:
        return g, Gate.NONE if g is None else Gate.PER_HEAD
    if g is not None:
        raise ValueError("g and g_gamma both say how the state decays; give one of them")
    v, g_gamma = check_tensor("v", v), check_tensor("g_gamma", g_gamma)
    check_device("g_gamma", g_gamma, "v", v)
    if v.dim() != 4:
        return None, Gate.NONE  # v is refused where all shapes are
    check_shape("g_gamma", g_gamma, "[HV]", (v.shape[2],))
    return g_gamma.expand(v.shape[:3]), Gate.PER_HEAD


def _backwards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    gate: Gate,
    kept: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """A call that goes from the last token to the first: the same of everything in reverse, whole sequences too."""
    for name, value in kept.items():
        if value is not None:
            raise ValueError(f"{name} is for tokens in their order, so reverse must be False with it, got True")

    def turned(name: str, x: Any, axis: int = 1) -> Any:
        return x if x is None or check_tensor(name, x).dim() <= axis else x.flip(axis)

    packed = False
    if cu_seqlens is not None and check_tensor("cu_seqlens", cu_seqlens, INTEGERS).numel() > 0:
        packed = True
        cu_seqlens, initial_state = cu_seqlens[-1] - cu_seqlens.flip(0), turned("initial_state", initial_state, 0)
    q, k, v, g = (turned(name, x) for name, x in zip("qkvg", (q, k, v, g), strict=True))
    more = without_erase(**{name: x if isinstance(x, bool) else turned(name, x) for name, x in options.items()})
    o, state = call(more, q, k, v, g, None, scale, initial_state, output_final_state, False, cu_seqlens, gate)
    return o.flip(1), state.flip(0) if packed and state is not None else state
