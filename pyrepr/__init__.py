"""Kernels for neural representations: fused CKA and Gram matrices, delta-rule scans, hashed lookup layers."""

from __future__ import annotations

import torch  # noqa: F401  (loads the one OpenMP runtime that pyrepr._C shares, before _C is loaded)

from pyrepr import nn
from pyrepr._version import __version__
from pyrepr.backend import backends, use_backend
from pyrepr.functional import (
    causal_conv1d_fn,
    causal_conv1d_update,
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
    hash_codes,
    lookup_linear,
    lookup_sum,
    pack_tables,
    segment_sum,
)
from pyrepr.models import (
    Comparison,
    Conversion,
    Distillation,
    compare,
    convert,
    distill,
    load_converted,
    save_converted,
)
from pyrepr.similarity import DegenerateInputWarning, Kernel, StreamingCKA, cka, cka_matrix, gram, hsic

__all__ = [
    "Comparison",
    "Conversion",
    "DegenerateInputWarning",
    "Distillation",
    "Kernel",
    "StreamingCKA",
    "__version__",
    "backends",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "cka",
    "cka_matrix",
    "compare",
    "convert",
    "distill",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
    "gram",
    "hash_codes",
    "hsic",
    "load_converted",
    "lookup_linear",
    "lookup_sum",
    "nn",
    "pack_tables",
    "save_converted",
    "segment_sum",
    "use_backend",
]
