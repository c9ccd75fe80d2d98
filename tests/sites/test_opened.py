"""Opened modules compute what the modules do, and their layers see what the matrices multiply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

from eke import sites

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS = [{}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}]


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def both(inner, *args, **kwargs):
    model = Holder(inner.double().eval())
    wanted = model(*args, **kwargs)
    opened = copy.deepcopy(model)
    sites.open_(opened)
    assert type(opened.inner) is not type(model.inner)
    return wanted, opened(*args, **kwargs)


def same(wanted, got):
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(wanted)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        else:
            assert a == b


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("started", [False, True])
def test_opened_recurrent_layers_give_the_same(kind, options, started):
    layers = kind(3, 4, **options)
    x = double(2, 5, 3) if layers.batch_first else double(5, 2, 3)
    number = layers.num_layers * (2 if layers.bidirectional else 1)
    h = double(number, 2, 4)
    state = (h, double(number, 2, 4)) if kind is nn.LSTM else h
    same(*(both(layers, x, state) if started else both(layers, x)))
    same(*both(layers, double(5, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_opened_recurrent_layers_take_packed_sequences(kind, enforce_sorted):
    lengths = torch.tensor([5, 3, 2] if enforce_sorted else [2, 5, 3])
    packed = pack_padded_sequence(double(3, 5, 3), lengths, batch_first=True, enforce_sorted=enforce_sorted)
    same(*both(kind(3, 4, num_layers=2, bidirectional=True), packed))


def test_opened_relu_networks_give_the_same():
    same(*both(nn.RNN(3, 4, nonlinearity="relu"), double(5, 2, 3)))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(2, 3), (3,)], ids=str)
def test_opened_cells_give_the_same(kind, shape):
    same(*both(kind(3, 4), double(*shape)))
    h = double(*shape[:-1], 4)
    same(*both(kind(3, 4), double(*shape), (h, h.sin()) if kind is nn.LSTMCell else h))


ATTENTIONS = {
    "self": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "extra keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "every head": ({}, {"average_attn_weights": False}),
    "float mask": ({}, {"attn_mask": double(5, 5)}),
    "causal": ({}, {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True}),
    "mask of each head": ({}, {"attn_mask": double(4, 5, 5)}),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_opened_attention_gives_the_same(case):
    options, arguments = ATTENTIONS[case]
    attention = nn.MultiheadAttention(8, 2, **options)
    x = double(2, 5, 8) if attention.batch_first else double(5, 2, 8)
    same(*both(attention, x, x, x, **arguments))


def test_opened_attention_takes_other_keys_padding_and_single_samples():
    q, k, v = double(5, 2, 8), double(7, 2, 8), double(7, 2, 8)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    same(*both(nn.MultiheadAttention(8, 2), q, k, v, key_padding_mask=padding))
    same(*both(nn.MultiheadAttention(8, 2), q, k, v, padding, False, double(5, 7)))
    same(*both(nn.MultiheadAttention(8, 2, kdim=6, vdim=4), q, double(7, 2, 6), double(7, 2, 4)))
    same(*both(nn.MultiheadAttention(8, 2), q[:, 0], k[:, 0], v[:, 0]))


def test_an_opened_transformer_layer_gives_the_same():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    opened = copy.deepcopy(model)
    sites.open_(opened)
    x = double(3, 5, 8)
    same(model(x), opened(x))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_an_opened_model_see_what_the_matrices_multiply(kind):
    model = Holder(kind(3, 4, batch_first=True))
    sites.open_(opened := copy.deepcopy(model))
    for site in sites.find(model):
        layer = opened.get_submodule(site.boundary)
        assert torch.equal(layer.weight, site.read(model))
        assert torch.equal(layer.bias, getattr(model.inner, site.bias_name))
        rows = site.inputs_to_rows(double(2, 5, site.shape[1]))
        assert rows.shape == (2, 5, 1, site.shape[1])


def test_a_changed_class_and_the_model_itself_stay_closed():
    class Mine(nn.GRU):
        def forward(self, x):
            return super().forward(2 * x)

    for model in (Holder(Mine(3, 4)), nn.GRU(3, 4), Holder(nn.LSTM(3, 4, proj_size=2))):
        opened = copy.deepcopy(model)
        sites.open_(opened)
        assert [type(m) for m in opened.modules()] == [type(m) for m in model.modules()]
