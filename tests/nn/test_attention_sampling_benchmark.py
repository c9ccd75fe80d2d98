"""The benchmark on megapixel images: a small run, and what the page says of the committed results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results():
    document = json.loads((ROOT / "benchmarks" / "results" / "mega_images.json").read_text())
    assert document["smoke"] is False
    return document


def section():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    return page.split("## Megapixel images\n")[1].split("\n## ")[0]


def test_page_shows_the_accuracies(results):
    text = section()
    for name, rows in results["tasks"].items():
        for method, runs in rows.items():
            for run in runs:
                shown = f"| {name} | {method} | {len(run['loss'])} | {100 * run['accuracy']:.1f} |"
                assert shown in text, shown


def test_page_shows_the_costs(results):
    text = section()
    whole = results["costs"]["whole image"]
    for method, row in results["costs"].items():
        kinds = ("training", "inference")
        times = [f"{1e3 * row[f'{kind}_seconds']:.0f}" for kind in kinds]
        sizes = [f"{row[f'{kind}_bytes'] / 1e6:.0f}" for kind in kinds]
        assert f"| {method} | {times[0]} | {times[1]} | {sizes[0]} | {sizes[1]} |" in text
    sampled = results["costs"]["sampling, murthy"]
    assert whole["training_seconds"] > 8 * sampled["training_seconds"]
    assert whole["training_bytes"] > 10 * sampled["training_bytes"]


def test_memory_does_not_grow_with_the_image(results):
    sizes = results["memory_map_bytes"]
    assert set(sizes) == {"1500", "3000", "8000"}
    found = re.search(r"([\d.]+), ([\d.]+) and ([\d.]+) MB", section())
    assert [f"{sizes[key] / 1e6:.1f}" for key in ("1500", "3000", "8000")] == list(found.groups())


@pytest.mark.slow
def test_a_small_run(tmp_path):
    target = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/mega_images.py", "--smoke", "--only", "costs", "--json", str(target)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    costs = json.loads(target.read_text())["costs"]
    assert costs["whole image"]["training_bytes"] > costs["sampling, murthy"]["training_bytes"]
