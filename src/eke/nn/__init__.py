"""Layers with structured weights that take the place of torch's own."""

from __future__ import annotations

from .attention_sampling import AttentionSampling
from .attention_transfer import output_errors, transfer_attention_, weight_divergences
from .blast import BLASTLinear
from .cluster_choice import HeadChoice, choose_clusters
from .cluster_conversion import Clustered, ClusteredLayer, cluster_attention
from .clustered_attention import ClusteredAttention, Clustering, ImprovedClusteredAttention
from .conversion import Linearized, LinearizedLayer, linearize
from .feature_maps import FAVOR, T2R, Hedgehog
from .fused_step import FusedStep
from .hf_attention import register_hf_attention
from .hf_cache import recurrent_cache
from .hybrid_attention import HybridAttention, HybridState
from .ks_conv import KSConv2d
from .ks_linear import KSLinear, named_chain
from .linear_attention import LinearAttention
from .low_rank_tuning import low_rank_tuning_
from .param_groups import Core, initial_std, param_groups
from .softmax_sites import AttentionSite, attention_sites
from .sparse_conv import SparseConv2d
from .sparse_linear import SparseLinear
from .sparse_swap import MadeSparse, SparseLayer, use_sparse
from .swap import Replaced, SwappedLayer, replace_linears
from .transformer import SoftmaxAttention, TransformerBlock, fuse

__all__ = [
    "FAVOR",
    "T2R",
    "AttentionSampling",
    "AttentionSite",
    "BLASTLinear",
    "Clustered",
    "ClusteredAttention",
    "ClusteredLayer",
    "Clustering",
    "Core",
    "FusedStep",
    "HeadChoice",
    "Hedgehog",
    "HybridAttention",
    "HybridState",
    "ImprovedClusteredAttention",
    "KSConv2d",
    "KSLinear",
    "LinearAttention",
    "Linearized",
    "LinearizedLayer",
    "MadeSparse",
    "Replaced",
    "SoftmaxAttention",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "SwappedLayer",
    "TransformerBlock",
    "attention_sites",
    "choose_clusters",
    "cluster_attention",
    "fuse",
    "initial_std",
    "linearize",
    "low_rank_tuning_",
    "named_chain",
    "output_errors",
    "param_groups",
    "recurrent_cache",
    "register_hf_attention",
    "replace_linears",
    "transfer_attention_",
    "use_sparse",
    "weight_divergences",
]
