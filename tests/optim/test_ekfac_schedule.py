"""When and on what EKFAC measures: ten times between refreshes, convolutions on a lattice, tokens told by the loss."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.curvature import Rows, Seen, sharing_of
from eke.optim import EKFAC
from eke.optim.layers import find_layers
from eke.optim.statistics import FEWEST, thinned

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "kl_clip": None, "statistics_decay": 0.0, "basis_every": 1}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_factors_are_mixed_in_place_as_running_means(groups, ones):
    rows = Rows(torch.randn(groups, 6, 2, 5), torch.randn(groups, 6, 2, 4), ones)
    a, g = torch.randn(groups, 5 + ones, 5 + ones), torch.randn(groups, 4, 4)
    a, g = a + a.mT, g + g.mT
    wanted = [0.7 * old + 0.3 * new for old, new in zip((a, g), rows.factors(wanted=(True, True)))]
    rows.mix_a_(a, 0.3)
    rows.mix_g_(g, 0.3)
    torch.testing.assert_close(a, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g, wanted[1], rtol=1e-12, atol=1e-12)


def test_lattices_of_examples_mean_what_all_examples_mean():
    conv = nn.Conv2d(2, 3, 3)
    layer = find_layers(nn.Sequential(conv))[0]
    seen = Seen("sum", True, 1.0, None)
    calls = [((1, 0), torch.randn(4 * FEWEST, 2, 5, 5), torch.randn(4 * FEWEST, 3, 3, 3))]
    whole = layer.rows(calls, seen)
    parts = [layer.rows(*thinned(layer, calls, seen, turn=turn)) for turn in range(4)]
    assert [part.examples for part in parts] == [FEWEST] * 4
    for measured in (lambda rows: rows.squares(), lambda rows: rows.factors(wanted=(True, True))[0],
                     lambda rows: rows.factors(wanted=(True, True))[1]):  # fmt: skip
        mean = torch.stack([measured(part) for part in parts]).mean(0)
        torch.testing.assert_close(mean, measured(whole), rtol=1e-11, atol=1e-12)


def test_few_examples_and_layers_without_locations_are_measured_whole():
    seen = Seen("sum", True, 1.0, None)
    conv, linear = find_layers(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(4, 4)))
    few = [((1, 0), torch.randn(2 * FEWEST - 1, 2, 9), torch.randn(2 * FEWEST - 1, 3, 7))]
    single = [((1, 0), torch.randn(2, 9), torch.randn(3, 7))]
    many = [((1, 0), torch.randn(500, 4), torch.randn(500, 4))]
    for layer, calls in ((conv, few), (conv, single), (linear, many)):
        assert thinned(layer, calls, seen, turn=3) == (calls, seen)


def steps_of(net, opt, x, y, count, loss=F.cross_entropy):
    for _ in range(count):
        opt.zero_grad()
        loss(net(x), y).backward()
        opt.step()


def test_moments_stay_between_measurements():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    opt = EKFAC(net, basis_every=50)
    steps_of(net, opt, x, y, 11)  # every one of the first ten, and the next
    for count, changes in ((4, False), (1, True), (1, True), (3, False)):  # 15 is one in five, 16 renews the bases
        before, weight = opt.state[net[0].weight]["moments"].clone(), net[0].weight.detach().clone()
        steps_of(net, opt, x, y, count)
        assert torch.equal(before, opt.state[net[0].weight]["moments"]) is not changes
        assert not torch.equal(weight, net[0].weight)
    opt = EKFAC(net, basis_every=9)
    for _ in range(12):
        before = opt.state[net[0].weight].get("moments", torch.zeros(())).clone()
        steps_of(net, opt, x, y, 1)
        assert not torch.equal(before, opt.state[net[0].weight]["moments"])


def test_by_default_the_plain_step_of_a_wide_layer_is_the_textbooks():
    net = nn.Linear(150, 140)
    x, y = torch.randn(30, 150), torch.randn(30, 140)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    opt = EKFAC(net, lr=0.1, damping=0.05, **PLAIN)
    loss = 0.5 * (net(x) - y).square().sum(1).mean()
    g = (net(x) - y).detach()
    loss.backward()
    opt.step()
    a = torch.cat([x, torch.ones(30, 1)], 1)
    u_a, u_s = torch.linalg.eigh(a.T @ a / 30)[1], torch.linalg.eigh(g.T @ g / 30)[1]
    m2 = (g @ u_s).square().T @ (a @ u_a).square() / 30
    # Factors of 30 examples have a space without curvature, in which any basis is as good: gradients are 0 there.
    wanted = u_s @ ((u_s.T @ (g.T @ a / 30) @ u_a) / (m2 + 0.05)) @ u_a.T
    found = torch.cat([weight - net.weight, (bias - net.bias)[:, None]], 1) / 0.1
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-8, atol=1e-10)


def test_by_default_long_sides_are_cut_and_short_ones_whole():
    net = nn.Sequential(nn.Linear(200, 128, bias=False), nn.ReLU(), nn.Linear(128, 4, bias=False))
    x, y = torch.randn(20, 200), torch.randint(4, (20,))
    for options, wanted in (({}, 64), ({"statistics_decay": 0.0}, 200), ({"rank": None}, 200), ({"rank": 100}, 100)):
        other = copy.deepcopy(net)
        opt = EKFAC(other, **options)
        steps_of(other, opt, x, y, 1)
        state = opt.state[other[0].weight]
        assert state["a_basis"].shape == (1, 200, wanted)
        assert state["g_basis"].shape == (1, 128, 100 if wanted == 100 else 128)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"rank": 3, "variant": "kfac"}, {"variant": "kfac"}], ids=str)
def test_a_sum_over_examples_trains_as_their_mean(options):
    net = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(20, 8), torch.randint(3, (20,))
    nets = [net, copy.deepcopy(net)]
    for other, reduction in zip(nets, ("mean", "sum")):
        opt = EKFAC(other, basis_every=20, reduction=reduction, **options)
        steps_of(other, opt, x, y, 25, lambda z, t, r=reduction: F.cross_entropy(z, t, reduction=r))
        for name, weight in (("0", other[0].weight), ("2", other[2].weight)):
            assert opt.state[weight]["total"] == pytest.approx(opt.basis(name).trace(), rel=1e-10)
    for one, two in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


class Tokens(nn.Module):
    """Tokens through two linear layers, and what the loss is made of."""

    def __init__(self, ends) -> None:
        super().__init__()
        self.first, self.last, self.ends = nn.Linear(6, 5), nn.Linear(5, 3), ends

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return {
            "tokens": lambda: self.last(h).flatten(0, 1),
            "one token": lambda: self.last(h)[:, 0],
            "pooled": lambda: self.last(h.mean(1)),
            "pooled late": lambda: self.last(h).mean(1),
        }[self.ends]()


@pytest.mark.parametrize(
    ("ends", "wanted"), [("tokens", "expand"), ("one token", "sum"), ("pooled", "sum"), ("pooled late", "sum")]
)
def test_the_loss_tells_what_tokens_mean(ends, wanted):
    net = Tokens(ends)
    x, y = torch.randn(8, 4, 6), torch.randint(3, (32 if ends == "tokens" else 8,))
    nets = [net, copy.deepcopy(net)]
    for other, sharing in zip(nets, ("auto", wanted)):
        opt = EKFAC(other, sharing=sharing, basis_every=2)
        steps_of(other, opt, x, y, 3)
        assert opt.sharing == wanted
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    opt = EKFAC(net, sharing="reduce")
    steps_of(net, opt, x, y, 1)
    assert opt.sharing == "reduce"


def test_gradients_that_tell():
    tokens = torch.randn(5, 4, 3)
    assert sharing_of(tokens) == "expand"
    assert sharing_of(tokens[:, 0]) == "sum"
    assert sharing_of(tokens[:, :1].expand(5, 4, 3)) == "sum"
    assert sharing_of(tokens * torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]) == "sum"
    assert sharing_of(torch.zeros(5, 4, 3)) == "sum"
