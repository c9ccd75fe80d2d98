"""The kernels' benchmark: its rivals are right, a small run works, the committed result holds what the page shows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eke.ops.ks_matmul import reference

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = {
    "dense_share_of_peak", "forward_median", "forward_least", "forward_below_one", "forward_cases", "backward_median",
    "backward_least", "large_median_share_of_peak", "large_least_share_of_peak", "chain_gain_over_einsums",
    "chain_gain_over_bmm", "chain_gain_over_dense", "chain_copies",
}  # fmt: skip


@pytest.fixture(scope="module")
def rivals():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("kernels_rivals")


@pytest.mark.parametrize("pattern", [(1, 6, 4, 1), (3, 4, 6, 1), (1, 4, 2, 3), (2, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_every_variant_of_every_rival_is_the_product(rivals, pattern, last):
    a, _, c, d = pattern
    x, blocks = torch.randn(7, a * c * d, dtype=torch.float64), torch.randn(pattern, dtype=torch.float64)
    found = rivals.ways(blocks, last=last, batch=7)
    assert {name.partition(",")[0] for name in found} == {"bmm", "einsum", "dense", "csr", "bsr"}
    assert (rivals.IN_PLACE in str(found)) == (d == 1 or (last and a == 1))
    for w, run in found.values():
        y = run(x.T.contiguous() if last else x, w)
        torch.testing.assert_close(y.T if last else y, reference.matmul(x, blocks))


def test_the_fastest_variant_stands_for_its_way(rivals):
    now = [0.0]

    def lasting(seconds):
        def run():
            now[0] += seconds

        return run

    runs = {"bmm, a": lasting(3.0), "bmm, b": lasting(2.0), "dense": lasting(5.0)}
    assert rivals.fastest(runs, lambda: now[0]) == {"bmm": "bmm, b", "dense": "dense"}
    timed = rivals.interleaved(runs, 0.0, clock=lambda: now[0])
    assert timed == {"bmm, a": 3.0, "bmm, b": 2.0, "dense": 5.0}


def check(document, threads):
    assert [run["threads"] for run in document["runs"]] == threads
    assert set(document["goals"]) > {"forward_least", "backward_median", "chain_copies_at_most"}
    assert document["environment"]["cpu"]
    for run in document["runs"]:
        assert set(run["summary"]) == SUMMARY
        assert run["call_microseconds"]["eke"] > 0
        for entry in [*run["forward"], *run["backward"]]:
            best = entry["best_rival"].partition(",")[0]
            assert best in entry["microseconds"]
            rivals = {name: value for name, value in entry["microseconds"].items() if name != "eke"}
            assert rivals[best] == min(rivals.values())
            assert entry["gain"] == pytest.approx(rivals[best] / entry["microseconds"]["eke"], abs=0.01)
            if run["peak_gflops"]:
                share = entry["gflops"]["eke"] / run["peak_gflops"]
                assert entry["share_of_peak"]["eke"] == pytest.approx(share, abs=2e-3)
        gains = [entry["gain"] for entry in run["forward"]]
        assert run["summary"]["forward_least"] == min(gains)
        assert run["summary"]["forward_below_one"] == sum(gain < 1 for gain in gains)


@pytest.mark.parametrize("name", ["ks_minilm", "ks_networks", "ks_structure", "ks_training"])
def test_benchmarks_of_layers_start(name):
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--help"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--json" in done.stdout


@pytest.mark.slow
def test_a_small_run(tmp_path):
    target = tmp_path / "kernels.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", "--smoke", "--seconds", "0.01", "--json", str(target)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(target.read_text())
    assert document["smoke"] is True
    check(document, [1])


def test_the_committed_result_holds_every_forward_case():
    document = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    assert document["smoke"] is False
    full = document["runs"][0]
    assert full["threads"] == 1
    cases = {(tuple(row["pattern"]), row["batch"], row["layout"]) for row in full["forward"]}
    assert len(cases) == len(full["forward"]) == 15 * 3 * 2
    gains = [row["gain"] for row in full["forward"]]
    assert full["summary"]["forward_least"] == min(gains)
    assert full["summary"]["forward_below_one"] == sum(gain < 1 for gain in gains)
    for row in [*full["forward"], *full["backward"]]:
        assert row["best_rival"].partition(",")[0] in row["gflops"]
