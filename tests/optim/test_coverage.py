"""Which layers EKFAC measures, each against gradients of single examples (float64)."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from eke.optim import EKFAC

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "kl_clip": None, "statistics_decay": 0.0, "basis_every": 1}


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def by_example(net, x, y, loss):
    """Gradients (examples, ...) of each example's own loss by name: one backward pass each."""
    found = {name: [] for name, _ in net.named_parameters()}
    for one in range(len(y)):
        net.zero_grad()
        loss(net(x[one : one + 1]), y[one : one + 1]).backward()
        for name, parameter in net.named_parameters():
            found[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    net.zero_grad()
    return {name: torch.stack(values) for name, values in found.items()}


def moments(gradients, state):
    """Mean squares of (examples, groups, m, n) in the bases of a state."""
    g, a = state.get("g_basis"), state.get("a_basis")
    turned = gradients if g is None else g.mT @ gradients
    return (turned if a is None else turned @ a).square().mean(0)


def stepped(net, x, y, loss, **options):
    opt = EKFAC(net, lr=1e-3, damping=0.1, **(PLAIN | options))
    opt.zero_grad()
    loss(net(x), y).backward()
    opt.step()
    return opt


class Attending(nn.Module):
    def __init__(self, *, other=False, batch_first=True, need_weights=False, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)
        self.head, self.other, self.need_weights = nn.Linear(6, 3), other, need_weights
        self.keys = nn.Linear(6, options.get("kdim", 6))

    def forward(self, x):
        memory = self.keys(x[:, :3])
        if not self.attend.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        y, _ = self.attend(x, *((memory, memory) if self.other else (x, x)), need_weights=self.need_weights)
        return self.head(y.mean(1 if self.attend.batch_first else 0))


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}, {"need_weights": True}])
def test_queries_keys_and_values_are_three_groups(other, options):
    net = Attending(other=other, **options)
    x, y = torch.randn(7, 5, 6), torch.randint(3, (7,))
    gradients = by_example(net, x, y, F.cross_entropy)
    opt = stepped(net, x, y, F.cross_entropy)
    attend = net.attend
    for weight, bias, name, groups in (
        (attend.in_proj_weight, attend.in_proj_bias, "in_proj_", 3),
        (attend.out_proj.weight, attend.out_proj.bias, "out_proj.", 1),
    ):
        whole = gradients[f"attend.{name}weight"]
        if bias is not None:
            whole = torch.cat([whole, gradients[f"attend.{name}bias"][:, :, None]], 2)
        state = opt.state[weight]
        assert state["moments"].shape[0] == groups
        expected = moments(whole.unflatten(1, (groups, -1)), state)
        torch.testing.assert_close(state["moments"], expected, rtol=1e-10, atol=1e-15)


def test_keys_of_another_width_are_projected_by_themselves():
    net = Attending(other=True, kdim=4, vdim=4)
    x, y = torch.randn(7, 5, 6), torch.randint(3, (7,))
    gradients = by_example(net, x, y, F.cross_entropy)
    opt = stepped(net, x, y, F.cross_entropy)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        state = opt.state[getattr(net.attend, name)]
        torch.testing.assert_close(
            state["moments"], moments(gradients[f"attend.{name}"][:, None], state), rtol=1e-10, atol=1e-15
        )


def test_watching_changes_neither_outputs_nor_drawn_numbers_and_ends_with_the_optimizer():
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    x = torch.randn(3, 4, 8)
    torch.manual_seed(1)
    plain = net(x)
    opt = EKFAC(net)
    torch.manual_seed(1)
    assert torch.equal(net(x), plain)
    with pytest.raises(AssertionError, match="embedding dimension"):  # torch's own
        net.self_attn(x[:, :, :5], x, x)
    assert torch.overrides._get_current_function_mode() is None
    del opt
    assert not net.self_attn._forward_hooks
    assert not net.self_attn._forward_pre_hooks


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("rank", [None, 2])
def test_tables_have_one_basis_for_all_rows(padding, rank):
    net = nn.Sequential(nn.Embedding(9, 4, padding_idx=padding), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randint(9, (8, 6)), torch.randint(3, (8,))
    gradients = by_example(net, x, y, F.cross_entropy)["0.weight"]
    opt = stepped(net, x, y, F.cross_entropy, rank=rank)
    state = opt.state[net[0].weight]
    assert "g_basis" not in state
    expected = moments(gradients[:, None], state)
    if rank is not None:
        beside = gradients.square().mean(0).sum(1)[None, :, None] - expected.sum(2, keepdim=True)
        expected = torch.cat([expected, beside / (4 - rank)], 2)
    torch.testing.assert_close(state["moments"], expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LayerNorm(6), (7, 6)),
        (lambda: nn.LayerNorm(6, bias=False), (7, 5, 6)),
        (lambda: nn.RMSNorm(6), (7, 5, 6)),
        (lambda: nn.GroupNorm(2, 6), (7, 6, 5)),
        (lambda: nn.InstanceNorm1d(6, affine=True), (7, 6, 5)),
    ],
)
def test_norms_have_their_exact_diagonal(make, shape, weights):
    net = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(shape), torch.randint(3, (7,))
    net(x)
    gradients = by_example(net, x, y, F.cross_entropy)
    parts = [gradients[name] for name in ("0.weight", "0.bias") if name in gradients]
    expected = torch.cat(parts, 1).square()
    opt = EKFAC(net, lr=1e-3, damping=0.1, **PLAIN)
    opt.zero_grad()
    if weights:  # each of the first three twice
        w = torch.tensor([2.0, 2, 2, 1, 1, 1, 1]) * 7 / 10
        (w * F.cross_entropy(net(x), y, reduction="none")).mean().backward()
        opt.step(weights=w)
        expected = (expected * w[:, None]).mean(0)
    else:
        F.cross_entropy(net(x), y).backward()
        opt.step()
        expected = expected.mean(0)
    torch.testing.assert_close(opt.state[net[0].weight]["moments"][0, :, 0], expected, rtol=1e-10, atol=1e-15)


def test_batch_norms_count_examples_with_the_batch_as_it_is():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(7, 4, 3, 3), torch.randint(3, (7,))
    net(x)
    head = copy.deepcopy(net[2])
    opt = stepped(net, x, y, F.cross_entropy)
    normed = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    found = []
    for one in range(7):
        scale, shift = (torch.full((4, 1, 1), value, requires_grad=True) for value in (1.0, 0.0))
        F.cross_entropy(head((normed[one] * scale + shift).flatten()[None]), y[one : one + 1]).backward()
        found.append(torch.cat([scale.grad.flatten(), shift.grad.flatten()]))
    expected = torch.stack(found).square().mean(0)
    torch.testing.assert_close(opt.state[net[0].weight]["moments"][0, :, 0], expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (5, 4, 9)),
        (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (5, 4, 9)),
        (lambda: nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding_mode="reflect", padding=(1, 0)), (5, 4, 7, 6)),
        (lambda: nn.Conv2d(4, 6, 3, padding_mode="replicate", padding=1, bias=False), (5, 4, 7, 6)),
        (lambda: nn.Conv2d(2, 3, 2), (5, 2, 3, 3)),
        (lambda: nn.Conv3d(2, 3, 2), (5, 2, 3, 4, 3)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (5, 4, 4, 3)),
    ],
)
@pytest.mark.parametrize("rank", [None, 3])
def test_every_convolution_is_its_examples(make, shape, rank):
    net = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(shape), torch.randint(3, (5,))
    net(x)
    gradients = by_example(net, x, y, F.cross_entropy)
    opt = stepped(net, x, y, F.cross_entropy, rank=rank)
    layer = opt._layers[id(net[0].weight)]
    whole = torch.stack([layer.matrix(g) for g in gradients["0.weight"]])
    if net[0].bias is not None:
        whole = torch.cat([whole, gradients["0.bias"].reshape(*whole.shape[:3], 1)], 3)
    state = opt.state[net[0].weight]
    inside = moments(whole, state)
    g, a = state["g_basis"], state["a_basis"]
    found = state["moments"]
    torch.testing.assert_close(found[:, : g.shape[2], : a.shape[2]], inside, rtol=1e-10, atol=1e-14)
    rest = [b.shape[1] - b.shape[2] for b in (g, a)]
    sizes = [torch.cat([torch.ones(b.shape[2]), torch.tensor([float(r)] if r else [])]) for b, r in zip((g, a), rest)]
    total = float((sizes[0][:, None] * sizes[1] * found).sum())
    assert abs(total - float(whole.square().mean(0).sum())) <= 1e-10 * total


@pytest.mark.parametrize("bias", [True, False])
def test_channel_bases_are_those_of_patches_where_the_kernel_is_one_pixel(bias):
    x, y = torch.randn(6, 4, 5, 5), torch.randint(3, (6,))
    net = nn.Sequential(nn.Conv2d(4, 6, 1, bias=bias), nn.Flatten(), nn.LazyLinear(3))
    net(x)
    nets = [net, copy.deepcopy(net)]
    for here, how in zip(nets, ("kfc", "sua")):
        stepped(here, x, y, F.cross_entropy, convolutions=how)
    torch.testing.assert_close(nets[1][0].weight, nets[0][0].weight, rtol=1e-12, atol=1e-14)


def test_channel_bases_mix_channels_alone_and_keep_moments_of_examples():
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(6, 4, 5, 5), torch.randint(3, (6,))
    net(x)
    gradients = by_example(net, x, y, F.cross_entropy)
    opt = stepped(net, x, y, F.cross_entropy, convolutions="sua")
    state = opt.state[net[0].weight]
    basis = state["a_basis"][0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(37), rtol=0, atol=1e-12)
    taps = basis[:36, :36].unflatten(0, (4, 9)).unflatten(2, (4, 9))
    for one in range(9):
        for other in range(9):
            if one != other:
                assert not taps[:, one, :, other].any()
    assert not basis[36, torch.tensor([k for k in range(36) if k % 9 != 4])].any()
    channels = F.unfold(x, 3).unflatten(1, (4, 9)).permute(2, 1, 0, 3).flatten(2)  # (taps, channels, positions)
    moment = (channels @ channels.mT).mean(0) / 6
    turned = taps[:, 0, :, 0].T @ moment @ taps[:, 0, :, 0]
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-10)
    whole = torch.cat([gradients["0.weight"].flatten(2), gradients["0.bias"][:, :, None]], 2)[:, None]
    torch.testing.assert_close(state["moments"], moments(whole, state), rtol=1e-10, atol=1e-15)


def test_a_convolution_of_one_pixel_is_a_linear_layer_on_pixels():
    class Pixels(nn.Module):
        def __init__(self, one):
            super().__init__()
            self.one, self.head = one, nn.Linear(6, 3)

        def forward(self, x):
            if isinstance(self.one, nn.Conv2d):
                return self.head(torch.tanh(self.one(x)).mean((2, 3)))
            return self.head(torch.tanh(self.one(x.flatten(2).mT)).mean(1))

    conv = Pixels(nn.Conv2d(4, 6, 1))
    linear = Pixels(nn.Linear(4, 6))
    with torch.no_grad():
        linear.one.weight.copy_(conv.one.weight[:, :, 0, 0])
        linear.one.bias.copy_(conv.one.bias)
        linear.head.load_state_dict(conv.head.state_dict())
    x, y = torch.randn(6, 4, 3, 3), torch.randint(3, (6,))
    for net in (conv, linear):
        stepped(net, x, y, F.cross_entropy)
    torch.testing.assert_close(conv.one.weight[:, :, 0, 0], linear.one.weight, rtol=1e-11, atol=1e-13)


def test_a_table_tied_to_a_head_is_left_to_adamw():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head, self.inner = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False), nn.Linear(4, 4)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(torch.tanh(self.inner(self.table(x))))

    net = Tied()
    opt = EKFAC(net)
    groups = {id(p): group["kronecker"] for group in opt.param_groups for p in group["params"]}
    assert not groups[id(net.table.weight)]
    assert groups[id(net.inner.weight)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention_counts_once(reentrant):
    from torch.utils.checkpoint import checkpoint

    x, y = torch.randn(7, 5, 6, requires_grad=True), torch.randint(3, (7,))
    plain = Attending()
    other = copy.deepcopy(plain)
    stepped(plain, x, y, F.cross_entropy)
    opt = EKFAC(other, lr=1e-3, damping=0.1, **PLAIN)
    F.cross_entropy(checkpoint(other, x, use_reentrant=reentrant), y).backward()
    opt.step()
    torch.testing.assert_close(other.attend.in_proj_weight, plain.attend.in_proj_weight, rtol=0, atol=1e-13)


def test_gradients_scaled_by_a_grad_scaler_give_the_same_step():
    x, y = torch.randn(7, 5, 6), torch.randint(3, (7,))
    plain = Attending()
    other = copy.deepcopy(plain)
    stepped(plain, x, y, F.cross_entropy)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt = EKFAC(other, lr=1e-3, damping=0.1, loss_scale=scaler.get_scale, **PLAIN)
    scaler.scale(F.cross_entropy(other(x), y)).backward()
    scaler.step(opt)
    scaler.update()
    torch.testing.assert_close(other.head.weight, plain.head.weight, rtol=1e-11, atol=1e-13)
    # An overflow skips the step, and what was seen in it.
    before = other.head.weight.detach().clone()
    opt.zero_grad()
    scaler.scale(F.cross_entropy(other(x), y) * torch.inf).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(other.head.weight, before)
    opt.zero_grad()
    assert not opt._capture._calls


@pytest.mark.parametrize("variant", ["ekfac", "ekfac_ra", "kfac"])
def test_a_transformer_of_all_kinds_of_layers_trains(variant):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(8, 11)

        def forward(self, x):
            return self.head(self.layer(self.table(x)))

    net = Small()
    opt = EKFAC(net, variant=variant, sharing="expand", rank=4, basis_every=5)
    assert all(group["kronecker"] for group in opt.param_groups)
    x = torch.randint(11, (16, 6))
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, 1), x.flatten())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_vmap_agrees_with_one_backward_pass_an_example():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(5, 4), torch.randint(2, (5,))
    held = {name: p.detach() for name, p in net.named_parameters()}

    def one(parameters, x, y):
        return F.cross_entropy(functional_call(net, parameters, (x[None],)), y[None])

    by_vmap = vmap(grad(one), in_dims=(None, 0, 0))(held, x, y)
    for name, values in by_example(net, x, y, F.cross_entropy).items():
        torch.testing.assert_close(values, by_vmap[name])
