"""The one interface of all solvers: b (batch, m) -> x (batch, n), classic or learned.

A solver is a module with two pure functions on a *state*: a tuple of tensors, batch first, beginning with x:

    start(operator, b, x0) -> state            step(k, operator, state) -> state, for k = 0 .. iterations - 1

`solver(b)` runs all steps and returns x: no checks of values on the way, so it compiles, exports and differentiates.
`solver.solve(b, tolerance=, callback=)` runs the same steps, lets samples leave as soon as they have converged (the
rest goes on as a smaller batch), notices divergence, and returns a `Solution` that says what happened. x0 starts warm.
To write one: subclass `SparseSolver`, give `iterations` and the operator to `super().__init__`, write `start` and
`step`; parameters are the module's. A whose matrices differ by sample reach `step` already cut to the samples running,
so whatever has one value a sample belongs into the state. `finish(operator, state)` may make x from the last state
(an unrolled network returns state[0], the default); `change` says how far a step went, relative to x.
"""

from __future__ import annotations

import abc
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .operators import Operator, as_operator, check_vector

State = tuple[Tensor, ...]
"""What goes from step to step: x (batch, n), then whatever else has one entry a sample."""


@dataclass(frozen=True)
class Progress:
    """What a callback hears after each step.

    Args:
        iteration: Steps done, from 1.
        total: Steps allowed.
        running: Samples that have not converged.
        batch: Samples.
        change: Largest relative change of a running sample in this step.
    """

    iteration: int
    total: int
    running: int
    batch: int
    change: float


Callback = Callable[[Progress], None]


@dataclass(frozen=True)
class Solution:
    """What a solver found for a batch, and how it went for each sample.

    Args:
        x: (batch, n); zeros for a diverged sample.
        iterations: Steps taken, (batch,), int64.
        converged: Whether the change fell to the tolerance, (batch,), bool; all False without a tolerance.
        diverged: Whether the iteration ran away or became NaN, (batch,), bool.
        residual: |A x - b|, (batch,).
        objective: What the solver minimises, (batch,): |A x - b|^2 / 2, plus its penalty if it has one.
        method: Name of the solver.
        details: What else it learned, by name, each (batch, ...): VAMP's noise variance and density, for example.
    """

    x: Tensor
    iterations: Tensor
    converged: Tensor
    diverged: Tensor
    residual: Tensor
    objective: Tensor
    method: str
    details: Mapping[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        batch, low, high = len(self.x), int(self.iterations.min()), int(self.iterations.max())
        steps = f"{low}" if low == high else f"{low} to {high}"
        said = f"{self.method}: {batch} problems, {steps} iterations, {int(self.converged.sum())} converged"
        return said + (f", {int(self.diverged.sum())} diverged" if bool(self.diverged.any()) else "")


class SparseSolver(nn.Module, abc.ABC):
    """A solver of b = A x for sparse x; see the docstring of this file for how to write one.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        iterations: Steps, at least 1.

    Raises:
        TypeError: if A has an integer dtype.
        ValueError: if A or the number of steps is not usable.
    """

    runaway = 1e3
    """A residual of more than this times |b| counts as divergence; that of x = 0 is once |b|."""
    chunk: int | None = None
    """Samples that go through all steps together where all share one A, so that their tensors stay in the cache."""

    def __init__(self, A: Tensor | Operator, *, iterations: int) -> None:
        super().__init__()
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"{type(self).__name__} needs at least 1 iteration, got {iterations!r}.")
        self.operator = as_operator(A)
        self.iterations = iterations

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseSolver:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.operator = self.operator.mapped(fn)
        return self

    @abc.abstractmethod
    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return the state before the first step."""

    @abc.abstractmethod
    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after step k. Tensors that `start` made may be written in place, x0 and b never."""

    def finish(self, operator: Operator, state: State) -> Tensor:
        """Return x (batch, n) from the last state."""
        del operator
        return state[0]

    def change(self, before: State, after: State) -> Tensor:
        """Return how far a step went relative to x, (batch,); a sample has converged where it is <= the tolerance."""
        moved = torch.linalg.vector_norm(after[0] - before[0], dim=-1)
        size: Tensor = torch.linalg.vector_norm(after[0], dim=-1)
        change: Tensor = moved / size.clamp_min(torch.finfo(size.dtype).tiny)
        return change

    def penalty_of(self, x: Tensor) -> Tensor:
        """Return what the objective adds to half the squared residual, (batch,)."""
        return x.new_zeros(len(x), dtype=x.real.dtype if x.is_complex() else x.dtype)

    def details(self, operator: Operator, state: State) -> dict[str, Tensor]:
        """Return what else the last state tells, by name, each (batch, ...)."""
        del operator, state
        return {}

    def trusted(self, solution: Solution) -> Tensor:
        """Return which answers of a solution are good by what the solver says of itself, (batch,), bool."""
        return ~solution.diverged

    def select(self, rows: Tensor) -> SparseSolver:
        """Return the solver for some samples of its batch: itself, unless it has something for each sample."""
        if self.operator.batch is None:
            return self
        other = copy.copy(self)
        other.operator = self.operator.select(rows)
        return other

    def forward(self, b: Tensor, x0: Tensor | None = None) -> Tensor:
        """Return x after all steps.

        Args:
            b: (batch, m).
            x0: Start, (batch, n); None for zeros.

        Returns:
            (batch, n).
        """
        self._check(b, x0)
        size = self.chunk
        if size is None or len(b) <= size or self.operator.batch is not None or torch.compiler.is_compiling():
            return self._run(b, x0)
        parts = torch.split(b, size)
        starts = [None] * len(parts) if x0 is None else torch.split(x0, size)
        return torch.cat([self._run(part, start) for part, start in zip(parts, starts, strict=True)])

    def trajectory(self, b: Tensor, x0: Tensor | None = None) -> list[Tensor]:
        """Return x after each step.

        Args:
            b: (batch, m).
            x0: Start, (batch, n); None for zeros.

        Returns:
            One (batch, n) a step.
        """
        self._check(b, x0)
        return [self.finish(self.operator, state) for state in self._states(b, x0)]

    def solve(
        self,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        tolerance: float | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Return the solution with what happened on the way.

        Args:
            b: (batch, m).
            x0: Start, (batch, n); None for zeros.
            tolerance: Samples leave once a step changes x by at most this, relative to x; None runs all steps.
            callback: Called after each step.

        Returns:
            The solution. Samples that diverge are marked, and a RuntimeWarning says how many.

        Raises:
            ValueError: if the tolerance is negative, or b or x0 does not fit.
        """
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance is a relative change, 0 or more, got {tolerance!r}.")
        with torch.no_grad():
            self._check(b, x0)
            return _Run(self, b, self.start(self.operator, b, x0), tolerance, callback).solution()

    def _run(self, b: Tensor, x0: Tensor | None) -> Tensor:
        """Return x after all steps for a part of a batch that has been checked."""
        *_, state = self._states(b, x0)
        return self.finish(self.operator, state)

    def _states(self, b: Tensor, x0: Tensor | None) -> Iterator[State]:
        state = self.start(self.operator, b, x0)
        for k in range(self.iterations):
            state = self.step(k, self.operator, state)
            yield state

    def _check(self, b: Tensor, x0: Tensor | None) -> None:
        check_vector(self.operator, b, "b")
        if x0 is not None:
            check_vector(self.operator, x0, "x0")
            if len(x0) != len(b):
                raise ValueError(f"x0 has {len(x0)} samples and b {len(b)}.")


class _Run:
    """One call of solve: which samples still run, and where each one ended."""

    def __init__(
        self, solver: SparseSolver, b: Tensor, state: State, tolerance: float | None, callback: Callback | None
    ) -> None:
        self.solver, self.b, self.tolerance, self.callback = solver, b, tolerance, callback
        self.operator, self.state = solver.operator, state
        batch = len(b)
        self.rows: Tensor | None = None
        self.final: list[Tensor] = []
        self.iterations = torch.full((batch,), solver.iterations, dtype=torch.int64, device=b.device)
        self.converged = torch.zeros(batch, dtype=torch.bool, device=b.device)

    def solution(self) -> Solution:
        """Return the solution after all steps."""
        solver = self.solver
        for k in range(solver.iterations):
            before = self.state
            self.state = solver.step(k, self.operator, before)
            if (self.tolerance is not None or self.callback is not None) and not self._look(k, before):
                break
        self._store()
        final = tuple(self.final)
        x = solver.finish(solver.operator, final)
        details = solver.details(solver.operator, final)
        return report(solver, self.b, x, iterations=self.iterations, converged=self.converged, details=details)

    def _look(self, k: int, before: State) -> bool:
        """Return whether samples are left after those that have converged leave."""
        change = self.solver.change(before, self.state)
        running = len(change)
        if self.tolerance is not None:
            done = ~(change > self.tolerance)
            if bool(done.any()):
                self._store()
                rows = torch.arange(len(self.b), device=done.device) if self.rows is None else self.rows
                self.iterations[rows[done]] = k + 1
                self.converged[rows[done]] = torch.isfinite(change[done])
                keep = (~done).nonzero().squeeze(-1)
                self.rows, running = rows[keep], len(keep)
                self.state = tuple(part[keep] for part in self.state)
                self.operator = self.operator.select(keep)
        if self.callback is not None:
            progress = Progress(k + 1, self.solver.iterations, running, len(self.b), float(change.max()))
            self.callback(progress)
        return running > 0

    def _store(self) -> None:
        if self.rows is None:
            self.final = [part.clone() for part in self.state]
            return
        for whole, part in zip(self.final, self.state, strict=True):
            whole[self.rows] = part


def report(
    solver: SparseSolver,
    b: Tensor,
    x: Tensor,
    *,
    iterations: Tensor,
    converged: Tensor,
    details: Mapping[str, Tensor],
) -> Solution:
    """Return the solution of a run, with zeros and a warning where it ran away.

    Args:
        solver: What ran.
        b: (batch, m).
        x: (batch, n).
        iterations: Steps taken, (batch,).
        converged: Which samples converged, (batch,).
        details: What else it learned.

    Returns:
        The solution.
    """
    batch, size = len(b), torch.linalg.vector_norm(b, dim=-1)
    residual = torch.linalg.vector_norm(solver.operator.forward(x) - b, dim=-1)
    diverged = ~(residual <= solver.runaway * size)
    if bool(diverged.any()):
        x = torch.where(diverged.unsqueeze(-1), torch.zeros_like(x), x)
        residual = torch.where(diverged, size, residual)
        name = type(solver).__name__
        warnings.warn(
            f"{name} diverged on {int(diverged.sum())} of {batch} problems; their answer is x = 0. Coherent or "
            "badly scaled dictionaries need a safer solver, such as fista.",
            RuntimeWarning,
            stacklevel=4,
        )
    return Solution(
        x=x,
        iterations=iterations,
        converged=converged & ~diverged,
        diverged=diverged,
        residual=residual,
        objective=residual.square() / 2 + solver.penalty_of(x),
        method=type(solver).__name__,
        details=details,
    )
