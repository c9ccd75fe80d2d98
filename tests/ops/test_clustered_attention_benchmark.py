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


def test_the_rest_as_one_key_is_quoted_as_it_was_measured():
    document = committed("clustered_minilm")
    published = {row["attention"]: row for row in document["table"]}
    found = document["rest_as_a_key"]
    for row in found["table"]:
        numbers = (
            f"{row['cosine']:.4f} | {row['least_cosine']:.4f} | {row['token_cosine']:.4f} | {row['row_error']:.3f}"
        )
        assert f"| {row['attention']} | {numbers} |" in PAGE
        before = published[row["attention"].replace("rest as a key,", "improved clustered")]
        assert row["cosine"] > before["cosine"]
        assert row["row_error"] < before["row_error"]
    assert found["table"][0]["cosine"] >= 0.980
    assert found["table"][1]["cosine"] >= 0.989
    for row in found["other_texts"]:
        assert row["texts"] == 16
        kinds = " | ".join(f"{row['cosine_by_kind'][kind]:.4f}" for kind in ("topics", "licences"))
        numbers = f"{row['cosine']:.4f} | {row['least_cosine']:.4f} | {kinds}"
        assert f"| {row['split']} | {row['clusters']} | {row['rest']} | {numbers} |" in PAGE
    rows = found["rows"]
    assert f"{rows['rows']} rows" in PAGE
    assert f"{100 * rows['share_further_than_improved']:.1f} % are further" in PAGE
    assert f"{100 * rows['share_further_than_clustered']:.2f} % further than plain" in PAGE
    assert f"from {rows['mean_error_of_improved']:.3f} to {rows['mean_error']:.3f}" in PAGE
    ranks = {r["rest"]: r["spearman"] for r in found["other_texts"] if r["split"] == "held out" and r["clusters"] == 25}
    assert f"{ranks['key']:.3f} with the key, {ranks['shared']:.3f} without" in PAGE


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
