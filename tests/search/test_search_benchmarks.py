"""What the committed results of the search benchmarks say follows from their scores, and the page quotes them."""

from __future__ import annotations

import csv
import gzip
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from eke import search
from eke.search.spaces import NB201

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = Path("/usr/share/datasets/fashion-mnist")
DATASETS = {"CIFAR-10": "c10", "CIFAR-100": "c100", "ImageNet16-120": "in16"}


def rows(path):
    if not path.exists():
        pytest.skip("benchmarks are not here")
    with gzip.open(path, "rt") as file:
        return {row.pop("ops"): {name: float(value) for name, value in row.items() if name != "index"}
                for row in csv.DictReader(file)}  # fmt: skip


@pytest.fixture(scope="module")
def document():
    path = RESULTS / "nb201.json"
    if not path.exists():
        pytest.skip("benchmarks are not here")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def page():
    path = ROOT / "docs" / "benchmarks.md"
    return path.read_text() if path.exists() else pytest.skip("docs are not here")


def test_correlations_follow_from_the_scores(document):
    scores, truth = rows(RESULTS / "nb201_scores.csv.gz"), rows(ROOT / "benchmarks/data/nb201_tss_accuracy.csv.gz")
    assert document["networks"] == len(scores) >= 1000
    size = [NB201.log_numel(ops) for ops in scores]
    assert document["in_top_region"] == sum(truth[ops]["c10"] > 92 for ops in scores)
    for name, row in document["proxies"].items():
        if name in ("params", "flops", "log_numel"):
            continue
        values = [scores[ops][name] for ops in scores]
        seconds = [scores[ops].get(f"seconds.{name}") for ops in scores]
        for dataset, column in DATASETS.items():
            accuracy = [truth[ops][column] for ops in scores]
            found = search.rank_correlation(values, accuracy, resamples=0).value
            assert row[dataset]["spearman"]["value"] == pytest.approx(found, abs=2e-4)
            partial = search.partial_correlation(values, accuracy, size)
            assert row[dataset]["partial"]["value"] == pytest.approx(partial, abs=2e-4)
            low, high = row[dataset]["spearman"]["interval"]
            assert low < found < high
        if None not in seconds:
            assert row["seconds_mean"] == pytest.approx(statistics.fmean(seconds), abs=1e-3)


def test_fusion_was_fixed_on_one_half_and_read_on_the_other(document):
    scores, truth = rows(RESULTS / "nb201_scores.csv.gz"), rows(ROOT / "benchmarks/data/nb201_tss_accuracy.csv.gz")
    names = list(scores)
    fusion = document["fusion"]
    assert tuple(fusion["rule"]) == search.FUSION
    rest = names[1::2]
    columns = {name: np.array([scores[ops][name] for ops in rest]) for name in fusion["rule"]}
    for dataset, column in DATASETS.items():
        accuracy = [truth[ops][column] for ops in rest]
        found = search.rank_correlation(search.fuse(columns), accuracy, resamples=0).value
        assert fusion["rules"]["chosen"][dataset]["spearman"]["value"] == pytest.approx(found, abs=1e-3)
    assert fusion["rules"]["chosen"]["networks"] == len(rest)
    best = max(step["spearman_on_choosing_half"] for step in fusion["path"])
    shortest = next(s for s in fusion["path"] if s["spearman_on_choosing_half"] >= best - 0.003 - 1e-9)
    assert shortest["proxies"] == fusion["rule"]


def test_goals_are_reported_as_they_came_out(document):
    zico = document["proxies"]["zico"]
    low, high = zico["CIFAR-10"]["spearman"]["interval"]
    assert low <= 0.80 <= high
    assert zico["seconds_95"] <= 0.5
    chosen = document["fusion"]["rules"]["chosen"]
    assert chosen["CIFAR-10"]["spearman"]["value"] >= 0.88
    assert chosen["ImageNet16-120"]["spearman"]["value"] >= 0.85
    assert document["whole_table"]["log_numel"]["CIFAR-10"] == 0.7994


def test_page_quotes_the_results(document, page):
    for name, row in document["proxies"].items():
        values = [row[dataset]["spearman"]["value"] for dataset in DATASETS]
        cells = " | ".join(f"{value:.3f}" for value in values)
        low, high = row["CIFAR-10"]["spearman"]["interval"]
        assert f"| `{name}` | {values[0]:.3f} [{low:.3f}, {high:.3f}] | {cells.split(' | ', 1)[1]} |" in page
    for rule in document["fusion"]["rules"].values():
        for dataset in DATASETS:
            assert f"{rule[dataset]['spearman']['value']:.3f}" in page
    gain = document["equal_flops"]["fusion"]
    assert f"{gain['points']:+.2f} [{gain['interval'][0]:+.2f}, {gain['interval'][1]:+.2f}]" in page


def test_choices_within_levels_follow_from_the_scores_and_are_quoted(document, page):
    scores, truth = rows(RESULTS / "nb201_scores.csv.gz"), rows(ROOT / "benchmarks/data/nb201_tss_accuracy.csv.gz")
    for half, names in (("all", list(scores)), ("unseen", list(scores)[1::2])):
        levels = {}
        for ops in filter(NB201.connected, names):
            levels.setdefault(NB201.flops(ops), []).append(ops)
        picked = {}
        for level in (level for level in levels.values() if len(level) >= 10):
            fused = search.fuse({key: [scores[ops][key] for ops in level] for key in document["fusion"]["rule"]})
            picked[level[int(fused.argmax())]] = level
        for dataset, column in DATASETS.items():
            row = document["within_levels"][half][dataset]
            means = {best: statistics.fmean(truth[ops][column] for ops in level) for best, level in picked.items()}
            gains = [truth[best][column] - mean for best, mean in means.items()]
            assert row["points"] == pytest.approx(statistics.fmean(gains), abs=1e-3)
            assert (row["levels"], row["better_in"]) == (len(gains), sum(gain > 0 for gain in gains))
            low, high = row["interval"]
            assert low < row["points"] < high
            cell = f"{row['points']:+.2f} [{low:+.2f}, {high:+.2f}] | {row['better_in']} of {row['levels']} |"
            assert any(line.startswith(f"| {dataset} |") and cell in line for line in page.splitlines())


def test_winner_and_its_differences(page):
    path = RESULTS / "nas_winner.json"
    if not path.exists():
        pytest.skip("benchmarks are not here")
    document = json.loads(path.read_text())
    assert min(document["proposals_per_minute"].values()) >= 50_000
    for contest in document["budgets"].values():
        accuracy = contest["accuracy"]
        assert all(len(values) >= 5 for values in accuracy.values())
        assert len(set(contest["random"])) == len(accuracy["random"])
        for name, difference in contest["difference"].items():
            first, second = name.split(" - ")
            points = statistics.fmean(accuracy[first]) - statistics.fmean(accuracy[second])
            assert difference["points"] == pytest.approx(points, abs=1e-3)
            low, high = difference["interval"]
            assert low < points < high
            assert f"{difference['points']:+.2f} [{low:+.2f}, {high:+.2f}]" in page


def test_levels_are_pooled_as_they_were_measured(page):
    path = RESULTS / "nas_levels.json"
    if not path.exists():
        pytest.skip("benchmarks are not here")
    document = json.loads(path.read_text())
    found = document["levels"]
    assert len(found) == len({row["flops"] for row in found}) >= 8
    for row in found:
        assert row["winner"] not in row["random"]
        assert len(set(row["random"])) == len(row["accuracy"]["random"]) == 5
        assert len(row["accuracy"]["winner"]) == 2
        means = {name: statistics.fmean(values) for name, values in row["accuracy"].items()}
        assert f"| {means['random']:.2f} | " in page
        assert f"`{row['winner']}` {means['winner']:.2f} |" in page
    for name, pooled in document["pooled"].items():
        if name == "winner_above_median":
            continue
        first, second = name.split(" - ")
        gains = [statistics.fmean(row["accuracy"][first]) - statistics.fmean(row["accuracy"][second]) for row in found]
        assert pooled["points"] == pytest.approx(statistics.fmean(gains), abs=1e-3)
        assert (pooled["above_0"], pooled["levels"]) == (sum(gain > 0 for gain in gains), len(gains))
        low, high = pooled["interval"]
        half = t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
        assert (high - low) / 2 == pytest.approx(half, abs=1e-3)
        assert f"{pooled['points']:+.2f} [{low:+.2f}, {high:+.2f}]" in page


@pytest.mark.slow
def test_small_run_of_the_benchmark(tmp_path):
    if not (IMAGES / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not here")
    words = [
        "--images",
        str(IMAGES),
        "--count",
        "12",
        "--scores",
        str(tmp_path / "s.csv.gz"),
        "--json",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(
        [sys.executable, "benchmarks/search/nb201.py", *words], capture_output=True, text=True, cwd=ROOT, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "r").read_text())["networks"] == 12
