"""`eke gate`: a proved interval passes, a point estimate does not."""

from __future__ import annotations

import json

from eke.cli import gate as verb

from .conftest import SOURCE
from .test_verify import opened

QUICK = ["--seconds", "0.05", "--threads", "1"]


def test_a_model_may_replace_itself_when_the_samples_prove_it(eke, finished):
    answer = json.loads(eke("gate", finished, finished, "--max-drop", "5%", *QUICK, "--json").stdout)
    assert answer["passed"] is True
    assert answer["drop"]["points"] == 0
    assert 0 < answer["drop"]["interval"][1] <= 5
    assert answer["drop"]["proved"] is True
    assert answer["new"]["score"]["total"] == 200
    assert answer["new"]["bytes"] == (finished / "model.safetensors").stat().st_size
    assert answer["speedup"]["threads"] == 1


def test_a_worse_model_may_not(eke, tmp_path):
    (tmp_path / "cli_worse.py").write_text(
        "from cli_tiny_model import build\n\n\ndef worse():\n    model = build()\n    model[-1].weight.data.neg_()\n"
        "    return model\n"
    )
    done = eke(
        "gate", SOURCE[0], f"{tmp_path}/cli_worse.py:worse", "--data", SOURCE[2], "--max-drop", "5%", *QUICK, code=1
    )
    assert "Gate failed" in done.stdout.splitlines()[-1]
    assert "drop (upper end)" in done.stdout.splitlines()[-1]


def test_a_point_estimate_within_the_limit_is_not_enough(eke, tmp_path):
    (tmp_path / "cli_nearly.py").write_text(
        "import torch\nfrom cli_tiny_model import build\n\n\ndef nearly():\n    model = build()\n"
        "    with torch.no_grad():\n        model[-1].bias += torch.tensor([0.004, 0.0, 0.0, 0.0])\n    return model\n"
    )
    words = ["gate", SOURCE[0], f"{tmp_path}/cli_nearly.py:nearly", "--data", SOURCE[2], *QUICK, "--json"]
    drop = json.loads(eke(*words, "--max-drop", "99%").stdout)["drop"]
    assert 0 < drop["points"] < drop["interval"][1]
    between = (drop["points"] + drop["interval"][1]) / 2
    answer = json.loads(eke(*words, "--max-drop", f"{between}%", code=1).stdout)
    assert answer["passed"] is False
    assert answer["drop"]["points"] < answer["drop"]["limit"] < answer["drop"]["interval"][1]


def test_a_speed_that_is_not_reached_fails(eke, finished):
    answer = json.loads(
        eke("gate", finished, finished, "--max-drop", "5%", "--min-speedup", "50", *QUICK, "--json", code=1).stdout
    )
    assert [line["met"] for line in answer["limits"]] == [True, False]
    assert answer["limits"][1]["name"] == "speed-up (lower end)"


def test_a_plain_score_is_compared_as_it_is(eke):
    words = ["gate", SOURCE[0], SOURCE[0], "--data", "cli_tiny_data.py:scored", *QUICK]
    answer = json.loads(eke(*words, "--json").stdout)
    assert answer["passed"] is True
    assert answer["drop"]["interval"] is None
    assert "no interval" in answer["drop"]["method"]


NEARLY = """
import torch
from cli_tiny_model import build


def nearly():
    model = build()
    with torch.no_grad():
        model[-1].bias += 0.02
    return model
"""


def test_a_metric_of_samples_passes_by_the_upper_end_of_its_relative_interval(eke, tmp_path):
    (tmp_path / "cli_biased.py").write_text(NEARLY)
    words = ["gate", SOURCE[0], f"{tmp_path}/cli_biased.py:nearly", "--data", "cli_tiny_data.py:regression", *QUICK]
    drop = json.loads(eke(*words, "--max-drop", "99%", "--json").stdout)["drop"]
    assert drop["unit"] == "%"
    assert drop["interval"][0] < drop["points"] < drop["interval"][1]
    between = (drop["points"] + drop["interval"][1]) / 2
    failed = json.loads(eke(*words, "--max-drop", f"{between}%", "--json", code=1).stdout)
    assert failed["limits"][0]["unit"] == "%"
    assert (failed["old"]["score"]["metric"], failed["old"]["score"]["samples"]) == ("mean absolute error", 200)
    told = " ".join(eke(*words, "--max-drop", "99%").stdout.split())
    assert "mean absolute error, lower is better" in told
    assert "% relative:" in told


def test_too_few_samples_say_how_many_are_needed(eke, finished):
    told = eke("gate", finished, finished, *QUICK, code=1).stderr
    assert "200 samples cannot prove a drop of at most 0.5 points" in told
    assert "at least 765 are needed" in told


def test_what_cannot_be_meant(eke):
    assert "There is no folder 'old'" in eke("gate", "old", SOURCE[0], "--data", SOURCE[2], code=1).stderr
    assert "name none: add --data" in eke("gate", SOURCE[0], SOURCE[0], code=2).stderr
    told = eke("gate", SOURCE[0], SOURCE[0], "--data", SOURCE[2], "--max-drop", "much", code=2).stderr
    assert "--max-drop could not be read: 'much'" in told


def test_opening_the_report_split_is_counted_once_in_each_result(eke, result, monkeypatch):
    before = opened(result)
    eke("gate", SOURCE[0], result, "--max-drop", "99%", *QUICK)
    assert opened(result) == before + 1
    eke("gate", result, result, "--max-drop", "99%", *QUICK)
    assert opened(result) == before + 2

    def refuse(folder, task):
        raise OSError("read-only")

    monkeypatch.setattr(verb, "count_opening", refuse)
    told = eke("gate", SOURCE[0], result, "--max-drop", "99%", *QUICK).stderr
    assert "warning: That the report split was opened could not be counted: read-only" in told
