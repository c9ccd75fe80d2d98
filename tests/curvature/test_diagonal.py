"""The diagonal of the Gauss-Newton matrix, against Jacobians taken example by example."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from eke import sites
from eke.curvature import gauss_newton_diagonal


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cross_entropy(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def squared(net, batch):
    return (net(batch[0]) - batch[1]).square().sum(1).mean()


def brute_force(net, x, hessian_of):
    """diag of the mean of J^T H J, from the full Jacobian."""
    held = {name: p.detach() for name, p in net.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(net, p, (x,)))(held)
    h = hessian_of(net(x).detach())
    return {
        name: torch.einsum("ncp,ncd,ndp->p", j.flatten(2), h, j.flatten(2)).view(held[name].shape) / len(x)
        for name, j in jacobian.items()
    }


def softmax_hessian(z):
    p = z.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 6)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)),
             (4, 2, 5, 5)),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)),
        (4, 4, 7),
    ),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (4, 3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("loss", [cross_entropy, squared])
def test_the_diagonal_is_that_of_the_whole_matrix(name, loss):
    make, shape = NETS[name]
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    y = torch.randint(3, (4,)) if loss is cross_entropy else torch.randn(4, 3, dtype=torch.float64)
    found = gauss_newton_diagonal(net, loss, [(x, y)], sites.find(net))
    eye = 2 * torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    expected = brute_force(net, x, softmax_hessian if loss is cross_entropy else lambda z: eye)
    value = loss(net, (x, y))
    for site in sites.find(net):
        parameter = site.tensor(net)
        (gradient,) = torch.autograd.grad(value, parameter, retain_graph=True)
        torch.testing.assert_close(found[site.name].gradient, site.matrix_of(gradient), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(
            found[site.name].curvature, site.matrix_of(expected[site.parameter_name]), rtol=1e-10, atol=1e-14
        )


def test_batches_do_not_matter():
    net = NETS["conv"][0]()
    x, y = torch.randn(12, 2, 5, 5), torch.randint(3, (12,))
    whole, parts = (
        gauss_newton_diagonal(net, cross_entropy, list(zip(x.split(size), y.split(size))), sites.find(net))
        for size in (12, 4)
    )
    for name in whole:
        torch.testing.assert_close(whole[name].curvature, parts[name].curvature, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(whole[name].gradient, parts[name].gradient, rtol=1e-4, atol=1e-7)


def test_random_signs_are_right_on_average():
    net = NETS["linear"][0]().double()
    data = [(torch.randn(6, 6, dtype=torch.float64), torch.randint(3, (6,)))]
    exact = gauss_newton_diagonal(net, cross_entropy, data, sites.find(net))["0"].curvature
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([
        gauss_newton_diagonal(net, cross_entropy, data, sites.find(net), fisher="mc", generator=generator)[
            "0"
        ].curvature
        for _ in range(400)
    ])
    assert float(((drawn.mean(0) - exact).abs() / (drawn.std(0) / 20 + 1e-12)).max()) < 5


def test_empirical_squares_are_those_of_the_examples():
    net, x, y = NETS["linear"][0]().double(), torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))
    found = gauss_newton_diagonal(net, cross_entropy, [(x, y)], sites.find(net), fisher="empirical")
    each = [torch.autograd.grad(cross_entropy(net, (x[i : i + 1], y[i : i + 1])), net[0].weight)[0] for i in range(5)]
    torch.testing.assert_close(found["0"].curvature, torch.stack(each).square().mean(0), rtol=1e-10, atol=1e-14)


def test_the_model_stays_as_it_is():
    net = NETS["linear"][0]().train()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    data = [(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))]
    gauss_newton_diagonal(net, cross_entropy, data, sites.find(net))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_cannot_be_differentiated_twice_is_said():
    net = nn.Linear(6, 5000)
    data = [(torch.randn(2, 6), torch.randint(3, (2,)))]
    with pytest.raises(ValueError, match=r"at most 4096 numbers\), got \(2, 5000\).*empirical"):
        gauss_newton_diagonal(net, cross_entropy, data, sites.find(net))
    with pytest.raises(ValueError, match="0 batches"):
        gauss_newton_diagonal(net, cross_entropy, [], sites.find(net))
