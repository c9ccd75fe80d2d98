"""The committed results of pruning and of sparse layers hold what the pages say, and small runs work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = Path("/usr/share/datasets/fashion-mnist")


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check_runtime(document):
    for result in document["runs"]:
        for row in [*result["networks"], *result["rows_that_share_columns"]]:
            times = row["microseconds"]
            assert set(times) == {"dense", "eke", "auto", "csr"}
            assert row["error"] < 1e-4
            assert row["dense_over_eke"] == pytest.approx(times["dense"] / times["eke"], rel=0.02)
            assert row["csr_over_eke"] == pytest.approx(times["csr"] / times["eke"], rel=0.02)
        for row in result["kernels"]:
            times = row["microseconds"]
            dense = min(times["dense, contiguous"], times["dense, channels last"])
            for kind, ratio in row["best_dense_over_eke"].items():
                assert ratio == pytest.approx(dense / times[f"eke, {kind}"], rel=0.02)
        at = {(row["sparsity"], row["batch"]): row for row in result["networks"]}
        assert result["summary"]["dense_over_eke_at_90_batch_32"] == at[0.9, 32]["dense_over_eke"]
        assert result["summary"]["csr_over_eke_at_90_batch_32"] == at[0.9, 32]["csr_over_eke"]
        assert result["summary"]["dense_over_eke_at_70_batch_32"] == at[0.7, 32]["dense_over_eke"]


def check_pruning(document, *, seeds):
    for net in document["nets"].values():
        assert len(net["seeds"]) >= seeds
        for one in net["seeds"]:
            assert {"MP", "OBC", "QM by trust", "LM 1", "QM 1", "OBD 1"} <= set(one["ways"])
            for way in one["ways"].values():
                assert abs(sum(way["kept"].values()) - one["kept"]) <= len(way["kept"])
        assert set(net["summary"]["locality_points_before"]) == {"LM", "QM", "OBD"}
        assert len(net["summary"]["winners"]) == len(net["seeds"])


def test_the_committed_runtimes_are_whole():
    document = json.loads((RESULTS / "sparse_runtime.json").read_text())
    assert document["smoke"] is False
    assert {(row["sparsity"], row["batch"]) for row in document["runs"][0]["networks"]} >= {(0.7, 32), (0.9, 32)}
    check_runtime(document)
    kernels = {
        (row["kernel"], row["channels"], row["side"], row["batch"], row["sparsity"]): row["best_dense_over_eke"]
        for row in document["runs"][0]["kernels"]
    }
    page = (RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    for place, line in {
        (3, 64, 32, 1): "3 x 3, 64, 32 x 32, 1", (3, 64, 32, 8): "3 x 3, 64, 32 x 32, 8",
        (3, 128, 16, 8): "3 x 3, 128, 16 x 16, 8", (3, 256, 8, 8): "3 x 3, 256, 8 x 8, 8",
        (3, 512, 4, 1): "3 x 3, 512, 4 x 4, 1", (3, 512, 4, 8): "3 x 3, 512, 4 x 4, 8",
        (5, 64, 16, 8): "5 x 5, 64, 16 x 16, 8",
    }.items():  # fmt: skip
        found = [kernels[*place, sparsity] for sparsity in (0.7, 0.8, 0.9, 0.95)]
        cells = [f"{row['channels last']:.2f} / {row['contiguous']:.2f}" for row in found]
        assert f"| {line} | {' | '.join(cells)} |" in page.replace("**", "")


def test_the_committed_pruning_is_whole():
    document = json.loads((RESULTS / "pruning.json").read_text())
    assert document["smoke"] is False
    assert set(document["nets"]) == {"mlp", "vgg"}
    check_pruning(document, seeds=3)


@pytest.mark.slow
def test_a_small_run_of_the_runtimes(tmp_path):
    run("sparse_runtime", "--smoke", "--seconds", "0.02", "--json", str(tmp_path / "found.json"))
    check_runtime(json.loads((tmp_path / "found.json").read_text()))


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES.exists(), reason="needs Debian's dataset-fashion-mnist")
def test_a_small_run_of_pruning(tmp_path):
    run("pruning", "--smoke", "--nets", "mlp", "--json", str(tmp_path / "found.json"))
    check_pruning(json.loads((tmp_path / "found.json").read_text()), seeds=1)
