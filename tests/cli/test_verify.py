"""`eke verify`: the same is said of what is the same, and of nothing else."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
from typer.testing import CliRunner

from eke import cost
from eke.cli.main import app
from eke.cli.verify import compare_scores
from eke.report import Document

from .conftest import EASY, QUICK, SOURCE


def opened(folder):
    document = Document.from_json((folder / "report.json").read_text())
    return {split.name: split.opened for split in document.splits}["report"]


def edit(folder, change):
    plan = json.loads((folder / "plan.json").read_text())
    change(plan["checks"])
    (folder / "plan.json").write_text(json.dumps(plan))


def test_a_saved_result_is_the_same_from_its_recipe_alone(eke, finished):
    done = eke("verify", finished)
    assert done.stdout.splitlines()[-1] == f"{finished} is as it was saved"
    assert "rebuilt model: same; every tensor bit for bit" in done.stdout


def test_the_report_split_is_compared_and_its_opening_counted(eke, result):
    before = opened(result)
    answer = json.loads(eke("verify", result, "--split", "report", "--json").stdout)
    assert answer["same"] is True
    assert answer["score"]["total"] == 200
    assert opened(result) == before + 1
    eke("verify", result)
    assert opened(result) == before + 1


def test_a_changed_weight_is_an_error(eke, result):
    weights = result / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "error: " in eke("verify", result, code=1).stderr


def test_another_state_or_score_is_different(eke, result):
    edit(result, lambda checks: checks.update(state_sha256="0" * 64))
    answer = json.loads(eke("verify", result, "--json", code=1).stdout)
    assert [check["same"] for check in answer["checks"]] == [True, False, True]
    edit(result, lambda checks: checks["selection"].update(correct=1))
    shown = eke("verify", result, code=1).stdout
    assert "score on the selection split: DIFFERENT" in shown
    assert "recorded is 1/100" in shown
    assert "is NOT as it was saved" in shown


def test_what_was_not_recorded_is_said_not_to_be(eke, result):
    edit(result, dict.clear)
    answer = json.loads(eke("verify", result, "--json").stdout)
    assert [check["same"] for check in answer["checks"]] == [True, None, None]


def test_a_model_and_data_can_be_given(eke, result):
    (result / "recipe.yaml").unlink()
    told = eke("verify", result, code=2).stderr
    assert "No model was given" in told
    eke("verify", result, "cli_tiny_model.py:build", "--data", "cli_tiny_data.py:splits")


def test_another_architecture_is_an_error(eke, result):
    told = eke("verify", result, "cli_tiny_model.py:other", code=1).stderr
    assert told.startswith("error: ")


def test_a_folder_without_artifact_and_an_unknown_split_are_errors(eke, tmp_path, result):
    assert "is not an eke artifact" in eke("verify", tmp_path, code=1).stderr
    told = eke("verify", result, "--split", "selektion", code=2).stderr
    assert "--split must be selection or report, got 'selektion'. Did you mean 'selection'?" in told


ERROR = {"value": 0.25, "metric": "mean absolute error", "samples": 200}
COUNTS = {"value": 0.5, "correct": 50, "total": 100}


@pytest.mark.parametrize(
    ("recorded", "found", "same"),
    [
        (COUNTS, COUNTS, True),
        (COUNTS, {**COUNTS, "correct": 51}, False),
        ({"value": -0.25}, {"value": -0.25 - 1e-8}, True),
        ({"value": -0.25}, {"value": -0.26}, False),
        ({"value": -0.25}, COUNTS, None),
        (COUNTS, {"value": 0.5}, None),
        (None, COUNTS, None),
        (ERROR, ERROR, True),
        (ERROR, {**ERROR, "value": 0.26}, False),
        (ERROR, {**ERROR, "metric": "perplexity"}, None),
        (ERROR, {"value": 0.25}, None),
        ({"value": 0.25, "correct": None, "total": None, "metric": None}, {"value": 0.25}, True),
    ],
)
def test_scores_are_compared_with_their_own_kind(recorded, found, same):
    assert compare_scores("selection", recorded, found).same is same


@pytest.mark.parametrize(("recorded", "wanted"), [(3, 3), (None, 1)])
def test_it_is_checked_with_the_recorded_number_of_threads(eke, result, monkeypatch, recorded, wanted):
    edit(result, lambda checks: checks.update(threads=recorded))
    pinned = []

    @contextlib.contextmanager
    def pin(threads):
        pinned.append(threads)
        yield threads

    monkeypatch.setattr(cost, "pinned_threads", pin)
    eke("verify", result)
    assert pinned == [wanted]


@pytest.fixture(scope="session")
def regressed(files):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        words = ["compress", SOURCE[0], "--data", "cli_tiny_data.py:regression", *EASY, *QUICK, "--out", "regressed"]
        done = CliRunner().invoke(app, words, prog_name="eke")
    assert done.exit_code in (0, 3), f"{done.output}\n{done.exception!r}"
    return files / "regressed"


def test_a_metric_of_samples_is_compared_on_both_splits(eke, regressed):
    for split, count in (("selection", 40), ("report", 200)):
        answer = json.loads(eke("verify", regressed, "--split", split, "--json").stdout)
        assert answer["same"] is True
        assert [check["same"] for check in answer["checks"]] == [True, True, True]
        assert (answer["score"]["metric"], answer["score"]["samples"]) == ("mean absolute error", count)
    assert "score on the selection split: same; mean absolute error 0." in eke("verify", regressed).stdout


def test_another_value_of_a_metric_is_different(eke, regressed, tmp_path):
    spoiled = shutil.copytree(regressed, tmp_path / "spoiled")
    edit(spoiled, lambda checks: checks["selection"].update(value=0.5))
    shown = eke("verify", spoiled, code=1).stdout
    assert "score on the selection split: DIFFERENT; mean absolute error 0." in shown
    assert "recorded is mean absolute error 0.5" in shown
