"""What EKFAC's step is, by examples' gradients taken one by one, and what training loops may do with it."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from eke.curvature import Rows
from eke.optim import EKFAC
from eke.optim.basis import refreshed

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "kl_clip": None, "statistics_decay": 0.0, "basis_every": 1}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def mlp():
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(count=20):
    return torch.randn(count, 7), torch.randint(3, (count,))


def cross_entropy(net, x, y):
    return F.cross_entropy(net(x), y)


def example_gradients(net, x, y, loss=F.cross_entropy):
    """Gradients of the examples' own losses by parameter name, by vmap."""
    held = {name: p.detach() for name, p in net.named_parameters()}

    def one(parameters, x, y):
        return loss(functional_call(net, parameters, (x[None],)), y[None])

    return vmap(grad(one), in_dims=(None, 0, 0))(held, x, y)


def matrices(gradients, name):
    """Gradients (examples, m, n + 1) of a layer with bias."""
    weight, bias = gradients[f"{name}.weight"], gradients[f"{name}.bias"]
    return torch.cat([weight.flatten(2), bias[:, :, None]], 2)


def layer_of(net, name):
    module = net.get_submodule(name)
    return torch.cat([module.weight.detach().flatten(1), module.bias.detach()[:, None]], 1)


def expected_step(gradients, a_factor, s_factor, damping, lr):
    u_a, u_s = torch.linalg.eigh(a_factor)[1], torch.linalg.eigh(s_factor)[1]
    moments = (u_s.T @ gradients @ u_a).square().mean(0)
    return lr * u_s @ ((u_s.T @ gradients.mean(0) @ u_a) / (moments + damping)) @ u_a.T


def test_a_step_is_the_definition():
    net, (x, y) = mlp(), batch()
    gradients = example_gradients(net, x, y)
    before = {name: layer_of(net, name) for name in ("0", "2")}
    opt = EKFAC(net, lr=0.3, damping=0.01, **PLAIN)
    hidden = torch.tanh(net[0](x)).detach()
    cross_entropy(net, x, y).backward()
    opt.step()
    for name, a in (("0", x), ("2", hidden)):
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        g = gradients[f"{name}.bias"]
        step = expected_step(matrices(gradients, name), a.T @ a / 20, g.T @ g / 20, 0.01, 0.3)
        torch.testing.assert_close(layer_of(net, name), before[name] - step, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
        lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(4, 6, 1),
    ],
)
def test_moments_of_convolutions_are_those_of_examples(make):
    net = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(9, 4, 8, 8), torch.randint(3, (9,))
    net(x)
    gradients = matrices(example_gradients(net, x, y), "0")
    opt = EKFAC(net, lr=0.1, damping=0.1, **PLAIN)
    cross_entropy(net, x, y).backward()
    opt.step()
    state, groups = opt.state[net[0].weight], net[0].groups
    turned = state["g_basis"].mT @ gradients.unflatten(1, (groups, -1)) @ state["a_basis"]
    torch.testing.assert_close(state["moments"], turned.square().mean(0), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sharing", ["sum", "expand", "reduce"])
def test_tokens_count_as_asked(sharing):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            y = self.two(torch.tanh(self.one(x)))
            return y if sharing == "expand" else y.mean(1)

    net, x = Tokens(), torch.randn(6, 7, 4)
    y = torch.randint(3, (6, 7) if sharing == "expand" else (6,))
    if sharing == "expand":  # 42 examples of one token each
        tokens = (x.flatten(0, 1)[:, None], y.flatten()[:, None])
        gradients = example_gradients(net, *tokens, lambda z, t: F.cross_entropy(z.flatten(0, -2), t.flatten()))
    else:
        gradients = example_gradients(net, x, y)
    opt = EKFAC(net, lr=0.1, damping=0.1, sharing=sharing, **PLAIN)
    F.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
    opt.step()
    state = opt.state[net.one.weight]
    turned = state["g_basis"].mT @ matrices(gradients, "one")[:, None] @ state["a_basis"]
    if sharing == "reduce":  # of mean inputs and summed gradients
        a = torch.cat([x.mean(1), torch.ones(6, 1)], 1)
        g = gradients["one.bias"]
        turned = state["g_basis"].mT @ (g[:, :, None] * a[:, None])[:, None] @ state["a_basis"]
    torch.testing.assert_close(state["moments"], turned.square().mean(0), rtol=1e-10, atol=1e-14)


def dense_fisher(gradients):
    flat = gradients.flatten(1)
    return flat.T @ flat / len(flat)


def approximation(state):
    """The matrix U diag(m2) U^T."""
    turned = torch.kron(state["g_basis"][0].contiguous(), state["a_basis"][0].contiguous())
    return turned @ torch.diag(state["moments"].flatten()) @ turned.T


@pytest.mark.parametrize("seed", range(5))
def test_ekfac_is_nearer_to_the_fisher_than_kfac_and_keeps_its_trace(seed):
    torch.manual_seed(seed)
    net, (x, y) = mlp(), batch(11)
    fisher = dense_fisher(matrices(example_gradients(net, x, y), "0"))
    errors = {}
    for variant in ("ekfac", "kfac"):
        here = copy.deepcopy(net)
        opt = EKFAC(here, lr=0.1, damping=0.1, variant=variant, **PLAIN)
        cross_entropy(here, x, y).backward()
        opt.step()
        found = approximation(opt.state[here[0].weight])
        errors[variant] = float((found - fisher).norm())
        if variant == "ekfac":
            assert math.isclose(float(found.trace()), float(fisher.trace()), rel_tol=1e-12)
            u = torch.kron(opt.state[here[0].weight]["g_basis"][0], opt.state[here[0].weight]["a_basis"][0])
            noisy = (u.T @ fisher @ u).diagonal() * (1 + 0.1 * torch.randn(len(u)))
            assert errors["ekfac"] <= float((u @ torch.diag(noisy) @ u.T - fisher).norm())
    assert errors["ekfac"] <= errors["kfac"] * (1 + 1e-12)


def test_one_example_makes_it_exact():
    net, (x, y) = mlp(), batch(1)
    fisher = dense_fisher(matrices(example_gradients(net, x, y), "0"))
    opt = EKFAC(net, lr=0.1, damping=0.1, **PLAIN)
    cross_entropy(net, x, y).backward()
    opt.step()
    torch.testing.assert_close(approximation(opt.state[net[0].weight]), fisher, rtol=0, atol=1e-14)


def test_one_step_solves_least_squares():
    net, x, y = nn.Linear(6, 4), torch.randn(30, 6), torch.randn(30, 4)
    opt = EKFAC(net, lr=1.0, damping=1e-12, fisher="exact", **PLAIN)
    z = net(x)
    opt.observe(z, likelihood="gaussian")
    (0.5 * (z - y).square().sum() / 30).backward()
    opt.step()
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1)], 1), y).solution.T
    torch.testing.assert_close(torch.cat([net.weight, net.bias[:, None]], 1).detach(), best)


def test_exact_fisher_is_the_gauss_newton_matrix_and_drawn_labels_tend_to_it():
    net, (x, _) = mlp(), batch(12)
    held = {name: p.detach() for name, p in net.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: functional_call(net, p, (x,)))(held)
    j = torch.cat([jacobian["0.weight"], jacobian["0.bias"][..., None]], 3)  # (N, C, m, n + 1)
    p = net(x).detach().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    root = torch.linalg.cholesky(hessian + 1e-13 * torch.eye(3))

    def moments(fisher, generator=None):
        here = copy.deepcopy(net)
        opt = EKFAC(here, lr=0.1, damping=0.1, fisher=fisher, **PLAIN)
        z = here(x)
        opt.observe(z, generator=generator)
        F.cross_entropy(z, torch.zeros(12, dtype=torch.long)).backward()
        opt.step()
        return opt.state[here[0].weight]

    state = moments("exact")
    columns = torch.einsum("ncmk,ncd->ndmk", j, root)
    turned = state["g_basis"].mT @ columns @ state["a_basis"]
    torch.testing.assert_close(state["moments"][0], turned.square().sum(1).mean(0), rtol=1e-9, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([float(moments("mc", generator)["moments"].sum()) * torch.ones(()) for _ in range(400)])
    assert abs(float(drawn.mean()) - float(state["moments"].sum())) < 4 * float(drawn.std()) / 20


def test_large_damping_leaves_the_gradient():
    net, (x, y) = mlp(), batch()
    before, opt = layer_of(net, "0"), EKFAC(net, lr=1.0, damping=1e6, **PLAIN)
    cross_entropy(net, x, y).backward()
    gradient = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    opt.step()
    torch.testing.assert_close((before - layer_of(net, "0")) * 1e6, gradient, rtol=1e-4, atol=1e-8)


def train(net, opt, batches, *, transform=lambda x: x, scale=1.0):
    for x, y in batches:
        opt.zero_grad()
        (scale * cross_entropy(net, transform(x), y)).backward()
        opt.step()


def test_turned_inputs_give_the_same_path():
    batches = [batch() for _ in range(12)]
    turn = torch.linalg.qr(torch.randn(7, 7))[0]
    one = mlp()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight.copy_(one[0].weight @ turn.T)
    options = {"lr": 0.03, "damping": 0.1, "basis_every": 4}
    train(one, EKFAC(one, **options), batches)
    train(other, EKFAC(other, **options), batches, transform=lambda x: x @ turn.T)
    torch.testing.assert_close(other[0].weight, one[0].weight @ turn.T, rtol=0, atol=1e-8)
    torch.testing.assert_close(other[2].weight, one[2].weight, rtol=0, atol=1e-8)


def test_the_scale_of_the_loss_does_not_matter():
    batches = [batch() for _ in range(10)]
    nets = [mlp()]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    for net, scale in zip(nets, (1.0, 1000.0, 1e-3)):
        train(net, EKFAC(net), batches, scale=scale)
    for net in nets[1:]:
        torch.testing.assert_close(net[0].weight, nets[0][0].weight, rtol=1e-9, atol=1e-9)


def test_a_known_loss_scale_and_a_sum_are_undone():
    batches = [batch() for _ in range(5)]
    nets = [mlp()]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    options = {"lr": 0.1, "damping": 0.1, "kl_clip": None, "basis_every": 2}
    train(nets[0], EKFAC(nets[0], **options), batches)
    scaled = EKFAC(nets[1], loss_scale=lambda: 1024.0, **options)
    for x, y in batches:
        scaled.zero_grad()
        (1024 * cross_entropy(nets[1], x, y)).backward()
        for p in nets[1].parameters():
            p.grad /= 1024  # as GradScaler.unscale_ does
        scaled.step()
    summed = EKFAC(nets[2], reduction="sum", **options)
    for x, y in batches:
        summed.zero_grad()
        F.cross_entropy(nets[2](x), y, reduction="sum").backward()
        summed.step()
    for net in nets[1:]:
        torch.testing.assert_close(net[0].weight, nets[0][0].weight, rtol=1e-10, atol=1e-12)


def test_accumulated_gradients_are_one_batch():
    x, y = batch(24)
    one = mlp()
    other = copy.deepcopy(one)
    for net, parts in ((one, 1), (other, 3)):
        opt = EKFAC(net, lr=0.1, damping=0.1, kl_clip=None)
        for a, b in zip(x.chunk(parts), y.chunk(parts)):
            (cross_entropy(net, a, b) / parts).backward()
        opt.step()
    torch.testing.assert_close(other[0].weight, one[0].weight, rtol=0, atol=1e-12)


def test_clipped_gradients_are_those_that_are_used():
    net, (x, y) = mlp(), batch()
    before, opt = layer_of(net, "0"), EKFAC(net, lr=1.0, damping=1e6, **PLAIN)
    cross_entropy(net, x, y).backward()
    for p in net.parameters():
        p.grad.clamp_(-0.01, 0.01)
    gradient = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
    opt.step()
    torch.testing.assert_close((before - layer_of(net, "0")) * 1e6, gradient, rtol=1e-4, atol=1e-8)


def test_importance_weights_enter_the_moments_once():
    x, y = batch(10)
    repeated = mlp()
    weighted = copy.deepcopy(repeated)
    counts = torch.tensor([1, 2, 3, 1, 1, 4, 1, 2, 1, 1])
    opt = EKFAC(repeated, lr=0.1, damping=0.1, **PLAIN)
    cross_entropy(repeated, x.repeat_interleave(counts, 0), y.repeat_interleave(counts)).backward()
    opt.step()
    w = counts * 10 / counts.sum()
    other = EKFAC(weighted, lr=0.1, damping=0.1, **PLAIN)
    (w * F.cross_entropy(weighted(x), y, reduction="none")).mean().backward()
    other.step(weights=w)
    # Bases differ, because A is a mean over inputs as they come; the trace does not depend on them.
    state, same = opt.state[repeated[0].weight], other.state[weighted[0].weight]
    assert math.isclose(float(state["moments"].sum()), float(same["moments"].sum()), rel_tol=1e-10)
    cross_entropy(weighted, x, y).backward()
    with pytest.raises(ValueError, match=r"saw 10 examples, got weights of shape \(3,\)"):
        other.step(weights=w[:3])


def test_a_saved_state_continues_bit_for_bit(tmp_path):
    batches = [batch() for _ in range(12)]
    one = mlp()
    opt = EKFAC(one, basis_every=5)
    train(one, opt, batches[:7])
    torch.save({"net": one.state_dict(), "opt": opt.state_dict()}, tmp_path / "half.pt")
    train(one, opt, batches[7:])
    other = mlp()
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    again = EKFAC(other, basis_every=5)
    again.load_state_dict(saved["opt"])
    train(other, again, batches[7:])
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_statistics_of_half_precision_weights_stay_in_float32():
    net = mlp().to(torch.bfloat16)
    opt = EKFAC(net)
    x, y = batch()
    cross_entropy(net, x.bfloat16(), y).backward()
    opt.step()
    state = opt.state[net[0].weight]
    assert state["moments"].dtype == state["a_factor"].dtype == torch.float32
    again = EKFAC(net)
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.state[net[0].weight]["moments"], state["moments"])


def test_schedulers_closures_and_groups():
    net, (x, y) = nn.Sequential(nn.Linear(7, 5), nn.PReLU(), nn.Linear(5, 3)), batch()
    groups = [{"params": net[0].parameters(), "lr": 0.05}, {"params": [*net[1].parameters(), *net[2].parameters()]}]
    opt = EKFAC(net, groups, lr=0.02, others_lr=0.003)
    assert [(g["lr"], g["kronecker"]) for g in opt.param_groups] == [(0.05, True), (0.02, True), (0.003, False)]
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)

    def closure():
        opt.zero_grad()
        loss = cross_entropy(net, x, y)
        loss.backward()
        return loss

    losses = [float(opt.step(closure)) for _ in range(3)]
    schedule.step()
    assert losses[2] < losses[0]
    assert [g["lr"] for g in opt.param_groups] == [0.025, 0.01, 0.0015]


def test_others_follow_adamw():
    net = nn.Sequential(nn.PReLU(4), nn.Softmax(1), nn.PReLU())
    other = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="no layer it can watch"):
        opt = EKFAC(net, others_lr=0.01, weight_decay=0.1)
    rival = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(6, 4)
        for model, optimizer in ((net, opt), (other, rival)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_shared_weights_sum_over_their_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.two.weight, self.two.bias = self.one.weight, self.one.bias

        def forward(self, x):
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))

    net, x, y = Twice(), torch.randn(8, 6), torch.randint(3, (8,))
    gradients = matrices(example_gradients(net, x, y), "one")
    opt = EKFAC(net, lr=0.1, damping=0.1, **PLAIN)
    F.cross_entropy(net(x), y).backward()
    opt.step()
    state = opt.state[net.one.weight]
    turned = state["g_basis"].mT @ gradients[:, None] @ state["a_basis"]
    torch.testing.assert_close(state["moments"], turned.square().mean(0), rtol=1e-10, atol=1e-14)


def test_checkpointed_passes_count_once():
    from torch.utils.checkpoint import checkpoint

    x, y = batch()
    plain = mlp()
    other = copy.deepcopy(plain)
    for net, how in ((plain, None), (other, False)):
        opt = EKFAC(net, lr=0.1, damping=0.1)
        out = net(x) if how is None else checkpoint(net, x, use_reentrant=how)
        F.cross_entropy(out, y).backward()
        opt.step()
    torch.testing.assert_close(other[0].weight, plain[0].weight, rtol=0, atol=1e-12)


def test_nothing_is_seen_in_eval_mode_without_gradients_or_of_copies():
    net, (x, y) = mlp(), batch()
    opt = EKFAC(net)
    net.eval()
    cross_entropy(net, x, y).backward()
    with pytest.raises(RuntimeError, match=r"no pass of '0' in training mode.*not a copy"):
        opt.step()
    net.train()
    with torch.no_grad():
        net(x)
    copied = copy.deepcopy(net)
    cross_entropy(copied, x, y).backward()
    with pytest.raises(RuntimeError, match="no pass of '0' in training mode"):
        opt.step()


def test_a_dropped_optimizer_leaves_no_hooks_and_a_dropped_graph_no_tensors():
    net, (x, y) = mlp(), batch()
    opt = EKFAC(net)
    x = torch.nn.Parameter(x)
    seen = weakref.ref(x)
    loss = cross_entropy(net, x, y)
    del loss, x
    gc.collect()
    assert seen() is None
    x, y = batch()
    known = weakref.ref(opt)
    del opt
    gc.collect()
    assert known() is None
    assert not net[0]._forward_hooks
    assert not net._forward_pre_hooks
    cross_entropy(net, x, y).backward()


def test_bases_stay_good_and_are_kept_where_they_serve():
    factor = torch.randn(1, 8, 30)
    factor = factor @ factor.mT
    basis = refreshed(factor, None, how="eigh", tolerance=0.0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8)[None], rtol=0, atol=1e-12)
    assert refreshed(factor, basis, how="eigh", tolerance=1e-6) is None
    start = torch.linalg.qr(torch.randn(1, 8, 8))[0]
    for _ in range(200):
        start = refreshed(factor, start, how="qr", tolerance=0.0)
    turned = start.mT @ factor @ start
    aside = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert float(aside.norm()) < 1e-6 * float(turned.norm())
    assert refreshed(factor * math.nan, start, how="qr", tolerance=0.0) is None


def test_moments_turn_with_the_basis(monkeypatch):
    net, batches = mlp(), [batch() for _ in range(6)]
    opt = EKFAC(net, lr=1e-12, damping=1.0, basis_every=5, statistics_decay=0.9)
    train(net, opt, batches[:5])
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[net[0].weight].items()}
    monkeypatch.setattr("eke.optim.ekfac.update_moments", lambda *_: True)
    train(net, opt, batches[5:])
    after = opt.state[net[0].weight]
    assert not torch.equal(after["a_basis"], before["a_basis"])
    assert math.isclose(float(after["moments"].sum()), float(before["moments"].sum()), rel_tol=1e-12)
    full = [torch.kron(s["g_basis"][0], s["a_basis"][0]) for s in (before, after)]
    turned = full[1].T @ full[0] @ torch.diag(before["moments"].flatten()) @ full[0].T @ full[1]
    torch.testing.assert_close(after["moments"].flatten(), turned.diagonal(), rtol=1e-10, atol=1e-14)


def test_statistics_that_are_not_finite_keep_the_last_good_ones_and_warn_once():
    net, batches = mlp(), [batch() for _ in range(3)]
    opt = EKFAC(net, basis_every=1)
    train(net, opt, batches)
    moments = opt.state[net[0].weight]["moments"].clone()
    x, y = batches[0]
    cross_entropy(net, x, y).backward()
    calls = opt._capture._calls[id(net[0])]
    number, a, g = calls[0]
    calls[0] = (number, a, g * math.inf)
    held = {name: p.clone() for name, p in net.named_parameters()}
    with pytest.warns(UserWarning, match="last good ones stay"):
        opt.step()
    assert math.isclose(float(opt.state[net[0].weight]["moments"].sum()), float(moments.sum()), rel_tol=1e-12)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    assert not torch.equal(held["0.weight"], net[0].weight)


def test_a_first_step_without_good_statistics_changes_nothing_and_training_goes_on():
    net, batches = mlp(), [batch() for _ in range(3)]
    opt = EKFAC(net)
    cross_entropy(net, *batches[0]).backward()
    for calls in opt._capture._calls.values():
        calls[:] = [(number, a, g * math.inf) for number, a, g in calls]
    before = net[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="not finite"):
        opt.step()
    assert torch.equal(net[0].weight, before)
    train(net, opt, batches)
    assert bool(torch.isfinite(net[0].weight).all())
    assert not torch.equal(net[0].weight, before)


def test_a_skipped_step_is_forgotten():
    (x, y), skipped = batch(), batch()
    nets = [mlp()]
    nets.append(copy.deepcopy(nets[0]))
    for index, net in enumerate(nets):
        opt = EKFAC(net)
        if index:
            cross_entropy(net, *skipped).backward()
        train(net, opt, [(x, y)])
    torch.testing.assert_close(nets[1][0].weight, nets[0][0].weight, rtol=0, atol=1e-14)


def test_long_sides_keep_the_identity():
    net, (x, y) = mlp(), batch()
    gradients = matrices(example_gradients(net, x, y), "0")
    opt = EKFAC(net, lr=0.1, damping=0.1, largest=4, **PLAIN)
    cross_entropy(net, x, y).backward()
    before = layer_of(net, "0")
    opt.step()
    state = opt.state[net[0].weight]
    assert not {"a_basis", "g_basis"} & set(state)
    step = 0.1 * gradients.mean(0) / (gradients.square().mean(0) + 0.1)
    torch.testing.assert_close(layer_of(net, "0"), before - step, rtol=0, atol=1e-12)


def test_running_moments_of_the_mean_gradient():
    net, batches = mlp(), [batch() for _ in range(3)]
    opt = EKFAC(net, lr=1e-9, damping=1.0, variant="ekfac_ra", tolerance=1.0, statistics_decay=0.9)
    expected = None
    for index, (x, y) in enumerate(batches):
        opt.zero_grad()
        cross_entropy(net, x, y).backward()
        gradient = torch.cat([net[0].weight.grad, net[0].bias.grad[:, None]], 1)
        opt.step()
        state = opt.state[net[0].weight]
        square = 20 * (state["g_basis"][0].T @ gradient @ state["a_basis"][0]).square()
        expected = square if expected is None else expected + (square - expected) / (index + 1)
    torch.testing.assert_close(state["moments"][0], expected, rtol=1e-6, atol=1e-12)


def test_weight_decay_is_decoupled():
    net, (x, y) = mlp(), batch()
    other = copy.deepcopy(net)
    for model, decay in ((net, 0.0), (other, 0.5)):
        opt = EKFAC(model, lr=0.1, damping=0.1, weight_decay=decay)
        cross_entropy(model, x, y).backward()
        before = model[0].weight.detach().clone()
        opt.step()
        if decay:
            torch.testing.assert_close(model[0].weight, net[0].weight - 0.05 * before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"damping": -1.0}, "damping must be positive, got -1.0"),
        ({"kl_clip": 0.0}, "kl_clip must be positive, got 0.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"statistics_decay": -0.1}, r"statistics_decay must be in \[0, 1\), got -0.1"),
        ({"basis_every": 0}, "basis_every >= 1, got weight_decay=0.0, basis_every=0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        EKFAC(mlp(), **wrong)


def test_observing_is_refused_where_it_makes_no_sense():
    net, (x, _) = mlp(), batch()
    with pytest.raises(ValueError, match='has fisher="empirical"'):
        EKFAC(net).observe(net(x))
    with pytest.raises(ValueError, match="still connected to the model"):
        EKFAC(net, fisher="mc").observe(net(x).detach())
    with pytest.raises(ValueError, match="needs outputs"):
        EKFAC(net, fisher="exact").observe(net(x)[None])
    with pytest.raises(ValueError, match="likelihood is"):
        EKFAC(net, fisher="mc").observe(net(x), likelihood="poisson")


def test_rows_of_one_location_are_their_general_form():
    rows = Rows(torch.randn(2, 5, 1, 4), torch.randn(2, 5, 1, 3))
    general = (rows.g.mT @ rows.a).square().sum(1) / 5
    torch.testing.assert_close(rows.squares(), general)
