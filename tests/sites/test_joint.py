"""Laws of joint proofs: what is refused among many is what is refused alone, and no group hides behind others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from eke import sites
from eke.sites.channels import ChannelGroup, Member, axes_of
from eke.sites.groups import prove_jointly
from eke.sites.joint import Joint, separating_codes
from eke.sites.proof import Bench, double_copy, prepare, random_keep, run

WIDTH, LAYERS = 8, 13


class Deep(nn.Module):
    """Hidden layers with normalisation, one after another."""

    def __init__(self, widths=(WIDTH,) * LAYERS):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((5, *widths)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[:-1])
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        for layer, norm in zip(self.layers, self.norms):
            x = torch.tanh(norm(layer(x)))
        return self.layers[-1](x)


class Parallel(nn.Module):
    """Sixty hidden layers side by side."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, WIDTH) for _ in range(60))
        self.readers = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(60))
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return sum(reader(torch.tanh(layer(x))) for layer, reader in zip(self.layers, self.readers))


class Chunked(nn.Module):
    """Two layers whose channels fit the halves that are read only if both lose as many; ten others after them."""

    def __init__(self, width):
        super().__init__()
        self.left, self.right = nn.Linear(5, width), nn.Linear(5, width)
        self.first, self.second = nn.Linear(width, 5), nn.Linear(width, 5)
        self.deep = Deep((WIDTH,) * 11)

    def forward(self, x):
        first, second = torch.tanh(torch.cat([self.left(x), self.right(x)], -1)).chunk(2, -1)
        return self.deep(self.first(first) - self.second(second))


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def bench_of(model):
    torch.manual_seed(0)
    return prepare(double_copy(model), (torch.randn(4, 5),))


def one_of(model, name, *sides):
    members = []
    for module_name, side in sides:
        module = model.get_submodule(module_name)
        axes = axes_of(module, side)
        size = module._parameters[axes.tensors[0][0]].shape[axes.tensors[0][1]]
        members.append(Member.of(module, module_name, torch.arange(size)[:, None], axes))
    return ChannelGroup(name, len(members[0].indices), tuple(members))


def deep_groups(model, prefix=""):
    return [
        one_of(
            model, f"{prefix}{i}", (f"{prefix}layers.{i}", "out"), (f"{prefix}norms.{i}", "out"),
            (f"{prefix}layers.{i + 1}", "in"),
        )
        for i in range(len(model.get_submodule(f"{prefix}norms")))
    ]  # fmt: skip


def parallel_groups(model):
    return [one_of(model, str(i), (f"layers.{i}", "out"), (f"readers.{i}", "in")) for i in range(60)]


def with_member(group, i, indices):
    members = list(group.members)
    members[i] = replace(members[i], indices=indices)
    return replace(group, members=tuple(members))


def rolled(i):
    return lambda group: with_member(group, i, group.members[i].indices.roll(1, dims=0))


def without(i):
    return lambda group: replace(group, members=group.members[:i] + group.members[i + 1 :])


ERRORS = {
    "rows off by one": rolled(0),
    "normalisation off by one": rolled(1),
    "columns off by one": rolled(2),
    "columns backwards": lambda group: with_member(group, 2, group.members[2].indices.flip(0)),
    "columns beyond": lambda group: with_member(group, 2, group.members[2].indices + 3),
    "no normalisation": without(1),
    "no reader": without(2),
}


@pytest.fixture(scope="module")
def deep():
    return bench_of(Deep())


def test_right_groups_are_proved_in_fewer_passes_than_groups():
    bench = bench_of(Parallel())
    groups = parallel_groups(bench.model)
    joint = Joint(bench, generator())
    before = bench.model.passes
    assert joint.prove(groups) == [""] * 60
    assert joint.separate() == []
    assert bench.model.passes - before < 30


@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("error", ERRORS)
def test_exactly_the_wrong_group_among_right_ones_is_refused(deep, error, place):
    groups = deep_groups(deep.model)
    groups[place] = ERRORS[error](groups[place])
    joint = Joint(deep, generator())
    reasons = joint.prove(groups)
    late = [group for group, _ in joint.separate()]
    refused = [i for i, (group, reason) in enumerate(zip(groups, reasons)) if reason or group in late]
    assert refused == [place]


def test_several_wrong_groups_cost_few_passes_more():
    bench = bench_of(Parallel())
    groups = parallel_groups(bench.model)
    for place in (7, 40):
        groups[place] = rolled(1)(groups[place])
    joint = Joint(bench, generator())
    before = bench.model.passes
    reasons = joint.prove(groups)
    assert joint.separate() == []
    assert [i for i, reason in enumerate(reasons) if reason] == [7, 40]
    assert all(reasons[i].startswith("the cut model differs from the masked one by ") for i in (7, 40))
    assert bench.model.passes - before < 100


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_group_cannot_hide_above_what_others_mask(seed):
    bench = bench_of(Deep((*[WIDTH] * 9, 2, WIDTH, WIDTH, WIDTH)))
    with torch.no_grad():
        bench.model.layers[10].weight[:, 1] = 0  # unit 1 of group 9 carries nothing
    bench = Bench(bench.model, bench.inputs, run(bench.model, bench.inputs), 0)
    groups = deep_groups(bench.model)
    groups[3] = rolled(2)(groups[3])
    choices = [(group, random_keep(group, generator(seed))) for group in groups]
    choices[9] = (groups[9], [1])
    assert bench.failure(choices) == ""  # the trap: together nothing is wrong
    joint = Joint(bench, generator(seed))
    reasons = joint.prove(groups)
    late = [group for group, _ in joint.separate()]
    assert reasons[3] or groups[3] in late
    assert not any(reason for i, reason in enumerate(reasons) if i not in (3, 9))
    assert set(late) <= {groups[3]}


@pytest.mark.parametrize("width", [2, 8])
@pytest.mark.parametrize("seed", range(4))
def test_groups_that_only_hold_in_company_are_refused(seed, width):
    bench = bench_of(Chunked(width))
    coupled = [
        one_of(bench.model, "left", ("left", "out"), ("first", "in")),
        one_of(bench.model, "right", ("right", "out"), ("second", "in")),
    ]
    others = deep_groups(bench.model, "deep.")
    half = range(width // 2)
    assert bench.failure([(group, half) for group in coupled]) == ""  # the trap: they fit each other
    joint = Joint(bench, generator(seed))
    reasons = joint.prove([*coupled, *others])
    late = [group for group, _ in joint.separate()]
    refused = [group.name for group, reason in zip(coupled, reasons) if reason or group in late]
    assert refused == ["left", "right"] if width > 2 else ["left"]  # chunk cuts three channels into two and one
    assert not any(reasons[2:])
    assert set(late) <= set(coupled)


def test_a_group_without_effect_is_refused_among_others(deep):
    groups = deep_groups(deep.model)
    layer = deep.model.layers[5]
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()  # all before it is dead, whatever is masked
    try:
        dead = Bench(deep.model, deep.inputs, run(deep.model, deep.inputs), 0)
        reasons = Joint(dead, generator()).prove(groups)
    finally:
        with torch.no_grad():
            layer.weight.copy_(kept)
    assert [i for i, reason in enumerate(reasons) if reason] == [0, 1, 2, 3, 4]
    assert set(reasons[:5]) == {"cutting has no visible effect on the outputs, so it cannot be proved"}


def test_models_that_run_without_gradients_only_are_proved_one_by_one(deep):
    class Locked(Deep):
        def forward(self, x):
            if torch.is_grad_enabled():
                raise RuntimeError("inference only")
            return super().forward(x)

    bench = bench_of(Locked())
    groups = deep_groups(bench.model)
    groups[4] = rolled(2)(groups[4])
    joint = Joint(bench, generator())
    assert [i for i, reason in enumerate(joint.prove(groups)) if reason] == [4]
    assert joint.separate() == []


def test_the_bench_is_as_before_after_joint_proofs(deep):
    before = {name: (id(p), p.requires_grad, p.grad) for name, p in deep.model.named_parameters()}
    state = torch.get_rng_state()
    joint = Joint(deep, generator())
    joint.prove(deep_groups(deep.model))
    joint.separate()
    assert {name: (id(p), p.requires_grad, p.grad) for name, p in deep.model.named_parameters()} == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7, 20, 37, 71])
def test_of_any_two_each_is_once_without_the_other(number):
    codes = [set(code) for code in separating_codes(number, generator())]
    assert len(codes) == number
    assert all(one - other for one, other in itertools.permutations(codes, 2))


def test_the_last_joint_cut_leaves_out_every_offender(deep):
    groups = deep_groups(deep.model)
    for place in (2, 9, 10):
        groups[place] = rolled(2)(groups[place])
    kept, failures = prove_jointly(deep, groups, generator())
    assert sorted(name for name, _, _ in failures) == ["10", "2", "9"]
    assert [group.name for group in kept] == [str(i) for i in range(12) if i not in (2, 9, 10)]
    assert all(
        reason.startswith("together with the groups before it, the cut model differs") for *_, reason in failures
    )


def test_a_bench_in_single_precision_is_a_copy_with_the_same_outputs(deep):
    single = deep.single()
    assert {t.dtype for t in single.model.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert {t.dtype for t in deep.model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    torch.testing.assert_close(single.outputs[0], deep.outputs[0], rtol=1e-4, atol=1e-4)

    class Precise(nn.Linear):
        def forward(self, x):
            return super().forward(x.double())

    bench = bench_of(Precise(5, 3))
    assert bench.single() is bench


def test_channel_groups_of_a_deep_net_are_all_found():
    assert len(sites.channel_groups(Deep(), torch.randn(2, 5))) == 12
