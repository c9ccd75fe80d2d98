"""Recipes: what is read is what was written, and what cannot be meant is refused by name."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import yaml

from eke.cli import compress as verb
from eke.cli import recipe as recipes
from eke.cli.recipe import Recipe
from eke.cli.session import UsageError
from eke.compression import Budget, Recovery

FULL = Recipe(
    model="my model.py:build",
    data="data.py:loaders",
    budget={"max_drop": "1%", "latency": "0.5x", "peak_memory": "64MB"},
    recovery={"steps": 3, "warmup": 0.5},
    seed=4,
    threads=2,
    seconds=0.5,
    skip=("stem", "blocks.0"),
)
DEMO = Recipe(task="demo", budget={"size": "1/12x"})


def test_keys_are_those_of_budget_and_recovery():
    assert [f.name for f in dataclasses.fields(Budget)] == list(recipes.BUDGET)
    numbers = [f.name for f in dataclasses.fields(Recovery) if not callable(getattr(Recovery(), f.name))]
    assert sorted(numbers) == sorted(recipes.RECOVERY)


@pytest.mark.parametrize("recipe", [FULL, DEMO, Recipe()])
def test_yaml_round_trip(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_json()))
    assert recipes.build(recipes.read(path), where="it") == recipe
    assert recipes.read(tmp_path) == recipe.to_json()


@pytest.mark.parametrize("recipe", [FULL, DEMO])
def test_command_round_trip(recipe, eke, monkeypatch):
    seen = []

    def stop(wanted, folder, *, resume, base):
        seen.append((wanted, str(folder), resume))
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_run", stop)
    line = recipes.command(recipe, "some folder", resume=True)
    told = eke(*shlex.split(line)[1:], code=130).stderr
    assert seen == [(recipe, "some folder", True)]
    assert told == f"nothing to continue in some folder: starting\ninterrupted; continue with: {line}\n"


def test_settings_change_one_entry_and_flags_have_the_last_word(eke, monkeypatch, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(FULL.to_json()))
    seen = []

    def stop(wanted, folder, *, resume, base):
        seen.append(wanted)
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_run", stop)
    words = ["--set", "budget.latency=0.4x", "--set", "skip=[head]", "--set", "seed=9", "--seed", "7", "--size", "0.3x"]
    eke("compress", "--recipe", tmp_path / "r.yaml", *words, "--out", tmp_path / "new", code=130)
    budget = {"max_drop": "1%", "latency": "0.4x", "peak_memory": "64MB", "size": "0.3x"}
    assert seen == [dataclasses.replace(FULL, budget=budget, skip=("head",), seed=7)]


def test_null_takes_a_limit_away():
    changed = recipes.assigned(FULL.to_json(), ["budget.latency=null"])
    assert set(recipes.build(changed, where="it").budget) == {"max_drop", "peak_memory"}


def test_another_model_takes_the_place_of_a_task():
    changed = DEMO.with_source("a.py:b", data="c.py:d", task=None)
    assert (changed.model, changed.data, changed.task) == ("a.py:b", "c.py:d", None)
    assert FULL.with_source(None, data=None, task="demo").model is None


def test_what_an_artifact_from_python_holds_is_no_error(tmp_path):
    assert recipes.of_folder(tmp_path) == Recipe()
    (tmp_path / "recipe.yaml").write_text("{model: a.py:b, mine: 3, threads: 1}")
    assert recipes.of_folder(tmp_path) == Recipe(model="a.py:b", threads=1)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"modle": "a"}, r"it has an unknown key 'modle'\. Did you mean 'model'\?"),
        ({"budget": {"latancy": 1}}, r"it: budget has an unknown key 'latancy'\. Did you mean 'latency'\?"),
        ({"recovery": {"step": 1}}, r"recovery has an unknown key 'step'\. Did you mean 'steps'\?"),
        ({"budget": 3}, "budget must hold keys and values, got 3"),
        ({"budget": {"size": [1]}}, r"it: budget.size must be text or a whole number or a number, got \[1\]"),
        ({"seed": "a"}, "it: seed must be a whole number, got 'a'"),
        ({"threads": True}, "it: threads must be a whole number or null, got True"),
        ({"skip": "a"}, "it: skip must be a list of names, got 'a'"),
        ({"model": 3}, "it: model must be text or null, got 3"),
        ({"task": "dem"}, r"There is no task 'dem'\. Did you mean 'demo'\?"),
        ({"task": "demo", "model": "a.py:b"}, "--task demo brings its own model and data, got 'a.py:b' beside it"),
        ([1], r"it must hold keys and values, got list \[1\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(document, message):
    with pytest.raises(UsageError, match=message):
        recipes.build(document, where="it")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("budget.latancy=1", r"--set has an unknown key 'budget.latancy'\. Did you mean 'budget.latency'\?"),
        ("budget=1", "--set has an unknown key 'budget'"),
        ("seed", "--set needs KEY=VALUE, such as --set budget.latency=0.4x, got 'seed'"),
        ("seed=[", r"--set seed: the value '\[' could not be read"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        recipes.assigned({}, [setting])


def test_a_file_that_is_not_there_or_no_yaml_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no recipe at"):
        recipes.read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="is not valid YAML"):
        recipes.read(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("recovery.learning_rate=1e-3", 1e-3), ("recovery.learning_rate='0.5'", 0.5), ("recovery.steps=1e2", 100)],
)
def test_numbers_that_yaml_reads_as_text_are_numbers(setting, value):
    found = recipes.build(recipes.assigned({}, [setting]), where="it").recovery
    assert list(found.values()) == [value]
    assert type(next(iter(found.values()))) is type(value)


@pytest.mark.parametrize("text", ["fast", "nan", "1e999"])
def test_other_text_is_no_number(text):
    with pytest.raises(UsageError, match=f"it: recovery.steps must be a whole number or a number, got '{text}'"):
        recipes.build(recipes.assigned({}, [f"recovery.steps={text}"]), where="it")


def test_a_recipe_must_be_a_mapping(eke, tmp_path):
    (tmp_path / "r.yaml").write_text("foo")
    told = eke("compress", "--recipe", tmp_path / "r.yaml", "--size", "0.5x", "--out", tmp_path / "r", code=2).stderr
    assert told == f"error: {tmp_path}/r.yaml must be a mapping (lines of 'key: value'), got str 'foo'.\n"
    with pytest.raises(UsageError, match=r"The recipe: budget must be a mapping .*, got str 'foo'"):
        recipes.assigned({"budget": "foo"}, ["budget.size=0.5x"])
