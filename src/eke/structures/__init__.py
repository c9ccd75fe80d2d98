"""Sets of matrices with a projection, an honest size in bits and a declared exactness."""

from __future__ import annotations

from .both import Both
from .entries import EntrySparse
from .grids import UniformGrid
from .kronecker import KroneckerSparse
from .low_rank import LowRank
from .packing import pack, unpack
from .sparse import NM, Rows, Sparse, Unstructured
from .structure import ColumnRule, Exactness, Packable, Structure, Supported, Sweepable, straight_through

__all__ = [
    "NM",
    "Both",
    "ColumnRule",
    "EntrySparse",
    "Exactness",
    "KroneckerSparse",
    "LowRank",
    "Packable",
    "Rows",
    "Sparse",
    "Structure",
    "Supported",
    "Sweepable",
    "UniformGrid",
    "Unstructured",
    "pack",
    "straight_through",
    "unpack",
]
