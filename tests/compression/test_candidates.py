"""Candidates: what may go, in which order, and what it is predicted to cost."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from eke.compression import candidates
from eke.compression import solver as solver_room
from eke.compression.task import cross_entropy
from eke.curvature import Curvature
from eke.linalg import Metric
from eke.sites import channel_groups, find
from eke.solvers import remove_columns, sweep
from eke.structures import NM, Both, LowRank, UniformGrid, Unstructured

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
    by_parameter = {site.parameter_name: site for site in sites}
    for width in widths:
        consumers = candidates.readers(width.group, by_parameter, model, curvature)
        count = width.group.size // 2

        def predicted(units, consumers=consumers):
            return sum(
                remove_columns(c.weight, c.a, c.blocks[torch.tensor(units)].flatten(), g=c.g).loss for c in consumers
            )

        assert predicted(width.order[:count]) < predicted(width.order[-count:])


def test_a_groups_predicted_loss_sums_over_its_readers(model, world, widths):
    sites, curvature, _ = world
    by_parameter = {site.parameter_name: site for site in sites}
    width = next(w for w in widths if len(w.group.consumers) > 1)
    consumers = candidates.readers(width.group, by_parameter, model, curvature)
    assert consumers is not None
    assert len(consumers) == len(width.group.consumers)


def test_a_group_with_an_unknown_reader_is_left_out(model, world):
    _, curvature, groups = world
    assert candidates.readers(groups[0], {}, model, curvature) is None
    assert candidates.channel_candidates(model, groups, [], curvature) == []


def test_fewer_bits_cost_more_and_float_costs_nothing(model, world):
    sites, curvature, _ = world
    proposed = candidates.form_candidates(model, sites, curvature, STRUCTURES[::-1])
    assert [form.site.name for form in proposed] == [site.name for site in sites]
    for form in proposed:
        assert form.structures == (None, *STRUCTURES)
        assert form.losses[0] == 0
        matrix = form.site.read(model)
        changes = [
            candidates.replaced(s, matrix, curvature, form.site, solver=solver_room.quick) - matrix for s in STRUCTURES
        ]
        curved = [curvature.quadratic(form.site.name, change) for change in changes]
        # The slope may favour one rounding by chance; the curvature always knows which is the stronger change.
        assert 0 < curved[0] < curved[1] < curved[2]
        slopes = [curvature.linear(form.site.name, change) for change in changes]
        wanted = [q + max(0.0, slope) for q, slope in zip(curved, slopes)]
        assert form.losses[1:] == pytest.approx(wanted, rel=1e-12)
        assert min(form.losses[1:]) > 0


def test_candidates_are_rebuilt_from_json(model, world, widths):
    sites, curvature, groups = world
    structures = (*STRUCTURES, Both(Unstructured(0.5), UniformGrid(4)), LowRank(0.25, UniformGrid(6)))
    forms = candidates.form_candidates(model, sites, curvature, structures, factorable=("conv2",))
    blocks = (candidates.Block("conv2", "zero", 0.25), candidates.Block("conv3", "identity", 0.5))
    decisions = candidates.Decisions(tuple(widths), tuple(forms), blocks)
    document = json.loads(json.dumps(candidates.to_json(decisions)))
    again = candidates.from_json(document, groups, sites, structures)
    assert [(w.choice, w.kept, w.order, w.losses) for w in again.widths] == [
        (w.choice, w.kept, w.order, w.losses) for w in widths
    ]
    assert again.forms == decisions.forms
    assert again.blocks == blocks
    assert again.losses == decisions.losses


def test_structures_run_from_most_to_fewest_bits_and_save_some(model, world):
    sites, curvature, _ = world
    given = (UniformGrid(3), LowRank(0.9), NM(2, 4), Unstructured(0.99), UniformGrid(8))
    proposed = candidates.form_candidates(model, sites, curvature, given, factorable=[site.name for site in sites])
    for form in proposed:
        assert form.structures[0] is None
        bits = [structure.bits(form.site.shape) for structure in form.structures[1:]]
        plain = 32 * form.site.shape[0] * form.site.shape[1]
        assert bits == sorted(bits, reverse=True)
        assert bits[0] < plain
        left_out = set(given) - set(form.structures)
        assert all(
            solver_room.fitting(s, form.site.shape) is None or s.bits(form.site.shape) >= plain for s in left_out
        )


def test_only_what_can_be_factored_is_offered_ranks(model, world):
    sites, curvature, _ = world
    proposed = candidates.form_candidates(
        model, sites, curvature, (UniformGrid(4), LowRank(0.25)), factorable=("conv2", "conv3")
    )
    assert {form.site.name for form in proposed if form.factored} == {"conv2", "conv3"}
    assert all(UniformGrid(4) in form.structures for form in proposed)


def test_a_solver_that_returns_nonsense_is_named_with_site_and_structure(model, world):
    sites, curvature, _ = world
    for wrong in (lambda s, w, m: w[:1], lambda s, w, m: torch.full_like(w, torch.nan)):
        with pytest.raises(
            ValueError,
            match=r"The solver returned \(\d+, \d+\) with \d+ values that are not finite for UniformGrid\(bits=4\) at "
            r"'conv1', a matrix \(16, 27\)",
        ):
            candidates.form_candidates(model, sites, curvature, (UniformGrid(4),), solver=wrong)


def test_losses_can_be_replaced_and_nothing_else_is(model, world, widths):
    sites, curvature, _ = world
    forms = candidates.form_candidates(model, sites, curvature, STRUCTURES)
    decisions = candidates.Decisions(tuple(widths), tuple(forms), (candidates.Block("conv2", "zero", 0.25),))
    doubled = decisions.with_losses({name: [2 * loss for loss in found] for name, found in decisions.losses.items()})
    assert doubled.losses == {name: tuple(2 * x for x in found) for name, found in decisions.losses.items()}
    assert [f.structures for f in doubled.forms] == [f.structures for f in decisions.forms]
    assert [w.order for w in doubled.widths] == [w.order for w in decisions.widths]
    assert doubled.blocks[0].kind == "zero"


def test_what_a_block_holds_is_not_replaced_when_it_is_left_out():
    net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.nn.Linear(4, 4))
    forms = tuple(candidates.Forms(site, (None, UniformGrid(4)), (0.0, 1.0)) for site in find(net))
    decisions = candidates.Decisions((), forms, (candidates.Block("0", "identity", 1.0),))
    picks = {form.choice: 1 for form in forms}
    assert set(decisions.structures(picks)) == {"0.0", "0.1", "1"}
    assert set(decisions.structures({**picks, "block:0": 1})) == {"1"}
    assert decisions.removed({**picks, "block:0": 1}) == {"0": "identity"}
    assert decisions.removed(picks) == {}
    assert decisions.block_of("0.1") == decisions.blocks[0]
    assert decisions.block_of("1") is None
    assert not decisions.blocks[0].holds("01")


def test_effort_is_spared_where_something_is_learned_and_for_large_models(world, monkeypatch):
    sites, _, _ = world
    assert solver_room.default_solver(sites, learns=True) is solver_room.quick
    assert solver_room.default_solver(sites, learns=False) is solver_room.careful
    work = sum(m * n * (m + n) for m, n in (site.shape for site in sites))
    monkeypatch.setattr(solver_room, "EFFORT", work - 1)
    assert solver_room.default_solver(sites, learns=False) is solver_room.quick


@pytest.mark.parametrize("structure", [Both(NM(2, 4), UniformGrid(4)), Unstructured(0.5)], ids=repr)
def test_wide_matrices_are_swept_and_compared_with_projection_on_some_rows(structure, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(64, 16) @ torch.randn(16, 16)
    weight, metric = torch.randn(8, 16), Metric(x.T @ x / 64, torch.eye(8))
    tried = sweep(structure, weight, metric, revisits=0).losses
    monkeypatch.setattr(solver_room, "WIDE", 15)
    found = solver_room.quick(structure, weight, metric)
    assert found.dtype == torch.float32
    torch.testing.assert_close(structure.project(found), found, rtol=0, atol=0)
    wanted = min(tried["sweep"], tried["weighted projection"])
    assert metric.loss((found - weight).double()) == pytest.approx(wanted, rel=1e-3)


def test_losses_of_widths_are_the_same_where_changes_are_taken_on_the_way(model, world, widths, monkeypatch):
    sites, curvature, groups = world
    monkeypatch.setattr(candidates, "MANY", 0)
    for one, other in zip(widths, candidates.channel_candidates(model, groups, sites, curvature)):
        assert one.order == other.order
        assert other.losses == pytest.approx(one.losses, rel=0.05)
