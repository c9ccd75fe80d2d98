"""Kronecker-factored curvature of a loss at the sites of a model."""

from __future__ import annotations

from .basis import Basis
from .curvature import Curvature
from .factors import Factors
from .recorder import Call, Recorder
from .sampled import sampled_loss

__all__ = ["Basis", "Call", "Curvature", "Factors", "Recorder", "sampled_loss"]
