"""Closest matrix of a rank in a Kronecker metric, in closed form.

With G = L L^T and A = R R^T, tr(D^T G D A) = |L^T D R|_F^2: whiten, truncate (Eckart & Young), and go back.
Factors are damped before their Cholesky factorisation, so a singular metric has a solution too; where rounding asks
for more damping than is given, it gets more.
Cost: one SVD, and two Cholesky factorisations once a metric, O(m n min(m, n) + m^3 + n^3), float64.
Source: Srebro & Jaakkola, "Weighted low-rank approximations", 2003 (the case of separable weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric, damped_cholesky, finite
from ..structures import LowRank


def weighted_low_rank(structure: LowRank, weight: Tensor, metric: Metric, *, damping: float = 1e-6) -> Tensor:
    """Return the matrix of a rank that changes W least in the metric.

    Args:
        structure: The rank.
        weight: W (m, n).
        metric: Measures V - W.
        damping: Of A and G, relative to their mean diagonals; raised where it does not make them positive definite.

    Returns:
        V (m, n), float64; exact for the damped metric. Entries of W that are not finite, and a metric that is no second
        moment, raise ValueError.
    """
    structure.check((weight.shape[0], weight.shape[1]))
    metric.check(tuple(weight.shape))
    whitened = finite(weight, what="weighted_low_rank")
    right, left = metric.derived(("a", damping), lambda: damped_cholesky(metric.a, damping)), None
    whitened = whitened @ right
    if metric.g is not None:
        g, what = metric.g, "The second moment of the gradients"
        left = metric.derived(("g", damping), lambda: damped_cholesky(g, damping, what=what))
        whitened = left.T @ whitened
    nearest = LowRank(structure.rank).project(whitened)
    unwhitened: Tensor = torch.linalg.solve_triangular(right, nearest, upper=False, left=False)
    if left is not None:
        unwhitened = torch.linalg.solve_triangular(left.T, unwhitened, upper=True)
    return unwhitened
