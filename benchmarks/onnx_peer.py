"""ONNX Runtime's LinearAttention, the fastest other engine of the delta rule on a CPU, where it and onnx are there."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

UPDATE = {"plain": "delta", "gated": "gated_delta", "kda": "gated_delta", "simple GLA": "gated", "GLA": "gated"}


def onnx_runtime(
    rule: str, T: int, H: int, K: int, state: bool = False, scale: float | None = None, V: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """o and the final state of q, k, v, (g,) (beta) and with `state` the one before; ``None`` where it cannot run."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    V = V or K
    widths = {"q": H * K, "k": H * K, "v": H * V, "g": H * (K if rule in ("kda", "GLA") else 1), "beta": H}
    left_out = {"plain": "g", "simple GLA": "beta", "GLA": "beta"}.get(rule)
    shapes = {name: [1, T, width] for name, width in widths.items() if name != left_out}
    if state:
        shapes["state"] = [1, H, K, V]
    given = [name if name in shapes else "" for name in ("q", "k", "v", "state", "g", "beta")]
    options = {"q_num_heads": H, "kv_num_heads": H, "update_rule": UPDATE[rule], "scale": scale or K**-0.5}
    node = onnx.helper.make_node("LinearAttention", given, ["o", "after"], domain="com.microsoft", **options)

    def values(shapes: dict[str, list[int]]) -> list:
        return [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, s) for name, s in shapes.items()]

    results = {"o": [1, T, H * V], "after": [1, H, K, V]}
    graph = onnx.helper.make_graph([node], "delta_rule", values(shapes), values(results))
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, _one_thread_a_core(onnxruntime.SessionOptions()))

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        flat = {name: x.reshape(shape).numpy() for (name, shape), x in zip(_ordered(shapes), tensors, strict=True)}
        o, after = map(torch.from_numpy, session.run(None, flat))
        return o.view(1, T, H, V), after

    return run


def _ordered(shapes: dict[str, list[int]]) -> list[tuple[str, list[int]]]:
    return [(name, shapes[name]) for name in ("q", "k", "v", "g", "beta", "state") if name in shapes]


def _one_thread_a_core(options):
    """As many threads as PyTorch has; each on a core of its own where those of OpenMP are (see the harness)."""
    threads = torch.get_num_threads()
    options.intra_op_num_threads = threads
    cores = [i + 1 for i in range(1, threads)]  # numbered from 1; the first thread is the caller's
    if threads > 1 and os.environ.get("GOMP_CPU_AFFINITY") == f"0-{threads - 1}":
        options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(map(str, cores)))
    return options
