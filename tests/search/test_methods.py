"""The rules of evolution replayed by plain loops; determinism; the report and the folder of a search."""

from __future__ import annotations

import math
import random

import pytest

from eke import search
from eke.search.limits import Limits
from eke.search.proposals import fused
from eke.search.run import METHODS
from eke.search.spaces import SPACES, MobileNet, NasBench201

SMALL = NasBench201(resolution=8, channels=4, cells=1)


def proposal(seed, number):
    return random.Random(seed * 1_000_000_007 + number)


def steady_state(space, value, limit, evaluations, population, seed):
    """The published loop with the generators of this package's proposals, and no network scored twice."""
    members, scored, number = [], {}, 0
    while len(scored) < evaluations:
        while len(members) > population:
            worst = min(range(len(members)), key=lambda place: value(members[place]))
            del members[worst]
        number += 1
        rng = proposal(seed, number)
        if len(members) <= 10:
            child = space.mutate(space.start, rng, changes=1)
        else:
            child = space.mutate(rng.choice(members), rng, changes=2)
        if child in scored or sum(b.layers for b in child.blocks) > space.max_layers or space.flops(child) > limit:
            continue
        members.append(child)
        scored[child] = value(child)
    return list(scored)


def test_evolution_is_the_published_loop():
    space = MobileNet(resolution=32, classes=10)
    limit = 1.5 * space.flops(space.start)
    found = search.evolve(
        space, space.log_numel, Limits(flops=limit), evaluations=60,
        method=search.Evolution(population=20, start=space.start), seed=3,
    )  # fmt: skip
    expected = steady_state(space, space.log_numel, limit, 60, 20, 3)
    assert [trial.architecture for trial in found.trials] == expected


def aging(space, value, evaluations, population, sample, seed):
    """Regularized evolution as its paper has it."""
    members, scored, number = [], {}, 0
    while len(scored) < evaluations:
        number += 1
        rng = proposal(seed, number)
        if len(members) < population:
            child = space.sample(rng)
        else:
            rivals = rng.sample(members, sample)
            child = space.mutate(max(rivals, key=value), rng, changes=1)
        if child in scored or not space.connected(child):
            continue
        scored[child] = value(child)
        members.append(child)
        members = members[-population:]
    return list(scored)


def test_regularized_evolution_is_the_published_loop():
    found = search.evolve(
        SMALL, SMALL.log_numel, evaluations=60, method=search.RegularizedEvolution(population=15, sample=5), seed=2
    )
    assert [t.architecture for t in found.trials] == aging(SMALL, SMALL.log_numel, 60, 15, 5, 2)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_seeds_decide_everything(name):
    def run(seed):
        found = search.evolve(SMALL, SMALL.log_numel, evaluations=15, method=METHODS[name](), seed=seed)
        return [trial.architecture for trial in found.trials]

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_space_can_be_searched_by_every_method(name):
    space = SPACES[name](classes=3, resolution=32)
    rng = random.Random(0)
    limit = sorted(space.flops(space.sample(rng)) for _ in range(9))[4]
    for method in METHODS.values():
        found = search.evolve(
            space, lambda a, space=space: -space.parameters(a), Limits(flops=limit), evaluations=5, method=method()
        )
        assert all(trial.costs["flops"] <= limit for trial in found.trials)
        assert found.best.values["score"] == max(-trial.costs["parameters"] for trial in found.trials)


def test_one_score_is_itself_and_several_are_fused():
    one = [search.Trial(n, {"score": value}, {}) for n, value in enumerate((2.0, math.nan, 1.0))]
    assert fused(one) == [2.0, -math.inf, 1.0]
    two = [search.Trial(n, {"a": float(n), "b": float(-n)}, {}) for n in range(3)]
    assert fused(two) == pytest.approx(list(search.fuse({"a": [0.0, 1, 2], "b": [0.0, -1, -2]})))
    missing = [search.Trial(0, {"a": 1.0, "b": 1.0}, {}), search.Trial(1, {"a": 1.0}, {})]
    assert fused(missing)[0] > fused(missing)[1]


def test_limits_say_how_far_they_are_exceeded():
    limits = Limits(flops=100, parameters=10)
    assert limits.excess({"flops": 100, "parameters": 10}) == 0
    assert limits.excess({"flops": 150, "parameters": 20}) == pytest.approx(1.5)
    assert limits.excess({"flops": 50}) == 0
    assert limits.told({"flops": 150, "parameters": 20}) == "150 FLOPs (limit 100), 20 parameters (limit 10)"
    assert limits.limited == {"flops": 100, "parameters": 10}
    assert Limits().limited == {}


def test_nothing_is_built_unless_something_is_measured(monkeypatch):
    def refuse(*_):
        raise AssertionError("a network was built")

    monkeypatch.setattr(NasBench201, "decode", refuse)
    found = search.evolve(SMALL, SMALL.log_numel, Limits(flops=SMALL.flops("dddaaa"), parameters=1e5), evaluations=50)
    assert len(found.trials) == 50


def test_log_holds_every_trial_when_the_next_begins(tmp_path):
    path, seen = tmp_path / "log", []

    def objective(ops):
        seen.append(len(path.read_text().splitlines()) if path.exists() else 0)
        return SMALL.log_numel(ops)

    search.evolve(SMALL, objective, evaluations=6, log=path)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_error_of_an_objective_is_the_users_to_see(tmp_path):
    def objective(ops):
        raise RuntimeError(f"cannot score {ops}")

    with pytest.raises(RuntimeError, match="cannot score"):
        search.evolve(SMALL, objective, evaluations=3, log=tmp_path / "log")
    found = search.evolve(SMALL, SMALL.log_numel, evaluations=3, log=tmp_path / "log")
    assert len(found.trials) == 3


def test_ranking_orders_all_trials():
    found = search.evolve(SMALL, SMALL.log_numel, evaluations=12)
    scores = [found.trials[place].values["score"] for place in found.ranking]
    assert scores == sorted(scores, reverse=True)
    assert found.settings["method"] == "Evolution"
    assert found.settings["evaluations"] == 12
    assert found.note == ""
