"""Functions on tensors: delta-rule attention, causal convolutions, lookups, soft codes, rows, all pairs of rows."""

from pyrepr.functional.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from pyrepr.functional.codes import Clusters, bag_of_codes, cluster_tokens, soft_lookup, unpool_tokens
from pyrepr.functional.delta_decode import gated_delta_decode
from pyrepr.functional.delta_product import chunk_gated_delta_product
from pyrepr.functional.delta_rule import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_kda,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_kda,
)
from pyrepr.functional.erase import chunk_comba, chunk_gdn2, fused_recurrent_comba, fused_recurrent_gdn2
from pyrepr.functional.flops import flop_formulas
from pyrepr.functional.gla import chunk_gla, chunk_simple_gla, fused_recurrent_gla, fused_recurrent_simple_gla
from pyrepr.functional.lookup import hash_codes, lookup_linear, lookup_sum, pack_tables, segment_sum
from pyrepr.functional.mamba import mamba_chunk_scan_combined, selective_state_update
from pyrepr.functional.norm import rms_norm_gated
from pyrepr.functional.pairs import info_nce, pairwise_logsumexp, pairwise_topk
from pyrepr.functional.rows import householder, orthogonal_residual, paired_cosine
from pyrepr.functional.signs import sign_linear

__all__ = [
    "Clusters",
    "bag_of_codes",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chunk_comba",
    "chunk_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_kda",
    "chunk_simple_gla",
    "cluster_tokens",
    "flop_formulas",
    "fused_recurrent_comba",
    "fused_recurrent_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_simple_gla",
    "gated_delta_decode",
    "hash_codes",
    "householder",
    "info_nce",
    "lookup_linear",
    "lookup_sum",
    "mamba_chunk_scan_combined",
    "orthogonal_residual",
    "pack_tables",
    "paired_cosine",
    "pairwise_logsumexp",
    "pairwise_topk",
    "rms_norm_gated",
    "segment_sum",
    "selective_state_update",
    "sign_linear",
    "soft_lookup",
    "unpool_tokens",
]
