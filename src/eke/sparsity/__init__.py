"""Unstructured pruning: criteria that model the loss, masks, and pruning in steps."""

from __future__ import annotations

from .criteria import OBD, OBS, Criterion, LinearModel, LossModel, QuadraticModel, Wanda, WoodFisher, magnitude
from .masks import MaskSet, PruneStep
from .prune import kept_after, prune

__all__ = [
    "OBD",
    "OBS",
    "Criterion",
    "LinearModel",
    "LossModel",
    "MaskSet",
    "PruneStep",
    "QuadraticModel",
    "Wanda",
    "WoodFisher",
    "kept_after",
    "magnitude",
    "prune",
]
