"""Pairs of rows replaced by their best rank-one approximation, level after level: the core of a fast factorization.

At one level row k and row k + m/2 of a matrix (m, c) form, on each of t pieces of the columns, a block B of two rows;
it becomes u v with the leading left singular vector u and v = u^H B. The rows v of one piece are a matrix (m/2, c/t) of
the next level. Nothing is iterated: u is that of a 2 x 2 Gram matrix, in closed form.
"""

from __future__ import annotations

from .native import available, describe, pair_splits
from .reference import leading_of_two, reference

__all__ = ["available", "describe", "leading_of_two", "pair_splits", "reference"]
