"""Candidates: what may go, in which order, and what it is predicted to cost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from eke.compression import candidates
from eke.compression.task import cross_entropy
from eke.curvature import Curvature
from eke.sites import channel_groups, find
from eke.solvers import remove_columns
from eke.structures import UniformGrid

from .nets import batches, trained

STRUCTURES = (UniformGrid(8), UniformGrid(4), UniformGrid(2))


@pytest.fixture(scope="module")
def model():
    return trained(seed=3).double()


@pytest.fixture(scope="module")
def world(model):
    data = [(images.double(), labels) for images, labels in batches(128, seed=4)]
    sites = find(model)
    curvature = Curvature.estimate(model, cross_entropy, data, sites=sites)
    groups = channel_groups(model, data[0][0])
    return sites, curvature, groups


@pytest.fixture(scope="module")
def widths(model, world):
    sites, curvature, groups = world
    return candidates.channel_candidates(model, groups, sites, curvature)


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (2, (2, 1)),
        (3, (3, 2, 1)),
        (8, (8, 6, 4, 2)),
        (32, (32, 24, 16, 8)),
        (64, (64, 56, 48, 40, 32, 24, 16, 8)),
    ],
)
def test_kept_counts_fall_from_all_to_few(size, kept):
    assert candidates.kept_counts(size) == kept


@pytest.mark.parametrize("size", [2, 5, 7, 24, 100, 128, 1000])
def test_kept_counts_are_multiples_of_registers_and_never_zero(size):
    first, *rest = candidates.kept_counts(size)
    assert first == size
    assert all(0 < count < size for count in rest)
    assert rest == sorted(set(rest), reverse=True)
    if size >= 32:
        assert all(count % 8 == 0 for count in rest)


def test_every_group_of_the_net_has_candidates(widths, world):
    assert {w.group.name for w in widths} == {group.name for group in world[2]}


def test_options_keep_nested_sets_of_units(widths):
    for width in widths:
        sets = [set(width.keep(option)) for option in range(len(width.kept))]
        assert [len(s) for s in sets] == list(width.kept)
        assert all(small < large for large, small in pairwise(sets))
        assert sets[0] == set(range(width.group.size))


def test_losses_start_at_zero_and_rise_as_channels_go(widths):
    for width in widths:
        assert width.losses[0] == 0
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(width.losses))


def test_the_units_that_go_first_are_predicted_to_hurt_less_than_those_that_stay(model, world, widths):
    sites, curvature, _ = world
    by_module = {site.module_name: site for site in sites}
    for width in widths:
        consumers = candidates.readers(width.group, by_module, model, curvature)
        count = width.group.size // 2

        def predicted(units, consumers=consumers):
            return sum(
                remove_columns(c.weight, c.a, c.blocks[torch.tensor(units)].flatten(), g=c.g).loss for c in consumers
            )

        assert predicted(width.order[:count]) < predicted(width.order[-count:])


def test_a_groups_predicted_loss_sums_over_its_readers(model, world, widths):
    sites, curvature, _ = world
    by_module = {site.module_name: site for site in sites}
    width = next(w for w in widths if len(w.group.consumers) > 1)
    consumers = candidates.readers(width.group, by_module, model, curvature)
    assert consumers is not None
    assert len(consumers) == len(width.group.consumers)


def test_a_group_with_an_unknown_reader_is_left_out(model, world):
    _, curvature, groups = world
    assert candidates.readers(groups[0], {}, model, curvature) is None
    assert candidates.channel_candidates(model, groups, [], curvature) == []


def test_fewer_bits_cost_more_and_float_costs_nothing(model, world):
    sites, curvature, _ = world
    proposed = candidates.grid_candidates(model, sites, curvature, STRUCTURES)
    assert [g.site.name for g in proposed] == [site.name for site in sites]
    for grid in proposed:
        assert grid.structures == (*STRUCTURES, None)
        assert grid.losses[-1] == 0
        assert 0 <= grid.losses[0] < grid.losses[1] < grid.losses[2]


def test_candidates_are_rebuilt_from_json(model, world, widths):
    sites, curvature, groups = world
    grids = candidates.grid_candidates(model, sites, curvature, STRUCTURES)
    document = json.loads(json.dumps(candidates.to_json(widths, grids)))
    again, grids_again = candidates.from_json(document, groups, sites, STRUCTURES)
    assert [(w.choice, w.kept, w.order, w.losses) for w in again] == [
        (w.choice, w.kept, w.order, w.losses) for w in widths
    ]
    assert grids_again == grids
