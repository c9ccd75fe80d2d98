"""Layers with structured weights that take the place of torch's own."""

from __future__ import annotations

from .attention_sampling import AttentionSampling
from .blast import BLASTLinear
from .feature_maps import FAVOR, T2R, Hedgehog
from .ks_conv import KSConv2d
from .ks_linear import KSLinear, named_chain
from .linear_attention import LinearAttention
from .param_groups import Core, initial_std, param_groups
from .sparse_conv import SparseConv2d
from .sparse_linear import SparseLinear
from .sparse_swap import MadeSparse, SparseLayer, use_sparse
from .swap import Replaced, SwappedLayer, replace_linears
from .transformer import FusedStep, SoftmaxAttention, TransformerBlock, fuse

__all__ = [
    "FAVOR",
    "T2R",
    "AttentionSampling",
    "BLASTLinear",
    "Core",
    "FusedStep",
    "Hedgehog",
    "KSConv2d",
    "KSLinear",
    "LinearAttention",
    "MadeSparse",
    "Replaced",
    "SoftmaxAttention",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "SwappedLayer",
    "TransformerBlock",
    "fuse",
    "initial_std",
    "named_chain",
    "param_groups",
    "replace_linears",
    "use_sparse",
]
