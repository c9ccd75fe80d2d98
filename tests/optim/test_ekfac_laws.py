"""What holds of EKFAC's curvature whatever the net: nearness to the Fisher, exactness, directions left out."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from eke.curvature import Rows
from eke.optim import EKFAC
from eke.optim.basis import leading, shares

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "kl_clip": None, "statistics_decay": 0.0, "basis_every": 1}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def rows(kind):
    """Rows of designs: (groups, examples, locations, n) and (..., m)."""
    a, g = torch.randn(1, 12, 1, 5), torch.randn(1, 12, 1, 4)
    if kind == "correlated":
        g = g * a[..., :1].abs() + a[..., :4]
    elif kind == "locations":
        a, g = torch.randn(1, 12, 6, 5), torch.randn(1, 12, 6, 4)
    elif kind == "equal locations":
        g = g.expand(1, 12, 6, 4)
        a = torch.randn(1, 12, 6, 5)
    elif kind == "groups":
        a, g = torch.randn(3, 12, 2, 5), torch.randn(3, 12, 2, 4)
    elif kind == "one":
        a, g = a[:, :1], g[:, :1]
    elif kind == "all pairs":
        a, g = torch.randn(4, 5), torch.randn(3, 4)
        a, g = a.repeat_interleave(3, 0)[None, :, None], g.repeat(4, 1)[None, :, None]
    return Rows(a, g)


KINDS = ["plain", "correlated", "locations", "equal locations", "groups", "one", "all pairs"]


def fishers(found, g, a):
    """Dense blocks: the Fisher's, EKFAC's and K-FAC's, in bases cut or whole."""
    each = found.g.mT @ found.a
    true = torch.einsum("gnij,gnkl->gijkl", each, each) / found.examples
    size = each.shape[2] * each.shape[3]
    true = true.reshape(-1, size, size)
    u = torch.stack([torch.kron(x.contiguous(), y.contiguous()) for x, y in zip(g, a)])
    moments = found.energies(g, a).flatten(1)
    a_factor, g_factor = found.factors(wanted=(True, True))
    lines = ((g_factor @ g) * g).sum(1), ((a_factor @ a) * a).sum(1)
    products = (lines[0][:, :, None] * lines[1][:, None]).flatten(1)
    return true, u @ torch.diag_embed(moments) @ u.mT, u @ torch.diag_embed(products) @ u.mT, u


@pytest.mark.parametrize("kind", KINDS)
def test_no_diagonal_in_the_basis_is_nearer_to_the_fisher(kind):
    found = rows(kind)
    a_factor, g_factor = found.factors(wanted=(True, True))
    g, a = (torch.linalg.eigh(x)[1] for x in (g_factor, a_factor))
    true, ekfac, kfac, u = fishers(found, g, a)
    error = (true - ekfac).norm()
    assert error <= (true - kfac).norm() * (1 + 1e-12) + 1e-12
    torch.testing.assert_close(ekfac.diagonal(dim1=1, dim2=2).sum(), true.diagonal(dim1=1, dim2=2).sum())
    for _ in range(5):
        other = (u.mT @ ekfac @ u).diagonal(dim1=1, dim2=2) + 0.1 * torch.randn(u.shape[0], u.shape[1])
        assert error <= (true - u @ torch.diag_embed(other) @ u.mT).norm()
    if kind in {"one", "all pairs"}:
        torch.testing.assert_close(ekfac, true, rtol=0, atol=1e-12)
    if kind == "all pairs":
        torch.testing.assert_close(kfac, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("p", "q"), [(4, 2), (1, 5), (2, 3)])
def test_directions_left_out_keep_their_mean(kind, p, q):
    found = rows(kind)
    g, a = (torch.linalg.qr(torch.randn(found.g.shape[0], n, n))[0][:, :, :k] for n, k in ((4, p), (5, q)))
    energies = found.energies(g, a)
    full = [torch.linalg.qr(torch.cat([x, torch.randn(x.shape[0], x.shape[1], x.shape[1])], 2))[0] for x in (g, a)]
    each = (full[0].mT[:, None] @ (found.g.mT @ found.a) @ full[1][:, None]).square().mean(1)
    expected = torch.cat([each[:, :p], each[:, p:].sum(1, keepdim=True)], 1) if p < 4 else each
    expected = torch.cat([expected[..., :q], expected[..., q:].sum(2, keepdim=True)], 2) if q < 5 else expected
    torch.testing.assert_close(energies, expected, rtol=1e-10, atol=1e-12)


def test_a_column_of_ones_need_not_be_stored():
    for shape in ((2, 7, 1), (2, 7, 4), (2, 7, 40)):
        a, g = torch.randn(*shape, 3), torch.randn(*shape, 4)
        short, long = Rows(a, g, True), Rows(torch.cat([a, torch.ones(*shape, 1)], 3), g)
        assert short.widths == long.widths
        u, v = torch.linalg.qr(torch.randn(2, 4, 4))[0], torch.linalg.qr(torch.randn(2, 4, 4))[0]
        for basis in ((None, None), (u, v), (u[:, :, :2], v[:, :, :3]), (None, v[:, :, :2])):
            torch.testing.assert_close(short.energies(*basis), long.energies(*basis))
        torch.testing.assert_close(short.gradient(), long.gradient())
        torch.testing.assert_close(short.turned(u, v).gradient(), long.turned(u, v).gradient())
        torch.testing.assert_close(short.turned(u, None).gradient(), long.turned(u, None).gradient())
        for wanted in ((True, True), (False, False)):
            for one, other in zip(short.factors(wanted=wanted), long.factors(wanted=wanted)):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layers", [1, 3])
def test_deep_linear_nets_have_the_gauss_newton_blocks(layers):
    net = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(layers - 1)), nn.Linear(5, 3, bias=False))
    x = torch.randn(20, 5)
    held = {name: p.detach() for name, p in net.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: functional_call(net, p, (x,)))(held)
    for variant in ("ekfac", "kfac"):
        here = copy.deepcopy(net)
        opt = EKFAC(here, lr=0.1, damping=0.1, fisher="exact", variant=variant, **PLAIN)
        z = here(x)
        opt.observe(z, likelihood="gaussian")
        (0.5 * z.square().sum() / 20).backward()
        opt.step()
        for name, j in jacobian.items():
            flat = j.flatten(2)
            block = torch.einsum("ncp,ncq->pq", flat, flat) / 20
            found = opt.basis(name.removesuffix(".weight")).dense()
            torch.testing.assert_close(found, block, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sharing_is_exact_in_the_setting_it_is_for(sharing):
    net, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(8, 6, 4)
    opt = EKFAC(net, lr=0.1, damping=0.1, fisher="exact", sharing=sharing, variant="kfac", **PLAIN)
    z = net(x).flatten(0, 1) if sharing == "expand" else net(x).mean(1)
    opt.observe(z, likelihood="gaussian")
    (0.5 * z.square().sum() / len(z)).backward()
    opt.step()
    a = x.flatten(0, 1) if sharing == "expand" else x.mean(1)
    expected = torch.kron(torch.eye(3), a.T @ a / len(a))
    torch.testing.assert_close(opt.basis("0").dense(), expected, rtol=1e-9, atol=1e-12)


def test_the_mean_gradient_s_moments_without_a_basis_are_rmsprop_without_a_root():
    net, (x, y) = nn.Linear(6, 3, bias=False), (torch.randn(9, 6), torch.randint(3, (9,)))
    opt = EKFAC(net, lr=0.1, damping=0.01, variant="ekfac_ra", **(PLAIN | {"statistics_decay": 0.9}), largest=1)
    second, weight = None, net.weight.detach().clone()
    for step in range(4):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        gradient = net.weight.grad.clone()
        opt.step()
        square = 9 * gradient.square()
        decay = min(0.9, step / (step + 1))
        second = square if second is None else decay * second + (1 - decay) * square
        weight = weight - 0.1 * gradient / (second + 0.01)
        torch.testing.assert_close(net.weight.detach(), weight, rtol=0, atol=1e-13)


def test_the_dense_view_is_the_moments_in_the_basis_and_its_diagonal():
    net, (x, y) = (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        (torch.randn(9, 5), torch.randint(3, (9,))),
    )
    opt = EKFAC(net, lr=0.1, damping=0.1, **PLAIN)
    F.cross_entropy(net(x), y).backward()
    gradient = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    before = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach().clone()
    opt.step()
    after = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
    basis = opt.basis("0")
    torch.testing.assert_close(before - after, 0.1 * basis.solve(gradient, 0.1), rtol=0, atol=1e-13)
    torch.testing.assert_close(basis.diagonal().flatten(), basis.dense().diagonal(), rtol=0, atol=1e-13)
    u = torch.kron(basis.g_vectors[0], basis.a_vectors[0])
    torch.testing.assert_close(u.T @ u, torch.eye(24), rtol=0, atol=1e-12)
    with pytest.raises(KeyError, match=r"no statistics of a layer '1'; it has those of \['0', '2'\]"):
        opt.basis("1")


def test_a_rank_as_large_as_the_sides_changes_nothing():
    x, y = torch.randn(9, 5), torch.randint(3, (9,))
    nets = [nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))]
    nets.append(copy.deepcopy(nets[0]))
    for net, rank in zip(nets, (None, 6)):
        opt = EKFAC(net, rank=rank)
        for _ in range(5):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)


def test_a_cut_step_solves_with_its_own_curvature():
    net = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(30, 9), torch.randint(3, (30,))
    opt = EKFAC(net, lr=0.1, damping=0.05, rank=4, **PLAIN)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        gradient = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
        before = torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach().clone()
        opt.step()
        basis = opt.basis("0")
        assert basis.rest == (3, 6)
        step = before - torch.cat([net[0].weight, net[0].bias[:, None]], 1).detach()
        dense = basis.dense() + 0.05 * torch.eye(70)
        torch.testing.assert_close(
            step.flatten(), 0.1 * torch.linalg.solve(dense, gradient.flatten()), rtol=0, atol=1e-12
        )


def test_the_trace_survives_a_turn_of_cut_bases():
    factor = torch.randn(2, 9, 30)
    factor = factor @ factor.mT
    old = torch.linalg.qr(torch.randn(2, 9, 4))[0]
    new = leading(factor, None, rank=4)
    for _ in range(60):
        new = leading(factor, new, rank=4)
    values, vectors = torch.linalg.eigh(factor)
    torch.testing.assert_close(
        (new.mT @ vectors[:, :, -4:]).abs(), torch.eye(4).flip(1).expand(2, 4, 4), rtol=0, atol=1e-6
    )
    turned = shares(new.mT @ old, 9)
    torch.testing.assert_close(turned.sum(2), torch.ones(2, 5))
    moments = torch.rand(2, 5)
    sizes = torch.tensor([1.0, 1, 1, 1, 5])
    after = (turned @ moments[:, :, None])[:, :, 0]
    torch.testing.assert_close((after * sizes).sum(1), (moments * sizes).sum(1))
    assert values.min() > 0


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match='rank must be at least 1, None for all directions, or "auto", got 0'):
        EKFAC(nn.Linear(2, 2), rank=0)


@pytest.mark.parametrize("variant", ["ekfac", "ekfac_ra", "kfac"])
def test_a_cut_state_is_saved_and_continues_bit_for_bit(variant, tmp_path):
    def batches():
        generator = torch.Generator().manual_seed(3)
        return [
            (torch.randn(12, 9, generator=generator), torch.randint(3, (12,), generator=generator)) for _ in range(9)
        ]

    def train(net, opt, some):
        for x, y in some:
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()

    def make(net):
        return EKFAC(net, rank=4, basis_every=3, variant=variant)

    one = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    other = copy.deepcopy(one)
    opt = make(one)
    train(one, opt, batches()[:5])
    torch.save({"net": one.state_dict(), "opt": opt.state_dict()}, tmp_path / "half.pt")
    train(one, opt, batches()[5:])
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    again = make(other)
    again.load_state_dict(saved["opt"])
    train(other, again, batches()[5:])
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b)
