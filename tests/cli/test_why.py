"""`eke why`: what every option costs and saves."""

from __future__ import annotations

import json

from .conftest import SOURCE

QUICK = ["--threads", 1, "--seconds", 0.02]


def test_every_decision_of_the_net_is_listed(eke):
    found = json.loads(eke("why", *SOURCE, *QUICK, "--json").stdout)
    names = {option["choice"] for option in found["options"]}
    assert names == {"channels:0", "matrix:0", "matrix:5"}
    assert all(option["predicted_loss"] >= 0 for option in found["options"])
    grids = [o for o in found["options"] if o["choice"] == "matrix:5" and o["label"].startswith("UniformGrid")]
    assert [o["bytes"] for o in grids] == sorted(o["bytes"] for o in grids)
    assert found["before"]["size"] > 0


def test_options_can_be_measured(eke):
    found = json.loads(eke("why", *SOURCE, *QUICK, "--site", "channels", "--measure", "--json").stdout)
    assert {option["choice"] for option in found["options"]} == {"channels:0"}
    assert all(0 <= option["score"] <= 1 for option in found["options"])
    assert all(isinstance(option["measured_loss"], float) for option in found["options"])


def test_the_table_has_a_line_for_each_option(eke):
    shown = eke("why", *SOURCE, *QUICK, "--site", "matrix:5").stdout
    assert "decision" in shown
    assert shown.count("matrix:5") == 1
    assert "UniformGrid(bits=4)" in shown
    assert "%" in shown


def test_a_name_that_no_decision_has_is_refused(eke):
    told = eke("why", *SOURCE, *QUICK, "--site", "nowhere", code=1).stderr
    assert "No decision's name contains 'nowhere'" in told


def test_data_are_needed(eke):
    told = eke("why", SOURCE[0], *QUICK, code=2).stderr
    assert "why needs the data of cli_tiny_model.py:build: --data FILE.py:FUNCTION" in told
