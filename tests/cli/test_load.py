"""Models and data from files: what fits is loaded, what does not is told with what to do."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from eke import demo
from eke.cli import load
from eke.cli.recipe import Recipe
from eke.cli.session import MARK, UsageError
from eke.compression import Task, accuracy


@pytest.fixture
def here(files, monkeypatch):
    monkeypatch.chdir(files)
    return files


def test_a_model_and_a_task_are_loaded(here):
    assert isinstance(load.load_model(Recipe(model="cli_tiny_model.py:build")), nn.Sequential)
    assert isinstance(load.load_task(Recipe(data="cli_tiny_data.py:task")), Task)


def test_a_dictionary_becomes_a_task(here):
    task = load.load_task(Recipe(data="cli_tiny_data.py:splits"))
    assert (len(task.calibration), len(task.report), task.score) == (2, 4, accuracy)
    assert load.load_task(Recipe(data="cli_tiny_data.py:scored")).score.__name__ == "negative_loss"


def test_a_model_and_data_may_stand_in_a_file_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_as_is.py").write_text(
        "import eke, torch\nmodel = torch.nn.Linear(2, 2)\ntask = eke.Task([1], [2], [3])\n"
        "splits = {'calibration': [1], 'selection': [2], 'report': [3]}\n"
    )
    model = load.load_model(Recipe(model="cli_as_is.py:model"))
    original = sys.modules["cli_as_is"].model
    assert model is not original
    assert torch.equal(model.weight, original.weight)
    for name in ("task", "splits"):
        assert load.load_task(Recipe(data=f"cli_as_is.py:{name}")).report == [3]


def test_files_that_import_one_another_meet_the_same_module(here):
    load.call(load.resolve("cli_tiny_data.py:splits"))
    load.call(load.resolve("cli_tiny_model.py:build"))
    assert sys.modules["cli_tiny_data"].build is sys.modules["cli_tiny_model"].build
    assert MARK in vars(sys.modules["cli_tiny_model"])


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cli_same.py").write_text(f"def value():\n    return {number}\n")
    assert [load.call(f"{tmp_path / str(number)}/cli_same.py:value") for number in (1, 2, 1)] == [1, 2, 1]


def test_a_file_named_like_a_known_module_does_not_take_its_place(tmp_path):
    (tmp_path / "json.py").write_text("def value():\n    return 5\n")
    before = sys.modules["json"]
    assert load.call(f"{tmp_path}/json.py:value") == 5
    assert sys.modules["json"] is before
    sys.path.remove(str(tmp_path))


def test_a_recipe_finds_its_files_from_its_own_folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(model="cli_tiny_model.py:build")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'cli_tiny_model.py' \(looked in"):
        load.load_model(recipe)
    for folder in (files, files / "finished"):
        assert isinstance(load.load_model(recipe, folder=folder), nn.Module)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (Recipe(), UsageError, "No model was given, got None: write FILE.py:FUNCTION"),
        (Recipe(model="cli_tiny_modle.py:build"), FileNotFoundError, r"Did you mean 'cli_tiny_model.py'\?"),
        (Recipe(model="cli_tiny_model.py:biuld"), UsageError, r"has no function 'biuld'\. Did you mean 'build'\?"),
        (Recipe(model="cli_tiny_model.py:weights"), UsageError, "has int, not a function, 'weights'"),
        (Recipe(model="cli_tiny_model.py"), UsageError, "Write FILE.py:FUNCTION, such as my_model.py:build"),
        (Recipe(model="cli_tiny_model.py:number"), TypeError, "must return a torch.nn.Module, got int"),
        (Recipe(model="cli_tiny_model.py:needs"), TypeError, "called without arguments, but it needs some: .*'width'"),
    ],
)
def test_models_that_cannot_be_loaded(here, recipe, error, message):
    with pytest.raises(error, match=message):
        load.load_model(recipe)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, UsageError, "No data were given, got None: add --data FILE.py:FUNCTION"),
        ("timm:mnist", UsageError, "--data needs FILE.py:FUNCTION, got 'timm:mnist'"),
        ("torchvision:mnist", UsageError, "--data needs FILE.py:FUNCTION, got 'torchvision:mnist'"),
        ("cli_tiny_data.py:misspelt", UsageError, r"unknown key 'sellection'\. Did you mean 'selection'\?"),
        ("cli_tiny_data.py:two", ValueError, "returned no report: all of calibration, selection, report are needed"),
        ("cli_tiny_data.py:iterator", ValueError, "report is an iterator .list_iterator. that is used up after one"),
        ("cli_tiny_data.py:number", TypeError, "must return an eke.Task or a dictionary with calibration.*got int"),
    ],
)
def test_data_that_cannot_be_loaded(here, data, error, message):
    with pytest.raises(error, match=message):
        load.load_task(Recipe(data=data))


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_text("")
    with pytest.raises(UsageError, match=r"net.onnx is not a Python file: its name must end in .py"):
        load.call(f"{tmp_path}/net.onnx:build")


def test_a_folder_of_a_recipe_is_found_from_its_place(tmp_path):
    (tmp_path / "nets" / "tiny").mkdir(parents=True)
    (tmp_path / "nets" / "tiny" / "config.json").write_text("{}")
    assert load.resolve("hf:nets/tiny:none", (tmp_path,)) == f"hf:{tmp_path}/nets/tiny:none"
    assert load.resolve("hf:some/name", (tmp_path,)) == "hf:some/name"
    assert load.resolve("timm:resnet18", (tmp_path,)) == "timm:resnet18"


def test_an_exported_program_is_for_looking_only(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"")
    with pytest.raises(UsageError, match=r"net\.pt2 is an exported program: .*Give what it was exported from"):
        load.load_model(Recipe(model=f"{tmp_path}/net.pt2"))
    with pytest.raises(FileNotFoundError, match=r"There is no file 'other\.pt2'"):
        load.load_model(Recipe(model="other.pt2"))


def test_a_task_brings_the_network_and_data_of_its_witness(monkeypatch):
    network, data = nn.Linear(1, 1), Task([], [], [])
    monkeypatch.setitem(demo.WITNESSES, "crepe", demo.Witness(lambda: network, lambda: data))
    assert load.load_model(Recipe(task="crepe")) is network
    assert load.load_task(Recipe(task="crepe")) is data
