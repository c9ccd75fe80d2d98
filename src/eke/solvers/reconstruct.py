"""Find a good member of a structure in a metric: try what applies, keep the best, say which it was.

Every structure: projection, projection weighted by the metric's diagonal, ADMM. A rank: the closed form. A support: the
values on it fitted anew. Columns that can be fixed one by one: the column sweep, also from ADMM's fitted support. A
structure from outside takes part through `project`, and in more if it has `support` or `by_columns`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric
from ..structures import Exactness, LowRank, Structure, Supported, Sweepable
from .admm import admm
from .low_rank import weighted_low_rank
from .refit import refit
from .solution import Solution, best, plain_projections
from .sweep import sweep


def reconstruct(structure: Structure, weight: Tensor, metric: Metric, *, steps: int = 60) -> Solution:
    """Replace W by a member of a structure with as little loss as can be found.

    Args:
        structure: Any structure.
        weight: W (m, n).
        metric: Measures V - W.
        steps: Steps of ADMM; 0 leaves it out.

    Returns:
        The best member found, with the losses of all methods tried. Never worse than plain projection.

    Raises:
        ValueError: if steps is negative.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}.")
    metric.check(tuple(weight.shape))
    tried = plain_projections(structure, weight, metric)
    if isinstance(structure, LowRank):
        nearest = weighted_low_rank(structure, weight, metric)
        tried["closed form"] = nearest if structure.grid is None else structure.project(nearest)
    elif steps:
        tried["admm"] = admm(structure, weight, metric, steps=steps)
    starts: list[tuple[str, Tensor | None]] = [("", None)]
    if isinstance(structure, Supported):
        fitted = _fitted(structure, weight, metric, steps)
        if _closed(structure, fitted):
            tried["refit"] = fitted
        starts.append((" on the fitted support", fitted))
    if isinstance(structure, Sweepable):
        for suffix, start in starts:
            tried["sweep" + suffix] = sweep(structure, weight, metric, start=start).weight
    return best(tried, weight, metric)


def _fitted(structure: Supported, weight: Tensor, metric: Metric, steps: int) -> Tensor:
    """Return values fitted on the best support of three: magnitude, weighted magnitude, ADMM over supports alone."""
    w = weight.detach().double()
    supports = [structure.support(w), structure.support(w, metric.score((w.shape[0], w.shape[1])).double())]
    if steps:
        supports.append(admm(_Support(structure), w, metric, steps=steps) != 0)
    fits = [refit(w, support, metric) for support in supports]
    return min(fits, key=lambda fit: metric.loss(fit - w))


def _closed(structure: Structure, fitted: Tensor) -> bool:
    """Return whether the fitted values are a member: those of a support are, those of a grid are not."""
    return torch.equal(structure.project(fitted), fitted)


class _Support:
    """The set of all matrices with a support that a structure allows, whatever their values."""

    exactness: Exactness = "heuristic"

    def __init__(self, structure: Supported) -> None:
        self._structure = structure

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        return v * self._structure.support(v, score)

    def bits(self, shape: tuple[int, int]) -> int:
        return 32 * shape[0] * shape[1]

    def check(self, shape: tuple[int, int]) -> None:
        return None
