"""Kronecker factors against per-sample brute force, and that estimating them leaves no trace on the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.curvature import Curvature, sampled_loss
from eke.sites import find


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean over samples of a loss with a gradient that depends on the sample."""
    out = model(batch[0])
    return ((out - batch[1][: out.shape[0]].view(-1, *[1] * (out.dim() - 1))) ** 2).flatten(1).sum(1).mean()


def data(*shape: int, count: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randn(count, dtype=torch.float64, generator=generator)


def conv(dims: int, **options: object) -> nn.Module:
    torch.manual_seed(1)
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    return nn.Sequential(kind(4, 6, **options), nn.Tanh()).double()


CONVS = [
    (2, {"kernel_size": 3}),
    (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    (2, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    (2, {"kernel_size": 4, "padding": "same"}),
    (2, {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2}),
    (2, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2}),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "dilation": 2}),
    (1, {"kernel_size": 3, "padding": 2, "stride": 2}),
    (1, {"kernel_size": 2, "groups": 2, "padding": "same"}),
]


def brute_force(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A, G, mean by one backward pass a sample; patches read off by convolving with one-hot kernels."""
    module = model[0]
    groups, n = module.groups, module.weight[0].numel()
    probe = copy.deepcopy(module)
    probe.out_channels = groups * n
    probe.bias = None
    probe.weight = nn.Parameter(
        torch.eye(n).double().view(n, *module.weight.shape[1:]).repeat(groups, *[1] * (x.dim() - 1))
    )
    aa, gg, mean, rows = 0.0, 0.0, 0.0, 0
    for i in range(x.shape[0]):
        p = probe(x[i : i + 1]).detach().flatten(2)[0].view(groups, n, -1)
        y = module(x[i : i + 1]).detach().requires_grad_()
        value = ((model[1](y) - target[i]) ** 2).sum()
        g = torch.autograd.grad(value, y)[0].flatten(2)[0].view(groups, module.out_channels // groups, -1)
        aa, gg, mean, rows = aa + p @ p.mT, gg + g @ g.mT, mean + p.sum(-1), rows + p.shape[-1]
    return aa / x.shape[0], gg / rows, mean / rows


@pytest.mark.parametrize(("dims", "options"), CONVS, ids=[str(c) for c in CONVS])
def test_convolution_factors_equal_brute_force(dims, options):
    model = conv(dims, **options)
    x, target = data(4, *[9, 8][:dims])
    curvature = Curvature.estimate(
        model, squared, [(x[:4], target[:4]), (x[4:], target[4:])], sites=find(model), corrected_samples=0
    )
    factors = curvature.factors("0")
    for ours, theirs in zip((factors.a, factors.g, factors.mean), brute_force(model, x, target)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert factors.samples == 6
    assert factors.shape == (6, model[0].weight[0].numel())


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_factors_equal_brute_force(shape):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double()
    x, target = data(*shape)
    factors = Curvature.estimate(model, squared, [(x, target)], sites=find(model), corrected_samples=0).factors("0")
    aa, gg, rows = 0.0, 0.0, 0
    for i in range(6):
        y = model[0](x[i]).detach().requires_grad_()
        g = torch.autograd.grad(((torch.tanh(y) - target[i]) ** 2).sum(), y)[0].reshape(-1, 4)
        a = x[i].reshape(-1, 5)
        aa, gg, rows = aa + a.T @ a, gg + g.T @ g, rows + len(a)
    torch.testing.assert_close(factors.a[0], aa / 6, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(factors.g[0], gg / rows, rtol=1e-10, atol=1e-12)
    assert factors.locations == rows / 6


def test_quadratic_is_exact_for_one_sample():
    """One sample and one location: A and G are rank one and the form is 1/2 (grad . delta)^2."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, target = data(5, count=1)
    curvature = Curvature.estimate(model, squared, [(x, target)], sites=find(model))
    squared(model, (x, target)).backward()
    for name in ("0", "2"):
        delta = torch.randn(*model.get_submodule(name).weight.shape, dtype=torch.float64)
        slope = float((model.get_submodule(name).weight.grad * delta).sum())
        assert curvature.quadratic(name, delta) == pytest.approx(0.5 * slope**2, rel=1e-10)


def test_quadratic_is_exact_where_inputs_and_gradients_are_independent():
    """All pairs of inputs a_i and gradients c_j: E[(c^T D a)^2] factorises exactly."""
    torch.manual_seed(4)
    inputs, slopes = torch.randn(7, 5).double(), torch.randn(6, 4).double()
    layer = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    pairs = [(a, c) for a in inputs for c in slopes]
    batch = torch.stack([a for a, _ in pairs]), torch.stack([c for _, c in pairs])
    curvature = Curvature.estimate(layer, lambda m, b: (m(b[0]) * b[1]).sum(1).mean(), [batch], sites=find(layer))
    delta = torch.randn(4, 5).double()
    exact = 0.5 * sum(float(c @ delta @ a) ** 2 for a, c in pairs) / len(pairs)
    assert curvature.quadratic("0", delta) == pytest.approx(exact, rel=1e-12)


def test_a_1x1_convolution_is_a_linear_layer_on_pixels():
    torch.manual_seed(5)
    image = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Tanh()).double()
    pixels = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    pixels[0].load_state_dict({"weight": image[0].weight.detach().view(6, 4), "bias": image[0].bias.detach()})
    x, target = data(4, 3, 5)
    one = Curvature.estimate(image, squared, [(x, target)], sites=find(image)).factors("0")
    two = Curvature.estimate(pixels, squared, [(x.permute(0, 2, 3, 1), target)], sites=find(pixels)).factors("0")
    for key in ("a", "g", "mean"):
        torch.testing.assert_close(getattr(one, key), getattr(two, key), rtol=1e-12, atol=1e-12)


def test_masked_tokens_change_nothing():
    """Tokens that the loss ignores enter neither factor, so padding a batch leaves the curvature as it is."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    x = torch.randn(3, 4, 5).double()
    padded = torch.cat([x, 100 * torch.randn(3, 2, 5).double()], 1)

    def loss(m, batch):
        return (torch.tanh(m(batch))[:, :4] ** 2).sum((1, 2)).mean()

    one = Curvature.estimate(model, loss, [x], sites=find(model), corrected_samples=0).factors("0")
    two = Curvature.estimate(model, loss, [padded], sites=find(model), corrected_samples=0).factors("0")
    for key in ("a", "g", "mean", "locations"):
        torch.testing.assert_close(getattr(two, key), getattr(one, key), rtol=1e-12, atol=1e-12)
    assert two.active == pytest.approx(4 / 6)
    torch.testing.assert_close(two.output, one.output * 4 / 6)


def test_a_lattice_that_visits_every_location_gives_the_full_factors():
    model = conv(2, kernel_size=3, padding=1, groups=2)
    x, target = data(4, 6, 4, count=2)
    full = Curvature.estimate(model, squared, [(x, target)], sites=find(model), corrected_samples=0).factors("0")
    turns = Curvature.estimate(
        model, squared, [(x, target)] * 6, sites=find(model), corrected_samples=0, max_locations=4
    ).factors("0")
    torch.testing.assert_close(turns.a, full.a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turns.g, full.g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turns.mean, full.mean, rtol=1e-12, atol=1e-12)


def test_a_module_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.tanh(self.inner(x)))

    torch.manual_seed(7)
    model = Twice().double()
    x, target = data(4)
    factors = Curvature.estimate(model, squared, [(x, target)], sites=find(model)).factors("inner")
    second = torch.tanh(model.inner(x)).detach()
    torch.testing.assert_close(factors.a[0], (x.T @ x + second.T @ second) / 6, rtol=1e-12, atol=1e-12)
    assert factors.locations == 2


class InPlace(nn.Module):
    """Changes a layer's output and its input in place, as residual networks do."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first, self.second, self.inplace = nn.Linear(2, 3), nn.Linear(3, 3), inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * F.relu(self.first(x), inplace=self.inplace)
        z = self.second(y)
        if self.inplace:
            y += z
        else:
            y = y + z
        return F.relu(y, inplace=self.inplace)


def test_operations_in_place_do_not_change_the_factors():
    torch.manual_seed(8)
    plain, inplace = InPlace(False).double(), InPlace(True).double()
    inplace.load_state_dict(plain.state_dict())
    batches = [data(4, 2, seed=seed) for seed in (0, 1)]
    one = Curvature.estimate(plain, squared, batches, sites=find(plain))
    two = Curvature.estimate(inplace, squared, batches, sites=find(inplace))
    for name in one.names:
        assert torch.equal(one.factors(name).a, two.factors(name).a)
        assert torch.equal(one.factors(name).g, two.factors(name).g)


def test_the_model_is_not_touched():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2))
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    x = torch.randn(9, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        Curvature.estimate(model, lambda m, b: (m(b) ** 2).mean(), [x], sites=find(model), outputs={"1": 1})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_output_quadratic_is_the_expected_squared_slope():
    """With one location and gradients independent of the change, 1/2 E[(g^T dy)^2] over all pairs."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, target = data(5)
    batches = [(x, target)]
    curvature = Curvature.estimate(model, squared, batches, find(model), outputs={"0": -1}, corrected_samples=0)
    y = model[0](x).detach().requires_grad_()
    g = torch.autograd.grad(((model[1](y) - target[:, None]) ** 2).sum(), y)[0]
    change = torch.randn(11, 4).double()
    exact = 0.5 * float(((change @ g.T) ** 2).mean())
    assert curvature.output_quadratic("0", change) == pytest.approx(exact, rel=1e-10)
    delta = torch.randn(3, 4).double()
    # A change of a matrix seen as a change of the output: the same prediction.
    as_output = curvature.output_quadratic("1", y.detach() @ delta.T)
    assert as_output == pytest.approx(curvature.quadratic("1", delta), rel=1e-10)


def test_output_quadratic_sums_over_locations():
    model = conv(2, kernel_size=3, padding=1)
    x, target = data(4, 5, 5)
    curvature = Curvature.estimate(
        model, squared, [(x, target)], sites=find(model), corrected_samples=0, outputs={"0": 1}
    )
    change = torch.randn(6, 6, 5, 5).double()
    rows = change.permute(0, 2, 3, 1).reshape(-1, 6)
    exact = 0.5 * float(((rows @ curvature.output("0")) * rows).sum()) / 6
    assert curvature.output_quadratic("0", change) == pytest.approx(exact, rel=1e-12)


def test_sampled_labels_give_the_fisher_of_the_softmax():
    """One input, many draws: G is diag(p) - p p^T within five standard errors."""
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    x = torch.randn(1, 3).double().expand(20000, 3)
    curvature = Curvature.estimate(model, sampled_loss(lambda m, b: m(b)), [x], sites=find(model), corrected_samples=0)
    p = model(x[:1]).softmax(-1)[0].detach()
    torch.testing.assert_close(
        curvature.factors("0").g[0], torch.diag(p) - torch.outer(p, p), rtol=0, atol=5 * 0.5 / 141
    )


def test_saving_keeps_everything(tmp_path):
    model = conv(2, kernel_size=3, groups=2)
    curvature = Curvature.estimate(model, squared, [data(4, 5, 5)], sites=find(model), outputs={"1": 1})
    curvature.save(tmp_path / "curvature.safetensors")
    again = Curvature.load(tmp_path / "curvature.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["curvature.safetensors"]
    assert again.names == curvature.names
    assert again.linear("0", torch.ones(6, 18)) == curvature.linear("0", torch.ones(6, 18))
    assert again.quadratic("0", torch.ones(6, 18)) == curvature.quadratic("0", torch.ones(6, 18))
    for key in ("a", "g", "mean"):
        assert torch.equal(getattr(again.factors("0"), key), getattr(curvature.factors("0"), key))
    change = torch.randn(2, 6, 3, 3).double()
    assert again.output_quadratic("0", change) == curvature.output_quadratic("0", change)
    assert again.output_quadratic("1", change) == curvature.output_quadratic("1", change)


def test_max_samples_stops_after_the_batch_that_reaches_it():
    model = conv(2, kernel_size=3)
    batches = (data(4, 5, 5, seed=seed) for seed in range(5))
    curvature = Curvature.estimate(model, squared, batches, sites=find(model), max_samples=10)
    assert curvature.factors("0").samples == 12
    assert len(list(batches)) == 3


def per_sample_gradients(model, x, target, name):
    """(samples, m, n), one backward pass each."""
    weight = model.get_submodule(name).weight
    found = []
    for i in range(x.shape[0]):
        value = squared(model, (x[i : i + 1], target[i : i + 1]))
        found.append(torch.autograd.grad(value, weight)[0].flatten(1))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("dims", "options"),
    [(2, {"kernel_size": 3, "padding": 1, "groups": 2}), (2, {"kernel_size": 3, "stride": 2}), (1, {"kernel_size": 2})],
)
def test_corrected_eigenvalues_are_moments_of_per_sample_gradients(dims, options):
    model = conv(dims, **options)
    x, target = data(4, *[6, 5][:dims])
    curvature = Curvature.estimate(model, squared, [(x[:4], target[:4]), (x[4:], target[4:])], sites=find(model))
    factors = curvature.factors("0")
    groups, rows = model[0].groups, 6 // model[0].groups
    gradients = per_sample_gradients(model, x, target, "0").view(6, groups, rows, -1)
    exact = (factors.basis.g_vectors.mT @ gradients @ factors.basis.a_vectors).square().mean(0)
    torch.testing.assert_close(factors.basis.moments, exact, rtol=1e-8, atol=1e-9)
    assert float(exact.sum()) == pytest.approx(float(gradients.square().flatten(1).sum(1).mean()), rel=1e-10)
    # The trace of the plain factors is corrected with it, and a change along one pair of eigenvectors is exact.
    assert float(factors.diagonal.sum()) == pytest.approx(float(exact.sum()), rel=1e-8)
    if groups == 1:
        assert float(factors.a[0].trace() * factors.g[0].trace()) == pytest.approx(float(exact.sum()), rel=1e-8)
    delta = torch.zeros(groups, rows, gradients.shape[-1], dtype=torch.float64)
    delta[-1] = torch.outer(factors.basis.g_vectors[-1][:, -1], factors.basis.a_vectors[-1][:, -2])
    slopes = (gradients * delta).flatten(1).sum(1)
    assert factors.quadratic(delta.view(6, -1)) == pytest.approx(0.5 * float(slopes.square().mean()), rel=1e-8)


def test_correction_sees_locations_that_agree():
    """Before a global pooling g is the same everywhere: the plain product is wrong by the number of locations."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1)).double()
    x = torch.randn(50, 3, 1, 1).double().expand(50, 3, 4, 4)
    slopes = torch.randn(50, 4).double()

    def loss(m, batch):
        return (m(batch[0]).flatten(1) * batch[1]).sum(1).mean()

    plain = Curvature.estimate(model, loss, [(x, slopes)], sites=find(model), corrected_samples=0)
    full = Curvature.estimate(model, loss, [(x, slopes)], sites=find(model))
    delta = torch.randn(4, 3).double()
    exact = 0.5 * float((slopes * (x[:, :, 0, 0] @ delta.T)).sum(1).square().mean())
    assert full.quadratic("0", delta) == pytest.approx(exact, rel=0.5)
    assert plain.quadratic("0", delta) < exact / 8
    assert full.factors("0").coherence == pytest.approx(16, rel=0.3)
    torch.testing.assert_close(full.output("0"), plain.output("0"))


@pytest.mark.parametrize(("dims", "options"), CONVS[:6], ids=[str(c) for c in CONVS[:6]])
def test_linear_is_the_slope_of_the_mean_loss(dims, options):
    model = conv(dims, **options)
    x, target = data(4, *[9, 8][:dims])
    batches = [(x[:4], target[:4]), (x[4:], target[4:])]
    curvature = Curvature.estimate(model, squared, batches, sites=find(model), corrected_samples=0)
    (gradient,) = torch.autograd.grad(squared(model, (x, target)), model[0].weight)
    delta = torch.randn(curvature.factors("0").shape, dtype=torch.float64)
    assert curvature.linear("0", delta) == pytest.approx(float((gradient.flatten(1) * delta).sum()), rel=1e-9)


def test_tokens_flattened_before_a_layer_are_one_sample_s_locations():
    """(samples * tokens, n) gives the corrected curvature of (samples, tokens, n)."""

    class Flat(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(12)
            self.inner, self.flat = nn.Linear(5, 4), flat

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x.reshape(-1, 5) if self.flat else x)
            return torch.tanh(y.view(x.shape[0], -1))

    x, target = data(3, 5)
    one, two = (
        Curvature.estimate(m, squared, [(x, target)], sites=find(m)).factors("inner")
        for m in (Flat(True).double(), Flat(False).double())
    )
    torch.testing.assert_close(one.a, two.a)
    delta = torch.randn(4, 5, dtype=torch.float64)
    assert one.quadratic(delta) == pytest.approx(two.quadratic(delta), rel=1e-9)


class Sequence(nn.Module):
    """Tokens through a two-way GRU, self-attention and an LSTM cell."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cell = nn.LSTMCell(8, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        states, _ = self.gru(x)
        states = self.attention(states, states, states, need_weights=False)[0]
        h, c = self.cell(states[:, 0])
        return self.head(self.cell(states[:, 1], (h, c))[0])


def test_recurrent_and_attention_matrices_have_the_gradient_of_autograd():
    torch.manual_seed(0)
    model = Sequence().double().eval()
    data = [(torch.randn(6, 5, 3, dtype=torch.float64), torch.randint(0, 2, (6,))) for _ in range(2)]

    def loss(net, batch):
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    found = find(model)
    curvature = Curvature.estimate(model, loss, data, found)
    assert curvature.names == tuple(site.name for site in found)
    assert len(found) == 9
    (sum(loss(model, batch) for batch in data) / 2).backward()
    for site in found:
        delta = torch.randn(site.shape, dtype=torch.float64)
        gradient = site.tensor(model).grad.reshape(site.shape)
        assert curvature.linear(site.name, delta) == pytest.approx(float((gradient * delta).sum()), abs=1e-12)
        assert curvature.quadratic(site.name, delta) > 0
