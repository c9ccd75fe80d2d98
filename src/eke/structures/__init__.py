"""Sets of matrices with a projection, an honest size in bits and a declared exactness."""

from __future__ import annotations

from .grids import Packed, UniformGrid
from .packing import pack, unpack
from .structure import ColumnRule, Exactness, Structure, Sweepable, straight_through

__all__ = [
    "ColumnRule",
    "Exactness",
    "Packed",
    "Structure",
    "Sweepable",
    "UniformGrid",
    "pack",
    "straight_through",
    "unpack",
]
