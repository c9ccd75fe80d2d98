"""Layers of linear attention and their feature maps."""

from __future__ import annotations

import re

import pytest
import torch

from eke.nn import FAVOR, T2R, Hedgehog, LinearAttention

KINDS = {
    "plain": {}, "relu": {"feature_map": "relu"}, "t2r": {"feature_map": T2R(4, 8, 6)},
    "hedgehog": {"feature_map": Hedgehog(4, 8)}, "favor": {"feature_map": FAVOR(8, 32)},
    "retention": {"decay": "retention"}, "scalar": {"decay": "scalar"}, "vector": {"decay": "vector"},
    "delta": {"delta": True}, "gated delta": {"decay": "scalar", "delta": True},
}  # fmt: skip


def layer(kind, **options):
    torch.manual_seed(0)
    return LinearAttention(32, 4, **{"causal": True, **KINDS[kind], **options}).double()


def inputs(length=21):
    return torch.randn(3, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_position_by_position_gives_the_same(kind):
    made, x = layer(kind), inputs()
    expected, last = made(x)
    state, steps = None, []
    for t in range(x.shape[1]):
        out, state = made(x[:, t : t + 1], state=state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_derivative(kind):
    made = layer(kind).train()
    made(inputs())[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind):
    made, x = layer(kind), inputs()
    expected, last = made(x)
    padded = torch.cat([torch.randn(3, 5, 32, dtype=torch.float64), x], 1)
    mask = torch.ones(3, 26, dtype=torch.bool)
    mask[:, :5] = False
    out, state = made(padded, mask=mask)
    torch.testing.assert_close(out[:, 5:], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind):
    made, x = layer(kind), inputs()
    out, state = made(x.reshape(1, -1, 32), cu_seqlens=torch.tensor([0, 21, 42, 63]))
    expected, last = made(x)
    torch.testing.assert_close(out.view_as(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "hedgehog", "favor"])
def test_without_causality_a_context_is_attended_to(kind):
    made, x = layer(kind, causal=False), inputs()
    expected, _ = made(x)
    torch.testing.assert_close(made(x, context=x)[0], expected, rtol=0, atol=1e-12)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(made(x, context=x[:, order])[0], expected, rtol=0, atol=1e-12)
    assert made(x, context=inputs(7))[0].shape == x.shape


def test_half_precision_layers_keep_single_precision_states():
    made = LinearAttention(32, 4, causal=True, dtype=torch.bfloat16)
    out, state = made(inputs().bfloat16())
    assert (out.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    again, _ = made(inputs(1).bfloat16(), state=state)
    assert again.dtype == torch.bfloat16


def test_states_are_saved_and_go_on(tmp_path):
    from safetensors.torch import load_file, save_file

    made, x = layer("plain"), inputs()
    _, state = made(x[:, :10])
    save_file({"memory": state.memory, "keys": state.keys}, tmp_path / "prefix.safetensors")
    found = load_file(tmp_path / "prefix.safetensors")
    out, _ = made(x[:, 10:], state=(found["memory"], found["keys"]))
    torch.testing.assert_close(out, made(x)[0][:, 10:], rtol=0, atol=1e-12)


def test_modules_train_under_compile():
    made, x = LinearAttention(32, 4, causal=True), inputs().float()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    out, _ = compiled(x)
    torch.testing.assert_close(out, made(x)[0])
    found = torch.autograd.grad(out.square().sum(), list(made.parameters()))
    expected = torch.autograd.grad(made(x)[0].square().sum(), list(made.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_random_features_give_the_kernel_of_the_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(40, 16, generator=generator, dtype=torch.float64) / 2 for _ in range(2))
    made = FAVOR(16, 100_000, generator=generator).double()
    exact = torch.exp(q @ k.T / 4)
    assert float((made(q) @ made(k).T / exact - 1).abs().median()) < 0.01
    before = made.directions.clone()
    made.redraw(generator=generator)
    assert not torch.equal(before, made.directions)
    groups = before[:16] @ before[:16].T
    torch.testing.assert_close(groups, torch.diag(groups.diagonal()), rtol=0, atol=1e-5)


def test_maps_are_what_they_say():
    x = torch.randn(2, 5, 4, 8)
    hedgehog, t2r = Hedgehog(4, 8), T2R(4, 8, 6)
    torch.testing.assert_close(hedgehog(x), torch.cat([x.softmax(-1), (-x).softmax(-1)], -1))
    assert t2r(x).shape == (2, 5, 4, 6)
    assert bool((t2r(x) >= 0).all())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LinearAttention(30, 4), "embed_dim must be a multiple of num_heads, got 30 and 4"),
        (lambda: LinearAttention(32, 4, causal=True, decay="slow"), "'vector', got 'slow'"),
        (lambda: LinearAttention(32, 4, delta=True), "use causal=True"),
        (lambda: layer("plain")(inputs()[0]), "takes (batch, length, 32), got (21, 32)"),
        (lambda: layer("plain")(inputs(), context=inputs()), "it takes no context"),
        (lambda: layer("plain")(inputs()[:2], state=layer("plain")(inputs())[1]), "the batch may not change"),
        (lambda: T2R(4, 0), "T2R needs a positive dim, got 0"),
        (lambda: Hedgehog(0, 8), "Hedgehog needs a positive heads, got 0"),
        (lambda: FAVOR(8, 0), "FAVOR needs a positive features, got 0"),
    ],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()
