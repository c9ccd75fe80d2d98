"""`eke compress --front`: several results from one run."""

from __future__ import annotations

import json

import pytest

from eke import Budget
from eke.cli.front import budgets_between
from eke.cli.session import UsageError

from .conftest import QUICK, SOURCE


def test_limits_move_in_equal_steps_of_ratios():
    found = budgets_between(Budget(size="1/16x", latency="0.25x", max_drop="1%"), 4)
    assert [b.size for b in found] == ["0.5x", "0.25x", "0.125x", "1/16x"]
    assert [b.limit("latency", before=1.0) for b in found] == pytest.approx([2**-0.5, 0.5, 2**-1.5, 0.25], rel=1e-5)
    assert found[-1].max_drop == "1%"


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        (Budget(max_drop="1%"), "needs a limit on a cost, such as --latency 0.3x, got {'max_drop': '1%'}"),
        (Budget(size="40kB"), "relative limits below 1x, such as 0.3x, got '40kB'"),
        (Budget(size="2x"), "relative limits below 1x, such as 0.3x, got '2x'"),
    ],
)
def test_budgets_without_ratios_are_refused(budget, match):
    with pytest.raises(UsageError, match=match):
        budgets_between(budget, 3)


def test_every_result_is_saved_and_verified(eke, tmp_path):
    out = tmp_path / "front"
    words = [*SOURCE, *QUICK, "--size", "0.6x", "--max-drop", "90%", "--front", 2, "--nested", "--out", out, "--json"]
    found = json.loads(eke("compress", *words).stdout)
    assert [document["verdict"]["verified"] for document in found["front"]] == [True, True]
    summary = json.loads((out / "front.json").read_text())
    assert [entry["folder"] for entry in summary] == ["1", "2"]
    assert summary[0]["bytes"] > summary[1]["bytes"]
    assert all((out / name / "plan.json").is_file() for name in ("1", "2"))
    shown = eke("report", out / "2").stdout
    assert "met" in shown


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--nested"], "--nested orders the plans of --front N, got --front None"),
        (["--front", 2, "--resume"], "--front starts anew each time, got --resume"),
    ],
)
def test_what_does_not_go_together_is_refused(eke, tmp_path, words, match):
    told = eke("compress", *SOURCE, *QUICK, "--size", "0.4x", *words, "--out", tmp_path / "x", code=2).stderr
    assert match in told


def test_a_folder_in_use_is_refused(eke, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    told = eke("compress", *SOURCE, *QUICK, "--size", "0.4x", "--front", 2, "--out", tmp_path, code=2).stderr
    assert "is in use (mine.txt): give an empty or a new folder" in told
