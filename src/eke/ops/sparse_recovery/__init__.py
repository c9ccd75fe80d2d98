"""Sparse x with A x = b and no noise, from the projection P = A^+ A and y = A^+ b, one sample after the other.

Message passing says which entries of x are likely nonzero; least squares on them, tried as soon as little is in doubt,
are the exact answer, which P x = y proves. All of it is in n dimensions: P x costs n for each nonzero of x, and P of
what the steps make beside x follows from what is known already. Cost of a step: n times the likely nonzeros, about a
fifth of a product with A where one entry in ten is nonzero, and torch needs some 35 operations where the kernel stays
in the cache.
"""

from __future__ import annotations

from .native import Plan, available, describe, sparse_recovery
from .reference import Range, Rules, State, advance, begin, reference, settled

__all__ = [
    "Plan",
    "Range",
    "Rules",
    "State",
    "advance",
    "available",
    "begin",
    "describe",
    "reference",
    "settled",
    "sparse_recovery",
]
