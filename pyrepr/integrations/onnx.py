"""Modules with pyrepr's linear attention as ONNX files, which engines run where neither PyTorch nor pyrepr is.

    from pyrepr.integrations.onnx import export
    export(layer, (torch.randn(1, 64, 256),), "layer.onnx")

The delta rules, GLA's among them, become ``LinearAttention`` of ONNX's opset 27, the convolution before them
``CausalConvWithState``; what stands around them (projections, gates, norms) becomes what ``torch.onnx.export`` makes of
it. A module that takes and returns states gives a file that does: ``initial_state`` and the final state are the
operator's. ONNX Runtime runs such files from 1.32 on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyrepr.ops.causal_conv1d
import pyrepr.ops.delta_rule  # noqa: F401  (defines torch.ops.pyrepr)
from pyrepr._checks import name_of
from pyrepr._optional import ONNX, require

__all__ = ["export"]

OPSET = 27
_EXPORTED = 23  # the newest that torch.onnx writes; what it writes reads the same in OPSET
_IR = 13  # of OPSET
_EPSILON = 1e-6  # of the L2 norm, as in the reference


def _node(name: str, inputs: list[Tensor | None], shapes: list[tuple], **attributes: Any) -> tuple[Tensor, ...]:
    """A node of ONNX's with float32 results."""
    dtypes = [torch.float32] * len(shapes)
    return tuple(torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=dtypes, shapes=shapes))


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)


def _heads(x: Tensor, count: int, l2norm: bool) -> Tensor:
    """[B, T, H, K] in float32, normalised, a head for every value head, packed as [B, T, HV · K]."""
    x = x.to(torch.float32)
    if l2norm:
        x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON)
    if count != x.shape[2]:
        x = x.repeat_interleave(count // x.shape[2], 2)
    return x.flatten(2)


def _linear_attention(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, slots):
    """``delta_rule_forward`` as a node: o, the final state, and no states for a backward."""
    batch, total, heads, width = v.shape
    rule = ("linear", "gated", "delta", "gated_delta")[(g is not None) + 2 * (beta is not None)]
    state_shape = (batch, heads, k.shape[3], width)
    o, state = _node(
        "LinearAttention",
        [
            _heads(q, heads, use_qk_l2norm),
            _heads(k, heads, use_qk_l2norm),
            v.to(torch.float32).flatten(2),
            _float(initial_state),
            None if g is None else g.to(torch.float32).flatten(2),
            _float(beta),
        ],
        [(batch, total, heads * width), state_shape],
        q_num_heads=heads,
        kv_num_heads=heads,
        update_rule=rule,
        scale=float(scale),
    )
    return o.unflatten(2, (heads, width)).to(v.dtype), state, state.new_empty((0, *state_shape[1:]))


def _convolution(x, weight, bias, initial_states, seq_idx, cu_seqlens, silu):
    """``causal_conv1d_forward`` as a node. x: [B, T, D]."""
    batch, total, channels = x.shape
    y, _ = _node(
        "CausalConvWithState",
        [x.to(torch.float32).mT, weight.to(torch.float32)[:, None], _float(bias), _float(initial_states)],
        [(batch, channels, total), (batch, channels, weight.shape[1] - 1)],
        activation="silu" if silu else "none",
    )
    return y.mT.to(x.dtype)


def _nodes() -> dict[Any, Callable]:
    ops = torch.ops.pyrepr
    return {ops.delta_rule_forward.default: _linear_attention, ops.causal_conv1d_forward.default: _convolution}


def _check(program: torch.export.ExportedProgram) -> None:
    """That opset 27 can say all that is pyrepr's in a graph."""
    for node in program.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "pyrepr":
            continue
        name = target._schema.name.split("::")[1]
        if target not in _nodes():
            raise ValueError(f"module must be made of what ONNX's opset {OPSET} can say, which has nothing for {name}")
        arguments = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        for packing in ("cu_seqlens", "seq_idx"):
            if arguments.get(packing) is not None:
                raise ValueError(f"{packing} must be None, ONNX's opset {OPSET} keeps no packed sequences apart")
        for x in node.all_input_nodes:
            if x.meta["val"].dtype == torch.float64:
                came = name_of(torch.float64)
                raise TypeError(f"module must be float32, bfloat16 or float16 for {name} of ONNX, got {came}")


def export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    path: str | Path | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Any:
    """A module as an ONNX program of opset 27, and with a path as a file.

    Args:
        module: layers of :mod:`pyrepr.nn`, or any module that calls the delta rules, GLA or the convolution; it is
            exported in the mode it is in. Its 16-bit tensors meet these two operators in float32, as in pyrepr.
        args, kwargs: inputs to trace it with. dynamic_shapes: as for ``torch.export``; default: shapes are those of the
            inputs.
        path: where to write; default nowhere.
        options: for ``torch.onnx.export``, such as ``input_names`` and ``output_names``.

    Returns:
        What ``torch.onnx.export`` does, a ``torch.onnx.ONNXProgram``, with ``save`` and ``model_proto``.

    Raises:
        ImportError: without onnx and onnxscript, which ``pip install "pyrepr-kernels[onnx]"`` brings.
        ValueError, TypeError: for what the opset cannot say: packed sequences (``cu_seqlens``, ``seq_idx``), float64,
            and other operations of pyrepr, among them updates in place.

    Example:
        >>> from pyrepr.integrations.onnx import export
        >>> layer = pyrepr.nn.GatedDeltaNet(64, head_dim=16, num_heads=2)
        >>> "LinearAttention" in {node.op_type for node in export(layer, (torch.randn(1, 8, 64),)).model.graph}
        True
    """
    for needed in ("onnx", "onnxscript"):
        require(needed, ONNX)
    with torch.no_grad():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        _check(program)
        program = program.run_decompositions(_nodes())
        made: Any = torch.onnx.export(program, dynamo=True, opset_version=_EXPORTED, verbose=False, **options)
    made.model.opset_imports[""] = OPSET
    made.model.ir_version = _IR
    if path is not None:
        made.save(path)
    return made
