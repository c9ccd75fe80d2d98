"""The exact program of a factor graph for one or several budgets, and the search that solves it.

The mixed-integer program has a binary x per option and budget and, for each scope S, a distribution z over the joint
options of S whose marginals are x (the local polytope): with x integral, z is the joint choice, so the program is
exact. Plans of several budgets are nested through running sums y of x over a decision's options: y of a tighter budget
is at most y of the looser one, that is, options never decrease. HiGHS solves the relaxed program first; its prices give
a lower bound of the loss and what each option adds to it (`Graph.bound`). Only options that add little stay in the
integer program (a core, after Balas and Zemel, 1980), which grows until what is outside is proved to be of no use.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .graph import Duals, Graph, Mask, Picks, Table, no_duals
from .greedy import approach, descend

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TOLERANCE = 1e-9
"""A limit counts as kept up to this share of it."""
_ROW = 4096.0
"""Limits in units of the solver, whose absolute tolerance of 1e-6 is then below TOLERANCE."""
_FIRST_MARGIN = 0.1
"""The first core: options that raise the bound by this share of the gap at most."""
_GROWTH = 4.0
_GREEDY_SHARE = 0.25


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Args:
        picks: Original options (budgets, decisions) of the best plans seen, or None.
        bound: No plans have a smaller weighted loss.
        impossible: Proved that there are no plans.
    """

    picks: Picks | None
    bound: float
    impossible: bool = False


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
class Program:
    """Constraints on the variables of all budgets: per budget x, z and, with several budgets, y.

    Args:
        equalities: Rows of the equalities, budget by budget: decisions, marginals of the scopes, running sums.
        right: Right sides of the equalities.
        nesting: Rows <= 0 between neighbouring budgets.
        costs: (resources, variables x and z of one budget).
        width: Variables of one budget.
        binaries: Variables x of one budget.
    """

    equalities: csr_array
    right: Table
    nesting: csr_array
    costs: Table
    width: int
    binaries: int

    @classmethod
    def of(cls, graph: Graph, budgets: int) -> Program:
        """Return the program of a graph."""
        # SciPy's solvers take a second to import: only who plans pays for it.
        from scipy.sparse import block_diag, coo_array, csr_array, eye_array, kron

        sizes = np.asarray([len(kept) for kept in graph.kept], dtype=np.intp)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        binaries = int(starts[-1])
        decision = np.repeat(np.arange(len(sizes)), sizes)
        rows, columns, values = [decision], [np.arange(binaries)], [np.ones(binaries)]
        costs = [graph.unary[:, graph.valid]]
        row, column = len(sizes), binaries
        for scope in graph.scopes:
            shape = scope.table.shape[1:]
            places = np.indices(shape).reshape(len(shape), -1)
            for axis, choice in enumerate(scope.over):
                rows += [row + places[axis], row + np.arange(shape[axis])]
                columns += [column + np.arange(places.shape[1]), starts[choice] + np.arange(shape[axis])]
                values += [np.ones(places.shape[1]), -np.ones(shape[axis])]
                row += shape[axis]
            costs.append(scope.table.reshape(len(scope.table), -1))
            column += places.shape[1]
        joint = np.concatenate(costs, axis=1)
        sums = 0
        if budgets > 1:
            # y(o) = y(o - 1) + x(o), for every option of a decision but the last, whose sum is 1.
            inner = np.flatnonzero(np.arange(binaries) != starts[decision + 1] - 1)
            sums = len(inner)
            here = np.arange(sums)
            follows = inner > starts[decision[inner]]
            rows += [row + here, row + here, row + here[follows]]
            columns += [column + here, inner, column + here[follows] - 1]
            values += [np.ones(sums), -np.ones(sums), -np.ones(int(follows.sum()))]
            row, column = row + sums, column + sums
        entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        block = coo_array(entries, shape=(row, column)).tocsr()
        right = np.zeros(row)
        right[: len(sizes)] = 1
        step = csr_array(np.eye(budgets, k=1)[:-1] - np.eye(budgets)[:-1])
        nesting = kron(step, eye_array(sums, column, k=column - sums)) if sums else csr_array((0, budgets * column))
        equalities = block_diag([block] * budgets).tocsr()
        return cls(equalities, np.tile(right, budgets), csr_array(nesting), joint, column, binaries)

    def lines(self, prices: Table) -> Table:
        """Return prices (rows, budgets, resources) of the totals as prices of all variables (rows, variables)."""
        spread = np.zeros((*prices.shape[:2], self.width))
        spread[:, :, : self.costs.shape[1]] = prices @ self.costs
        return spread.reshape(len(prices), -1)

    def picks(self, graph: Graph, solution: Table) -> Picks:
        """Return the options (budgets, decisions) of a solution."""
        blocks = solution.reshape(-1, self.width)[:, : self.binaries]
        padded = np.full((len(blocks), *graph.valid.shape), -np.inf)
        padded[:, graph.valid] = blocks
        return np.asarray(padded.argmax(axis=2))


@dataclass
class _Search:
    """The state of one search: the problem, the best plans so far and what is proved."""

    weights: Table
    limits: Table
    gap: float
    deadline: float
    scale: float = 1.0
    value: float = np.inf
    picks: Picks | None = None
    bound: float = -np.inf

    def offer(self, graph: Graph, picks: Picks) -> None:
        """Take plans (budgets, decisions) if they keep all limits and are the best so far."""
        totals = np.asarray([graph.totals(line) for line in picks])
        kept = (totals[:, 1:] <= self.limits * (1 + TOLERANCE)).all() and (np.diff(picks, axis=0) >= 0).all()
        value = float(self.weights @ totals[:, 0])
        if kept and value < self.value:
            self.value, self.picks = value, graph.originals(picks)

    @property
    def finished(self) -> bool:
        """Whether the gap is reached or the time is up."""
        return self.value - self.bound <= self.gap * self.value < np.inf or self.left == 0

    @property
    def useful(self) -> float:
        """Loss above which nothing is of use, with room for rounding."""
        return self.value * (1 + 1e-9)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(self.deadline - time.perf_counter(), 0.0)

    def found(self) -> Found:
        """Return what the search has come to."""
        return Found(self.picks, self.bound, impossible=self.bound == np.inf)

    def rows(self, program: Program, constant: Table, unit: float) -> tuple[Table, Table, Table]:
        """Return the objective, and rows and right sides of the limits that there are, each limit worth `unit`."""
        budgets, resources = self.limits.shape
        objective = np.zeros((1, budgets, resources + 1))
        objective[0, :, 0] = self.weights / self.scale
        where = np.argwhere(np.isfinite(self.limits))
        prices = np.zeros((len(where), budgets, resources + 1))
        per_limit = unit / self.limits[tuple(where.T)]
        prices[np.arange(len(where)), where[:, 0], where[:, 1] + 1] = per_limit
        return program.lines(objective)[0], program.lines(prices), unit - constant[where[:, 1] + 1] * per_limit


def _relaxed(search: _Search, graph: Graph, allowed: Mask) -> tuple[Duals | None, bool]:
    """Return the prices of the relaxed program, if there was time to solve it, and whether it is impossible."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    budgets = len(search.weights)
    program = Program.of(graph, budgets)
    objective, lines, right = search.rows(program, graph.constant, 1.0)
    upper = np.ones((budgets, program.width))
    upper[:, : program.binaries] = allowed[:, graph.valid]
    with _stdout_to_stderr():
        result = linprog(
            objective,
            A_ub=vstack([csr_array(lines), program.nesting]),
            b_ub=np.concatenate([right, np.zeros(program.nesting.shape[0])]),
            A_eq=program.equalities,
            b_eq=program.right,
            bounds=np.stack([np.zeros(upper.size), upper.ravel()], axis=1),
            method="highs",
            options={"time_limit": search.left},
        )
    if result.status != 0:
        return None, result.status == 2
    limits = np.zeros(search.limits.shape)
    prices = np.maximum(-result.ineqlin.marginals[: len(right)], 0)
    limits[np.isfinite(search.limits)] = prices * search.scale
    marginals = result.eqlin.marginals.reshape(budgets, -1) * search.scale
    messages, row = [], len(graph.kept)
    for scope in graph.scopes:
        count = sum(scope.table.shape[1:])
        messages.append(marginals[:, row : row + count])
        row += count
    return Duals(limits, tuple(messages)), False


def _integral(search: _Search, graph: Graph, allowed: Mask) -> float:
    """Offer the search the best plans among the allowed options.

    Returns:
        A lower bound of their loss.
    """
    keep = np.asarray(allowed.any(axis=0))
    core = graph.only(keep)
    program = Program.of(core, len(allowed))
    objective, lines, right = search.rows(program, core.constant, _ROW)
    constant = float(search.weights.sum() * core.constant[0])
    # Only plans that improve the best by half of the gap are asked for: small cores without any are quickly done with.
    enough = search.value * (1 - search.gap / 2)
    if enough < np.inf:
        lines = np.concatenate([lines, _ROW * objective[None]])
        right = np.append(right, _ROW * (enough - constant) / search.scale)
    result = _milp(program, objective, (lines, right), open_=allowed[:, keep], gap=search.gap / 2, seconds=search.left)
    if result.status == 2:
        return enough
    if result.x is not None:
        search.offer(core, program.picks(core, result.x))
    lower = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    return min(lower * search.scale + constant, enough)


def _milp(
    program: Program, objective: Table, limits: tuple[Table, Table], *, open_: Mask, gap: float, seconds: float
) -> Any:
    """Return the solver's result; variables beyond those of the program are not negative and else free."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    budgets, width = len(open_), objective.size
    pad = width - budgets * program.width
    integrality, upper = np.zeros((budgets, program.width)), np.ones((budgets, program.width))
    integrality[:, : program.binaries] = 1
    upper[:, : program.binaries] = open_
    equal, nested = (
        csr_array((a.data, a.indices, a.indptr), shape=(a.shape[0], width))
        for a in (program.equalities, program.nesting)
    )
    lines, right = limits
    below = vstack([csr_array(lines), nested])
    with _stdout_to_stderr():
        return milp(
            objective,
            constraints=[
                LinearConstraint(equal, program.right, program.right),
                LinearConstraint(below, -np.inf, np.concatenate([right, np.zeros(nested.shape[0])])),
            ],
            integrality=np.concatenate([integrality.ravel(), np.zeros(pad)]),
            bounds=Bounds(np.zeros(width), np.concatenate([upper.ravel(), np.full(pad, np.inf)])),
            options={"mip_rel_gap": gap, "time_limit": seconds, "disp": False},
        )


def solve(graph: Graph, weights: Table, limits: Table, *, gap: float, seconds: float) -> Found:
    """Find plans of least weighted loss within every budget's limits, whose options never decrease.

    Args:
        graph: The problem.
        weights: (budgets,), positive.
        limits: (budgets, limited resources), each budget's no larger than the one's before it; infinite for none.
        gap: Relative gap at which the search may stop.
        seconds: Longest time.

    Returns:
        The plans and what is proved about them.
    """
    start = time.perf_counter()
    search = _Search(weights, limits, gap, start + seconds)
    greedy = descend(graph, limits, deadline=start + _GREEDY_SHARE * seconds)
    if greedy is None and search.left > 0:
        # The tightest budget's plan serves all budgets.
        greedy = np.repeat(_nearest(graph, limits[-1], seconds=search.left / 4)[None], len(weights), axis=0)
    if greedy is not None:
        search.offer(graph, greedy)
    allowed = np.repeat(graph.valid[None], len(weights), axis=0)
    base, extra = graph.bound(weights, limits, duals=no_duals(graph, len(weights)), allowed=allowed)
    search.bound = base
    if search.finished:
        return search.found()
    largest = max(float(table.max(initial=0.0)) for table in (graph.unary[0], *(s.table[0] for s in graph.scopes)))
    search.scale = (search.value if 0 < search.value < np.inf else largest) or 1.0
    allowed &= base + extra <= search.useful
    if not allowed.any(axis=2).all():
        return Found(search.picks, search.value)
    graph, allowed, extra = _shrunk(graph, allowed, extra)
    duals, impossible = _relaxed(search, graph, allowed)
    if impossible and search.picks is None:
        return Found(None, np.inf, impossible=True)
    if duals is not None:
        base, extra = graph.bound(weights, limits, duals=duals, allowed=allowed)
        search.bound = max(search.bound, base)
    allowed &= np.isfinite(extra)
    # The core must hold an option of every decision, or it has no plan at all.
    least = float(np.where(allowed, extra, np.inf).min(axis=2).max(initial=0.0))
    margin = max(_FIRST_MARGIN * gap * base, 2 * least)
    while not search.finished:
        whole = margin >= search.value - base or bool((extra[allowed] <= margin).all())
        core = allowed & (base + extra <= min(base + margin, search.useful))
        # A decision without options: what is better than the best plans would need one that is proved not to be.
        lower = _integral(search, graph, core) if core.any(axis=2).all() else np.inf
        search.bound = max(search.bound, min(lower, np.inf if whole else base + margin, search.value))
        if whole:
            break
        margin = _GROWTH * margin if margin > 0 else np.inf
    return search.found()


def _shrunk(graph: Graph, allowed: Mask, extra: Table) -> tuple[Graph, Mask, Table]:
    """Return the problem without the options that no budget may pick."""
    keep = np.asarray(allowed.any(axis=0))
    core = graph.only(keep)
    shape = (len(allowed), *core.valid.shape)
    still, more = np.zeros(shape, dtype=bool), np.full(shape, np.inf)
    still[:, core.valid] = allowed[:, keep]
    more[:, core.valid] = extra[:, keep]
    return core, still, more


def nearest(graph: Graph, limits: Table, *, seconds: float) -> Picks:
    """Find the plan that keeps a budget's limits when they are stretched by the least common factor.

    Args:
        graph: The problem.
        limits: (limited resources,), infinite where there is none.
        seconds: Longest time for the solver; without its answer the plan is the one where descent ends.

    Returns:
        Original options (decisions,).
    """
    return np.asarray(graph.originals(_nearest(graph, limits, seconds=seconds)[None])[0])


def _nearest(graph: Graph, limits: Table, *, seconds: float) -> Picks:
    deadline = time.perf_counter() + seconds
    search = _Search(np.ones(1), limits[None], 1e-3, deadline)
    program = Program.of(graph, 1)
    _, lines, right = search.rows(program, graph.constant, _ROW)
    objective = np.zeros(lines.shape[1] + 1)
    objective[-1] = 1.0
    stretched = np.concatenate([lines, np.full((len(lines), 1), -_ROW)], axis=1), right - _ROW
    everything = np.ones((1, program.binaries), dtype=bool)
    result = _milp(program, objective, stretched, open_=everything, gap=search.gap, seconds=seconds)
    if result.x is None:
        return approach(graph, limits, deadline=deadline)
    return np.asarray(program.picks(graph, result.x[:-1])[0])
