"""Sparse layers give what the masked dense layer gives, by every way, and keep what is gone gone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from eke.nn import SparseConv2d, SparseLinear, sparse_conv, sparse_linear, sparse_swap, use_sparse

WAYS = ["native", "csr", "dense", "compact"]


def pair(inputs=33, outputs=20, *, density=0.2, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    mask = torch.rand(outputs, inputs, generator=generator) < density
    mask[3], mask[:, 5] = False, False
    masked = copy.deepcopy(linear)
    with torch.no_grad():
        masked.weight.mul_(mask)
    return linear, mask, masked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_gives_the_masked_dense_product(way, bias):
    linear, mask, masked = pair(bias=bias)
    layer = SparseLinear.from_dense(linear, mask, way=way)
    for shape in ((7, 33), (1, 33), (2, 3, 33), (33,), (0, 33)):
        x = torch.randn(*shape)
        wanted = masked(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-5)
    assert torch.equal(layer.to_dense(), masked.weight)
    assert torch.equal(layer.mask(), mask & (mask.sum(1, keepdim=True) > 0))
    assert layer.kept == int(mask.sum())


@pytest.mark.parametrize("way", WAYS)
def test_changes_of_parameters_are_seen_by_every_way(way):
    linear, mask, _ = pair()
    layer, x = SparseLinear.from_dense(linear, mask, way=way), torch.randn(4, 33)
    with torch.no_grad():
        before = layer(x)
        layer.values.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        layer.load_state_dict(SparseLinear.from_dense(linear, mask).state_dict())
        torch.testing.assert_close(layer(x), before)
        layer.values = nn.Parameter(3 * layer.values)
        layer.bias = nn.Parameter(3 * layer.bias)
        torch.testing.assert_close(layer(x), 3 * before)
        layer.values.data, layer.bias.data = layer.values / 3, layer.bias / 3
        torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("block", [2, 4])
def test_rows_with_the_same_columns_are_stored_together(block):
    mask = (torch.rand(24 // block, 30) < 0.3).repeat_interleave(block, 0)
    mask[:block] = True
    mask[block : 2 * block, ::2] = False
    mask[block : 2 * block, 1::2] = True
    linear = nn.Linear(30, 24)
    layer, x = SparseLinear.from_dense(linear, mask), torch.randn(5, 30)
    assert layer.block == block
    assert f"{block} rows share their columns" in repr(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, linear.weight * mask, linear.bias))
    assert torch.equal(layer.to_dense(), linear.weight * mask)


def test_only_kept_entries_are_trained():
    linear, mask, masked = pair()
    layer, x, y = SparseLinear.from_dense(linear, mask), torch.randn(16, 33), torch.randn(16, 20)
    assert sum(p.numel() for p in layer.parameters()) == int(mask.sum()) + 20
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (layer, masked)]
    for _ in range(5):
        for net, optimizer in zip((layer, masked), optimizers):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            if net is masked:
                masked.weight.grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(layer.to_dense(), masked.weight)
    torch.testing.assert_close(layer.bias, masked.bias)


def test_state_comes_back_bit_for_bit():
    linear, mask, _ = pair()
    layer = SparseLinear.from_dense(linear, mask)
    other = SparseLinear(mask)
    assert not torch.equal(other.values, layer.values)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.to_dense(), layer.to_dense())
    with torch.no_grad():
        layer(torch.randn(3, 33))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(back.to_dense(), layer.to_dense())
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.values.zero_()
        assert float(layer(torch.ones(1, 33)).abs().sum()) > float(twin(torch.ones(1, 33)).abs().sum())


def test_the_fastest_way_is_measured_once_for_each_size(monkeypatch):
    asked = []

    def timed(self, batch):
        asked.append(batch)
        return "dense"

    monkeypatch.setattr(sparse_linear, "_FASTEST", {})
    monkeypatch.setattr(SparseLinear, "_timed", timed)
    linear, mask, _ = pair()
    layer = SparseLinear.from_dense(linear, mask)
    with torch.no_grad():
        for batch in (3, 4, 4, 5, 5000, 6000):
            layer(torch.randn(batch, 33))
        SparseLinear.from_dense(linear, mask)(torch.randn(4, 33))
    assert asked == [4, 8, 1024]
    layer(torch.randn(64, 33))  # gradients are recorded: there is nothing to choose
    assert asked == [4, 8, 1024]
    assert SparseLinear.from_dense(linear, mask, way="csr").way == "csr"


def test_measuring_takes_the_fastest(monkeypatch):
    linear, mask, _ = pair()
    monkeypatch.setattr(sparse_linear, "_FASTEST", {})
    seconds = iter([4.0, 3.0, 1.0, 2.0] * 3)
    monkeypatch.setattr(sparse_linear, "seconds", lambda run: next(seconds))
    assert SparseLinear.from_dense(linear, mask).fastest(8) == "dense"
    monkeypatch.setattr(sparse_linear, "_FASTEST", {})
    seconds = iter([4.0, 3.0, 2.0] * 3)  # every row and column keeps something: nothing to compact
    assert SparseLinear.from_dense(linear, torch.ones_like(mask)).fastest(8) == "dense"


def test_new_layers_keep_the_scale():
    layer = SparseLinear(torch.rand(300, 400) < 0.1)
    layer.reset_parameters(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.9 < float(layer(torch.randn(200, 400)).std()) < 1.1


def test_compile_export_autocast_and_other_types():
    linear, mask, masked = pair()
    layer, x = SparseLinear.from_dense(linear, mask), torch.randn(6, 33)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), masked(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), masked(x))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), masked(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), masked(x), rtol=0.02, atol=0.02)
    double = SparseLinear.from_dense(linear.double(), mask)
    with torch.no_grad():
        torch.testing.assert_close(double(x.double()), masked.double()(x.double()))
        with torch.inference_mode():
            inside = SparseLinear.from_dense(linear, mask)
            torch.testing.assert_close(inside(x.double()), masked(x.double()))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolutions(stride, kind):
    conv = nn.Conv2d(12, 10, 1, stride=stride)
    mask = torch.rand(10, 12, 1, 1) < 0.4
    layer = SparseConv2d.from_dense(conv, mask)
    with torch.no_grad():
        conv.weight.mul_(mask)
    x = torch.randn(3, 12, 7, 9).to(memory_format=kind)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-5)
            torch.testing.assert_close(layer(x[0]), conv(x[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"padding": 1}, {"padding": (2, 0), "stride": (2, 1)}, {"padding": "same", "dilation": 2},
        {"padding": "valid", "dilation": (1, 2), "bias": False}, {"stride": 3, "padding": 1},
    ],
    ids=str,
)  # fmt: skip
def test_convolutions_of_any_kernel(options, kind):
    conv = nn.Conv2d(6, 10, (3, 5), **options)
    mask = torch.rand_like(conv.weight) < 0.3
    with torch.no_grad():
        conv.weight.mul_(mask)
    layer = SparseConv2d.from_dense(conv, mask)
    assert torch.equal(layer.to_dense(), conv.weight)
    x = torch.randn(5, 6, 11, 13).to(memory_format=kind).requires_grad_()
    y, wanted = layer(x), conv(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
    weights = torch.randn_like(wanted)
    (ours,), (theirs,) = (torch.autograd.grad((z * weights).sum(), x) for z in (y, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer(x[0]), wanted[0], rtol=0, atol=1e-5)


def test_images_go_in_parts_that_stay_in_the_cache(monkeypatch):
    conv = nn.Conv2d(4, 8, 3, padding=1)
    layer = SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 2)
    x = torch.randn(7, 4, 6, 6)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr(sparse_conv, "_CACHED", 3 * 4 * 36 * 9)
        assert len(torch.split(x, 3)) == 3
        torch.testing.assert_close(layer(x), whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(whole, conv(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("faster", [True, False])
def test_larger_kernels_are_replaced_where_the_sparse_one_takes_less_time(faster, monkeypatch):
    monkeypatch.setattr(SparseLinear, "_timed", lambda self, batch: "dense")
    monkeypatch.setattr(sparse_linear, "_FASTEST", {})
    times = iter([1.0, 2.0] * 3 if faster else [2.0, 1.0] * 3)
    monkeypatch.setattr(sparse_swap, "seconds", lambda run: next(times))
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.2)
    made = use_sparse(model, (x,))
    assert [(layer.name, layer.samples, layer.way) for layer in made.layers] == [
        ("0", 64, "native" if faster else "dense")
    ]
    assert type(made.model[0]) is (SparseConv2d if faster else nn.Conv2d)


def test_random_numbers_and_modes_stay():
    linear, mask, _ = pair()
    state = torch.get_rng_state()
    linear.requires_grad_(False)
    layer = SparseLinear.from_dense(linear.eval(), mask)
    assert torch.equal(state, torch.get_rng_state())
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())


def test_what_does_not_fit_is_refused():
    linear, mask, _ = pair()
    with pytest.raises(
        ValueError, match=r"boolean mask \(out_features, in_features\), got \(20, 33\) of torch\.float32"
    ):
        SparseLinear(mask.float())
    with pytest.raises(ValueError, match=r"weight's shape \(20, 33\), got \(33, 20\)"):
        SparseLinear.from_dense(linear, mask.T)
    with pytest.raises(ValueError, match="way must be None or one of 'native', 'csr', 'dense', 'compact', got 'fast'"):
        SparseLinear(mask, way="fast")
    with pytest.raises(ValueError, match=r"takes \(\.\.\., 33\), got \(4, 32\)"):
        SparseLinear(mask)(torch.ones(4, 32))
    for other in (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"),
    ):
        assert not SparseConv2d.fits(other)
        with pytest.raises(ValueError, match=rf"one group .*groups={other.groups}, padding=.*{other.padding_mode}"):
            SparseConv2d.from_dense(other, torch.ones_like(other.weight, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weight's shape \(4, 4, 1, 1\), got \(4, 4\)"):
        SparseConv2d.from_dense(nn.Conv2d(4, 4, 1), torch.ones(4, 4, dtype=torch.bool))


class Mixed(nn.Module):
    """A pointwise convolution, a wider one, two linear layers of which one is called twice, and one never."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 12, 1)
        self.first, self.second, self.unused = nn.Linear(12, 12), nn.Linear(12, 5), nn.Linear(12, 12)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(torch.rand_like(parameter) < 0.2)

    def forward(self, x):
        z = self.point(torch.relu(self.wide(x))).mean((2, 3))
        return self.second(torch.relu(self.first(self.first(z))))


@pytest.mark.parametrize("fastest", ["native", "dense"])
def test_layers_with_zeros_are_replaced_where_that_is_faster(fastest, monkeypatch):
    monkeypatch.setattr(SparseLinear, "_timed", lambda self, batch: fastest)
    monkeypatch.setattr(sparse_linear, "_FASTEST", {})
    monkeypatch.setattr(sparse_swap, "_compared", lambda made, module, images: fastest)
    model, x = Mixed().train(), torch.randn(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    made = use_sparse(model, (x,))
    assert [(layer.name, layer.samples, layer.way) for layer in made.layers] == [
        ("wide", 144, fastest), ("point", 144, fastest), ("first", 4, fastest), ("second", 4, fastest),
    ]  # fmt: skip
    kinds = {name: type(module) for name, module in made.model.named_children()}
    new = fastest == "native"
    assert kinds["point"] is (SparseConv2d if new else nn.Conv2d)
    assert kinds["first"] is kinds["second"] is (SparseLinear if new else nn.Linear)
    assert kinds["wide"] is (SparseConv2d if new else nn.Conv2d)
    assert kinds["unused"] is nn.Linear
    assert model.training
    assert not made.model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(made.model(x), model(x))
    assert use_sparse(model, (x,), least=0.95).layers == ()


def test_models_that_use_their_layers_weights_are_told(monkeypatch):
    monkeypatch.setattr(SparseLinear, "_timed", lambda self, batch: "native")
    monkeypatch.setattr(sparse_linear, "_FASTEST", {})

    class Reads(Mixed):
        def forward(self, x):
            return super().forward(x) + self.first.weight.sum()

    class Noisy(Mixed):
        def forward(self, x):
            return super().forward(x) + torch.randn(1)

    x = torch.randn(4, 3, 6, 6)
    with pytest.raises(ValueError, match=r"Reads does not run with other layers .*no attribute 'weight'"):
        use_sparse(Reads(), (x,))
    with pytest.raises(ValueError, match=r"Outputs with sparse layers are off by .* gives others every time"):
        use_sparse(Noisy(), (x,))
    with pytest.raises(ValueError, match=r"share of zeros in \[0, 1\), got 1\.5"):
        use_sparse(Mixed(), (x,), least=1.5)


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(8, 8) < 0.2)
    assert use_sparse(model, (torch.randn(3, 8),)).layers == ()
