"""What a layer of the gated delta rule computes for one token between its projections: the truth that the native call
of :mod:`pyrepr.functional.delta_decode` is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrepr.reference import delta_rule as rule
from pyrepr.reference._dtypes import compute_dtype


def gated_delta_decode(
    x: Tensor,  # [B, D], D = 2 H K + HV V: q, k and v
    g: Tensor,  # [B, HV] before its activation
    beta: Tensor,  # [B, HV] before its sigmoid
    conv_state: Tensor,  # [B, D, S]
    state: Tensor,  # [B, HV, K, V]
    weight: Tensor,  # [D, W]
    A_log: Tensor,  # [HV]
    dt_bias: Tensor,  # [HV]
    norm_weight: Tensor | None = None,  # [V]
    gate: Tensor | None = None,  # [B, HV, V]
    bias: Tensor | None = None,  # [D]
    swish: bool = True,
    eps: float = 1e-5,
    twice: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, HV, V], [B, D, S], [B, HV, K, V]
    """The output and both states after the token, all in float32, in float64 for float64 inputs."""
    dtype = compute_dtype(x.dtype)
    heads, width, value_width = state.shape[1:]
    keys = (x.shape[1] - heads * value_width) // 2
    seen = torch.cat([conv_state, x[..., None]], -1).to(dtype)
    y = (seen[..., seen.shape[2] - weight.shape[1] :] * weight.to(dtype)).sum(-1)
    y = y if bias is None else y + bias.to(dtype)
    q, k, v = (y * torch.sigmoid(y)).split([keys, keys, heads * value_width], 1)
    o, after = rule.delta_rule(
        q.unflatten(1, (-1, width))[:, None],
        k.unflatten(1, (-1, width))[:, None],
        v.unflatten(1, (heads, value_width))[:, None],
        rule.decay(g[:, None], A_log, dt_bias, None, dtype),
        rule.step_sizes(beta[:, None], twice, dtype),
        None,
        state.to(dtype),
        use_qk_l2norm=True,
    )
    o = o[:, 0] / (o[:, 0].square().mean(-1, keepdim=True) + eps).sqrt()
    o = o if norm_weight is None else o * norm_weight.to(dtype)
    if gate is not None:
        open_ = torch.sigmoid(gate.to(dtype))
        o = o * (gate.to(dtype) * open_ if swish else open_)
    return o, seen[..., 1:], after
