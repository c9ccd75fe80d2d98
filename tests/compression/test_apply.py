"""Carrying out a plan: cut, compensate, recalibrate, put on grids."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from eke.compression import apply, candidates
from eke.compression import solver as solver_room
from eke.compression.apply import Layout
from eke.compression.artifact import Blueprint, load, save
from eke.compression.candidates import Block, Decisions, Forms, Widths
from eke.compression.deploy import foldable
from eke.compression.lessons import collect
from eke.compression.recover import Recovery, recover_
from eke.compression.task import cross_entropy, forward
from eke.curvature import Curvature
from eke.sites import Surgery, channel_groups, find
from eke.solvers import reconstruct
from eke.structures import NM, Both, LowRank, UniformGrid, Unstructured

from .nets import Blocky, batches, outputs, same, samples, state, trained


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


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.zeros(nx, nf)), nn.Parameter(torch.zeros(nf))


STORED = {
    "linear": (nn.Linear(6, 5), lambda w: w),
    "conv2d": (nn.Conv2d(4, 5, (3, 2)), lambda w: w.flatten(1)),
    "transposed linear": (Conv1D(5, 6), lambda w: w.t()),
}


@pytest.mark.parametrize("kept", [{}, {0: (0, 2, 3)}, {1: (1, 3)}, {0: (1, 4), 1: (0, 2, 3)}, {0: (0,), 1: (2,)}])
@pytest.mark.parametrize("kind", STORED)
def test_rows_and_columns_that_stay_are_those_of_the_cut_tensor(kind, kept):
    layer, as_matrix = STORED[kind]
    (site,) = find(nn.Sequential(layer))
    surgery = Surgery({"0.weight": kept}, {"0.weight": tuple(layer.weight.shape)}) if kept else Surgery()
    numbers = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    left = numbers
    for dim, indices in kept.items():
        left = left[list(indices)] if dim == 0 else left[:, list(indices)]
    rows, columns = apply.stays(site, surgery)
    assert torch.equal(as_matrix(numbers)[rows][:, columns], as_matrix(left))
    assert apply.left_shape(site, surgery) == tuple(as_matrix(left).shape)


class Odd(nn.Module):
    """Depthwise, grouped and transposed convolutions between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.depth = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up, self.last = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.Conv2d(16, 16, 3, stride=4)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(self.depth(torch.relu(self.wide(x)))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def test_the_shape_that_is_left_is_that_of_the_cut_net():
    net = Odd().eval()
    x = samples(2, seed=0)[0]
    for group in channel_groups(net, x):
        surgery = group.cut(range(0, group.size, 3))
        cut = copy.deepcopy(net)
        surgery.apply_(cut)
        shapes = {site.name: site.shape for site in find(cut)}
        assert {site.name: apply.left_shape(site, surgery) for site in find(net)} == shapes


def test_structures_without_a_member_of_the_cut_shape_are_dropped():
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    (group,) = channel_groups(net, torch.zeros(1, 8))
    width = Widths(group, (12, 10, 4), tuple(range(12)), (0.0, 0.0, 0.0))
    structures = (None, UniformGrid(4), NM(2, 4), LowRank(5), LowRank(0.5))
    forms = tuple(Forms(site, structures, (0.0,) * 5) for site in find(net))
    decisions = Decisions((width,), forms)
    chosen = {}
    for option in range(3):
        for number, structure in enumerate(structures):
            picks = {width.choice: option, forms[1].choice: number}
            form = apply.blueprint(decisions, picks, Layout())
            chosen[width.kept[option], structure] = form.structures.get("2"), form.factored.get("2")
    assert all(chosen[kept, None] == (None, None) for kept in width.kept)
    assert all(chosen[kept, UniformGrid(4)] == (UniformGrid(4), None) for kept in width.kept)
    # Groups of four columns: 12 and 4 have them, 10 has not. A rank of 5 needs 5 columns.
    assert [chosen[kept, NM(2, 4)][0] for kept in width.kept] == [NM(2, 4), None, NM(2, 4)]
    assert [chosen[kept, LowRank(5)][1] for kept in width.kept] == [5, 5, None]
    # A share is one of what is left: of 6, 6 and 4.
    assert [chosen[kept, LowRank(0.5)][1] for kept in width.kept] == [3, 3, 2]
    for (kept, structure), (packed, rank) in chosen.items():
        picks = {width.choice: width.kept.index(kept), forms[1].choice: structures.index(structure)}
        small = apply.shaped(net, apply.blueprint(decisions, picks, Layout()))
        assert small(torch.zeros(1, 8)).shape == (1, 6)
        shapes = [tuple(p.shape) for name, p in small.named_parameters() if name.startswith("2") and p.ndim == 2]
        assert shapes == ([(rank, kept), (6, rank)] if rank else [(6, kept)])
        assert packed is None or packed.check((6, kept)) is None


@pytest.fixture(scope="module")
def blocky():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        net = Blocky()
        for images, _ in batches(128, seed=3):
            net(images)
    net.eval()
    data = batches(128, seed=1)
    sites = find(net)
    curvature = Curvature.estimate(net, cross_entropy, data, sites=sites)
    widths = candidates.channel_candidates(net, channel_groups(net, data[0][0]), sites, curvature)
    options = (None, UniformGrid(8), NM(2, 4), Both(Unstructured(0.5), UniformGrid(4)), LowRank(0.5, UniformGrid(6)),
               LowRank(3), UniformGrid(3, group=7))  # fmt: skip
    forms = tuple(Forms(site, options, (0.0,) * len(options)) for site in sites)
    return net, Decisions(tuple(widths), forms, (Block("second", "identity", 0.5),)), sites, curvature


PLAIN = Layout()


def composed(blocky, structures, *, solver=solver_room.quick, layout=PLAIN):
    """Draft a plan that cuts every group to a half, leaves a block out and gives matrices structures."""
    net, decisions, sites, curvature = blocky
    picks = {w.choice: len(w.kept) // 2 for w in decisions.widths} | {"block:second": 1}
    picks |= {f.choice: f.structures.index(structures.get(f.site.name)) for f in decisions.forms}
    return apply.draft(net, decisions, picks, sites=sites, curvature=curvature, solver=solver, layout=layout)


PLAN = {
    "stem": UniformGrid(8),
    "first.one": LowRank(0.5, UniformGrid(6)),
    "first.two": Both(Unstructured(0.5), UniformGrid(4)),
    "second.one": UniformGrid(3, group=7),
    "second.two": LowRank(3),
    "head": LowRank(3),
}


@pytest.mark.parametrize("solver", [solver_room.quick, lambda s, w, m: reconstruct(s, w, m, steps=5).weight])
def test_members_lie_in_their_structures_and_factors_have_the_planned_rank(blocky, solver):
    before = state(blocky[0])
    planned = composed(blocky, PLAN, solver=solver)
    assert same(before, state(blocky[0]))
    form = planned.blueprint
    assert form.removed == {"second": "identity"}
    kept = planned.net.first.one[1].weight.shape[0]
    assert kept < 32
    assert form.factored == {"first.one": min(kept, planned.net.stem.weight.shape[0] * 9) // 2, "head": 3}
    assert set(planned.members) == set(form.structures) == {"stem", "first.one.0", "first.one.1", "first.two"}
    for name, member in planned.members.items():
        assert member.shape == next(site.shape for site in find(planned.net) if site.name == name)
        torch.testing.assert_close(form.structures[name].project(member), member, rtol=1e-6, atol=1e-8)
    finished = planned.finished()
    for site in find(finished):
        if site.name in planned.members:
            assert torch.equal(site.read(finished), planned.members[site.name].float())
    # A draft is not touched by its finished copy: its matrices are still free.
    stem = next(site for site in find(planned.net) if site.name == "stem")
    assert not torch.equal(stem.read(planned.net), planned.members["stem"].float())
    with torch.no_grad():
        product = finished.head[1].weight @ finished.head[0].weight
    assert torch.linalg.matrix_rank(product) == 3
    assert outputs(finished).isfinite().all()


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_plan_of_channels_ranks_bits_and_a_removed_block_is_loaded_bit_for_bit(
    blocky, tmp_path, recover, memory_format
):
    net = blocky[0]
    folded = tuple(foldable(net, lambda m: m(samples(2, seed=0)[0])))
    assert {norm for _, norm in folded} == {"norm", *(f"{b}.norm{i}" for b in ("first", "second") for i in (1, 2))}
    planned = composed(blocky, PLAN, layout=Layout(folded, memory_format))
    small, form = planned.net, planned.blueprint
    if recover:
        lessons = collect(net, batches(64, seed=1), forward=forward)
        structures = apply.on_structures(small, form.structures)
        steps = Recovery(steps=6, batch_size=16)
        recover_(small, lessons, steps, forms=structures, members=planned.members, forward=forward)
    else:
        planned.finish_(small)
    apply.deploy_(small, form)
    save(tmp_path, small, form)
    torch.manual_seed(3)
    loaded = load(tmp_path, Blocky())
    assert same(state(loaded), state(small))
    assert torch.equal(outputs(loaded), outputs(small))
    assert repr(loaded.second) == "LeftOut(identity)"
    assert isinstance(loaded.first.norm1, nn.Identity)
    assert [tuple(p.shape) for p in loaded.first.one.parameters()] == [
        tuple(p.shape) for p in small.first.one.parameters()
    ]
    assert len(list(loaded.first.one.parameters())) == 3
    assert loaded.first.one[0].weight.stride() == small.first.one[0].weight.stride()
    again = Blueprint.from_json(json.loads(json.dumps(form.to_json())))
    assert again == form
