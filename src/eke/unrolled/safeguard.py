"""A learned solver that cannot fail: its steps count only where they bring the lasso's optimality closer.

With T the ISTA step of the classic solver, and the residual S(x) = |x - T(x)|, per sample and step:

    y = learned step from x;   if S(y) <= (1 - margin) mu:   x+ = y,      mu+ = pace S(y) + (1 - pace) mu
                               else:                         x+ = classic step from x,      mu+ = mu

Whatever the learned part does, S -> 0 and x goes to the lasso's solutions: every acceptance lowers mu by a factor, so
either there are finitely many and the classic solver ends alone, or mu goes to zero and S with it. FISTA starts anew
after every acceptance, so its rate holds from there. Cost: the learned step, one ISTA step, and a classic one where
needed. Source: Heaton, Chen, Wang and Yin, "Safeguarded learned convex optimization", 2023; its rule of exponential
averages and its constants are recalled, not re-read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import Operator
from .proximal import FISTA, ISTA, penalty_column
from .shrink import soft_threshold
from .solver import SparseSolver, State


class Safeguarded(SparseSolver):
    """A learned solver with a classic one behind it.

    Args:
        learned: Any solver for the same A; its layers are used once, one a step, or over and over with `repeat`.
        classic: ISTA or FISTA; its penalty says which lasso is solved, its operator is the one used.
        iterations: Steps, learned and classic; None for the classic solver's number.
        margin: How much closer a learned step must come, in [0, 1).
        pace: Part of mu that is new after an acceptance, in (0, 1].
        repeat: Whether learned layers begin again after the last one.

    Raises:
        TypeError: if the classic solver is none that surely converges.
        ValueError: if the two are for different A, or a number is out of range.
    """

    def __init__(
        self,
        learned: SparseSolver,
        classic: ISTA | FISTA,
        *,
        iterations: int | None = None,
        margin: float = 0.01,
        pace: float = 0.25,
        repeat: bool = False,
    ) -> None:
        if not isinstance(classic, (ISTA, FISTA)):
            raise TypeError(f"Safeguarded falls back on ISTA or FISTA, got {type(classic).__name__}.")
        if isinstance(classic, FISTA) and classic.continuation > 1:
            raise ValueError(
                f"Safeguarded needs a FISTA with one penalty, got continuation={classic.continuation}: what it falls "
                "back on must not change from step to step."
            )
        if isinstance(classic, ISTA) and classic.step_size is not None:
            raise ValueError(f"Safeguarded needs ISTA's own step 1 / |A|^2, got step={classic.step_size}.")
        ours, theirs = classic.operator, learned.operator
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.batch != theirs.batch:
            raise ValueError(f"Both solvers must be for the same A, got {theirs} and {ours}.")
        if not 0 <= margin < 1 or not 0 < pace <= 1:
            raise ValueError(f"margin must be in [0, 1) and pace in (0, 1], got {margin!r} and {pace!r}.")
        if repeat and ours.batch is not None:
            raise ValueError(f"repeat needs one A for all samples, got one for each of {ours.batch}.")
        super().__init__(ours, iterations=classic.iterations if iterations is None else iterations)
        self.learned, self.classic = learned, classic
        self.margin, self.pace, self.repeat = margin, pace, repeat

    def penalty_of(self, x: Tensor) -> Tensor:
        """Return the classic solver's penalty times |x|_1, (batch,)."""
        return self.classic.penalty_of(x)

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, b, mu, penalties, step sizes, steps accepted, and both solvers' states."""
        penalty = penalty_column(self.classic.penalty, b)
        size = (1 / operator.norm_squared().to(penalty)).reshape(-1, 1).expand_as(penalty)
        learned = self.learned.start(operator, b, x0)
        classic = self.classic.start(operator, b, x0)
        mu = self._residual(operator, classic[0], b, penalty, size)
        accepted = torch.zeros_like(penalty)
        self._parts = len(learned)
        return classic[0], b, mu, penalty, size, accepted, *learned, *classic

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a learned step where it is safe, a classic one elsewhere."""
        x, b, mu, penalty, size, accepted, *rest = state
        learned, classic = tuple(rest[: self._parts]), tuple(rest[self._parts :])
        layers = self.learned.iterations
        if k >= layers and not self.repeat:
            classic = self.classic.step(k, operator, classic)
            return classic[0], b, mu, penalty, size, accepted, *learned, *classic
        if k and k % layers == 0:
            learned = self.learned.start(operator, b, x)
        ahead = self.learned.step(k % layers, operator, learned)
        residual = self._residual(operator, ahead[0], b, penalty, size)
        good = residual <= (1 - self.margin) * mu
        slow = classic if bool(good.all()) else self.classic.step(k, operator, classic)
        x = torch.where(good, ahead[0], slow[0])
        slow = _choose(good, _restarted(slow, x), slow)
        # what was refused may be anything: the learned part goes on from x with what else it knew before
        ahead = (x, *_choose(good, ahead[1:], learned[1:]))
        mu = torch.where(good, self.pace * residual + (1 - self.pace) * mu, mu)
        return x, b, mu, penalty, size, accepted + good, *ahead, *slow

    def details(self, operator: Operator, state: State) -> dict[str, Tensor]:
        """Return how many learned steps each sample took, and |x - T(x)| at its end."""
        x, b, _, penalty, size, accepted, *_ = state
        return {
            "accepted": accepted.squeeze(-1),
            "fixed_point_residual": self._residual(operator, x, b, penalty, size).squeeze(-1),
        }

    def _residual(self, operator: Operator, x: Tensor, b: Tensor, penalty: Tensor, size: Tensor) -> Tensor:
        """Return |x - T(x)|, (batch, 1)."""
        after = soft_threshold(x - size * operator.adjoint(operator.forward(x) - b), size * penalty)
        result: Tensor = torch.linalg.vector_norm(x - after, dim=-1, keepdim=True)
        return result


def _restarted(classic: State, x: Tensor) -> State:
    """Return the classic solver's state with its iterate at x: of FISTA also y = x and t = 1."""
    _, second, third, *rest = classic
    if len(classic) > len(("x", "b", "penalty", "size")):
        return x, x, torch.ones_like(third), *rest
    return x, second, third, *rest


def _choose(good: Tensor, yes: State, no: State) -> State:
    """Return the parts of one state or the other, sample by sample."""
    return tuple(torch.where(good.reshape(-1, *[1] * (a.ndim - 1)), a, c) for a, c in zip(yes, no, strict=True))
