"""Kronecker-factored curvature of a loss at the sites of a model."""

from __future__ import annotations

from .basis import Basis
from .capture import Calls, Capture
from .curvature import Curvature
from .diagonal import Diagonal, Fisher, gauss_newton_diagonal
from .examples import Rows, Sharing, rows_of
from .factors import Factors
from .likelihood import Likelihood, pulls
from .recorder import Call, Recorder, private_copy
from .sampled import sampled_loss

__all__ = [
    "Basis",
    "Call",
    "Calls",
    "Capture",
    "Curvature",
    "Diagonal",
    "Factors",
    "Fisher",
    "Likelihood",
    "Recorder",
    "Rows",
    "Sharing",
    "gauss_newton_diagonal",
    "private_copy",
    "pulls",
    "rows_of",
    "sampled_loss",
]
