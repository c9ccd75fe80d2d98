"""Choose one option for every decision so that the predicted loss is least and every cost keeps its limit.

Costs do not add over decisions: the time of a convolution depends on its input width and on its output width, its bytes
on both and on the bits. So a problem is a set of choices and of tables over one or several of them (a factor graph).
Options that another one beats whatever the rest does are left out first; what is left is solved as a mixed-integer
program to a stated gap (see `program`). Several budgets are planned together if one set of decisions shall serve them
all: options then never decrease from a looser budget to a tighter one. Relatives: SPDY (Frantar and Alistarh, 2022),
HALP (Shen et al., 2022), ZipLM (Kurtic et al., 2023), which assume costs that add.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import program
from .budget import RESOURCES, show
from .graph import Graph, Picks, Table


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
        gap: Proved relative distance to the best possible loss; for nested plans, of the weighted sum of all losses.
        seconds: Time that solving took, for nested plans that of all together.
    """

    picks: Mapping[str, int]
    predicted: Mapping[str, float]
    gap: float
    seconds: float


class InfeasibleError(ValueError):
    """No combination of options keeps every limit, or none was found in time.

    Args:
        message: The text shown.
        nearest: Totals of the plan that comes nearest to the limits.
        proved: Whether it is certain that there is none.
    """

    def __init__(self, message: str, nearest: Mapping[str, float], *, proved: bool = True) -> None:
        super().__init__(message)
        self.nearest = dict(nearest)
        self.proved = proved


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


def _check(choices: Sequence[Choice], terms: Sequence[Term]) -> None:
    sizes = {choice.name: len(choice.options) for choice in choices}
    if len(sizes) != len(choices):
        raise ValueError(f"Choices must have different names, got {[choice.name for choice in choices]}.")
    empty = [choice.name for choice in choices if not choice.options]
    if empty or not choices:
        raise ValueError(f"Every choice needs an option, got {len(choices)} choices, without options: {empty}.")
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


def _graph(choices: Sequence[Choice], terms: Sequence[Term], limited: Sequence[str]) -> Graph:
    """Return the tables of the loss (row 0) and of the limited resources."""
    place = {choice.name: i for i, choice in enumerate(choices)}
    tables: dict[tuple[int, ...], list[tuple[int, Table]]] = {}
    for row, resource in enumerate(["loss", *limited]):
        for term in terms:
            if term.resource == resource:
                tables.setdefault(tuple(place[name] for name in term.over), []).append((row, term.table))
    return Graph.of([len(choice.options) for choice in choices], tables, 1 + len(limited))


def undominated(
    choices: Sequence[Choice], terms: Sequence[Term], resources: Sequence[str], *, nested: bool = False
) -> dict[str, list[int]]:
    """Name the options that a best plan may need.

    An option is left out if another costs no more of the loss and of any of the resources, whatever the other choices
    do; of equal options the first stays.

    Args:
        choices: The decisions.
        terms: Tables of loss and costs over them.
        resources: The costs that count: those with a limit. The loss always counts.
        nested: Keep what the best nested plans may need: an option goes only if none that stays lies between it and the
            one that beats it; else the replacement might be above the next budget's option or below the last one's.

    Returns:
        Indices of the options that stay, by choice, ascending.

    Raises:
        ValueError: if a table does not fit its choices, or no table is of one of the resources.
    """  # noqa: DOC502
    _check(choices, terms)
    _known(terms, resources)
    graph = _graph(choices, terms, resources)
    return {c.name: kept.tolist() for c, kept in zip(choices, graph.undominated(ordered=nested).kept)}


def _known(terms: Sequence[Term], resources: Sequence[str]) -> None:
    known = {term.resource for term in terms}
    unknown = [name for name in resources if name not in known]
    if unknown:
        raise ValueError(f"Limits on resources without a table: {unknown}; known: {sorted(known)}.")


def _check_limits(terms: Sequence[Term], limits: Sequence[Mapping[str, float]]) -> None:
    for line in limits:
        _known(terms, list(line))
        for name, limit in line.items():
            if not (np.isfinite(limit) and limit > 0):
                raise ValueError(f"The limit of {name!r} must be positive and finite, got {limit}.")
    for number, (loose, tight) in enumerate(itertools.pairwise(limits), 1):
        for name, limit in loose.items():
            if tight.get(name, np.inf) > limit:
                raise ValueError(
                    f"Budgets must go from the loosest to the tightest: {name!r} is limited to {limit} in budget "
                    f"{number} and to {tight.get(name, 'nothing')} in budget {number + 1}. Sort the budgets, and "
                    "repeat a limit that stays."
                )


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
        seconds: Longest time for solving; the best plan found by then is returned, with its gap.

    Returns:
        The plan.

    Raises:
        ValueError: if a table does not fit its choices, or a limit is not positive or names an unknown resource.
        InfeasibleError: if no combination keeps every limit, or none was found in time; carries the totals that come
            nearest.
    """  # noqa: DOC502
    return _solve(choices, terms, [limits], weights=[1.0], gap=gap, seconds=seconds)[0]


def choose_nested(
    choices: Sequence[Choice],
    terms: Sequence[Term],
    *,
    limits: Sequence[Mapping[str, float]],
    weights: Sequence[float] | None = None,
    gap: float = 1e-4,
    seconds: float = 20.0,
) -> list[Plan]:
    """Solve for one plan a budget so that a tighter budget only ever adds to what a looser one decided.

    Options are ordered from untouched to most compressed, budgets from loosest to tightest. Nested means: no choice's
    option index decreases from one plan to the next, so one set of decisions, taken in steps, serves all budgets. What
    is least is the weighted sum of the plans' predicted losses; each plan keeps its own limits.

    Args:
        choices: The decisions.
        terms: Tables of loss and costs over them.
        limits: For every budget the largest total of each limited resource; none rises from one budget to the next.
        weights: How much each budget's loss counts; None for the same.
        gap: Relative gap of the weighted sum at which solving may stop.
        seconds: Longest time for solving; the best plans found by then are returned, with their gap.

    Returns:
        One plan a budget; all carry the same gap and time.

    Raises:
        ValueError: if a table does not fit its choices, or limits or weights are missing, wrong or not in order.
        InfeasibleError: if a budget cannot be kept, or no plans were found in time; names the first such budget and
            carries the totals that come nearest to it.
    """  # noqa: DOC502
    if not limits:
        raise ValueError(f"Nested plans need the limits of one budget at least, got {list(limits)}.")
    shares = [1.0] * len(limits) if weights is None else list(weights)
    if len(shares) != len(limits) or not all(np.isfinite(w) and w > 0 for w in shares):
        raise ValueError(f"Nested plans for {len(limits)} budgets need as many positive weights, got {shares}.")
    return _solve(choices, terms, limits, weights=shares, gap=gap, seconds=seconds)


def _solve(
    choices: Sequence[Choice],
    terms: Sequence[Term],
    limits: Sequence[Mapping[str, float]],
    *,
    weights: Sequence[float],
    gap: float,
    seconds: float,
) -> list[Plan]:
    start = time.perf_counter()
    _check(choices, terms)
    _check_limits(terms, limits)
    limited = list(dict.fromkeys(name for line in limits for name in line))
    graph = _graph(choices, terms, limited).undominated(ordered=len(limits) > 1)
    table = np.asarray([[line.get(name, np.inf) for name in limited] for line in limits]).reshape(len(limits), -1)
    found = program.solve(graph, np.asarray(weights), table, gap=gap, seconds=seconds)
    if found.picks is None:
        raise _infeasible(graph, choices, terms, limits=limits, table=table, found=found, seconds=seconds)
    named = [_named(choices, line) for line in found.picks]
    totals = [total(terms, picks) for picks in named]
    value = sum(weight * line.get("loss", 0.0) for weight, line in zip(weights, totals))
    reached = max(value - found.bound, 0.0) / value if value > 0 else 0.0
    passed = time.perf_counter() - start
    return [Plan(picks, line, reached, passed) for picks, line in zip(named, totals)]


def _named(choices: Sequence[Choice], picks: Picks) -> dict[str, int]:
    return {choice.name: int(option) for choice, option in zip(choices, picks)}


def _show(name: str, value: float) -> str:
    return show(name, value) if name in RESOURCES else f"{value:.4g}"


def _infeasible(
    graph: Graph,
    choices: Sequence[Choice],
    terms: Sequence[Term],
    *,
    limits: Sequence[Mapping[str, float]],
    table: Table,
    found: program.Found,
    seconds: float,
) -> InfeasibleError:
    """Return the error for the first budget that cannot be kept, with the plan that comes nearest to it."""
    for number, line in enumerate(limits):
        nearest = total(terms, _named(choices, program.nearest(graph, table[number], seconds=seconds)))
        if any(nearest[name] > limit * (1 + program.TOLERANCE) for name, limit in line.items()):
            break
    text = ", ".join(
        f"{name} {_show(name, nearest[name])} (limit {_show(name, limit)})" for name, limit in line.items()
    )
    which = f"Budget {number + 1} of {len(limits)}" if len(limits) > 1 else "The budget"
    if found.impossible:
        advice = "Raise the limits or allow more structures."
        return InfeasibleError(f"{which} is below the smallest plan. Nearest feasible: {text}. {advice}", nearest)
    message = (
        f"No plan was found within {seconds} s for the limits {[dict(line) for line in limits]}, and none was ruled "
        f"out. Raise `seconds` or the limits. Nearest: {text}."
    )
    return InfeasibleError(message, nearest, proved=False)
