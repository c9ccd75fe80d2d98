"""Sets of matrices with a projection, an honest size in bits and a declared exactness."""

from __future__ import annotations

from .both import Both, BothPacked
from .grids import Packed, UniformGrid
from .low_rank import LowRank, LowRankPacked
from .packing import pack, unpack
from .sparse import NM, Rows, Sparse, SparsePacked, Unstructured
from .structure import ColumnRule, Exactness, Structure, Supported, Sweepable, straight_through

__all__ = [
    "NM",
    "Both",
    "BothPacked",
    "ColumnRule",
    "Exactness",
    "LowRank",
    "LowRankPacked",
    "Packed",
    "Rows",
    "Sparse",
    "SparsePacked",
    "Structure",
    "Supported",
    "Sweepable",
    "UniformGrid",
    "Unstructured",
    "pack",
    "straight_through",
    "unpack",
]
