"""Converted models keep what they were where the window is wide, and learn the rest from the softmax."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eke.nn import (
    HybridAttention,
    attention_sites,
    linearize,
    low_rank_tuning_,
    output_errors,
    transfer_attention_,
    weight_divergences,
)
from eke.nn.softmax_sites import call_on, read_mask

DOUBLE = torch.float64


def drawn(window: int, feature_map: str = "hedgehog") -> HybridAttention:
    torch.manual_seed(0)
    layer = HybridAttention(2, 8, window=window, feature_map=feature_map).double()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer.requires_grad_(False)


def qkv(length: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, 2, length, 8, dtype=DOUBLE) for _ in range(3))


def by_definition(layer: HybridAttention, q: Tensor, k: Tensor, *, causal: bool, real: Tensor) -> Tensor:
    """The formula, one pair after the other."""
    f, g = layer.query_map(q.transpose(1, 2)), layer.key_map(k.transpose(1, 2))
    batch, heads, length, dim = q.shape
    weights = torch.zeros(batch, heads, length, length, dtype=DOUBLE)
    for n in range(batch):
        for h in range(heads):
            gain = 1.0 if layer.balance is None else float(layer.balance[h].exp())
            for i in range(length):
                seen = [j for j in range(length) if real[n, j] and (j <= i or not causal)]
                near = [j for j in seen if abs(i - j) < layer.window]
                most = max((float(q[n, h, i] @ k[n, h, j]) / dim**0.5 for j in near), default=0.0)
                for j in seen:
                    score = float(q[n, h, i] @ k[n, h, j]) / dim**0.5
                    far = gain * float(f[n, i, h] @ g[n, j, h])
                    weights[n, h, i, j] = torch.tensor(score - most, dtype=DOUBLE).exp() if j in near else far
    return weights / (weights.sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 5, 40])
def test_all_forms_are_the_formula(causal, window):
    layer = drawn(window)
    for length in (1, 7, 11):
        q, k, v = qkv(length, batch=2)
        real = torch.rand(2, length) > 0.3
        real[:, -1] = True
        wanted = by_definition(layer, q, k, causal=causal, real=real)
        torch.testing.assert_close(layer.weights(q, k, causal=causal, real=real), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer(q, k, v, causal=causal, real=real)[0], wanted @ v, rtol=0, atol=1e-11)


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "favor", "elu", "relu"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_all_positions_is_softmax_attention(feature_map, causal):
    layer, (q, k, v) = drawn(20, feature_map), qkv(20)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # The denominator's 1e-6 is all that differs.
    torch.testing.assert_close(layer(q, k, v, causal=causal)[0], wanted, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("window", [0, 1, 4, 40])
@pytest.mark.parametrize("cut", [1, 9, 22])
def test_a_causal_sequence_goes_on_where_it_ended(window, cut):
    layer, (q, k, v) = drawn(window), qkv(23)
    real = torch.rand(3, 23) > 0.2
    whole, last = layer(q, k, v, causal=True, real=real)
    first, state = layer(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], causal=True, real=real[:, :cut])
    parts = [first]
    for t in range(cut, 23):
        out, state = layer(*(x[:, :, t : t + 1] for x in (q, k, v)), causal=True, real=real[:, t : t + 1], state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)
    for ours, theirs in zip(state, last):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    # Queries of the last positions alone, with all keys.
    late, _ = layer(q[:, :, cut:], k, v, causal=True, real=real)
    torch.testing.assert_close(late, whole[:, :, cut:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_as_if_it_were_not_there(causal):
    layer, (q, k, v) = drawn(4), qkv(12)
    real = torch.ones(3, 12, dtype=torch.bool)
    real[:, 9:] = False
    out, _ = layer(q, k, v, causal=causal, real=real)
    alone, _ = layer(q[:, :, :9], k[:, :, :9], v[:, :, :9], causal=causal)
    torch.testing.assert_close(out[:, :, :9], alone, rtol=0, atol=1e-12)
    nothing, _ = layer(q, k, v, causal=causal, real=torch.zeros_like(real))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_the_past_does_not_know_the_future():
    layer, (q, k, v) = drawn(4), qkv(16)
    before, _ = layer(q, k, v, causal=True)
    for x in (q, k, v):
        x[:, :, 10:] += 1
    after, _ = layer(q, k, v, causal=True)
    assert torch.equal(before[:, :, :10], after[:, :, :10])


@pytest.mark.parametrize("causal", [True, False])
def test_derivatives_are_those_of_the_formula(causal):
    layer = drawn(3).requires_grad_(True)
    inputs = [x.requires_grad_() for x in qkv(7, batch=1)]
    parameters = [*inputs, *layer.parameters()]
    ours = torch.autograd.grad(layer(*inputs, causal=causal)[0].square().sum(), parameters)
    q, k, v = inputs
    theirs = torch.autograd.grad((layer.weights(q, k, causal=causal) @ v).square().sum(), parameters)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_half_precision_sums_in_float32():
    layer, (q, k, v) = drawn(4).float(), (x.float() for x in qkv(64))
    wanted, _ = layer(q, k, v, causal=True)
    for dtype in (torch.float16, torch.bfloat16):
        out, state = layer(q.to(dtype), k.to(dtype), v.to(dtype), causal=True)
        assert out.dtype == dtype
        assert state.memory.dtype == torch.float32
        assert float((out.float() - wanted).abs().max()) < 5e-2


# Masks


def test_masks_are_read():
    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    past = torch.ones(4, 4, dtype=torch.bool).tril()
    for mask, kind in ((padding[:, None, None].expand(2, 1, 4, 4), False), (padding[:, None, None] & past, True)):
        for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
            causal, real = read_mask(given, 4, 4, causal=False)
            assert causal is kind
            assert torch.equal(real, padding)
    assert read_mask(torch.ones(1, 4, dtype=torch.bool), 1, 4, causal=True)[0] is True
    alone = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    alone[..., 0] = True  # who sees one key only sees it from all sides or from the past
    assert [read_mask(alone, 4, 4, causal=kind)[0] for kind in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(4, 4, dtype=torch.bool).tril() & ~torch.ones(4, 4, dtype=torch.bool).tril(-2), "neither padding"),
        (torch.randn(4, 4), "a bias is added"),
        (torch.ones(1, 2, 4, 4).cumprod(1).bool().tril(1) & torch.tensor([True, False])[:, None, None], "different"),
        (torch.ones(3, 4, dtype=torch.bool), r"\(3, 4\) is not one of 4 queries"),
    ],
)  # fmt: skip
def test_other_masks_are_refused(mask, words):
    with pytest.raises(ValueError, match=words):
        read_mask(mask, 4, 4, causal=False)


# Whole models


class Own(nn.Module):
    """A hand-written attention."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(16, 48), nn.Linear(16, 16), causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two attentions in a row."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.first, self.second = Own(causal), Own(causal)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.first(x, mask)
        return x + self.second(x, mask)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def trained(make=Net, seed: int = 0) -> nn.Module:
    """A net whose attention is not flat."""
    torch.manual_seed(seed)
    net = make().eval()
    for name, parameter in net.named_parameters():
        if "qkv.weight" in name or "in_proj_weight" in name:
            parameter.data *= 3
    return net


def rows(count: int = 4, length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, length, 16, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("make", [Net, lambda: Net(causal=False), encoder], ids=["causal", "both sides", "torch"])
def test_a_wide_window_leaves_a_model_as_it_was(make):
    net, batches = trained(make), rows()
    found = linearize(net, batches, window=24, steps=0)
    assert len(found.layers) == 2
    assert all(layer.error < 1e-5 for layer in found.layers)
    with torch.no_grad():
        # To both sides, what the window has is taken from the sum over all keys: float32 leaves 24 x 6e-8 of it.
        torch.testing.assert_close(found.model(batches[0]), net(batches[0]), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("objective", ["output", "weights"])
@pytest.mark.parametrize("make", [Net, encoder], ids=["own", "torch"])
def test_transfer_brings_the_outputs_nearer(make, objective):
    net, batches = trained(make), rows()
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    settings = {"window": 0, "learning_rate": 5e-2, "objective": objective, "divergence": True}
    found = linearize(net, batches, steps=30, **settings)
    assert torch.equal(torch.get_rng_state(), random)
    for layer, untaught in zip(found.layers, linearize(net, batches, steps=0, **settings).layers):
        assert layer.error_before == untaught.error
        if objective == "output":
            assert layer.error < 0.9 * untaught.error
        else:
            assert 0 < layer.divergence < 0.9 * untaught.divergence
    assert found.steps == 30
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    # Nothing but the substitutes learned.
    assert all(torch.equal(found.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_errors_are_those_of_the_layers():
    net, batches = trained(), rows(1)
    found = linearize(net, batches, window=2, steps=0, match="first")
    seen = {}
    for name, model in (("softmax", net), ("linear", found.model)):
        keep = model.first.out.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        with torch.no_grad():
            model(batches[0])
        keep.remove()
    wanted = (seen["linear"] - seen["softmax"]).norm() / seen["softmax"].norm()
    assert found.layers[0].error == pytest.approx(float(wanted), rel=1e-4)
    assert weight_divergences(found.model, batches)["first"] > 0


def test_the_smallest_window_that_does_is_taken():
    net, batches = trained(), rows()
    found = linearize(net, batches, window=(0, 4, 24), steps=10, tolerance=1e-3)
    assert [layer.window for layer in found.layers] == [24, 24]
    assert found.steps == 30
    assert all(layer.error < 1e-3 for layer in found.layers)
    easy = linearize(net, batches, window=(0, 24), steps=10, tolerance=10.0)
    assert [layer.window for layer in easy.layers] == [0, 0]
    assert easy.steps == 10


def test_a_state_is_loaded_into_a_model_converted_alike():
    net, batches = trained(), rows()
    found = linearize(net, batches, window=4, steps=5)
    again = linearize(trained(seed=1), batches, window=4, steps=0, seed=2).model
    again.load_state_dict(found.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batches[0]), found.model(batches[0]))
        assert torch.equal(copy.deepcopy(found.model)(batches[0]), found.model(batches[0]))


def test_masks_reach_the_converted_attention():
    net, x = trained(lambda: Net(causal=False)), rows(1)[0]
    real = torch.ones(4, 24, dtype=torch.bool)
    real[:, 18:] = False
    mask = real[:, None, None].expand(4, 1, 24, 24)
    batch = {"x": x, "mask": mask}
    found = linearize(net, [batch], window=4, steps=2)
    with torch.no_grad():
        out = found.model(x, mask)[:, :18]
        torch.testing.assert_close(out, found.model(x[:, :18]), rtol=1e-4, atol=1e-5)
    past = torch.ones(24, 24, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="converted to see all positions and is now asked to see the past alone"):
        found.model(x, past)
    with pytest.raises(
        ValueError, match="Converted attention cannot do this: its mask is neither padding nor the past"
    ):
        found.model(x, past & ~past.tril(-3))


def test_torch_encoders_take_padding_and_the_past():
    net, x = trained(encoder), rows(1)[0]
    padded = torch.zeros(4, 24, dtype=torch.bool)
    padded[:, 18:] = True
    both = linearize(net, [x], window=4, steps=0).model
    with torch.no_grad():
        out = both(x, src_key_padding_mask=padded)[:, :18]
        torch.testing.assert_close(out, both(x[:, :18]), rtol=1e-4, atol=1e-5)
    past = nn.Transformer.generate_square_subsequent_mask(24)

    def causal(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, mask=past, is_causal=True)

    decoder = linearize(net, [x], window=24, steps=0, forward=causal).model
    with torch.no_grad():
        torch.testing.assert_close(causal(decoder, x), causal(net, x), rtol=1e-4, atol=1e-5)


def test_attention_to_another_sequence_has_no_window_whatever_the_lengths():
    torch.manual_seed(0)
    net = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    x, memory, other = (torch.randn(2, length, 16) for length in (12, 12, 9))
    found = linearize(net, [x], window=4, steps=2, forward=lambda model, batch: model(batch, memory))
    assert {layer.name: layer.window for layer in found.layers} == {"self_attn": 4, "multihead_attn": 0}
    assert found.model(x, other).shape == x.shape


def test_a_module_that_attends_to_itself_and_to_others_is_left():
    net, x = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True), Own()]), rows(1)[0]

    def call(model: nn.Module, batch: Tensor) -> Tensor:
        y, _ = model[0](batch, batch, batch)
        return model[1](y + model[0](batch, y, y)[0])

    found = linearize(net, [x], window=4, steps=0, forward=call)
    assert [layer.name for layer in found.layers] == ["1"]
    assert [(site.name, site.reason) for site in found.left] == [
        ("0", "it attends in several ways, which one substitute cannot")
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_batches_of_one_real_position_are_of_the_kind_that_was_converted(causal):
    net, x = trained(lambda: Net(causal=False)), rows(1)[0]
    past = torch.ones(24, 24, dtype=torch.bool).tril() if causal else torch.ones(24, 24, dtype=torch.bool)
    real = torch.arange(24) == 0
    model = linearize(net, [{"x": x, "mask": past[None, None]}], window=4, steps=0).model
    with torch.no_grad():
        out = model(x, (past & real)[None, None].expand(4, 1, 24, 24))[:, :1]
        torch.testing.assert_close(out, net(x[:, :1]), rtol=1e-4, atol=1e-5)


def test_keys_of_torch_attention_are_hidden_or_seen_and_not_weighed():
    net, x, bias = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)]), rows(1)[0], torch.randn(4, 24)

    def call(model: nn.Module, batch: Tensor, padding: Tensor | None = None) -> Tensor:
        return model[0](batch, batch, batch, key_padding_mask=padding, need_weights=False)[0]

    with pytest.raises(ValueError, match="'0': a bias is added to its scores"):
        linearize(net, [x], steps=0, forward=lambda model, batch: call(model, batch, bias))
    model = linearize(net, [x], window=24, steps=0, forward=call).model
    with pytest.raises(ValueError, match="Converted attention cannot do this: a bias is added to its scores"):
        call(model, x, bias)
    hidden = torch.arange(24) >= 18
    hidden = hidden.expand(4, -1)
    for padding in (hidden, torch.zeros(4, 24).masked_fill(hidden, -torch.inf)):
        torch.testing.assert_close(call(model, x, padding)[:, :18], call(net, x, hidden)[:, :18], rtol=1e-4, atol=1e-5)


def test_low_rank_tuning_lowers_the_loss_and_leaves_the_shape():
    net, batches = trained(), rows()
    teacher = copy.deepcopy(net)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), teacher(batch).detach())

    model = linearize(net, batches, window=0, steps=10).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        start = sum(float(loss(model, b)) for b in batches)
    low_rank_tuning_(model, batches, loss=loss, steps=30, rank=2, learning_rate=1e-2)
    with torch.no_grad():
        end = sum(float(loss(model, b)) for b in batches)
    assert end < 0.8 * start
    assert model.state_dict().keys() == before.keys()
    change = model.state_dict()["first.qkv.weight"] - before["first.qkv.weight"]
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 2
    assert all(p.requires_grad and p.grad is None for n, p in model.named_parameters() if "linear" not in n)
    assert list(dict(model.named_parameters())) == list(
        dict(linearize(net, batches, window=0, steps=0).model.named_parameters())
    )


def test_torch_attention_is_tuned_too():
    net, batches = trained(encoder), rows()
    model = linearize(net, batches, window=2, steps=0).model
    losses = low_rank_tuning_(model, batches, loss=lambda m, x: m(x).square().mean(), steps=3, rank=2)
    assert len(losses) == 3
    assert "LinearMultiheadAttention" in {type(module).__name__ for module in model.modules()}


def test_transfer_may_be_of_some_layers():
    net, batches = trained(), rows()
    model = linearize(net, batches, window=0, steps=0).model
    before, start = copy.deepcopy(model.state_dict()), output_errors(model, batches)
    transfer_attention_(model, batches, steps=10, only=["second"])
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("second.linear"))
    assert output_errors(model, batches)["second"] < start["second"]


def test_modules_keep_their_flags():
    net, batches = trained().train(), rows()
    net.second.eval()
    model = linearize(net, batches, window=0, steps=2).model
    assert net.training
    assert model.first.training
    assert not model.second.training
    assert attention_sites(net, batches[0])[0].name == "first"
    assert net.first.training


@pytest.mark.parametrize("make", [Net, encoder], ids=["own", "torch"])
@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "favor", "elu"])
def test_models_of_every_type_are_converted_and_moved(make, feature_map):
    batches = [x.double() for x in rows()]
    settings = {"window": 4, "steps": 2, "feature_map": feature_map}
    double = linearize(trained(make).double(), batches, **settings)
    assert all(p.dtype == DOUBLE for p in double.model.parameters())
    single = linearize(trained(make), rows(), **settings)
    for ours, theirs in zip(double.layers, single.layers):
        assert ours.error == pytest.approx(theirs.error, rel=1e-3)
    with torch.no_grad():
        wanted = single.model(rows()[0])
        for dtype, near in ((DOUBLE, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
            out = copy.deepcopy(single.model).to(dtype)(rows()[0].to(dtype))
            assert out.dtype == dtype
            assert float((out.double() - wanted).norm() / wanted.norm()) < near
    half = linearize(trained(make).bfloat16(), [x.bfloat16() for x in rows()], **settings)
    assert {p.dtype for n, p in half.model.named_parameters() if ".linear." in n} <= {torch.float32}


# Bad input


class Biased(Own):
    """Adds a bias to the scores."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.randn(x.shape[1], x.shape[1]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": -1}, r"got \[-1\]"),
        ({"window": ()}, r"got \[\]"),
        ({"steps": -3}, "got -3"),
        ({"objective": "logits"}, "got 'logits'"),
        ({"feature_map": "hedgehg"}, "got 'hedgehg'. Did you mean 'hedgehog'"),
        ({"skip": ["frist"]}, "'frist', which is no module of Net. Did you mean 'first'"),
        ({"match": "third"}, r"2 calls of softmax attention were seen: match='third' and skip=\[\] leave none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        linearize(trained(), rows(), **{"steps": 0, **settings})


def test_models_that_cannot_be_converted_say_why():
    x = rows(1)[0]
    with pytest.raises(ValueError, match=r"No attention of Biased can be converted; .* in no module of its own"):
        linearize(Biased(), [x])
    with pytest.raises(ValueError, match="'0': a bias is added to its scores"):
        linearize(nn.Sequential(Biased()), [x])
    with pytest.raises(ValueError, match="0 calls of softmax attention were seen: it must run through"):
        linearize(nn.Linear(16, 16), [x])
    with pytest.raises(ValueError, match="the model calls it itself, in no module of its own"):
        linearize(Own(), [x])
    with pytest.raises(ValueError, match="adds keys of its own"):
        linearize(
            nn.Sequential(nn.MultiheadAttention(16, 2, add_bias_kv=True)), [x], forward=lambda m, b: m[0](b, b, b)
        )
    with pytest.raises(ValueError, match="batches is empty"):
        linearize(trained(), iter([]))
    with pytest.raises(TypeError, match=r"A batch is a tensor, a dictionary or .* got int"):
        call_on(trained(), 3)
    net = nn.Sequential(Own())
    net[0].linear = nn.Identity()
    with pytest.raises(ValueError, match="Own has a 'linear' of its own"):
        linearize(net, [x])


def test_tuning_without_anything_to_tune_is_refused():
    with pytest.raises(ValueError, match="Net has nothing to tune: convert it with linearize first"):
        low_rank_tuning_(trained(), rows(), loss=lambda m, x: m(x).mean(), steps=1)
    model = linearize(trained(), rows(), steps=0).model
    with pytest.raises(ValueError, match="rank must be positive, got 0"):
        low_rank_tuning_(model, rows(), loss=lambda m, x: m(x).mean(), steps=1, rank=0)
    with pytest.raises(ValueError, match="batches is empty"):
        low_rank_tuning_(model, [], loss=lambda m, x: m(x).mean(), steps=1)


def test_shapes_that_do_not_fit_are_refused():
    layer, (q, k, v) = drawn(4), qkv(6)
    with pytest.raises(ValueError, match="window is a number of positions, 0 for linear attention alone, got -2"):
        HybridAttention(2, 8, window=-2)
    with pytest.raises(ValueError, match=r"takes \(batch, 2 heads, length, dim\), got q \(3, 1, 6, 8\)"):
        layer(q[:, :1], k, v, causal=True)
    with pytest.raises(ValueError, match="need dim 8 and keys as many values"):
        layer(q[..., :4], k[..., :4], v, causal=True)
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        layer(q, k[:, :, :4], v[:, :, :4], causal=True)
    with pytest.raises(ValueError, match="A window of 4 positions needs keys at the positions of the queries"):
        layer(q[:, :, :4], k, v, causal=False)
    with pytest.raises(ValueError, match=r"real must be bool of shape \(batch, keys\) = \(3, 6\), got torch.int64"):
        layer(q, k, v, causal=True, real=torch.ones(3, 6, dtype=torch.long))
    _, state = layer(q, k, v, causal=True)
    with pytest.raises(ValueError, match="A state of batch 3 goes on with causal=True and the same batch"):
        layer(q[:2], k[:2], v[:2], causal=True, state=state)
