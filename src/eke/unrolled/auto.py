"""Which solver for this problem, and how near its answer is to the optimum.

`choose` decides by what is asked and by a trial: a penalty asks for the lasso (FISTA), a number of nonzeros for hard
thresholding pursuit. Otherwise a few samples are tried with message passing, which says itself where it fails: it is
taken where no sample diverges, none leaves more than the noise it has found, and none thinks its error larger than its
answer; elsewhere FISTA with a small penalty, begun with a large one. `optimality` measures an answer against the
lasso's conditions:

    violation   max_i |A^H r - penalty sign(x)|_i where x_i != 0, (|A^H r|_i - penalty)_+ elsewhere, over the penalty
    gap         P(x) - D(theta), theta = r min(1, penalty / |A^H r|_inf),  D = Re <b, theta> - |theta|^2 / 2

The gap bounds how far the objective is above its minimum; nobody need know the minimum for that.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import Dense, Operator, as_operator, check_vector
from .proximal import FISTA, Penalty, penalty_column
from .pursuit import HTP
from .solver import SparseSolver
from .vamp import VAMP

_TRIED = 16
"""Samples of the trial."""
_SMALL = 1e-3
"""Penalty of the fallback over the largest useful one."""
_POLISH = 3


@dataclass(frozen=True)
class Choice:
    """A solver for a problem.

    Args:
        solver: Ready to be called.
        tolerance: What to give to its `solve`.
        reason: Why this one, in one sentence.
    """

    solver: SparseSolver
    tolerance: float | None
    reason: str


def choose(
    A: Tensor | Operator,
    b: Tensor,
    *,
    penalty: Penalty | None = None,
    sparsity: int | None = None,
    exact: bool = False,
) -> Choice:
    """Return the solver that fits a problem.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        b: (batch, m).
        penalty: Of the lasso, if that is what is asked.
        sparsity: Number of nonzeros, if that is known.
        exact: Whether b has no noise and answers should be right to rounding.

    Returns:
        The choice.

    Raises:
        ValueError: if both a penalty and a number of nonzeros are given.
    """
    operator = as_operator(A)
    check_vector(operator, b, "b")
    if penalty is not None and sparsity is not None:
        raise ValueError(f"Give a penalty or a sparsity, got both: {penalty!r} and {sparsity!r}.")
    if penalty is not None:
        return Choice(FISTA(operator, penalty=penalty, iterations=20_000), 1e-8, "a penalty asks for the lasso")
    if sparsity is not None:
        return Choice(HTP(operator, sparsity=sparsity), 0.0, f"the number of nonzeros is given: {sparsity}")
    if isinstance(operator, Dense):
        polish = _POLISH if exact else 0
        solver = VAMP(operator, iterations=20, polish=polish)
        rows = (b != 0).any(-1).nonzero().squeeze(-1)[:_TRIED]  # zeros say nothing
        if not len(rows) or _passes(operator.select(rows), b[rows]):
            return Choice(solver, None, f"message passing holds on {len(rows)} samples tried")
        reason = "message passing failed on samples tried, as it does for coherent dictionaries"
    else:
        reason = "the operator has no matrix at hand"
    largest = operator.adjoint(b).abs().amax(-1)
    small = FISTA(operator, penalty=_SMALL * largest, iterations=5000, continuation=1 / _SMALL)
    return Choice(small, 1e-7, f"{reason}: the lasso with a penalty of {_SMALL:g} of the largest")


def _passes(operator: Operator, b: Tensor) -> bool:
    """Return whether message passing holds, by what it says of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # divergence is what is being tried
        found = VAMP(operator, iterations=20).solve(b)
    size = torch.linalg.vector_norm(b, dim=-1)
    noise = (operator.shape[0] * found.details["noise_variance"]).sqrt()
    error = (operator.shape[1] * found.details["posterior_variance"]).sqrt()
    explained = (found.residual <= 2 * noise + 1e-3 * size) & (noise <= size)
    holds = ~found.diverged & explained & (error <= torch.linalg.vector_norm(found.x, dim=-1))
    return bool(holds.all())


@dataclass(frozen=True)
class Optimality:
    """How near an answer is to the lasso's minimum.

    Args:
        violation: Of the optimality conditions, relative to the penalty, (batch,).
        gap: Duality gap, (batch,): the objective is at most so far above its minimum.
        objective: |A x - b|^2 / 2 + penalty |x|_1, (batch,).
    """

    violation: Tensor
    gap: Tensor
    objective: Tensor


def optimality(A: Tensor | Operator, b: Tensor, x: Tensor, *, penalty: Penalty) -> Optimality:
    """Return how near an answer is to the minimum of the lasso.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        b: (batch, m).
        x: (batch, n).
        penalty: Weight of |x|_1, > 0: a number, or one a sample, (batch,).

    Returns:
        The report.

    Raises:
        ValueError: if a penalty is not positive, or b and x do not fit.
    """
    operator = as_operator(A)
    check_vector(operator, b, "b")
    check_vector(operator, x, "x")
    if len(x) != len(b):
        raise ValueError(f"x has {len(x)} samples and b {len(b)}.")
    weight = penalty_column(penalty, b)
    if not bool((weight > 0).all()):
        raise ValueError(f"optimality needs penalties above 0, got {float(weight.min()):g}.")
    residual = b - operator.forward(x)
    inner = operator.adjoint(residual)
    inside = (inner.abs() - weight).clamp_min(0)
    violation = torch.where(x != 0, (inner - weight * x.sgn()).abs(), inside).amax(-1) / weight.squeeze(-1)
    half = residual.abs().square().sum(-1) / 2
    objective = half + weight.squeeze(-1) * x.abs().sum(-1)
    shrink = (weight / inner.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)).clamp_max(1)
    theta = residual * shrink
    dual = (b * theta.conj()).sum(-1).real - theta.abs().square().sum(-1) / 2
    return Optimality(violation, objective - dual, objective)
