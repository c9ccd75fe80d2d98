"""Closest matrix of a rank in a Kronecker metric, in closed form.

With G = L L^T and A = R R^T, tr(D^T G D A) = |L^T D R|_F^2: whiten, truncate (Eckart & Young), and go back.
Factors are damped before their Cholesky factorisation, so a singular metric has a solution too; where rounding asks
for more damping than is given, it gets more.
Cost: one SVD and two Cholesky factorisations once a matrix and metric, O(m n min(m, n) + m^3 + n^3), then
O(rank (m^2 + n^2)) a rank, float64.
Source: Srebro & Jaakkola, "Weighted low-rank approximations", 2003 (the case of separable weights).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg import Metric, damped_cholesky, finite
from ..structures import LowRank
from ..structures.low_rank import leading


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
    left, right = _halves(structure, weight, metric, damping)
    return left @ right


def weighted_factors(
    structure: LowRank, weight: Tensor, metric: Metric, *, damping: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return two factors of the matrix of a rank that changes W least in the metric.

    Args:
        structure: The rank.
        weight: W (m, n).
        metric: Measures V - W.
        damping: As for `weighted_low_rank`.

    Returns:
        (m, rank) and (rank, n), float64, singular values shared equally, as `LowRank.factors` has them. What raises
        ValueError in `weighted_low_rank` does so here.
    """
    left, right = _halves(structure, weight, metric, damping)
    (rows, over), (columns, under) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(over @ under.mT)
    root = s.sqrt()
    return rows @ (u * root), (root[:, None] * vh) @ columns.mT


def _halves(structure: LowRank, weight: Tensor, metric: Metric, damping: float) -> tuple[Tensor, Tensor]:
    """Return factors (m, rank) and (rank, n) of the closest matrix; those of another rank share most of the work."""
    structure.check((weight.shape[0], weight.shape[1]))
    metric.check(tuple(weight.shape))
    w, g, what = finite(weight, what="weighted_low_rank"), metric.g, "The second moment of the gradients"
    over_a, over_g = metric.derived(("a", damping), lambda: damped_cholesky(metric.a, damping)), None
    if g is not None:
        over_g = metric.derived(("g", damping), lambda: damped_cholesky(g, damping, what=what))
    held: dict[str, Any] = metric.derived(("low rank", damping), dict)
    if held.get("weight") is not weight or held["version"] != weight._version:
        whitened = w @ over_a if over_g is None else over_g.T @ (w @ over_a)
        # Holding the weight keeps its identity from being another one's.
        held.update(weight=weight, version=weight._version, both=leading(whitened, min(whitened.shape)))
    rank = structure.rank_of((weight.shape[0], weight.shape[1]))
    left, right = held["both"][0][:, :rank], held["both"][1][:rank]
    right = torch.linalg.solve_triangular(over_a, right, upper=False, left=False)
    if over_g is not None:
        left = torch.linalg.solve_triangular(over_g.T, left, upper=True)
    return left, right
