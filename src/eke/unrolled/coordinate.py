"""Cyclic coordinate descent for the lasso: one column after the other, each solved exactly, for a whole batch.

    x_j+ = S(x_j + a_j^H r / |a_j|^2, penalty / |a_j|^2),   r = b - A x kept up to date

A step is one sweep over all columns: 4 m n operations, but in n small products; it needs far fewer sweeps than proximal
gradient needs steps when columns are many and solutions sparse. Columns whose entry is zero in every sample and whose
correlation stays below the penalty are left out; every sweep looks again, with one product, which ones those are.
Source: Friedman, Hastie and Tibshirani, "Regularization paths for generalized linear models", 2010 (active sets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import Operator
from .proximal import LassoSolver, Penalty, penalty_column
from .shrink import soft_threshold
from .solver import Callback, Solution, State


class CoordinateDescent(LassoSolver):
    """Cyclic coordinate descent on columns that may matter.

    Args:
        A: (m, n), (batch, m, n) or an operator that can be written out.
        penalty: Weight of |x|_1, >= 0; a number, or one a sample, (batch,).
        iterations: Sweeps, at least 1.
    """

    def __init__(self, A: Tensor | Operator, *, penalty: Penalty, iterations: int = 200) -> None:
        super().__init__(A, penalty=penalty, iterations=iterations)

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, the residual and the penalties."""
        x = b.new_zeros(len(b), operator.shape[1]) if x0 is None else x0
        return x, b - operator.forward(x), penalty_column(self.penalty, b)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a sweep over the columns that are in use, or violate their condition."""
        del k
        x, residual, penalty = state
        matrix = operator.dense()
        matters = ((x != 0) | (operator.adjoint(residual).abs() > penalty)).any(0)
        x, residual = x.clone(), residual.clone()
        for j in matters.nonzero().squeeze(-1).tolist():
            column = matrix[..., j]
            size = torch.linalg.vector_norm(column, dim=-1, keepdim=True).square()
            old = x[:, j : j + 1]
            inner = (residual * column.conj()).sum(-1, keepdim=True)
            new = soft_threshold(old + inner / size, penalty / size)
            residual -= (new - old) * column
            x[:, j : j + 1] = new
        return x, residual, penalty


def coordinate_descent(
    A: Tensor | Operator,
    b: Tensor,
    *,
    penalty: Penalty,
    iterations: int = 200,
    x0: Tensor | None = None,
    tolerance: float | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Return the lasso's solution by coordinate descent; see `CoordinateDescent` and `SparseSolver.solve`."""
    solver = CoordinateDescent(A, penalty=penalty, iterations=iterations)
    return solver.solve(b, x0=x0, tolerance=tolerance, callback=callback)
