"""Alternating directions: any structure with a projection, in any metric.

    X <- argmin 1/2 tr((X-W)^T G (X-W) A) + rho/2 |X - Z + U|^2     closed form in the eigenbases of G and A
    Z <- project(X + U),    U <- U + X - Z

For a convex set this converges to the best member; for others (supports, ranks, grids) it is a heuristic whose iterates
Z are all members, so the best one seen is kept. rho grows geometrically from far below to above the mean curvature:
first the metric rules, then the structure. Cost: two eigendecompositions, then m n (m + n) a step, float64.
Source: Boyd et al., "Distributed optimization and statistical learning via the alternating direction method of
multipliers", 2011, section 9 (nonconvex sets).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..linalg import Metric, finite
from ..structures import Structure


def admm(
    structure: Structure,
    weight: Tensor,
    metric: Metric,
    *,
    steps: int = 60,
    rho: tuple[float, float] = (0.03, 3.0),
    score: bool = False,
) -> Tensor:
    """Return the best member seen by the alternating directions.

    Args:
        structure: Set to project on.
        weight: W (m, n).
        metric: Measures V - W.
        steps: Steps, each with one projection.
        rho: First and last penalty, relative to the mean curvature of an entry.
        score: Whether projections are weighted by the metric's diagonal instead of plainly.

    Returns:
        V (m, n), float64, a member; the plain projection at worst.

    Raises:
        ValueError: if steps or a penalty is not positive, or W is not finite.
    """
    if steps < 1 or not all(math.isfinite(level) and level > 0 for level in rho):
        raise ValueError(f"admm needs at least 1 step and positive, finite penalties, got steps={steps}, rho={rho}.")
    shape = (weight.shape[0], weight.shape[1])
    structure.check(shape)
    metric.check(shape)
    w = finite(weight, what="admm")
    weights = metric.score(shape).double() if score else None
    basis: _Basis = metric.derived("admm", lambda: _Basis(metric, w.shape[0]))
    z = structure.project(w, weights)
    u = torch.zeros_like(w)
    best, least = z, metric.loss(z - w)
    growth = (rho[1] / rho[0]) ** (1 / max(1, steps - 1))
    level = rho[0] / growth
    for _ in range(steps):
        level *= growth
        u /= growth  # U is the dual divided by rho
        x = w + basis.shrink(z - u - w, level)
        z = structure.project(x + u, weights)
        u += x - z
        loss = metric.loss(z - w)
        if loss < least:
            best, least = z, loss
    return best


class _Basis:
    """Eigenbases of G and A, and (G x A + rho I)^-1 rho in them."""

    def __init__(self, metric: Metric, rows: int) -> None:
        self.a_values, self.a_vectors = torch.linalg.eigh(metric.a.double())
        self.g_vectors: Tensor | None = None
        g_values = self.a_values.new_ones(rows)
        if metric.g is not None:
            g_values, self.g_vectors = torch.linalg.eigh(metric.g.double())
        self.curvature = g_values.clamp_min(0)[:, None] * self.a_values.clamp_min(0)
        self.mean = float(self.curvature.mean()) or 1.0

    def shrink(self, matrix: Tensor, level: float) -> Tensor:
        """Return rho (G x A + rho I)^-1 of a matrix (m, n), rho = level * mean curvature."""
        rho = level * self.mean
        rotated = matrix @ self.a_vectors
        if self.g_vectors is not None:
            rotated = self.g_vectors.T @ rotated
        rotated = rotated * (rho / (self.curvature + rho))
        if self.g_vectors is not None:
            rotated = self.g_vectors @ rotated
        shrunk: Tensor = rotated @ self.a_vectors.T
        return shrunk
