"""Find a good member of a structure in a metric: try what applies, keep the best, say which it was.

Every structure: projection, projection weighted by the metric's diagonal, ADMM. A rank: the closed form. Then, from the
best so far: a support gets the values that are best on it; columns that can be fixed one by one are swept with its
scales and support, and the better of both is revisited column by column in the whole metric. A structure from outside
takes part through `project`, and in more if it has `support` or `by_columns`.

Cost: that of ADMM, and about a third more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric, finite
from ..structures import LowRank, Structure, Supported, Sweepable
from .admm import admm
from .low_rank import weighted_low_rank
from .refit import refit
from .revisit import revisit
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
        ValueError: if steps is negative or W is not finite.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}.")
    metric.check(tuple(weight.shape))
    finite(weight, what="reconstruct")
    tried = plain_projections(structure, weight, metric)
    if isinstance(structure, LowRank):
        nearest = weighted_low_rank(structure, weight, metric)
        tried["closed form"] = nearest if structure.grid is None else structure.project(nearest)
    elif steps:
        tried["admm"] = admm(structure, weight, metric, steps=steps)
    start = best(tried, weight, metric).weight
    fitted = _fitted(structure, weight, metric, start) if isinstance(structure, Supported) else None
    if fitted is not None:
        # On its support no other member is better, so there is nothing to sweep.
        tried["refit"] = fitted
    elif isinstance(structure, Sweepable):
        tried["sweep"] = sweep(structure, weight, metric, start=start, revisits=0).weight
        start = best(tried, weight, metric).weight
        tried["revisits"] = revisit(structure, weight, metric, start=start)
    return best(tried, weight, metric)


def _fitted(structure: Supported, weight: Tensor, metric: Metric, start: Tensor) -> Tensor | None:
    """Return the best values on the support of a member, or None if the structure binds values too, as a grid does."""
    w = weight.detach().double()
    support = structure.support(start.double())
    if not _closed(structure, w * support):
        return None
    fitted = refit(w, support, metric)
    return fitted if _closed(structure, fitted) else None


def _closed(structure: Supported, matrix: Tensor) -> bool:
    """Return whether a matrix on a support is a member."""
    return isinstance(structure, Structure) and torch.equal(structure.project(matrix), matrix)
