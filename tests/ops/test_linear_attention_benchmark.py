"""Benchmarks of linear attention: small runs go through their gates, and committed results are whole."""

from __future__ import annotations

import gzip
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


@pytest.mark.slow
def test_a_small_run_of_the_trained_examples(tmp_path):
    pytest.importorskip("transformers")
    for name in ("train", "t10k"):
        with gzip.open(tmp_path / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + os.urandom(20 * 784))
    files = ("--json", str(tmp_path / "result.json"), "--picture", str(tmp_path / "picture.png"))
    run("linear_generation", "--smoke", "--images", str(tmp_path), *files)
    document = json.loads((tmp_path / "result.json").read_text())
    assert [entry["task"] for entry in document["cases"]] == ["characters", "pixels"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def page():
    return (ROOT / "docs" / "benchmarks.md").read_text()


def test_generation_shows_both_rivals_and_what_the_page_says():
    document = json.loads((RESULTS / "generation.json").read_text())
    assert document["smoke"] is False
    one, many = document["cases"]
    assert (one["batch"], many["batch"], one["tokens"], many["tokens"]) == (1, 32, 3072, 3072)
    for entry in (one, many):
        assert {"linear", "cache", "linear, eager", "cache, eager"} <= set(entry["seconds"])
        kept = entry["numbers_kept"]
        assert kept["linear"] == 8 * entry["batch"] * (256 * 32 + 256)
        assert kept["cache"] == 8 * entry["batch"] * 2 * 256 * 3072
        assert f"{entry['times_faster']['cache']:.2f} times" in page()
    assert f"{one['times_faster']['recomputing']:.0f} times" in page()


def test_ggml_is_beside_in_every_shape():
    document = json.loads((RESULTS / "linear_attention_ggml.json").read_text())
    assert document["smoke"] is False
    for entry in document["cases"]:
        for name, gain in entry["gains"].items():
            assert gain == pytest.approx(entry["seconds"]["ggml"] / entry["seconds"][name])
        row = f"| {entry['batch']} | {entry['length']:,} | {entry['size']} | ".replace(",", " ")
        gains = [entry["gains"][name] for name in ("eke", "eke in place", "eke from Python")]
        assert row + " | ".join(f"{gain:.2f}" for gain in gains) in page()


def test_trained_examples_have_equal_parameters_and_are_on_the_page():
    document = json.loads((RESULTS / "linear_generation.json").read_text())
    assert document["smoke"] is False
    assert [entry["task"] for entry in document["cases"]] == ["characters", "pixels"]
    for entry in document["cases"]:
        rows = entry["rows"]
        assert rows["softmax"]["parameters"] == rows["linear"]["parameters"]
        assert rows["linear with gates"]["parameters"] < 1.01 * rows["linear"]["parameters"]
        for name, row in rows.items():
            speeds = [f"{speed:,.0f}".replace(",", " ") for speed in row["symbols_per_second"].values()]
            parts = [entry["task"], name, f"{row['parameters']:,}".replace(",", " "), f"{row['bits']:.3f}", *speeds]
            assert f"| {' | '.join(parts)} |" in page()
    assert (ROOT / "docs" / "images" / "linear-generation.png").stat().st_size < 150_000


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
