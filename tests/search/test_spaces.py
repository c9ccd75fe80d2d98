"""Closed forms of every space against built networks; the rules of mutation; choices in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch
from torch import nn

from eke import cost
from eke.search.spaces import SPACES, Choices, MobileNet, NasBench201, TimmResNet, TimmViT
from eke.search.spaces.mobile import FACTORS, START, Block, Network, network
from eke.search.spaces.space import Space, plain

MEMBERS = [
    NasBench201(resolution=8, channels=4, cells=1),
    MobileNet(resolution=30, classes=7),
    MobileNet(resolution=16, classes=3, stem_stride=1, strides=(1, 2, 2)),
    TimmResNet(classes=5, resolution=33, widths=(4, 8), depths=(1, 2)),
    TimmResNet(classes=5, resolution=32, widths=(4, 8), depths=(1, 2), bottleneck=True),
    TimmViT(classes=5, resolution=16, patch=4, heads=(1, 2), depths=(1, 2), head_width=8, image_channels=1),
]


def perceptron(width, depth):
    layers = [nn.Linear(6, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def own():
    return Choices({"width": (4, 8, 16), "depth": (1, 2)}, perceptron, torch.randn(5, 6))


@pytest.mark.parametrize("space", [*MEMBERS, own()], ids=lambda s: s.name)
def test_closed_forms_equal_the_built_network(space):
    pytest.importorskip("timm")
    rng = random.Random(0)
    for architecture in (space.smallest, space.sample(rng), space.mutate(space.sample(rng), rng)):
        model = space.decode(architecture)
        assert cost.parameters(model) == space.parameters(architecture)
        assert cost.flops(model, space.example(1)) == space.flops(architecture)
        assert model(space.example(2)).shape[0] == 2


@pytest.mark.parametrize("space", [*MEMBERS, own()], ids=lambda s: s.name)
def test_architectures_survive_json_and_are_composed_from_their_choices(space):
    rng = random.Random(1)
    for _ in range(20):
        architecture = space.sample(rng)
        again = plain(json.loads(json.dumps(architecture)))
        assert again == architecture
        assert hash(again) == hash(architecture)
        assert space.flops(again) == space.flops(architecture) >= space.flops(space.smallest)
        assert isinstance(space.describe(again), str)
        if not isinstance(space, MobileNet):
            made = space.choices(architecture)
            assert space.compose(lambda name, _, made=made: made[name]) == architecture


@pytest.mark.parametrize("space", MEMBERS, ids=lambda s: s.name)
def test_settings_make_the_space_again(space):
    data = json.loads(json.dumps(space.settings()))
    kind = SPACES[data.pop("space")]
    assert kind(**{name: plain(value) for name, value in data.items()}) == space


def test_network_of_the_paper_has_its_flops():
    """The published network for 450M multiply-adds, without the shortcuts' projections and squeeze-and-excitation."""
    rows = [(1, 7, 40, 2, 40, 1), (2, 7, 80, 2, 64, 1), (4, 7, 96, 2, 96, 5), (2, 7, 224, 2, 224, 5)]
    published = Network(16, tuple(Block(*row) for row in rows), 2048)
    assert 0.9 * 450e6 < MobileNet().flops(published) / 2 < 450e6
    assert MobileNet().fault(published) is None


def test_mobile_mutation_follows_the_rules():
    space, rng = MobileNet(), random.Random(0)
    widths = {w: {max(8, round(w * f / 8) * 8) for f in FACTORS} for w in (8, 32, 48, 96, 128)}
    for _ in range(300):
        child = space.mutate(START, rng, changes=2)
        assert child.head == 2048
        assert child.stem in widths[8]
        changed = sum(a != b for a, b in zip(START.blocks, child.blocks))
        assert changed + (child.stem != 8) <= 2
        for before, after in zip(START.blocks, child.blocks):
            assert after.out in widths[before.out]
            assert after.stride == before.stride
            assert 1 <= after.layers <= 3
    deep = START._replace(blocks=(START.blocks[0]._replace(layers=6), *START.blocks[1:]))
    for _ in range(100):
        child = space.mutate(deep, rng, changes=1)
        assert all(block.layers < 6 for block in child.blocks)
        if len(child.blocks) == 5:
            assert child.blocks[0].layers == 3
            assert child.blocks[1].stride == 1
            assert child.blocks[0].stride == 2


def test_too_deep_networks_are_named():
    blocks = tuple(block._replace(layers=5) for block in START.blocks)
    assert MobileNet().fault(START._replace(blocks=blocks)) == "20 layers are more than max_layers=14"


def test_scored_network_has_no_shortcuts():
    space = MobileNet(resolution=32, classes=3)
    net = Network(8, (Block(1, 3, 8, 1, 8, 2),), 16)
    assert any(unit.shortcut for unit in space.decode(net).blocks)
    assert not any(unit.shortcut for unit in space.bare(net).blocks)
    assert cost.parameters(space.decode(net)) == cost.parameters(space.bare(net))


def test_own_space_mutates_and_counts_once():
    built = []

    def build(width, depth):
        built.append(width)
        return perceptron(width, depth)

    space = Choices({"width": (4, 8), "depth": (1, 2)}, build, torch.randn(1, 6), name="mine")
    for _ in range(3):
        assert space.flops((8, 2)) == 2 * (6 * 8 + 8 * 8 + 8 * 3)
    assert built == [8]
    assert space.smallest == (4, 1)
    closed = dataclasses.replace(
        space, count_flops=lambda width, depth: width, count_parameters=lambda width, depth: depth
    )
    assert (closed.flops((8, 2)), closed.parameters((8, 2))) == (8, 2)
    assert space.describe((8, 1)) == "width 8, depth 1"
    assert space.settings()["options"] == {"width": [4, 8], "depth": [1, 2]}
    assert space.example(3).shape == (3, 6)


def test_spaces_say_what_is_wrong():
    with pytest.raises(ValueError, match="strings, numbers or booleans for every name"):
        Choices({"width": ()}, perceptron, torch.randn(1, 6))
    with pytest.raises(ValueError, match=r"one value for each of.*got \(5, 1\)"):
        own().decode((5, 1))
    with pytest.raises(ValueError, match=r"is \(stem, \(\(expansion, odd kernel"):
        network((8, ((6, 4, 32, 2, 8, 1),), 2048))
    with pytest.raises(ValueError, match=r"is \(stem, .*got 'dddddd'"):
        MobileNet().flops("dddddd")
    with pytest.raises(ValueError, match=r"four pairs \(width, depth\), got \(16, 1\)"):
        TimmResNet().flops((16, 1))
    with pytest.raises(ValueError, match=r"is \(heads, depth, ratio\), got \(1, 2\)"):
        TimmViT().flops((1, 2))

    class Bare(Space):
        name = "bare"
        compose = decode = parameters = flops = example = smallest = None

    Bare.__abstractmethods__ = frozenset()
    with pytest.raises(NotImplementedError, match=r"Bare has no choices\(\) for 3: write it"):
        Bare().mutate(3, random.Random(0))


def test_log_numel_of_the_mobile_space_counts_every_weight():
    space = MobileNet(resolution=32, classes=3)
    model = space.decode(START)
    numels = [m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert space.log_numel(START) == pytest.approx(sum(map(math.log, numels)))
