"""Plan, measure what the plan really costs, rescale the predictions, plan again.

Costs do not depend on a net's values, so a plan is measured before any training. Three rounds at most; the plan kept is
the one of least predicted loss among those within all limits, or else the one that misses them least.
"""

from __future__ import annotations

from collections.abc import Mapping

from .. import cost
from ..report import Round
from . import apply, measure, tables
from .budget import RESOURCES, Budget
from .checkpoint import Run
from .job import Job
from .plan import InfeasibleError, Plan, Term, choose
from .result import describe
from .space import Space
from .task import evaluating

ROUNDS = 3
"""Most rounds of planning."""

_MARGIN = {"latency": 0.97, "size": 0.995, "peak_memory": 0.995}


def plan_within(job: Job, space: Space, run: Run) -> tuple[Plan, tuple[Round, ...]]:
    """Find the plan of least predicted loss whose measured costs keep the limits.

    Args:
        job: What was asked.
        space: What may be changed.
        run: Where the plan is recorded.

    Returns:
        The plan, and what each round measured.

    Raises:
        InfeasibleError: if no plan is predicted to keep the limits; names the nearest.
    """
    stored = run.get("plan")
    if stored is not None:
        plan = Plan(stored["picks"], stored["predicted"], stored["gap"], stored["seconds"])
        return plan, tuple(Round(int(r["number"]), str(r["text"])) for r in stored["rounds"])
    limits = _limits(job.budget, space.before)
    decisions = tables.choices(space.widths, space.grids)
    correction = dict.fromkeys(RESOURCES, 1.0)
    best: tuple[tuple[bool, float], Plan] | None = None
    rounds: list[Round] = []
    for number in range(1, ROUNDS + 1):
        job.progress("plan", (number - 1) / ROUNDS, f"round {number}")
        terms = [Term(t.over, t.resource, t.table * correction.get(t.resource, 1.0)) for t in space.terms]
        wanted = {name: limit * _MARGIN.get(name, 1.0) for name, limit in limits.items()}
        try:
            plan = choose(decisions, terms, limits=wanted)
        except InfeasibleError:
            if best is None:
                raise
            break
        after = _plan_costs(job, space, plan)
        missed = [name for name, limit in limits.items() if after[name] > limit]
        excess = max([after[name] / limits[name] for name in limits], default=0.0)
        rounds.append(
            Round(
                number,
                f"measured {describe(after)}; "
                + (f"over the limit: {', '.join(missed)}" if missed else "within all limits"),
            )
        )
        key = (bool(missed), excess if missed else plan.predicted.get("loss", 0.0))
        if best is None or key < best[0]:
            best = (key, plan)
        close = all(after[name] > 0.93 * limits[name] for name in limits if name in ("latency", "size"))
        if not missed and (close or number == ROUNDS):
            break
        for name in limits:
            correction[name] *= after[name] / max(plan.predicted[name], 1e-30)
    assert best is not None
    plan = best[1]
    run.put(
        "plan",
        {
            "picks": dict(plan.picks),
            "predicted": dict(plan.predicted),
            "gap": plan.gap,
            "seconds": plan.seconds,
            "rounds": [vars(r) for r in rounds],
        },
    )
    return plan, tuple(rounds)


def _limits(budget: Budget, before: Mapping[str, float]) -> dict[str, float]:
    found = {name: budget.limit(name, before=before[name]) for name in budget.limited}
    limits = {name: limit for name, limit in found.items() if limit is not None}
    # With a limit on the drop alone, half of the time and a quarter of the bytes are asked for.
    return limits or {"latency": 0.5 * before["latency"], "size": 0.25 * before["size"]}


def _plan_costs(job: Job, space: Space, plan: Plan) -> dict[str, float]:
    """Return the measured costs of a plan's net before any training: they do not depend on its values."""
    net = apply.shaped(
        job.model, apply.surgery(space.widths, plan.picks), folded=space.folded, memory_format=space.memory_format
    )
    after = measure.costs(net, job.inputs)
    grids = apply.grids_of(space.grids, plan.picks)
    for site, grid in apply.on_grids(net, grids).values():
        site.write_(net, grid.project(site.read(net)))
    after["size"] = float(measure.packed_bytes(net, grids))
    if not job.timed:
        return after
    original, net_run = measure.runner(job.model, job.inputs), measure.runner(net, job.inputs)
    with evaluating(job.model):
        compared = cost.compare_latency(
            original, net_run, threads=job.threads, seconds=0.7 * job.seconds, seed=job.seed
        )
    after["latency"] = space.before["latency"] / compared.ratio
    return after
