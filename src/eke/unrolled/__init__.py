"""Sparse solvers for whole batches: classic ones, and networks unrolled from them, behind one interface."""

from __future__ import annotations

from .operators import Convolutional, Dense, Functions, Operator, as_operator
from .problems import Problem, gaussian, nmse_db
from .shrink import hard_threshold, keep_largest, select_support, soft_threshold
from .solver import Progress, Solution, SparseSolver
from .weights import Coherence, analytic_weight, coherence, recovery_condition, symmetric_weight

__all__ = [
    "Coherence",
    "Convolutional",
    "Dense",
    "Functions",
    "Operator",
    "Problem",
    "Progress",
    "Solution",
    "SparseSolver",
    "analytic_weight",
    "as_operator",
    "coherence",
    "gaussian",
    "hard_threshold",
    "keep_largest",
    "nmse_db",
    "recovery_condition",
    "select_support",
    "soft_threshold",
    "symmetric_weight",
]
