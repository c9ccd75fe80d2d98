"""Several budgets from one exploration, nested or not."""

from __future__ import annotations

import itertools

import pytest

from eke import Budget, front, load
from eke.compression import InfeasibleError

from .conftest import shorten_measurements
from .nets import STEPS, same, state, tiny_task, trained

BUDGETS = [Budget(size="0.5x"), Budget(size="0.25x"), Budget(size="0.12x", macs="0.7x")]


@pytest.fixture(scope="module")
def model():
    return trained(seed=3)


@pytest.fixture(scope="module")
def results(model):
    with pytest.MonkeyPatch.context() as patch:
        shorten_measurements(patch.setattr)
        return front(model, tiny_task(), budgets=BUDGETS, recovery=STEPS, nested=True, seconds=0.02)


def test_every_budget_is_met_by_its_own_result(results):
    assert [result.budget for result in results] == BUDGETS
    assert all(result.met for result in results)
    sizes = [result.after.bytes for result in results]
    assert sizes == sorted(sizes, reverse=True)


def test_nested_plans_only_ever_add(results):
    for looser, tighter in itertools.pairwise(results):
        assert all(tighter.plan.picks[name] >= option for name, option in looser.plan.picks.items())


def test_each_report_shows_the_whole_front(results):
    for result in results:
        labels = {point.label for point in result.document().front}
        others = [r.front_point.label for r in results if r is not result]
        assert set(others) <= labels
    assert results[2].front_point.label == "size 0.12x, macs 0.7x"


def test_every_result_is_an_artifact_of_its_own(model, results, tmp_path):
    for number, result in enumerate(results):
        loaded = load(result.save(tmp_path / str(number)), model)
        assert same(state(loaded), state(result.model))


def test_plans_that_are_not_nested_keep_their_budgets_too(model, quick):
    found = front(model, tiny_task(), budgets=BUDGETS[:2], recovery=STEPS, seconds=0.02)
    assert all(result.met for result in found)


@pytest.mark.parametrize("budgets", [[], [Budget(size="0.5x"), Budget(max_drop="1%")]])
def test_budgets_must_limit_a_cost(model, budgets):
    with pytest.raises(ValueError, match="budgets that each limit a cost, got"):
        front(model, tiny_task(), budgets=budgets)


def test_an_impossible_budget_names_the_nearest_plan(model, quick):
    with pytest.raises(InfeasibleError, match="size"):
        front(model, tiny_task(), budgets=[Budget(size="0.001x")], recovery=STEPS, nested=True, seconds=0.02)
