"""Fixed supports that a few integers describe, with exact algebra: Kronecker-sparse factors and chains of them."""

from __future__ import annotations

from .chain import Chain, Direction, divisors, four
from .enumerate import enumerate_chains
from .kronecker import KSPattern, from_dense, to_dense

__all__ = ["Chain", "Direction", "KSPattern", "divisors", "enumerate_chains", "four", "from_dense", "to_dense"]
