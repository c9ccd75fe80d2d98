"""Proximal gradient for the lasso, |A x - b|^2 / 2 + penalty |x|_1, a whole batch at once.

    ISTA    x+ = S(x - A^H (A x - b) / L, penalty / L),   L = |A|_2^2
    FISTA   the same from y = x + (t - 1) / t+ (x - x_last),   t+ = (1 + sqrt(1 + 4 t^2)) / 2

`restart` forgets the momentum of a sample as soon as it points uphill; `continuation` begins with a larger penalty that
falls geometrically to the one asked for within the first half of the steps. Cost: 2 m n a step.
Sources: Daubechies, Defrise and De Mol, 2004; Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm",
2009; O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", 2015.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .operators import Operator
from .shrink import soft_threshold
from .solver import Callback, Solution, SparseSolver, State

Penalty = float | Tensor
"""Weight of |x|_1: a number, or one a sample, (batch,)."""


def checked_penalty(penalty: Penalty) -> Penalty:
    """Return a penalty that is usable.

    Args:
        penalty: A number or a tensor (batch,), >= 0.

    Returns:
        The same.

    Raises:
        ValueError: if it is negative, NaN or a tensor of another shape.
    """
    if isinstance(penalty, Tensor):
        if penalty.ndim != 1 or not bool((penalty >= 0).all()):
            raise ValueError(
                f"penalty must be a number or (batch,), >= 0, got shape {tuple(penalty.shape)} with least value "
                f"{float(penalty.min()) if penalty.numel() else 0.0:g}."
            )
    elif not penalty >= 0:
        raise ValueError(f"penalty must be 0 or more, got {penalty!r}.")
    return penalty


def penalty_column(penalty: Penalty, like: Tensor) -> Tensor:
    """Return one penalty a sample, (batch, 1), real, for a batch of right-hand sides.

    Args:
        penalty: A number or (batch,).
        like: (batch, m).

    Returns:
        (batch, 1).

    Raises:
        ValueError: if there is not one a sample.
    """
    real = like.real if like.is_complex() else like
    if isinstance(penalty, Tensor):
        if len(penalty) != len(like):
            raise ValueError(f"penalty has {len(penalty)} entries, b {len(like)} samples.")
        return penalty.to(real).unsqueeze(-1)
    return real.new_full((len(like), 1), float(penalty))


class LassoSolver(SparseSolver):
    """A solver whose objective is |A x - b|^2 / 2 + penalty |x|_1.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        penalty: >= 0; a number, or one a sample, (batch,). From |A^H b|_inf on, x is exactly zero.
        iterations: Steps, at least 1.
    """

    def __init__(self, A: Tensor | Operator, *, penalty: Penalty, iterations: int) -> None:
        super().__init__(A, iterations=iterations)
        self.penalty = checked_penalty(penalty)

    def select(self, rows: Tensor) -> SparseSolver:
        """Return the solver for some samples of its batch."""
        other = copy.copy(super().select(rows))
        if isinstance(self.penalty, Tensor):
            other.penalty = self.penalty[rows]
        return other

    def penalty_of(self, x: Tensor) -> Tensor:
        """Return penalty |x|_1, (batch,)."""
        return penalty_column(self.penalty, x).squeeze(-1) * x.abs().sum(-1)


class ISTA(LassoSolver):
    """Proximal gradient with a fixed step.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        penalty: Weight of |x|_1, >= 0; a number, or one a sample, (batch,).
        iterations: Steps, at least 1.
        step: Length of a step; None for 1 / |A|^2, which never raises the objective.

    Raises:
        ValueError: if the step is not positive.
    """

    def __init__(
        self, A: Tensor | Operator, *, penalty: Penalty, iterations: int = 1000, step: float | None = None
    ) -> None:
        super().__init__(A, penalty=penalty, iterations=iterations)
        if step is not None and not step > 0:
            raise ValueError(f"step must be positive, or None for 1 / |A|^2, got {step!r}.")
        self.step_size = step

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, b, the penalties and the step sizes."""
        x = b.new_zeros(len(b), operator.shape[1]) if x0 is None else x0
        penalty = penalty_column(self.penalty, b)
        size = penalty.new_full((), self.step_size) if self.step_size else 1 / operator.norm_squared().to(penalty)
        return x, b, penalty, size.reshape(-1, 1).expand_as(penalty)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a gradient step and a shrinkage."""
        del k
        x, b, penalty, size = state
        moved = x - size * operator.adjoint(operator.forward(x) - b)
        return soft_threshold(moved, size * penalty), b, penalty, size


class FISTA(LassoSolver):
    """Accelerated proximal gradient.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        penalty: Weight of |x|_1, >= 0; a number, or one a sample, (batch,).
        iterations: Steps, at least 1.
        restart: Whether a sample's momentum starts anew when it points uphill.
        continuation: How many times the penalty the first one is, 1 for none; at most what makes x zero.

    Raises:
        ValueError: if continuation is below 1.
    """

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        penalty: Penalty,
        iterations: int = 1000,
        restart: bool = True,
        continuation: float = 1.0,
    ) -> None:
        super().__init__(A, penalty=penalty, iterations=iterations)
        if not continuation >= 1:
            raise ValueError(f"continuation multiplies the first penalty by 1 or more, got {continuation!r}.")
        self.restart = restart
        self.continuation = continuation

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, y, t, b, the penalties asked for and in force, the largest useful ones and the step sizes."""
        x = b.new_zeros(len(b), operator.shape[1]) if x0 is None else x0
        penalty = penalty_column(self.penalty, b)
        highest = operator.adjoint(b).abs().amax(-1, keepdim=True) if self.continuation > 1 else penalty
        size = (1 / operator.norm_squared().to(penalty)).reshape(-1, 1).expand_as(penalty)
        return x, x, torch.ones_like(penalty), b, penalty, penalty, highest, size

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a shrunk gradient step from y and the next y."""
        x, y, t, b, penalty, _, highest, size = state
        level = penalty
        if self.continuation > 1:
            left = max(0.0, 1 - 2 * k / self.iterations)
            level = torch.maximum(penalty, torch.minimum(penalty * self.continuation**left, highest))
        new = soft_threshold(y - size * operator.adjoint(operator.forward(y) - b), size * level)
        moved = new - x
        if self.restart:
            uphill = ((y - new) * moved.conj()).sum(-1, keepdim=True).real > 0
            t = torch.where(uphill, torch.ones_like(t), t)
        t_next = (1 + (1 + 4 * t.square()).sqrt()) / 2
        return new, new + (t - 1) / t_next * moved, t_next, b, penalty, level, highest, size

    def change(self, before: State, after: State) -> Tensor:
        """Return the relative change of x, infinite while the penalty still falls."""
        change = super().change(before, after)
        _, _, _, _, penalty, level, _, _ = after
        return torch.where((level > penalty).squeeze(-1), torch.inf, change)


def ista(
    A: Tensor | Operator,
    b: Tensor,
    *,
    penalty: Penalty,
    iterations: int = 1000,
    x0: Tensor | None = None,
    tolerance: float | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Return the lasso's solution by proximal gradient; see `ISTA` for the arguments and `SparseSolver.solve`."""
    return ISTA(A, penalty=penalty, iterations=iterations).solve(b, x0=x0, tolerance=tolerance, callback=callback)


def fista(
    A: Tensor | Operator,
    b: Tensor,
    *,
    penalty: Penalty,
    iterations: int = 1000,
    restart: bool = True,
    continuation: float = 1.0,
    x0: Tensor | None = None,
    tolerance: float | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Return the lasso's solution by accelerated proximal gradient; see `FISTA` and `SparseSolver.solve`."""
    solver = FISTA(A, penalty=penalty, iterations=iterations, restart=restart, continuation=continuation)
    return solver.solve(b, x0=x0, tolerance=tolerance, callback=callback)
