"""Folding is exact where it is proved, and left out where it would change anything."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.compression.deploy import fold_batchnorm_, foldable, set_memory_format_

from .nets import same, state


def awake(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give every normalisation statistics, scales (some negative) and shifts of its own, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.2 + torch.rand(module.num_features, generator=generator))
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.double().eval()


def caller(x):
    return lambda model: model(x)


LAYERS = {
    "conv1d": (lambda bias: nn.Conv1d(3, 6, 3, bias=bias), nn.BatchNorm1d, (5, 3, 9)),
    "conv2d": (lambda bias: nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.BatchNorm2d, (5, 3, 7, 7)),
    "grouped": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d, (5, 4, 7, 7)),
    "conv3d": (lambda bias: nn.Conv3d(2, 6, 2, bias=bias), nn.BatchNorm3d, (3, 2, 4, 4, 4)),
    "linear": (lambda bias: nn.Linear(5, 6, bias=bias), nn.BatchNorm1d, (8, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_changes_no_output(kind, affine, bias):
    layer, norm, shape = LAYERS[kind]
    model = awake(nn.Sequential(layer(bias), norm(6, affine=affine, eps=1e-3), nn.ReLU()))
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    pairs = foldable(model, caller(x))
    assert pairs == [("0", "1")]
    fold_batchnorm_(model, pairs)
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_finding_pairs_leaves_the_model_as_it_was():
    model = awake(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).float().train()
    before, random = state(model), torch.get_rng_state()
    assert foldable(model, caller(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))) == [("0", "1")]
    assert same(before, state(model))
    assert model.training
    assert model[1].training
    assert torch.equal(random, torch.get_rng_state())
    assert not model[0]._forward_hooks
    assert not model._forward_pre_hooks
    assert next(model.parameters()).dtype == torch.float32


class Branch(nn.Module):
    """A convolution whose output is normalised, and read once more; beside it one that can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.good_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.bad, self.bad_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = F.relu(self.good_norm(self.good(x)))
        y = self.bad(x)
        return self.bad_norm(y) + y


def test_an_output_that_is_read_twice_is_not_folded():
    model = awake(Branch())
    assert foldable(model, caller(torch.randn(2, 3, 5, 5))) == [("good", "good_norm")]


class Shared(nn.Module):
    """One normalisation, or one convolution, that is called twice."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.first, self.second = what, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        if what == "weight":
            self.second.weight = self.first.weight

    def forward(self, x):
        if self.what == "norm":
            return self.norm(self.second(self.norm(self.first(x))))
        if self.what == "layer":
            return self.other(self.first(F.relu(self.norm(self.first(x)))))
        return self.other(self.second(F.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("what", ["norm", "layer", "weight"])
def test_what_is_shared_is_not_folded(what):
    assert foldable(awake(Shared(what)), caller(torch.randn(2, 3, 5, 5))) == []


class Swapped(nn.Module):
    """A linear layer over the last dimension with a normalisation over the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, width), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("width", [6, 5])
def test_a_normalisation_over_another_dimension_is_not_folded(width):
    assert foldable(awake(Swapped(width)), caller(torch.randn(3, 6, 4))) == []


def test_a_normalisation_without_running_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert foldable(model, caller(torch.randn(2, 3, 5, 5))) == []


def test_a_layer_behind_an_activation_is_not_folded():
    assert (
        foldable(
            awake(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))), caller(torch.randn(2, 3, 5, 5))
        )
        == []
    )


def test_dictionaries_and_integers_pass_through():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.linear, self.norm = nn.Embedding(7, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, *, ids, scale):
            return {"logits": self.norm(self.linear(self.embed(ids))) * scale, "ids": ids}

    model, ids = awake(Net()), torch.tensor([1, 2, 3])
    assert foldable(model, lambda net: net(ids=ids, scale=torch.ones(3, 1))) == [("linear", "norm")]


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
def test_the_memory_format_changes_strides_alone(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 1), nn.Linear(4, 2))
    before = state(model)
    set_memory_format_(model, name)
    wanted = torch.channels_last if name == "channels_last" else torch.contiguous_format
    assert model[0].weight.is_contiguous(memory_format=wanted)
    assert model[2].weight.is_contiguous()
    assert same(before, state(model))


def test_folding_keeps_format_dtype_and_flags():
    model = awake(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).float()
    model.to(memory_format=torch.channels_last)
    model.requires_grad_(False)
    fold_batchnorm_(model, [("0", "1")])
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].bias.dtype == torch.float32
    assert not model[0].bias.requires_grad


def test_folding_in_float32_rounds_once():
    model = awake(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).float()
    exact = copy.deepcopy(model).double()
    fold_batchnorm_(model, [("0", "1")])
    fold_batchnorm_(exact, [("0", "1")])
    assert torch.equal(model[0].weight, exact[0].weight.float())
    assert torch.equal(model[0].bias, exact[0].bias.float())


def test_weights_of_three_dimensional_convolutions_stay_as_they_are():
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(2), nn.Conv1d(3, 2, 1))
    before = {name: weight.stride() for name, weight in model.named_parameters()}
    set_memory_format_(model, "channels_last")
    assert {name: weight.stride() for name, weight in model.named_parameters()} == before


def test_an_unknown_memory_format_is_refused():
    with pytest.raises(ValueError, match=r"one of \['channels_last', 'contiguous'\], got 'nhwc'"):
        set_memory_format_(nn.Linear(2, 2), "nhwc")


@pytest.mark.parametrize("pair", [("1", "0"), ("0", "0"), ("0", "9"), ("9", "1")])
def test_what_is_no_pair_of_layer_and_normalisation_is_refused(pair):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"Cannot fold '.' \(.*\) into '.' \(.*\): build the architecture that was"):
        fold_batchnorm_(model, [pair])
