"""Choose one option for every decision so that the predicted loss is least and every cost keeps its limit.

Costs do not add over decisions: the time of a convolution depends on its input width and on its output width, its bytes
on both and on the bits. So a problem is a set of choices and of tables over one or several of them (a factor graph).
The mixed-integer program has a binary x per option and, for each set S of choices that share a table, a distribution
z over the joint options of S whose marginals are x (the local polytope): with x integral, z is the joint choice, so
the program is exact. HiGHS solves it to a stated gap. Relatives: SPDY (Frantar and Alistarh, 2022), HALP (Shen et al.,
2022), ZipLM (Kurtic et al., 2023), which assume costs that add.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .budget import RESOURCES, show

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One decision with its options; option 0 leaves the model as it is.

    Args:
        name: Unique name.
        options: Labels of the options.
    """

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Term:
    """A table of predicted loss or of one cost over the options of some choices.

    Args:
        over: Names of the choices, one an axis of the table.
        resource: "loss" or the name of a cost.
        table: Non-negative values; the total of a resource is the sum of all its terms.
    """

    over: tuple[str, ...]
    resource: str
    table: Table


@dataclass(frozen=True)
class Plan:
    """The chosen options and what they are predicted to cost.

    Args:
        picks: Option index of every choice.
        predicted: Total of every resource, the loss among them.
        gap: Proved relative distance to the best possible loss.
        seconds: Time that solving took.
    """

    picks: Mapping[str, int]
    predicted: Mapping[str, float]
    gap: float
    seconds: float


class InfeasibleError(ValueError):
    """No combination of options keeps every limit.

    Args:
        message: The text shown.
        nearest: Totals of the plan that comes nearest to the limits.
    """

    def __init__(self, message: str, nearest: Mapping[str, float]) -> None:
        super().__init__(message)
        self.nearest = dict(nearest)


def total(terms: Sequence[Term], picks: Mapping[str, int]) -> dict[str, float]:
    """Sum every resource's tables at the given options.

    Args:
        terms: The tables.
        picks: Option index of every choice.

    Returns:
        Total by resource.
    """
    sums: dict[str, float] = {}
    for term in terms:
        value = float(term.table[tuple(picks[name] for name in term.over)])
        sums[term.resource] = sums.get(term.resource, 0.0) + value
    return sums


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what native code writes to file descriptor 1 to standard error: HiGHS prints there."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class _Program:
    """The linear program of a problem: equalities and one row of coefficients per resource."""

    equalities: csr_array
    right: Table
    costs: Mapping[str, Table]
    binaries: int
    offsets: Mapping[str, int]


def _check(choices: Sequence[Choice], terms: Sequence[Term]) -> None:
    sizes = {choice.name: len(choice.options) for choice in choices}
    if len(sizes) != len(choices):
        raise ValueError(f"Choices must have different names, got {[choice.name for choice in choices]}.")
    for term in terms:
        unknown = [name for name in term.over if name not in sizes]
        if unknown:
            raise ValueError(f"A term of {term.resource!r} names unknown choices: {unknown}.")
        if len(set(term.over)) != len(term.over):
            raise ValueError(f"A term of {term.resource!r} names a choice twice: {term.over}.")
        wanted = tuple(sizes[name] for name in term.over)
        if term.table.shape != wanted:
            raise ValueError(
                f"The {term.resource!r} table over {term.over} must have shape {wanted}, got {term.table.shape}."
            )
        if not np.isfinite(term.table).all():
            bad = tuple(int(i) for i in np.argwhere(~np.isfinite(term.table))[0])
            raise ValueError(f"The {term.resource!r} table over {term.over} is not finite at {bad}: {term.table[bad]}.")
        if (term.table < 0).any():
            bad = tuple(int(i) for i in np.argwhere(term.table < 0)[0])
            raise ValueError(f"The {term.resource!r} table over {term.over} is negative at {bad}: {term.table[bad]}.")


def _build(choices: Sequence[Choice], terms: Sequence[Term]) -> _Program:
    offsets, position = {}, 0
    for choice in choices:
        offsets[choice.name] = position
        position += len(choice.options)
    binaries = position
    sizes = {choice.name: len(choice.options) for choice in choices}
    scopes: dict[tuple[str, ...], int] = {}
    for term in terms:
        if len(term.over) > 1 and term.over not in scopes:
            scopes[term.over] = position
            position += int(np.prod([sizes[name] for name in term.over]))
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    right: list[float] = []
    for choice in choices:
        row = len(right)
        rows += [row] * len(choice.options)
        columns += range(offsets[choice.name], offsets[choice.name] + len(choice.options))
        values += [1.0] * len(choice.options)
        right.append(1.0)
    for over, start in scopes.items():
        index = np.arange(int(np.prod([sizes[name] for name in over]))).reshape([sizes[name] for name in over])
        for axis, name in enumerate(over):
            for option in range(sizes[name]):
                members = np.take(index, option, axis=axis).ravel() + start
                row = len(right)
                rows += [row] * (members.size + 1)
                columns += [*members.tolist(), offsets[name] + option]
                values += [1.0] * members.size + [-1.0]
                right.append(0.0)
    costs: dict[str, Table] = {}
    for term in terms:
        start = scopes[term.over] if len(term.over) > 1 else offsets[term.over[0]] if term.over else -1
        line = costs.setdefault(term.resource, np.zeros(position))
        if start >= 0:
            line[start : start + term.table.size] += term.table.ravel()
    # SciPy's solvers take a second to import: only who plans pays for it.
    from scipy.sparse import coo_array

    matrix = coo_array((values, (rows, columns)), shape=(len(right), position)).tocsr()
    return _Program(matrix, np.asarray(right), costs, binaries, offsets)


def _constants(terms: Sequence[Term]) -> dict[str, float]:
    """Return the totals of the terms over no choice at all: what no decision changes."""
    sums: dict[str, float] = {}
    for term in terms:
        if not term.over:
            sums[term.resource] = sums.get(term.resource, 0.0) + float(term.table)
    return sums


def _solve(
    program: _Program, objective: Table, limits: Sequence[tuple[Table, float]], *, gap: float, seconds: float
) -> tuple[Table | None, float]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    width = objective.size
    pad = width - program.equalities.shape[1]
    equal = program.equalities
    if pad:
        equal = csr_array((equal.data, equal.indices, equal.indptr), shape=(equal.shape[0], width))
    constraints = [LinearConstraint(equal, program.right, program.right)]
    if limits:
        lines = vstack([csr_array(line[None]) for line, _ in limits])
        constraints.append(LinearConstraint(lines, -np.inf, np.asarray([limit for _, limit in limits])))
    integrality = np.zeros(width)
    integrality[: program.binaries] = 1
    upper = np.ones(width)
    upper[program.equalities.shape[1] :] = np.inf
    with _stdout_to_stderr():
        result = milp(
            objective,
            constraints=constraints,
            integrality=integrality,
            bounds=Bounds(np.zeros(width), upper),
            options={"mip_rel_gap": gap, "time_limit": seconds, "disp": False},
        )
    return result.x, float(getattr(result, "mip_gap", 0.0) or 0.0)


def _read(program: _Program, choices: Sequence[Choice], solution: Table) -> dict[str, int]:
    return {
        choice.name: int(solution[program.offsets[choice.name] :][: len(choice.options)].argmax()) for choice in choices
    }


def choose(
    choices: Sequence[Choice],
    terms: Sequence[Term],
    *,
    limits: Mapping[str, float],
    gap: float = 1e-4,
    seconds: float = 20.0,
) -> Plan:
    """Solve for the options of least predicted loss within all limits.

    Args:
        choices: The decisions.
        terms: Tables of loss and costs over them.
        limits: Largest total of each limited resource.
        gap: Relative gap at which solving may stop.
        seconds: Longest time for solving.

    Returns:
        The plan.

    Raises:
        ValueError: if a table does not fit its choices, or a limit is not positive or names an unknown resource.
        InfeasibleError: if no combination keeps every limit; carries the totals that come nearest.
    """  # noqa: DOC501, DOC502
    start = time.perf_counter()
    _check(choices, terms)
    program, constants = _build(choices, terms), _constants(terms)
    unknown = [name for name in limits if name not in program.costs]
    if unknown:
        raise ValueError(f"Limits on resources without a table: {unknown}; known: {sorted(program.costs)}.")
    for name, limit in limits.items():
        if not (np.isfinite(limit) and limit > 0):
            raise ValueError(f"The limit of {name!r} must be positive and finite, got {limit}.")
    scaled = {
        name: (program.costs[name] / limit, 1 - constants.get(name, 0.0) / limit) for name, limit in limits.items()
    }
    loss = program.costs.get("loss", np.zeros(program.equalities.shape[1]))
    weight = max(float(loss.max(initial=0.0)), 1e-30)
    solution, reached = _solve(program, loss / weight, list(scaled.values()), gap=gap, seconds=seconds)
    if solution is None:
        raise _infeasible(program, choices, terms, limits, scaled=scaled, seconds=seconds)
    picks = _read(program, choices, solution)
    return Plan(picks, total(terms, picks), reached, time.perf_counter() - start)


def _show(name: str, value: float) -> str:
    return show(name, value) if name in RESOURCES else f"{value:.4g}"


def _infeasible(
    program: _Program,
    choices: Sequence[Choice],
    terms: Sequence[Term],
    limits: Mapping[str, float],
    *,
    scaled: Mapping[str, tuple[Table, float]],
    seconds: float,
) -> InfeasibleError:
    """Return the error for an impossible problem: limits stretched by the least common factor give the nearest plan."""
    width = program.equalities.shape[1]
    objective = np.zeros(width + 1)
    objective[-1] = 1.0
    lines = [(np.append(line, -1.0), right - 1) for line, right in scaled.values()]
    solution, _ = _solve(program, objective, lines, gap=1e-3, seconds=seconds)
    if solution is None:
        return InfeasibleError(f"No plan was found within {seconds} s for the limits {dict(limits)}.", {})
    nearest = total(terms, _read(program, choices, solution))
    text = ", ".join(
        f"{name} {_show(name, nearest[name])} (limit {_show(name, limit)})" for name, limit in limits.items()
    )
    return InfeasibleError(
        f"The budget is below the smallest plan. Nearest feasible: {text}. Raise the limits or allow more structures.",
        nearest,
    )
