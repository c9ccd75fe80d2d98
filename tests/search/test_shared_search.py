"""Searches in a shared storage: several processes, kills, other searches, storages that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("optuna")

from eke import search
from eke.search.spaces import MobileNet, NasBench201, TimmResNet, TimmViT

SMALL = NasBench201(resolution=8, channels=4, cells=1)
BUDGET = search.Limits(flops=SMALL.flops("dddaaa"))


@pytest.mark.parametrize("kind", ["journal:{}/search.log", "sqlite:///{}/search.db"])
def test_search_is_kept_and_goes_on(tmp_path, kind):
    url = kind.format(tmp_path)
    first = search.share(SMALL, SMALL.log_numel, BUDGET, storage=url, evaluations=3, population=2, seed=0)
    again = search.share(SMALL, SMALL.log_numel, BUDGET, storage=url, evaluations=5, population=2, seed=1)
    assert len(first.trials) == 3
    assert [t.architecture for t in again.trials[:3]] == [t.architecture for t in first.trials]
    assert len({t.architecture for t in again.trials}) == len(again.trials) == 5
    assert all(t.costs["flops"] <= BUDGET.flops and SMALL.connected(t.architecture) for t in again.trials)
    assert all(t.values["score"] == SMALL.log_numel(t.architecture) for t in again.trials)


@pytest.mark.parametrize("space", [MobileNet(resolution=32), TimmResNet(resolution=32), TimmViT(resolution=32)])
def test_spaces_whose_settings_are_tuples_go_on(tmp_path, space):
    url = f"journal:{tmp_path}/log"
    for evaluations in (1, 2):
        found = search.share(space, space.parameters, storage=url, evaluations=evaluations, seed=evaluations)
        assert len(found.trials) == evaluations


def test_front_improves_with_generations(tmp_path):
    found = search.share(
        SMALL, SMALL.log_numel, storage=f"journal:{tmp_path}/log", evaluations=45, population=8, seed=0
    )
    best = [max(t.values["score"] / t.costs["flops"] for t in part) for part in (found.trials[:8], found.trials)]
    assert best[1] > best[0]
    assert found.best.values["score"] > max(t.values["score"] for t in found.trials[:8])


def test_several_scores_and_costs(tmp_path):
    def objective(ops):
        return {"size": SMALL.log_numel(ops), "edges": -float(ops.count("d"))}

    found = search.share(
        SMALL, objective, storage=f"journal:{tmp_path}/log", evaluations=5, scores=("size", "edges"),
        costs=("parameters", "memory_bytes"), seed=0,
    )  # fmt: skip
    assert all(set(t.values) == {"size", "edges"} and t.costs["memory_bytes"] > 0 for t in found.trials)
    assert found.front("parameters", "memory_bytes")


def test_trial_of_a_dead_process_is_queued_again(tmp_path):
    import optuna

    url = f"journal:{tmp_path}/log"
    search.share(SMALL, SMALL.log_numel, storage=url, evaluations=2, seed=0)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(f"{tmp_path}/log"))
    study = optuna.load_study(study_name="eke", storage=storage)
    trial = study.ask()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    trial.set_user_attr("worker", f"{os.uname().nodename}:{dead.pid}")
    ops = SMALL.compose(lambda name, options: trial.suggest_categorical(name, list(options)))
    found = search.share(SMALL, SMALL.log_numel, storage=url, evaluations=8, seed=1)
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    assert ops in {t.architecture for t in found.trials} or not SMALL.connected(ops)


def test_what_cannot_be_is_named(tmp_path):
    url = f"journal:{tmp_path}/log"
    with pytest.raises(ConnectionError, match=r"'journal:/nowhere/log' cannot be reached: there is no folder /nowhere"):
        search.share(SMALL, SMALL.log_numel, storage="journal:/nowhere/log")
    with pytest.raises(ConnectionError, match=r"cannot be reached: 'search.db' is no URL such as journal:FILE"):
        search.share(SMALL, SMALL.log_numel, storage="search.db")
    with pytest.raises(ConnectionError, match=r"'sqlite:////nowhere/a.db' cannot be reached: .*a file needs no server"):
        search.share(SMALL, SMALL.log_numel, storage="sqlite:////nowhere/a.db")
    with pytest.raises(ValueError, match=r"Costs are flops, .*got \['joules'\]"):
        search.share(SMALL, SMALL.log_numel, storage=url, costs=("joules",))
    if importlib.util.find_spec("psycopg") is None:
        with pytest.raises(ConnectionError, match=r"'postgresql' needs the driver .* pip install 'psycopg\[binary\]'"):
            search.share(SMALL, SMALL.log_numel, storage="postgresql://somebody:secret@localhost/eke")
    with pytest.raises(ValueError, match="evaluations >= 1, got 0"):
        search.share(SMALL, SMALL.log_numel, storage=url, evaluations=0)
    scorer = search.Scorer(SMALL, (), ("params", "flops"))
    with pytest.raises(ValueError, match=r"returns the scores \['params', 'flops'\], .* scores=\('params', 'flops'\)"):
        search.share(SMALL, scorer, storage=url, study="unnamed", evaluations=1)
    search.share(SMALL, SMALL.log_numel, storage=url, evaluations=1)
    with pytest.raises(ValueError, match=r"now asked is .*Give another name"):
        search.share(SMALL, SMALL.log_numel, BUDGET, storage=url, evaluations=1)
    with pytest.raises(
        ValueError, match=r"None of 5 architectures of 'nb201' keeps the limits; the nearest, [a-e]{6}, has"
    ):
        search.share(
            SMALL, SMALL.log_numel, search.Limits(parameters=9), storage=url, study="tight", evaluations=1, patience=5
        )


WORKER = """
import sys, time
from eke import search
from eke.search.spaces import NasBench201
space = NasBench201(resolution=8, channels=4, cells=1)
def objective(ops):
    time.sleep(0.05)
    return space.log_numel(ops)
search.share(space, objective, storage=sys.argv[1], evaluations=int(sys.argv[2]), population=10)
"""


@pytest.mark.slow
def test_four_processes_share_a_search_and_one_is_killed(tmp_path):
    import optuna

    path = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, f"journal:{path}", "80"], env=environment) for _ in range(4)
    ]
    try:
        deadline = time.time() + 100
        while time.time() < deadline and not (path.exists() and path.read_text().count('"values"') >= 20):
            time.sleep(0.1)
        victim = workers[0]
        # it dies while it scores: one of its trials is running
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        before = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        codes = [worker.wait(timeout=100) for worker in workers[1:]]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0, 0]
    assert victim.returncode == -signal.SIGKILL
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="eke", storage=storage)
    kept = [t for t in study.get_trials() if t.state.name == "COMPLETE" and "values" in t.user_attrs.get("found", {})]
    assert len(kept) >= 80
    assert not [t for t in study.get_trials() if t.state.name == "RUNNING"]
    assert [json.loads(line) for line in path.read_text().splitlines()][: len(before)] == before
    assert len({t.user_attrs["worker"] for t in kept}) == 4
    for trial in kept:
        ops = SMALL.compose(lambda name, _, made=trial.params: made[name])
        assert float(trial.user_attrs["found"]["values"]["score"]) == SMALL.log_numel(ops)
