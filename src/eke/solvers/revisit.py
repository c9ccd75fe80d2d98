"""Revisit columns: round each of them anew, given all others, whenever that lowers the loss in the whole metric.

With all other columns fixed, the best free value of column j of V is t = V_j - (D A)_j / A_jj, D = V - W, whatever G
is; a value v of it costs A_jj / 2 (v - t)^T G (v - t) more. Two values are tried: t rounded, which is best for G = I,
and a Jacobi step in G from the present one, V_j - G (V_j - t) / diag(G), rounded. Where neither lowers the loss the
column stays, so no visit raises it. What is allowed (scales, supports) is fixed by the structure's `by_columns`.

Cost: n (m n + 3 m^2) a round over all columns, float64.
Source: coordinate descent; for G = I the last step of Frantar & Alistarh, "Optimal brain compression", 2022, repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Metric, finite
from ..structures import ColumnRule, Sweepable


def revisit(structure: Sweepable, weight: Tensor, metric: Metric, *, start: Tensor, rounds: int = 3) -> Tensor:
    """Improve a member column by column.

    Args:
        structure: Structure with `by_columns`.
        weight: W (m, n).
        metric: Measures V - W.
        start: The member (m, n) to improve; its scales and support stay.
        rounds: Most rounds over all columns; it ends early when nothing moves.

    Returns:
        V (m, n), float64, a member; its loss is not above that of start. Entries that are not finite raise ValueError.
    """
    metric.check(tuple(weight.shape))
    w, given = finite(weight, what="revisit"), finite(start, what="revisit")
    rule = structure.by_columns(given, metric.score((w.shape[0], w.shape[1])).double())
    # The rule of a structure from outside may round a member: all columns must be of one member.
    v = torch.stack([rule(given[:, j], j) for j in range(w.shape[1])], 1)
    revisit_(v, w, metric, rule, rounds=rounds)
    return v


def revisit_(v: Tensor, w: Tensor, metric: Metric, rule: ColumnRule, *, rounds: int) -> None:
    """Revisit the columns of V in place, those with the largest A_jj first.

    Args:
        v: V (m, n), float64, a member.
        w: W (m, n), float64.
        metric: Measures V - W.
        rule: Rounds a column.
        rounds: Most rounds.
    """
    a, g = metric.a.double(), None if metric.g is None else metric.g.double()
    diagonal = a.diagonal()
    order = [j for j in diagonal.argsort(descending=True, stable=True).tolist() if diagonal[j] > 0]
    delta = v - w
    for _ in range(rounds):
        moved = False
        for j in order:
            target = v[:, j] - (delta @ a[:, j]) / diagonal[j]
            fixed = _better(v[:, j], target, g, rule, j)
            if fixed is not None:
                v[:, j] = fixed
                delta[:, j] = fixed - w[:, j]
                moved = True
        if not moved:
            return


def _better(column: Tensor, target: Tensor, g: Tensor | None, rule: ColumnRule, j: int) -> Tensor | None:
    """Return a rounded column that is nearer to the target than the present one in the metric of G, if one is found."""
    error = column - target
    if g is None:
        slope, tried = error, rule(target, j)[:, None]
    else:
        slope, rows = g @ error, g.diagonal()
        step = torch.where(rows > 1e-12 * rows.max(), slope / rows, torch.zeros_like(slope))
        tried = torch.stack([rule(target, j), rule(column - step, j)], 1)
    errors = tried - target[:, None]
    losses = ((errors if g is None else g @ errors) * errors).sum(0)
    best = int(losses.argmin())
    # Only a fall above rounding counts, or two equal columns would replace each other for ever.
    return tried[:, best] if float(losses[best]) < (1 - 1e-12) * float(error @ slope) else None
