"""Every proxy against its definition written slowly, and its laws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke import search
from eke.search import codes, features, flow, sweep
from eke.search.spaces import NB201

SMALL = dataclasses.replace(NB201, resolution=8, channels=4, cells=1)


def batches(count=2, size=6):
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 10, (size,), generator=g))
        for _ in range(count)
    ]


def network(ops="dcbdec"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SMALL.decode(ops).double()


def subject(model=None, data=None):
    generator = torch.Generator().manual_seed(0)
    return search.Subject((model or network()).train(), batches() if data is None else data, generator=generator)


def gradients(model, create_graph=False):
    x, y = batches()[0]
    layers = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return layers, torch.autograd.grad(F.cross_entropy(model(x), y), layers, create_graph=create_graph)


def test_gradnorm_and_snip_are_those_of_the_first_batch():
    weights, grads = gradients(network())
    assert sweep.gradnorm(subject()) == pytest.approx(sum(float(g.norm()) for g in grads))
    expected = sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, grads))
    assert sweep.snip(subject()) == pytest.approx(expected)


def test_grasp_is_a_directional_derivative_of_the_squared_gradient():
    """-w.(Hg) is -1/2 d/dt |g(w + t w)|^2 at t = 0, by central differences."""

    def squared(t):
        model = network()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.weight.mul_(1 + t)
        return sum(float(g.square().sum()) for g in gradients(model)[1])

    step = 1e-5
    assert sweep.grasp(subject()) == pytest.approx(-(squared(step) - squared(-step)) / (4 * step), rel=1e-5)


def test_fisher_is_the_squared_slope_of_gates_on_channels():
    model, (x, y) = network(), batches()[0]
    gates = []

    def gate(_module, _inputs, output):
        shape = (*output.shape[:2], *([1] * (output.ndim - 2)))
        gates.append(torch.ones(shape, dtype=torch.float64, requires_grad=True))
        return output * gates[-1]

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(gate)
    loss = F.cross_entropy(model(x), y)
    expected = sum(float(g.square().mean(0).sum()) / 2 for g in torch.autograd.grad(loss, gates))
    assert sweep.fisher(subject()) == pytest.approx(expected)


def test_fisher_of_tokens_sums_over_places():
    product = torch.randn(4, 5, 3)
    torch.testing.assert_close(sweep._per_channel(product, places_last=False), product.sum(1))


def gated(make):
    """The definition on a model whose linear layers see (..., channels), its convolutions (samples, channels, ...)."""
    model, gates = make(), []
    x = torch.randn(4, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gate(module, _inputs, output):
        middle = [1] * (output.ndim - 2)
        places_last = isinstance(module, nn.Conv1d)
        shape = (len(output), output.shape[1], *middle) if places_last else (len(output), *middle, output.shape[-1])
        gates.append(torch.ones(shape, dtype=torch.float64, requires_grad=True))
        return output * gates[-1]

    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Linear)) and module.weight.requires_grad:
            module.register_forward_hook(gate)
    grads = torch.autograd.grad(model(x).square().mean(), gates)
    return sum(float(g.flatten(1).square().mean(0).sum()) / 2 for g in grads), x


class Signal(nn.Module):
    """A frozen convolution of 5 channels, a convolution along one dimension, a linear layer on four dimensions."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Conv1d(2, 5, 1).requires_grad_(False)
        self.conv, self.linear = nn.Conv1d(5, 3, 3), nn.Linear(4, 7)

    def forward(self, x):
        return self.linear(self.conv(self.frozen(x)).unflatten(1, (3, 1)))


def test_fisher_takes_channels_by_the_kind_of_layer_and_skips_what_is_frozen():
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Signal().double()

    expected, x = gated(make)
    found = sweep.fisher(search.Subject(make(), [x], loss=lambda model, batch: model(batch).square().mean()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_zico_bc_takes_the_sizes_of_feature_maps_away():
    model = network()
    layers = {layer.name: layer for layer in search.zico_layers(model, batches())}
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: sizes.update({f"{name}.weight": o.shape}))
    model(batches()[0][0])
    bias = sum(
        math.log(shape[2] * shape[3] / math.sqrt(shape[1]))
        for name, shape in sizes.items()
        if layers[name].ratio_sum > 0
    )
    assert sweep.zico_bc(subject()) == pytest.approx(search.zico(network(), batches()) - bias)


@pytest.mark.parametrize("depth", [1, 3])
def test_flow_is_conserved_by_every_layer_of_a_chain(depth):
    layers = [nn.Linear(5, 5, bias=False, dtype=torch.float64) for _ in range(depth)]
    chain = nn.Sequential(*layers)
    total = torch.ones(1, 5, dtype=torch.float64)
    for layer in layers:
        total = total @ layer.weight.detach().abs().T
    one = search.Subject(chain, [torch.randn(2, 5, dtype=torch.float64)])
    other = search.Subject(chain, [100 * torch.randn(9, 5, dtype=torch.float64)])
    assert flow.synflow(one) == pytest.approx(depth * float(total.sum()), rel=1e-12)
    assert flow.synflow(one) == flow.synflow(other)
    assert 0 < flow.logsynflow(one) < flow.synflow(one)


def test_logsynflow_of_one_layer_by_hand():
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, -3.0]]))
    assert flow.logsynflow(search.Subject(layer, [torch.zeros(1, 2)])) == pytest.approx(5 * math.log(2))


def test_naswot_of_two_samples_is_their_hamming_distance():
    units = 7
    relu = nn.Sequential(nn.Identity(), nn.ReLU())
    x = torch.tensor([[1.0] * units, [1.0] * 4 + [-1.0] * 3])
    expected = math.log(units**2 - (units - 3) ** 2)
    assert codes.naswot(search.Subject(relu, [x])) == pytest.approx(expected)
    assert codes.naswot(search.Subject(relu, [torch.ones(2, units)])) == float("-inf")


def test_naswot_adds_the_kernels_of_all_rectifiers():
    model, (x, _) = network().train(), batches()[0]
    kernel = np.zeros((6, 6))

    def add(_module, _inputs, output):
        code = (output > 0).flatten(1).double().numpy()
        kernel[:] += code @ code.T + (1 - code) @ (1 - code).T

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(add)
    model(x)
    assert codes.naswot(subject()) == pytest.approx(np.linalg.slogdet(kernel)[1])


@pytest.mark.parametrize("samples", [3, 70])
def test_swap_counts_distinct_patterns(samples):
    x = torch.randn(samples, 40, generator=torch.Generator().manual_seed(0))
    x[:, 5] = x[:, 7]
    seen = {tuple(column) for column in (x > 0).T.tolist()}
    assert codes.swap(search.Subject(nn.ReLU(), [x])) == len(seen)


@pytest.mark.parametrize(
    "act", [nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ReLU6(), nn.LeakyReLU()]
)
def test_codes_of_every_rectifier_are_signs_of_what_goes_in(act):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    (found,) = codes.codes(search.Subject(act, [x.clone()]), "naswot")
    assert torch.equal(found, x > 0)


def test_meco_by_loops():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).double()
    made = search.Subject(model, [torch.zeros(4, 2, 6, 6, dtype=torch.float64)], generator=torch.Generator())
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator()).double()
    total = 0.0
    for output in (model[0](x), model[1](model[0](x)), model(x)):
        rows = output[0].detach().flatten(1).numpy()
        total += np.linalg.eigvalsh(np.nan_to_num(np.corrcoef(rows)))[0]
    assert features.meco(made) == pytest.approx(total, abs=1e-9)


def test_zen_of_a_linear_network_is_known():
    """f(x) - f(x + 0.01 x') of one convolution without norms is that of x' alone, so it scales by 0.01."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    made = search.Subject(model, [torch.zeros(3, 1, 4, 4, dtype=torch.float64)], generator=torch.Generator())
    g = torch.Generator()
    _, other = torch.randn(3, 1, 4, 4, generator=g), torch.randn(3, 1, 4, 4, generator=g)
    weight = torch.randn(2, 1, 1, 1, generator=g)
    expected = math.log(0.01 * float(F.conv2d(other, weight).abs().flatten(1).sum(1).mean()))
    assert features.zen(made) == pytest.approx(expected, rel=1e-5)


def test_zen_adds_the_scales_of_batch_norms():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    made = search.Subject(model.train(), [torch.zeros(3, 1, 4, 4)], generator=torch.Generator())
    g = torch.Generator()
    x, other = torch.randn(3, 1, 4, 4, generator=g), torch.randn(3, 1, 4, 4, generator=g)
    inner = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)).train()
    with torch.no_grad():
        inner[0].weight.copy_(torch.randn(2, 1, 1, 1, generator=g))
        change = (inner(x) - inner(x + 0.01 * other)).abs().flatten(1).sum(1).mean()
    expected = math.log(float(change)) + 0.5 * math.log(float(inner[1].running_var.mean()))
    assert features.zen(made) == pytest.approx(expected, rel=1e-4)


def test_entropy_of_independent_channels_is_that_of_the_uniform_law():
    rows = torch.linalg.qr(torch.randn(400, 5, dtype=torch.float64) - 0.0)[0]
    rows = torch.linalg.qr(rows - rows.mean(0))[0]
    rows = rows - rows.mean(0)
    assert features._entropy(rows[None]) == pytest.approx(math.log(5), abs=1e-3)
    assert features._entropy(torch.ones(2, 3, 4, 4)) == 0.0


def test_trainability_is_at_most_zero_and_nearly_so_for_an_orthogonal_block():
    block = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False))
    nn.init.orthogonal_(block[0].weight)
    x = torch.randn(64, 8, 8, 8, requires_grad=True)
    value = features._trainable(x, block(x), torch.Generator().manual_seed(0))
    assert -0.1 < value <= 1e-5
    assert features._trainable(x, 10 * block(x), torch.Generator().manual_seed(0)) < -5
    assert features._trainable(x, x, torch.Generator()) == float("-inf")
    assert features._trainable(x, torch.ones(64, 8, 8, 8), torch.Generator()) == float("-inf")


def test_blocks_are_the_outermost_items_with_children():
    model = SMALL.decode("dddddd")
    assert features.blocks(model) == list(model.blocks)
    stages = nn.Module()
    stages.all = nn.Sequential(nn.Sequential(*[SMALL.decode("cccccc").blocks[0] for _ in range(2)]))
    assert len(features.blocks(stages)) == 2


def test_constant_networks_have_scores():
    found = search.score(lambda: SMALL.decode("aaaaaa").double(), batches(), proxies=tuple(search.PROXIES)).means
    for name in ("zico", "log_numel", "gradnorm", "snip", "grasp", "synflow", "logsynflow"):
        assert found[name] == 0.0
    assert found["az_nas.trainability"] == found["zen"] == float("-inf")


def test_proxies_that_cannot_be_computed_say_so():
    words = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    data = [torch.zeros(2, 6, dtype=torch.long)]
    for name in ("synflow", "zen", "meco", "az_nas"):
        with pytest.raises(ValueError, match=f"{name} replaces the inputs.*got torch.int64.*leave '{name}' out"):
            search.score(words, data, proxies=(name,))
    with pytest.raises(ValueError, match=r"naswot reads the codes of rectifiers.*none ran in Sequential"):
        search.score(words, data, proxies=("naswot",))
    flat = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="zen needs features with places, and Sequential has none"):
        search.score(flat, [torch.randn(2, 4)], proxies=("zen",))
    with pytest.raises(ValueError, match=r"az_nas looks at blocks.*found 0 of Sequential"):
        search.score(flat, [torch.randn(2, 4)], proxies=("az_nas",))
    with pytest.raises(ValueError, match="grasp needs a batch, got \\(\\)"):
        sweep.grasp(search.Subject(flat))
