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
