"""Laws of channel groups: proved, replayable, complete where the net allows it, and nothing of the user's changes."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn

from eke import sites
from eke.demo.network import Network

from . import nets


def images(channels, size):
    return (torch.randn(3, channels, size, size),)


LAYER_NORM = {"blocks.0.out": "LayerNorm averages over the channels"}

# model, inputs, {group: (units, members)}, {what stays whole: why}
NETS = {
    "demo": (
        Network,
        images(1, 28),
        {
            "stem.0": (32, 7),
            "blocks.0.conv1": (32, 3),
            "blocks.1.conv1": (64, 3),
            "blocks.1.conv2": (64, 6),
            "blocks.2.conv1": (128, 3),
            "blocks.2.conv2": (128, 5),
        },
        {},
    ),
    "flatten": (nets.Flat, images(3, 12), {"conv1": (6, 2), "conv2": (8, 2), "fc1": (10, 2)}, {}),
    "permuted flatten": (
        nets.PermutedFlat,
        images(3, 8),
        {"conv1": (6, 3), "conv2": (8, 3), "dense": (10, 3)},
        {},
    ),
    "u-net": (nets.UNet, images(2, 8), {"enter.0": (6, 4), "down.0": (10, 3), "up": (8, 2), "fuse": (7, 2)}, {}),
    "encoder": (nets.Encoder, images(3, 16), {"mlp.0": (24, 2)}, {"patch": "norm1: LayerNorm averages"}),
    "attention": (
        nets.Attention,
        (torch.randn(2, 5, 8),),
        {"out": (8, 2), "up": (12, 2)},
        {"query": r"\(with out, value, key\): the cut model does not run"},
    ),
    "lstm": (nets.Recurrent, (torch.randint(0, 11, (3, 5)),), {"lstm": (6, 3), "hidden": (9, 2)}, {}),
    "gru": (nets.Stacked, (torch.randint(0, 11, (3, 5)),), {"gru": (6, 13)}, {}),
    "gru cell": (
        nets.Decoder,
        (torch.randint(0, 11, (3, 5)),),
        {"encoder": (7, 3)},
        {"bridge": "GRUCell is kept whole", "cell": "hidden units: the cut model does not run"},
    ),
    "encoder's state": (nets.Translator, (torch.randint(0, 11, (3, 5)),), {"encoder": (6, 5)}, {}),
    "heads": (nets.Transformer, (torch.randn(2, 5, 8),), dict.fromkeys(("blocks.0", "blocks.1"), (4, 7)), LAYER_NORM),
    "grouped queries": (
        lambda: nets.Transformer(keys=2),
        (torch.randn(2, 5, 8),),
        dict.fromkeys(("blocks.0", "blocks.1"), (2, 7)),
        LAYER_NORM,
    ),
    "one head of keys": (
        lambda: nets.Transformer(keys=1),
        (torch.randn(2, 5, 8),),
        dict.fromkeys(("blocks.0", "blocks.1"), (4, 4)),
        LAYER_NORM,
    ),
    "heads fused by part": (
        lambda: nets.Transformer(fused="by part"),
        (torch.randn(2, 5, 8),),
        dict.fromkeys(("blocks.0", "blocks.1"), (4, 5)),
        LAYER_NORM,
    ),
    "heads fused by head": (
        lambda: nets.Transformer(fused="by head"),
        (torch.randn(2, 5, 8),),
        dict.fromkeys(("blocks.0", "blocks.1"), (4, 5)),
        LAYER_NORM,
    ),
    "group norm": (nets.Normed, images(3, 6), {"conv1": (4, 3)}, {"conv2": "norm2: LayerNorm averages"}),
    "squeeze-excite": (nets.SqueezeExcite, images(4, 6), {"expand.0": (12, 7), "squeeze": (5, 2)}, {}),
    "tied": (
        nets.Tied,
        (torch.randint(0, 11, (3, 5)),),
        {"up": (12, 2)},
        {"down": "head.weight is tied with embedding.weight"},
    ),
    "gated": (nets.Gated, images(3, 6), {"both": (8, 2)}, {}),
    "halves": (nets.Halves, images(3, 6), {"both": (8, 3)}, {}),
    "grouped": (
        nets.Grouped,
        images(3, 6),
        {"conv1": (4, 3), "conv3": (6, 2)},
        {},
    ),
    "custom": (
        nets.Custom,
        {"x": torch.randn(3, 6), "shift": torch.randn(7)},
        {"third": (9, 2)},
        {"first": "scale: Scale is kept whole"},
    ),
    "gpt-2 mlp": (nets.TransposedMLP, (torch.randn(2, 5, 8),), {"c_fc": (12, 2)}, {}),
    "batch norm 1d": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)),
        (torch.randn(3, 5),),
        {"0": (9, 3)},
        {},
    ),
}


def snapshot(model):
    state = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return state, [m.training for m in model.modules()], [p.grad for p in model.parameters()]


@pytest.fixture(params=NETS, ids=str, scope="module")
def case(request):
    make, inputs, expected, whole = NETS[request.param]
    torch.manual_seed(3)
    model = make().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = sites.channel_groups(model, inputs)
    return make, model, inputs, groups, [str(w.message) for w in caught], expected, whole


def run(model, inputs):
    with torch.no_grad():
        result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return torch.utils._pytree.tree_leaves(result)


def as_double(inputs):
    return torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)


def test_groups_are_found_and_the_rest_is_named_in_one_warning(case):
    _, _, _, groups, messages, expected, whole = case
    assert {group.name: (group.size, len(group.members)) for group in groups} == expected
    assert len(messages) == (1 if whole else 0)
    for name, why in whole.items():
        (line,) = [line for line in messages[0].splitlines() if line.startswith(f"  {name} ")]
        assert re.search(why, line), line


def test_cut_equals_masked_on_the_users_weights(case):
    """Independent of the proof: the user's own weights, sites' columns, another choice, all groups at once."""
    make, model, inputs, groups, *_ = case
    masked = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(11)
    keeps = [torch.randperm(g.size, generator=generator)[: max(1, g.size // 3)].sort().values.tolist() for g in groups]
    by_parameter = {site.parameter_name: site for site in sites.find(masked)}
    for group, keep in zip(groups, keeps, strict=True):
        dropped = group.dropped(keep)
        assert sorted([*keep, *dropped.tolist()]) == list(range(group.size))
        for member in group.consumers:
            site = by_parameter[member.parameter]
            matrix = site.read(masked)
            matrix[:, member.columns[dropped].flatten()] = 0
            site.write_(masked, matrix)
    surgery = sites.Surgery.merge(group.cut(keep) for group, keep in zip(groups, keeps, strict=True))
    surgery = sites.Surgery.from_json(json.loads(json.dumps(surgery.to_json())))
    cut = make().double().eval()
    cut.load_state_dict(copy.deepcopy(model).double().state_dict())
    before = sum(p.numel() for p in cut.parameters())
    surgery.apply_(cut)
    assert sum(p.numel() for p in cut.parameters()) < before
    double = as_double(inputs)
    for x, y in zip(run(cut, double), run(masked, double), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_the_users_model_and_random_state_are_untouched(case):
    make, _, inputs, *_ = case
    model = make().train()
    before, state = snapshot(model), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = sites.channel_groups(model, inputs)
    after = snapshot(model)
    assert torch.equal(state, torch.get_rng_state())
    assert after[1:] == before[1:]
    for name, (identity, tensor) in after[0].items():
        assert before[0][name][0] == identity
        assert torch.equal(before[0][name][1], tensor)
    assert [group.name for group in again] == [group.name for group in case[3]]


def test_flatten_and_concatenation_have_their_own_index_maps():
    flat = {group.name: group for group in sites.channel_groups(nets.Flat(), images(3, 12))}
    (consumer,) = flat["conv2"].consumers
    assert torch.equal(consumer.indices, torch.arange(72).reshape(8, 9))
    assert torch.equal(consumer.columns, consumer.indices)
    (consumer,) = flat["conv1"].consumers
    assert torch.equal(consumer.columns, torch.arange(54).reshape(6, 9))
    unet = {group.name: group for group in sites.channel_groups(nets.UNet(), images(2, 8))}
    skip = {member.module_name: member for member in unet["enter.0"].consumers}
    assert skip["fuse"].indices.flatten().tolist() == list(range(8, 14))
    assert [member.module_name for member in unet["up"].producers] == ["up"]
    assert unet["up"].modules == ("up", "fuse")
    both = sites.channel_groups(nets.SqueezeExcite(), images(4, 6))[0]
    assert {m.module_name: m.side for m in both.members}["depthwise.0"] == "both"


def test_whole_groups_of_a_group_norm_go_together():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (group,) = sites.channel_groups(nets.Normed(), images(3, 6))
    assert group.members[0].indices.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert group.cut([1, 3]).attributes["norm1"] == {"num_channels": 6, "num_groups": 2}


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        with torch.no_grad():
            return self.second(self.first(x))


class Refusing(Untraceable):
    def forward(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError("inference only")
        return self.second(self.first(x))


def test_models_that_autograd_cannot_follow_have_no_groups():
    assert sites.channel_groups(Untraceable(), torch.randn(2, 3)) == []
    with pytest.warns(
        UserWarning, match=r"Refusing: its operations could not be traced \(RuntimeError: inference only"
    ):
        assert sites.channel_groups(Refusing(), torch.randn(2, 3)) == []


def test_ignored_modules_stay_whole_in_silence(recwarn):
    model = Network()
    names = [group.name for group in sites.channel_groups(model, images(1, 28), ignore=["blocks.2", "stem.0"])]
    assert names == ["blocks.0.conv1", "blocks.1.conv1"]
    assert not recwarn.list


def test_inputs_may_be_a_tensor_a_sequence_or_a_mapping():
    x = images(3, 12)[0]
    names = [[g.name for g in sites.channel_groups(nets.Flat(), given)] for given in (x, (x,), [x], {"x": x})]
    assert names == [["conv1", "conv2", "fc1"]] * 4


def test_frozen_half_precision_and_wrapped_models_have_the_same_groups():
    model = nets.UNet().half().requires_grad_(False)
    groups = sites.channel_groups(nn.DataParallel(model), images(2, 8))
    assert [group.name for group in groups] == ["enter.0", "down.0", "up", "fuse"]
    group = groups[2]
    group.cut([0, 5]).apply_(model)
    assert model.up.weight.dtype is torch.float16
    assert not model.up.weight.requires_grad


def test_a_model_that_cached_activations_is_copied():
    model = nets.Flat()
    model.last = model(*images(3, 12))
    assert len(sites.channel_groups(model, images(3, 12))) == 3


@pytest.mark.parametrize("keep", [[], [0, 0], [6], [-1]], ids=str)
def test_units_that_do_not_exist_are_an_error(keep):
    group = sites.channel_groups(nets.Flat(), images(3, 12))[0]
    with pytest.raises(ValueError, match="'conv1' has units 0 to 5; keep must name at least one, each once"):
        group.cut(keep)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x) * 0


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("not me")


def test_what_cannot_be_proved_at_all_is_an_error():
    with pytest.raises(
        ValueError, match=r"No cut of this Flat can be proved: it does not run in float64 .*to have 3 channels"
    ):
        sites.channel_groups(nets.Flat(), images(4, 12))
    with pytest.raises(ValueError, match="No cut of this Constant can be proved: its outputs are constant"):
        sites.channel_groups(Constant(), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"deepcopy of this Uncopyable failed \(not me\)\. Make it copyable"):
        sites.channel_groups(Uncopyable(3, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"no module 'conv3' to ignore in this model\. Did you mean 'conv"):
        sites.channel_groups(nets.Flat(), images(3, 12), ignore=["conv3"])
    with pytest.raises(
        TypeError, match=r"must be a tensor, a sequence of positional arguments or a mapping .* got int"
    ):
        sites.channel_groups(nets.Flat(), 3)


REAL = {
    "resnet18": (64, 12),
    "mobilenet_v2": (64, 25),
    "densenet121": (64, 120),
    "efficientnet_b0": (64, 40),
    "vit_b_16": (224, 12),
    "regnet_x_400mf": (64, 27),
    "shufflenet_v2_x0_5": (64, 18),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Channels that stay whole")
@pytest.mark.parametrize("name", REAL)
def test_networks_of_torchvision_lose_more_than_half_a_group_and_still_agree(name):
    models = pytest.importorskip("torchvision.models")
    size, number = REAL[name]
    model = getattr(models, name)().eval()
    x = torch.randn(2, 3, size, size)
    groups = sites.channel_groups(model, x)
    assert len(groups) == number
    cut = copy.deepcopy(model)
    sites.Surgery.merge(group.cut(range(0, group.size, 2)) for group in groups).apply_(cut)
    assert cut(x).shape == model(x).shape
    assert sum(p.numel() for p in cut.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
