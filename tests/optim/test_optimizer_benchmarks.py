"""What the committed results of the optimizers' benchmarks say agrees with the runs they come from."""

import json
import math
import statistics
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def read(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip("benchmarks are not here")
    return json.loads(path.read_text())


def test_medians_are_those_of_the_runs_and_settings_those_of_a_trial():
    for name, work in read("optimizers")["workloads"].items():
        runs = work["runs"]
        for row in work["table"]:
            trials = [run for key, run in runs.items() if key.startswith(f"{row['optimizer']}, trial")]
            assert len(trials) == 8, (name, row["optimizer"])
            assert row["setting"] in [run["setting"] for run in trials]
            steps = [math.inf if value is None else value for value in row["steps_of_seeds"]]
            assert len(steps) == 3
            median = statistics.median(steps)
            assert row["steps"] == (median if math.isfinite(median) else None)
            if row["optimizer"] != "AdamW":
                finals = [runs[f"{row['optimizer']}, seed {seed}"] for seed in range(3)]
                assert row["steps_of_seeds"] == [run["steps_to_target"] for run in finals]
        adamw = [runs[f"AdamW, seed {seed}"]["curve"][work["mark"] // 10 - 1] for seed in range(3)]
        assert work["target"] == statistics.median(adamw)


def test_oracles_agree_and_operations_explain_steps():
    oracles = read("curvature_oracles")
    assert max(value for row in oracles["rows"].values() for value in row.values()) <= oracles["goal"] == 1e-6
    for rows in read("optimizer_steps")["batches"].values():
        assert rows["Adam"]["ratio"] == 1
        for row in rows.values():
            assert row["ratio_of_operations"] == pytest.approx(row["operations"] / rows["Adam"]["operations"])


NAMES = {"K-FAC": "K-FAC (eke's engine)", "Muon": "Muon (pytorch-optimizer 4.1)", "SOAP": "SOAP (pytorch-optimizer)",
         "ScheduleFree": "ScheduleFree AdamW (1.4.1)"}  # fmt: skip


def test_the_page_quotes_steps_seconds_and_costs_of_the_results():
    page = (RESULTS.parents[1] / "docs" / "benchmarks.md").read_text()
    works = read("optimizers")["workloads"]
    tables = [{row["optimizer"]: row for row in works[name]["table"]} for name in ("autoencoder", "cnn", "characters")]
    for name in set().union(*tables):
        cells = []
        for row in (table.get(name) for table in tables):
            if row is None:
                cells.append("not run")
            elif row["steps"] is None or row["reached"] < 2:
                cells.append(f"{row['reached']} of 3")
            else:
                each = ", ".join("never" if steps is None else str(steps) for steps in row["steps_of_seeds"])
                cells.append(f"{row['steps']} ({each}), {row['seconds']:.1f} s")
        assert f"| {NAMES.get(name, name)} | {' | '.join(cells)} |" in page
    for work in ("autoencoder", "cnn"):
        for name, milliseconds in works[work]["milliseconds_a_step"].items():
            assert name == "SGD" or f"{milliseconds:.1f}" in page
    steps = read("optimizer_steps")["batches"]
    for label in ("64 directions", "128 directions", "all directions"):
        row = steps["128"][f"ekfac, {label}"]
        cells = rf"{row['ratio']:.2f}", f"{row['ratio_of_operations']:.2f}"
        assert any(all(cell in line for cell in cells) for line in page.splitlines() if line.startswith("| EKFAC, "))
    assert f"EKFAC-ra **{steps['1024']['ekfac_ra, 64 directions']['ratio']:.2f}** by default" in page
