"""Carrying out a plan: cut, compensate, recalibrate, put on grids."""

from __future__ import annotations

import pytest
import torch

from eke.compression import apply, candidates
from eke.compression.apply import Layout
from eke.compression.artifact import Blueprint
from eke.compression.candidates import Decisions, Forms
from eke.compression.deploy import foldable
from eke.compression.lessons import collect
from eke.compression.task import cross_entropy, forward
from eke.curvature import Curvature
from eke.sites import Surgery, channel_groups, find
from eke.structures import UniformGrid

from .nets import batches, outputs, same, samples, state, trained


@pytest.fixture(scope="module")
def model():
    return trained(seed=7)


@pytest.fixture(scope="module")
def world(model):
    data = batches(192, seed=1)
    sites = find(model)
    curvature = Curvature.estimate(model, cross_entropy, data, sites=sites)
    widths = candidates.channel_candidates(model, channel_groups(model, data[0][0]), sites, curvature)
    return data, sites, curvature, widths


def halves(widths):
    return {w.choice: len(w.kept) // 2 for w in widths}


def test_a_plan_that_keeps_everything_changes_nothing(model, world):
    _, sites, curvature, widths = world
    decisions = Decisions(tuple(widths))
    net = apply.cut(model, decisions, {w.choice: 0 for w in widths}, sites=sites, curvature=curvature)
    assert same(state(net), state(model))
    assert decisions.surgery({}).slices == {}


def test_cutting_leaves_the_original_alone(model, world):
    _, sites, curvature, widths = world
    before = state(model)
    net = apply.cut(model, Decisions(tuple(widths)), halves(widths), sites=sites, curvature=curvature)
    assert same(state(model), before)
    for width in widths:
        kept = width.kept[halves(widths)[width.choice]]
        producer = net.get_submodule(width.group.producers[0].module_name)
        assert producer.weight.shape[0] == kept


def test_compensated_readers_answer_more_like_before_than_cut_ones(model, world):
    data, sites, curvature, widths = world
    width = next(w for w in widths if [m.module_name for m in w.group.consumers] == ["conv3"])
    picks = {width.choice: len(width.kept) // 2}
    decisions = Decisions((width,))
    compensated = apply.cut(model, decisions, picks, sites=sites, curvature=curvature)
    plain = apply.shaped(model, apply.blueprint(decisions, picks, Layout()))
    images = torch.cat([x for x, _ in data])

    def answer(net):
        seen = []
        handle = net.conv3.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.no_grad():
            net(images)
        handle.remove()
        return seen[0]

    wanted = answer(model)
    errors = [float((answer(net) - wanted).square().mean()) for net in (compensated, plain)]
    assert errors[0] < errors[1]
    assert errors[0] > 0


def test_recalibration_gives_the_statistics_of_the_data(model, world):
    data = world[0]
    net = trained(seed=7)
    with torch.no_grad():
        net.bn1.running_mean.add_(3)
    lessons = collect(model, data, forward=forward)
    apply.recalibrate_(net, lessons, forward=forward, batch_size=lessons.samples)
    images = torch.cat([x for x, _ in data])
    with torch.no_grad():
        response = net.conv1(images)
    torch.testing.assert_close(net.bn1.running_mean, response.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.bn1.running_var, response.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert net.bn1.momentum == 0.1
    assert not any(module.training for module in net.modules())


def test_recalibration_of_ragged_batches_uses_them_as_they_are(model):
    ragged = [(samples(5, seed=1)[0], samples(5, seed=1)[1]), (samples(7, seed=2)[0][:, :, :6], samples(7, seed=2)[1])]
    lessons = collect(model, ragged, forward=forward)
    net = trained(seed=7)
    apply.recalibrate_(net, lessons, forward=forward)
    assert not same(state(net), state(model))


def test_a_deployed_net_lies_on_its_grids_and_deploying_again_changes_nothing(model):
    net = trained(seed=7)
    x = samples(4, seed=3)[0]
    grids = {site.name: UniformGrid(4) for site in find(net)}
    pairs = tuple(foldable(net, lambda m: m(x)))
    apply.deploy_(net, Blueprint(Surgery(), pairs, "contiguous", grids))
    for site, grid in apply.on_structures(net, grids).values():
        matrix = site.read(net)
        assert torch.equal(grid.project(matrix), matrix)
    before = state(net)
    apply.deploy_(net, Blueprint(Surgery(), (), "contiguous", grids))
    assert same(state(net), before)


def test_folding_after_rounding_keeps_the_rounded_net(model):
    x = samples(4, seed=3)[0]
    rounded = trained(seed=7)
    grids = {site.name: UniformGrid(5) for site in find(rounded)}
    for site, grid in apply.on_structures(rounded, grids).values():
        site.write_(rounded, grid.project(site.read(rounded)))
    deployed = trained(seed=7)
    apply.deploy_(deployed, Blueprint(Surgery(), tuple(foldable(model, lambda m: m(x))), "channels_last", grids))
    torch.testing.assert_close(outputs(deployed), outputs(rounded), rtol=1e-3, atol=1e-3)


def test_only_structures_are_chosen_not_float(world):
    _, sites, _, _ = world
    forms = tuple(Forms(site, (None, UniformGrid(4)), (0.0, 0.0)) for site in sites)
    picks = {form.choice: number % 2 for number, form in enumerate(forms)}
    chosen = Decisions(forms=forms).structures(picks)
    assert set(chosen) == {form.site.name for number, form in enumerate(forms) if number % 2}
    assert set(apply.blueprint(Decisions(forms=forms), picks, Layout()).structures) == set(chosen)
