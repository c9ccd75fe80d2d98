"""Greedy solvers for a number of nonzeros instead of a penalty: they give exact answers where the support is found.

    OMP   add the column of largest |a_j^H r| / |a_j|, project b on all columns so far
    HTP   keep the s largest of x + A^H (b - A x), solve least squares on them; done when the support stays

OMP keeps an orthonormal basis of its columns, one new vector a step; HTP gathers its support's part of A^H A and
factors it, one batched Cholesky a step, or uses conjugate gradients where A is no matrix. `least_squares` is that part
alone. Cost of step k: m n + 2 k m for OMP, 2 m n + s^3 / 3 for HTP.
Sources: Pati, Rezaiifar and Krishnaprasad, 1993; Foucart, "Hard thresholding pursuit", 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.support_solve import solve_positive, support_solve
from .operators import Dense, Operator
from .solver import Callback, Solution, SparseSolver, State

ROUNDING = 200
"""Residuals of so many units of rounding, relative to b, count as exact."""


def least_squares(operator: Operator, b: Tensor, support: Tensor) -> Tensor:
    """Return the least squares solution on a support of each sample.

    Args:
        operator: A.
        b: (batch, m).
        support: Indices of columns, (batch, k), k <= m, each once a row.

    Returns:
        x (batch, n), zero off the support. Singular systems are regularised at the level of rounding.
    """
    if not isinstance(operator, Dense):
        empty = torch.zeros(len(b), operator.shape[1], dtype=torch.bool, device=b.device)
        return _masked_conjugate_gradients(operator, b, empty.scatter_(1, support, True))
    right = operator.adjoint(b)
    if operator.batch is None:
        return support_solve(operator.gram(), support, right)
    columns = operator.matrix.gather(2, support.unsqueeze(1).expand(-1, operator.shape[0], -1))
    solved = solve_positive(columns.mH @ columns, right.gather(1, support))
    return torch.zeros_like(right).scatter(1, support, solved)


def _mask(like: Tensor, support: Tensor) -> Tensor:
    mask = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    return mask.scatter_(1, support, True)


def _masked_conjugate_gradients(operator: Operator, b: Tensor, mask: Tensor) -> Tensor:
    """Return the least squares solution on a mask by conjugate gradients on the normal equations."""
    x = torch.zeros(mask.shape, dtype=b.dtype, device=b.device)
    residual = operator.adjoint(b) * mask
    direction = residual
    energy = residual.abs().square().sum(-1, keepdim=True)
    first, tiny = energy, torch.finfo(b.dtype).tiny
    for _ in range(2 * int(mask.sum(-1).max())):
        image = operator.forward(direction)
        length = energy / image.abs().square().sum(-1, keepdim=True).clamp_min(tiny)
        x = x + length * direction
        residual = residual - length * operator.adjoint(image) * mask
        last, energy = energy, residual.abs().square().sum(-1, keepdim=True)
        if bool((energy <= first * torch.finfo(b.dtype).eps ** 2).all()):
            break
        direction = residual + energy / last.clamp_min(tiny) * direction
    return x


class HTP(SparseSolver):
    """Hard thresholding pursuit.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        sparsity: Nonzeros of each answer, at least as many as the truth has, at most m.
        iterations: Steps, at least 1.
        step: Length of the gradient step; None for 1 over the mean squared length of columns.

    Raises:
        ValueError: if sparsity is out of range or the step not positive.
    """

    def __init__(self, A: Tensor | Operator, *, sparsity: int, iterations: int = 30, step: float | None = None) -> None:
        super().__init__(A, iterations=iterations)
        self.sparsity = _checked_sparsity(sparsity, self.operator)
        if step is not None and not step > 0:
            raise ValueError(f"step must be positive, or None, got {step!r}.")
        self.step_size = step

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, b, the support, which is none yet, and the residual."""
        x = b.new_zeros(len(b), operator.shape[1]) if x0 is None else x0
        return x, b, torch.zeros(x.shape, dtype=torch.bool, device=b.device), b - operator.forward(x)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a new support and the least squares on it."""
        del k
        x, b, _, residual = state
        size = self.step_size or self._unit()
        moved = x + size * operator.adjoint(residual)
        support = moved.abs().topk(self.sparsity, dim=-1, sorted=False).indices
        x = least_squares(operator, b, support)
        return x, b, _mask(x, support), b - operator.forward(x)

    def change(self, before: State, after: State) -> Tensor:
        """Return the share of the support that is new, (batch,), and 0 where b is explained down to rounding."""
        share = (after[2] & ~before[2]).sum(-1) / self.sparsity
        left, size = (torch.linalg.vector_norm(part, dim=-1) for part in (after[3], after[1]))
        return torch.where(left <= ROUNDING * torch.finfo(size.dtype).eps * size, 0, share.to(size.dtype))

    def _unit(self) -> float:
        if isinstance(self.operator, Dense):
            return 1 / float(self.operator.matrix.abs().square().sum(-2).mean())
        return 1 / float(self.operator.norm_squared().max())


class OMP(SparseSolver):
    """Orthogonal matching pursuit.

    Args:
        A: (m, n), (batch, m, n) or an operator that can be written out.
        sparsity: Most nonzeros of an answer, at most m: one a step.

    Raises:
        ValueError: if sparsity is out of range.
    """

    def __init__(self, A: Tensor | Operator, *, sparsity: int) -> None:
        super().__init__(A, iterations=1)
        self.sparsity = self.iterations = _checked_sparsity(sparsity, self.operator)

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return the residual and what describes the columns chosen so far.

        Args:
            operator: A.
            b: (batch, m).
            x0: Has to be None.

        Returns:
            x, the residual, |b|, the basis (batch, s, m), the triangle (batch, s, s), coefficients, indices and their
            mask.

        Raises:
            ValueError: if x0 is given: greedy choices cannot be taken over from a vector.
        """
        if x0 is not None:
            raise ValueError(f"OMP cannot start from x0, got {tuple(x0.shape)}: it adds columns one by one. Use htp.")
        batch, (m, n), s = len(b), operator.shape, self.sparsity
        return (
            b.new_zeros(batch, n),
            b,
            torch.linalg.vector_norm(b, dim=-1),
            b.new_zeros(batch, s, m),
            torch.eye(s, dtype=b.dtype, device=b.device).repeat(batch, 1, 1),
            b.new_zeros(batch, s),
            torch.zeros(batch, s, dtype=torch.int64, device=b.device),
            torch.zeros(batch, n, dtype=torch.bool, device=b.device),
        )

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state with one more column."""
        x, residual, size, basis, triangle, coefficients, chosen, mask = state
        score = (operator.adjoint(residual).abs() * self._scale(operator)).masked_fill(mask, -1)
        j = score.argmax(-1, keepdim=True)
        column = self._columns(operator, j.squeeze(-1))
        known = basis[:, :k]
        inner = (known.conj() @ column.unsqueeze(-1)).squeeze(-1)
        rest = column - (inner.unsqueeze(1) @ known).squeeze(1)
        length = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        # a column that others span, or a residual of zero: it stays out, with coefficient 0
        useful = (length > 1e-6 * torch.linalg.vector_norm(column, dim=-1, keepdim=True)) & (score.gather(1, j) > 0)
        new = torch.where(useful, rest / length.clamp_min(torch.finfo(size.dtype).tiny), 0)
        weight = (new.conj() * residual).sum(-1, keepdim=True)
        # written in place: copies of the basis would cost more than the step
        basis[:, k] = new
        triangle[:, :k, k] = torch.where(useful, inner, 0)
        triangle[:, k, k] = torch.where(useful, length, 1).squeeze(-1)
        coefficients[:, k] = weight.squeeze(-1)
        chosen[:, k] = j.squeeze(-1)
        mask.scatter_(1, j, True)
        return x, residual - weight * new, size, basis, triangle, coefficients, chosen, mask

    def finish(self, operator: Operator, state: State) -> Tensor:
        """Return x from the triangle."""
        x, _, _, _, triangle, coefficients, chosen, _ = state
        solved = torch.linalg.solve_triangular(triangle, coefficients.unsqueeze(-1), upper=True).squeeze(-1)
        return x.scatter_add(1, chosen, solved)

    def change(self, before: State, after: State) -> Tensor:
        """Return the residual relative to b, (batch,): OMP's tolerance."""
        residual: Tensor = torch.linalg.vector_norm(after[1], dim=-1)
        return residual / after[2].clamp_min(torch.finfo(after[2].dtype).tiny)

    def _scale(self, operator: Operator) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(operator.dense(), dim=-2)
        return 1 / length

    def _columns(self, operator: Operator, j: Tensor) -> Tensor:
        matrix = operator.dense()
        return matrix.T[j] if operator.batch is None else matrix[torch.arange(len(j), device=j.device), :, j]


def _checked_sparsity(sparsity: int, operator: Operator) -> int:
    most = min(operator.shape)
    if isinstance(sparsity, bool) or not isinstance(sparsity, int) or not 1 <= sparsity <= most:
        raise ValueError(
            f"sparsity is a number of nonzeros from 1 to {most} for A of {operator.shape}, got {sparsity!r}."
        )
    return sparsity


def htp(
    A: Tensor | Operator,
    b: Tensor,
    *,
    sparsity: int,
    iterations: int = 30,
    x0: Tensor | None = None,
    tolerance: float | None = 0.0,
    callback: Callback | None = None,
) -> Solution:
    """Return answers with `sparsity` nonzeros by hard thresholding pursuit; see `HTP` and `SparseSolver.solve`."""
    return HTP(A, sparsity=sparsity, iterations=iterations).solve(b, x0=x0, tolerance=tolerance, callback=callback)


def omp(
    A: Tensor | Operator,
    b: Tensor,
    *,
    sparsity: int,
    tolerance: float | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Return answers with at most `sparsity` nonzeros by matching pursuit; see `OMP`.

    Args:
        A: (m, n), (batch, m, n) or an operator that can be written out.
        b: (batch, m).
        sparsity: Most nonzeros.
        tolerance: Samples leave when |A x - b| is at most this times |b|; None chooses all columns.
        callback: Called after each step.

    Returns:
        The solution.
    """
    return OMP(A, sparsity=sparsity).solve(b, tolerance=tolerance, callback=callback)
