"""Best values on a given support, in the full metric.

Minimises 1/2 tr(D^T G D A) with D = V - W over V that vanish outside the support: a positive semidefinite linear
system in the free entries, solved by conjugate gradients with the diagonal as preconditioner. Each step costs one
gradient, m n (m + n), and lowers the loss, so stopping early is safe.
Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric, finite


def refit(
    weight: Tensor,
    support: Tensor,
    metric: Metric,
    *,
    start: Tensor | None = None,
    steps: int = 100,
    tolerance: float = 1e-8,
) -> Tensor:
    """Fit the entries of a support.

    Args:
        weight: W (m, n).
        support: bool (m, n), entries that may differ from 0.
        metric: Measures V - W.
        start: V to start from; None for W on the support.
        steps: Most steps of conjugate gradients.
        tolerance: Stop when the preconditioned gradient has shrunk to this share of its start.

    Returns:
        V (m, n), float64, zero outside the support.

    Raises:
        ValueError: if the support does not fit the matrix, or W or V is not finite.
    """
    if support.shape != weight.shape:
        raise ValueError(
            f"support must have the shape {tuple(weight.shape)} of the matrix, got {tuple(support.shape)}."
        )
    w, free = finite(weight, what="refit"), support.double()
    metric = Metric(metric.a.double(), None if metric.g is None else metric.g.double())
    v = (w if start is None else finite(start, what="refit")) * free
    scale = metric.score((w.shape[0], w.shape[1]))
    scale = free / torch.where(scale > 1e-12 * scale.max(), scale, torch.ones_like(scale))
    residual = -metric.gradient(v - w) * free
    direction = scale * residual
    weight_now = first = float((residual * direction).sum())
    for _ in range(steps):
        if weight_now <= tolerance**2 * first:
            break
        bent = metric.gradient(direction) * free
        curvature = float((direction * bent).sum())
        if curvature <= 0:
            break
        length = weight_now / curvature
        v += length * direction
        residual -= length * bent
        weighted = scale * residual
        weight_next = float((residual * weighted).sum())
        direction = weighted + (weight_next / weight_now) * direction
        weight_now = weight_next
    return v
