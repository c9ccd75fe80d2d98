"""Architecture search without training: scores of untrained networks, search spaces, searches under limits."""

from __future__ import annotations

from . import spaces
from .fusion import Correlation, fuse, partial_correlation, rank_correlation
from .score import MATURITY, PROXIES, Score, ScoreTable, score
from .size import log_numel
from .subject import cross_entropy
from .sweep import Subject
from .zico import LayerStatistic, zico, zico_layers

__all__ = [
    "MATURITY",
    "PROXIES",
    "Correlation",
    "LayerStatistic",
    "Score",
    "ScoreTable",
    "Subject",
    "cross_entropy",
    "fuse",
    "log_numel",
    "partial_correlation",
    "rank_correlation",
    "score",
    "spaces",
    "zico",
    "zico_layers",
]
