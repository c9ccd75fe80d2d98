"""Kronecker-factored curvature of a loss at the sites of a model."""

from __future__ import annotations

from .basis import Basis, solved
from .capture import Calls, Capture
from .curvature import Curvature
from .diagonal import Diagonal, Fisher, gauss_newton_diagonal
from .examples import Rows, Seen, Sharing, along, rows_of, shared_rows, sharing_of
from .factors import Factors
from .leading import Leading
from .likelihood import Likelihood, pulls
from .lookups import Lookups
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
    "Leading",
    "Likelihood",
    "Lookups",
    "Recorder",
    "Rows",
    "Seen",
    "Sharing",
    "along",
    "gauss_newton_diagonal",
    "private_copy",
    "pulls",
    "rows_of",
    "sampled_loss",
    "shared_rows",
    "sharing_of",
    "solved",
]
