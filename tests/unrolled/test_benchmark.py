"""The benchmark of unrolled networks runs, and its committed result says what the page quotes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "unrolled.json"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_unrolled", ROOT / "benchmarks" / "unrolled.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_run_writes_every_part(benchmark, tmp_path):
    benchmark.main(["--smoke", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["smoke"]
    assert all(found["gate"].values())
    assert {row["name"] for row in found["networks"]["rows"]} >= {
        "LISTA",
        "LISTA-CP",
        "LISTA-CPSS",
        "ALISTA",
        "HyperLISTA",
    }
    assert all(len(row["nmse_db"]) == 3 for row in found["networks"]["rows"])
    for part in benchmark.PARTS:
        assert found[part]["rows"]
        assert "cpu" in found[part]["environment"]


def test_result_has_every_part_and_passed_its_gate(benchmark):
    found = json.loads(RESULT.read_text())
    assert not found["smoke"]
    assert len(found["gate"]) == 3
    assert all(found["gate"].values())
    assert all(found[part]["rows"] for part in benchmark.PARTS)
    assert all(len(row["nmse_db"]) == 16 for row in found["networks"]["rows"])


def test_the_solver_chosen_is_near_the_best_in_nine_of_ten():
    found = json.loads((RESULT.parent / "solver_choice.json").read_text())
    assert len(found["rows"]) == 40
    ratios = [row["ratio"] for row in found["rows"] if not row["none_good"]]
    assert found["judged"] == len(ratios)
    assert found["held"] == sum(ratio is not None and ratio <= found["within"] for ratio in ratios)
    assert found["held"] >= 0.9 * len(found["rows"])


def test_exact_answers_keep_to_their_times():
    found = json.loads((RESULT.parent / "sparse_solvers.json").read_text())
    rows = {row["name"]: row for row in found["times"]}
    assert rows["eke Exact, float32"]["ms"] <= 0.04
    assert rows["eke Exact, float32"]["nmse_db"] <= -85
    assert rows["eke Exact, one problem, float32"]["ms"] <= 0.3
    assert rows["eke Exact, float64"]["nmse_db"] <= -250
    assert rows["eke Exact, float64"]["ms"] <= min(0.2, rows["SPAMS OMP"]["ms"])
    assert len(found["conditions"]) == 13
    assert all("Exact" in row for row in found["conditions"])


def test_pictures_are_as_good_as_those_of_rivals_with_the_same_problem():
    found = json.loads((RESULT.parent / "sparse_images.json").read_text())
    denoised = [row for row in found["rows"] if row["task"] == "denoise"]
    for ours, theirs in zip(denoised[::2], denoised[1::2], strict=True):
        assert ours["solver"].startswith("eke")
        assert ours["fit"] == pytest.approx(theirs["fit"], rel=0.01)
        assert ours["psnr"] == pytest.approx(theirs["psnr"], abs=0.05)
