"""The benchmark of factorizations runs, and its committed results say what was compared and what was reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def check(document):
    assert document["question"].startswith("How fast is the butterfly factorization")
    assert document["threads"] == 1
    assert {"cpu", "cores", "torch"} <= set(document["machine"])
    assert {"eke", "torch", "lazylinop", "pyfaust"} <= set(document["versions"])
    for row in document["rows"]:
        for result in row["methods"].values():
            assert result["error"] <= 1e-12
            assert 0 < result["processor_seconds"] <= result["processor_spread_seconds"][1]
        ours = {name for name in row["methods"] if name.startswith("eke")}
        assert ours == {"eke left", "eke right", "eke balanced"}
        assert row["fastest"] in ours


def test_a_smoke_run_writes_what_the_results_hold(tmp_path):
    out = tmp_path / "smoke.json"
    command = [sys.executable, BENCHMARKS / "factorization.py", "--smoke", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(out.read_text())
    check(document)
    assert document["smoke"]
    assert [(row["matrix"], row["n"]) for row in document["rows"]] == [("hadamard", 64), ("fourier", 64)]


def test_the_committed_results_compare_with_both_rivals():
    document = json.loads((BENCHMARKS / "results" / "factorization.json").read_text())
    check(document)
    assert not document["smoke"]
    assert document["versions"]["lazylinop"] is not None
    assert document["versions"]["pyfaust"] is not None
    goals = {row["matrix"]: row for row in document["rows"] if row["n"] == 2048}
    assert set(goals) == {"hadamard", "fourier"}
    for name, times in (("hadamard", 20), ("fourier", 10)):
        row = goals[name]
        rivals = [v["processor_seconds"] for k, v in row["methods"].items() if not k.startswith("eke")]
        assert len(rivals) == 7
        own = row["methods"][row["fastest"]]
        assert row["times_as_fast"]["processor"] == pytest.approx(min(rivals) / own["processor_seconds"])
        reached = min(row["times_as_fast"].values()) >= times and own["error"] <= 3e-15
        assert row["goal"]["reached"] == reached
