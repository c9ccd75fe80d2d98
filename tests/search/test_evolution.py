"""Searches: limits kept, the best found, exactly the same after an interruption, winners that load again."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from eke import cost, search
from eke.search import proposals as module
from eke.search.spaces import NB201, Choices, MobileNet, NasBench201

SMALL = NasBench201(resolution=8, channels=4, cells=1)
BUDGET = search.Limits(flops=SMALL.flops("dddaaa"))


def brute(space, value, budget):
    every = ["".join("abcde"[(n // 5**k) % 5] for k in range(6)) for n in range(5**6)]
    fits = [ops for ops in every if space.flops(ops) <= budget.flops and space.connected(ops)]
    return max(value(ops) for ops in fits)


@pytest.mark.parametrize(
    "method",
    [lambda: search.Evolution(population=30), lambda: search.RegularizedEvolution(20, 5), search.RandomSearch],
    ids=["evolution", "regularized", "random"],
)
def test_limits_are_kept_nothing_is_scored_twice_and_scores_rise(method):
    found = search.evolve(SMALL, SMALL.log_numel, BUDGET, evaluations=300, method=method())
    assert len({trial.architecture for trial in found.trials}) == 300
    assert all(trial.costs["flops"] <= BUDGET.flops for trial in found.trials)
    assert all(SMALL.connected(trial.architecture) for trial in found.trials)
    first = np.mean([trial.values["score"] for trial in found.trials[:50]])
    assert found.best.values["score"] > first
    assert found.best.values["score"] == max(trial.values["score"] for trial in found.trials)


def test_evolution_finds_the_optimum_of_the_whole_table():
    found = search.evolve(SMALL, SMALL.log_numel, BUDGET, evaluations=1000, method=search.Evolution(population=40))
    assert found.best.values["score"] == pytest.approx(brute(SMALL, SMALL.log_numel, BUDGET))


def test_evolution_keeps_the_best_and_regularized_the_youngest():
    evolution, regularized = search.Evolution(population=3), search.RegularizedEvolution(population=3, sample=2)
    for n, value in enumerate((5.0, 1.0, 4.0, 2.0, 3.0)):
        for method in (evolution, regularized):
            method.tell(search.Trial(f"a{n}", {"score": value}, {}))
    assert sorted(t.values["score"] for t in evolution.members) == [3.0, 4.0, 5.0]
    assert [t.values["score"] for t in regularized.members] == [4.0, 2.0, 3.0]


def test_first_proposals_mutate_the_start_and_later_ones_members():
    space, start = MobileNet(), MobileNet().start
    method = search.Evolution(start=start)
    rng = random.Random(0)
    for _ in range(30):
        child = method.propose(space, rng)
        assert sum(a != b for a, b in zip(start.blocks, child.blocks)) + (child.stem != start.stem) <= 1
    for n in range(11):
        method.tell(search.Trial(space.smallest, {"score": n}, {}))
    assert method.propose(space, rng).blocks[0].stride == 2
    assert all(method.propose(space, rng) != start for _ in range(20))


def test_several_scores_are_fused_over_what_is_compared():
    def objective(ops):
        return {"size": SMALL.log_numel(ops), "cheap": -SMALL.flops(ops)}

    found = search.evolve(SMALL, objective, BUDGET, evaluations=80, method=search.Evolution(population=20))
    expected = search.fuse({
        "size": [t.values["size"] for t in found.trials],
        "cheap": [t.values["cheap"] for t in found.trials],
    })
    assert found.best is found.trials[int(np.argmax(expected))]


def test_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path):
    def run(log, evaluations, objective=SMALL.log_numel):
        return search.evolve(SMALL, objective, BUDGET, evaluations=evaluations, method=search.Evolution(20), log=log)

    whole = run(tmp_path / "whole", 60)
    calls = 0

    def dies(ops):
        nonlocal calls
        calls += 1
        if calls > 37:
            raise KeyboardInterrupt
        return SMALL.log_numel(ops)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "log", 60, dies)
    with (tmp_path / "log").open("a") as file:
        file.write('{"architecture": "ddd')  # a line that a kill cut short
    parts = run(tmp_path / "log", 60)
    assert [t.architecture for t in parts.trials] == [t.architecture for t in whole.trials]
    assert [t.proposals for t in parts.trials] == [t.proposals for t in whole.trials]
    assert len((tmp_path / "log").read_text().splitlines()) == 61
    with pytest.raises(ValueError, match="is the log of another search"):
        search.evolve(SMALL, SMALL.log_numel, evaluations=60, log=tmp_path / "log")


def test_log_goes_on_with_the_same_proxies_method_and_weights_only(tmp_path):
    def run(proxies=("params", "log_numel"), population=20, weights=0):
        scorer = search.Scorer(SMALL, (), proxies, weights)
        method = search.Evolution(population)
        return search.evolve(SMALL, scorer, evaluations=3, method=method, log=tmp_path / "log")

    first = run()
    assert [t.architecture for t in run().trials] == [t.architecture for t in first.trials]
    for other in ({"proxies": ("params",)}, {"population": 30}, {"weights": 1}):
        with pytest.raises(ValueError, match="is the log of another search"):
            run(**other)


def test_file_that_is_no_log_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"another search, or none: it has mine.*Give another file"):
        search.evolve(SMALL, SMALL.log_numel, evaluations=1, log=path)
    assert path.read_text() == "mine"


def test_scores_that_are_not_finite_survive_the_log(tmp_path):
    def objective(ops):
        return math.nan if ops[0] == "a" else -math.inf if ops[0] == "b" else SMALL.log_numel(ops)

    for evaluations in (30, 40):
        found = search.evolve(
            SMALL, objective, evaluations=evaluations, method=search.RandomSearch(), log=tmp_path / "log"
        )
    assert found.best.architecture[0] not in "ab"
    assert any(math.isnan(t.values["score"]) for t in found.trials)
    assert found.front()


def test_ask_and_tell_by_hand():
    hand = search.Search(SMALL, BUDGET, seed=3)
    for _ in range(20):
        ops = hand.ask()
        hand.tell(ops, SMALL.log_numel(ops))
    whole = search.evolve(SMALL, SMALL.log_numel, BUDGET, evaluations=20, seed=3)
    assert [t.architecture for t in hand.trials] == [t.architecture for t in whole.trials]
    with pytest.raises(ValueError, match=r"tell\(\) takes what ask\(\) returned, got 'dddddd'"):
        hand.tell("dddddd", 1.0)


def test_small_spaces_end_when_nothing_is_new(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 200)
    space = tiny()
    found = search.evolve(space, lambda a: float(a[0]), evaluations=50, method=search.RandomSearch())
    assert len(found.trials) == 4
    assert "200 proposals in a row found nothing new after 4 trials" in found.note


def tiny():
    def build(width, depth):
        return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])

    return Choices(
        {"width": (8, 16), "depth": (1, 2)}, lambda width, depth: grown(build, width, depth), torch.zeros(1, 4)
    )


def grown(build, width, depth):
    return nn.Sequential(nn.Linear(4, width), build(width, depth), nn.Linear(width, 2))


def test_latency_and_memory_are_measured_where_they_are_limited():
    space = tiny()
    memory = {a: cost.peak_memory(space.decode(a), space.example()) for a in ((8, 1), (8, 2), (16, 1), (16, 2))}
    limit = sorted(memory.values())[1]
    found = search.evolve(
        space, lambda a: float(sum(a)), search.Limits(memory_bytes=limit, latency_seconds=30.0), evaluations=2,
        method=search.RandomSearch(),
    )  # fmt: skip
    assert {t.architecture for t in found.trials} == {a for a, needed in memory.items() if needed <= limit}
    assert all(t.costs["memory_bytes"] == memory[t.architecture] for t in found.trials)
    assert all(0 < t.costs["latency_seconds"] < 30 for t in found.trials)
    assert found.front("memory_bytes", "latency_seconds")


def test_global_random_numbers_stay_as_they_are(tmp_path, monkeypatch):
    def refuse(seed):
        raise AssertionError(f"seed {seed} would stay behind on devices that are not in use")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.get_rng_state()
    space = tiny()
    scorer = search.Scorer(space, [torch.zeros(2, 4)], ("params", "logsynflow"))
    found = search.evolve(space, scorer, search.Limits(latency_seconds=30.0, memory_bytes=1e9), evaluations=3)
    found.save(tmp_path)
    search.load(tmp_path, space=space)
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_limits_name_the_nearest(monkeypatch):
    with pytest.raises(ValueError, match=r"at most 100 FLOPs: the smallest, aaabaa, has \d+.*Raise the limit to that"):
        search.evolve(SMALL, SMALL.log_numel, search.Limits(flops=100))
    monkeypatch.setattr(module, "PATIENCE", 100)
    with pytest.raises(ValueError, match=r"None of 100 architectures.*nearest, .* has \d+ parameters \(limit 10\)"):
        search.evolve(SMALL, SMALL.log_numel, search.Limits(parameters=10))
    with pytest.raises(ValueError, match=r"Limits must be positive, got .*'flops': -1"):
        search.Limits(flops=-1)
    with pytest.raises(ValueError, match="evaluations >= 1, got 0"):
        search.evolve(SMALL, SMALL.log_numel, evaluations=0)


def test_tight_limits_start_from_the_smallest():
    space = MobileNet(resolution=32, classes=10)
    limit = 1.1 * space.flops(space.smallest)
    found = search.evolve(space, space.log_numel, search.Limits(flops=limit), evaluations=15)
    assert all(t.costs["flops"] <= limit for t in found.trials)


def test_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for dimensions in (1, 2, 3):
        points = rng.integers(0, 6, (80, dimensions)).astype(float)
        expected = [i for i, p in enumerate(points) if not any((q >= p).all() and (q > p).any() for q in points)]
        assert search.pareto(points) == expected
    with pytest.raises(ValueError, match=r"numbers \(points, objectives\), got \(1, 1\) with 1 NaN"):
        search.pareto([[math.nan]])


def test_front_of_a_search():
    found = search.evolve(SMALL, SMALL.log_numel, evaluations=60, method=search.RandomSearch())
    front = found.front()
    pairs = [(t.costs["flops"], t.values["score"]) for t in front]
    assert pairs == sorted(set(pairs))
    assert [score for _, score in pairs] == sorted(score for _, score in pairs)
    assert pairs[-1][1] == found.best.values["score"]
    with pytest.raises(ValueError, match=r"not known of every trial: \['memory_bytes'\]; known are \['flops'"):
        found.front("memory_bytes")


def test_winner_is_saved_with_its_recipe_and_loads_again(tmp_path):
    found = search.evolve(SMALL, SMALL.log_numel, BUDGET, evaluations=20, seed=5)
    found.save(tmp_path / "winner", seed=7)
    model = search.load(tmp_path / "winner")
    again = found.model(seed=7)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    recipe = (tmp_path / "winner" / "recipe.yaml").read_text()
    assert "seed: 5" in recipe
    assert "training:" in recipe
    assert len((tmp_path / "winner" / "trials.jsonl").read_text().splitlines()) == 20
    data = json.loads((tmp_path / "winner" / "architecture.json").read_text())
    assert data["architecture"] == found.best.architecture
    with pytest.raises(FileNotFoundError, match=r"no architecture.json in"):
        search.load(tmp_path)


def test_winner_of_an_own_space_needs_the_space(tmp_path):
    space = tiny()
    search.evolve(space, lambda a: float(a[0]), evaluations=3, method=search.RandomSearch()).save(tmp_path)
    with pytest.raises(ValueError, match="space 'choices' is not one of nb201, mobile"):
        search.load(tmp_path)
    assert isinstance(search.load(tmp_path, space=space), nn.Sequential)


def test_scorer_takes_closed_forms_and_builds_the_rest():
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 3, 8, 8, generator=g), torch.arange(4)) for _ in range(2)]
    scorer = search.Scorer.of(SMALL, iter(data), proxies=("zico", "log_numel", "params", "flops"))
    values = scorer("dcbdec")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SMALL.decode("dcbdec")
    assert values["zico"] == search.zico(model, data)
    assert values["params"] == SMALL.parameters("dcbdec")
    assert values["log_numel"] == SMALL.log_numel("dcbdec")
    found = search.evolve(SMALL, scorer, BUDGET, evaluations=6)
    assert set(found.best.values) == {"zico", "log_numel", "params", "flops"}


def test_progress_is_told():
    told = []
    search.evolve(NB201, NB201.log_numel, evaluations=3, progress=lambda *state: told.append(state))
    assert [share for _, share, _ in told] == pytest.approx([1 / 3, 2 / 3, 1])
