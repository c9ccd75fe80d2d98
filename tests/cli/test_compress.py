"""`eke compress`: exit codes, files, verification elsewhere, interruption, and what is refused."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import yaml

from eke.cli import compress as verb
from eke.compression import Recovery
from eke.report import Document

from .conftest import EASY, HARD, QUICK, SOURCE

FILES = {"model.safetensors", "plan.json", "recipe.yaml", "report.json", "report.html"}


@pytest.fixture
def trusted(monkeypatch):
    """Leave out the fresh process, which other tests run."""
    monkeypatch.setattr(verb, "verify_elsewhere", lambda folder, wanted, base: None)


def digest(folder):
    return json.loads((folder / "plan.json").read_text())["checks"]["state_sha256"]


def test_a_met_budget_ends_with_verdict_and_page(finished):
    lines = (finished.parent / "stdout.txt").read_text().splitlines()
    assert lines[-1] == "finished/report.html"
    assert lines[-2].startswith("Budget met, verified. ")
    assert lines[-2].endswith("Reloaded in a fresh process: the same.")


def test_the_folder_holds_the_artifact_and_no_run(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    document = Document.from_json((finished / "report.json").read_text())
    assert (document.verdict.met, document.verdict.verified) == (True, True)


def test_progress_goes_to_stderr(finished):
    stages = {line.partition(":")[0] for line in (finished.parent / "stderr.txt").read_text().splitlines()}
    assert {"statistics", "candidates", "costs", "plan", "recover", "verify"} <= stages


def test_the_recipe_is_complete_and_repeats_the_run(eke, finished, tmp_path, trusted):
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["data"]) == ("cli_tiny_model.py:build", "cli_tiny_data.py:task")
    assert recipe["budget"] == {"max_drop": "90%", "size": "0.9x"}
    assert recipe["recovery"]["steps"] == 2
    assert recipe["recovery"]["batch_size"] == Recovery().batch_size
    assert "eke compress --recipe recipe.yaml" in (finished / "report.html").read_text()
    eke("compress", "--recipe", finished / "recipe.yaml", "--out", tmp_path / "again")
    assert digest(tmp_path / "again") == digest(finished)
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text()) == recipe


def test_a_missed_budget_exits_with_3_and_json_stands_alone(eke, tmp_path, trusted, capfd):
    done = eke("compress", *SOURCE, *HARD, *QUICK, "--out", tmp_path / "r", "--json", code=3)
    document = Document.from_json(done.stdout)
    assert (document.verdict.met, document.verdict.verified) == (False, True)
    assert "building" in done.stderr
    assert capfd.readouterr().out == "", "native code must not write to stdout"


def test_an_impossible_budget_names_the_nearest(eke, tmp_path):
    words = ["compress", *SOURCE, "--size", "10", *QUICK, "--out", tmp_path / "r", "--json"]
    done = eke(*words, code=1)
    assert "below the smallest" in json.loads(done.stdout)["error"]


def test_a_failed_verification_exits_with_1_and_keeps_the_run(eke, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "verify_elsewhere", lambda folder, wanted, base: "its state differs")
    done = eke("compress", *SOURCE, *EASY, *QUICK, "--out", tmp_path / "r", code=1)
    assert "error: the saved result could not be verified: its state differs" in done.stderr
    assert "not verified" in done.stdout.splitlines()[-2]
    assert (tmp_path / "r" / ".run").is_dir()


def test_another_process_finds_what_is_wrong(eke, result):
    wanted = verb.Recipe(model=SOURCE[0], data=SOURCE[2])
    weights = result / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "was changed: its SHA-256 is" in str(verb.verify_elsewhere(result, wanted, base=None))


def test_an_interrupted_run_is_continued_to_the_same_result(eke, finished, tmp_path, monkeypatch, trusted):
    folder = tmp_path / "r"

    @contextlib.contextmanager
    def interrupting():
        def progress(stage, share, text):
            if stage == "verify":
                raise KeyboardInterrupt

        yield progress

    with monkeypatch.context() as patch:
        patch.setattr(verb, "shown", interrupting)
        told = eke("compress", *SOURCE, *EASY, *QUICK, "--out", folder, code=130).stderr
    assert told.splitlines()[-1] == (
        "interrupted; continue with: eke compress cli_tiny_model.py:build --data cli_tiny_data.py:task --max-drop 90% "
        f"--size 0.9x --steps 2 --threads 1 --seconds 0.02 --out {folder} --resume"
    )
    assert (folder / ".run" / "recipe.json").exists()
    assert not (folder / "plan.json").exists()
    eke("compress", *SOURCE, *EASY, *QUICK, "--out", folder, "--resume")
    assert digest(folder) == digest(finished)
    assert {path.name for path in folder.iterdir()} == FILES


def test_resuming_a_finished_run_shows_it_again(eke, result):
    done = eke("compress", *SOURCE, *EASY, *QUICK, "--out", result, "--resume")
    assert f"{result} is finished: nothing to continue" in done.stderr
    assert done.stdout.splitlines()[-2].startswith("Budget met, verified.")


def test_resuming_with_another_recipe_is_refused(eke, result):
    told = eke("compress", *SOURCE, *EASY, *QUICK, "--seed", 3, "--out", result, "--resume", code=2).stderr
    assert "had another recipe: seed was 0 and is now 3" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SOURCE], "Nothing was limited, got the budget {}: give a limit, such as --max-drop 1% --latency 0.5x"),
        ([*SOURCE, "--latency", "fast"], "latency could not be read: 'fast'"),
        ([*SOURCE, "--size", "0.5y"], "unknown unit 'y'"),
        (["--size", "0.5x"], "No model was given"),
        ([SOURCE[0], "--size", "0.5x"], "No data were given"),
        ([SOURCE[0], "--task", "demo"], "--task demo brings its own model and data"),
        (["--set", "steps=3"], "--set has an unknown key 'steps'. Did you mean 'recovery.steps'?"),
    ],
)
def test_commands_that_cannot_be_meant(eke, tmp_path, words, message):
    told = eke("compress", *words, "--out", tmp_path / "r", code=2).stderr
    assert message in told
    assert not (tmp_path / "r").exists()


def test_a_foreign_folder_is_left_alone(eke, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    told = eke("compress", *SOURCE, *EASY, "--out", tmp_path, code=2).stderr
    assert "holds files that are not eke's (thesis.tex): give an empty or a new folder" in told
    told = eke("compress", *SOURCE, *EASY, "--out", tmp_path / "thesis.tex", code=2).stderr
    assert "thesis.tex is a file: give a folder" in told
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_starting_anew_over_an_unfinished_run_is_said(tmp_path, capsys):
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run" / "recipe.json").write_text("{}")
    verb.check_folder(tmp_path, resume=False)
    assert "holds an unfinished run: starting anew (--resume continues it)" in capsys.readouterr().err
    verb.check_folder(tmp_path, resume=True)
    assert capsys.readouterr().err == ""


def test_resuming_what_was_never_started_says_that_it_starts(eke, tmp_path, monkeypatch):
    def stop(wanted, folder, *, resume, base):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_run", stop)
    words = ["compress", *SOURCE, *EASY, "--out", tmp_path / "r"]
    said = f"nothing to continue in {tmp_path / 'r'}: starting"
    assert said in eke(*words, "--resume", code=130).stderr
    assert said not in eke(*words, code=130).stderr
    (tmp_path / "r" / ".run").mkdir(parents=True)
    (tmp_path / "r" / ".run" / "recipe.json").write_text("{}")
    assert said not in eke(*words, "--resume", code=130).stderr


def test_the_demo_has_limits_of_its_own(eke, tmp_path, monkeypatch):
    seen = []

    def stop(wanted, folder, *, resume, base):
        seen.append(wanted.budget)
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_run", stop)
    eke("compress", "--task", "demo", "--out", tmp_path / "r", code=130)
    eke("compress", "--task", "demo", "--size", "0.5x", "--out", tmp_path / "r", code=130)
    assert seen == [verb.BUDGETS["demo"], {"size": "0.5x"}]


@pytest.mark.slow
def test_the_demo_runs_from_one_command(tmp_path):
    words = [sys.executable, "-P", "-m", "eke", "compress", "--task", "demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr[-2000:]
    document = Document.from_json(done.stdout)
    assert document.verdict.verified
    assert (tmp_path / "demo" / "report.html").stat().st_size < 400_000
