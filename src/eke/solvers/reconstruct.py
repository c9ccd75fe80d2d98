"""Find a good member of a structure in a metric: try what applies, keep the best, say which it was.

Every structure: projection, projection weighted by the metric's diagonal, ADMM. A rank: the closed form. Then, from the
members so far: the best of their supports gets the values that are best on it; where values are bound too and columns
can be fixed one by one, they are swept, and the best member is revisited column by column in the whole metric. A
structure from outside takes part through `project`, and in more if it has `support` or `by_columns`.

Cost: that of ADMM, and about a half more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import Metric, damped_cholesky, finite
from ..structures import LowRank, Structure, Supported, Sweepable
from .admm import admm
from .low_rank import weighted_low_rank
from .refit import refit
from .revisit import revisit
from .solution import Solution, best, plain_projections
from .sweep import sweep

_SCREENING = 10
"""Steps of conjugate gradients after which supports are compared."""


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
        ValueError: if steps is negative, W is not finite, or the metric is no second moment.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}.")
    metric.check(tuple(weight.shape))
    finite(weight, what="reconstruct")
    _check_moments(metric)
    tried = plain_projections(structure, weight, metric)
    if isinstance(structure, LowRank):
        nearest = weighted_low_rank(structure, weight, metric)
        tried["closed form"] = nearest if structure.grid is None else structure.project(nearest)
    elif steps:
        tried["admm"] = admm(structure, weight, metric, steps=steps)
    fitted = _fitted(structure, weight, metric, list(tried.values())) if isinstance(structure, Supported) else None
    if fitted is not None:
        # On its support no other member is better, so there is nothing to sweep.
        tried["refit"] = fitted
    elif isinstance(structure, Sweepable):
        found = best(tried, weight, metric)
        tried["sweep"] = sweep(structure, weight, metric, revisits=0).weight
        tried[f"sweep from {found.method}"] = sweep(structure, weight, metric, start=found.weight, revisits=0).weight
        tried["revisits"] = revisit(structure, weight, metric, start=best(tried, weight, metric).weight)
    return best(tried, weight, metric)


def _check_moments(metric: Metric) -> None:
    # In an indefinite form there is no best member; its factorisation costs little beside any method.
    damped_cholesky(metric.a, 1e-3)
    if metric.g is not None:
        damped_cholesky(metric.g, 1e-3, what="The second moment of the gradients")


def _fitted(structure: Supported, weight: Tensor, metric: Metric, members: Sequence[Tensor]) -> Tensor | None:
    """Return the best values on the best support of some members, or None if the structure binds values as well."""
    w = weight.detach().double()
    supports = [structure.support(member.double()) for member in members]
    if not _closed(structure, w * supports[0]):
        return None
    # A few steps tell supports apart; only the best one is fitted to the end, anew: a restart would converge slower.
    losses = [metric.loss(refit(w, support, metric, steps=_SCREENING) - w) for support in supports]
    fitted = refit(w, supports[losses.index(min(losses))], metric)
    return fitted if _closed(structure, fitted) else None


def _closed(structure: Supported, matrix: Tensor) -> bool:
    """Return whether a matrix on a support is a member."""
    return isinstance(structure, Structure) and torch.equal(structure.project(matrix), matrix)
