"""Benchmarks of clustered attention: a small run goes through its gates; committed results say what the page quotes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("## Clustered attention")[2]
PAGE = PAGE.partition("\n## ")[0]


def committed(name):
    document = json.loads((RESULTS / f"{name}.json").read_text())
    assert document["smoke"] is False
    return document


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["clustered_attention", "--seconds", "0.05"]])
def test_a_small_run(arguments, tmp_path):
    target, (name, *rest) = tmp_path / "result.json", arguments
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *rest, "--smoke", "--json", str(target)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(target.read_text())["smoke"] is True


def test_the_table_of_minilm_is_the_committed_one():
    document = committed("clustered_minilm")
    assert document["guarantee"]["largest_excess"] < 1e-12
    assert document["guarantee"]["largest_growth_with_k"] < 1e-12
    for row in document["table"]:
        numbers = (
            f"{row['cosine']:.4f} | {row['least_cosine']:.4f} | {row['token_cosine']:.4f} | {row['row_error']:.3f}"
        )
        assert f"| {row['attention']} | {numbers} |" in PAGE
    for row in document["tolerances"]:
        assert f"| {row['tolerance']} | {row['cosine']:.4f} | {row['share_of_pairs']:.2f} |" in PAGE


def test_times_are_the_committed_ones():
    document = committed("clustered_attention")
    times = document["main"]["milliseconds"]
    for name, times_faster in document["main"]["times_faster"].items():
        assert times_faster == pytest.approx(times["softmax"]["median"] / times[name]["median"])
        assert f"| {name} | {times[name]['median']:.0f} | {times_faster:.1f}x |" in PAGE
    share = document["memory"]["eke"] / document["memory"]["scores_of_all_pairs"]
    assert share == pytest.approx(document["memory"]["share"])
    assert f"{document['memory']['eke']:.0f} MB" in PAGE
    for row in document["break_even"]:
        first = row["break_even"]
        assert re.search(
            rf"\| {row['heads']} of {row['dim']} \| {row['clusters']} \| {row['topk']} \| {first} \|", PAGE
        )
