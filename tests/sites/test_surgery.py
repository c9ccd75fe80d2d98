"""Laws of surgery: slices in original coordinates, combination by intersection, replay, and what does not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from eke.sites import Surgery

from .nets import Tied


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))


def cut(kept):
    kept = tuple(kept)
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    shapes = {name: tuple(model().state_dict()[name].shape) for name in (*names, "2.weight")}
    slices = {name: {0: kept} for name in names} | {"2.weight": {1: kept}}
    counts = {
        "0": {"out_channels": ("0.weight", 0, 1)},
        "1": {"num_features": ("1.weight", 0, 1)},
        "2": {"in_channels": ("2.weight", 1, 1)},
    }
    return Surgery(slices, shapes, counts)


def outputs(n):
    return Surgery({"2.weight": {0: n}, "2.bias": {0: n}}, {"2.weight": (4, 6, 1, 1), "2.bias": (4,)})


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_cutting_keeps_the_named_entries_and_sets_the_attributes():
    net, before = model(), state(model())
    cut((0, 2, 5)).apply_(net)
    assert torch.equal(net[0].weight, before["0.weight"][[0, 2, 5]])
    assert torch.equal(net[1].running_var, before["1.running_var"][[0, 2, 5]])
    assert torch.equal(net[2].weight, before["2.weight"][:, [0, 2, 5]])
    assert (net[0].out_channels, net[1].num_features, net[2].in_channels) == (3, 3, 3)
    assert cut((0, 2, 5)).attributes == {"0": {"out_channels": 3}, "1": {"num_features": 3}, "2": {"in_channels": 3}}
    assert net(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)


def test_removed_counts_the_entries_that_go():
    net = model()
    total = sum(t.numel() for t in state(net).values())
    surgery = cut((1, 4)).then(outputs((0, 3)))
    surgery.apply_(net)
    assert surgery.removed == total - sum(t.numel() for t in state(net).values())


def test_parameters_stay_parameters_with_their_settings():
    net = model().to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    net[0].bias.grad = torch.zeros(6)
    cut((1, 3)).apply_(net)
    assert isinstance(net[0].weight, nn.Parameter)
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad
    assert net[0].bias.grad is None
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    assert isinstance(dict(net.named_buffers())["1.running_mean"], torch.Tensor)


def test_a_copy_is_cut_alone():
    net = model()
    before = state(net)
    cut((0,)).apply_(copy.deepcopy(net))
    assert all(torch.equal(before[name], tensor) for name, tensor in state(net).items())


def test_combination_is_intersection_in_any_order():
    a, b, c = cut((0, 1, 2, 5)), cut((1, 2, 3, 5)), outputs((0, 3))
    assert a.then(b) == b.then(a) == cut((1, 2, 5))
    assert a.then(a) == a
    assert Surgery.merge([a, c]) == Surgery.merge([c, a])
    assert Surgery.merge([a, b, c]) == a.then(b).then(c)
    assert Surgery.merge([]) == Surgery()
    net = model()
    Surgery.merge([a, b, c]).apply_(net)
    assert net[2].weight.shape == (2, 3, 1, 1)


def test_json_round_trip_is_exact_and_replays_on_a_fresh_model():
    surgery = cut((0, 4)).then(outputs((1,)))
    again = Surgery.from_json(json.loads(json.dumps(surgery.to_json())))
    assert again == surgery
    one, two = model(), model()
    surgery.apply_(one)
    again.apply_(nn.DataParallel(two))
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_tied_tensors_are_cut_alike_and_stay_tied():
    kept = {0: (0, 2, 3)}
    shape = (11, 8)
    net = Tied()
    Surgery({"embedding.weight": kept, "head.weight": kept}, {"embedding.weight": shape, "head.weight": shape}).apply_(
        net
    )
    assert net.head.weight is net.embedding.weight
    net, before = Tied(), state(Tied())
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight are one tied tensor"):
        Surgery({"head.weight": kept}, {"head.weight": shape}).apply_(net)
    assert [t.shape for t in state(net).values()] == [t.shape for t in before.values()]


def test_a_model_that_does_not_fit_is_an_error_and_stays_whole():
    other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3))
    before = state(other)
    with pytest.raises(
        ValueError, match=r"'2.weight' has shape \(4, 6, 1, 1\), this model has \(4, 6, 3, 3\)\. Build the architecture"
    ):
        cut((0, 1)).apply_(other)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(other).items())
    with pytest.raises(ValueError, match=r"parameter or buffer '1.weight', this model has none"):
        cut((0, 1)).apply_(nn.Sequential(nn.Conv2d(3, 6, 3)))
    twice = model()
    cut((0, 1)).apply_(twice)
    with pytest.raises(ValueError, match=r"uncut"):
        cut((0, 1)).apply_(twice)


WRONG = {
    r"slices and shapes for the same tensors; only one of them has \['a'\]": ({"a": {0: (0,)}}, {}, {}),
    r"cuts dimension 1 of 'a', which has shape \(3,\)": ({"a": {1: (0,)}}, {"a": (3,)}, {}),
    r"ascending indices from 0 to 2 for dimension 0 of 'a', at least one, got \(2, 1\)": (
        {"a": {0: (2, 1)}},
        {"a": (3,)},
        {},
    ),
    r"at least one, got \(\)": ({"a": {0: ()}}, {"a": (3,)}, {}),
    r"got \(0, 3\)": ({"a": {0: (0, 3)}}, {"a": (3,)}, {}),
    r"counts m.groups on dimension 0 of 'a' in units of 2, where 3 indices stay": (
        {"a": {0: (0, 1, 2)}},
        {"a": (4,)},
        {"m": {"groups": ("a", 0, 2)}},
    ),
}


@pytest.mark.parametrize(("message", "fields"), WRONG.items())
def test_contradictions_are_errors(message, fields):
    with pytest.raises(ValueError, match=message):
        Surgery(*fields)


def test_cuts_of_different_models_do_not_combine():
    a = Surgery({"a": {0: (0,)}}, {"a": (3,)})
    with pytest.raises(ValueError, match=r"different models: 'a' has shape \(3,\) in one and \(4,\) in another"):
        a.then(Surgery({"a": {0: (0,)}}, {"a": (4,)}))
    with pytest.raises(ValueError, match="leave nothing of dimension 0 of 'a'"):
        a.then(Surgery({"a": {0: (1,)}}, {"a": (3,)}))


@pytest.mark.parametrize("document", [{}, {"slices": 3, "shapes": {}, "counts": {}}, {"slices": {"a": {"x": [0]}}}])
def test_a_document_that_is_no_surgery_is_an_error(document):
    with pytest.raises(ValueError, match="not a surgery: it needs slices, shapes and counts"):
        Surgery.from_json(document)
