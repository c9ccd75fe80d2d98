"""Pure steps that choose a member of a structure, or what survivors of a removal become, in a given metric."""

from __future__ import annotations

from .removal import Consumer, Removal, RemovalOrder, greedy_removal, removal_scores, remove_columns
from .solution import Solution
from .sweep import sweep

__all__ = [
    "Consumer",
    "Removal",
    "RemovalOrder",
    "Solution",
    "greedy_removal",
    "removal_scores",
    "remove_columns",
    "sweep",
]
