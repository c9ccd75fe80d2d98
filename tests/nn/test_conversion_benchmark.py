"""Benchmark of conversion: a small run goes through its gates, and the page quotes the committed results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAYS = (
    "softmax, cache of keys", "converted, states", "converted, layer by layer", "softmax, native step",
    "converted, native step",
)  # fmt: skip
RESULT = ROOT / "benchmarks" / "results" / "attention_conversion.json"


@pytest.mark.slow
def test_a_small_run_goes_through_its_gates(tmp_path):
    pytest.importorskip("transformers")
    target = tmp_path / "result.json"
    options = ["--smoke", "--only", "characters", "--json", str(target)]
    done = subprocess.run(
        [sys.executable, "benchmarks/attention_conversion.py", *options],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(target.read_text())
    assert document["smoke"] is True
    assert document["characters"]["converted"]


def section() -> str:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    return page.partition("## Conversion of softmax attention\n")[2].partition("\n## ")[0]


def test_the_page_quotes_the_characters():
    found, page = json.loads(RESULT.read_text())["characters"], section()
    assert json.loads(RESULT.read_text())["smoke"] is False
    assert f"against {found['perplexity']:.3f}" in page
    assert 10 * (found["transfer_steps"] + found["tuning_steps"]) <= found["training_steps"]
    for row in found["converted"].values():
        assert row["worse"] == pytest.approx(row["perplexity"] / found["perplexity"] - 1)
        assert f"| {row['perplexity_after_transfer']:.3f} | {row['perplexity']:.3f} |" in page
    for length, times in found["speed"]["forward"].items():
        assert f"{1e3 * times['softmax']:.1f} / {1e3 * times['converted']:.1f}" in page, length
    for length, times in found["speed"]["token"].items():
        row = f"| {int(length):,} | ".replace(",", " ") + " | ".join(f"{1e3 * times[way]:.2f}" for way in WAYS) + " |"
        assert row in page, length


def test_the_page_quotes_how_often_a_token_is_faster():
    speed, page = json.loads(RESULT.read_text())["characters"]["speed"], section()
    assert list(speed["token"]) == ["256", "1024", "4096"]
    gains = {
        length: [times[softmax] / times[converted] for softmax, converted in (WAYS[:2], WAYS[3:])]
        for length, times in speed["token"].items()
    }
    assert f"{gains['256'][0]:.1f} times faster than the softmax model" in page
    assert f"**{gains['4096'][0]:.1f} times** after 4 096" in page
    steps = [f"{gain:.2f}" for _, gain in gains.values()]
    assert f"gains {steps[0]} times after 256\npositions, {steps[1]} after 1 024 and {steps[2]} after 4 096" in page
    assert all(gain > 1 for pair in gains.values() for gain in pair)


def test_the_page_quotes_the_texts():
    found, page = json.loads(RESULT.read_text())["texts"], section()
    assert f"{found['texts']} texts" in page
    for name, row in found["converted"].items():
        assert f"| {name} | {row['steps']} | {row['mean_cosine']:.3f} | {row['least_cosine']:.3f} |" in page
