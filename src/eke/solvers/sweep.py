"""Column sweep: fix one column after the other and let the free ones make up for its error.

With H = A^-1 and its upper Cholesky factor U (H = U^T U), fixing column j to q and moving the later columns by

    W_j: <- W_j: - (W_j - q) / U_jj * U_j,j:

is OBS restricted to the columns not yet fixed. Columns with the largest A_jj go first (their errors still have all
others to lean on). The sweep needs no G; afterwards columns are revisited in the whole metric (`revisit`).
What is allowed (scales, supports) is fixed before the sweep by the structure's `by_columns`.

Cost: n^3 + m n^2, and n (m n + 3 m^2) a revisit of all columns; float64.
Source: Frantar & Alistarh, "Optimal brain compression", 2022; Frantar et al., "GPTQ", 2023 (order by activations).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric, cholesky, damped, finite
from ..structures import ColumnRule, Structure, Sweepable
from .revisit import revisit_
from .solution import Solution, best, plain_projections

_BLOCK = 128


def sweep(
    structure: Structure,
    weight: Tensor,
    metric: Metric,
    *,
    start: Tensor | None = None,
    revisits: int = 3,
    damping: float = 1e-3,
) -> Solution:
    """Find a member of a structure near W in a metric, column by column.

    Args:
        structure: Structure that also has `by_columns`.
        weight: W (m, n).
        metric: Measures the change; its A must fit the columns.
        start: (m, n), where scales and supports are taken from; None for W itself.
        revisits: Rounds of coordinate descent after the sweep.
        damping: Of A during the sweep, relative to its mean diagonal.

    Returns:
        The best of the sweep and plain projection: never worse than projection, and `method` says which it is.

    Raises:
        TypeError: if the structure has no `by_columns`.
        ValueError: if revisits is negative or W is not finite.
    """
    if not isinstance(structure, Sweepable):
        raise TypeError(f"sweep needs a structure with by_columns, {structure} has none; use reconstruct or admm.")
    if revisits < 0:
        raise ValueError(f"revisits must be >= 0, got {revisits}.")
    metric.check(tuple(weight.shape))
    w, a = finite(weight, what="sweep"), metric.a.double()
    tried = plain_projections(structure, weight, metric)
    source = (weight if start is None else start).detach().double()
    rule = structure.by_columns(source, metric.score((weight.shape[0], weight.shape[1])).double())
    order = a.diagonal().argsort(descending=True, stable=True)
    swept = _sweep(w, a, rule, order, damping)
    tried["sweep"] = swept.clone()
    revisit_(swept, w, metric, rule, rounds=revisits)
    tried["sweep and revisits"] = swept
    return best(tried, weight, metric)


def _sweep(w: Tensor, a: Tensor, rule: ColumnRule, order: Tensor, damping: float) -> Tensor:
    """Return the swept matrix (m, n); errors reach later blocks of columns by one product a block."""
    inverse = torch.cholesky_inverse(cholesky(damped(a[order][:, order], damping)))
    upper = cholesky((inverse + inverse.T) / 2, what="The inverse second moment").T
    free = w[:, order].clone()
    names: list[int] = order.tolist()
    for begin in range(0, len(names), _BLOCK):
        end = min(begin + _BLOCK, len(names))
        errors = torch.empty(w.shape[0], end - begin, dtype=w.dtype, device=w.device)
        for j in range(begin, end):
            fixed = rule(free[:, j], names[j])
            error = (free[:, j] - fixed) / upper[j, j]
            free[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
            free[:, j] = fixed
            errors[:, j - begin] = error
        free[:, end:] -= errors @ upper[begin:end, end:]
    result = torch.empty_like(free)
    result[:, order] = free
    return result
