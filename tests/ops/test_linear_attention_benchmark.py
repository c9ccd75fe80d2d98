"""Benchmarks of linear attention: small runs go through their gates, and committed results are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_attention", "generation"])
def test_a_small_run(name, tmp_path):
    target = tmp_path / "result.json"
    extra = ("--seconds", "0.05") if name == "linear_attention" else ()
    run(name, "--smoke", *extra, "--json", str(target))
    document = json.loads(target.read_text())
    assert document["smoke"] is True
    assert document["environment"]["cpu"]


def test_committed_results_follow_from_their_times():
    document = json.loads((RESULTS / "linear_attention.json").read_text())
    assert document["smoke"] is False
    assert max(document["differences_to_naive_functions"].values()) < 1e-5
    assert [entry["length"] for entry in document["cases"]] == [1024, 4096, 16384]
    for entry in document["cases"]:
        for what in ("forward", "forward and backward"):
            eke = entry[what]["eke"]["median"]
            for name, gain in entry[f"gains, {what}"].items():
                assert gain == pytest.approx(entry[what][name]["median"] / eke)
    for entry in json.loads((RESULTS / "generation.json").read_text())["cases"]:
        for name, times in entry["times_faster"].items():
            assert times == pytest.approx(entry["seconds"][name] / entry["seconds"]["linear"])
