"""Two factors of full rank are the layer itself; what cannot be factored is refused or left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.compression.factor import cut_shape, factor_, factorable, fill_
from eke.sites import find
from eke.structures import LowRank

from .nets import Tiny, same, state


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


LAYERS = {
    "linear": (lambda bias: nn.Linear(7, 5, bias=bias), (3, 4, 7)),
    "wide linear": (lambda bias: nn.Linear(4, 9, bias=bias), (3, 4)),
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, bias=bias), (2, 4, 13)),
    "conv1d same": (lambda bias: nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect", bias=bias), (2, 4, 9)),
    "conv2d": (lambda bias: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), bias=bias), (2, 3, 8, 9)),
    "conv2d circular": (
        lambda bias: nn.Conv2d(3, 5, 3, padding=1, dilation=1, padding_mode="circular", bias=bias),
        (2, 3, 6, 6),
    ),
    "conv2d replicate": (
        lambda bias: nn.Conv2d(3, 5, 3, padding=2, dilation=2, padding_mode="replicate", bias=bias),
        (2, 3, 6, 6),
    ),
    "conv3d": (
        lambda bias: nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), bias=bias),
        (2, 2, 3, 5, 4),
    ),
}


def factored(model: nn.Module, name: str, rank: int | None = None) -> nn.Module:
    """Return a copy with one site as two factors of a rank, the closest ones."""
    net = copy.deepcopy(model)
    site = next(site for site in find(net) if site.name == name)
    rank = rank or min(site.shape)
    left, right = LowRank(rank).factors(site.read(net))
    factor_(net, site, rank)
    fill_(net, name, left, right)
    return net


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_factors_of_full_rank_are_the_layer(kind, bias):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make(bias)).double().eval()
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = factored(model, "0")
    first, second = net[0]
    assert type(first) is type(second) is type(model[0])
    assert first.bias is None
    assert (second.bias is not None) == bias
    torch.testing.assert_close(net(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", LAYERS)
def test_factors_of_a_lower_rank_are_the_layer_of_their_product(kind):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make(True)).double().eval()
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = copy.deepcopy(model)
    site = find(product)[0]
    site.write_(product, LowRank(2).project(site.read(product)))
    torch.testing.assert_close(factored(model, "0", 2)(x), product(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_transposed_linear_layer_becomes_two_plain_ones(rank):
    model = nn.Sequential(Conv1D(5, 7)).double().eval()
    x = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(model)
    if rank:
        site = find(wanted)[0]
        site.write_(wanted, LowRank(rank).project(site.read(wanted)))
    net = factored(model, "0", rank)
    assert [type(layer) for layer in net[0]] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(net(x), wanted(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), (), ("weight", "bias")])
def test_names_flags_dtype_and_the_bias_itself_are_kept(training, frozen):
    model = nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), nn.Conv2d(3, 5, 3)), "head": nn.Linear(5, 2)}).double()
    model.train(training)
    layer = model["body"][1]
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    bias, site = layer.bias, next(site for site in find(model) if site.name == "body.1")
    factor_(model, site, 2)
    names = ["body.1.0.weight", "body.1.1.weight", "body.1.1.bias", "head.weight", "head.bias"]
    assert [name for name, _ in model.named_parameters()] == names
    pair = model["body"][1]
    assert pair[1].bias is bias
    assert [m.training for m in pair.modules()] == [training] * 3
    assert pair[0].weight.requires_grad == pair[1].weight.requires_grad == ("weight" not in frozen)
    assert bias.requires_grad == ("bias" not in frozen)
    assert {p.dtype for p in pair.parameters()} == {torch.float64}
    assert (pair[0].weight.shape, pair[1].weight.shape) == ((2, 3, 3, 3), (5, 2, 1, 1))


def test_factoring_leaves_the_global_random_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3))
    before = torch.get_rng_state()
    for site in find(model):
        factor_(model, site, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_factors_are_sites_of_their_own_with_the_shapes_of_factors():
    model = Tiny()
    factor_(model, next(site for site in find(model) if site.name == "conv2"), 4)
    assert cut_shape(model, "conv2.0") == (4, 16 * 9)
    assert cut_shape(model, "conv2.1") == (32, 4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"Cannot factor '0' \(conv, groups=2\): leave it out with skip="),
        (nn.ConvTranspose2d(4, 4, 3), r"Cannot factor '0' \(conv_transpose, groups=1\): leave it out with skip="),
        (nn.Embedding(4, 4), r"Cannot factor '0' \(embedding, groups=1\): leave it out with skip="),
    ],
)
def test_other_layers_are_refused_and_stay(layer, message):
    model = nn.Sequential(layer)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        factor_(model, find(model)[0], 2)
    assert model[0] is layer
    assert same(before, state(model))


def names_of(model: nn.Module, x: object) -> list[str]:
    return factorable(model, find(model), lambda net: net(x))


def test_every_plain_layer_can_be_factored_and_the_model_stays_as_it_was():
    model = Tiny().train()
    before, random = state(model), torch.get_rng_state()
    assert names_of(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))) == [
        "conv1", "conv2", "conv3", "classifier",
    ]  # fmt: skip
    assert same(before, state(model))
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


class Reader(nn.Module):
    """Reads one layer's weight itself, and asks another for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read, self.asked = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.plain(x), self.read.weight, self.read.bias)
        return self.asked(x).view(-1, self.asked.out_features)


def test_a_layer_whose_weight_the_model_reads_itself_is_left_out():
    assert names_of(Reader(), torch.randn(3, 6)) == ["plain"]


class Quiet(nn.Module):
    """Falls back, without an error, where a layer is not what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.odd = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(x)
        return {"out": self.odd(x) if isinstance(self.odd, nn.Linear) else x}


def test_a_layer_without_which_the_outputs_differ_is_left_out():
    assert names_of(Quiet(), torch.randn(3, 6)) == ["plain"]


def test_grouped_transposed_tied_and_embedded_matrices_are_left_out():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.plain = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)
            self.grouped, self.up = nn.Conv1d(4, 4, 1, groups=2), nn.ConvTranspose1d(4, 4, 2)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.up(self.grouped(self.plain(self.embed(ids).mT)))
            return self.two(self.one(x.mT))

    assert names_of(Mixed(), torch.tensor([[1, 2, 3]])) == ["plain"]


def test_a_model_that_is_one_layer_has_nothing_to_factor():
    assert names_of(nn.Linear(4, 4), torch.randn(2, 4)) == []


def test_factors_are_written_where_they_belong():
    model = nn.Sequential(nn.Conv1d(3, 4, 2))
    factor_(model, find(model)[0], 2)
    left, right = torch.arange(8.0).view(4, 2), torch.arange(12.0).view(2, 6)
    fill_(model, "0", left, right)
    assert torch.equal(model[0][0].weight.flatten(1), right)
    assert torch.equal(model[0][1].weight.flatten(1), left)
