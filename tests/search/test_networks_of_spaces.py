"""Networks that spaces build, against plain ones written from the papers' words, with the same weights."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.search.spaces import MobileNet, NasBench201, TimmResNet
from eke.search.spaces.mobile import Block, Network

EDGES = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


def norm(x, module):
    """Batch norm of a batch, in train mode."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = module.weight.view(1, -1, 1, 1), module.bias.view(1, -1, 1, 1)
    return (x - mean) / (variance + module.eps).sqrt() * scale + shift


def relu_conv_norm(x, part, stride=1):
    conv, bn = part[1], part[2]
    return norm(F.conv2d(F.relu(x), conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2), bn)


def mean3(x):
    """Mean over the neighbours that exist."""
    ones = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    total = F.conv2d(x.flatten(0, 1)[:, None], ones, padding=1).view_as(x)
    count = F.conv2d(torch.ones_like(x[:1, :1]), ones, padding=1)
    return total / count


def cell_by_hand(cell, ops, x):
    nodes = [x]
    for target in (1, 2, 3):
        total = torch.zeros_like(x)
        for (i, j), letter in zip(EDGES, ops):
            if j != target or letter == "a":
                continue
            if letter == "b":
                total = total + nodes[i]
            elif letter == "e":
                total = total + mean3(nodes[i])
            else:
                total = total + relu_conv_norm(nodes[i], cell.edges[f"{i}-{j}"])
        nodes.append(total)
    return nodes[3]


def nb201_by_hand(model, ops, x):
    x = norm(F.conv2d(x, model.stem[0].weight, padding=1), model.stem[1])
    for place, block in enumerate(model.blocks):
        if place in (2, 5):
            shortcut = F.conv2d(F.avg_pool2d(x, 2), block.shortcut[1].weight)
            x = shortcut + relu_conv_norm(relu_conv_norm(x, block.first, stride=2), block.second)
        else:
            x = cell_by_hand(block, ops, x)
    x = F.relu(norm(x, model.norm)).mean((2, 3))
    return x @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("ops", ["dddddd", "cdbeca", "ebcbad", "aaabaa", "aaaaaa", "deaabc"])
def test_nb201_computes_what_the_paper_says(ops):
    torch.manual_seed(0)
    model = NasBench201(resolution=8, channels=4, cells=2).decode(ops).double().train()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), nb201_by_hand(model, ops, x), rtol=1e-10, atol=1e-12)


def test_constant_cells_make_constant_networks():
    model = NasBench201(resolution=8, channels=4, cells=1).decode("dcaaaa").eval()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(x), model(2 * x))


def unit_by_hand(unit, x):
    conv1, bn1, _, conv2, bn2, _, conv3, bn3 = unit.layers
    y = F.relu(norm(F.conv2d(x, conv1.weight), bn1))
    y = F.conv2d(y, conv2.weight, stride=conv2.stride, padding=conv2.weight.shape[-1] // 2, groups=len(conv2.weight))
    y = norm(F.conv2d(F.relu(norm(y, bn2)), conv3.weight), bn3)
    return F.relu(x + y if y.shape == x.shape else y)


def test_mobile_network_is_a_chain_of_inverted_residuals():
    torch.manual_seed(0)
    space = MobileNet(resolution=24, classes=5)
    net = Network(8, (Block(2, 3, 16, 2, 8, 2), Block(1, 5, 16, 1, 16, 1)), 24)
    model = space.decode(net).double().train()
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    stem, *units, head = model.blocks
    assert len(units) == 2 * (2 + 1)
    y = F.relu(norm(F.conv2d(x, stem.layers[0].weight, stride=2, padding=1), stem.layers[1]))
    for unit in units:
        y = unit_by_hand(unit, y)
    y = F.relu(norm(F.conv2d(y, head.layers[0].weight), head.layers[1])).mean((2, 3))
    expected = y @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_mobile_widths_and_strides_are_those_of_the_blocks():
    space, rng = MobileNet(resolution=32, classes=5), random.Random(0)
    for _ in range(10):
        net = space.mutate(space.start, rng)
        convs = space.convolutions(net)
        assert convs[0].outputs == net.stem
        assert convs[-1].outputs == net.head
        depthwise = [conv for conv in convs if conv.groups > 1]
        assert len(depthwise) == 2 * sum(block.layers for block in net.blocks)
        assert all(conv.inputs == conv.outputs == conv.groups for conv in depthwise)
        made = [(c.inputs, c.outputs, c.kernel, c.stride, c.groups) for c in convs]
        model = [m for m in space.decode(net).modules() if isinstance(m, nn.Conv2d)]
        real = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.groups) for m in model]
        assert made == real
        assert max(c.size for c in convs) == 16
        assert min(c.size for c in convs) == 1


def test_blocks_of_one_channel_are_grouped_with_themselves():
    space = MobileNet(resolution=8, classes=2, strides=(1,))
    net = Network(8, (Block(1, 3, 8, 1, 8, 1),), 8)
    model = space.decode(net)
    assert model(space.example(2)).shape == (2, 2)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_resnet_has_the_asked_blocks(bottleneck):
    pytest.importorskip("timm")
    space = TimmResNet(classes=3, resolution=32, bottleneck=bottleneck)
    model = space.decode(((16, 1), (32, 2), (48, 1), (64, 3)))
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    assert [len(stage) for stage in stages] == [1, 2, 1, 3]
    assert [stage[0].conv2.weight.shape[0] for stage in stages] == [16, 32, 48, 64]
    assert model.num_features == (256 if bottleneck else 64)


def test_examples_are_the_same_at_every_call():
    for space in (NasBench201(resolution=8), MobileNet(resolution=8), TimmResNet(resolution=8)):
        assert torch.equal(space.example(3), space.example(3))
        assert space.example(3).shape == (3, 3, 8, 8)
