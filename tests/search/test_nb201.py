"""NAS-Bench-201 in closed form against its table, against built networks, and against gradients."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import math
import random
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from eke import cost, search
from eke.search.spaces import NB201

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "nb201_tss_accuracy.csv.gz"
SMALL = dataclasses.replace(NB201, resolution=8, channels=4, cells=1)


@pytest.fixture(scope="module")
def table():
    if not TABLE.exists():
        pytest.skip("benchmarks are not here")
    with gzip.open(TABLE, "rt") as file:
        return list(csv.DictReader(file))


def test_parameters_equal_the_table_for_all(table):
    assert len(table) == 15_625 == len({row["ops"] for row in table})
    assert all(NB201.parameters(row["ops"]) == round(1e6 * float(row["params_M"])) for row in table)


def test_disconnected_cells_are_exactly_those_at_chance(table):
    chance = {row["ops"] for row in table if float(row["c10"]) == 10.0}
    assert len(chance) == 341
    assert {row["ops"] for row in table if not NB201.connected(row["ops"])} == chance


def test_log_numel_ranks_the_whole_table(table):
    scores = [NB201.log_numel(row["ops"]) for row in table]
    for name, expected in (("c10", 0.7994), ("c100", 0.8007), ("in16", 0.7890)):
        found = spearmanr(scores, [float(row[name]) for row in table])[0]
        assert found == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("ops", ["dddddd", "aaaaaa", "ecbcbb", "abcded", "daaaab", "cdeabd"])
@pytest.mark.parametrize("resolution", [8, 15])
def test_closed_forms_equal_the_built_network(ops, resolution):
    space = dataclasses.replace(NB201, resolution=resolution, channels=4, cells=2, image_channels=1, classes=7)
    model = space.decode(ops)
    assert cost.parameters(model) == space.parameters(ops)
    assert cost.flops(model, space.example()) == space.flops(ops)
    assert cost.parameters(space.decode(ops, 3)) == space.parameters(ops, 3)
    assert model(space.example(2)).shape == (2, 7)


def test_table_sizes_are_those_of_the_paper():
    assert NB201.parameters("dddddd") == 1_531_546
    assert NB201.parameters("ecbcbb") == 129_306
    assert NB201.parameters("bbbbbb") == 73_306
    assert cost.parameters(NB201.decode("dddddd", classes=100)) == NB201.parameters("dddddd", classes=100)


def test_paths_against_enumeration():
    edges = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    rng = random.Random(0)
    for _ in range(300):
        ops = NB201.sample(rng)
        kept = {edge for edge, letter in zip(edges, ops) if letter != "a"}
        paths = [[(0, 3)], [(0, 1), (1, 3)], [(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]]
        alive = {edge for path in paths if set(path) <= kept for edge in path}
        assert NB201.connected(ops) == bool(alive)
        without = "".join(letter if edge in alive else "a" for edge, letter in zip(edges, ops))
        assert NB201.log_numel(ops) == NB201.log_numel(without)


def test_log_numel_is_that_of_layers_with_gradients():
    rng = random.Random(1)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 8, 8, generator=g), torch.arange(8)
    for ops in ["aaaaaa", "daaaca", "dbaaea", *(SMALL.sample(rng) for _ in range(8))]:
        model = SMALL.decode(ops)
        F.cross_entropy(model(x), y).backward()
        active = [p for p in model.parameters() if p.ndim > 1 and p.grad is not None and bool(p.grad.any())]
        expected = sum(math.log(p.numel()) for p in active)
        assert SMALL.log_numel(ops) == pytest.approx(expected, abs=1e-12)
        assert search.log_numel(model, SMALL.example()) == pytest.approx(expected, abs=1e-10)


def test_log_numel_without_an_input_counts_every_layer():
    assert search.log_numel(SMALL.decode("ddaaaa")) > search.log_numel(SMALL.decode("aaaaaa")) > 0
    assert search.log_numel(SMALL.decode("ddaaaa"), SMALL.example()) == 0


def test_mutation_changes_the_asked_number_of_edges_and_no_more():
    rng = random.Random(2)
    for changes in (1, 2, 6):
        for _ in range(50):
            parent = NB201.sample(rng)
            child = NB201.mutate(parent, rng, changes=changes)
            differ = sum(a != b for a, b in zip(parent, child))
            assert 1 <= differ <= changes


def test_space_says_what_is_wrong():
    for bad in ("ddd", "ddddddd", "dddxdd", 7):
        with pytest.raises(ValueError, match=r"six of the letters.*such as 'dddbdc'; got"):
            NB201.decode(bad)
    assert NB201.fault("dddddd") is None
    assert "no path from its input to its output" in NB201.fault("daaaaa")
    assert NB201.flops(NB201.smallest) == min(NB201.flops(ops) for ops in ("aaabaa", "aaacaa", "dddddd"))
    rebuilt = type(NB201)(**{key: value for key, value in NB201.settings().items() if key != "space"})
    assert rebuilt == NB201
