"""Pure steps that choose a member of a structure, or what survivors of a removal become, in a given metric."""

from __future__ import annotations

from .admm import admm
from .low_rank import weighted_factors, weighted_low_rank
from .reconstruct import reconstruct
from .refit import refit
from .removal import Consumer, Removal, RemovalOrder, greedy_removal, removal_scores, remove_columns
from .revisit import revisit
from .solution import Solution
from .sweep import sweep, swept

__all__ = [
    "Consumer",
    "Removal",
    "RemovalOrder",
    "Solution",
    "admm",
    "greedy_removal",
    "reconstruct",
    "refit",
    "removal_scores",
    "remove_columns",
    "revisit",
    "sweep",
    "swept",
    "weighted_factors",
    "weighted_low_rank",
]
