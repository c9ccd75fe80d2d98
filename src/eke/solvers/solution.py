"""What a solver returns: a member of the structure, its loss, and how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Metric
from ..structures import Structure


@dataclass(frozen=True)
class Solution:
    """A member of a structure near a matrix in a metric.

    Args:
        weight: (m, n), a member, in the dtype of the given matrix.
        loss: Predicted loss increase in the metric; never above that of plain projection.
        method: What found it.
        losses: Loss by method of everything that was tried, "projection" always among them.
    """

    weight: Tensor
    loss: float
    method: str
    losses: Mapping[str, float]


def plain_projections(structure: Structure, weight: Tensor, metric: Metric) -> dict[str, Tensor]:
    """Return the projection, and the one weighted by the metric's diagonal where the structure takes that score."""
    structure.check((weight.shape[0], weight.shape[1]))
    score = metric.score((weight.shape[0], weight.shape[1]))
    return {
        "projection": structure.project(weight),
        "weighted projection": structure.project(weight, score.to(weight.dtype)),
    }


def best(tried: Mapping[str, Tensor], weight: Tensor, metric: Metric) -> Solution:
    """Return the best of several members; the first of equals.

    Args:
        tried: Member by method.
        weight: W (m, n).
        metric: Measures V - W.

    Returns:
        The solution, in the dtype of weight (float32 for half precision).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    members = {method: member.to(dtype) for method, member in tried.items()}
    losses = {method: metric.loss(member.double() - weight.double()) for method, member in members.items()}
    method = min(losses, key=losses.__getitem__)
    return Solution(members[method], losses[method], method, losses)
