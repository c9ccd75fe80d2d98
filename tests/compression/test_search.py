"""Plans are measured before they are kept: the alternatives beside them, and budgets that measurement refuses."""

from __future__ import annotations

import pytest

from eke import Budget, front
from eke.compression import InfeasibleError, rounds
from eke.compression.calibrate import Meter
from eke.compression.checkpoint import Run
from eke.compression.plan import choose, total
from eke.compression.prepare import prepare
from eke.compression.space import explore
from eke.compression.tables import choices

from .conftest import shorten_measurements
from .nets import STEPS, tiny_task, trained

BUDGET = Budget(size="0.1x", macs="0.4x")


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        shorten_measurements(patch.setattr)
        prepared = prepare(trained(seed=4), tiny_task(), budget=BUDGET, recovery=STEPS, seconds=0.02)
        return prepared.job, explore(prepared.job, prepared.run)


def planned(job, space):
    limits = rounds.attempts(job.budget, space.before)[0]
    return rounds.plan_within(job, space, Run(None, {}, resume=False), limits=limits, stage="plan"), limits


def test_the_plan_kept_has_no_larger_measured_loss_than_the_one_of_least_predicted_loss(world):
    job, space = world
    found, limits = planned(job, space)
    tight = {name: limit * rounds._MARGIN.get(name, 1.0) for name, limit in limits.items()}
    first = choose(choices(space.decisions), space.terms, limits=tight)
    meter = Meter(job)
    assert meter(space.draft(found.plan.picks).finished())[0] <= meter(space.draft(first.picks).finished())[0] + 1e-6


def test_the_plan_kept_is_within_all_limits_when_it_is_measured_again(world):
    job, space = world
    found, limits = planned(job, space)
    after = rounds._plan_costs(job, space, found.plan)
    assert all(after[name] <= limit for name, limit in limits.items())
    assert "loss increase before recovery of" in found.rounds[-1].text


def test_what_is_said_of_an_alternative_is_true_of_it(world, monkeypatch):
    job, space = world
    # The planned one looks worst, so an alternative is taken.
    values = iter([9.0, 3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(rounds, "Meter", lambda job: lambda net: (next(values), 0.0))
    found, _ = planned(job, space)
    monkeypatch.undo()
    plain, _ = planned(job, space)
    assert "took the first within all limits" in found.rounds[-1].text
    sums = total(space.terms, found.plan.picks)
    assert found.plan.predicted["loss"] == pytest.approx(sums["loss"])
    # No plan can be better than the bound that its gap states.
    bound = (1 - found.plan.gap) * found.plan.predicted["loss"]
    limits = rounds.attempts(job.budget, space.before)[0]
    tight = {name: limit * rounds._MARGIN.get(name, 1.0) for name, limit in limits.items()}
    best = choose(choices(space.decisions), space.terms, limits=tight)
    assert bound <= best.predicted["loss"] * (1 + 1e-6)
    assert plain.plan.gap >= 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("nested", [False, True])
def test_a_budget_that_no_measured_plan_keeps_is_refused_with_the_nearest(world, monkeypatch, nested):
    job, space = world
    seen = []

    def over(job, space, plan):
        seen.append(dict(plan.picks))
        return {"size": 1e9, "macs": 1e12, "latency": 1.0}

    monkeypatch.setattr(rounds, "_plan_costs", over)
    limits = rounds.attempts(job.budget, space.before)[0]
    run = Run(None, {}, resume=False)
    plan = {
        False: lambda: rounds.plan_within(job, space, run, limits=limits, stage="plan"),
        True: lambda: rounds.plan_nested([job], space, limits=[limits]),
    }[nested]
    with pytest.raises(InfeasibleError, match=r"when it was measured, in 3 rounds.*Raise the limits") as caught:
        plan()
    assert len(seen) == rounds.ROUNDS
    assert caught.value.nearest["size"] == 1e9
    assert not caught.value.proved


@pytest.mark.parametrize(("ratio", "step"), [(1.1, 1.1), (5.0, 1.5), (0.2, 0.67)])
def test_one_round_corrects_a_cost_by_a_limited_factor(ratio, step):
    assert rounds._step(ratio) == step


@pytest.mark.usefixtures("quick")
def test_every_result_of_a_front_says_how_often_the_report_split_was_opened():
    budgets = [Budget(size="0.5x"), Budget(size="0.25x")]
    results = front(trained(seed=4), tiny_task(), budgets=budgets, recovery=STEPS, seconds=0.02)
    opened = [{split.name: split.opened for split in result.evidence.splits}["report"] for result in results]
    assert opened == [1, 2]
