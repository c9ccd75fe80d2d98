"""Layers with structured weights that take the place of torch's own."""

from __future__ import annotations

from .blast import BLASTLinear
from .ks_conv import KSConv2d
from .ks_linear import KSLinear, named_chain
from .param_groups import Core, initial_std, param_groups
from .sparse_conv import SparseConv2d
from .sparse_linear import SparseLinear
from .swap import Replaced, SwappedLayer, replace_linears

__all__ = [
    "BLASTLinear",
    "Core",
    "KSConv2d",
    "KSLinear",
    "Replaced",
    "SparseConv2d",
    "SparseLinear",
    "SwappedLayer",
    "initial_std",
    "named_chain",
    "param_groups",
    "replace_linears",
]
