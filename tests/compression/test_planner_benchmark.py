"""What the page says of the planner's predictions is what the committed result has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[2]
LEADING = "EKFAC with leading directions"


@pytest.fixture(scope="module")
def singles():
    path = ROOT / "benchmarks" / "results" / "planner.json"
    return json.loads(path.read_text())["results"]["singles"] if path.exists() else pytest.skip("no benchmarks here")


@pytest.fixture(scope="module")
def page():
    path = ROOT / "docs" / "benchmarks.md"
    return path.read_text() if path.exists() else pytest.skip("no docs here")


def test_ranks_follow_from_the_rows_and_are_quoted(singles, page):
    measured = [row["measured"] for row in singles["rows"]]
    for name in ("distance", "activations", "diagonal", "K-FAC", "EKFAC", LEADING, f"{LEADING} and slope"):
        found = singles["ranks"][name]
        predicted = [row[name] for row in singles["rows"]]
        assert found["spearman"] == pytest.approx(spearmanr(predicted, measured).statistic, abs=1e-12)
        low, high = found["interval"]
        assert f"| {found['changes']} | {found['spearman']:.3f} [{low:.3f}, {high:.3f}] |" in page


def test_paired_intervals_are_quoted(singles, page):
    for low, high in singles["paired intervals"].values():
        assert f"[{low:.3f}, {high:.3f}]".replace("-", "−") in page


def test_leading_directions_order_changes_no_worse_than_the_plain_product(singles):
    ranks = {name: found["spearman"] for name, found in singles["ranks"].items()}
    assert ranks[LEADING] >= ranks["K-FAC"]
    assert ranks[f"{LEADING} and slope"] >= ranks["K-FAC and slope"]
