"""Sparse solvers for whole batches: classic ones, and networks unrolled from them, behind one interface."""

from __future__ import annotations

from .auto import Choice, Optimality, choose, optimality
from .convolutional import convolutional_weight
from .coordinate import CoordinateDescent, coordinate_descent
from .exact import Exact, exact
from .fallback import Fallback
from .fit import Deepening, Fit, LayerWise, Stage, Training, decibels, fit, squared_error
from .hyperlista import HyperLISTA, Tuning
from .lista import ALISTA, LISTA, LISTACP, LISTACPSS, TiLISTA, Unrolled, support_schedule
from .operators import Convolutional, Dense, Functions, Operator, as_operator
from .problems import Problem, gaussian, nmse_db
from .proximal import FISTA, ISTA, fista, ista
from .pursuit import HTP, OMP, htp, least_squares, omp
from .safeguard import Safeguarded
from .shrink import hard_threshold, keep_largest, select_support, soft_threshold
from .solver import Progress, Solution, SparseSolver
from .tune import tune_hyperlista
from .vamp import VAMP, vamp
from .weights import Coherence, analytic_weight, coherence, recovery_condition, symmetric_weight

__all__ = [
    "ALISTA",
    "FISTA",
    "HTP",
    "ISTA",
    "LISTA",
    "LISTACP",
    "LISTACPSS",
    "OMP",
    "VAMP",
    "Choice",
    "Coherence",
    "Convolutional",
    "CoordinateDescent",
    "Deepening",
    "Dense",
    "Exact",
    "Fallback",
    "Fit",
    "Functions",
    "HyperLISTA",
    "LayerWise",
    "Operator",
    "Optimality",
    "Problem",
    "Progress",
    "Safeguarded",
    "Solution",
    "SparseSolver",
    "Stage",
    "TiLISTA",
    "Training",
    "Tuning",
    "Unrolled",
    "analytic_weight",
    "as_operator",
    "choose",
    "coherence",
    "convolutional_weight",
    "coordinate_descent",
    "decibels",
    "exact",
    "fista",
    "fit",
    "gaussian",
    "hard_threshold",
    "htp",
    "ista",
    "keep_largest",
    "least_squares",
    "nmse_db",
    "omp",
    "optimality",
    "recovery_condition",
    "select_support",
    "soft_threshold",
    "squared_error",
    "support_schedule",
    "symmetric_weight",
    "tune_hyperlista",
    "vamp",
]
