"""Sparse solvers for whole batches: classic ones, and networks unrolled from them, behind one interface."""

from __future__ import annotations

from .convolutional import convolutional_weight
from .coordinate import CoordinateDescent, coordinate_descent
from .operators import Convolutional, Dense, Functions, Operator, as_operator
from .problems import Problem, gaussian, nmse_db
from .proximal import FISTA, ISTA, fista, ista
from .pursuit import HTP, OMP, htp, least_squares, omp
from .shrink import hard_threshold, keep_largest, select_support, soft_threshold
from .solver import Progress, Solution, SparseSolver
from .vamp import VAMP, vamp
from .weights import Coherence, analytic_weight, coherence, recovery_condition, symmetric_weight

__all__ = [
    "FISTA",
    "HTP",
    "ISTA",
    "OMP",
    "VAMP",
    "Coherence",
    "Convolutional",
    "CoordinateDescent",
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
    "convolutional_weight",
    "coordinate_descent",
    "fista",
    "gaussian",
    "hard_threshold",
    "htp",
    "ista",
    "keep_largest",
    "least_squares",
    "nmse_db",
    "omp",
    "recovery_condition",
    "select_support",
    "soft_threshold",
    "symmetric_weight",
    "vamp",
]
