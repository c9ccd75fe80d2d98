"""Sparse answers that are exact, for b without noise: a support from message passing, least squares on it, and proof.

    y = A^+ b,  P = A^+ A;   guess a support;   solve P[S, S] z = y[S];   done if P x = y and |S| < 3/4 rank

For A in general position no other x that sparse explains b. Nothing is given: neither prior nor number of nonzeros.
The steps are those of `ops.sparse_recovery`, which solves one sample after the other in the cache; its docstring has
the XX Cost: one product with A^+, then n a nonzero and step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops.sparse_recovery import Plan, Range, Rules, advance, available, begin, settled, sparse_recovery
from ..ops.sparse_recovery import State as Search
from .operators import Operator
from .solver import Callback, Solution, SparseSolver, State, report

_FIRST_DENSITY = 0.15
_LEAST = 1e-6
"""Singular values of A below this part of the largest count as zero."""
_CONDITION = 4.0
"""A^+ b has an error of so many times A's condition number, in units of rounding."""
_LOOSEST = 1e4
"""Answers that leave more than so many units of rounding are not proved, however large the condition number."""
_OUTSIDE = 1e4
"""Answers to b that leave more than so many units of rounding of it, if A has not full rank, are not proved."""


class Exact(SparseSolver):
    """Exact answers for b without noise.

    Args:
        A: (m, n), (batch, m, n) or an operator that can be written out.
        iterations: Most steps, at least 1; twelve are usual, forty for one nonzero on two rows.
    """

    runaway = 2.0

    def __init__(self, A: Tensor | Operator, *, iterations: int = 40) -> None:
        super().__init__(A, iterations=iterations)
        self._prepared: tuple[Operator, Tensor, Range, Plan | None] | None = None

    @property
    def has_kernel(self) -> bool:
        """Whether the native kernel takes this A; torch's own operations are many times slower."""
        return self.operator.batch is None and self.prepared()[2] is not None

    def prepared(self) -> tuple[Tensor, Range, Plan | None]:
        """Return A^+, the range of A^H, and the kernel's copy of it if there is a kernel; computed once in float64."""
        if self._prepared is None or self._prepared[0] is not self.operator:
            matrix = self.operator.dense().detach()
            wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
            left, singular, right = torch.linalg.svd(wide, full_matrices=False)
            kept = singular > _LEAST * singular.amax(-1, keepdim=True)
            right = right * kept.unsqueeze(-1)
            inverse = (right.mH / torch.where(kept, singular, torch.inf).unsqueeze(-2)) @ left.mH
            # those of several matrices must agree, near enough
            rank = int(kept.sum(-1).amin())
            condition = float((singular.amax(-1) / torch.where(kept, singular, torch.inf).amin(-1)).amax())
            rules = Rules(
                density=min(_FIRST_DENSITY, 0.5 * rank / matrix.shape[-1]),
                rounding=max(Rules.rounding, min(_CONDITION * condition, _LOOSEST)),
            )
            space = Range((right.mH @ right).to(matrix.dtype), rank, rules)
            plan = Plan(space) if matrix.ndim == 2 and available(matrix) else None
            self._prepared = (self.operator, inverse.to(matrix.dtype), space, plan)
        return self._prepared[1:]

    def solve(
        self,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        tolerance: float | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Return the solution with what happened on the way; samples leave when their answer is proved.

        Args:
            b: (batch, m).
            x0: Start, (batch, n); None for zeros.
            tolerance: As for other solvers; a proved answer has changed by 0, and leaves in any case.
            callback: Called after each step.

        Returns:
            The solution: `converged` where the answer is proved.
        """
        tolerance = 0.0 if tolerance is None else tolerance
        plan = self._kernel(b, x0)
        if plan is not None and callback is None and tolerance >= 0:
            self._check(b, x0)
            x, found, steps = self._searched(plan, b)
            found = self._proved(b, x, found)
            return report(self, b, x, iterations=steps, converged=found, details={})
        solution = super().solve(b, x0=x0, tolerance=tolerance, callback=callback)
        return replace(solution, converged=self._proved(b, solution.x, solution.converged))

    def trusted(self, solution: Solution) -> Tensor:
        """Return which answers are proved, (batch,)."""
        return solution.converged

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, y and what the search knows of each sample; for matrices that differ, their projections too."""
        inverse, space, _ = self.prepared()
        y = self._shortest(b) if operator.batch is None else (inverse @ b.unsqueeze(-1)).squeeze(-1)
        search = begin(space, y, x0)
        state = (search.x, y, *list(vars(search).values())[1:])
        return state if operator.batch is None else (*state, space.projection)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a step; what is proved stays."""
        del k
        x, y, *rest = state
        space = self.prepared()[1]
        if operator.batch is not None:
            space = replace(space, projection=rest.pop())
        after = advance(space, y, Search(x, *rest))
        new = (after.x, y, *list(vars(after).values())[1:])
        return new if operator.batch is None else (*new, space.projection)

    def finish(self, operator: Operator, state: State) -> Tensor:
        """Return x, and the shortest solution where the search ran away."""
        del operator
        x, y, *rest = state
        return settled(self.prepared()[1], y, Search(x, *rest[:7]))

    def change(self, before: State, after: State) -> Tensor:
        """Return 0 where the answer is proved, infinity elsewhere, (batch,)."""
        del before
        found = after[6].squeeze(-1)
        return torch.where(found, 0.0, torch.inf).to(after[0].abs().dtype)

    def _run(self, b: Tensor, x0: Tensor | None) -> Tensor:
        plan = self._kernel(b, x0)
        return super()._run(b, x0) if plan is None else self._searched(plan, b)[0]

    def _searched(self, plan: Plan, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, which of it is exact in the range of A, and steps taken."""
        return sparse_recovery(plan, self._shortest(b), iterations=self.iterations)

    def _kernel(self, b: Tensor, x0: Tensor | None) -> Plan | None:
        """Return the kernel's plan where it does what is asked."""
        if x0 is not None or (torch.is_grad_enabled() and b.requires_grad) or torch.compiler.is_compiling():
            return None
        return self.prepared()[2]

    def _shortest(self, b: Tensor) -> Tensor:
        """Return A^+ b for one A."""
        return b @ self.prepared()[0].T

    def _proved(self, b: Tensor, x: Tensor, found: Tensor) -> Tensor:
        """Return which answers explain all of b, not only what lies in the range of A."""
        rank, m = self.prepared()[1].rank, self.operator.shape[0]
        if rank == m:
            return found
        left = torch.linalg.vector_norm(self.operator.forward(x) - b, dim=-1)
        size = torch.linalg.vector_norm(b, dim=-1)
        explained: Tensor = left <= _OUTSIDE * torch.finfo(b.dtype).eps * size
        return found & explained


def exact(
    A: Tensor | Operator,
    b: Tensor,
    *,
    iterations: int = 40,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Return exact answers for b without noise; see `Exact`."""
    return Exact(A, iterations=iterations).solve(b, x0=x0, callback=callback)
