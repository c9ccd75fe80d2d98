"""Plan, measure what the plan really costs, rescale the predictions, plan again.

Costs do not depend on a net's values, so a plan is measured before any training. Three rounds at most; the plan kept
is the one of least predicted loss among those within all limits. Predictions of loss err, so plans that would be best
under somewhat other predictions are carried out beside it, and the one of least measured loss is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..report import Round
from . import apply, measure, pace, tables
from .budget import RESOURCES, Budget, show
from .calibrate import Meter, share
from .checkpoint import Run
from .job import Job
from .plan import InfeasibleError, Plan, Term, choose, choose_nested, total
from .result import describe
from .space import Space
from .task import evaluating
from .unchanged import unchanged

ALTERNATIVES = 4
"""Most plans for perturbed predictions that are carried out beside the planned one; one at least is."""

ROUNDS = 3
"""Most rounds of planning."""


@dataclass(frozen=True)
class Planned:
    """A plan and how it was found.

    Args:
        plan: The chosen options.
        rounds: What each round measured.
    """

    plan: Plan
    rounds: tuple[Round, ...]


_MARGIN = {"latency": 0.97, "size": 0.995, "peak_memory": 0.995}
_FIRST = 0.98
"""Further share of the latency that the first plan leaves free: its prediction is not corrected yet."""


def plan_within(job: Job, space: Space, run: Run, *, limits: Mapping[str, float], stage: str) -> Planned:
    """Find the plan of least predicted loss whose measured costs keep the limits.

    Args:
        job: What was asked.
        space: What may be changed.
        run: Where the plan is recorded.
        limits: Largest total of each limited resource.
        stage: Name under which the plan is recorded.

    Returns:
        The plan, and what each round measured.

    Raises:
        InfeasibleError: if no plan is predicted to keep the limits, or none does when measured; names the nearest.
    """
    stored = run.get(stage)
    if stored is not None:
        plan = Plan(stored["picks"], stored["predicted"], stored["gap"], stored["seconds"])
        return Planned(plan, tuple(Round(int(r["number"]), str(r["text"])) for r in stored["rounds"]))
    correction = dict.fromkeys(RESOURCES, 1.0)
    best: tuple[tuple[bool, float], Plan, dict[str, float]] | None = None
    rounds: list[Round] = []
    measured_costs: list[dict[str, float]] = []
    for number in range(1, ROUNDS + 1):
        job.progress("plan", (number - 1) / ROUNDS, f"round {number}")
        try:
            plan = _choose(space, correction, limits, first=number == 1)
        except InfeasibleError as error:
            if best is None:
                raise InfeasibleError(*_explained(error, job, space), proved=error.proved) from None
            break
        after = _plan_costs(job, space, plan)
        measured_costs.append(after)
        missed = [name for name, limit in limits.items() if after[name] > limit]
        outcome = f"over the limit: {', '.join(missed)}" if missed else "within all limits"
        rounds.append(Round(number, f"measured {describe(after)}; {outcome}"))
        excess = max([after[name] / limits[name] for name in limits], default=0.0)
        key = (bool(missed), excess if missed else plan.predicted.get("loss", 0.0))
        if best is None or key < best[0]:
            best = (key, plan, dict(correction))
        if not missed and all(after[name] > 0.93 * limits[name] for name in limits if name in _MARGIN):
            break
        for name in limits:
            correction[name] *= _step(after[name] / max(plan.predicted[name], 1e-30))
    assert best is not None
    (missed_all, _), plan, corrected = best
    if missed_all:
        raise InfeasibleError(*_missed(limits, measured_costs), proved=False)
    plan, text = _searched(job, space, plan, corrected, limits)
    rounds.append(Round(len(rounds) + 1, text))
    document = {"picks": dict(plan.picks), "predicted": dict(plan.predicted), "gap": plan.gap, "seconds": plan.seconds}
    run.put(stage, {**document, "rounds": [vars(r) for r in rounds]})
    return Planned(plan, tuple(rounds))


def _searched(
    job: Job, space: Space, plan: Plan, correction: Mapping[str, float], limits: Mapping[str, float]
) -> tuple[Plan, str]:
    """Return the best of a plan and its alternatives by the loss increase that is measured, and what was seen.

    Alternatives are optimal for predictions that err by a random factor an entry, as real ones do.
    """
    meter = Meter(job)
    generator = np.random.default_rng(job.seed)
    terms = _corrected(space, correction)
    decisions = tables.choices(space.decisions)
    wanted = {name: limit * _MARGIN.get(name, 1.0) for name, limit in limits.items()}
    found = [(meter(space.draft(plan.picks).finished())[0], plan)]
    count = max(1, round(ALTERNATIVES * share(job)))
    for number in range(count):
        job.progress("plan", 1.0, f"alternative {number + 1} of {count}")
        noisy = [
            Term(t.over, t.resource, t.table * generator.lognormal(0.0, 1.0, t.table.shape))
            if t.resource == "loss"
            else t
            for t in terms
        ]
        try:
            other = choose(decisions, noisy, limits=wanted, gap=0.01, seconds=5.0)
        except InfeasibleError:
            break
        if all(other.picks != known.picks for _, known in found):
            predicted = total(terms, other.picks)
            # The planned one's bound holds for every plan within these limits.
            gap = max(0.0, 1 - (1 - plan.gap) * plan.predicted.get("loss", 0.0) / max(predicted["loss"], 1e-30))
            found.append((meter(space.draft(other.picks).finished())[0], replace(other, predicted=predicted, gap=gap)))
    found.sort(key=lambda pair: pair[0])
    text = f"loss increase before recovery of {len(found)} plans: {', '.join(f'{loss:.3g}' for loss, _ in found)}"
    for _, candidate in found:
        if candidate is plan:
            break
        after = _plan_costs(job, space, candidate)
        if all(after[name] <= limit for name, limit in limits.items()):
            return candidate, f"{text}; took the first within all limits, {describe(after)}"
    return plan, f"{text}; kept the planned one"


def _explained(error: InfeasibleError, job: Job, space: Space) -> tuple[str, Mapping[str, float]]:
    """Return an error's message with what has no option, if it is certain that there is no plan, and the nearest."""
    text = unchanged(job.model, space.decisions, skip=job.skip) if error.proved else ""
    return f"{error}{text}", error.nearest


def plan_nested(jobs: Sequence[Job], space: Space, *, limits: Sequence[Mapping[str, float]]) -> list[Planned]:
    """Find nested plans for several budgets, each within its limits by measurement.

    Args:
        jobs: What was asked, one job a budget.
        space: What may be changed.
        limits: Largest total of each limited resource, one mapping a budget, from loosest to tightest.

    Returns:
        One plan a budget.

    Raises:
        InfeasibleError: if a budget cannot be kept, or is not when it is measured; names the nearest.
    """
    correction = dict.fromkeys(RESOURCES, 1.0)
    decisions = tables.choices(space.decisions)
    measured_costs: list[list[dict[str, float]]] = [[] for _ in jobs]
    for number in range(1, ROUNDS + 1):
        jobs[0].progress("plan", (number - 1) / ROUNDS, f"round {number}, {len(jobs)} nested budgets")
        wanted = [{name: limit * _MARGIN.get(name, 1.0) for name, limit in one.items()} for one in limits]
        try:
            plans = choose_nested(decisions, _corrected(space, correction), limits=wanted)
        except InfeasibleError as error:
            raise InfeasibleError(*_explained(error, jobs[0], space), proved=error.proved) from None
        measured = [_plan_costs(job, space, plan) for job, plan in zip(jobs, plans)]
        for known, after in zip(measured_costs, measured):
            known.append(after)
        if all(after[name] <= limit for after, one in zip(measured, limits) for name, limit in one.items()):
            return [
                Planned(plan, (Round(number, f"nested; measured {describe(after)}; within all limits"),))
                for plan, after in zip(plans, measured)
            ]
        for name in {name for one in limits for name in one}:
            ratios = [
                after[name] / max(plan.predicted[name], 1e-30) for plan, after in zip(plans, measured) if name in after
            ]
            correction[name] *= _step(max(ratios))
    missed = next(i for i, one in enumerate(limits) if any(measured[i][name] > at for name, at in one.items()))
    raise InfeasibleError(*_missed(limits[missed], measured_costs[missed]), proved=False)


def _step(ratio: float) -> float:
    """Return by how much one round changes a cost's correction: a larger step is the noise of a busy machine."""
    return min(1.5, max(0.67, ratio))


def _missed(limits: Mapping[str, float], measured: Sequence[Mapping[str, float]]) -> tuple[str, Mapping[str, float]]:
    """Return message and nearest costs for limits that no round kept by measurement."""
    nearest = min(measured, key=lambda after: max(after[name] / limit for name, limit in limits.items()))
    text = ", ".join(f"{n} {show(n, nearest[n])} (limit {show(n, limit)})" for n, limit in limits.items())
    message = (
        f"No plan kept every limit when it was measured, in {len(measured)} rounds. Nearest feasible: {text}. Raise "
        "the limits a little, or measure longer (seconds=) where the machine is noisy."
    )
    return message, nearest


def _corrected(space: Space, correction: Mapping[str, float]) -> list[Term]:
    return [Term(t.over, t.resource, t.table * correction.get(t.resource, 1.0)) for t in space.terms]


def _choose(space: Space, correction: Mapping[str, float], limits: Mapping[str, float], *, first: bool) -> Plan:
    """Return a plan with a little room below the limits for noise; without it if there is none to have."""
    terms = _corrected(space, correction)
    decisions = tables.choices(space.decisions)
    wanted = {name: limit * _MARGIN.get(name, 1.0) for name, limit in limits.items()}
    if first and "latency" in wanted:
        wanted["latency"] *= _FIRST
    try:
        return choose(decisions, terms, limits=wanted)
    except InfeasibleError:
        return choose(decisions, terms, limits=limits)


def attempts(budget: Budget, before: Mapping[str, float]) -> list[dict[str, float]]:
    """Return the limits to plan for, one set an attempt.

    Args:
        budget: What was asked.
        before: Costs of the original.

    Returns:
        The limits themselves if a cost is limited. With a limit on the drop alone, less and less is asked for: half of
        the time and a quarter of the bytes first, fewer bytes alone at last.
    """
    found = {name: budget.limit(name, before=before[name]) for name in budget.limited}
    limits = {name: limit for name, limit in found.items() if limit is not None}
    if limits:
        return [limits]
    both = [{"latency": share * before["latency"], "size": 0.5 * share * before["size"]} for share in (0.5, 0.7, 0.9)]
    return [*both, *({"size": share * before["size"]} for share in (0.3, 0.6))]


def _plan_costs(job: Job, space: Space, plan: Plan) -> dict[str, float]:
    """Return the measured costs of a plan's net before any training: they do not depend on its values."""
    form = apply.blueprint(space.decisions, plan.picks, space.layout)
    net = apply.shaped(job.model, form)
    after = measure.costs(net, job.inputs)
    for site, structure in apply.on_structures(net, form.structures).values():
        site.write_(net, structure.project(site.read(net)))
    after["size"] = float(measure.packed_bytes(net, form.structures))
    if not job.timed:
        return after
    runs, expected = (measure.runner(each, job.inputs) for each in (job.model, net)), space.before["latency"]
    with evaluating(job.model):
        ratio = pace.speedup(*runs, expected=expected, budget=0.7 * job.seconds, threads=job.threads, seed=job.seed)
    after["latency"] = expected / ratio
    return after
