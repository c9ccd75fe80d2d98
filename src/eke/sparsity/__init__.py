"""Unstructured pruning: criteria that model the loss, masks, survivors that make up for it, and retraining."""

from __future__ import annotations

from .compensate import Compensation, Refit, Sweep
from .criteria import OBD, OBS, Criterion, LinearModel, LossModel, QuadraticModel, Wanda, WoodFisher, magnitude
from .masks import MaskSet, PruneStep
from .obc import obc
from .prune import kept_after, prune
from .retrain import Training, fine_tune_, from_scratch, rewind_rate_, rewind_weights_
from .trust import prune_by_trust

__all__ = [
    "OBD",
    "OBS",
    "Compensation",
    "Criterion",
    "LinearModel",
    "LossModel",
    "MaskSet",
    "PruneStep",
    "QuadraticModel",
    "Refit",
    "Sweep",
    "Training",
    "Wanda",
    "WoodFisher",
    "fine_tune_",
    "from_scratch",
    "kept_after",
    "magnitude",
    "obc",
    "prune",
    "prune_by_trust",
    "rewind_rate_",
    "rewind_weights_",
]
