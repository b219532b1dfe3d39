"""Functions on tensors: delta-rule attention, causal convolutions, hashed lookups, all pairs of rows."""

from pyrepr.functional.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from pyrepr.functional.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)
from pyrepr.functional.lookup import hash_codes, lookup_linear, lookup_sum, pack_tables, segment_sum
from pyrepr.functional.pairs import info_nce, pairwise_logsumexp, pairwise_topk

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda",
    "hash_codes",
    "info_nce",
    "lookup_linear",
    "lookup_sum",
    "pack_tables",
    "pairwise_logsumexp",
    "pairwise_topk",
    "segment_sum",
]
