"""Architecture search without training: scores of untrained networks, search spaces, searches under limits."""

from __future__ import annotations

from . import spaces
from .size import log_numel
from .zico import LayerStatistic, zico, zico_layers

__all__ = ["LayerStatistic", "log_numel", "spaces", "zico", "zico_layers"]
