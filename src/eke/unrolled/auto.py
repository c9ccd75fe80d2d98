"""Which solver for this problem, and how near its answer is to the optimum.

`choose` decides by what is asked, and by trying solvers on a few samples, in the order of their usual times:

    exact        `Exact`, message passing that is polished, matching pursuit: the first that explains all samples tried
    sparsity     `Exact` if it needs no more nonzeros, else the faster of HTP and OMP that explain b about equally well
    penalty      FISTA
    none         message passing, plain, then damped, if it settles and explains b up to the noise that it has found

and FISTA with a small penalty, begun with a large one, where nothing holds. `optimality` measures an answer against the
lasso's conditions; nobody need know the minimum for that, as the gap bounds how far the objective is above it:

    violation   max_i |A^H r - penalty sign(x)|_i where x_i != 0, (|A^H r|_i - penalty)_+ elsewhere, over the penalty
    gap         P(x) - D(theta), theta = r min(1, penalty / |A^H r|_inf),  D = Re <b, theta> - |theta|^2 / 2
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .exact import Exact
from .fallback import Fallback
from .operators import Dense, Operator, as_operator, check_vector
from .proximal import FISTA, Penalty, penalty_column
from .pursuit import HTP, OMP, ROUNDING
from .solver import SparseSolver
from .vamp import VAMP
from .weights import coherence

_TRIED = 16
"""Samples of the trial."""
_SMALL = 1e-2
"""Penalty of the fallback over the largest useful one, where b has noise."""
_SMALLEST = 1e-3
"""The same where it has none."""
_EQUAL = 1.12
"""Residuals that differ by at most this factor, one decibel, count as equal."""
_ALIKE = 0.7
"""Coherence above which damped message passing is not trusted."""
_LONG = 3.0
"""Answers so many times as long as another one are fits to what is nearly singular."""


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
    tolerance: float | None = None,
) -> Choice:
    """Return the solver that fits a problem.

    Args:
        A: (m, n), (batch, m, n) or an operator.
        b: (batch, m).
        penalty: Of the lasso, if that is what is asked.
        sparsity: Number of nonzeros, if that is known.
        exact: Whether b has no noise and answers should be right to rounding.
        tolerance: Relative change of x at which a penalty's lasso is done; None for 1e-8, and 1e-5 in single precision,
            where smaller changes are mostly rounding.

    Returns:
        The choice.

    Raises:
        ValueError: if both a penalty and a number of nonzeros are given, or a tolerance without a penalty.
    """
    operator = as_operator(A)
    check_vector(operator, b, "b")
    if penalty is not None and sparsity is not None:
        raise ValueError(f"Give a penalty or a sparsity, got both: {penalty!r} and {sparsity!r}.")
    if penalty is None and tolerance is not None:
        raise ValueError(f"A tolerance belongs to a penalty's lasso, got {tolerance!r} without a penalty.")
    single = torch.finfo(b.dtype).bits == 32
    if penalty is not None:
        tolerance = (1e-5 if single else 1e-8) if tolerance is None else tolerance
        return Choice(FISTA(operator, penalty=penalty, iterations=20_000), tolerance, "a penalty asks for the lasso")
    rows = (b != 0).any(-1).nonzero().squeeze(-1)[:_TRIED]  # zeros say nothing
    whole = len(rows) == int((b != 0).any(-1).sum())
    trial = _Trial(operator.select(rows), b[rows], 2e-5 if single else 1e-12, whole)
    if sparsity is not None:
        return _few(operator, trial, sparsity)
    found = None
    if isinstance(operator, Dense):
        found = _without_noise(operator, trial) if exact else _with_noise(operator, b, trial)
    if found is not None:
        return found
    failed = "message passing failed on samples tried, as it does for coherent dictionaries"
    reason = failed if isinstance(operator, Dense) else "the operator has no matrix at hand"
    small = _small_penalty(operator, b, _SMALLEST if exact else _SMALL)
    return Choice(small, 1e-6, f"{reason}: the lasso with a small penalty")


def _small_penalty(operator: Operator, b: Tensor, share: float) -> FISTA:
    """Return the lasso's solver with a share of each sample's largest useful penalty, begun with that one."""
    largest = operator.adjoint(b).abs().amax(-1)
    return FISTA(operator, penalty=share * largest, iterations=1000, continuation=1 / share)


@dataclass(frozen=True)
class _Trial:
    """Samples to try solvers on."""

    operator: Operator
    b: Tensor
    rounding: float
    whole: bool

    def run(self, solver: SparseSolver, tolerance: float | None) -> tuple[Tensor, Tensor, float]:
        """Return x, |A x - b| / |b| and seconds; the first call prepares the solver, two more are timed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # divergence is what is being tried
            solver.solve(self.b[:1] if solver.operator.batch is None else self.b, tolerance=tolerance)
            seconds = float("inf")
            for _ in range(2):
                start = time.perf_counter()
                found = solver.solve(self.b, tolerance=tolerance)
                seconds = min(seconds, time.perf_counter() - start)
        return found.x, found.residual / torch.linalg.vector_norm(self.b, dim=-1), seconds

    def __str__(self) -> str:
        return f"{len(self.b)} samples tried"


def _without_noise(operator: Operator, trial: _Trial) -> Choice | None:
    """Return the first solver that explains all samples tried down to rounding, by fewer numbers than b has."""

    def solvers(on: Operator, *, backed: bool) -> list[tuple[SparseSolver, float | None, str]]:
        quick, polished = (VAMP(on, iterations=steps, polish=3) for steps in (6, 20))
        proof = Exact(on)
        first: list[tuple[SparseSolver, float | None, str]] = [
            (_backed(on, trial) if backed else proof, 0.0, "proved exact"),
            (quick, None, "exact after message passing"),
        ]
        if not proof.has_kernel:
            first.reverse()
        greedy = OMP(on, sparsity=max(1, on.shape[0] // 2))
        return [
            *first,
            (polished, None, "exact after message passing"),
            (greedy, trial.rounding, "exact by matching pursuit"),
        ]

    ours, tried = solvers(operator, backed=True), solvers(trial.operator, backed=False)
    for (solver, tolerance, what), (other, _, _) in zip(ours, tried, strict=True):
        if not len(trial.b):
            return Choice(solver, tolerance, "b is zero")
        x, left, _ = trial.run(other, tolerance)
        few = (x != 0).sum(-1) <= 3 * operator.shape[0] // 4
        if bool((few & (left <= ROUNDING * trial.rounding)).all()):
            return Choice(solver, tolerance, f"{what} on {trial}")
    return None


def _backed(operator: Operator, trial: _Trial) -> SparseSolver:
    """Return `Exact`, with polished message passing behind it for the samples that were not tried."""
    proof = Exact(operator)
    return proof if trial.whole else Fallback(proof, VAMP(operator, iterations=20, polish=3))


def _with_noise(operator: Operator, b: Tensor, trial: _Trial) -> Choice | None:
    """Return message passing, damped if need be, if it holds by what it says of itself; `Exact` if b has no noise."""
    proof = Exact(trial.operator)
    if len(trial.b) and proof.has_kernel and bool(proof.solve(trial.b).converged.all()):
        return Choice(_backed(operator, trial), 0.0, f"proved exact on {trial}: b has no noise")
    ways = [(1.0, 20, ""), (0.5, 60, ", damped,")]
    if operator.batch is not None or coherence(operator).mutual > _ALIKE:
        ways.pop()  # damped, it settles on the wrong one of two columns that are alike
    for damping, steps, how in ways:
        solver = VAMP(operator, iterations=steps, damping=damping)
        if not len(trial.b) or _passes(VAMP(trial.operator, iterations=steps, damping=damping), trial.b):
            safe = Fallback(solver, _small_penalty(operator, b, _SMALL), tolerance=1e-6)
            return Choice(safe, None, f"message passing{how} holds on {trial}")
    return None


def _few(operator: Operator, trial: _Trial, sparsity: int) -> Choice:
    """Return the solver for a number of nonzeros."""
    given = f"the number of nonzeros is given, {sparsity}"
    greedy: list[tuple[type[HTP] | type[OMP], float]] = [(HTP, 0.0), (OMP, trial.rounding)]
    if not len(trial.b) or not isinstance(operator, Dense):
        return Choice(HTP(operator, sparsity=sparsity), 0.0, given)
    proof = Exact(trial.operator)
    if proof.has_kernel:
        x, left, _ = trial.run(proof, 0.0)
        if bool((((x != 0).sum(-1) <= sparsity) & (left <= ROUNDING * trial.rounding)).all()):
            both = Fallback(Exact(operator), OMP(operator, sparsity=sparsity), tolerance=trial.rounding)
            return Choice(
                Exact(operator) if trial.whole else both, 0.0, f"{given}, and answers are proved exact on {trial}"
            )
    runs = [trial.run(kind(trial.operator, sparsity=sparsity), tolerance) for kind, tolerance in greedy]
    length = min(float(torch.linalg.vector_norm(x)) for x, _, _ in runs)
    sane = [float(torch.linalg.vector_norm(x)) <= _LONG * length for x, _, _ in runs]
    off = [float(part.square().mean()) ** 0.5 for _, part, _ in runs]
    least = max(min(size for size, fine in zip(off, sane, strict=True) if fine) * _EQUAL, ROUNDING * trial.rounding)
    good = [i for i in (0, 1) if sane[i] and off[i] <= least]
    kind, tolerance = greedy[min(good, key=lambda i: runs[i][2])]
    return Choice(kind(operator, sparsity=sparsity), tolerance, f"{given}; the faster of HTP and OMP on {trial}")


def _passes(solver: VAMP, b: Tensor) -> bool:
    """Return whether message passing holds, by what it says of itself."""
    m, n = solver.operator.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = solver.solve(b)
    size = torch.linalg.vector_norm(b, dim=-1)
    noise = (m * found.details["noise_variance"]).sqrt()
    error = (n * found.details["posterior_variance"]).sqrt()
    explained = (found.residual <= 2 * noise + 1e-3 * size) & (noise <= size)
    holds = ~found.diverged & explained & (error <= torch.linalg.vector_norm(found.x, dim=-1))
    return bool((holds & found.details["settled"]).all())


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
