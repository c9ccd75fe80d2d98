"""Column sweep: fix one column after the other and let the free ones make up for its error.

With A = R R^T, R upper triangular, the loss of a change D is |D R|^2 and its part of column j is least where

    V_j = W_j + sum_{k < j} (W_k - V_k) R_kj / R_jj,

which is OBS restricted to the columns not yet fixed, without an inverse: V_j becomes this, rounded. Columns with the
largest A_jj go first (their errors still have all others to lean on). The sweep needs no G; afterwards columns are
revisited in the whole metric (`revisit`). What is allowed (scales, supports) is fixed before the sweep by the
structure's `by_columns`.

Cost: n^3 / 3 once a metric, m n^2, and n (m n + 3 m^2) a revisit of all columns; float64.
Source: Frantar & Alistarh, "Optimal brain compression", 2022; Frantar et al., "GPTQ", 2023 (order by activations);
Chee et al., "QuIP", 2023 (the form without an inverse).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric, damped_cholesky, finite
from ..structures import ColumnRule, Structure, Sweepable
from .revisit import revisit_
from .solution import Solution, best, plain_projections

_BLOCK, _ROWS = 128, 64


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
    w = finite(weight, what="sweep")
    tried = plain_projections(structure, weight, metric)
    source = (weight if start is None else start).detach().double()
    rule = structure.by_columns(source, metric.score((weight.shape[0], weight.shape[1])).double())
    tried["sweep"] = _sweep(w, metric, rule, damping)
    if revisits:
        tried["sweep and revisits"] = tried["sweep"].clone()
        revisit_(tried["sweep and revisits"], w, metric, rule, rounds=revisits)
    return best(tried, weight, metric)


def swept(structure: Sweepable, weight: Tensor, metric: Metric, *, damping: float = 1e-3) -> Tensor:
    """Return the better of the sweep alone and of the weighted projection, as some rows have it: for large matrices.

    Args:
        structure: Structure with `by_columns`, whose rule gives the projection's columns.
        weight: W (m, n).
        metric: Measures the change.
        damping: Of A, relative to its mean diagonal.

    Returns:
        (m, n) in the dtype of W, float32 for half precision.
    """
    metric.check(tuple(weight.shape))
    w = finite(weight, what="sweep")
    # Scales and supports in the precision that members are stored in.
    source = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rule = structure.by_columns(source, metric.score((weight.shape[0], weight.shape[1])).to(source.dtype))
    found = _sweep(w, metric, rule, damping).to(source.dtype)
    columns = source.T.contiguous()
    projected = torch.stack([rule(column, j) for j, column in enumerate(columns)], 1)
    rows = torch.arange(0, w.shape[0], max(1, w.shape[0] // _ROWS), device=w.device)
    weights = None if metric.g is None else metric.g.diagonal()[rows]
    losses = []
    for member in (found, projected):
        change = member[rows] - source[rows]
        each = ((change @ metric.a.to(change.dtype)) * change).sum(1)
        losses.append(float(each.sum() if weights is None else each @ weights.to(each.dtype)))
    return found if losses[0] <= losses[1] else projected


def _sweep(w: Tensor, metric: Metric, rule: ColumnRule, damping: float) -> Tensor:
    """Return the swept matrix (m, n); a block of columns hears of all errors before it by one product."""
    order, answers = metric.derived(("sweep", damping), lambda: _answers(metric.a, damping))
    names: list[int] = order.tolist()
    # One column a row: what is read and written together lies together.
    free = w.T[order]
    fixed, errors = torch.empty_like(free), torch.empty_like(free)
    for begin in range(0, len(names), _BLOCK):
        end = min(begin + _BLOCK, len(names))
        wanted = free[begin:end] + answers[:begin, begin:end].T @ errors[:begin]
        for j in range(begin, end):
            fixed[j] = rule(wanted[j - begin], names[j])
            torch.sub(free[j], fixed[j], out=errors[j])
            wanted[j - begin + 1 :].addr_(answers[j, j + 1 : end], errors[j])
    result = torch.empty_like(w)
    result[:, order] = fixed.T
    return result


def _answers(a: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the order of columns, and by how much each column (second index) answers an error of one before it."""
    order = a.diagonal().double().argsort(descending=True, stable=True)
    backwards = order.flip(0)
    upper = damped_cholesky(a[backwards][:, backwards], damping).flip(0, 1)
    return order, upper / upper.diagonal()
