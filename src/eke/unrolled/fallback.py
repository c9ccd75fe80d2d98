"""Two solvers: the second takes the samples that the first does not vouch for.

`Exact` vouches for what it has proved, `VAMP` for what has settled, the others for what has not diverged
(`SparseSolver.trusted`). So a fast solver that may fail here and there, and a slow one that does not, answer a batch in
little more than the time of the fast one.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from .operators import Operator
from .solver import Callback, Solution, SparseSolver, State


class Fallback(SparseSolver):
    """One solver, and another for the samples where it fails.

    Args:
        first: Runs on the whole batch.
        second: Runs on the samples whose answers the first does not trust.
        tolerance: Given to the second's `solve`; None runs all its steps.

    Raises:
        ValueError: if the two are for different A.
    """

    def __init__(self, first: SparseSolver, second: SparseSolver, *, tolerance: float | None = None) -> None:
        ours, theirs = first.operator, second.operator
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.batch != theirs.batch:
            raise ValueError(f"Both solvers must be for the same A, got {ours} and {theirs}.")
        super().__init__(ours, iterations=first.iterations)
        self.first, self.second, self.tolerance = first, second, tolerance

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return the first solver's state."""
        return self.first.start(operator, b, x0)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the first solver's state after a step."""
        return self.first.step(k, operator, state)

    def trusted(self, solution: Solution) -> Tensor:
        """Return which answers did not diverge in either solver, (batch,)."""
        return ~solution.diverged

    def solve(
        self,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        tolerance: float | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Return the solution, with the second solver's answers, residuals and steps where the first fails.

        Args:
            b: (batch, m).
            x0: Start, (batch, n); None for zeros.
            tolerance: Of the first solver.
            callback: Called after each step of either.

        Returns:
            The solution; details are the first's, and `first`: which answers are its own.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the second is there for what fails
            found = self.first.solve(b, x0=x0, tolerance=tolerance, callback=callback)
        good = self.first.trusted(found)
        found = replace(found, details={**found.details, "first": good})
        if bool(good.all()):
            return found
        rows = (~good).nonzero().squeeze(-1)
        start = None if x0 is None else x0[rows]
        other = self.second.select(rows).solve(b[rows], x0=start, tolerance=self.tolerance, callback=callback)
        return replace(
            found,
            x=found.x.index_copy(0, rows, other.x),
            iterations=found.iterations.index_add(0, rows, other.iterations),
            converged=found.converged.index_copy(0, rows, other.converged),
            diverged=found.diverged.index_copy(0, rows, other.diverged),
            residual=found.residual.index_copy(0, rows, other.residual),
            objective=found.objective.index_copy(0, rows, other.objective),
            method=f"{found.method}, {other.method} for {len(rows)}",
        )

    def _run(self, b: Tensor, x0: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self.solve(b, x0=x0, tolerance=0.0).x
