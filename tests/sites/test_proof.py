"""Laws of the proof: right cuts pass, every wrong index map fails, a vacuous comparison is no proof."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from eke import sites
from eke.sites.channels import NotCuttableError, axes_of
from eke.sites.groups import prove_jointly
from eke.sites.proof import cut, double_copy, masked, prepare, random_keep, random_like, randomize_

from . import nets

NETS = {
    "flat": (nets.Flat, (3, 12)),
    "u-net": (nets.UNet, (2, 8)),
    "squeeze-excite": (nets.SqueezeExcite, (4, 6)),
    "gated": (nets.Gated, (3, 6)),
}


@pytest.fixture(params=NETS, ids=str, scope="module")
def proof(request):
    make, (channels, size) = NETS[request.param]
    torch.manual_seed(0)
    model, inputs = make(), (torch.randn(2, channels, size, size),)
    return prepare(double_copy(model), inputs), sites.channel_groups(model, inputs)


def generator():
    return torch.Generator().manual_seed(5)


def with_member(group, i, indices):
    members = list(group.members)
    members[i] = replace(members[i], indices=indices)
    return replace(group, members=tuple(members))


def test_right_groups_pass(proof):
    bench, groups = proof
    assert all(bench.prove([group], generator()) == "" for group in groups)
    assert bench.prove(groups, generator()) == ""


def test_a_shifted_index_map_of_any_member_is_rejected(proof):
    bench, groups = proof
    for group in groups:
        for i, member in enumerate(group.members):
            wrong = with_member(group, i, member.indices.roll(1, dims=0))
            assert bench.prove([wrong], generator()), f"{group.name}: {member.module_name} {member.side}"


def test_indices_beyond_a_tensor_are_rejected_with_its_module(proof):
    bench, groups = proof
    for group in groups:
        for i, member in enumerate(group.members):
            beyond = with_member(group, i, member.indices + member.shapes[0][member.axes.tensors[0][1]])
            reason = bench.prove([beyond], generator())
            assert reason == f"its channels could not be followed into {member.module_name}"


def test_two_swapped_channels_of_a_consumer_are_rejected(proof):
    bench, groups = proof
    for group in groups:
        i = next(i for i, member in enumerate(group.members) if member.side == "in")
        order = torch.arange(group.size)
        order[[0, 1]] = order[[1, 0]]
        wrong = with_member(group, i, group.members[i].indices[order])
        keep = [0, *range(2, group.size, 2)]  # keeps one of the two
        assert bench.failure([(group, keep)]) == ""
        assert bench.failure([(wrong, keep)]).startswith("the cut model differs from the masked one by ")


def test_a_forgotten_member_is_rejected(proof):
    bench, groups = proof
    for group in groups:
        for i in range(len(group.members)):
            wrong = replace(group, members=group.members[:i] + group.members[i + 1 :])
            assert bench.prove([wrong], generator())


def test_the_bench_is_put_back_after_every_cut(proof):
    bench, groups = proof
    before = {name: (id(t), t.clone()) for name, t in bench.model.state_dict(keep_vars=True).items()}
    attributes = repr(bench.model)
    for context in (cut, masked):
        for choice in [(group, random_keep(group, generator())) for group in groups]:
            with context(bench.model, [choice]):
                assert any(id(t) != before[name][0] for name, t in bench.model.state_dict(keep_vars=True).items())
            with pytest.raises(KeyError), context(bench.model, [choice]):
                raise KeyError
    assert repr(bench.model) == attributes
    for name, tensor in bench.model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_the_joint_proof_names_the_offender():
    inputs = (torch.randn(2, 3, 12, 12),)
    model = nets.Flat()
    groups = sites.channel_groups(model, inputs)
    wrong = with_member(groups[1], 1, groups[1].members[1].indices.roll(1, dims=0))
    bench = prepare(double_copy(model), inputs)
    kept, failures = prove_jointly(bench, [groups[0], wrong, groups[2]], generator())
    assert [group.name for group in kept] == ["conv1", "fc1"]
    ((name, modules, reason),) = failures
    assert (name, modules) == ("conv2", ("conv2", "fc1"))
    assert reason.startswith("together with the groups before it, the cut model differs")


class Blind(nn.Module):
    """The second layer's result never reaches the output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) + self.second(self.first(x)).mean() * 0


def test_a_mask_without_effect_proves_nothing():
    with pytest.warns(UserWarning, match=r"first \(with second\): cutting has no visible effect on the outputs"):
        assert sites.channel_groups(Blind(), torch.randn(2, 3)) == []


def test_random_weights_leave_no_path_dead_or_trivial():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(4))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    net = double_copy(net)
    randomize_(net, generator(), gain=1.0)
    tensors = [t for t in net.state_dict().values() if t.is_floating_point()]
    assert all(t.abs().min() > 0 and t.flatten().unique().numel() == t.numel() for t in tensors)
    assert (net[1].running_var >= 0.5).all()
    again = copy.deepcopy(net)
    randomize_(again, generator(), gain=1.0)
    same = again.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in net.state_dict().items())


def test_random_inputs_have_the_shape_and_the_values_that_occur():
    tokens = torch.tensor([[5, 7, 7], [9, 5, 1], [2, 2, 2]])
    inputs = {"image": torch.zeros(4, 3, 100, 80), "tokens": tokens, "mask": tokens > 5, "flag": None}
    drawn = random_like(inputs, generator())
    assert drawn["image"].shape == (4, 3, 100, 80)
    assert drawn["image"].dtype is torch.float64
    assert drawn["image"].std() > 0.9
    assert drawn["tokens"].flatten().sort().values.tolist() == tokens.flatten().sort().values.tolist()
    assert torch.equal(drawn["mask"], inputs["mask"])
    assert drawn["flag"] is None
    small = random_like(inputs, generator(), samples=2, image_size=32)
    assert small["image"].shape == (2, 3, 32, 32)
    assert small["tokens"].shape == (2, 3)


def test_layers_that_cannot_be_cut_say_why():
    cases = {
        "the weight of this ParametrizedLinear is parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "GroupNorm in 2 groups without weights": nn.GroupNorm(2, 4, affine=False),
        "RMSNorm is kept whole": nn.RMSNorm(4),
        "convolution in 2 groups of 2 inputs and 3 outputs": nn.Conv2d(4, 6, 1, groups=2),
    }
    for reason, module in cases.items():
        with pytest.raises(NotCuttableError, match=reason):
            axes_of(module, "out")


def test_parametrized_layers_are_followed_by_nobody():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), normed, nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match=r"0 \(with 4, 2\): 2: the weight of this ParametrizedLinear is parametrized"):
        names = [group.name for group in sites.channel_groups(model, torch.randn(2, 3))]
    assert names == ["4"]
