"""Architecture search without training: scores of untrained networks, search spaces, searches under limits."""

from __future__ import annotations

from . import spaces
from .found import Found, load
from .fusion import Correlation, fuse, partial_correlation, rank_correlation
from .limits import Limits
from .pareto import pareto
from .proposals import Evolution, Method, RandomSearch, RegularizedEvolution, Search, Trial
from .run import Scorer, evolve
from .shared import share
from .size import log_numel
from .subject import cross_entropy
from .sweep import Subject
from .tables import FUSION, MATURITY, PROXIES, Score, ScoreTable, score
from .variation import LayerStatistic, zico, zico_layers

__all__ = [
    "FUSION",
    "MATURITY",
    "PROXIES",
    "Correlation",
    "Evolution",
    "Found",
    "LayerStatistic",
    "Limits",
    "Method",
    "RandomSearch",
    "RegularizedEvolution",
    "Score",
    "ScoreTable",
    "Scorer",
    "Search",
    "Subject",
    "Trial",
    "cross_entropy",
    "evolve",
    "fuse",
    "load",
    "log_numel",
    "pareto",
    "partial_correlation",
    "rank_correlation",
    "score",
    "share",
    "spaces",
    "zico",
    "zico_layers",
]
