"""Blocks with either attention, and all of them as one step on the same parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from eke.nn import FusedStep, LinearAttention, SoftmaxAttention, TransformerBlock, fuse


def network(kinds, width=32, heads=4, **options):
    return nn.ModuleList(TransformerBlock(width, heads, inner=48, kind=kind, window=3, **options) for kind in kinds)


def whole(blocks, x, last=None):
    for block in blocks:
        x, _ = block(x)
    return x if last is None else last(x)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"feature_map": "relu"}, {"decay": "retention"}, {"decay": "scalar"}, {"decay": "vector", "delta": True},
        {"delta": True},
    ],
    ids=str,
)  # fmt: skip
def test_the_step_gives_what_the_blocks_give(options):
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention", "sliding_attention", "linear_attention"]
    blocks, last, head = network(kinds, **options), nn.RMSNorm(32), nn.Linear(32, 7)
    step = fuse(blocks, last=last, head=head)
    x = torch.randn(2, 9, 32)
    states = step.decoder.states(2, capacity=9)
    found = torch.stack([step.decoder(x[:, t], states) for t in range(9)], 1)
    with torch.no_grad():
        torch.testing.assert_close(found, head(whole(blocks, x, last)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation):
    torch.manual_seed(0)
    blocks = network(["linear_attention"], activation=activation)
    step = fuse(blocks)
    x = torch.randn(3, 1, 32)
    found = step.decoder(x[:, 0], step.decoder.states(3))
    with torch.no_grad():
        torch.testing.assert_close(found, whole(blocks, x)[:, 0], rtol=1e-5, atol=1e-5)


def test_softmax_attention_sees_its_window_and_no_padding():
    torch.manual_seed(0)
    layer = SoftmaxAttention(16, 2, window=3).double()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        away = (layer(x) - layer(changed)).abs().amax((0, 2))
        assert [t for t in range(8) if away[t] > 1e-9] == [2, 3, 4]
        mask = torch.tensor([[False, False, True, True, True, True, True, True]])
        torch.testing.assert_close(layer(x, mask=mask)[:, 2:], layer(x[:, 2:]), rtol=1e-12, atol=1e-12)
        assert layer(x, mask=mask).isfinite().all()


def test_both_attentions_have_the_same_parameters():
    shapes = [
        {n: p.shape for n, p in network([kind]).named_parameters()} for kind in ("linear_attention", "full_attention")
    ]
    assert shapes[0] == shapes[1]


def test_a_step_knows_when_the_blocks_became_something_else():
    blocks = network(["linear_attention", "full_attention"])
    step = fuse(blocks)
    assert step.current()
    with torch.no_grad():
        blocks[0].up.weight.mul_(2)
    assert step.current()  # read where it lies
    hook = blocks[1].down.register_forward_hook(lambda *_: None)
    assert not step.current()
    assert fuse(blocks) is None
    hook.remove()
    assert step.current()
    blocks[0].up.weight = nn.Parameter(blocks[0].up.weight.detach().clone())
    assert not step.current()
    step = fuse(blocks)
    blocks[1].up = nn.Linear(32, 48)
    assert not step.current()


def test_what_a_step_does_not_know_is_left_to_the_blocks():
    blocks = network(["linear_attention"])
    assert fuse([]) is None
    assert fuse([*blocks, nn.Linear(32, 32)]) is None
    assert fuse([*blocks, *network(["linear_attention"], activation="relu")]) is None
    blocks[0].attention = LinearAttention(32, 4, causal=True, feature_map=torch.exp)
    assert fuse(blocks) is None


def test_a_copy_makes_a_step_of_its_own():
    step = fuse(network(["linear_attention"]))
    assert isinstance(step, FusedStep)
    assert copy.deepcopy(step) is None
    assert pickle.loads(pickle.dumps(step)) is None


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of num_heads, got 30 and 4"):
        SoftmaxAttention(30, 4)
    with pytest.raises(ValueError, match="window is a positive number of positions or None, got 0"):
        SoftmaxAttention(32, 4, window=0)
    with pytest.raises(ValueError, match=r"kind is one of 'linear_attention'.*got 'lsh'"):
        TransformerBlock(32, 4, inner=8, kind="lsh")
    with pytest.raises(ValueError, match=r"activation is one of 'gelu'.*got 'tanh'"):
        TransformerBlock(32, 4, inner=8, activation="tanh")
    with pytest.raises(ValueError, match=r"needs a window .*got None"):
        TransformerBlock(32, 4, inner=8, kind="sliding_attention")
